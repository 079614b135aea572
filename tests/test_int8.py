"""Weights in int8: what they stand for, that every row of a product is treated alike, and files of them."""

import sys

import pytest
import torch

import convert
import decode
import eval as evaluate
import formats.int8
from decode import DecodeConfig, generate
from formats.checkpoint import read_checkpoint, save_checkpoint
from formats.int8 import FEW, Int8Matrix, has_kernel
from formats.weights import linear
from model import load_checkpoint
from tests.public import LLAMA, write_hf
from tests.test_model import FEATURES
from tools import bench

FULL = DecodeConfig(max_new_tokens=30)


@pytest.fixture
def in_int8(tiny_model, tmp_path):
    """A factory of tiny random models and the same in int8."""

    def make(seed: int = 0, **shape):
        model = tiny_model(seed, **shape)
        save_checkpoint(tmp_path / "model.pt", model, None)
        return model, load_checkpoint(tmp_path / "model.pt", dtype=torch.int8)[0]

    return make


def test_a_row_is_kept_as_the_nearest_multiples_of_a_127th_of_its_largest():
    """4 / 127 = 0.031496 is 0.031494140625 in bfloat16; 1 / that = 31.75, 0.5 / that = 15.88, -4 / that =
    -127.008."""
    matrix = Int8Matrix.of(torch.tensor([[1.0, -4.0, 0.5], [0.0, 0.0, 0.0]]))
    assert matrix.rows.tolist() == [[32, -127, 16], [0, 0, 0]] and matrix.scale[0].item() == 0.031494140625
    kept = matrix[torch.tensor([0])]
    torch.testing.assert_close(kept, torch.tensor([[1.0078125, -3.999755859375, 0.50390625]]), rtol=0, atol=0)
    assert matrix.numel() == 6 and matrix.nbytes == 6 + 4 and matrix[torch.tensor([1])].tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("shape", [(48, 32), (5000, 64)])
def test_no_weight_is_further_from_its_int8_than_half_a_step(shape):
    weight = torch.randn(*shape) * torch.rand(shape[0], 1) * 9
    matrix = Int8Matrix.of(weight)
    error = (matrix[torch.arange(shape[0])] - weight).abs() / matrix.scale.float()[:, None]
    assert error.max() <= 0.5 + 127 / 256  # the largest of a row, whose scale was rounded down, is cut to 127
    assert error.mean() < 0.27 and matrix.rows.abs().amax(1).min() >= 126


@pytest.mark.skipif(not has_kernel(), reason="torch multiplies no int8 matrices here")
@pytest.mark.parametrize("rows", [2, 9, FEW])
def test_several_rows_give_bit_for_bit_what_each_gives_alone(rows):
    """So that drafts which are judged together get the logits that they would get one by one."""
    matrix, x = Int8Matrix.of(torch.randn(96, 64)), torch.randn(rows, 64)
    alone = torch.cat([linear(x[i : i + 1], matrix) for i in range(rows)])
    assert torch.equal(linear(x, matrix), alone)


@pytest.mark.parametrize("rows", [1, 3, FEW, FEW + 1, 90])
@pytest.mark.parametrize("kernel", [True, False])
def test_a_product_is_that_of_the_matrix_it_stands_for(monkeypatch, rows, kernel):
    if not kernel:  # as with a torch that has none
        monkeypatch.setattr(formats.int8, "has_kernel", lambda: False)
    matrix, x = Int8Matrix.of(torch.randn(96, 64)), torch.randn(rows, 64)
    expected = x @ matrix[torch.arange(96)].T
    torch.testing.assert_close(linear(x, matrix).float(), expected, rtol=2e-2, atol=0.1)
    assert (linear(x, matrix).float() - expected).norm() < 0.005 * expected.norm()  # rounded to 8 bits


def test_where_the_kernel_is_missing_it_is_not_used(monkeypatch):
    def raising(*_):
        raise RuntimeError("_weight_int8pack_mm is not there")

    monkeypatch.setattr(torch, "_weight_int8pack_mm", raising)
    has_kernel.cache_clear()
    try:
        product = linear(torch.ones(1, 32), Int8Matrix.of(torch.full((4, 32), 127.0)))
        assert not has_kernel() and product.tolist() == [[32 * 127] * 4]
    finally:
        has_kernel.cache_clear()


@pytest.mark.parametrize("shape", [*FEATURES, {"exit_norms": (2, 3), "adapter": "lowrank:4"}])
def test_an_int8_model_is_near_the_float_one_with_every_feature(in_int8, shape):
    model, small = in_int8(0, **shape)
    tokens = torch.randint(0, 50, (2, 20))
    exact, near = model(tokens), small(tokens)
    assert (near - exact).norm() < 0.1 * exact.norm() and near.dtype == torch.float32
    assert small.form == "int8" and small.hidden_states(tokens)[3].dtype == torch.float32
    for layer in (2, 3, 5):
        states = model.hidden_states(tokens)[layer]
        assert (small.head(states, layer) - model.head(states, layer)).norm() < 0.1 * model.head(states, layer).norm()


def test_vectors_of_a_bfloat16_file_are_float32_beside_int8(tiny_model, tmp_path):
    """Folding reorders some of them; these, too, meet float32 states."""
    model = tiny_model(0, qk_norm=True, qkv_bias=True)
    weights = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    save_checkpoint(tmp_path / "model.pt", model, None, weights=weights)
    block = load_checkpoint(tmp_path / "model.pt", dtype=torch.int8)[0].blocks[0]._parameters
    assert all(block[name].dtype == torch.float32 for name in ("attn_norm", "mlp_norm", "qkv_bias", "q_norm", "k_norm"))


@pytest.mark.parametrize("settings", [
    {"confidence": "softmax", "threshold": 0.1}, {"confidence": "jsd", "threshold": 0.05, "prune": "fixed", "prune_k": 8},
    {"confidence": "classifier", "threshold": 0.5}, {"confidence": "hidden", "threshold": 0.7, "max_owed": 3},
])  # fmt: skip
@pytest.mark.parametrize("seed", range(4))
def test_verified_decoding_gives_the_int8_models_own_text(in_int8, settings, seed):
    _, small = in_int8(seed)
    full = generate(small, [1, 2, 3], FULL)
    out = generate(small, [1, 2, 3], DecodeConfig(max_new_tokens=30, verify=True, **settings))
    assert out.tokens == full.tokens and min(out.exit_layers) < 5


def test_a_shortlist_of_an_int8_model_scores_as_its_head_does(in_int8):
    _, small = in_int8(0)
    small.frequent_ids = torch.randperm(50)[:30]
    settings = {"confidence": "softmax", "threshold": 0.2, "shortlist": 20, "exit_layers": (3, 5), "verify": True}
    out = generate(small, [1, 2, 3], DecodeConfig(max_new_tokens=30, **settings))
    assert out.tokens == generate(small, [1, 2, 3], FULL).tokens and min(out.exit_layers) < 6


def test_weights_in_int8_take_at_most_three_tenths_of_float32s_memory(in_int8):
    model, small = in_int8(0, vocab_size=4096, d_model=64, d_ff=128, head_dim=16, classifiers=())
    sizes = [sum(weight.nbytes for weight in each.parameters()) for each in (model, small)]
    assert sizes[1] < 0.3 * sizes[0]


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_a_file_in_int8_is_the_model_that_int8_makes_of_the_whole_file(tiny_model, tmp_path, source):
    write_hf(tmp_path / "hf", tiny_model(0, classifiers=(), **LLAMA), "llama", dtype=getattr(torch, source))
    convert.convert(tmp_path / "hf", tmp_path / "whole.pt")
    report = convert.convert(tmp_path / "hf", tmp_path / "small.pt", torch.int8)
    assert "int8" in report
    stored, tokens = read_checkpoint(tmp_path / "small.pt", check=True), torch.randint(0, 50, (1, 20))
    assert {weight.dtype for name, weight in stored["weights"].items() if weight.dim() > 1} == {torch.int8}
    made, _ = load_checkpoint(tmp_path / "whole.pt", dtype=torch.int8)
    read, _ = load_checkpoint(tmp_path / "small.pt")
    assert read.form == "int8" and torch.equal(made(tokens), read(tokens))
    for dtype in (torch.float32, torch.bfloat16):
        whole, _ = load_checkpoint(tmp_path / "small.pt", dtype=dtype)
        assert whole.embedding.dtype == dtype and (whole(tokens) - read(tokens)).norm() < 0.05 * read(tokens).norm()


@pytest.mark.parametrize(("change", "message"), [
    ({"scales": 3}, "scales are no dictionary"),
    ({"scales": {}}, "the weight embedding is torch.int8, torch.strided, on cpu; it must be a plain tensor of torch.float32"),
    ({"scales": {"norm": torch.ones(32, dtype=torch.bfloat16)}}, "the weight"),
    ({"scales": {"gone": torch.ones(32, dtype=torch.bfloat16)}}, "scales are no dictionary"),
    ("short", "the scales of embedding are .* bfloat16, one a row"),
    ("nan", "the weight embedding has values that are not finite"),
])  # fmt: skip
def test_a_damaged_file_in_int8_is_refused(tiny_model, tmp_path, change, message):
    write_hf(tmp_path / "hf", tiny_model(0, classifiers=(), **LLAMA), "llama")
    convert.convert(tmp_path / "hf", tmp_path / "model.pt", torch.int8)
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    if change == "short":
        content["scales"]["embedding"] = content["scales"]["embedding"][1:]
    elif change == "nan":
        content["scales"]["embedding"][3] = torch.nan
    else:
        content |= change
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "model.pt")


def test_int8_has_no_other_form_and_no_gpu(tiny_model, tmp_path):
    save_checkpoint(tmp_path / "model.pt", tiny_model(0), None)
    for options in ({"form": "packed"}, {"device": "meta"}):
        with pytest.raises(ValueError, match="int8 is for a CPU, in a form of its own"):
            load_checkpoint(tmp_path / "model.pt", dtype=torch.int8, **options)


def test_decode_takes_dtype_int8(tiny_model, tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "model.pt", tiny_model(0), None)
    monkeypatch.setattr(
        sys,
        "argv",
        ["decode.py", "--checkpoint", str(tmp_path / "model.pt"), "--dtype", "int8", "--prompt", "1,2,3", "--max-new-tokens", "5"],
    )
    decode.main()
    model, _ = load_checkpoint(tmp_path / "model.pt", dtype=torch.int8)
    tokens = generate(model, [1, 2, 3], DecodeConfig(max_new_tokens=5)).tokens
    assert " ".join(map(str, tokens)) in capsys.readouterr().out


@pytest.mark.parametrize("command", [
    ["eval.py", "--tasks=e2e", "--limit=2", "--wide", "--rows=softmax,verified auto"],
    ["bench.py", "--repeat=1"], ["bench.py", "--split", "--repeat=1"], ["bench.py", "--large-vocabulary", "--repeat=1"],
])  # fmt: skip
def test_every_command_takes_dtype_int8(monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", [*command, "--dtype=int8", "--threads=1"])
    (evaluate if command[0] == "eval.py" else bench).main()
    printed = capsys.readouterr()
    assert "int8" in printed.out + printed.err or "--split" in command
