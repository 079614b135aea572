"""Two processes of torchrun learn what one process learns, and their files are those of any training."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.testing import assert_close

import train
from formats.checkpoint import read_checkpoint, weights_of
from model import ModelConfig
from tests.test_train import flags
from training.settings import TrainConfig
from training.start import make_model

SHAPE = ModelConfig(
    vocab_size=300, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, max_len=48, exit_norms=(1, 2),
    exit_layers=(1, 2), classifiers=(1, 2), adapter="lowrank:2",
)  # fmt: skip
STEPS, STOP = 8, 5

# One of two processes under torchrun; the last one gets SIGTERM after STOP.
DRIVER = f"""
import os, signal
import train
import torch.distributed as dist
from common.errors import run
from training import runs

note = runs.Run.note

def note_and_stop(training, row):
    note(training, row)
    if row["step"] == {STOP} and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)

runs.Run.note = note_and_stop
try:
    run(train.main)
except SystemExit as ended:
    assert ended.code == 128 + signal.SIGTERM
os._exit(0)  # past the end of the interpreter, where a thread of torch's collectives now and then aborts the process
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two micro-batches a step in each of two processes; some layers are left out, and there are exits of
    every kind."""
    folder, draw = tmp_path_factory.mktemp("files"), random.Random(0)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    for name, lines in {"train.tsv": 200, "dev.tsv": 20}.items():
        texts = [" ".join(draw.choices(words, k=draw.randint(2, 5))) for _ in range(lines)]
        (folder / name).write_text("".join(f"{text}\t{text.upper()}\n" for text in texts))
    return TrainConfig(
        data=(str(folder / "train.tsv"),), dev=(str(folder / "dev.tsv"),), loss="distill", exits=(1, 2),
        classifier=True, layer_dropout=0.8, rows=2, length=24, accumulate=2, lr=1e-3, warmup=2, max_steps=STEPS,
        validate_every=4, device="cpu",
    )  # fmt: skip


def in_two_processes(config: TrainConfig, folder: Path) -> Path:
    root, driver = Path(train.__file__).parent, folder.with_suffix(".py")
    driver.write_text(DRIVER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(driver)]
    words = [*command, f"--out={folder}", *flags(config, SHAPE)]
    ended = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope="module")
def stopped(config, tmp_path_factory) -> Path:
    """The folder of a training run of two processes that was stopped."""
    return in_two_processes(config, tmp_path_factory.mktemp("two") / "run")


def test_two_processes_go_on_to_the_end(stopped, config, tmp_path):
    folder = in_two_processes(config, shutil.copytree(stopped, tmp_path / "run"))
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").open()]
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8] and read_checkpoint(folder / "model.pt")["provenance"]["steps"] == STEPS


def test_two_processes_learn_what_one_learns_which_goes_on_where_they_stopped(stopped, config, tmp_path):
    """Layers left out and classifiers take no part in some micro-batches; the padding of each differs, and so
    do its targets. After eight steps the weights agree far closer than they have moved."""
    config = dataclasses.replace(config, accumulate=4)
    assert read_checkpoint(stopped / "checkpoint.pt")["training"]["step"] == STOP
    both, alone = shutil.copytree(stopped, tmp_path / "both"), tmp_path / "alone"
    train.run_training(config, SHAPE, both)
    train.run_training(config, SHAPE, alone)
    rows = [[json.loads(line) for line in (folder / "log.jsonl").open()] for folder in (both, alone)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for row, other in zip(*rows):
        assert row.get("loss") == pytest.approx(other.get("loss"), abs=2e-4)
        assert row.get("layers", {}).get("3") == pytest.approx(other.get("layers", {}).get("3"), abs=2e-4)
    contents = [read_checkpoint(folder / "checkpoint.pt") for folder in (both, alone)]
    states = [content["training"] for content in contents]
    assert contents[0].keys() == contents[1].keys() and states[0].keys() == states[1].keys()
    assert_close(states[0]["optimizer"]["state"], states[1]["optimizer"]["state"], rtol=0, atol=1e-4)
    start = weights_of(make_model(config, SHAPE))
    for name, weight in contents[0]["weights"].items():
        expected = contents[1]["weights"][name]
        moved = (expected - start[name]).abs().max()
        assert moved > 1e-3 and (weight - expected).abs().max() < 0.05 * moved, name
