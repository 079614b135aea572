"""The forms in which a CPU stores weights: each runs wherever this machine can multiply it, is the plain
model's function up to rounding, and decodes the same text."""

import pytest
import torch
from torch.testing import assert_close

from decode import DecodeConfig, generate, load_checkpoint
from decoding.fast_weights import FORMS, FastTransformer, default_form, packs
from formats.checkpoint import save_checkpoint
from tests.test_model import FEATURES, random_tokens

HEADS = {"exit_norms": (2, 3), "adapter": "lowrank:4"}
FULL = DecodeConfig(max_new_tokens=9)


def fast(model, form: str, dtype: torch.dtype = torch.float32) -> FastTransformer:
    """The model in this form; skips the test where this machine cannot multiply it."""
    if form == "packed" and not packs(dtype):
        pytest.skip(f"this machine does not multiply packed weights of {dtype}")
    return FastTransformer(model, form, dtype, {})


@pytest.mark.parametrize("form", ["folded", "packed", "int8"])
@pytest.mark.parametrize("shape", [*FEATURES, HEADS])
def test_every_form_is_the_plain_models_function(tiny_model, form, shape):
    """States, logits and exit heads of a batch; int8 within a tenth."""
    model, tokens = tiny_model(1, **shape), random_tokens(0, 2, 20)
    small = fast(model, form)
    states, exact = small.hidden_states(tokens), model.hidden_states(tokens)
    pairs = [*zip(states, exact), (small(tokens), model(tokens))]
    pairs += [(small.head(state, layer), model.head(state, layer)) for layer, state in enumerate(exact) if layer]
    for found, expected in pairs:
        assert found.dtype == torch.float32
        if form == "int8":
            assert (found - expected).norm() < 0.1 * expected.norm()
        else:
            assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["folded", "packed"])
def test_every_form_decodes_the_same(tiny_model, form):
    for config in (FULL, DecodeConfig(max_new_tokens=20, confidence="softmax", threshold=0.15, prune="fixed:8")):
        expected, found = generate(tiny_model(0), [1, 2, 3], config), generate(fast(tiny_model(0), form), [1, 2, 3], config)
        assert found.tokens == expected.tokens and found.exit_layers == expected.exit_layers


@pytest.mark.parametrize("form", ["plain", "folded", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32(tiny_model, reloaded, form, dtype):
    if form == "packed" and not packs(dtype):
        pytest.skip(f"this machine does not multiply packed weights of {dtype}")
    model = reloaded(tiny_model(0), dtype=dtype, form=form)
    out = generate(model, [1, 2, 3], DecodeConfig(max_new_tokens=12, confidence="jsd", threshold=0.1))
    states, exact = (each.hidden_states(torch.tensor([[1, 2, 3, *out.tokens]]))[-1] for each in (model, tiny_model(0)))
    assert len(out.tokens) == 12 and states.dtype == dtype and (states - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("capability, form", [("AVX512", "folded"), ("AVX2", "packed" if packs(torch.float32) else "folded")])
def test_the_rule_goes_by_the_cpus_instructions(tiny_model, reloaded, monkeypatch, capability, form):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert default_form(torch.float32) == reloaded(tiny_model(0)).form == form


@pytest.mark.parametrize("missing", ["_reorder_linear_weight", "_linear_pointwise"])
def test_where_the_packed_product_raises_weights_are_folded_alone(tiny_model, tmp_path, monkeypatch, missing):
    """As on a CPU without AVX-512, where bfloat16 cannot be packed: it is tried before it is used."""

    def raising(*_):
        raise RuntimeError("mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx_ne_convert or avx512bw")

    save_checkpoint(tmp_path / "model.pt", tiny_model(0), None)
    packs.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, missing, raising)
    try:
        model, _ = load_checkpoint(tmp_path / "model.pt")
        assert model.form == "folded" and generate(model, [1, 2, 3], FULL).tokens == generate(tiny_model(0), [1, 2, 3], FULL).tokens
        with pytest.raises(ValueError, match="cannot multiply packed weights of float32"):
            load_checkpoint(tmp_path / "model.pt", form="packed")
    finally:
        packs.cache_clear()


@pytest.mark.parametrize("options", [{"form": "int3"}, {"form": "packed", "dtype": torch.int8}, {"device": "meta", "dtype": torch.int8},
                                     {"form": "folded", "device": "meta"}])  # fmt: skip
def test_a_form_that_cannot_be_is_refused(tiny_model, reloaded, options):
    assert "int3" not in FORMS
    with pytest.raises(ValueError, match=r"form of weights 'int3'|int8 needs a CPU|--weights applies only to a CPU"):
        reloaded(tiny_model(0), **options)
