"""The transformer against an independent reference, the staircase cache against a full pass, checkpoints
against damage."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cache import KVCache
from common.config import read_field
from confidence import Trace
from decode import generate, run_pass
from decoding.flops import block_flops, head_flops
from decoding.settings import DecodeConfig
from formats.checkpoint import save_checkpoint
from formats.rotary import rope_table
from formats.weights import FORMS, linear, packs, rms_norm, store
from model import ModelConfig, Transformer, load_checkpoint

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


def numpy_forward(model: Transformer, tokens: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """States h_0..h_L (T, d) and final logits (T, V) in float64, one position and one head at a time,
    straight from the definitions."""
    c = model.config
    w = {name: weight.double().numpy() for name, weight in model.state_dict().items()}
    H, K, C = c.n_heads, c.n_kv_heads, c.head_dim

    def norm(x, weight):
        return x / np.sqrt((x**2).mean() + c.norm_eps) * weight

    def cap(x, limit):
        return x if limit is None else limit * np.tanh(x / limit)

    def activation(x):
        if c.activation == "silu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def speed(i, slides):
        """Radians a position of the pair (i, i + C/2)."""
        if slides and c.local_rope_base:
            return c.local_rope_base ** (-2 * i / C)
        fast = c.rope_base ** (-2 * i / C)
        if not c.rope_bands:
            return fast / c.rope_factor
        low, high, length = c.rope_bands
        turns = length * fast / (2 * np.pi)
        if turns < low or turns > high:
            return fast / c.rope_factor if turns < low else fast
        smooth = (turns - low) / (high - low)
        return (1 - smooth) * fast / c.rope_factor + smooth * fast

    def rotated(x, position, slides, layer):
        if layer + 1 in c.unrotated_layers:
            return x
        pairs = [(x[i], x[i + C // 2], position * speed(i, slides)) for i in range(C // 2)]
        return np.array([a * np.cos(t) - b * np.sin(t) for a, b, t in pairs] + [b * np.cos(t) + a * np.sin(t) for a, b, t in pairs])

    states = [np.array([w["embedding"][token] * c.embedding_scale for token in tokens])]
    for layer in range(c.n_layers):
        b = {name.split(".")[2]: weight for name, weight in w.items() if name.startswith(f"blocks.{layer}.")}
        slides = c.window is not None and layer + 1 not in c.global_layers
        keys, values, rows = [], [], []
        for position, x in enumerate(states[-1]):
            qkv = b["qkv"] @ norm(x, b["attn_norm"]) + b.get("qkv_bias", 0)
            q, k, v = np.split(qkv, [H * C, (H + K) * C])
            q, k = q.reshape(H, C), k.reshape(K, C)
            if c.qk_norm:
                q, k = ([norm(head, b[name]) for head in heads] for heads, name in ((q, "q_norm"), (k, "k_norm")))
            keys.append([rotated(head, position, slides, layer) for head in k])
            values.append(v.reshape(K, C))
            heads = []
            seen = range(max(0, position - c.window + 1) if slides else 0, position + 1)
            for number, head in enumerate(q):
                group = number // (H // K)
                scores = np.array([rotated(head, position, slides, layer) @ keys[at][group] for at in seen])
                scores = cap(scores * (c.query_scale or 1 / np.sqrt(C)), c.attention_cap)
                share = np.exp(scores - scores.max())
                heads.append(sum(s * values[at][group] for s, at in zip(share / share.sum(), seen)))
            attended = b["out"] @ np.concatenate(heads)
            x = x + (norm(attended, b["attn_post_norm"]) if c.post_norms else attended)
            gate, up = np.split(b["gate_up"] @ norm(x, b["mlp_norm"]), 2)
            added = b["down"] @ (activation(gate) * up)
            rows.append(x + (norm(added, b["mlp_post_norm"]) if c.post_norms else added))
        states.append(np.array(rows))
    unembed = w["embedding"] if c.tie_embeddings else w["unembedding"]
    return states, np.array([cap(unembed @ norm(x, w["norm"]), c.logit_cap) for x in states[-1]])


@pytest.mark.parametrize("shape", SHAPES + FEATURES)
def test_full_pass_equals_the_numpy_reference(tiny_model, shape):
    model = tiny_model(1, **shape)
    tokens = torch.randint(0, 50, (9,), generator=torch.Generator().manual_seed(2))
    states, logits = numpy_forward(model, tokens.tolist())
    for ours, reference in zip(model.hidden_states(tokens[None]), states):
        np.testing.assert_allclose(ours.numpy(), reference, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model(tokens[None])[0].numpy(), logits, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("shape", FEATURES[1:])
def test_every_feature_shows(tiny_model, shape):
    """Added to a model, each changes its logits: so the comparisons above and below can fail."""
    tokens = torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(2))
    plain, model = tiny_model(1), tiny_model(1, **{name: value for name, value in shape.items() if name != "head_dim"})
    for name, weight in plain.named_parameters():
        model.get_parameter(name).copy_(weight)
    assert (model(tokens) - plain(tokens)).abs().max() > 0.01


@pytest.mark.parametrize("shape", SHAPES + FEATURES)
@pytest.mark.parametrize("seed", range(4))
def test_the_staircase_equals_a_full_pass_for_random_exits(tiny_model, shape, seed):
    """Random chunks of tokens, each pass stopping at a random exit layer: states, keys, values and logits of
    every row that ran a layer are those of a full forward pass, and filled never increases with the layer; L
    + 1 is the head."""
    model = tiny_model(seed, **shape)
    L, random = model.config.n_layers, np.random.default_rng(seed)
    tokens = random.integers(0, 50, 40).tolist()
    states = model.hidden_states(torch.tensor([tokens]))
    reference = KVCache(model, 40)
    full_pass(model, reference, tokens)
    cache, at, judged = KVCache(model, 40), 0, 0
    while at < 40:
        count, stop = min(40 - at, int(random.integers(1, 4))), int(random.integers(1, L + 2))
        trace = Trace(model)
        with torch.inference_mode():
            layer = run_pass(model, cache, tokens[at : at + count], trace, dict.fromkeys({stop} - {L + 1}, 0.0))
        at += count
        assert layer == stop
        assert all(below >= above for below, above in zip(cache.filled, cache.filled[1:]))
        assert cache.filled[: layer + 1] == [at] * (layer + 1)
        for below, hidden in enumerate(trace.hidden):
            torch.testing.assert_close(hidden, states[below][at - len(hidden) : at], rtol=1e-4, atol=1e-5)
        if stop > L:  # the head takes the rows that owe it: all since the last pass to the top
            logits = model.head(states[L][at - len(trace.final) : at])
            torch.testing.assert_close(trace.final, logits, rtol=1e-4, atol=1e-4)
            assert len(trace.final) == at - judged
            judged = at
        for number in range(1, L + 1):
            until = cache.filled[number]
            ours, theirs = (each.keys_values[number - 1][:, :, :until] for each in (cache, reference))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", FEATURES)
def test_early_exits_are_exact_with_every_feature(tiny_model, shape):
    """Tokens equal those that a full pass over the text, without a cache, reads out at each token's exit
    layer; and step by step to the top, the logits are the full pass's."""
    model = tiny_model(2, **shape)
    out = generate(model, [1, 7, 3], DecodeConfig(max_new_tokens=25, confidence=lambda trace, layer: torch.rand(()), threshold=0.7))
    states = model.hidden_states(torch.tensor([[1, 7, 3, *out.tokens]]))
    assert len(set(out.exit_layers)) > 3
    assert out.tokens == [int(model.head(states[layer][i : i + 1], layer).argmax()) for i, layer in enumerate(out.exit_layers, 2)]
    cache, tokens = KVCache(model, 20), torch.randint(0, 50, (20,)).tolist()
    steps = []
    for token in tokens:
        trace = Trace(model)
        with torch.inference_mode():
            run_pass(model, cache, [token], trace, {})
        steps.append(model.head(trace.hidden[-1])[0])
    torch.testing.assert_close(torch.stack(steps), model(torch.tensor([tokens]))[0], rtol=1e-4, atol=1e-4)


def test_packed_documents_slide_alone(tiny_model):
    model = tiny_model(1, window=3, global_layers=(2,))
    tokens, documents = torch.arange(1, 13)[None], torch.tensor([[1] * 5 + [2] * 7])
    packed = model.hidden_states(tokens, documents)[-1]
    alone = model.hidden_states(tokens[:, 5:])[0]
    torch.testing.assert_close(model.hidden_states(tokens, documents)[0][5:], alone)
    assert torch.isfinite(packed).all() and not torch.allclose(packed[5:], model.hidden_states(tokens)[-1][5:], atol=1e-3)


def test_llama_3_rope_scaling_by_hand():
    """C = 4, base 10000: the pair 0 turns 1 radian a position, pair 1 0.01. In 8192 positions pair 0 turns
    1304 times, above high = 4, and stays; pair 1 turns 13.04 times with length 8192, and 0.815 times, below
    low = 1, with length 512: slowed by the whole factor; with length 1024 1.63 times: smooth = 0.63 / 3 =
    0.2099, 0.01 * (0.2099 + 0.7901 / 8) = 0.003087."""
    config = {"d_model": 4, "n_heads": 1, "n_kv_heads": 1, "max_len": 2, "rope_factor": 8.0}
    for length, expected in ((8192, 0.01), (512, 0.00125), (1024, 0.003087)):
        cos, sin = rope_table(ModelConfig(**config, rope_bands=(1.0, 4.0, length)))[0]
        torch.testing.assert_close(torch.atan2(sin[1, 2:], cos[1, 2:]), torch.tensor([1.0, expected]), rtol=1e-3, atol=0.0)


def full_pass(model, cache, tokens):
    with torch.inference_mode():
        return run_pass(model, cache, tokens, Trace(model), {})


def test_a_rolled_back_cache_goes_on_as_if_nothing_had_followed(tiny_model):
    model = tiny_model(3)
    cache = KVCache(model, 12)
    with torch.inference_mode():
        full_pass(model, cache, [1, 2, 3, 4])
        run_pass(model, cache, [5], Trace(model), {2: 0.0})
        run_pass(model, cache, [6], Trace(model), {1: 0.0})
        cache.rollback(5)
        assert cache.filled == [5, 5, 5, 4, 4, 4, 4]
        trace = Trace(model)
        run_pass(model, cache, [7], trace, {})
    torch.testing.assert_close(trace.hidden[-1], model.hidden_states(torch.tensor([[1, 2, 3, 4, 5, 7]]))[-1][4:], rtol=1e-4, atol=1e-5)


def test_every_row_of_a_batch_is_computed_alone(tiny_model):
    model = tiny_model(4)
    tokens = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(tokens), torch.cat([model(row[None]) for row in tokens]), rtol=1e-4, atol=1e-5)


def test_the_quick_norm_equals_the_library_norm():
    x, weight = torch.randn(5, 64) * 3, torch.rand(64)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight, 1e-3), torch.nn.functional.rms_norm(x, (64,), weight, 1e-3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_in_float32_between_blocks_in_half_precision_is_computed_in_float32(dtype):
    x, weight = torch.randn(5, 64, dtype=dtype), 1 + torch.rand(64) / 1000  # too fine for half precision
    expected = torch.nn.functional.rms_norm(x.float(), (64,), weight, 1e-6).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected, rtol=1e-2, atol=0)
        assert rms_norm(x, weight, 1e-6).dtype == dtype


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 40])
def test_every_form_of_a_weight_gives_the_same_product(form, rows, tiny_model):
    model = tiny_model(0)
    x, weight = torch.randn(rows, 32), model.blocks[0].out.clone()
    store(model, form)
    assert model.form == form and model.blocks[0].qkv.is_mkldnn == model.head_weight.is_mkldnn == (form == "packed")
    block = model.blocks[0]
    torch.testing.assert_close(linear(x, block.out), x @ weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_decodes_the_same(tiny_model, form):
    model = tiny_model(0)
    store(model, form)
    config = DecodeConfig(max_new_tokens=20, confidence="softmax", threshold=0.15, prune="fixed", prune_k=8)
    assert generate(model, [1, 2, 3], config).tokens == generate(tiny_model(0), [1, 2, 3], config).tokens


def raising(*_):
    raise RuntimeError("mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx_ne_convert or avx512bw")


@pytest.mark.parametrize("missing", ["_pack", "_packed_product"])
def test_where_the_packed_product_raises_weights_are_folded_alone(tiny_model, tmp_path, monkeypatch, missing):
    """As on a CPU without AVX-512, where bfloat16 cannot be packed: it is tried before it is used."""
    save_checkpoint(tmp_path / "model.pt", tiny_model(0), None)
    expected = generate(tiny_model(0), [1, 2, 3], DecodeConfig(max_new_tokens=9)).tokens
    packs.cache_clear()
    monkeypatch.setattr(f"formats.weights.{missing}", raising)
    try:
        model, _ = load_checkpoint(tmp_path / "model.pt")
        assert model.form == "folded" and generate(model, [1, 2, 3], DecodeConfig(max_new_tokens=9)).tokens == expected
        with pytest.raises(ValueError, match="cannot multiply packed weights of float32; store them folded or plain"):
            load_checkpoint(tmp_path / "model.pt", form="packed")
    finally:
        packs.cache_clear()


def test_an_unknown_form_is_named(tiny_model):
    with pytest.raises(ValueError, match="unknown form of weights 'int3'; choose from plain, folded, packed"):
        store(tiny_model(0), "int3")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32(tiny_model, tmp_path, dtype):
    save_checkpoint(tmp_path / "model.pt", tiny_model(0), None)
    model, _ = load_checkpoint(tmp_path / "model.pt", dtype=dtype)
    out = generate(model, [1, 2, 3], DecodeConfig(max_new_tokens=12, confidence="jsd", threshold=0.1))
    states, exact = (each.hidden_states(torch.tensor([[1, 2, 3, *out.tokens]]))[-1].float() for each in (model, tiny_model(0)))
    assert len(out.tokens) == 12 and (states - exact).norm() < 0.05 * exact.norm()


def test_block_flops_count_weights_and_attention(tiny_model):
    """Positions 2 and 3 see 3 and 4 positions: 2 rows x 2 x weights + 4 x H C x 7."""
    model = tiny_model(0)
    weights = sum(weight.numel() for weight in model.blocks[0].parameters() if weight.dim() > 1)
    assert block_flops(model.config, 2, 4) == 2 * 2 * weights + 4 * 32 * 7


@pytest.mark.parametrize(("change", "message"), [
    ({"n_heads": 3}, "n_heads"), ({"n_kv_heads": 3}, "n_kv_heads"), ({"vocab_size": 0}, "vocab_size"), ({"exit_norms": (5,)}, "exit_norms"),
    ({"head_dim": 5}, "head_dim is 5"), ({"activation": "relu"}, "relu"), ({"window": 0}, "window is 0"),
    ({"rope_bands": (4.0, 1.0, 9.0)}, "rope_bands"), ({"attention_cap": 0.0}, "attention_cap"),
    ({"n_layers": 10**9}, "n_layers is 1000000000; it must be at least 1 and at most 10000"), ({"max_len": 10**10}, "max_len"),
    ({"norm_eps": -1.0}, "norm_eps is -1.0; it must be above 0"), ({"norm_eps": math.nan}, "norm_eps is nan; it must be float"),
    ({"rope_base": math.inf}, "rope_base is inf"), ({"window": 2.5}, r"window is 2.5; it must be int \| None"),
    ({"eos_id": -5}, "eos_id is -5"), ({"eos_id": (2, 4096)}, "eos_id is 4096; it must lie in 0 to 4095"), ({"eos_id": "2"}, "eos_id"),
    ({"global_layers": (77,)}, "there is no layer 77; choose from 1 to 5"), ({"global_layers": (1.5,)}, "global_layers"),
    ({"qk_norm": 1}, "qk_norm is 1; it must be bool"), ({"vocab_size": True}, "vocab_size is True; it must be int"),
    ({"d_ff": 10**30}, "d_ff"), ({"activation": 3}, "activation is 3; it must be str"), ({"embedding_scale": 0.0}, "embedding_scale"),
    ({"rope_bands": (1.0, 4.0, "9")}, "rope_bands"), ({"adapter": 4}, "adapter is 4"),
])  # fmt: skip
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"n_layers": 5, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, **change})


@pytest.mark.parametrize(("given", "kept", "ends"), [
    (None, None, set()), ((), None, set()), (3, 3, {3}), ((3,), 3, {3}), ([3, 7], (3, 7), {3, 7}),
])  # fmt: skip
def test_a_text_may_end_at_several_ids(given, kept, ends):
    config = ModelConfig(eos_id=given)
    assert config.eos_id == kept and config.ends == ends
    assert replace(config, n_layers=3).ends == ends
    assert ModelConfig(eos_id=read_field(ModelConfig, "eos-id", ",".join(map(str, sorted(ends))) or "none")) == config


def test_too_many_tokens_are_refused(tiny_model):
    with pytest.raises(ValueError, match="65 tokens do not fit into the model's 64 positions"):
        tiny_model(0)(torch.zeros(1, 65, dtype=torch.int64))


def test_an_adapter_is_a_low_rank_change_before_its_norm_begins_as_nothing_and_counts(tiny_model):
    model, hidden = tiny_model(exit_norms=(2, 3), adapter="lowrank:4"), torch.randn(6, 32)
    (down, up), h = (part.numpy() for part in model.adapters["2"]), hidden.numpy()  # (4, 32) each
    moved = h + h @ down.T @ up
    expected = moved / np.sqrt((moved**2).mean(-1, keepdims=True) + 1e-6) * model.exit_norms["2"].numpy()
    torch.testing.assert_close(model.exit_norm(hidden, 2), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
    assert head_flops(model.config, 2, 50) - head_flops(model.config, 4, 50) == 2 * (4 * 32 + 32 * 4)
    assert not torch.equal(model.exit_norm(hidden, 4), model.exit_norm(hidden, 3))
    fresh = Transformer(replace(model.config, classifiers=()))
    assert torch.equal(fresh.exit_norm(hidden, 2), fresh.exit_norm(hidden, 5)) and fresh.adapters["2"][0].abs().sum() > 0
