"""A model spread over two processes learns what one process learns, and its files are those of any
training."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import train
from common.errors import UserError
from formats.checkpoint import read_checkpoint
from formats.heads import HEAD_WEIGHTS, read_heads
from model import ModelConfig
from training import chunked, sharding
from training.objective import skipped_layers
from training.settings import TrainConfig
from training.start import shape_from

SHAPE = ModelConfig(
    vocab_size=300, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, max_len=48, exit_norms=(1, 2),
    exit_layers=(1, 2), classifiers=(1, 2), adapter="lowrank:2",
)  # fmt: skip
CHUNK, FEWEST = 9000, 4  # logits alive at a time: so few that losses are computed in chunks
STEPS = 8

# One process's part of `torchrun train.py`. Environment: STOP, the step after which the last process gets
# SIGTERM.
DRIVER = f"""
import os, signal
import train
from common.errors import run
from common.processes import processes
from training import chunked, runs

chunked.CHUNK["cpu"], chunked.FEWEST = {CHUNK}, {FEWEST}
note = runs.Run.note

def note_and_look(training, row):
    note(training, row)
    if training.config.shard:
        first = training.model.blocks[0].qkv  # in a layer that is never left out
        for part in (first, training.model.embedding, training.optimizer.state.get(first, {{}}).get("exp_avg", first)):
            assert part.to_local().numel() * 2 == part.numel()
    rank, world = processes()
    if row["step"] == int(os.environ["STOP"]) and rank == world - 1:
        os.kill(os.getpid(), signal.SIGTERM)

runs.Run.note = note_and_look
run(train.main)
os._exit(0)  # past the end of the interpreter, where a thread of torch's collectives now and then aborts the process
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two micro-batches a step in each of two processes: layers left out, every kind of head, chunked
    losses."""
    folder, draw = tmp_path_factory.mktemp("files"), random.Random(0)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    for name, lines in {"train.tsv": 200, "dev.tsv": 20}.items():
        texts = [" ".join(draw.choices(words, k=draw.randint(2, 5))) for _ in range(lines)]
        (folder / name).write_text("".join(f"{text}\t{text.upper()}\n" for text in texts))
    return TrainConfig(
        data=(str(folder / "train.tsv"),), dev=(str(folder / "dev.tsv"),), loss="distill", exits=(1, 2),
        classifier=True, layer_dropout=0.7, rows=2, length=48, accumulate=2, lr=0.003, warmup=2, max_steps=STEPS,
        validate_every=4, save_every=100, device="cpu", prefetch=False, shard=True,
    )  # fmt: skip


@pytest.fixture
def alone(config, monkeypatch):
    """The same for one process: four micro-batches a step, of which two and two leave out the same layers."""
    monkeypatch.setitem(chunked.CHUNK, "cpu", CHUNK)
    monkeypatch.setattr(chunked, "FEWEST", FEWEST)
    monkeypatch.setattr(train, "skipped_layers", lambda config, n, number: skipped_layers(config, n, number // 2))
    return dataclasses.replace(config, accumulate=4, shard=False)


def flags(*configs) -> list[str]:
    """The command line that says the same as the configs."""
    words = []
    for config in configs:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if isinstance(value, bool):
                words.append(f"--{'' if value else 'no-'}{field.name.replace('_', '-')}")
            elif field.name != "exit_layers":  # no flag of train.py
                text = ",".join(map(str, value)) or "none" if isinstance(value, tuple) else value
                words.append(f"--{field.name.replace('_', '-')}={text}")
    return words


def run_two(folder: Path, config: TrainConfig, shape: ModelConfig | None = SHAPE, stop: int = 0) -> str:
    """Trains in two processes; what they said on stderr. Skips the test where this torch cannot shard on a
    CPU."""
    driver = folder.with_name(f"{folder.name}.py")
    driver.write_text(DRIVER)
    root = Path(train.__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "STOP": str(stop)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(driver)]
    words = [f"--out={folder}", *flags(*filter(None, (config, shape)))]
    ended = subprocess.run([*command, *words], cwd=root, env=environment, capture_output=True, text=True)
    if "cannot do it on cpu" in ended.stderr:
        pytest.skip("this torch cannot shard on a CPU")
    assert (ended.returncode == 0) == (stop == 0), ended.stderr
    return ended.stderr


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_training(folder: Path, other: Path, **tolerance) -> None:
    """Checkpoints with the same entries and the same numbers in them: weights, moments, results."""
    contents = [read_checkpoint(at / "checkpoint.pt") for at in (folder, other)]
    assert_close(contents[0]["weights"], contents[1]["weights"], **tolerance)
    trainings = [content["training"] for content in contents]
    assert_close(trainings[0]["optimizer"]["state"], trainings[1]["optimizer"]["state"], **tolerance)
    assert trainings[0]["optimizer"]["param_groups"] == trainings[1]["optimizer"]["param_groups"]
    assert contents[0].keys() == contents[1].keys() and trainings[0].keys() == trainings[1].keys()


CLOSE = {"rtol": 0, "atol": 1e-4}  # of 0.003 that a step moves a weight


@pytest.fixture(scope="module")
def sharded(config, tmp_path_factory):
    """A sharded training that nobody interrupted: its folder."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    run_two(folder, config)
    return folder


def test_two_processes_with_half_a_model_each_learn_what_one_learns(sharded, alone, tmp_path):
    train.run_training(alone, SHAPE, tmp_path / "one")
    ours, theirs = log_of(sharded), log_of(tmp_path / "one")
    assert len(ours) == STEPS + 2 and sum("layers" in row for row in ours) == 2
    for row, other in zip(ours, theirs):
        if "loss" in row:
            assert row["loss"] == pytest.approx(other["loss"], abs=2e-4)
        else:
            assert row["layers"]["3"] == pytest.approx(other["layers"]["3"], abs=2e-4)
    assert_same_training(sharded, tmp_path / "one", **CLOSE)
    files = [read_checkpoint(folder / "model.pt") for folder in (sharded, tmp_path / "one")]
    assert_close(files[0]["weights"], files[1]["weights"], rtol=0, atol=1e-3)  # float16


def test_a_sharded_training_that_was_stopped_goes_on_sharded_or_not(sharded, config, alone, tmp_path):
    run_two(tmp_path / "two", config, stop=5)
    assert read_checkpoint(tmp_path / "two" / "checkpoint.pt")["training"]["step"] == 5
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    run_two(tmp_path / "two", config)
    assert_same_training(tmp_path / "two", sharded, rtol=0, atol=0)
    assert [row["step"] for row in log_of(tmp_path / "two") if "loss" in row] == list(range(1, STEPS + 1))
    train.run_training(alone, SHAPE, tmp_path / "one")
    assert_same_training(tmp_path / "one", sharded, **CLOSE)


def test_a_training_of_one_process_goes_on_sharded(sharded, config, alone, tmp_path, monkeypatch):
    loop = train.train_loop

    def half(training, *more):
        monkeypatch.setattr(train, "total", lambda value, device: training.step == 5 if value == 0 else value)
        loop(training, *more)

    monkeypatch.setattr(train, "train_loop", half)
    with pytest.raises(SystemExit):
        train.run_training(alone, SHAPE, tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["training"]["step"] == 5
    run_two(tmp_path / "run", config)
    assert_same_training(tmp_path / "run", sharded, **CLOSE)


def test_heads_alone_in_bfloat16_with_recomputed_blocks_learn_and_leave_the_rest(sharded, config, tmp_path):
    changes = {"train": "heads", "init": str(sharded / "model.pt"), "layer_dropout": 0.0, "dtype": "bfloat16"}
    heads = dataclasses.replace(config, **changes, recompute=True)
    run_two(tmp_path / "two", heads, None)
    train.run_training(dataclasses.replace(heads, accumulate=4, shard=False), shape_from(heads, {}), tmp_path / "one")
    start = read_checkpoint(sharded / "model.pt")["weights"]
    two, one = [read_heads(tmp_path / run / "heads.pt")["weights"] for run in ("two", "one")]
    assert set(two) == set(one) == {name for name in start if name.startswith(HEAD_WEIGHTS)}
    for name, weight in one.items():
        moved = (weight - start[name]).abs().max()
        assert moved > 0 and (two[name] - weight).abs().mean() < 0.1 * moved, name


# ---------------------------------------------------------------- what cannot be


def test_sharding_needs_several_processes_and_a_torch_that_averages(config, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="shard is True, but there is one process; start several: torchrun"):
        train.run_training(config, SHAPE, tmp_path / "run")
    monkeypatch.setattr(sharding, "processes", lambda: (0, 2))
    monkeypatch.setattr(sharding, "averages_gradients", lambda device: False)
    with pytest.raises(UserError, match=rf"torch {torch.__version__.partition('+')[0]}.* cannot do it on cpu"):
        train.run_training(config, SHAPE, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("factor", "right"), [(1.0, False), (1.5, True)])
def test_gradients_must_be_the_mean_of_the_processes(factor, right, monkeypatch):
    """Of two processes whose gradients are 1 and 2, this one makes 1: times 1.5 it would be the mean."""

    def pretended(module: nn.Module, mesh) -> nn.Module:
        module.weight.register_hook(lambda gradient: gradient * factor)
        return module

    monkeypatch.setattr(sharding, "processes", lambda: (0, 2))
    monkeypatch.setattr(sharding, "mesh_of_all", lambda device: None)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", pretended)
    assert sharding.averages_gradients("cpu") is right


def test_a_torch_that_raises_cannot_shard(monkeypatch):
    monkeypatch.setattr(sharding, "mesh_of_all", lambda device: None)
    monkeypatch.delattr("torch.distributed.fsdp.fully_shard")
    assert not sharding.averages_gradients("cpu")
