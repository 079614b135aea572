"""Confidence: each function against NumPy written from the definitions, hand-worked numbers, and the traps
that such code falls into."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import confidence
from common.errors import UserError
from confidence import FUNCTIONS, SCHEDULES, Trace, contrast, jensen_shannon, margin, register, resolve

TOKENS = torch.tensor([[7, 3, 41, 19, 3, 28]])
NAMES = [name for name, function in FUNCTIONS.items() if not function.__module__.startswith("test")]  # what the project brings
SHAPES = {"shared norm": {}, "own norms": {"exit_norms": (2, 3), "tie_embeddings": False}}
every_function = pytest.mark.parametrize("name", NAMES)


def trace_at(model, layer: int, **options) -> Trace:
    """The trace of the last of TOKENS after `layer`, nothing asked yet."""
    trace = Trace(model, **options)
    trace.hidden += model.hidden_states(TOKENS)[: layer + 1]
    return trace


def log(*probs: float) -> torch.Tensor:
    return torch.tensor(probs).log()


def random_log_probs(seed: int, n: int = 40) -> torch.Tensor:
    return (torch.randn(2, n, generator=torch.Generator().manual_seed(seed)) * 3).log_softmax(-1)


# ---------------------------------------------------------------- the reference: NumPy, float64, probabilities instead of logarithms


def logits_ref(model, layer: int) -> np.ndarray:
    """z = W (h / rms(h) * norm) of the last of TOKENS, over the whole vocabulary."""
    weights = {name: weight.double().numpy() for name, weight in model.state_dict().items()}
    h = model.hidden_states(TOKENS)[layer][-1].double().numpy()
    norm = weights[f"exit_norms.{layer}"] if layer in model.config.exit_norms else weights["norm"]
    unembedding = weights["embedding" if model.config.tie_embeddings else "unembedding"]
    return unembedding @ (h / np.sqrt((h**2).mean() + model.config.norm_eps) * norm)


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


def amateur_ref(p, layer, premature=None):
    """The j whose JSD(p_l, p_j) / (l - j) is largest, None without any."""
    return max(premature or range(2, layer), key=lambda j: jsd_ref(p[layer], p[j]) / (layer - j), default=None)


def classifier_ref(model, layer):
    w = model.classifiers[str(layer)].double().numpy()
    h = model.hidden_states(TOKENS)[layer][-1].double().numpy()
    norm = (model.exit_norms[str(layer)] if layer in model.config.exit_norms else model.norm).double().numpy()
    return 1 / (1 + np.exp(-(w[:-1] @ (h / np.sqrt((h**2).mean() + model.config.norm_eps) * norm) + w[-1])))


def jsd_confidence_ref(p, h, layer):
    amateur = amateur_ref(p, layer)
    return margin_ref(p[layer] if amateur is None else contrast_ref(p[layer], p[amateur]))


REFERENCES = {  # of p_1 .. p_l over the candidates, h_0 .. h_l, and l
    "softmax": lambda p, h, layer: margin_ref(p[layer]),
    "hidden": lambda p, h, layer: max(0, h[layer] @ h[layer - 1] / np.linalg.norm(h[layer]) / np.linalg.norm(h[layer - 1])),
    "entropy": lambda p, h, layer: 1 + np.sum(p[layer] * np.log(p[layer])) / np.log(p[layer].size),
    "weighted": lambda p, h, layer: margin_ref(contrast_ref(p[layer], p[max(1, layer // 2)])),
    "jsd": jsd_confidence_ref,
}


@every_function
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("prune, exits", [("none", (1, 2, 3, 4, 5)), ("fixed", (1, 2, 3, 4, 5)), ("fixed", (3, 5))])
def test_confidence_equals_its_definition(tiny_model, name, shape, prune, exits):
    for seed in range(5):
        model = tiny_model(seed, **shape)
        states, trace = model.hidden_states(TOKENS), Trace(model, prune=prune, prune_k=8)
        z = {layer: logits_ref(model, layer) for layer in range(1, 6)}
        kept = np.argsort(-z[exits[0]])[: 8 if prune == "fixed" else None]
        p, h = {layer: softmax_ref(z[layer][kept]) for layer in z}, [state[-1].double().numpy() for state in states]
        for layer in exits:
            trace.hidden = states[: layer + 1]
            if (name, layer) != ("classifier", 5):  # the last layer is no exit
                expected = classifier_ref(model, layer) if name == "classifier" else REFERENCES[name](p, h, layer)
                trace.prune()
                assert float(FUNCTIONS[name](trace, layer)) == pytest.approx(expected, abs=1e-5)


def test_a_layer_without_a_classifier_is_named(tiny_model):
    with pytest.raises(ValueError, match=r"layer 3 has no confidence classifier \(layers with one: 1, 2\)"):
        FUNCTIONS["classifier"](trace_at(tiny_model(classifiers=(1, 2)), 3), 3)
    with pytest.raises(ValueError, match="layers with one: none"):
        FUNCTIONS["classifier"](trace_at(tiny_model(classifiers=()), 3), 3)


@every_function
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3], ids=lambda scale: f"logits times {scale}")
def test_confidence_is_a_scalar_between_zero_and_one(tiny_model, name, scale):
    for seed in range(10):
        model = tiny_model(seed)
        model.norm *= scale  # from a uniform distribution to a certain one
        for layer in range(1, 5):
            value = torch.as_tensor(FUNCTIONS[name](trace_at(model, layer), layer))
            assert value.shape == () and 0 <= value <= 1


# ---------------------------------------------------------------- hand-worked numbers


def test_margin_is_the_difference_of_the_two_largest_wherever_they_are():
    assert [margin(torch.tensor(probs)) for probs in ([0.2, 0.5, 0.3], [0.9, 0.04, 0.06])] == pytest.approx([0.2, 0.84])


def test_entropy_is_measured_against_that_of_the_uniform_distribution():
    trace = SimpleNamespace(log_probs=lambda layer: log(1 / 2, 1 / 4, 1 / 4))
    assert FUNCTIONS["entropy"](trace, 1).item() == pytest.approx(1 - 1.5 / math.log2(3), abs=1e-6)  # 1.5 bits of log2(3)


@pytest.mark.parametrize("newest, cosine", [((4.0, 3.0), 24 / 25), ((-6.0, 0.0), 0), ((30.0, 40.0), 1)])
def test_hidden_is_the_cosine_of_the_newest_position_and_never_negative(newest, cosine):
    trace = SimpleNamespace(hidden=[torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], newest])])
    assert FUNCTIONS["hidden"](trace, 1) == pytest.approx(cosine)


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


def test_jensen_shannon_of_disjoint_distributions_is_log_2():
    left = torch.tensor([200.0] * 50 + [0.0] * 50)
    assert jensen_shannon(left.log_softmax(-1), left.flip(0).log_softmax(-1)).item() == pytest.approx(math.log(2), abs=1e-6)


INVERSE = [1 / x for x in range(1, 21)]


@pytest.mark.parametrize("p, q, mixed", [
    ([0.5, 0.3, 0.16, 0.04], [0.5, 0.1, 0.2, 0.2], [0.2, 0.6, 0.16, 0.04]),  # plausible from 0.05 on: 1, 3 and 0.8 share the mass 0.96
    ([0.95, 0.03, 0.02], [0.1, 0.1, 0.8], [0.95, 0.03, 0.02]),  # one plausible token
    ([1 / 20] * 20, [x / 210 for x in range(1, 21)], [x / sum(INVERSE) for x in INVERSE]),  # all plausible, none of them reaching 0.1
])  # fmt: skip
def test_contrast_by_hand(p, q, mixed):
    assert contrast(log(*p), log(*q)).tolist() == pytest.approx(mixed, abs=1e-6)


def test_contrast_sums_to_one_and_keeps_what_is_implausible():
    for seed in range(20):
        expert, amateur = random_log_probs(seed)
        p, mixed = expert.exp(), contrast(expert, amateur)
        outside = p < 0.1 * p.max()
        assert mixed.sum().item() == pytest.approx(1, abs=1e-5)
        assert outside.any() and torch.equal(mixed[outside], p[outside])
        assert mixed.numpy() == pytest.approx(contrast_ref(p.double().numpy(), amateur.double().exp().numpy()), abs=1e-5)


# ---------------------------------------------------------------- heads and amateurs


def test_exit_heads_normalize_first_by_their_own_norm_if_they_have_one(tiny_model):
    model = tiny_model(exit_norms=(2,))
    for layer in (2, 3):
        logits = trace_at(model, 3).logits(layer)
        assert logits.dtype == torch.float32 and logits.numpy() == pytest.approx(logits_ref(model, layer), abs=1e-5)
        assert (logits - model.unembed @ model.hidden_states(TOKENS)[layer][-1]).abs().max() > 0.1  # what a head without its norm would say
    assert trace_at(model, 3).log_probs(2).exp().numpy() == pytest.approx(softmax_ref(logits_ref(model, 2)), abs=1e-6)


def test_jsd_contrasts_with_the_layer_that_diverges_most_for_its_distance(tiny_model):
    plainly_farthest = []
    for seed in range(20):
        model = tiny_model(seed)
        trace, p = trace_at(model, 5), {layer: softmax_ref(logits_ref(model, layer)) for layer in range(1, 6)}
        FUNCTIONS["jsd"](trace, 5)
        assert trace.amateurs == {5: amateur_ref(p, 5)}
        plainly_farthest.append(trace.amateurs[5] == max((2, 3, 4), key=lambda j: jsd_ref(p[5], p[j])))
    assert not all(plainly_farthest)  # the distance matters


@pytest.mark.parametrize("layer, premature, amateurs, heads", [
    (4, (1, 4), {4: 1}, {1, 4}), (3, (3, 4), {}, {3}), (3, (), {}, {3}), (2, None, {}, {2}), (1, None, {}, {1}),
])  # fmt: skip
def test_jsd_contrasts_with_premature_layers_alone_and_without_one_is_the_plain_margin(tiny_model, layer, premature, amateurs, heads):
    trace = trace_at(tiny_model(), layer, premature_layers=premature)
    value = FUNCTIONS["jsd"](trace, layer)
    assert trace.amateurs == amateurs and set(trace.flops) == heads
    if not amateurs:
        assert value == pytest.approx(FUNCTIONS["softmax"](trace, layer), abs=1e-6)


def test_weighted_contrasts_with_the_layer_halfway_and_with_1_at_least(tiny_model):
    for layer, amateur in {1: 1, 2: 1, 3: 1, 4: 2, 5: 2}.items():
        trace = trace_at(tiny_model(), layer)
        FUNCTIONS["weighted"](trace, layer)
        assert trace.amateurs == {layer: amateur}


HEADS = {"softmax": {5}, "hidden": set(), "classifier": set(), "entropy": {5}, "weighted": {2, 5}, "jsd": {2, 3, 4, 5}}


@pytest.mark.parametrize("name, layers", HEADS.items())
@pytest.mark.parametrize("prune", ["none", "fixed"])
def test_heads_are_computed_when_asked_for_and_once(tiny_model, monkeypatch, name, layers, prune):
    trace, computed = trace_at(tiny_model(n_layers=6), 5, confidence=FUNCTIONS[name], prune=prune, prune_k=8), []
    head_norm = trace.model.exit_norm
    monkeypatch.setattr(trace.model, "exit_norm", lambda hidden, layer: computed.append(layer) or head_norm(hidden, layer))
    for _ in range(2):
        trace.decided(1.0)
    assert sorted(computed) == sorted(layers)
    n, d = {"none": 50, "fixed": 8}[prune], 32  # over n candidates once layer 5 has chosen them
    assert trace.flops == {layer: 2 * d * (50 if layer == 5 else n) for layer in layers}


# ---------------------------------------------------------------- pruning


def test_fixed_pruning_keeps_the_best_of_the_first_layer_asked(tiny_model):
    model = tiny_model()
    trace = trace_at(model, 2, prune="fixed", prune_k=8)
    z = {layer: logits_ref(model, layer) for layer in range(1, 6)}
    trace.prune()
    assert set(int(trace.token(i)) for i in range(len(trace.logits(2)))) == set(np.argsort(-z[2])[:8])
    assert trace.token(int(trace.logits(2).argmax())) == z[2].argmax()
    trace.hidden = model.hidden_states(TOKENS)
    kept = trace.candidates.tolist()
    assert kept != sorted(kept)  # or ids could pass for ranks
    for layer in (5, 4, 1):  # heads of later layers and of earlier amateurs
        assert trace.logits(layer).numpy() == pytest.approx(z[layer][kept], abs=1e-5)
        assert trace.token(int(trace.logits(layer).argmax())) == max(kept, key=lambda token: z[layer][token])
    V, d = model.unembed.shape
    assert trace.flops == {2: 2 * V * d, 5: 2 * 8 * d, 4: 2 * 8 * d, 1: 2 * 8 * d}


@every_function
def test_asking_for_logits_changes_nothing_else(tiny_model, name):
    """A function may ask for whatever it likes, in whatever order: candidates, decision and guesses stay."""
    model = tiny_model()
    curious, plain = ({}, {})
    for found, asks in ((curious, True), (plain, False)):
        trace = trace_at(model, 2, confidence=FUNCTIONS[name], prune="decaying", prune_k=12, prune_min=3)
        for layer in (2, 3, 4):
            trace.hidden = model.hidden_states(TOKENS)[: layer + 1]
            if asks:
                trace.logits(1), trace.log_probs(layer), trace.stack([1, layer])
            found[layer] = trace.decided(1.0), trace.confidences[layer], trace.n
        found["guesses"] = [trace.guess(layer) for layer in (2, 3, 4)]
    assert curious == plain


@pytest.mark.parametrize("prune", ["fixed", "decaying", "adaptive"])
def test_a_guess_is_that_of_the_time_it_was_asked(tiny_model, prune):
    """Later pruning may drop what an earlier exit would have said; thresholds that learn are told what it did
    say."""
    dropped = 0
    for seed in range(20):
        model = tiny_model(seed)
        states = model.hidden_states(TOKENS)
        trace, said = Trace(model, FUNCTIONS["softmax"], prune=prune, prune_k=6, prune_min=2), {}
        for layer in range(1, 5):
            trace.hidden = states[: layer + 1]
            trace.decided(1.0)
            said[layer] = int(trace.token(trace.logits(layer).argmax()))
        assert {layer: trace.guess(layer) for layer in said} == said
        dropped += sum(token not in trace.candidates for token in said.values())
    assert dropped > 0 or prune != "decaying"  # fixed drops nobody later, adaptive keeps six unless it is very sure


def test_candidates_narrowed_twice_keep_their_ids_and_what_is_known_of_them(tiny_model, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "shrinking", lambda trace, k, k_min: k // trace.layer)
    model = tiny_model()
    trace = trace_at(model, 1, prune="shrinking", prune_k=12)
    trace.prune()
    first = trace.candidates.tolist()
    trace.hidden = model.hidden_states(TOKENS)[:4]
    trace.prune()
    assert set(trace.candidates.tolist()) == set(sorted(first, key=lambda token: -logits_ref(model, 3)[token])[:4])
    for layer in (1, 2, 3):
        assert trace.logits(layer).numpy() == pytest.approx(logits_ref(model, layer)[trace.candidates.numpy()], abs=1e-5)


@pytest.mark.parametrize("prune, k", [("none", 8), ("fixed", 50), ("fixed", 1000)])
def test_without_pruning_an_index_is_a_token(tiny_model, prune, k):
    trace = trace_at(tiny_model(), 3, prune=prune, prune_k=k)
    trace.prune()
    assert len(trace.logits(3)) == 50 and trace.candidates is None and trace.token(17) == 17


def sizes_of(model, prune, confidences, **limits) -> list[int]:
    """How many candidates are left after the checks at layers 1, 2, .., with these confidences."""
    trace, sizes, states = Trace(model, prune=prune, **limits), [], model.hidden_states(TOKENS)
    for layer, value in enumerate(confidences, 1):
        trace.hidden = states[: layer + 1]
        trace.prune()
        trace.confidences[layer] = value
        sizes.append(trace.n)
        assert trace.n == (50 if trace.candidates is None else len(trace.candidates)) == len(trace.logits(1))
    return sizes


def test_decaying_pruning_by_hand(tiny_model):
    """40 at first; then 40 / (1 + 32/8 · 2/5) = 15.4, 16 / (1 + 8/8 · 3/5) = 10, and 10 / (1 + 2/8 · 4/5) =
    8.3 of at least 8."""
    assert sizes_of(tiny_model(), "decaying", [0, 0, 0, 0], prune_k=40, prune_min=8) == [40, 16, 10, 9]
    assert sizes_of(tiny_model(), "decaying", [0, 0, 0, 0], prune_k=12, prune_min=12) == [12] * 4
    assert sizes_of(tiny_model(), "decaying", [0], prune_k=50, prune_min=10) == [math.ceil(50 / (1 + 40 / 10 / 5))]  # from V on


def test_adaptive_pruning_by_hand(tiny_model):
    """V = 50: 50 · (1 - 0.9 · 0.5) = 27.5, · (1 - 0.9 · 0.2) = 41 but never growing, · (1 - 0.9) = 5 but at
    least 6."""
    assert sizes_of(tiny_model(), "adaptive", [0.5, 0.2, 1.0, 0.0], prune_k=50, prune_min=6) == [50, 28, 28, 6]
    assert sizes_of(tiny_model(), "adaptive", [0.5, 0.2, 1.0, 0.0], prune_k=5, prune_min=5) == [5] * 4  # k <= V/10 caps it


@every_function
@pytest.mark.parametrize("prune", ["fixed", "decaying", "adaptive"])
def test_pruned_confidences_are_of_distributions_over_the_candidates(tiny_model, name, prune):
    """Each is its definition over the candidates that are left, whose p sum to 1 and whose JSD is at most log
    2."""
    for seed in range(4):
        model = tiny_model(seed)
        states, trace = model.hidden_states(TOKENS), Trace(model, FUNCTIONS[name], prune=prune, prune_k=20, prune_min=4)
        z, h = {layer: logits_ref(model, layer) for layer in range(1, 5)}, [state[-1].double().numpy() for state in states]
        for layer in range(1, 5):
            trace.hidden = states[: layer + 1]
            trace.decided(1.0)
            n = len(trace.logits(layer))
            kept = range(50) if trace.candidates is None else trace.candidates.tolist()
            p = {j: softmax_ref(z[j][list(kept)]) for j in z}
            expected = classifier_ref(model, layer) if name == "classifier" else REFERENCES[name](p, h, layer)
            assert trace.confidences[layer] == pytest.approx(expected, abs=1e-5) and n == len(kept)
            log_p = torch.stack([trace.log_probs(j) for j in range(1, layer + 1)])
            assert log_p.exp().sum(-1).numpy() == pytest.approx(np.ones(layer), abs=1e-5)
            assert 0 <= jensen_shannon(log_p[-1], log_p).min() and jensen_shannon(log_p[-1], log_p).max() <= math.log(2)
        if name in ("hidden", "classifier"):  # which need no head to say no
            assert trace.n == 50 and trace.flops.keys() <= {1, 2, 3, 4}
        else:
            assert trace.n < 20 if prune == "decaying" else trace.n <= 20


# ---------------------------------------------------------------- the decision, and functions from outside


def test_a_threshold_is_reached_by_an_equal_confidence_and_0_without_asking(tiny_model):
    trace = trace_at(tiny_model(), 3, confidence=lambda trace, layer: torch.tensor(0.5))
    assert trace.decided(0.5) and not trace.decided(0.5001) and trace.confidences == {3: 0.5}
    assert trace_at(tiny_model(), 3, confidence=None).decided(0.0)


def test_a_registered_function_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr(confidence, "FUNCTIONS", dict(FUNCTIONS))
    mine = register("mine")(lambda trace, layer: torch.tensor(0.5))
    assert resolve("mine") is resolve(mine) is mine and resolve("softmax") is FUNCTIONS["softmax"]


def test_a_function_is_loaded_from_outside(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "ideas_of_a_reader.py").write_text("def top(trace, layer):\n    return trace.log_probs(layer).max().exp()\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = tiny_model()
    trace = trace_at(model, 4, confidence=resolve("ideas_of_a_reader:top"))
    assert not trace.decided(1.0) and trace.confidences[4] == pytest.approx(softmax_ref(logits_ref(model, 4)).max(), abs=1e-6)


@pytest.mark.parametrize("name", ["softmx", "no_such_module:top", "math:no_such_function", "math:pi", ".math:sin", ":sin"])
def test_an_unknown_function_is_named_and_an_unknown_name_answered_with_the_known(name):
    with pytest.raises(ValueError, match=name) as error:
        resolve(name)
    assert ":" in name or all(known in str(error.value) for known in NAMES)


# ---------------------------------------------------------------- what a student's function may get wrong


def nothing(trace, layer):
    return None


def several(trace, layer):
    return torch.tensor([0.1, 0.2])


def no_number(trace, layer):
    return torch.tensor(float("nan"))


def too_much(trace, layer):
    return torch.tensor(1.5)


def below(trace, layer):
    return -0.2


def many(trace, layer):
    return torch.full((2, 2), 0.5)


def broken(trace, layer):
    return trace.colour


@pytest.mark.parametrize("function, value", [
    (nothing, "None"), (several, r"tensor\(\[0.1000, 0.2000\]\)"), (no_number, r"tensor\(nan\)"),
    (too_much, r"tensor\(1.5000\)"), (below, "-0.2"), (many, r"tensor\(\[\[0.5000, 0.5000\], \[0.5000, 0.5000\]\]\)"),
])  # fmt: skip
def test_an_answer_that_is_no_confidence_is_one_line_with_function_file_and_layer(tiny_model, function, value):
    where = rf"confidence {function.__name__} \(.*test_confidence.py\) at layer 3"
    where += rf" returned {value}; it must be one number from 0 to 1"
    with pytest.raises(UserError, match=where) as error:
        trace_at(tiny_model(), 3, confidence=function).decided(0.5)
    assert "\n" not in str(error.value)


def test_an_exception_in_a_function_keeps_its_traceback_and_is_told_where(tiny_model):
    with pytest.raises(RuntimeError, match=r"confidence broken \(.*test_confidence.py\) at layer 2 failed") as error:
        trace_at(tiny_model(), 2, confidence=broken).decided(0.5)
    assert isinstance(error.value.__cause__, AttributeError) and error.value.__cause__.__traceback__.tb_next is not None


def test_rounding_beyond_1_is_a_confidence(tiny_model):
    assert trace_at(tiny_model(), 2, confidence=lambda trace, layer: 1.00001).decided(1.0)


@pytest.mark.parametrize("name", ["os:system", "os:path", "math:sqrt"])
def test_what_does_not_take_trace_and_layer_is_refused_before_it_runs(name):
    with pytest.raises(UserError, match="is not a function of trace and layer"):
        confidence.resolve(name)
