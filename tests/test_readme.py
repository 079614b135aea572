"""What the README says: its commands parse, its files exist, and the embedded model is what it should be."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from decode import DEFAULT_CHECKPOINT, generate
from decoding.settings import DecodeConfig
from evaluation.rows import MAIN, read_settings
from evaluation.tasks import find_task
from formats.tokenizer import encode_prompt
from model import load_checkpoint

ROOT = Path(__file__).parent.parent
FOLDERS = ("common", "decoding", "evaluation", "formats", "tools", "training", "tests", "checkpoints", "data", "docs")
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")))
RUN = r"(?:^    |&& |`)(?:python|torchrun --\S+ \d+) ((?:decode|train|eval|convert)\.py[^`\n]*)"
COMMANDS = re.findall(RUN, DOCUMENTS, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    script, *words = shlex.split(command, comments=True)
    importlib.import_module(script.removesuffix(".py")).make_parser().parse_args(words)


def test_the_commands_are_found():
    assert {command.split()[0] for command in COMMANDS} >= {"convert.py", "decode.py", "train.py", "eval.py"} and len(COMMANDS) >= 8


def test_the_test_command_is_the_one_that_ci_runs():
    command = "pip install -r requirements.txt && python -m pytest"
    assert f"\n{command}\n" in README and command in (ROOT / ".ci" / "run").read_text()


def test_the_file_list_is_complete():
    listed = set(re.findall(r"^    (\w+\.py|\w+/)  ", README, re.MULTILINE))
    there = {path.name for path in ROOT.glob("*.py")} | {f"{name}/" for name in FOLDERS}
    assert listed == there


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z]+@|TODO|TBD", DOCUMENTS)


def test_every_picture_is_there():
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / name).is_file(), name


def test_the_embedded_model_is_small_and_plain():
    assert DEFAULT_CHECKPOINT.stat().st_size < 25e6
    content = torch.load(DEFAULT_CHECKPOINT, weights_only=True)
    assert {weight.dtype for weight in content["weights"].values()} == {torch.float16}
    assert 8e6 <= sum(weight.numel() for weight in content["weights"].values()) <= 12e6


@pytest.mark.parametrize("task", ["translation", "e2e"])
def test_the_embedded_settings_fit_the_embedded_model(task):
    model, _ = load_checkpoint(DEFAULT_CHECKPOINT)
    rows = read_settings(DEFAULT_CHECKPOINT.with_suffix(".json"), find_task(task), model, {})
    assert set(MAIN) <= set(rows) and {name.split()[0] for name in rows} == set(MAIN) and len(rows) == 13


def test_the_embedded_model_translates_and_describes():
    model, tokenizer = load_checkpoint(DEFAULT_CHECKPOINT)
    assert tokenizer.decode(generate(model, encode_prompt(tokenizer, "Ich liebe dich."), DecodeConfig()).tokens) == "I love you."
    facts = encode_prompt(tokenizer, "name[The Punter], eatType[pub], food[Italian]")
    text = tokenizer.decode(generate(model, facts, DecodeConfig()).tokens)
    assert "The Punter" in text and "Italian" in text and "pub" in text

