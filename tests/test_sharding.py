"""A model spread over two processes learns what one process learns, and its files are those of any
training."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn
from torch.testing import assert_close

import train
from common.errors import UserError
from formats.checkpoint import read_checkpoint
from formats.heads import HEAD_WEIGHTS, read_heads
from model import ModelConfig
from tests.test_train import flags
from training import losses, parallel
from training.objective import skipped_layers
from training.settings import TrainConfig
from training.start import make_model, shape_from

SHAPE = ModelConfig(
    vocab_size=300, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, max_len=48, exit_norms=(1, 2),
    exit_layers=(1, 2), classifiers=(1, 2), adapter="lowrank:2",
)  # fmt: skip
CHUNK, FEWEST = 9000, 4  # logits alive at a time: so few that losses are computed in chunks
STEPS = 8

# One of two processes under torchrun. It runs train.py several times: COMMANDS holds the words of each, and at
# which step the last process gets SIGTERM (0: never). The folder of a run that was stopped is copied. The
# processes are started, and meet, only once, since this is what takes the time.
DRIVER = f"""
import contextlib, json, os, shutil, signal, sys
import train
import torch.distributed as dist
from common.errors import run
from training import losses, runs

losses.CHUNK["cpu"], losses.FEWEST = {CHUNK}, {FEWEST}
meet = dist.init_process_group
dist.init_process_group = lambda *args, **more: dist.is_initialized() or meet(*args, **more)
dist.destroy_process_group = lambda: None
note = runs.Run.note

def note_and_look(training, row):
    note(training, row)
    if training.config.shard:
        first = training.model.blocks[0].qkv  # in a layer that is never left out
        for part in (first, training.model.embedding, training.optimizer.state.get(first, {{}}).get("exp_avg", first)):
            assert part.to_local().numel() * 2 == part.numel()
    if row["step"] == stop and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)

runs.Run.note = note_and_look
for folder, stop, words in json.loads(os.environ["COMMANDS"]):
    sys.argv = ["train.py", f"--out={{folder}}", *words]
    with contextlib.suppress(SystemExit):
        run(train.main)
    dist.barrier()
    if stop and dist.get_rank() == 0:
        shutil.copytree(folder, f"{{folder}} stopped")
    dist.barrier()
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
        validate_every=4, device="cpu", shard=True,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def chunked(monkeypatch):
    monkeypatch.setitem(losses.CHUNK, "cpu", CHUNK)
    monkeypatch.setattr(losses, "FEWEST", FEWEST)


@pytest.fixture
def alone(config, monkeypatch):
    """The same for one process: four micro-batches a step, of which two and two leave out the same layers."""
    drawn = lambda config, n, number: skipped_layers(config, n, number // 2)  # noqa: E731
    monkeypatch.setattr("training.objective.skipped_layers", drawn)
    return dataclasses.replace(config, accumulate=4, shard=False)


def of_copies(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, shard=False, layer_dropout=0.8, length=24, lr=1e-3)


def of_heads(config: TrainConfig, model: Path) -> TrainConfig:
    changes = {"train": "heads", "init": str(model), "layer_dropout": 0.0, "dtype": "bfloat16", "recompute": True}
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def runs_of_two(config, tmp_path_factory) -> tuple[Path, str]:
    """Training runs of two processes, and what they said on stderr: in `copies` each process has the whole
    model; in `sharded` a run is stopped after step 5 and goes on; `heads` are trained on its result."""
    folder = tmp_path_factory.mktemp("two")
    heads = of_heads(config, folder / "sharded" / "model.pt")
    commands = [
        (f"{folder}/copies", 0, flags(of_copies(config), SHAPE)),
        (f"{folder}/sharded", 5, flags(config, SHAPE)),
        (f"{folder}/sharded", 0, flags(config, SHAPE)),
        (f"{folder}/heads", 0, flags(heads)),
    ]
    root, driver = Path(train.__file__).parent, folder / "driver.py"
    driver.write_text(DRIVER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "COMMANDS": json.dumps(commands)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(driver)]
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return folder, ended.stderr


@pytest.fixture
def two(runs_of_two) -> Path:
    folder, said = runs_of_two
    if "cannot --shard on cpu" in said:
        pytest.skip("this torch cannot shard on a CPU")
    return folder


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> list[float]:
    return [row["loss"] for row in log_of(folder) if "loss" in row]


def assert_same_training(folder: Path, other: Path) -> None:
    """Checkpoints with the same entries and the same numbers in them: weights, moments, results. A step moves
    a weight by up to 0.003."""
    contents = [read_checkpoint(at / "checkpoint.pt") for at in (folder, other)]
    assert_close(contents[0]["weights"], contents[1]["weights"], rtol=0, atol=1e-4)
    trainings = [content["training"] for content in contents]
    assert_close(trainings[0]["optimizer"]["state"], trainings[1]["optimizer"]["state"], rtol=0, atol=1e-4)
    assert trainings[0]["optimizer"]["param_groups"] == trainings[1]["optimizer"]["param_groups"]
    assert contents[0].keys() == contents[1].keys() and trainings[0].keys() == trainings[1].keys()


def test_two_processes_with_a_whole_model_each_learn_what_one_learns(runs_of_two, config, tmp_path):
    """Layers left out and classifiers take no part in some micro-batches; the padding of each differs, and so
    do its targets. After eight steps the weights agree far closer than they have moved."""
    copies, one = runs_of_two[0] / "copies", dataclasses.replace(of_copies(config), accumulate=4)
    alone, start = train.run_training(one, SHAPE, tmp_path).state_dict(), make_model(one, SHAPE).state_dict()
    assert losses_of(copies) == pytest.approx(losses_of(tmp_path), abs=2e-4)
    for name, weight in read_checkpoint(copies / "checkpoint.pt")["weights"].items():
        moved = (alone[name] - start[name]).abs().max()
        assert moved > 1e-3 and (weight - alone[name]).abs().max() < 0.05 * moved, name


def test_two_processes_with_half_a_model_each_learn_what_one_learns_also_after_a_stop(two, alone, tmp_path):
    sharded, stopped = two / "sharded", two / "sharded stopped"
    train.run_training(alone, SHAPE, tmp_path)
    ours, theirs = log_of(sharded), log_of(tmp_path)
    assert len(ours) == STEPS + 2 and sum("layers" in row for row in ours) == 2
    assert losses_of(sharded) == pytest.approx(losses_of(tmp_path), abs=2e-4)
    for row, other in zip(ours, theirs):
        assert row.get("layers", {}).get("3") == pytest.approx(other.get("layers", {}).get("3"), abs=2e-4)
    assert_same_training(sharded, tmp_path)
    files = [read_checkpoint(folder / "model.pt") for folder in (sharded, tmp_path)]
    assert_close(files[0]["weights"], files[1]["weights"], rtol=0, atol=1e-3)  # float16
    assert read_checkpoint(stopped / "checkpoint.pt")["training"]["step"] == 5
    train.run_training(alone, SHAPE, stopped)  # what was stopped goes on in one process, too
    assert_same_training(stopped, tmp_path)
    assert [row["step"] for row in log_of(stopped) if "loss" in row] == list(range(1, STEPS + 1))


def test_heads_alone_in_bfloat16_with_recomputed_blocks_learn_and_leave_the_rest(two, config, tmp_path):
    heads = dataclasses.replace(of_heads(config, two / "sharded" / "model.pt"), accumulate=4, shard=False)
    train.run_training(heads, shape_from(heads, {}), tmp_path)
    start = read_checkpoint(heads.init)["weights"]
    found, expected = [read_heads(folder / "heads.pt")["weights"] for folder in (two / "heads", tmp_path)]
    assert set(found) == set(expected) == {name for name in start if name.startswith(HEAD_WEIGHTS)}
    for name, weight in expected.items():
        moved = (weight - start[name]).abs().max()
        assert moved > 0 and (found[name] - weight).abs().mean() < 0.1 * moved, name


# ---------------------------------------------------------------- what cannot be


def test_sharding_needs_several_processes_and_a_torch_that_averages(config, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--shard needs several processes"):
        train.run_training(config, SHAPE, tmp_path / "run")
    monkeypatch.setattr(parallel, "processes", lambda: (0, 2))
    monkeypatch.setattr(parallel, "averages_gradients", lambda device: False)
    with pytest.raises(UserError, match="cannot --shard on cpu"):
        train.run_training(config, SHAPE, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("factor", "right"), [(1.0, False), (1.5, True)])
def test_gradients_must_be_the_mean_of_the_processes(factor, right, monkeypatch):
    """Of two processes whose gradients are 1 and 2, this one makes 1: times 1.5 it would be the mean."""

    def pretended(module: nn.Module, mesh) -> nn.Module:
        module.weight.register_hook(lambda gradient: gradient * factor)
        return module

    monkeypatch.setattr(parallel, "processes", lambda: (0, 2))
    monkeypatch.setattr(parallel, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", pretended)
    assert parallel.averages_gradients("cpu") is right
