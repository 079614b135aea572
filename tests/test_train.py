"""Training: the loss over exits, one step, interruption and resumption, and every mistake of the user in one
line."""

import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import train
from common.errors import run
from common.processes import process_group
from formats import data
from formats.checkpoint import read_checkpoint, save_checkpoint
from formats.classifiers import belief
from formats.heads import read_heads
from formats.int8 import Int8Matrix
from formats.tokenizer import encode_prompt
from model import Block, ModelConfig, Transformer, load_checkpoint
from train import train_step
from training import batches as batching
from training import losses, runs
from training.device import DeviceBatch, on_device, to_device
from training.losses import sum_of_losses
from training.objective import Objective
from training.optimizer import learning_rate, make_optimizer
from training.runs import locked
from training.settings import TrainConfig
from training.start import load_data, make_model, prepare_data, prepare_tokenizer, shape_from
from training.validation import validate

SHAPE = ModelConfig(
    vocab_size=300, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, max_len=48, exit_norms=(1, 2), exit_layers=(1, 2)
)
ENGLISH, FRENCH = "one two three four five six seven eight", "un deux trois quatre cinq six sept huit"
WORDS = dict(zip(ENGLISH.split(), FRENCH.split()))
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a tiny translation task, an empty file and a malformed one."""
    folder, draw = tmp_path_factory.mktemp("files"), random.Random(0)
    for name, lines in {"train.tsv": 300, "dev.tsv": 20}.items():
        texts = [draw.choices(list(WORDS), k=draw.randint(2, 5)) for _ in range(lines)]
        (folder / name).write_text("".join(f"{' '.join(text)}\t{' '.join(map(WORDS.get, text))}\n" for text in texts))
    (folder / "empty.tsv").touch()
    (folder / "malformed.tsv").write_text("one\tun\ntwo deux\n")
    return folder


@pytest.fixture(scope="module")
def config(files):
    return TrainConfig(
        data=(str(files / "train.tsv"),), dev=(str(files / "dev.tsv"),), loss="rotate", exits=(1, 2), per_step=1,
        max_steps=12, rows=2,
        length=48, accumulate=2, lr=0.01, warmup=2, device="cpu", validate_every=6, save_every=5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A training that nobody interrupted: its folder and the weights it ended with."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, weights(train.run_training(config, SHAPE, folder))


def untrained() -> Transformer:
    torch.manual_seed(0)
    return Transformer(SHAPE)


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def on_cpu(*parts: batching.Batch) -> Iterator[DeviceBatch]:
    """These batches as a step takes them."""
    return iter([to_device(part, "cpu") for part in parts])


def random_batch(learned: int, seed: int = 0) -> batching.Batch:
    """Two rows of 12 positions, two documents each, of which the last `learned` targets of a row are
    learned."""
    tokens = np.random.default_rng(seed).integers(0, SHAPE.vocab_size, (2, 13))
    targets = np.where(np.arange(12) >= 12 - learned, tokens[:, 1:], -1)
    return batching.Batch(tokens[:, :-1], targets, np.array([[1] * 7 + [2] * 5] * 2))


def mean_loss(model: Transformer, batch: batching.Batch) -> torch.Tensor:
    """The definition: minus the mean log-probability of the learned targets, in a full forward pass over each
    document alone."""
    losses = []
    for row, number in np.ndindex(2, 2):
        own = batch.documents[row] == number + 1
        log_p = model(torch.from_numpy(batch.inputs[row, own])[None])[0].log_softmax(-1)
        losses += [-log_p[at, target] for at, target in enumerate(batch.targets[row, own]) if target >= 0]
    return torch.stack(losses).mean()


def test_a_device_that_is_not_there_is_said_before_processes_meet(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="device 'nowhere' is not there"), process_group("nowhere"):
        pass


def test_packed_documents_do_not_see_each_other(tiny_model):
    model, sizes = tiny_model(), [9, 7, 6]
    array = np.zeros(sum(sizes), [("token", "<u2"), ("flags", "u1")])
    array["token"] = np.random.default_rng(0).integers(0, 50, len(array))
    array["flags"][np.cumsum([0, *sizes[:-1]])] = batching.START
    (batch,) = batching.batches(array, rows=1, length=24, seed=None)
    inputs, documents = torch.from_numpy(batch.inputs), torch.from_numpy(batch.documents)
    packed, mixed = model.hidden_states(inputs, documents), model.hidden_states(inputs)
    assert documents.unique().tolist() == [0, 1, 2, 3] and packed[-1].isfinite().all()  # padding is 0
    for document in (1, 2, 3):
        own = documents[0] == document
        alone = model.hidden_states(inputs[:, own])
        for layer in range(6):
            # Not to the bit: the rotary angles differ.
            assert_close(packed[layer][own], alone[layer], rtol=1e-4, atol=1e-4)
        assert document == 1 or (mixed[-1][own] - alone[-1]).abs().max() > 0.1


@pytest.mark.parametrize("loss, taught", [("none", [3]), ("weighted", [1, 2, 3]), ("rotate", [1, 2, 3])])
def test_weighted_and_rotate_teach_every_exit_and_none_the_last_layer_alone(loss, taught, config, tmp_path):
    config = dataclasses.replace(config, loss=loss, max_steps=60, validate_every=60)
    model = train.run_training(config, SHAPE, tmp_path)
    dev = prepare_data(config.dev, prepare_tokenizer(config, tmp_path, SHAPE.vocab_size), tmp_path, config.length)
    before, after = (validate(each, dev, config) for each in (untrained(), model))
    assert all(after[layer][0] < 0.5 * before[layer][0] for layer in taught)
    assert [layer for layer in (1, 2) if not torch.equal(model.exit_norms[str(layer)], torch.ones(32))] == taught[:-1]


def test_one_batch_is_learned_by_heart():
    model, batch = untrained(), random_batch(learned=8)
    config = TrainConfig(loss="weighted", exits=(1, 2), lr=0.01, warmup=5, max_steps=100, device="cpu")
    optimizer = make_optimizer(model, config)
    losses = [
        train_step(Objective(model, config), optimizer, itertools.repeat(to_device(batch, "cpu")), config, step) for step in range(100)
    ]
    assert losses[0] == pytest.approx(math.log(300), abs=0.2) and losses[-1] < 0.02  # from a uniform guess to none


# ---------------------------------------------------------------- one step


def test_learning_rate_by_hand():
    config = TrainConfig(lr=2.0, min_lr=0.1, warmup=4, max_steps=12)
    middle = 2 * (0.1 + 0.9 / 2)  # half of the cosine
    by_hand = {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 8: middle, 12: 0.2}
    assert {step: learning_rate(config, step) for step in by_hand} == pytest.approx(by_hand)
    assert learning_rate(dataclasses.replace(config, warmup=0), 0) == 2.0


def test_only_matrices_decay():
    model = untrained()
    before = weights(model)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    make_optimizer(model, TrainConfig(weight_decay=0.1, lr=0.5)).step()
    for name, weight in model.named_parameters():
        assert_close(weight.detach(), before[name] * (1 - 0.5 * 0.1 if weight.dim() == 2 else 1))


def test_every_target_of_a_step_weighs_alike_in_whichever_micro_batch_it_lies():
    model, parts = untrained(), [random_batch(learned=9, seed=1), random_batch(learned=2, seed=2)]
    config = TrainConfig(loss="none", rows=2, accumulate=2, lr=0.1, warmup=0, clip=1e9, device="cpu")
    means, before = [mean_loss(model, part) for part in parts], weights(model)
    mean = (9 * means[0] + 2 * means[1]) / 11
    slopes = torch.autograd.grad(mean, list(model.parameters()), materialize_grads=True)
    loss = train_step(Objective(model, config), torch.optim.SGD(model.parameters()), on_cpu(*parts), config, step=0)
    assert loss == pytest.approx(mean.item(), rel=1e-5)
    assert loss != pytest.approx((means[0] + means[1]).item() / 2, rel=1e-5)
    for (name, weight), slope in zip(model.named_parameters(), slopes):
        assert_close(weight.detach(), before[name] - 0.1 * slope, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_clipped_to_its_largest_norm():
    model, config = untrained(), TrainConfig(loss="none", lr=0.1, warmup=0, clip=0.01, device="cpu")
    before = weights(model)
    train_step(Objective(model, config), torch.optim.SGD(model.parameters()), on_cpu(random_batch(learned=9)), config, step=0)
    moved = torch.cat([(weight - before[name]).flatten() for name, weight in model.named_parameters()])
    assert moved.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_bfloat16_rounds_the_activations_and_keeps_the_weights_in_float32():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model, config = untrained(), TrainConfig(loss="weighted", exits=(1, 2), dtype=dtype, warmup=0, device="cpu")
        before = weights(model)
        losses[dtype] = train_step(Objective(model, config), make_optimizer(model, config), on_cpu(random_batch(learned=9)), config, step=0)
        for name, weight in model.named_parameters():
            assert weight.dtype == torch.float32 and weight.isfinite().all() and not torch.equal(weight, before[name])
    assert losses["bfloat16"] != losses["float32"] and losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)


def test_compiled_blocks_learn_the_same(config, finished, tmp_path, monkeypatch):
    """Every block captured as one graph, then run without generating code: that takes torch a compiler and
    half a minute."""
    monkeypatch.setattr(Block, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager", fullgraph=True))
    model = train.run_training(dataclasses.replace(config, compile=True), SHAPE, tmp_path)
    assert all(block._compiled_call_impl for block in model.blocks)
    assert_close(weights(model), finished[1], rtol=0, atol=1e-4)


def test_batches_fetched_ahead_are_the_same_in_the_same_order(config, finished):
    _, records, _ = load_data(config, SHAPE, finished[0])
    whole = list(itertools.islice(batching.batches(records, 2, 48, seed=3), 9))
    for prefetch in (True, False):
        stream = on_device(iter(whole), dataclasses.replace(config, prefetch=prefetch))
        for found, batch in itertools.zip_longest(stream, whole):
            assert torch.equal(found.inputs, torch.from_numpy(batch.inputs))
            assert torch.equal(found.documents, torch.from_numpy(batch.documents))
            rows, columns = np.nonzero(batch.targets >= 0)
            assert found.learned.tolist() == (48 * rows + columns).tolist()
            assert found.targets.tolist() == batch.targets[rows, columns].tolist()


def test_a_mistake_in_the_data_comes_through_from_the_thread_that_fetches(config):
    records = np.zeros(60, [("token", "<u2"), ("flags", "u1")])
    records["flags"][0] = batching.START
    stream = on_device(batching.batches(records, 2, 48), dataclasses.replace(config, prefetch=True))
    with pytest.raises(ValueError, match="longer context than 48"):
        next(stream)


def test_training_is_in_bfloat16_on_a_gpu_unless_told_otherwise():
    assert [TrainConfig(device=device).dtype for device in ("cpu", "cuda", "cuda:1")] == ["float32"] + ["bfloat16"] * 2
    assert TrainConfig(device="cuda", dtype="float32").dtype == "float32"


# ---------------------------------------------------------------- the end, and ends before it


def test_the_model_file_holds_all_that_decoding_needs(config, finished):
    content = torch.load(finished[0] / "model.pt", weights_only=True)
    assert all(weight.dtype == (torch.float16 if weight.dim() > 1 else torch.float32) for weight in content["weights"].values())
    model, tokenizer = load_checkpoint(finished[0] / "model.pt", device="cpu", form="plain")
    assert model.config == SHAPE and tokenizer.decode(tokenizer.encode("seven sept")) == "seven sept"
    rounded = {name: weight.half().float() if weight.dim() > 1 else weight for name, weight in finished[1].items()}
    assert_close(weights(model), rounded, **EXACT)


def test_the_model_file_tells_its_steps_settings_and_scores(config, finished):
    provenance = torch.load(finished[0] / "model.pt", weights_only=True)["provenance"]
    assert provenance["steps"] == 12 and provenance["config"]["lr"] == 0.01
    scores = provenance["loss and agreement by layer"][config.dev[0]]
    model, tokenizer = load_checkpoint(finished[0] / "checkpoint.pt")
    losses = []  # by the definition: every document alone
    for prompt, completion in data.read_pairs(config.dev[0]):
        head, body = encode_prompt(tokenizer, prompt), [*tokenizer.encode(completion), tokenizer.ends[0]]
        log_p = model(torch.tensor([head + body]))[0, len(head) - 1 : -1].log_softmax(-1)
        losses += [-log_p[at, token].item() for at, token in enumerate(body)]
    assert list(scores) == [1, 2, 3] and scores[3] == [pytest.approx(np.mean(losses), abs=2e-4), 1.0]


KILLED_IN_ITS_SECOND_SAVE = """
import os, signal, torch, train; from common.errors import run
save = torch.save

def save_half(content, part):
    save(content, part)
    if os.path.exists(part.removesuffix(".part")):
        os.truncate(part, os.path.getsize(part) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half
run(train.main)
"""


def python(*words) -> subprocess.CompletedProcess:
    """Runs Python in the project's folder, on one thread like the tests, for bit-identical sums."""
    folder, environment = Path(train.__file__).parent, {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def flags(*configs) -> list[str]:
    """The command line that says the same as the configs."""
    values = {field.name: getattr(config, field.name) for config in configs for field in dataclasses.fields(config)}
    texts = {name: ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value) for name, value in values.items()}
    left_out = {name for name, value in values.items() if isinstance(value, bool)} | {"exit_layers"}  # no flag of train.py
    return [f"--{name.replace('_', '-')}={text}" for name, text in texts.items() if name not in left_out]


def test_a_training_killed_while_it_saves_goes_on_to_the_same_weights(config, finished, tmp_path, capsys):
    ended = python("-c", KILLED_IN_ITS_SECOND_SAVE, f"--out={tmp_path}", *flags(config, SHAPE))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    model, tokenizer = load_checkpoint(tmp_path / "checkpoint.pt")  # the first save is whole
    assert model(torch.tensor([tokenizer.encode("one")])).isfinite().all()
    other = dataclasses.replace(config, save_every=4, validate_every=1)  # these two may change
    model = train.run_training(other, SHAPE, tmp_path)
    assert "going on from" in (said := capsys.readouterr().out) and "at step 5" in said
    assert_close(weights(model), finished[1], **EXACT)
    assert not list(tmp_path.glob("*.part"))


def test_a_loss_that_is_not_a_number_changes_no_weight_and_no_checkpoint(config, tmp_path, monkeypatch):
    calls = []

    def poisoned(model, *batch):
        calls.append((model, weights(model)))
        factor = math.nan if len(calls) == 16 else 1  # step 7, second micro-batch
        loss, losses, agreed = sum_of_losses(model, *batch)
        return factor * loss, {layer: factor * loss for layer, loss in losses.items()}, agreed

    monkeypatch.setattr(losses, "sum_of_losses", poisoned)
    with pytest.raises(ValueError, match=r"the loss is nan.* at step 7"):
        train.run_training(config, SHAPE, tmp_path)
    model, before = calls[-1]
    assert_close(weights(model), before, **EXACT)
    assert read_checkpoint(tmp_path / "checkpoint.pt")["training"]["step"] == 5 and not (tmp_path / "model.pt").exists()


def test_a_training_killed_at_a_random_step_goes_on_to_the_same_weights(config, finished, tmp_path):
    """Whatever step that is: the log tells, and goes on as if nothing had been."""
    words = [sys.executable, "train.py", f"--out={tmp_path}", *flags(dataclasses.replace(config, save_every=1), SHAPE)]
    running = subprocess.Popen(words, cwd=Path(train.__file__).parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    step, log = random.randint(2, 9), tmp_path / "log.jsonl"
    while running.poll() is None and not (log.exists() and log.read_text().count('"positions_per_s"') >= step):
        time.sleep(0.001)
    running.kill()
    assert running.wait() == -signal.SIGKILL, running.stderr.read()
    assert_close(weights(train.run_training(config, SHAPE, tmp_path)), finished[1], **EXACT)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_training_between_two_steps_with_a_checkpoint(number, config, finished, tmp_path):
    code = f"""
import os, train
from common.errors import run
from training import runs
write = runs.Log.write
def write_then_signal(log, row):
    write(log, row)
    if row.get("loss") and row["step"] == 3:
        os.kill(os.getpid(), {int(number)})
runs.Log.write = write_then_signal
save = runs.save_checkpoint
def an_impatient_user(*args, **more):
    os.kill(os.getpid(), {int(number)})
    save(*args, **more)
runs.save_checkpoint = an_impatient_user
run(train.main)
"""
    ended = python("-c", code, f"--out={tmp_path}", *flags(dataclasses.replace(config, save_every=100), SHAPE))
    assert ended.returncode == 128 + number and "is at step 3 of 12, and the same command goes on" in ended.stdout
    assert read_checkpoint(tmp_path / "checkpoint.pt")["training"]["step"] == 3 and not (tmp_path / "model.pt").exists()
    assert_close(weights(train.run_training(config, SHAPE, tmp_path)), finished[1], **EXACT)


def test_a_full_disk_leaves_the_checkpoint_before_whole(config, finished, tmp_path):
    """A limit on the size of files stands for the disk."""
    train.run_training(dataclasses.replace(config, max_steps=5, save_every=5), SHAPE, tmp_path)
    (tmp_path / "model.pt").unlink()
    size = (tmp_path / "checkpoint.pt").stat().st_size
    limited = f"""
import resource, signal, train
from common.errors import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))
run(train.main)
"""
    ended = python("-c", limited, f"--out={tmp_path}", *flags(config, SHAPE))
    assert ended.returncode == 2 and "could not be written, the old file is kept; is the disk full?" in ended.stderr.splitlines()[-1]
    assert read_checkpoint(tmp_path / "checkpoint.pt")["training"]["step"] == 5 and not list(tmp_path.glob("*.part"))


def test_a_model_that_is_there_is_overwritten_only_when_asked(config, finished, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"model.pt is there already; give another --out, or --overwrite"):
        train.run_training(config, SHAPE, tmp_path)
    assert (tmp_path / "model.pt").read_bytes() == b"precious"
    other = dataclasses.replace(config, lr=0.02)
    train.run_training(dataclasses.replace(other, max_steps=2), SHAPE, tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="was trained with lr"):
        train.run_training(config, SHAPE, tmp_path)
    assert_close(weights(train.run_training(config, SHAPE, tmp_path, overwrite=True)), finished[1], **EXACT)


def test_a_second_training_in_the_same_folder_is_refused_until_the_first_has_ended(config, tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="another training is writing there; wait for its end"):
        train.run_training(config, SHAPE, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    train.run_training(dataclasses.replace(config, max_steps=1), SHAPE, tmp_path)


def test_a_killed_training_leaves_no_lock(tmp_path):
    code = "import os, signal, pathlib; from training.runs import lock; " \
           "held = lock(pathlib.Path({!r})); os.kill(os.getpid(), signal.SIGKILL)"  # fmt: skip
    assert python("-c", code.format(str(tmp_path))).returncode == -signal.SIGKILL
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass


def test_a_log_without_a_checkpoint_is_not_replaced_unless_asked(config, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0, "positions_per_s": 3}\n')
    with pytest.raises(ValueError, match=r"log.jsonl is there already, of a training that left no checkpoint to go on"):
        train.run_training(config, SHAPE, tmp_path)
    assert losses_of(tmp_path) == [2.0]
    train.run_training(dataclasses.replace(config, max_steps=2), SHAPE, tmp_path, overwrite=True)
    assert len(losses_of(tmp_path)) == 2


@pytest.mark.parametrize("change, said", [
    (lambda training: training.pop("optimizer"), "its training lacks its optimizer, so it cannot go on"),
    (lambda training: training.update(step=-5), "its training is at step -5, which must be at least 0"),
    (lambda training: training.update(step="five"), "its training lacks its step"),
    (lambda training: training.update(config=None), "its training lacks its config"),
    (lambda training: training["optimizer"].clear(), "its optimizer does not fit the model"),
    (lambda training: training["optimizer"]["state"].clear(), "the model (it holds no moments)"),
    (lambda training: training["optimizer"]["param_groups"].pop(), "its optimizer does not fit the model"),
    (lambda training: training["optimizer"]["state"][0].update(exp_avg=torch.ones(3)), "moments have other shapes"),
])  # fmt: skip
def test_a_training_checkpoint_that_cannot_be_gone_on_from_is_said_in_one_line(change, said, config, finished, tmp_path):
    content = torch.load(finished[0] / "checkpoint.pt")
    change(content["training"])
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError) as error:
        train.run_training(config, SHAPE, tmp_path)
    assert said in str(error.value) and "checkpoint.pt" in str(error.value) and "\n" not in str(error.value)


def test_a_validation_shows_how_far_it_is_batch_by_batch(config, finished, monkeypatch):
    said = []
    monkeypatch.setattr(train.tqdm, "set_postfix_str", lambda bar, text: said.append(text))
    model, _ = load_checkpoint(finished[0] / "model.pt", form="plain")
    _, _, dev = load_data(config, SHAPE, finished[0])
    with train.tqdm(disable=True) as bar:
        validate(model, *dev.values(), config, functools.partial(train.show_validation, bar, config.dev[0]))
    count = sum(1 for _ in batching.batches(*dev.values(), config.rows, config.length, seed=None))
    folder = Path(config.dev[0]).parent.name
    assert said == [f"validating on {folder}/dev.tsv, {done} of at most 16 batches" for done in range(min(count, 16))] and count > 2


def test_a_loss_of_ones_own_that_is_not_a_number_is_named(config, tmp_path, monkeypatch):
    (tmp_path / "own_nan.py").write_text("def bad(exits):\n    return exits.weighted_sum(exits.every()) * float('nan')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"the loss is nan.* at step 0 of loss own_nan:bad \(.*own_nan.py\)"):
        train.run_training(dataclasses.replace(config, loss="own_nan:bad"), SHAPE, tmp_path / "run")


def test_an_exception_in_a_loss_of_ones_own_ends_the_command_with_its_traceback(config, tmp_path):
    (tmp_path / "own_fails.py").write_text("def bad(exits):\n    return exits.colour\n")
    words = flags(dataclasses.replace(config, max_steps=1), SHAPE)
    code = f"import sys, train; from common.errors import run; sys.path.append({str(tmp_path)!r}); run(train.main)"
    ended = python("-c", code, f"--out={tmp_path / 'run'}", *words, "--loss=own_fails:bad")
    assert ended.returncode == 1 and "return exits.colour" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"RuntimeError: loss own_fails:bad ({tmp_path / 'own_fails.py'})")


def test_the_help_begins_with_what_a_beginner_needs(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        train.make_parser().parse_args(["--help"])
    first = capsys.readouterr().out.split("\nlosses:\n")[0]
    shown = re.findall(r"^  (--[a-z-]+)", first, re.MULTILINE)
    assert {"--out", "--data", "--dev", "--init", "--train", "--loss", "--exits", "--max-steps"} <= set(shown)
    assert len(shown) <= 14


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", untrained(), None, training={"step": 1})
    before = contents(tmp_path)
    with pytest.raises(Exception, match=r"pickle|local object"):
        save_checkpoint(tmp_path / "checkpoint.pt", untrained(), None, training=lambda: "fails once the file is open")
    assert contents(tmp_path) == before


# ---------------------------------------------------------------- from a checkpoint, heads alone, several processes


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def tuned(config, finished, tmp_path_factory, request):
    """Heads trained on the finished model: settings and folder."""
    folder = tmp_path_factory.mktemp("heads")
    start = str(finished[0] / "model.pt")
    changes = {"train": "heads", "loss": "weighted", "classifier": True, "max_steps": 40, "dtype": request.param}
    heads = dataclasses.replace(config, init=start, **changes)
    train.run_training(heads, shape_from(heads, {"adapter": "lowrank:4"}), folder)
    return heads, folder


def test_heads_alone_leave_the_models_own_output_bit_identical(tuned, finished):
    before, tokenizer = load_checkpoint(finished[0] / "model.pt")
    after, _ = load_checkpoint(finished[0] / "model.pt", heads=tuned[1] / "heads.pt")
    tokens = torch.tensor([tokenizer.encode("one two three four five six seven eight")])
    assert torch.equal(after(tokens), before(tokens))
    old, new = torch.load(finished[0] / "model.pt")["weights"], after.state_dict()
    assert all(
        torch.equal(new[name], weight) for name, weight in before.state_dict().items() if name in old and not name.startswith("exit_norms")
    )
    assert set(new) - set(old) == {f"{kind}.{layer}" for kind in ("adapters", "classifiers") for layer in (1, 2)}


def test_a_training_of_heads_writes_the_heads_alone(tuned, finished):
    """Neither its result nor the checkpoint that it goes on from holds the model again."""
    names = {f"{kind}.{layer}" for kind in ("exit_norms", "adapters", "classifiers") for layer in (1, 2)}
    result, checkpoint = (torch.load(tuned[1] / name) for name in ("heads.pt", "checkpoint.pt"))
    assert set(result["weights"]) == set(checkpoint["weights"]) == names and not (tuned[1] / "model.pt").exists()
    assert result["provenance"]["steps"] == 40 and result["provenance"]["config"]["train"] == "heads"
    assert result["config"]["exit_layers"] == (1, 2) and result["weights"]["adapters.1"].dtype == torch.float16
    assert (tuned[1] / "heads.pt").stat().st_size < (finished[0] / "model.pt").stat().st_size / 3


def test_a_cut_off_training_of_heads_goes_on_to_the_same_heads(tuned, tmp_path, monkeypatch):
    heads, folder = tuned
    shape, steps = shape_from(heads, {"adapter": "lowrank:4"}), heads.max_steps
    monkeypatch.setattr(runs.Run, "write_result", lambda run: None)
    train.run_training(dataclasses.replace(heads, max_steps=17), shape, tmp_path)  # its learning rates are others
    stopped = torch.load(tmp_path / "checkpoint.pt")
    monkeypatch.undo()
    whole = contents(folder)
    assert stopped["training"]["step"] == 17
    calls = itertools.count(1)
    real = train.train_step

    def interrupted(*args):
        if next(calls) == 18:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(SystemExit):
        train.run_training(heads, shape, tmp_path, overwrite=True)
    assert read_heads(tmp_path / "checkpoint.pt")["training"]["step"] == 18
    train.run_training(heads, shape, tmp_path)
    assert contents(folder) == whole
    ended, expected = (read_heads(path / "heads.pt")["weights"] for path in (tmp_path, folder))
    assert steps == 40 and all(torch.equal(ended[name], weight) for name, weight in expected.items())


def test_heads_learned_over_a_shortlist_keep_its_ids(finished, config, tmp_path):
    changes = {"init": str(finished[0] / "model.pt"), "train": "heads", "loss": "distill", "max_steps": 2, "shortlist": 20}
    heads = dataclasses.replace(config, **changes)
    with pytest.raises(ValueError, match="shortlist is 20, but 0 frequent ids are known; count them with"):
        train.run_training(heads, shape_from(heads, {}), tmp_path / "run")
    np.save(tmp_path / "ids.npy", np.arange(259, 279, dtype=np.int32))
    heads = dataclasses.replace(heads, frequent_ids=str(tmp_path / "ids.npy"))
    train.run_training(heads, shape_from(heads, {"adapter": "mlp:4"}), tmp_path / "run")
    model, _ = load_checkpoint(finished[0] / "model.pt", heads=tmp_path / "run" / "heads.pt")
    assert model.frequent_ids.tolist() == [*range(259, 279)] and model.config.adapter == "mlp:4"
    again = dataclasses.replace(heads, frequent_ids=None, heads=str(tmp_path / "run" / "heads.pt"), max_steps=1)
    train.run_training(again, shape_from(again, {}), tmp_path / "again")  # those in the heads
    assert read_heads(tmp_path / "again" / "heads.pt")["frequent_ids"].tolist() == [*range(259, 279)]


def test_with_their_prompts_learned_documents_teach_every_token_but_the_first(config, tmp_path):
    def learned(**changes) -> np.ndarray:
        changed = dataclasses.replace(config, **changes)
        return load_data(changed, SHAPE, tmp_path)[1]

    some, every = learned(), learned(learn_prompts=True)
    assert np.array_equal(some["token"], every["token"])
    assert np.array_equal(some["flags"] & batching.START, every["flags"] & batching.START)
    (part,) = itertools.islice(batching.batches(every, 1, 48, seed=None), 1)
    (less,) = itertools.islice(batching.batches(some, 1, 48, seed=None), 1)
    inside = part.documents > 0
    assert np.array_equal(part.targets >= 0, inside) and 0 < (less.targets >= 0).sum() < inside.sum()
    assert np.array_equal(learned()["flags"], some["flags"])  # the file is as it was


def test_heads_do_not_go_on_over_another_model(tuned, finished, config, tmp_path):
    """--init is the same name, but was trained further since."""
    heads, model = tuned[0], tmp_path / "model.pt"
    model.write_bytes((finished[0] / "model.pt").read_bytes())
    heads = dataclasses.replace(heads, init=str(model), max_steps=2, warmup=0)
    shape = shape_from(heads, {"adapter": "lowrank:4"})
    train.run_training(heads, shape, tmp_path / "run")
    content = torch.load(model)
    content["weights"]["blocks.1.qkv"] += 0.01
    torch.save(content, model)
    with pytest.raises(ValueError, match=r"run/checkpoint.pt: .*model.pt has changed since; give another --out"):
        train.run_training(dataclasses.replace(heads, max_steps=3), shape, tmp_path / "run")


def test_heads_alone_learn_to_agree(tuned):
    heads, folder = tuned
    (array,) = load_data(heads, SHAPE, folder)[2].values()
    start = make_model(heads, shape_from(heads, {"adapter": "lowrank:4"}))
    model = make_model(dataclasses.replace(heads, heads=str(folder / "heads.pt")), shape_from(heads, {"adapter": "lowrank:4"}))
    before, after = (validate(each, array, heads) for each in (start, model))
    assert after[3] == before[3] and all(after[layer][0] < before[layer][0] for layer in (1, 2))


def test_new_heads_begin_as_the_models_own(finished, config):
    heads = dataclasses.replace(config, init=str(finished[0] / "model.pt"), train="heads", loss="rotate", classifier=True)
    plain = dataclasses.replace(heads, train="all", exits=(), classifier=False)
    new = make_model(heads, shape_from(heads, {"exit_norms": (2,), "adapter": "lowrank:4"}))
    model, hidden = make_model(plain, SHAPE), torch.randn(5, 32)
    assert new.config.exit_norms == (1, 2) == new.config.classifiers and new.config.adapter == "lowrank:4"
    assert_close(new.head(hidden, 2), model.head(hidden, 2))
    assert belief(new, hidden[:1], 2, {}) == 0.5


def test_fine_tuning_starts_from_the_weights_and_the_tokenizer_of_the_checkpoint(finished, config, tmp_path):
    tuning = dataclasses.replace(config, init=str(finished[0] / "model.pt"), max_steps=1, lr=1e-9, warmup=0)
    model = train.run_training(tuning, shape_from(tuning, {}), tmp_path)
    start, _ = load_checkpoint(finished[0] / "model.pt", form="plain")
    assert_close(weights(model), weights(start), rtol=0, atol=1e-6)
    made, given = (torch.load(folder / "model.pt") for folder in (tmp_path, finished[0]))
    assert torch.equal(made["tokenizer"], given["tokenizer"]) and made["weights"]["embedding"].dtype == torch.float16
    with pytest.raises(ValueError, match=r"d_ff comes from --init .*; leave the flag out"):
        shape_from(tuning, {"d_ff": 3})


def test_a_fine_tuned_model_keeps_its_chat_template(finished, config, tmp_path):
    torch.save({**torch.load(finished[0] / "model.pt"), "chat_template": "{{ messages }}"}, tmp_path / "chat.pt")
    tuning = dataclasses.replace(config, init=str(tmp_path / "chat.pt"), max_steps=1)
    train.run_training(tuning, shape_from(tuning, {}), tmp_path / "tuned")
    assert torch.load(tmp_path / "tuned" / "model.pt")["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("change, complaint", [
    ({"adapter": "lowrank:8"}, "the weights do not fit"), ({"exit_norms": (1,)}, "exit_norms.2 has no place in it"),
    ({"adapter": None}, "has no place in it"),
])  # fmt: skip
def test_a_shape_that_drops_or_resizes_heads_of_init_is_refused_before_training(change, complaint, tuned, config, tmp_path):
    tuning = dataclasses.replace(config, init=tuned[0].init, heads=str(tuned[1] / "heads.pt"))
    with pytest.raises(ValueError, match=complaint):
        train.run_training(tuning, shape_from(tuning, change), tmp_path / "run")


def test_a_checkpoint_that_lacks_a_weight_is_not_trained_from(finished, config, tmp_path):
    content = torch.load(finished[0] / "model.pt")
    del content["weights"]["blocks.1.qkv"]
    torch.save(content, tmp_path / "less.pt")
    tuning = dataclasses.replace(config, init=str(tmp_path / "less.pt"))
    with pytest.raises(ValueError, match=r"less.pt: the weights do not fit the model .*blocks.1.qkv is missing"):
        train.run_training(tuning, shape_from(tuning, {}), tmp_path / "run")
    (content["config"])["colour"] = 1
    torch.save(content, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"less.pt: the weights do not fit"):
        shape_from(tuning, {})


def test_what_starts_from_int8_or_takes_another_tokenizer_ends_in_a_file_that_fits(finished, config, tmp_path):
    """Matrices of int8 are trained dequantized, and written so; ids that were counted with another tokenizer
    are left behind."""
    content = torch.load(finished[0] / "model.pt") | {"frequent_ids": torch.arange(20)}
    small = {name: Int8Matrix.of(weight.float()) for name, weight in content["weights"].items() if weight.dim() > 1}
    content["weights"] |= {name: matrix.rows for name, matrix in small.items()}
    torch.save(content | {"scales": {name: matrix.scale for name, matrix in small.items()}}, tmp_path / "small.pt")
    for name, kept in ((None, 20), (str(finished[0] / "model.pt"), None)):
        tuning = dataclasses.replace(config, init=str(tmp_path / "small.pt"), tokenizer=name, max_steps=1)
        folder = tmp_path / f"run-{kept}"
        train.run_training(tuning, shape_from(tuning, {}), folder)
        assert torch.load(folder / "model.pt")["weights"]["embedding"].dtype == torch.float16
        ids = load_checkpoint(folder / "model.pt")[0].frequent_ids
        assert (ids is None) if kept is None else len(ids) == kept


def test_a_checkpoint_is_not_overwritten_by_what_starts_from_it(tuned):
    before = contents(tuned[1])
    with pytest.raises(ValueError, match=r"heads.pt: is in --out, where it would be overwritten"):
        again = dataclasses.replace(tuned[0], heads=str(tuned[1] / "heads.pt"))
        train.run_training(again, shape_from(again, {}), tuned[1], overwrite=True)
    assert contents(tuned[1]) == before


def test_a_tokenizer_larger_than_the_model_is_refused(finished, config, tmp_path):
    big = dataclasses.replace(config, tokenizer=str(finished[0] / "model.pt"))
    with pytest.raises(ValueError, match=r"model.pt: its tokenizer has 300 pieces, the model only 200"):
        train.run_training(big, dataclasses.replace(SHAPE, vocab_size=200), tmp_path)


def test_changed_data_ends_a_resume_though_the_tokenizer_is_given(finished, config, tmp_path):
    mine = tmp_path / "mine.tsv"
    mine.write_text(Path(config.data[0]).read_text())
    given = dataclasses.replace(config, data=(str(mine),), tokenizer=str(finished[0] / "model.pt"), max_steps=2)
    train.run_training(given, SHAPE, tmp_path / "run")
    mine.write_text(Path(config.data[0]).read_text() + "one\tun\n")
    with pytest.raises(ValueError, match="the training files have changed since"):
        train.run_training(dataclasses.replace(given, max_steps=4), SHAPE, tmp_path / "run")


def test_a_step_leaves_out_the_layers_that_are_drawn(config, monkeypatch):
    monkeypatch.setattr(train, "skipped_layers", lambda config, n_layers, number: frozenset({2}))
    model, still = untrained(), dataclasses.replace(config, weight_decay=0, warmup=0)
    before = weights(model)
    train_step(Objective(model, still), make_optimizer(model, still), on_cpu(*[random_batch(5)] * 2), still, 0)
    same = {name: torch.equal(weight, before[name]) for name, weight in weights(model).items()}
    assert {name.split(".")[1] for name in same if name.startswith("blocks") and not same[name]} == {"0", "2"}


def test_prepared_data_trains_the_same(config, finished, files, tmp_path):
    model = tmp_path / "own.model"
    model.write_bytes(prepare_tokenizer(config, finished[0], SHAPE.vocab_size))
    batching.prepare_file(config.data, model.read_bytes(), tmp_path / "own.npy", config.length)
    ready = dataclasses.replace(config, data=(str(tmp_path / "own.npy"),), tokenizer=str(model))
    assert_close(weights(train.run_training(ready, SHAPE, tmp_path / "run")), finished[1], **EXACT)
    with pytest.raises(ValueError, match="a prepared file comes alone"):
        train.run_training(dataclasses.replace(ready, data=ready.data * 2), SHAPE, tmp_path / "other")
    with pytest.raises(ValueError, match="is prepared data; name the tokenizer"):
        train.run_training(dataclasses.replace(ready, tokenizer=None), SHAPE, tmp_path / "other")


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py")


def losses_of(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_two_processes_learn_what_one_learns_from_the_same_global_batch(config, finished, tmp_path):
    ended = python(*TWO, f"--out={tmp_path}", *flags(dataclasses.replace(config, accumulate=1), SHAPE))
    assert ended.returncode == 0, ended.stderr
    losses = losses_of(tmp_path)
    assert losses == pytest.approx(losses_of(finished[0]), abs=2e-4) and len(losses) == 12
    model, _ = load_checkpoint(tmp_path / "checkpoint.pt", form="plain")
    assert_close(weights(model), finished[1], rtol=0, atol=1e-3)


def test_two_processes_with_accumulation_dropout_and_classifiers_learn_what_one_learns(config, tmp_path):
    """Layers left out and classifiers take no part in some micro-batches; the padding of each differs, and so
    do its targets. After ten steps the weights agree far closer than they have moved."""
    shape = dataclasses.replace(SHAPE, classifiers=(1, 2))
    four = dataclasses.replace(config, accumulate=4, layer_dropout=0.8, classifier=True, loss="distill", max_steps=10, length=24, lr=1e-3)
    alone = weights(train.run_training(four, shape, tmp_path / "one"))
    words = flags(dataclasses.replace(four, accumulate=2), shape)
    ended = python(*TWO, f"--out={tmp_path / 'two'}", "--classifier", *words)
    assert ended.returncode == 0, ended.stderr
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=2e-4)
    model, _ = load_checkpoint(tmp_path / "two" / "checkpoint.pt", form="plain")
    start = weights(make_model(four, shape))
    for name, weight in weights(model).items():
        moved = (alone[name] - start[name]).abs().max()
        assert moved > 1e-3 and (weight - alone[name]).abs().max() < 0.05 * moved, name


MISTAKES = {  # a flag -> what the line must say
    "--loss=mean": "unknown loss 'mean'; choose from none, weighted, rotate",
    "--dtype=float64": "unknown dtype 'float64'; choose from float32, bfloat16",
    "--device=nowhere": "device 'nowhere' is not there",
    "--exits=0,1": "layer 0 is not an exit of a model of 3 layers; choose from 1 to 2",
    "--exits=1,3": "layer 3 is not an exit",
    "--rows=0": "rows is 0; it must be at least 1",
    "--seed=-1": "seed is -1; it must be at least 0",
    "--device=meta": "device 'meta' is not there",
    "--vocab-size=200": "was trained with vocab_size 300, not 200",
    "--length=40": "was trained with length",
    "--max-steps=3": "is at step 12, beyond max_steps 3",
    "--lr=nan": "lr is nan; it must be above 0 and at most 1000",
    "--lr=-1": "lr is -1.0; it must be above 0",
    "--lr=1e400": "lr is inf; it must be above 0 and at most 1000",
    "--clip=0": "clip is 0.0; it must be above 0",
    "--min-lr=2": "min_lr is 2.0; it must be at least 0 and at most 1",
    "--max-steps=100000000000000000000": "max_steps is 100000000000000000000; it must be at least 1 and at most",
    "--rows=99999999999": "rows is 99999999999; it must be at least 1 and at most 65536",
    "--peak-tflops=0": "peak_tflops is 0.0; it must be above 0",
    "--loss=os:system": "loss 'os:system' is not a function of exits: it is a part of Python",
    "--shard": "shard is True, but there is one process; start several: torchrun",
    "--length=49": "length is 49, the model has 48 positions",
    "--train=tops": "unknown train 'tops'; choose from all, heads",
    "--train=heads": "train is heads, which needs --init",
    "--shortlist=9": "shortlist is 9, but train is all",
    "--heads={files}/dev.tsv": "belong to a model to start from; name it with --init",
    "--frequent-ids={files}/dev.tsv": "belong to a model to start from; name it with --init",
    "--init={out}/model.pt --heads={files}/dev.tsv": "dev.tsv: its archive",
    "--init={out}/model.pt --heads={out}/model.pt": "model.pt: holds a whole model",
    "--adapter=mlp": "it must be one of lowrank:SIZE, mlp:SIZE, block:SIZE",
    "--layer-dropout=2": "layer_dropout is 2.0; it must be at least 0 and at most 1",
    "--exit-weights=1,2": "give 3 above 0, one an exit and the last layer's",
    "--init={files}/dev.tsv": "dev.tsv: not a readable checkpoint",
    "--init={files}/missing.pt": "missing.pt: no such checkpoint",
    "--tokenizer={files}/dev.tsv": "was trained with tokenizer None, not",
    "--plot={files}/dev.tsv": "dev.tsv: not a log of train.py",
    "--exit-weights=1,nan,1": "give 3 above 0",
    "--exit-weights=1,inf,1": "give 3 above 0",
    "--seed=99999999999999999999999": "it must be at least 0 and at most 9223372036854775807",
    "--loss=none --classifier": "classifier is True, but loss is none",
    "--exit-norms=none --adapter=lowrank:3": "it stands before norms in exit_norms, and there are none",
    "--data={files}/malformed.tsv --overwrite": "malformed.tsv, line 2: has 1 columns; 2 are needed",
    "--tokenizer={files}/empty.tsv --overwrite": "empty.tsv: neither a checkpoint nor a tokenizer",
    "--eos-id=1 --overwrite": "eos_id is 1, but the tokenizer ends texts with 2; give --eos-id 2",
    "--data=": "invalid list of str",
    "--data=none": "nothing to train on",
    "--data={files}/dev.tsv": "was trained with data",
    "--data={files}/missing.tsv": "missing.tsv: no such data file",
    "--dev={files}/missing.tsv": "missing.tsv: no such data file",
    "--dev={files}": ": is a folder; name a file in it",
    "--dev={files}/empty.tsv": "empty.tsv: holds no data",
    "--dev={files}/malformed.tsv": "malformed.tsv, line 2: has 1 columns; 2 are needed",
    "--lr=0.5": "was trained with lr 0.01, not 0.5; give another --out",
    "--exits=1": "was trained with exits (1, 2), not (1,)",
    "--d-ff=64": "was trained with d_ff 48, not 64",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_status_2_and_changes_no_file(mistake, files, config, finished, monkeypatch, capfd):
    before = contents(finished[0])
    words = mistake.format(files=files, out=finished[0]).split()
    monkeypatch.setattr(sys, "argv", ["train.py", f"--out={finished[0]}", *flags(config, SHAPE), *words])
    with pytest.raises(SystemExit) as end:
        run(train.main)
    (line,) = capfd.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and MISTAKES[mistake] in line
    assert contents(finished[0]) == before


def test_the_script_ends_so_too(tmp_path):
    ended = python("train.py", f"--out={tmp_path / 'new'}", "--rows=0")
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "error: rows is 0; it must be at least 1 and at most 65536\n")
    assert not (tmp_path / "new").exists()
