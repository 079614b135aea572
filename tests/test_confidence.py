"""Confidence: each function against NumPy written from the definitions, hand-worked numbers, and the traps
that such code falls into."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.errors import UserError
from confidence import FUNCTIONS, SCHEDULES, contrast, jensen_shannon, read_pruning, resolve
from decoding.settings import DecodeConfig
from decoding.trace import Trace

TOKENS = torch.tensor([[7, 3, 41, 19, 3, 28]])
NAMES = [name for name, function in FUNCTIONS.items() if not function.__module__.startswith("test")]  # what the project brings
every_function = pytest.mark.parametrize("name", NAMES)


def new_trace(model, confidence=None, prune: str = "none") -> Trace:
    return Trace(model, DecodeConfig(confidence=confidence and resolve(confidence), prune=prune))


def climb(trace: Trace, layer: int) -> Trace:
    """The trace with the states of TOKENS, whose last is the newest position, after `layer`."""
    trace.hidden = trace.model.hidden_states(TOKENS)[: layer + 1]
    return trace


def trace_at(model, layer: int, *settings, **more) -> Trace:
    """A new trace after `layer`, nothing checked yet."""
    return climb(new_trace(model, *settings, **more), layer)


def log(*probs: float) -> torch.Tensor:
    return torch.tensor(probs).log()


def random_log_probs(seed: int, n: int = 40) -> torch.Tensor:
    return (torch.randn(2, n, generator=torch.Generator().manual_seed(seed)) * 3).log_softmax(-1)


# ---------------------------------------------------------------- the reference: NumPy, float64, probabilities instead of logarithms


def states_ref(model) -> list[np.ndarray]:
    """h_0 .. h_L of the last of TOKENS."""
    return [state[0, -1].double().numpy() for state in model.hidden_states(TOKENS)]


def normed_ref(model, layer: int) -> np.ndarray:
    """h / rms(h) * norm, by the layer's own norm if it has one."""
    h = states_ref(model)[layer]
    norm = model.exit_norms[str(layer)] if layer in model.config.exit_norms else model.norm
    return h / np.sqrt((h**2).mean() + model.config.norm_eps) * norm.weight.double().numpy()


def logits_ref(model, layer: int) -> np.ndarray:
    """W norm(h) over the whole vocabulary."""
    return model.unembedding.weight.double().numpy() @ normed_ref(model, layer)


def softmax_ref(z):
    return np.exp(z) / np.exp(z).sum()


def margin_ref(p):
    return np.subtract(*np.sort(p)[:-3:-1])


def jsd_ref(p, q):
    kl = lambda a, b: np.sum(a * np.log(a / b))  # noqa: E731
    return kl(p, (p + q) / 2) / 2 + kl(q, (p + q) / 2) / 2


def contrast_ref(p, q):
    head, mixed = p >= 0.1 * p.max(), p.copy()
    mixed[head] = p[head].sum() * (p / q)[head] / (p / q)[head].sum()
    return mixed


def amateur_ref(p, layer):
    """The j whose JSD(p_l, p_j) / (l - j) is largest, None without any."""
    return max(range(2, layer), key=lambda j: jsd_ref(p[layer], p[j]) / (layer - j), default=None)


def classifier_ref(model, layer):
    w = model.classifiers[str(layer)].double().numpy()
    return 1 / (1 + np.exp(-(w[:-1] @ normed_ref(model, layer) + w[-1])))


def cosine_ref(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def jsd_confidence_ref(p, layer):
    amateur = amateur_ref(p, layer)
    return margin_ref(p[layer] if amateur is None else contrast_ref(p[layer], p[amateur]))


REFERENCES = {  # of the model, p_1 .. p_l over the candidates, and l
    "softmax": lambda model, p, layer: margin_ref(p[layer]),
    "hidden": lambda model, p, layer: max(0, cosine_ref(*states_ref(model)[layer - 1 : layer + 1])),
    "entropy": lambda model, p, layer: 1 + np.sum(p[layer] * np.log(p[layer])) / np.log(p[layer].size),
    "weighted": lambda model, p, layer: margin_ref(contrast_ref(p[layer], p[max(1, layer // 2)])),
    "jsd": lambda model, p, layer: jsd_confidence_ref(p, layer),
    "classifier": lambda model, p, layer: classifier_ref(model, layer),
}


@every_function
@pytest.mark.parametrize("prune", ["none", "fixed:8", "decaying:20:4", "adaptive:20:4"])
@pytest.mark.parametrize("shape", [{}, {"exit_norms": (2, 3), "tie_embeddings": False}], ids=["shared norm", "own norms"])
def test_confidence_equals_its_definition_over_the_candidates(tiny_model, name, prune, shape):
    """Over those that pruning has left, whose p sum to 1."""
    for seed in range(2):
        model = tiny_model(seed, **shape)
        z = {layer: logits_ref(model, layer) for layer in range(1, 5)}
        for exits in ((1, 2, 3, 4), (3, 4)):
            trace, kept = new_trace(model, name, prune), list(range(50))
            for layer in exits:
                climb(trace, layer).decided(1.0)
                if trace.candidates is not None:  # the best of those so far
                    assert set(trace.candidates.tolist()) == set(sorted(kept, key=lambda token: -z[layer][token])[: trace.n])
                    kept = trace.candidates.tolist()
                p = {j: softmax_ref(z[j][kept]) for j in z}
                assert trace.confidences[layer] == pytest.approx(REFERENCES[name](model, p, layer), abs=1e-5)
                assert trace.n == len(trace.logits(layer)) == len(kept)
            needs_no_head = name in ("hidden", "classifier")
            assert (trace.n == 50) if prune == "none" or needs_no_head else (trace.n < 20 if prune != "adaptive:20:4" else trace.n <= 20)


@every_function
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3], ids=lambda scale: f"logits times {scale}")
def test_confidence_is_a_scalar_between_zero_and_one(tiny_model, name, scale):
    for seed in range(10):
        model = tiny_model(seed)
        model.norm.weight *= scale  # from a uniform distribution to a certain one
        for layer in range(1, 5):
            value = torch.as_tensor(FUNCTIONS[name](trace_at(model, layer), layer))
            assert value.shape == () and 0 <= value <= 1


# ---------------------------------------------------------------- hand-worked numbers


def test_entropy_is_measured_against_that_of_the_uniform_distribution():
    trace = SimpleNamespace(log_probs=lambda layer: log(1 / 2, 1 / 4, 1 / 4))
    assert FUNCTIONS["entropy"](trace, 1).item() == pytest.approx(1 - 1.5 / math.log2(3), abs=1e-6)  # 1.5 bits of log2(3)


@pytest.mark.parametrize("newest, cosine", [((4.0, 3.0), 24 / 25), ((-6.0, 0.0), 0), ((30.0, 40.0), 1)])
def test_hidden_is_the_cosine_of_the_newest_position_and_never_negative(tiny_model, newest, cosine):
    trace = new_trace(tiny_model())
    trace.hidden = [torch.tensor([[[1.0, 0.0], [3.0, 4.0]]]), torch.tensor([[[0.0, 1.0], newest]])]
    assert FUNCTIONS["hidden"](trace, 1).item() == pytest.approx(cosine)


def test_jensen_shannon_by_hand():
    # m = (0.7, 0.3). The divergence from m to p and q instead would give 0.1180, an average over the
    # vocabulary 0.0509
    by_hand = (0.9 * math.log(9 / 7) + 0.1 * math.log(1 / 3)) / 2 + (0.5 * math.log(5 / 7) + 0.5 * math.log(5 / 3)) / 2
    assert by_hand == pytest.approx(0.10175, abs=1e-5)
    assert jensen_shannon(log(0.9, 0.1), log(0.5, 0.5)).item() == pytest.approx(by_hand, abs=1e-6)


def test_jensen_shannon_is_symmetric_and_at_most_log_2():
    for seed in range(20):
        p, q = random_log_probs(seed)
        assert jensen_shannon(p, q).item() == pytest.approx(jsd_ref(p.double().exp().numpy(), q.double().exp().numpy()), abs=1e-5)
        assert jensen_shannon(p, q).item() == pytest.approx(jensen_shannon(q, p).item(), abs=1e-6)
        assert 0 <= jensen_shannon(p, p) < 1e-6 < jensen_shannon(p, q) <= math.log(2)
    left = torch.tensor([200.0] * 50 + [0.0] * 50)  # of disjoint distributions it is log 2
    assert jensen_shannon(left.log_softmax(-1), left.flip(0).log_softmax(-1)).item() == pytest.approx(math.log(2), abs=1e-6)


INVERSE = [1 / x for x in range(1, 21)]


@pytest.mark.parametrize("p, q, mixed", [
    ([0.5, 0.3, 0.16, 0.04], [0.5, 0.1, 0.2, 0.2], [0.2, 0.6, 0.16, 0.04]),  # plausible from 0.05 on: 1, 3 and 0.8 share the mass 0.96
    ([0.95, 0.03, 0.02], [0.1, 0.1, 0.8], [0.95, 0.03, 0.02]),  # one plausible token
    ([1 / 20] * 20, [x / 210 for x in range(1, 21)], [x / sum(INVERSE) for x in INVERSE]),  # all plausible, none of them reaching 0.1
])  # fmt: skip
def test_contrast_by_hand(p, q, mixed):
    assert contrast(log(*p), log(*q)).tolist() == pytest.approx(mixed, abs=1e-6)


# ---------------------------------------------------------------- heads and amateurs


def test_jsd_contrasts_with_the_layer_that_diverges_most_for_its_distance(tiny_model):
    plainly_farthest = []
    for seed in range(20):
        model = tiny_model(seed)
        trace, p = trace_at(model, 5), {layer: softmax_ref(logits_ref(model, layer)) for layer in range(1, 6)}
        FUNCTIONS["jsd"](trace, 5)
        assert trace.amateurs == {5: amateur_ref(p, 5)}
        plainly_farthest.append(trace.amateurs[5] == max((2, 3, 4), key=lambda j: jsd_ref(p[5], p[j])))
    assert not all(plainly_farthest)  # the distance matters


@pytest.mark.parametrize("name, layer, amateurs", [
    ("jsd", 1, {}), ("jsd", 2, {}), ("jsd", 3, {3: 2}),
    *[("weighted", layer, {layer: amateur}) for layer, amateur in {1: 1, 2: 1, 3: 1, 4: 2, 5: 2}.items()],
])  # fmt: skip
def test_the_amateur_is_halfway_or_a_layer_from_2_on_and_without_one_there_is_the_plain_margin(tiny_model, name, layer, amateurs):
    trace = trace_at(tiny_model(), layer)
    value = FUNCTIONS[name](trace, layer)
    assert trace.amateurs == amateurs and set(trace.flops) == {layer, *amateurs.values()}
    if not amateurs:
        assert value == pytest.approx(FUNCTIONS["softmax"](trace, layer), abs=1e-6)


HEADS = {"softmax": {5}, "hidden": set(), "classifier": set(), "entropy": {5}, "weighted": {2, 5}, "jsd": {2, 3, 4, 5}}


@pytest.mark.parametrize("name, layers", HEADS.items())
@pytest.mark.parametrize("prune, n", [("none", 50), ("fixed:8", 8)])
def test_heads_are_computed_when_they_are_needed_and_once(tiny_model, monkeypatch, name, layers, prune, n):
    trace, rows = trace_at(tiny_model(n_layers=6), 5, name, prune), []
    score = trace.model.score
    monkeypatch.setattr(trace.model, "score", lambda normed, weight: rows.append(len(normed)) or score(normed, weight))
    for _ in range(2):
        trace.decided(1.0)
    assert sum(rows) == len(layers)
    assert trace.flops == {layer: 2 * 32 * (50 if layer == 5 else n) for layer in layers}  # over n once layer 5 has chosen them


# ---------------------------------------------------------------- pruning


def test_fixed_pruning_keeps_the_best_of_the_first_layer_checked(tiny_model):
    model = tiny_model()
    trace, z = trace_at(model, 2, prune="fixed:8"), {layer: logits_ref(model, layer) for layer in range(1, 6)}
    trace.prune()
    kept = trace.candidates.tolist()
    assert kept == np.argsort(-z[2])[:8].tolist() != sorted(kept)  # or ids could pass for ranks
    climb(trace, 5)
    for layer in (5, 4, 1):  # heads of later layers and of earlier amateurs
        assert trace.logits(layer).numpy() == pytest.approx(z[layer][kept], abs=1e-5)
        assert trace.token(int(trace.logits(layer).argmax())) == max(kept, key=lambda token: z[layer][token])
    assert trace.flops == {2: 2 * 50 * 32, 5: 2 * 8 * 32, 4: 2 * 8 * 32, 1: 2 * 8 * 32}


@every_function
def test_asking_for_logits_changes_nothing_else(tiny_model, name):
    """A function may ask for whatever it likes, in whatever order: candidates, decision and guesses stay."""
    found = {True: [], False: []}
    for curious in found:
        trace = new_trace(tiny_model(), name, "decaying:12:3")
        for layer in (2, 3, 4):
            climb(trace, layer)
            if curious:
                trace.logits(1), trace.log_probs(layer), trace.stack([1, layer])
            found[curious].append((trace.decided(1.0), trace.confidences[layer], trace.n))
        found[curious].append([trace.guess(layer) for layer in (2, 3, 4)])
    assert found[True] == found[False]


@pytest.mark.parametrize("prune", ["fixed:6", "decaying:6:2", "adaptive:6:2"])
def test_a_guess_is_that_of_the_time_it_was_checked(tiny_model, prune):
    """Later pruning may drop what an earlier exit would have said; thresholds that learn count what it did
    say."""
    dropped = 0
    for seed in range(20):
        trace, said = new_trace(tiny_model(seed), "softmax", prune), {}
        for layer in range(1, 5):
            climb(trace, layer).decided(1.0)
            said[layer] = int(trace.token(trace.logits(layer).argmax()))
        assert {layer: trace.guess(layer) for layer in said} == said
        dropped += sum(token not in trace.candidates for token in said.values())
    assert dropped > 0 or prune != "decaying:6:2"  # fixed drops nobody later, adaptive keeps six unless it is very sure


def test_pruning_is_read_with_its_numbers_or_their_defaults():
    found = {text: read_pruning(text) for text in ("none", "fixed", "fixed:8", "decaying", "decaying:40:8", "adaptive:512")}
    assert [numbers for _, numbers in found.values()] == [[], [64], [8], [64, 16], [40, 8], [512, 16]]
    assert [function for function, _ in found.values()] == [SCHEDULES[text.partition(":")[0]][0] for text in found]
    with pytest.raises(UserError, match="MIN is 16, above K, which is 8"):
        read_pruning("adaptive:8")


@pytest.mark.parametrize("prune, confidences, sizes", [
    # 40 at first; then 40 / (1 + 32/8 · 2/5) = 15.4, 16 / (1 + 8/8 · 3/5) = 10, and 10 / (1 + 2/8 · 4/5) = 8.3 of at least 8
    ("decaying:40:8", [0, 0, 0, 0], [40, 16, 10, 9]), ("decaying:12:12", [0, 0, 0, 0], [12] * 4),
    ("decaying:50:10", [0], [math.ceil(50 / (1 + 40 / 10 / 5))]),  # from V on
    ("none", [0, 0], [50, 50]), ("fixed:50", [0, 0], [50, 50]), ("fixed:1000", [0, 0], [50, 50]),
    # V = 50: 50 · (1 - 0.9 · 0.5) = 27.5, · (1 - 0.9 · 0.2) = 41 but never growing, · (1 - 0.9) = 5 but at least 6
    ("adaptive:50:6", [0.5, 0.2, 1.0, 0.0], [50, 28, 28, 6]), ("adaptive:5:5", [0.5, 0.2, 1.0, 0.0], [5] * 4),  # k <= V/10 caps it
])  # fmt: skip
def test_pruning_by_hand(tiny_model, prune, confidences, sizes):
    """How many candidates are left after the checks at layers 1, 2, .., with these confidences."""
    trace, found = new_trace(tiny_model(), prune=prune), []
    for layer, value in enumerate(confidences, 1):
        climb(trace, layer).prune()
        trace.confidences[layer] = value
        found.append(trace.n)
        assert trace.n == (50 if trace.candidates is None else len(trace.candidates)) == len(trace.logits(1))
    assert found == sizes


# ---------------------------------------------------------------- the decision, and functions from outside


def test_a_threshold_is_reached_by_an_equal_confidence_and_0_without_a_check(tiny_model):
    trace = trace_at(tiny_model(), 3, lambda trace, layer: torch.tensor(0.5))
    assert trace.decided(0.5) and not trace.decided(0.5001) and trace.confidences == {3: 0.5}
    assert trace_at(tiny_model(), 3).decided(0.0)
    assert trace_at(tiny_model(), 2, lambda trace, layer: 1.00001).decided(1.0)  # rounding beyond 1 is a confidence


def test_a_function_is_loaded_from_outside(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "ideas_of_a_reader.py").write_text("def top(trace, layer):\n    return trace.log_probs(layer).max().exp()\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = tiny_model()
    trace = trace_at(model, 4, "ideas_of_a_reader:top")
    assert not trace.decided(1.0) and trace.confidences[4] == pytest.approx(softmax_ref(logits_ref(model, 4)).max(), abs=1e-6)


@pytest.mark.parametrize("name", ["softmx", "no_such_module:top", "math:no_such_function", "math:pi", ":sin", "os:system"])
def test_what_is_no_function_of_trace_and_layer_is_refused_before_it_runs(name):
    with pytest.raises(UserError, match=name) as error:
        resolve(name)
    assert ":" in name or all(known in str(error.value) for known in NAMES)


@pytest.mark.parametrize("answer, shown", [
    (None, "None"), (-0.2, "-0.2"), (torch.tensor([0.1, 0.2]), r"tensor\(\[0.1000, 0.2000\]\)"), (torch.tensor(math.nan), r"tensor\(nan\)"),
])  # fmt: skip
def test_an_answer_that_is_no_confidence_is_one_line_with_function_and_layer(tiny_model, answer, shown):
    def mine(trace, layer):
        return answer

    with pytest.raises(UserError, match=f"confidence mine at layer 3 returned {shown}; ") as error:
        trace_at(tiny_model(), 3, mine).decided(0.5)
    assert "\n" not in str(error.value)
