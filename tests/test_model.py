"""The transformer against an independent reference, and the staircase cache against a full pass."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cache import KVCache
from common.errors import UserError
from common.flags import read_field
from decode import run_pass
from decoding.record import block_flops
from decoding.settings import DecodeConfig
from decoding.trace import Trace, head_flops
from model import ModelConfig, RMSNorm, Rotary, Transformer
from tests.reference import numpy_forward

SHAPES = [{"n_kv_heads": 4}, {"n_kv_heads": 2}, {"n_kv_heads": 1}, {"tie_embeddings": False}, {"exit_norms": (1, 3)}, {"n_layers": 2}]
FEATURES = [
    {"head_dim": 6}, {"activation": "gelu_tanh"}, {"embedding_scale": 3.0}, {"query_scale": 0.9}, {"qk_norm": True}, {"post_norms": True},
    {"qkv_bias": True}, {"unrotated_layers": (4,)}, {"window": 3, "global_layers": (1, 2, 3), "unrotated_layers": (3, 5)},
    {"attention_cap": 0.7}, {"logit_cap": 1.5}, {"window": 3}, {"window": 1}, {"window": 4, "global_layers": (2, 5)},
    {"window": 4, "global_layers": (3,), "local_rope_base": 50.0}, {"rope_factor": 4.0},
    {"rope_factor": 8.0, "rope_bands": (1.0, 4.0, 60.0)},
    {"head_dim": 10, "activation": "gelu_tanh", "embedding_scale": 3.0, "query_scale": 0.5, "qk_norm": True, "post_norms": True,
     "window": 4, "global_layers": (2, 4), "local_rope_base": 50.0, "attention_cap": 2.0, "logit_cap": 3.0, "rope_factor": 8.0,
     "qkv_bias": True, "unrotated_layers": (1, 4)},
]  # fmt: skip


def random_tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES + FEATURES)
def test_full_pass_equals_the_numpy_reference(tiny_model, shape):
    model, tokens = tiny_model(1, **shape), random_tokens(2, 1, 9)
    states, logits = numpy_forward(model, tokens[0].tolist())
    for ours, reference in zip(model.hidden_states(tokens), states):
        np.testing.assert_allclose(ours[0].numpy(), reference, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model(tokens)[0].numpy(), logits, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("shape", FEATURES[1:])
def test_every_feature_shows(tiny_model, shape):
    """Added to a model, each changes its logits: so the comparisons above and below can fail."""
    tokens = random_tokens(2, 1, 9)
    plain, model = tiny_model(1), tiny_model(1, **{name: value for name, value in shape.items() if name != "head_dim"})
    for name, weight in plain.named_parameters():
        model.get_parameter(name).copy_(weight)
    assert (model(tokens) - plain(tokens)).abs().max() > 0.01


def one_pass(model: Transformer, cache: KVCache, tokens: list[int], stop: int | None = None) -> tuple[Trace, int]:
    """A pass that exits after the layer `stop` (None: goes to the top): its trace and the layer reached."""
    trace = Trace(model, DecodeConfig())
    with torch.inference_mode():
        return trace, run_pass(model, cache, tokens, trace, {} if stop is None else {stop: 0.0})


@pytest.mark.parametrize("shape", SHAPES + FEATURES)
@pytest.mark.parametrize("seed", range(2))
def test_the_staircase_equals_a_full_pass_for_random_exits(tiny_model, shape, seed):
    """Random chunks of tokens, each pass stopping at a random exit layer: states, keys, values and logits of
    every row that ran a layer are those of a full forward pass, and filled never increases with the layer."""
    model = tiny_model(seed, **shape)
    L, random = model.config.n_layers, np.random.default_rng(seed)
    tokens = random.integers(0, 50, 40).tolist()
    states = model.hidden_states(torch.tensor([tokens]))
    cache, reference, at, judged = KVCache(model, 40), KVCache(model, 40), 0, 0
    one_pass(model, reference, tokens)
    while at < 40:
        count, stop = min(40 - at, int(random.integers(1, 4))), int(random.integers(1, L + 2))
        trace, layer = one_pass(model, cache, tokens[at : at + count], stop if stop <= L else None)
        at += count
        heights = cache.heights()
        assert layer == stop and heights == sorted(heights, reverse=True) and heights[: layer + 1] == [at] * (layer + 1)
        for below, hidden in enumerate(trace.hidden):
            assert_close(hidden, states[below][:, at - hidden.shape[1] : at], rtol=1e-4, atol=1e-4)
        if stop > L:  # the LM head takes the rows that owe it: all since the last pass to the top
            assert_close(trace.final, model.head(states[L][0, judged:at]), rtol=1e-4, atol=1e-4)
            judged = at
        for number in range(1, L + 1):
            until = cache.filled[number]
            for kind in ("keys", "values"):
                ours, theirs = (getattr(each, kind)[number][:, :, :until] for each in (cache, reference))
                assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_packed_documents_slide_alone(tiny_model):
    model = tiny_model(1, window=3, global_layers=(2,))
    tokens, documents = torch.arange(1, 13)[None], torch.tensor([[1] * 5 + [2] * 7])
    packed = model.hidden_states(tokens, documents)[-1][:, 5:]
    alone = model.hidden_states(tokens[:, 5:])[-1]  # rotary positions are relative, so it does not matter where they begin
    assert_close(packed, alone, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(packed, model.hidden_states(tokens)[-1][:, 5:], atol=1e-3)


def test_llama_3_rope_scaling_by_hand():
    """C = 4, base 10000: the pair 0 turns 1 radian a position, pair 1 0.01. In 8192 positions pair 0 turns
    1304 times, above high = 4, and stays; pair 1 turns 13.04 times with length 8192, and 0.815 times, below
    low = 1, with length 512: slowed by the whole factor; with length 1024 1.63 times: smooth = 0.63 / 3 =
    0.2099, 0.01 * (0.2099 + 0.7901 / 8) = 0.003087."""
    config = {"d_model": 4, "n_heads": 1, "n_kv_heads": 1, "max_len": 2}
    for length, expected in ((8192, 0.01), (512, 0.00125), (1024, 0.003087)):
        rotary = Rotary(ModelConfig(**config, rope_bands=(1.0, 4.0, length)), base=10000.0, factor=8.0)
        cos, sin = rotary.factors(1, 1).flatten(1)
        assert_close(torch.atan2(sin[2:], cos[2:]), torch.tensor([1.0, expected]), rtol=1e-3, atol=0.0)


def test_a_rolled_back_cache_goes_on_as_if_nothing_had_followed(tiny_model):
    model = tiny_model(3)
    cache = KVCache(model, 12)
    for tokens, stop in (([1, 2, 3, 4], None), ([5], 2), ([6], 1)):
        one_pass(model, cache, tokens, stop)
    cache.rollback(5)
    assert cache.heights() == [5, 5, 5, 4, 4, 4, 4]
    trace, _ = one_pass(model, cache, [7])
    assert_close(trace.hidden[-1], model.hidden_states(torch.tensor([[1, 2, 3, 4, 5, 7]]))[-1][:, 4:], rtol=1e-4, atol=1e-5)


def test_every_row_of_a_batch_is_computed_alone(tiny_model):
    model, tokens = tiny_model(4), random_tokens(0, 3, 7)
    assert_close(model(tokens), torch.cat([model(row[None]) for row in tokens]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_in_float32_between_blocks_in_half_precision_is_computed_in_float32(dtype):
    x, weight = torch.randn(5, 64, dtype=dtype), 1 + torch.rand(64) / 1000  # too fine for half precision
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    norm = RMSNorm(64, 1e-6)
    norm.weight.data = weight
    assert_close(norm(x), exact.to(dtype), rtol=1e-2, atol=0)


def test_block_flops_count_weights_and_attention(tiny_model):
    """Positions 2 and 3 see 3 and 4 positions: 2 rows x 2 x weights + 4 x H C x 7."""
    model = tiny_model(0)
    weights = sum(weight.numel() for weight in model.blocks[0].parameters() if weight.dim() > 1)
    assert block_flops(model.config, 2, 4) == 2 * 2 * weights + 4 * 32 * 7


@pytest.mark.parametrize(("field", "value"), [
    ("n_heads", 3), ("n_kv_heads", 3), ("vocab_size", 0), ("exit_norms", (5,)), ("head_dim", 5), ("activation", "relu"), ("window", 2.5),
    ("rope_bands", (4.0, 1.0, 9.0)), ("norm_eps", math.nan), ("eos_id", (2, 4096)), ("adapter", "mlp:0"), ("adapter", "tall:2"),
])  # fmt: skip
def test_an_impossible_shape_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        ModelConfig(**{"n_layers": 5, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "exit_norms": (2,), field: value})


@pytest.mark.parametrize(("given", "ends"), [(None, set()), ((), set()), (3, {3}), ((3,), {3}), ([3, 7], {3, 7})])
def test_a_text_may_end_at_several_ids(given, ends):
    config = ModelConfig(eos_id=given)
    assert config.ends == ends and replace(config, n_layers=3).ends == ends
    text = ",".join(map(str, sorted(ends))) or "none"
    assert ModelConfig(eos_id=read_field(ModelConfig, "eos-id", text)).ends == ends


# ---------------------------------------------------------------- adapters of exit heads


def silu(x):
    return x / (1 + np.exp(-x))


def lowrank(h, down, up):
    return h + h @ down.T @ up


def mlp(h, gate, up, down):
    x = h / ((h**2).mean(-1, keepdims=True) + 1e-6) ** 0.5
    return x + (silu(x @ gate.T) * (x @ up.T)) @ down


@pytest.mark.parametrize("adapter, matrices, formula", [("lowrank:4", 2 * 4, lowrank), ("mlp:6", 3 * 6, mlp)])
def test_an_adapter_changes_what_its_norm_reads_begins_as_nothing_and_counts(tiny_model, adapter, matrices, formula):
    model, hidden = tiny_model(exit_norms=(2, 3), adapter=adapter), torch.randn(7, 32) * 50
    moved = formula(hidden.double().numpy(), *(part.double().numpy() for part in model.adapters["2"]))
    assert_close(model.adapted(hidden, 2).double().numpy(), moved, rtol=1e-4, atol=1e-4)
    expected = moved / np.sqrt((moved**2).mean(-1, keepdims=True) + 1e-6) * model.exit_norms["2"].weight.numpy()
    assert_close(model.exit_norm(hidden, 2).double().numpy(), expected, rtol=1e-4, atol=1e-4)
    assert head_flops(model, 2, 50) - head_flops(model, 4, 50) == 2 * matrices * 32
    fresh = Transformer(replace(model.config, classifiers=()))
    assert_close(fresh.exit_norm(hidden, 2), fresh.exit_norm(hidden, 5), rtol=1e-5, atol=1e-6)
    assert all(part.abs().sum() > 0 for part in fresh.adapters["2"][:-1])  # so that there is something to train
