"""Adapters that are blocks: beside the staircase, on every row, with keys and values of their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import decode
from confidence import margin
from decode import DecodeConfig, Run, generate
from decoding.drafting import position_states
from decoding.flops import block_flops
from formats.adapters import at_size_one, exit_state, exit_states, side_shape
from formats.classifiers import belief
from formats.weights import store
from model import Block, ModelConfig, Transformer
from training.batches import Batch
from training.device import to_device
from training.objective import Objective
from training.settings import TrainConfig

SHAPE = {"exit_norms": (2, 3), "exit_layers": (2, 3), "adapter": "block:24"}
PROMPT = [7, 3, 9, 4, 11]
GEMMA = {
    "post_norms": True, "qk_norm": True, "activation": "gelu_tanh", "window": 6, "global_layers": (3,), "local_rope_base": 100.0
}  # fmt: skip


def test_a_fresh_block_is_the_identity_of_the_models_own_kind_and_width():
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "n_layers": 5, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "max_len": 64}
    model = Transformer(ModelConfig(**shape, **SHAPE, **GEMMA))
    tokens = torch.arange(20)[None]
    states = model.hidden_states(tokens)
    for layer, read in enumerate(exit_states(model, tokens)):
        same = states[layer] if layer not in (2, 3) else at_size_one(states[layer], 1e-6)
        assert torch.equal(read, same)
    block = model.adapters["2"]
    assert isinstance(block, Block) and block.down.shape == (32, 24) and not hasattr(block, "attn_post_norm")
    assert block.qkv.abs().sum() > 0 and block.gate_up.abs().sum() > 0


@pytest.mark.parametrize("shape", [{}, GEMMA, {"unrotated_layers": (2,), "qkv_bias": True}])
@pytest.mark.parametrize("form", ["plain", "folded", "packed"])
@pytest.mark.parametrize("options", [
    {}, {"verify": True}, {"verify": True, "temperature": 0.5}, {"verify": True, "max_owed": 3, "temperature": 1.0},
    {"confidence": "classifier", "threshold": 0.5},
])  # fmt: skip
def test_what_exits_said_in_decoding_is_what_they_say_in_a_full_pass(tiny_model, shape, form, options):
    """So keys and values beside the staircase are exact, owed rows and rolled-back drafts included."""
    model = tiny_model(3, **SHAPE, **shape)
    plain = tiny_model(3, **SHAPE, **shape)
    store(model, form)
    settings = {"max_new_tokens": 30, "confidence": "softmax", "threshold": 0.02, **options}
    config = DecodeConfig(**settings)
    out = generate(model, PROMPT, config)
    tokens = torch.tensor([PROMPT + out.tokens])
    read, checked = exit_states(plain, tokens), 0
    for number, confidences in enumerate(out.confidences):
        for layer, confidence in confidences.items():
            row = read[layer][len(PROMPT) - 1 + number][None]
            logits = plain.head(row, layer)
            expected = belief(plain, row, layer, {}) if config.confidence == "classifier" else margin(logits[0].softmax(-1))
            assert confidence == pytest.approx(float(expected), abs=2e-4)
            checked += 1
    assert checked and (out.counters.drafted if config.verify else min(out.exit_layers) < 5)
    if config.verify and config.temperature:
        assert out.counters.accepted < out.counters.drafted
    elif config.verify:
        assert out.tokens == generate(model, PROMPT, config.full()).tokens


def test_a_block_sees_earlier_positions_of_its_own_document_alone(tiny_model):
    model = tiny_model(3, **SHAPE)
    tokens, documents = torch.arange(12)[None], torch.tensor([[0] * 5 + [1] * 7])
    states = model.hidden_states(tokens, documents)
    packed = exit_state(model, 2, states[2], tokens, documents)
    alone = exit_states(model, tokens[:, 5:])[2]  # relative positions are all that attention knows
    assert_close(packed[5:], alone, rtol=1e-4, atol=1e-4)
    mixed = exit_state(model, 2, states[2], tokens)
    assert not torch.allclose(mixed[5:], alone, atol=1e-2)
    changed = exit_state(model, 2, torch.cat([states[2][:-1], states[2][-1:] * 2]), tokens, documents)
    assert torch.equal(changed[:-1], packed[:-1])


def test_its_work_counts_as_asking(tiny_model):
    model = tiny_model(3, **SHAPE)
    out = generate(model, PROMPT, DecodeConfig(max_new_tokens=1, confidence="classifier", threshold=1.0))
    bare = tiny_model(3, exit_norms=(2, 3), exit_layers=(2, 3))
    other = generate(bare, PROMPT, DecodeConfig(max_new_tokens=1, confidence="classifier", threshold=1.0))
    side = 2 * block_flops(side_shape(model.config), 0, len(PROMPT))
    assert out.counters.head_flops - other.counters.head_flops == side > 0
    assert out.counters.confidence_flops - other.counters.confidence_flops == side
    assert out.counters.block_flops == other.counters.block_flops and out.counters.block_runs == other.counters.block_runs


def test_the_full_model_runs_no_block_beside(tiny_model):
    out = generate(tiny_model(3, **SHAPE), PROMPT, DecodeConfig(max_new_tokens=9))
    bare = generate(tiny_model(3, exit_norms=(2, 3), exit_layers=(2, 3)), PROMPT, DecodeConfig(max_new_tokens=9))
    assert out.counters == bare.counters and out.counters.confidence_flops == 0


@pytest.mark.parametrize("confidence, layers", [("softmax", [3]), ("classifier", [3]), ("jsd", [2, 3]), ("weighted", [2, 3])])
def test_blocks_run_where_an_exit_may_read_them(tiny_model, confidence, layers):
    model = tiny_model(3, **SHAPE)
    run = Run(model, PROMPT, DecodeConfig(confidence=confidence, exit_layers=(3,)), decode.Counters())
    assert [*run.cache.beside] == layers
    assert [*Run(model, PROMPT, DecodeConfig(predict="contrast"), decode.Counters()).cache.beside] == [2, 3]


def test_exits_asked_alone_read_what_they_would_have_read(tiny_model):
    """`draft auto` asks exits about positions of a round that is over."""
    model, passes = tiny_model(3, **SHAPE), []
    run = Run(model, PROMPT, DecodeConfig(max_new_tokens=20, confidence="softmax", verify=True), decode.Counters())
    with torch.inference_mode():
        tokens, drafts = PROMPT, []
        for exits in ({3: 0.0}, {2: 0.0}, {}):
            trace, layer = run.advance(tokens, exits)
            passes.append(trace)
            if exits:
                drafts.append(run.emit(trace, layer))
                tokens = [drafts[-1].id]
        full = exit_states(model, torch.tensor([run.text]))
        for number in range(3):
            states, beside = position_states(passes, number)
            assert len(states) == 6 and beside.keys() == {2, 3}
            for layer, state in beside.items():
                assert_close(state[0], full[layer][len(PROMPT) - 1 + number], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", ["distill", "weighted"])
def test_training_heads_teaches_the_blocks_of_the_exits_asked(tiny_model, loss):
    model = tiny_model(3, **SHAPE)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(("exit_norms", "adapters", "classifiers")))
    config = TrainConfig(train="heads", init="x", loss=loss, exits=(2, 3), per_step=1, classifier=True, device="cpu", dtype="float32")
    text = np.random.default_rng(0).integers(0, 50, (2, 17))
    batch = Batch(text[:, :-1], text[:, 1:], np.ones((2, 16), int))
    total, _ = Objective(model, config)(to_device(batch, "cpu"), step=0)
    total.backward()
    taught = {name.split(".")[1] for name, weight in model.named_parameters() if name.startswith("adapters") and weight.grad is not None}
    assert taught == ({"2", "3"} if loss == "weighted" else {"2"})
    assert all(weight.grad.abs().sum() > 0 for weight in model.adapters["2"].parameters())
    assert model.blocks[0].qkv.grad is None


def test_copies_reach_the_blocks_too(tiny_model):
    """With fill copy every layer above the exit has as many keys beside the staircase as in it."""
    model = tiny_model(3, **SHAPE)
    for block in model.blocks[2:]:  # layers that hand on what they get, so that copies are exact
        block.out.zero_(), block.down.zero_()
    config = DecodeConfig(max_new_tokens=20, confidence="softmax", threshold=0.05, fill="copy")
    out = generate(model, PROMPT, config)
    exact = generate(model, PROMPT, replace(config, fill="parallel"))
    assert out.tokens == exact.tokens and min(out.exit_layers) == 2
    for one, other in zip(out.confidences, exact.confidences):
        assert one == pytest.approx(other, abs=1e-4)
