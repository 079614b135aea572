"""minimal.py says what decode.py says. Both compute in float64: their forms of one product then differ by
some 1e-6 at most (the project keeps logits in float32), and nothing lies so close: no confidence to the
threshold, no two best tokens to each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minimal
from decode import DecodeConfig, generate, load_checkpoint
from formats.checkpoint import read_checkpoint, save_checkpoint
from formats.data import read_examples, task_file

SOURCE = Path(minimal.__file__)
CHECKPOINT = SOURCE.parent / "checkpoints" / "default.pt"
EXITS, LENGTH = (4, 6, 8), 10  # LENGTH: new tokens at most, where some texts end by themselves


@pytest.fixture(scope="module")
def models():
    """The checkpoint as minimal.py and as the project read it."""
    return minimal.Llama(CHECKPOINT, torch.float64), load_checkpoint(CHECKPOINT, dtype=torch.float64)[0]


@pytest.fixture(scope="module")
def prompts(models):
    """Token ids of the first inputs of both tasks' dev sets, six of each."""
    tokenizer, found = models[0].tokenizer, []
    for task in ("translation", "e2e"):
        for example in read_examples(task_file(task, "dev"))[:6]:
            found.append([tokenizer.bos_id(), *tokenizer.encode(example.prompt + "<sep>")])
    return found


@pytest.mark.parametrize("verify", [False, True], ids=["softmax", "verified"])
def test_texts_and_their_exit_layers_are_those_of_decode(models, prompts, verify):
    small, model = models
    decode = minimal.generate_verified if verify else minimal.generate
    threshold = 0.3 if verify else 0.6  # low enough for drafts that are wrong
    config = DecodeConfig(confidence="softmax", threshold=threshold, exit_layers=EXITS, max_new_tokens=LENGTH, verify=verify)
    layers, ends, rolled_back = set(), set(), 0
    for prompt in prompts:
        out = generate(model, prompt, config)
        assert decode(small, prompt, EXITS, threshold, len(prompt) + LENGTH) == (out.tokens, out.exit_layers)
        layers.update(out.exit_layers)
        ends.add(out.tokens[-1] == small.eos)
        rolled_back += out.counters.drafted - out.counters.accepted
    assert len(layers) > 2 and small.L in layers and ends == {False, True}  # else the test would say little
    assert (rolled_back > 0) == verify


@pytest.mark.parametrize("verify", [False, True], ids=["softmax", "verified"])
def test_an_exits_own_norm_is_used_and_what_else_a_checkpoint_holds_is_passed_over(tiny_model, tmp_path, verify):
    """A random model with norms of its own at two exits, and classifiers. Its upper blocks change little, so
    that some drafts are kept, some rolled back; texts of every length, so that the limit falls anywhere in a
    run of drafts."""
    model = tiny_model(3, vocab_size=4096, n_kv_heads=4, exit_norms=(2, 3))
    for block in model.blocks[1:]:
        block.out.weight.mul_(0.2)
        block.down.weight.mul_(0.2)
    tokenizer = read_checkpoint(CHECKPOINT)["tokenizer"].numpy().tobytes()
    save_checkpoint(tmp_path / "tiny.pt", model, tokenizer, provenance={"by": "hand"})
    small = minimal.Llama(tmp_path / "tiny.pt", torch.float64)
    model, _ = load_checkpoint(tmp_path / "tiny.pt", dtype=torch.float64)
    decode = minimal.generate_verified if verify else minimal.generate
    exits, threshold, layers, rolled_back = (1, 2, 3, 4), 0.003, set(), 0
    for length in range(1, 20, 2):
        prompt = [1, 7 * length, 3, 9]
        config = DecodeConfig(confidence="softmax", threshold=threshold, exit_layers=exits, max_new_tokens=length, verify=verify)
        out = generate(model, prompt, config)
        assert decode(small, prompt, exits, threshold, len(prompt) + length) == (out.tokens, out.exit_layers)
        layers.update(out.exit_layers)
        rolled_back += out.counters.drafted - out.counters.accepted
    assert {2, 3, 5} <= layers and (rolled_back > 0) == verify


def test_it_is_one_short_file_on_its_own():
    """At most 140 lines; of what is installed it imports torch and sentencepiece
    alone."""
    lines = SOURCE.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 140
    imported = set()
    for node in ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "sentencepiece"}


def test_the_command_prints_every_tokens_layer_and_the_speed_beside_full_depth():
    command = [sys.executable, SOURCE.name, "Guten Morgen!"]
    printed = subprocess.run(command, cwd=SOURCE.parent, capture_output=True, text=True, check=True).stdout
    runs = [block.splitlines() for block in printed.strip().split("\n\n")]
    names = [speed.split(":")[0] for speed, _ in runs]
    assert names == ["generate ()", "generate (4, 6, 8)", "generate_verified (4, 6, 8)"]
    (full, at), (_, early), (same, _) = (text.split("  exit layers: ") for _, text in runs)
    assert set(at.split()) == {"12"} != set(early.split()) and same == full  # verified: the full model's text
    assert all("tokens/s" in speed and speed.endswith("full depth") for speed, _ in runs)
