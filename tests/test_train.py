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
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import train
from common.flags import as_text
from confidence import classifier_logit
from decode import load_checkpoint
from decoding.weights import quantized
from formats import data
from formats.checkpoint import load_weights, read_checkpoint, weights_of
from formats.heads import read_heads
from formats.tokenizers.tokenizer import encode_prompt
from model import Block, ModelConfig, Transformer
from train import learning_rate, make_optimizer, train_step
from training import batches as batching
from training import objective, runs
from training.device import fetched_ahead, on_device, to_device
from training.losses import call_loss
from training.objective import Objective
from training.parallel import steps
from training.runs import locked
from training.settings import TrainConfig
from training.start import load_data, make_model, prepare_data, prepare_tokenizer, shape_from
from training.validation import validate, validation_batches

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
        data=(str(files / "train.tsv"),), dev=(str(files / "dev.tsv"),), loss="rotate", exits=(1, 2),
        max_steps=12, rows=2,
        length=48, accumulate=2, lr=0.01, warmup=2, device="cpu", validate_every=5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A training run that nobody interrupted: its folder and the weights it ended with."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, weights(train.run_training(config, SHAPE, folder))


def untrained() -> Transformer:
    torch.manual_seed(0)
    return Transformer(SHAPE)


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_step(model: Transformer, config: TrainConfig, optimizer, *parts: batching.Batch, step: int = 0) -> float:
    """A step with these micro-batches; its loss."""
    stream = (to_device(part, "cpu") for part in parts)
    return train_step(Objective(model, config), optimizer, next(steps(stream, config, step)), config, step)


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
            assert_close(packed[layer][0, own], alone[layer][0], rtol=1e-4, atol=1e-4)
        assert document == 1 or (mixed[-1][0, own] - alone[-1][0]).abs().max() > 0.1


@pytest.mark.parametrize("loss, taught", [("none", [3]), ("weighted", [1, 2, 3]), ("rotate", [1, 2, 3])])
def test_weighted_and_rotate_teach_every_exit_and_none_the_last_layer_alone(loss, taught, config, tmp_path):
    config = dataclasses.replace(config, loss=loss, max_steps=48, validate_every=48)
    model = train.run_training(config, SHAPE, tmp_path)
    dev = prepare_data(config.dev, prepare_tokenizer(config, tmp_path, SHAPE.vocab_size), tmp_path, config.length)
    before, after = (validate(each, dev, config) for each in (untrained(), model))
    assert all(after[layer][0] < 0.5 * before[layer][0] for layer in taught)
    assert [layer for layer in (1, 2) if not torch.equal(model.exit_norms[str(layer)].weight, torch.ones(32))] == taught[:-1]


def test_one_batch_is_learned_by_heart():
    model, batch = untrained(), random_batch(learned=8)
    config = TrainConfig(loss="weighted", exits=(1, 2), lr=0.01, warmup=5, max_steps=100, device="cpu")
    optimizer = make_optimizer(model, config)
    losses = [one_step(model, config, optimizer, batch, step=step) for step in range(100)]
    assert losses[0] == pytest.approx(math.log(300), abs=0.2) and losses[-1] < 0.02  # from a uniform guess to none


# ---------------------------------------------------------------- one step


def test_learning_rate_by_hand():
    config = TrainConfig(lr=2.0, warmup=4, max_steps=12)
    middle = 2 * (0.02 + 0.98 / 2)  # half of the cosine
    by_hand = {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 8: middle, 12: 0.04}
    assert {step: learning_rate(config, step) for step in by_hand} == pytest.approx(by_hand)
    assert learning_rate(dataclasses.replace(config, warmup=0), 0) == 2.0


def test_only_matrices_decay():
    model = untrained()
    before = weights(model)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    make_optimizer(model, TrainConfig(lr=0.5)).step()
    for name, weight in model.named_parameters():
        assert_close(weight.detach(), before[name] * (1 - 0.5 * 0.1 if weight.dim() == 2 else 1))


def test_every_target_of_a_step_weighs_alike_in_whichever_micro_batch_it_lies(monkeypatch):
    monkeypatch.setattr(train, "LARGEST_NORM", 1e9)
    model, parts = untrained(), [random_batch(learned=9, seed=1), random_batch(learned=2, seed=2)]
    config = TrainConfig(loss="none", rows=2, accumulate=2, lr=0.1, warmup=0, device="cpu")
    means, before = [mean_loss(model, part) for part in parts], weights(model)
    mean = (9 * means[0] + 2 * means[1]) / 11
    slopes = torch.autograd.grad(mean, list(model.parameters()), materialize_grads=True)
    loss = one_step(model, config, torch.optim.SGD(model.parameters()), *parts)
    assert loss == pytest.approx(mean.item(), rel=1e-5)
    assert loss != pytest.approx((means[0] + means[1]).item() / 2, rel=1e-5)
    for (name, weight), slope in zip(model.named_parameters(), slopes):
        assert_close(weight.detach(), before[name] - 0.1 * slope, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_clipped_to_its_largest_norm(monkeypatch):
    monkeypatch.setattr(train, "LARGEST_NORM", 0.01)
    model, config = untrained(), TrainConfig(loss="none", lr=0.1, warmup=0, device="cpu")
    before = weights(model)
    one_step(model, config, torch.optim.SGD(model.parameters()), random_batch(learned=9))
    moved = torch.cat([(weight - before[name]).flatten() for name, weight in model.named_parameters()])
    assert moved.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_bfloat16_rounds_the_activations_and_keeps_the_weights_in_float32():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model, config = untrained(), TrainConfig(loss="weighted", exits=(1, 2), dtype=dtype, warmup=0, device="cpu")
        before = weights(model)
        losses[dtype] = one_step(model, config, make_optimizer(model, config), random_batch(learned=9))
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


def test_batches_come_to_the_device_in_their_order_fetched_ahead_or_not(config, finished):
    _, records, _ = load_data(config, SHAPE, finished[0])
    whole = list(itertools.islice(batching.batches(records, 2, 48, seed=3), 9))
    for fetch in (iter, fetched_ahead):
        for found, batch in itertools.zip_longest(fetch(on_device(iter(whole), "cpu")), whole):
            assert torch.equal(found.inputs, torch.from_numpy(batch.inputs))
            assert torch.equal(found.documents, torch.from_numpy(batch.documents))
            rows, columns = np.nonzero(batch.targets >= 0)
            assert found.learned.tolist() == (48 * rows + columns).tolist()
            assert found.targets.tolist() == batch.targets[rows, columns].tolist()


def test_a_mistake_in_the_data_comes_through_from_the_thread_that_fetches():
    with pytest.raises(ValueError, match="invalid literal"):
        list(fetched_ahead(map(int, ["1", "b"])))


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
    model, tokenizer = load_checkpoint(finished[0] / "checkpoint.pt", form="plain")
    losses = []  # by the definition: every document alone
    for prompt, completion in data.read_pairs(config.dev[0]):
        head, body = encode_prompt(tokenizer, prompt), [*tokenizer.encode(completion), tokenizer.ends[0]]
        log_p = model(torch.tensor([head + body]))[0, len(head) - 1 : -1].log_softmax(-1)
        losses += [-log_p[at, token].item() for at, token in enumerate(body)]
    (records,) = load_data(config, SHAPE, finished[0])[2].values()
    assert scores == validate(model, records, config)  # of one batch, since the run is short
    whole = validate(model, records, dataclasses.replace(config, max_steps=400))
    assert list(whole) == [1, 2, 3] and whole[3] == [pytest.approx(np.mean(losses), abs=2e-4), 1.0]


KILLED_IN_ITS_SECOND_SAVE = """
import os, signal, torch, train
from common.errors import run
save = torch.save

def save_half(content, part):
    save(content, part)
    if os.path.exists(part.removesuffix(".part")):
        os.truncate(part, os.path.getsize(part) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half
run(train.main)
"""


def started(*words) -> subprocess.Popen:
    """Python in the project's folder, on one thread like the tests, for bit-identical sums."""
    folder, environment = Path(train.__file__).parent, {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def flags(*configs) -> list[str]:
    """The command line that says the same as the configs."""
    words, values = [], {}
    for config in configs:
        values |= {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values.pop("exit_layers", None)  # no flag of train.py
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag}={as_text(value)}")
    return words


def test_a_training_killed_while_it_saves_goes_on_to_the_same_weights(config, finished, tmp_path, capsys):
    killed = started("-c", KILLED_IN_ITS_SECOND_SAVE, f"--out={tmp_path}", *flags(config, SHAPE))
    said = killed.communicate()[1]
    assert killed.returncode == -signal.SIGKILL, said
    model, tokenizer = load_checkpoint(tmp_path / "checkpoint.pt")  # the first save is whole
    assert model(torch.tensor([tokenizer.encode("one")])).isfinite().all()
    other = dataclasses.replace(config, validate_every=4)  # which may change
    model = train.run_training(other, SHAPE, tmp_path)
    assert "resuming from" in (said := capsys.readouterr().out) and "at step 5" in said
    assert_close(weights(model), finished[1], **EXACT)
    assert not list(tmp_path.glob("*.part"))


def test_a_loss_that_is_not_a_number_changes_no_weight_and_no_checkpoint(config, tmp_path, monkeypatch):
    calls = []

    def poisoned(name, exits):
        calls.append((exits.model, weights(exits.model)))
        factor = math.nan if len(calls) == 16 else 1  # step 7, second micro-batch
        return factor * call_loss(name, exits)

    monkeypatch.setattr(objective, "call_loss", poisoned)
    with pytest.raises(ValueError, match=r"the loss rotate is nan.* at step 7"):
        train.run_training(config, SHAPE, tmp_path)
    model, before = calls[-1]
    assert_close(weights(model), before, **EXACT)
    assert read_checkpoint(tmp_path / "checkpoint.pt")["training"]["step"] == 5 and not (tmp_path / "model.pt").exists()


def test_a_training_killed_at_a_random_step_goes_on_to_the_same_weights(config, finished, tmp_path):
    """Whatever step that is: the log tells, and goes on as if nothing had been."""
    running = started("train.py", f"--out={tmp_path}", *flags(dataclasses.replace(config, validate_every=1), SHAPE))
    step, log = random.randint(2, 9), tmp_path / "log.jsonl"
    while running.poll() is None and not (log.exists() and log.read_text().count('"positions_per_s"') >= step):
        time.sleep(0.001)
    running.kill()
    assert running.wait() == -signal.SIGKILL, running.stderr.read()
    assert_close(weights(train.run_training(config, SHAPE, tmp_path)), finished[1], **EXACT)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))


@pytest.fixture
def trained(config, command):
    """Runs the command with the settings of `config`, changed: what it printed, what it said on stderr, and
    its exit status."""
    return lambda folder, **changes: command(train.main, f"--out={folder}", *flags(dataclasses.replace(config, **changes), SHAPE))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_training_between_two_steps_with_a_checkpoint(number, trained, config, finished, tmp_path, monkeypatch):
    """Also if the user sends it again while the checkpoint is written."""
    note, save = runs.Run.note, runs.save_checkpoint

    def note_then_signal(training, row):
        note(training, row)
        if row.get("loss") and row["step"] == 3:
            os.kill(os.getpid(), number)

    def signal_then_save(*args, **more):
        os.kill(os.getpid(), number)
        save(*args, **more)

    monkeypatch.setattr(runs.Run, "note", note_then_signal)
    monkeypatch.setattr(runs, "save_checkpoint", signal_then_save)
    printed, _, status = trained(tmp_path, validate_every=100)
    monkeypatch.undo()
    assert status == 128 + number and "is at step 3 of 12, and the same command resumes" in printed
    assert read_checkpoint(tmp_path / "checkpoint.pt")["training"]["step"] == 3 and not (tmp_path / "model.pt").exists()
    assert_close(weights(train.run_training(config, SHAPE, tmp_path)), finished[1], **EXACT)


def test_a_full_disk_leaves_the_checkpoint_before_whole(trained, config, tmp_path):
    """A limit on the size of files stands for the disk."""
    train.run_training(dataclasses.replace(config, max_steps=5), SHAPE, tmp_path)
    (tmp_path / "model.pt").unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "checkpoint.pt").stat().st_size // 2, limits[1]))
    try:
        _, said, status = trained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and "could not be written, the old file is kept; is the disk full?" in said.splitlines()[-1]
    assert read_checkpoint(tmp_path / "checkpoint.pt")["training"]["step"] == 5 and not list(tmp_path.glob("*.part"))


def test_files_that_are_there_are_overwritten_only_with_the_flag(config, finished, tmp_path):
    for name in ("model.pt", "log.jsonl"):
        (tmp_path / name).write_bytes(b"precious")
        with pytest.raises(ValueError, match=f"{name} already exists, but there is no checkpoint to resume from"):
            train.run_training(config, SHAPE, tmp_path)
        assert (tmp_path / name).read_bytes() == b"precious"
        (tmp_path / name).unlink()
    train.run_training(dataclasses.replace(config, lr=0.02, max_steps=2), SHAPE, tmp_path)
    with pytest.raises(ValueError, match="was trained with lr"):
        train.run_training(config, SHAPE, tmp_path)
    assert_close(weights(train.run_training(config, SHAPE, tmp_path, overwrite=True)), finished[1], **EXACT)


def test_a_second_training_in_the_same_folder_is_refused_until_the_first_has_ended(config, tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="another training run is writing there"):
        train.run_training(config, SHAPE, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    train.run_training(dataclasses.replace(config, max_steps=1), SHAPE, tmp_path)


# ---------------------------------------------------------------- from a checkpoint, heads alone, several processes


@pytest.fixture(scope="module")
def tuned(config, finished, tmp_path_factory):
    """Heads trained on the finished model: settings and folder."""
    folder = tmp_path_factory.mktemp("heads")
    start = str(finished[0] / "model.pt")
    heads = dataclasses.replace(config, init=start, train="heads", loss="weighted", classifier=True, max_steps=40)
    train.run_training(heads, shape_from(heads, {"adapter": "lowrank:4"}), folder)
    return heads, folder


def test_heads_alone_leave_the_models_own_output_bit_identical(tuned, finished):
    before, tokenizer = load_checkpoint(finished[0] / "model.pt", form="plain")
    after, _ = load_checkpoint(finished[0] / "model.pt", heads=tuned[1] / "heads.pt", form="plain")
    tokens = torch.tensor([tokenizer.encode("one two three four five six seven eight")])
    assert torch.equal(after(tokens), before(tokens))
    old, new = torch.load(finished[0] / "model.pt")["weights"], weights_of(after)
    assert all(
        torch.equal(new[name], weight) for name, weight in weights_of(before).items() if name in old and not name.startswith("exit_norms")
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
    shape, calls, real = shape_from(heads, {"adapter": "lowrank:4"}), itertools.count(1), train.train_step

    def interrupted(*args):
        if next(calls) == 18:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(SystemExit):
        train.run_training(heads, shape, tmp_path)
    assert read_heads(tmp_path / "checkpoint.pt")["training"]["step"] == 18
    train.run_training(heads, shape, tmp_path)
    ended, expected = (read_heads(path / "heads.pt")["weights"] for path in (tmp_path, folder))
    assert_close(ended, expected, **EXACT)


def test_heads_learned_over_a_shortlist_keep_its_ids(finished, config, tmp_path):
    model = tmp_path / "model.pt"
    model.write_bytes((finished[0] / "model.pt").read_bytes())
    heads = dataclasses.replace(config, init=str(model), train="heads:20", loss="distill", max_steps=2)
    with pytest.raises(ValueError, match="train is heads:20, but 0 frequent ids are known; count them with"):
        train.run_training(heads, shape_from(heads, {}), tmp_path / "run")
    np.save(tmp_path / "model.ids.npy", np.arange(259, 279, dtype=np.int32))
    train.run_training(heads, shape_from(heads, {"adapter": "mlp:4"}), tmp_path / "run")
    with_heads, _ = load_checkpoint(model, heads=tmp_path / "run" / "heads.pt")
    assert with_heads.frequent_ids.tolist() == [*range(259, 279)] and with_heads.config.adapter == "mlp:4"


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
    model = make_model(heads, shape_from(heads, {"adapter": "lowrank:4"}))
    before = validate(model, array, heads)
    load_weights(model, read_heads(folder / "heads.pt")["weights"])
    after = validate(model, array, heads)
    assert after[3] == before[3] and all(after[layer][0] < before[layer][0] for layer in (1, 2))


def test_new_heads_begin_as_the_models_own(finished, config):
    heads = dataclasses.replace(config, init=str(finished[0] / "model.pt"), train="heads", loss="rotate", classifier=True)
    plain = dataclasses.replace(heads, train="all", exits=(), classifier=False)
    new = make_model(heads, shape_from(heads, {"exit_norms": (2,), "adapter": "lowrank:4"}))
    model, hidden = make_model(plain, SHAPE), torch.randn(5, 32)
    assert new.config.exit_norms == (1, 2) == new.config.classifiers and new.config.adapter == "lowrank:4"
    assert_close(new.head(hidden, 2), model.head(hidden, 2))
    assert classifier_logit(new, hidden[:1], 2).item() == 0


def test_fine_tuning_starts_from_the_weights_the_tokenizer_and_the_template_of_the_checkpoint(finished, config, tmp_path):
    given = torch.load(finished[0] / "model.pt") | {"chat_template": "{{ messages }}"}
    torch.save(given, tmp_path / "chat.pt")
    tuning = dataclasses.replace(config, init=str(tmp_path / "chat.pt"), max_steps=1, lr=1e-9, warmup=0)
    model = train.run_training(tuning, shape_from(tuning, {}), tmp_path / "run")
    start, _ = load_checkpoint(finished[0] / "model.pt", form="plain")
    assert_close(weights(model), weights(start), rtol=0, atol=1e-6)
    made = torch.load(tmp_path / "run" / "model.pt")
    assert torch.equal(made["tokenizer"], given["tokenizer"]) and made["weights"]["embedding"].dtype == torch.float16
    assert made["chat_template"] == given["chat_template"]
    with pytest.raises(ValueError, match=r"d_ff comes from --init .*; leave the flag out"):
        shape_from(tuning, {"d_ff": 3})


def test_the_first_layers_of_a_model_are_a_model_to_go_on_with(finished, config, tmp_path):
    """Its states after these layers are those of the whole model, and heads above go."""
    first = dataclasses.replace(config, init=str(finished[0] / "model.pt"), exits=(1,), max_steps=1)
    shape = shape_from(first, {"n_layers": 2})
    assert (shape.n_layers, shape.exit_layers, shape.exit_norms) == (2, (1,), (1,))
    model, (whole, tokenizer) = make_model(first, shape), load_checkpoint(first.init, form="plain")
    tokens = torch.tensor([tokenizer.encode("one two three")])
    for state, expected in zip(model.hidden_states(tokens), whole.hidden_states(tokens)):
        assert_close(state, expected, **EXACT)
    train.run_training(first, shape, tmp_path)
    assert load_checkpoint(tmp_path / "model.pt")[0].config == shape
    with pytest.raises(ValueError, match="--n-layers is 4, but the model of --init has 3 layers"):
        shape_from(first, {"n_layers": 4})


def test_little_text_makes_a_small_tokenizer_and_a_short_run_a_short_validation(config, tmp_path):
    assert shape_from(TrainConfig(), {}).vocab_size == 4096 and shape_from(config, {}).vocab_size == 1024
    assert shape_from(config, {"vocab_size": 2000}).vocab_size == 2000
    assert [shape_from(config, {"n_heads": 8, **more}).n_kv_heads for more in ({}, {"n_kv_heads": 2})] == [8, 2]
    assert [shape_from(config, given).head_dim for given in ({}, {"n_heads": 8}, {"d_model": 128})] == [64, 32, 32]
    train.run_training(dataclasses.replace(config, max_steps=1), shape_from(config, {"n_layers": 3}), tmp_path)
    assert load_checkpoint(tmp_path / "model.pt")[1].size < 1024  # these few words have no more pieces
    batches = {steps: validation_batches(TrainConfig(max_steps=steps)) for steps in (1, 50, 400, 7500)}
    assert batches == {1: 1, 50: 2, 400: 16, 7500: 16}


def test_without_dev_the_last_documents_are_held_out(config, tmp_path, capsys):
    alone = dataclasses.replace(config, dev=())
    _, records, dev = load_data(alone, SHAPE, tmp_path)
    _, every, _ = load_data(config, SHAPE, tmp_path)
    assert "the last 15 of 300 documents of" in capsys.readouterr().out
    (held,) = dev.values()
    assert np.array_equal(np.concatenate([records, held]), every)
    assert (held["flags"] & batching.START).astype(bool).sum() == 15 and held["flags"][0] & batching.START
    with pytest.raises(ValueError, match="named twice in --data"):
        load_data(dataclasses.replace(alone, data=alone.data * 2), SHAPE, tmp_path)
    assert TrainConfig().dev and not TrainConfig(data=("mine.txt",)).dev


def test_a_checkpoint_whose_weights_or_tokenizer_do_not_fit_is_not_trained_from(finished, config, tmp_path):
    content = torch.load(finished[0] / "model.pt")
    del content["weights"]["blocks.1.qkv"]
    torch.save(content, tmp_path / "less.pt")
    start = str(finished[0] / "model.pt")
    for changes, shape, said in (
        ({"init": str(tmp_path / "less.pt")}, {}, r"less.pt: the weights do not fit the model .*blocks.1.qkv is missing"),
        ({"init": start}, {"exit_norms": (1,)}, r"exit_norms.2 has no place in it"),
        ({"tokenizer": start}, {"vocab_size": 200}, "its tokenizer has 300 pieces, the model only 200"),
    ):
        changed = dataclasses.replace(config, **changes)
        with pytest.raises(ValueError, match=said):
            train.run_training(changed, shape_from(changed, shape), tmp_path / "run")


def test_what_starts_from_int8_or_takes_another_tokenizer_ends_in_a_file_that_fits(finished, config, tmp_path):
    """Matrices of int8 are trained dequantized, and written so; ids that were counted with another tokenizer
    are left behind."""
    content = torch.load(finished[0] / "model.pt") | {"frequent_ids": torch.arange(20)}
    small = {name: quantized(weight.float()) for name, weight in content["weights"].items() if weight.dim() > 1}
    content["weights"] |= {name: rows for name, (rows, _) in small.items()}
    torch.save(content | {"scales": {name: scale for name, (_, scale) in small.items()}}, tmp_path / "small.pt")
    for name, kept in ((None, 20), (str(finished[0] / "model.pt"), None)):
        tuning = dataclasses.replace(config, init=str(tmp_path / "small.pt"), tokenizer=name, max_steps=1)
        folder = tmp_path / f"run-{kept}"
        train.run_training(tuning, shape_from(tuning, {}), folder)
        assert torch.load(folder / "model.pt")["weights"]["embedding"].dtype == torch.float16
        ids = load_checkpoint(folder / "model.pt")[0].frequent_ids
        assert (ids is None) if kept is None else len(ids) == kept


def test_a_checkpoint_is_not_overwritten_by_what_starts_from_it(finished, config):
    before = contents(finished[0])
    again = dataclasses.replace(config, init=str(finished[0] / "model.pt"))
    with pytest.raises(ValueError, match=r"model.pt: is read here, and would be overwritten"):
        train.run_training(again, shape_from(again, {}), finished[0], overwrite=True)
    assert contents(finished[0]) == before


def test_changed_data_ends_a_resume_though_the_tokenizer_is_given(finished, config, tmp_path):
    mine = tmp_path / "mine.tsv"
    mine.write_text(Path(config.data[0]).read_text())
    given = dataclasses.replace(config, data=(str(mine),), tokenizer=str(finished[0] / "model.pt"), max_steps=2)
    train.run_training(given, SHAPE, tmp_path / "run")
    mine.write_text(Path(config.data[0]).read_text() + "one\tun\n")
    with pytest.raises(ValueError, match="the training files have changed since"):
        train.run_training(dataclasses.replace(given, max_steps=4), SHAPE, tmp_path / "run")


def test_damaged_data_in_the_folder_are_said_to_be(finished, config, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    for file in folder.glob("*.npy"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.npy: is damaged; delete it"):
        load_data(config, SHAPE, folder)


UNUSABLE = {  # settings -> what the message must say
    "unknown loss 'mean'": {"loss": "mean"},
    "unknown train 'tops'": {"train": "tops"},
    "lr is nan; it must be above 0": {"lr": math.nan},
    "layer_dropout is 2.0; it must be at least 0 and at most 1": {"layer_dropout": 2.0},
    "train is heads, which needs a model": {"train": "heads"},
    "train is all:9, which needs a model": {"train": "all:9"},
    "unknown train 'all:9:9'": {"train": "all:9:9"},
    "needs a loss on exits only": {"train": "heads", "init": "x.pt", "loss": "hidden"},
    "classifier is True, but loss is none": {"loss": "none", "classifier": True},
    "needs exits to train": {"loss": "distill", "exits": ()},
}


@pytest.mark.parametrize("said", UNUSABLE)
def test_settings_that_cannot_be_are_said_to_be(said):
    with pytest.raises(ValueError, match=re.escape(said)):
        TrainConfig(**UNUSABLE[said])


MISTAKES = {  # a flag -> what the line must say
    "--device=nowhere": "device 'nowhere' is not supported",
    "--exits=1,3": "--exits: layer 3 is not an exit",
    "--max-steps=3": "is at step 12, beyond max_steps 3",
    "--length=49": "length is 49, but the model has 48 positions",
    "--init={files}/dev.tsv": "dev.tsv: not a checkpoint",
    "--tokenizer={files}/dev.tsv": "was trained with tokenizer None, not",
    "--data={files}/malformed.tsv --overwrite": "malformed.tsv, line 2: has 1 columns; 2 are needed",
    "--eos-id=1 --overwrite": "eos_id is 1, but the tokenizer ends texts with 2; give --eos-id 2",
    "--data={files}/missing.tsv": "missing.tsv: no such data file",
    "--lr=0.5": "was trained with lr 0.01, not 0.5; give another --out",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_status_2_and_changes_no_file(mistake, files, config, finished, command):
    before, words = contents(finished[0]), mistake.format(files=files).split()
    _, said, status = command(train.main, f"--out={finished[0]}", *flags(config, SHAPE), *words)
    (line,) = said.splitlines()
    assert status == 2 and line.startswith("error: ") and MISTAKES[mistake] in line
    assert contents(finished[0]) == before


def test_a_failed_start_leaves_no_new_folder(config, files, tmp_path):
    malformed = dataclasses.replace(config, tokenizer=str(files / "empty.tsv"))
    with pytest.raises(ValueError, match=r"empty\.tsv"):
        train.run_training(malformed, SHAPE, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
