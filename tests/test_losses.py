"""The losses over exits against their definitions; what they cost; what they leave alone."""

import itertools
import math
import re
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from common.errors import UserError
from model import ModelConfig, Transformer
from tests.test_train import random_batch
from training import losses
from training.device import DeviceBatch, to_device
from training.losses import (
    Exits,
    call_loss,
    classifier_loss,
    cross_entropy,
    divergence,
    exits_in_turn,
    find_loss,
    hidden_loss,
    monotone,
    part_of_vocabulary,
)
from training.objective import Objective, skipped_layers
from training.settings import TrainConfig

SHAPE = ModelConfig(vocab_size=300, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, max_len=48, exit_norms=(1, 2))
CONFIG = TrainConfig(exits=(1, 2), device="cpu")


def untrained(**shape) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(replace(SHAPE, **shape))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def batch() -> DeviceBatch:
    """Two rows of 12 positions, of which 14 learn."""
    return to_device(random_batch(learned=7), "cpu")


def exits_of(model: Transformer, config: TrainConfig = CONFIG, step: int = 0) -> Exits:
    part = batch()
    return Exits(model, config, part, model.hidden_states(part.inputs, part.documents), step)


@pytest.fixture
def chunks(monkeypatch):
    """Sets how many logits of one layer are computed at a time."""

    def to(count: int) -> None:
        monkeypatch.setitem(losses.CHUNK, "cpu", count)
        monkeypatch.setattr(losses, "FEWEST", 1)

    return to


def gradients(model: Transformer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    slopes = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return dict(zip(dict(model.named_parameters()), slopes))


# ---------------------------------------------------------------- what a step trains


@pytest.mark.parametrize("loss, by_hand", [
    ("none", [[12]] * 4),
    ("weighted", [[2, 3, 4, 6, 8, 12]] * 4),
    ("rotate", [[2, 6, 12], [3, 8, 12], [4, 12], [2, 6, 12]]),
    ("distill", [[2, 6, 12], [3, 8, 12], [4, 12], [2, 6, 12]]),
    ("hidden", [[2, 6, 12], [3, 8, 12], [4, 12], [2, 6, 12]]),
])  # fmt: skip
def test_layers_of_a_step_by_hand(loss, by_hand):
    config = TrainConfig(loss=loss, exits=(2, 3, 4, 6, 8), device="cpu")
    model = untrained(n_layers=12, exit_norms=())
    for step in range(4):
        exits = exits_of(model, config, step)
        find_loss(loss)(exits)
        assert sorted(exits.used) == by_hand[step]


@pytest.mark.parametrize("exits, per_step, period", [(6, 2, 3), (5, 2, 3), (5, 4, 2), (7, 1, 7), (3, 8, 1), (0, 2, 1)])
def test_rotation_visits_every_exit_equally_often(exits, per_step, period, monkeypatch):
    monkeypatch.setattr(losses, "PER_STEP", per_step)
    layers = tuple(range(1, exits + 1))
    turns = [exits_in_turn(layers, step) for step in range(3 * period)]
    assert sorted(itertools.chain(*turns)) == sorted(layers * 3)
    assert all(len(turn) <= per_step for turn in turns)


def test_layers_are_left_out_more_often_the_deeper_they_lie():
    """Of 4,000 batches, within 4 standard deviations: each layer fails by chance about once in 16,000 runs,
    and the seed is fixed."""
    config, n, count = replace(CONFIG, layer_dropout=0.4), 5, 4000
    drawn = [skipped_layers(config, n, number) for number in range(count)]
    for layer in range(1, n + 1):
        chance = 0.4 * (2 ** ((layer - 1) / 4) - 1)
        seen = sum(layer in skipped for skipped in drawn) / count
        assert abs(seen - chance) <= 4 * math.sqrt(chance * (1 - chance) / count)
    assert drawn == [skipped_layers(config, n, number) for number in range(count)]  # so that a resumed run draws the same
    assert skipped_layers(CONFIG, n, 3) == frozenset()


def test_recomputing_changes_no_gradient():
    model = untrained()
    runs, found, counts = [], [], []
    model.blocks[1].register_forward_pre_hook(lambda *_: runs.append(1))
    for each in (False, True):
        found.append(gradients(model, Objective(model, replace(CONFIG, recompute=each))(batch(), 0)[0]))
        counts.append(len(runs))
    assert_close(found[1], found[0], rtol=0, atol=0)
    assert counts == [1, 3]  # once, and twice


def test_a_layer_left_out_of_a_step_learns_nothing(monkeypatch):
    monkeypatch.setattr("training.objective.skipped_layers", lambda config, n_layers, number: frozenset({2}))
    model = untrained()
    slopes = gradients(model, Objective(model, CONFIG)(batch(), 0)[0])
    moved = {name.split(".")[1] for name, slope in slopes.items() if name.startswith("blocks") and slope.abs().sum() > 0}
    assert moved == {"0", "2"}


# ---------------------------------------------------------------- the losses of the heads


def by_definition(exits: Exits, weights: dict[int, float], distill: bool) -> torch.Tensor:
    """The weighted sum of mean losses, each from the logits of a whole layer."""
    log_p = {layer: exits.model.head(exits.state(layer), layer).log_softmax(-1) for layer in (1, 2, 3)}
    teacher, each = log_p[3].detach(), {}
    for layer in weights:
        if distill and layer != 3:
            each[layer] = (teacher.exp() * (teacher - log_p[layer])).sum(-1).mean()
        else:
            each[layer] = -log_p[layer][range(14), exits.targets].mean()
    return sum(weights[layer] * each[layer] for layer in weights)


@pytest.mark.parametrize("distill", [False, True])
@pytest.mark.parametrize("chunk", [2**24, 1, 300 * 4])  # all targets together; one at a time, four
@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": False, "adapter": "lowrank:3"}, {"logit_cap": 2.0}])
@pytest.mark.parametrize("weights", [{1: 0.2, 2: 0.3, 3: 0.5}, {1: 0.4, 2: 0.6}])  # with and without the last layer
def test_value_and_gradient_are_those_of_the_definition(distill, chunk, shape, weights, chunks):
    chunks(chunk)
    model = untrained(**shape)
    exits, same = exits_of(model), exits_of(model)
    expected = by_definition(same, weights, distill)
    found = exits.weighted_sum(list(weights), divergence if distill else cross_entropy, lambda layers: weights, compare=True)
    assert_close(found, expected)
    assert_close(sum(weights[layer] * loss for layer, loss in exits.losses.items()), expected.detach())
    assert_close(gradients(model, 3 * found), gradients(model, 3 * expected), rtol=1e-4, atol=1e-6)
    for layer in (1, 2):
        agreed = model.head(same.state(layer), layer).argmax(-1) == model.head(same.state(3)).argmax(-1)
        assert torch.equal(exits.agreement(layer), agreed)


def test_the_losses_of_several_sums_are_all_noted():
    exits = exits_of(untrained())
    exits.weighted_sum([exits.last])
    exits.weighted_sum([1], divergence)
    assert exits.losses.keys() == {1, exits.last}


def test_logits_of_one_exit_and_one_chunk_at_a_time_are_alive(chunks, monkeypatch):
    """Of the last layer and two exits, 14 targets in chunks of 4: twelve products forward and again backward,
    none larger than a chunk, and each forgotten before the next is made."""
    model, sizes, alive = untrained(), [], []
    chunks(4 * 300)
    score = model.score

    def watched(normed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = score(normed, weight)
        sizes.append(len(normed))
        alive.append(weakref.ref(logits))
        assert sum(each() is not None for each in alive) == 1
        return logits

    monkeypatch.setattr(model, "score", watched)
    Objective(model, CONFIG)(batch(), 0)[0].backward()
    assert sorted(sizes) == [2] * 6 + [4] * 18


# ---------------------------------------------------------------- hidden states


def test_monotone_matching_is_the_best_of_all():
    draw = np.random.default_rng(0)
    for _ in range(50):
        rows, columns = draw.integers(1, 4), draw.integers(1, 5)
        costs = draw.random((rows, columns)).tolist()
        every = [pick for pick in itertools.product(range(columns), repeat=int(rows)) if list(pick) == sorted(pick)]
        best = min(every, key=lambda pick: sum(costs[i][j] for i, j in enumerate(pick)))
        assert monotone(costs) == list(best)


def test_hidden_loss_by_hand():
    """Of the four layers 0, 5 | 4, 6 the lower is closest to 4, the higher to either; both match 4, at 16 and
    1. Only they learn."""
    states = [torch.full((3, 2), value, requires_grad=True) for value in (0.0, 5.0, 4.0, 6.0)]
    loss = hidden_loss(states, 2)
    assert loss.item() == pytest.approx((16 + 1) / 2)
    slopes = torch.autograd.grad(loss, states, allow_unused=True)
    assert slopes[2] is None and slopes[3] is None
    assert_close(slopes[0], torch.full((3, 2), 2 * (0 - 4) / 6 / 2))


def test_the_objective_adds_the_hidden_loss_below_the_first_exit_of_the_step(monkeypatch):
    monkeypatch.setattr(losses, "HIDDEN_WEIGHT", 0.3)
    model, part = untrained(), batch()
    plain, last = Objective(model, CONFIG)(part, 0)
    found, same = Objective(model, replace(CONFIG, loss="hidden"))(part, 0)
    low, *high = (exits_of(model).state(layer) for layer in (1, 2, 3))
    assert_close(found, plain + 0.3 * min(F.mse_loss(low, state) for state in high))
    assert_close(same, last)


# ---------------------------------------------------------------- losses of the user's own

OWN = """
import torch.nn.functional as F

def smoothed(logits, targets, final):
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)

def smooth(exits):
    return exits.weighted_sum(exits.in_turn(), smoothed)

def by_hand(exits):
    return sum(F.cross_entropy(exits.logits(layer), exits.targets) for layer in exits.every()) / len(exits.every())

vector = lambda exits: exits.state(1)
nothing = lambda exits: None
constant = lambda exits: exits.state(1).detach().mean()
mean = lambda exits: exits.weighted_sum([1, 3], lambda logits, targets, final: F.cross_entropy(logits, targets))
answer = 42
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's: own_losses."""
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "own_losses.py"
    sys.modules.pop("own_losses", None)


def test_layerskip_weighs_by_the_square_of_the_depth():
    """e_l by its definition, layers counted from 0, for a model of three layers whose exits are 1 and 2."""
    exits, scale = exits_of(untrained()), 0.2
    wanted = {layer + 1: scale * sum(range(layer + 1)) for layer in (0, 1)} | {3: 2 + scale * sum(range(2))}
    found = call_loss("layerskip", exits)
    expected = sum(wanted[layer] / sum(wanted.values()) * exits.losses[layer] for layer in wanted)
    assert exits.in_turn() == [1, 2, 3] and found.item() == pytest.approx(expected.item())


def test_a_loss_of_ones_own_is_asked_like_the_others(own):
    """Label smoothing by its definition: a tenth of the mean of -log p over all pieces, nine tenths of the
    target's."""
    model, weights = untrained(), {1: 1 / 6, 2: 2 / 6, 3: 3 / 6}
    found = call_loss("own_losses:smooth", exits_of(model))
    expected, exits = 0, exits_of(model)
    for layer, weight in weights.items():
        costs = -exits.logits(layer).log_softmax(-1)  # (N, V)
        expected = expected + weight * (0.9 * costs[range(14), exits.targets] + 0.1 * costs.mean(-1)).mean()
    assert_close(found, expected)
    assert_close(gradients(model, found), gradients(model, expected), rtol=1e-4, atol=1e-6)


def test_the_recipe_works_as_it_is_written(own, monkeypatch):
    lines = [line[4:] for line in losses.__doc__.splitlines() if line.startswith("    ")]
    (own.parent / "my_file.py").write_text("\n".join(lines))
    monkeypatch.delitem(sys.modules, "my_file", raising=False)
    model = untrained()
    assert_close(call_loss("my_file:smooth", exits_of(model)), call_loss("own_losses:smooth", exits_of(model)))


def test_a_loss_may_ask_for_logits_by_itself_and_classifiers_learn_all_the_same(own):
    model = untrained(classifiers=(1, 2))
    config = replace(CONFIG, loss="own_losses:by_hand", classifier=True)
    loss, logged = Objective(model, config)(batch(), 0)
    exits = exits_of(model)
    means = [F.cross_entropy(exits.logits(layer), exits.targets) for layer in (1, 2, 3)]
    assert_close(logged, sum(means).detach() / 3)
    learned = [exits_of(model).agreement(layer) for layer in (1, 2)]
    extra = [classifier_loss(model, exits.state(layer), layer, same) for layer, same in zip((1, 2), learned)]
    assert_close(loss, sum(means) / 3 + sum(extra) / 2)


@pytest.mark.parametrize("name, said", [
    ("vector", r"own_losses:vector returned \(14, 32\)"), ("nothing", "returned NoneType"), ("constant", "with a gradient"),
    ("mean", "one loss for each target"),
])  # fmt: skip
def test_what_a_loss_gives_wrongly_is_named(name, said, own):
    with pytest.raises(UserError, match=said):
        call_loss(f"own_losses:{name}", exits_of(untrained()))


@pytest.mark.parametrize("name", ["mean", "own_losses:mine", "no_such_file:mine", "own_losses:answer"])
def test_a_loss_that_is_not_there_is_named(name, own):
    with pytest.raises(UserError, match=re.escape(name)):
        TrainConfig(loss=name)


# ---------------------------------------------------------------- classifiers, heads alone


def classified(model, hidden, layer):
    """sigmoid(w norm(h) + b), (N,)."""
    w = model.classifiers[str(layer)]
    return torch.sigmoid(model.exit_norm(hidden, layer) @ w[:-1] + w[-1])


def test_classifier_loss_weighs_both_labels_alike_and_teaches_the_classifier_alone():
    model = untrained(classifiers=(1,))
    hidden, labels = torch.randn(7, 32), torch.tensor([True] * 6 + [False])
    loss = classifier_loss(model, hidden, 1, labels)
    belief = classified(model, hidden, 1)
    assert_close(loss, (-belief[:6].log().mean() - (1 - belief[6]).log()) / 2)
    changed = [name for name, slope in gradients(model, loss).items() if slope.abs().sum() > 0]
    assert changed == ["classifiers.1"]
    one_sided = classifier_loss(model, hidden, 1, torch.ones(7, dtype=torch.bool))
    assert_close(one_sided, -belief.log().mean() / 2)


@pytest.mark.parametrize("loss", ["weighted", "rotate", "distill"])
def test_heads_alone_learn_and_nothing_else(loss):
    model = untrained(adapter="lowrank:2", classifiers=(1, 2))
    config = replace(CONFIG, train="heads", init="x.pt", loss=loss, classifier=True)
    trained = {name for name, weight in model.named_parameters() if name.startswith(("exit_norms", "adapters", "classifiers"))}
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in trained)
    Objective(model, config)(batch(), 0)[0].backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.abs().sum() > 0} == trained


# ---------------------------------------------------------------- over a part of the vocabulary


def part_config(size: int | None, train: str = "heads", **changes) -> TrainConfig:
    train = f"{train}:{size}" if size else train
    return TrainConfig(train=train, init="x.pt", loss="distill", exits=(1, 2), device="cpu", **changes)


def loss_and_gradients(model: Transformer, config: TrainConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of one micro-batch at step 0, and the gradients of what is trained."""
    model.zero_grad()
    loss, _ = Objective(model, config)(batch(), 0)
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def model_with_ids(count: int, train: str = "heads") -> Transformer:
    model = untrained(classifiers=(1, 2), adapter="mlp:5")
    for name, weight in model.named_parameters():
        weight.requires_grad_(train == "all" or name.startswith(("exit_norms", "adapters", "classifiers")))
    with torch.no_grad():
        for weight in model.adapters.values():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    model.frequent_ids = torch.randperm(300, generator=torch.Generator().manual_seed(3))[:count]
    return model


@pytest.mark.parametrize("chunk", [2**20, 300])
@pytest.mark.parametrize("train, trained", [("heads", 6), ("all", 26)])
def test_over_all_ids_weights_learn_what_they_learn_without_a_shortlist(train, trained, chunk, chunks):
    chunks(chunk)
    model = model_with_ids(300, train)
    loss, slopes = loss_and_gradients(model, part_config(None, train, classifier=True))
    same, found = loss_and_gradients(model, part_config(300, train, classifier=True))
    assert_close(same, loss)
    assert len(slopes) == trained
    assert_close(found, slopes, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("chunk", [2**20, 300])
def test_over_a_shortlist_heads_learn_the_last_layers_distribution_within_it(chunk, chunks):
    """KL between softmaxes over the most frequent ids and all ids of the batch, each id once."""
    chunks(chunk)
    model, part = model_with_ids(40), batch()
    ids = sorted({*model.frequent_ids[:30].tolist(), *part.inputs.flatten().tolist(), *part.targets.tolist()})
    assert 30 < len(ids) < 100
    with torch.no_grad():
        exits = exits_of(model)
        log_p, *log_q = (model.head(exits.state(layer), layer)[:, ids].log_softmax(-1) for layer in (3, 1, 2))
        kl = [float((log_p.exp() * (log_p - each)).sum(-1).mean()) for each in log_q]
    loss, _ = loss_and_gradients(model, part_config(30))
    assert loss.item() == pytest.approx(kl[0] / 3 + kl[1] * 2 / 3, rel=1e-4)
    unembed, targets = part_of_vocabulary(model, 30, part)
    assert torch.equal(unembed, model.unembedding.weight[ids]) and [ids[place] for place in targets] == part.targets.tolist()


@pytest.mark.parametrize("chunk", [2**20, 300])
def test_over_a_shortlist_the_last_layer_learns_over_all_ids(chunk, chunks):
    """Its loss and the gradients are those without a shortlist; those of exits are not."""
    chunks(chunk)
    model, found = model_with_ids(40, "all"), {}
    for size in (None, 30):
        exits = exits_of(model, part_config(size, "all"))
        (slope,) = torch.autograd.grad(exits.weighted_sum([3]), model.embedding.weight)
        exits.weighted_sum([1, 3])
        found[size] = exits.losses[3], slope, exits.losses[1]
    (loss, slope, exit_loss), (same_loss, same_slope, other) = found[None], found[30]
    assert_close(same_loss, loss)
    assert_close(same_slope, slope)
    assert other < exit_loss
