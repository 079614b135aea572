"""Weights in int8: what they stand for, that every row of a product is treated alike, and files of them."""

import pytest
import torch

import convert
import decode
from decode import DecodeConfig, generate, load_checkpoint
from decoding.fast_weights import FEW, Int8Matrix, has_kernel
from formats.checkpoint import read_checkpoint, save_checkpoint
from tests.public import LLAMA, write_hf

FULL = DecodeConfig(max_new_tokens=30)


def test_a_row_is_kept_as_the_nearest_multiples_of_a_127th_of_its_largest():
    """4 / 127 = 0.031496 is 0.031494140625 in bfloat16; 1 / that = 31.75, 0.5 / that = 15.88, -4 / that =
    -127.008."""
    matrix = Int8Matrix.of(torch.tensor([[1.0, -4.0, 0.5], [0.0, 0.0, 0.0]]))
    assert matrix.rows.tolist() == [[32, -127, 16], [0, 0, 0]] and matrix.scale[0].item() == 0.031494140625
    assert matrix[torch.tensor([0, 1])].tolist() == [[1.0078125, -3.999755859375, 0.50390625], [0, 0, 0]]


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
    assert torch.equal(matrix.product(x), torch.cat([matrix.product(x[i : i + 1]) for i in range(rows)]))


@pytest.mark.parametrize("rows", [1, 3, FEW, FEW + 1, 90])
@pytest.mark.parametrize("kernel", [True, False])
def test_a_product_is_that_of_the_matrix_it_stands_for(monkeypatch, rows, kernel):
    if not kernel:  # as with a torch that has none
        monkeypatch.setattr("decoding.fast_weights.has_kernel", lambda: False)
    matrix, x = Int8Matrix.of(torch.randn(96, 64)), torch.randn(rows, 64)
    expected = x @ matrix[torch.arange(96)].T
    assert (matrix.product(x).float() - expected).norm() < 0.005 * expected.norm()  # rounded to 8 bits


def test_where_the_kernel_is_missing_it_is_not_used(monkeypatch):
    def raising(*_):
        raise RuntimeError("_weight_int8pack_mm is not there")

    monkeypatch.setattr(torch, "_weight_int8pack_mm", raising)
    has_kernel.cache_clear()
    try:
        product = Int8Matrix.of(torch.full((4, 32), 127.0)).product(torch.ones(1, 32))
        assert not has_kernel() and product.tolist() == [[32 * 127] * 4]
    finally:
        has_kernel.cache_clear()


def test_vectors_of_a_bfloat16_file_are_float32_with_int8_matrices(tiny_model, reloaded):
    """Folding reorders some of them; these, too, meet float32 states."""
    model = tiny_model(0, qk_norm=True, qkv_bias=True).to(torch.bfloat16)
    block = reloaded(model, dtype=torch.int8).blocks[0]
    assert all(getattr(block, name).dtype == torch.float32 for name in ("attn_norm", "mlp_norm", "qkv_bias", "q_norm", "k_norm"))


@pytest.mark.parametrize("settings", [
    {"confidence": "softmax", "threshold": 0.1}, {"confidence": "jsd", "threshold": 0.05, "prune": "fixed:8"},
    {"confidence": "classifier", "threshold": 0.5}, {"confidence": "hidden", "threshold": 0.7, "max_owed": 3},
    {"confidence": "softmax", "threshold": 0.2, "shortlist": 20, "exit_layers": (3, 5)},
])  # fmt: skip
def test_verified_decoding_gives_the_int8_models_own_text(model_with_ids, reloaded, settings):
    early = False
    for seed in range(2):
        small = reloaded(model_with_ids(seed), dtype=torch.int8)
        small.frequent_ids = torch.randperm(50)[:30]
        out = generate(small, [1, 2, 3], DecodeConfig(max_new_tokens=30, verify=True, **settings))
        assert out.tokens == generate(small, [1, 2, 3], FULL).tokens
        early |= out.counters.accepted > 0
    assert early


def test_weights_in_int8_take_at_most_three_tenths_of_float32s_memory(tiny_model, reloaded):
    shape = {"vocab_size": 4096, "d_model": 64, "d_ff": 128, "head_dim": 16, "classifiers": ()}
    model = tiny_model(0, **shape)
    small = reloaded(model, dtype=torch.int8)
    kept = [weight for block in small.blocks for weight in vars(block).values()] + [small.embedding]
    matrices = [weight for weight in kept if isinstance(weight, Int8Matrix)]
    assert len(matrices) == 4 * 5 + 1
    assert sum(each.rows.nbytes + each.scale.nbytes for each in matrices) < 0.3 * sum(weight.nbytes for weight in model.parameters())


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_a_file_in_int8_is_the_model_that_int8_makes_of_the_whole_file(tiny_model, tmp_path, source):
    write_hf(tmp_path / "hf", tiny_model(0, classifiers=(), **LLAMA), "llama", dtype=getattr(torch, source))
    convert.convert(tmp_path / "hf", tmp_path / "whole.pt")
    convert.convert(tmp_path / "hf", tmp_path / "small.pt", torch.int8)
    stored, tokens = read_checkpoint(tmp_path / "small.pt", check=True), torch.randint(0, 50, (1, 20))
    assert {weight.dtype for name, weight in stored["weights"].items() if weight.dim() > 1} == {torch.int8}
    made, _ = load_checkpoint(tmp_path / "whole.pt", dtype=torch.int8)
    read, _ = load_checkpoint(tmp_path / "small.pt")
    assert read.form == "int8" and torch.equal(made(tokens), read(tokens))
    for dtype in (torch.float32, torch.bfloat16):
        whole, _ = load_checkpoint(tmp_path / "small.pt", dtype=dtype)
        assert whole.embedding.dtype == dtype and (whole(tokens) - read(tokens)).norm() < 0.05 * read(tokens).norm()


@pytest.mark.parametrize(("change", "message"), [
    (lambda content: content.update(scales={}), "the weight embedding"),
    (lambda content: content["scales"].update(embedding=content["scales"]["embedding"][1:]), "scales"),
    (lambda content: content["scales"]["embedding"].fill_(torch.nan), "the weight embedding has values that are not finite"),
])  # fmt: skip
def test_a_damaged_file_in_int8_is_refused(tiny_model, tmp_path, change, message):
    write_hf(tmp_path / "hf", tiny_model(0, classifiers=(), **LLAMA), "llama")
    convert.convert(tmp_path / "hf", tmp_path / "model.pt", torch.int8)
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "model.pt")


def test_the_command_takes_dtype_int8(tiny_model, tmp_path, command):
    path = tmp_path / "model.pt"
    save_checkpoint(path, tiny_model(0), None)
    tokens = generate(load_checkpoint(path, dtype=torch.int8)[0], [1, 2, 3], DecodeConfig(max_new_tokens=5)).tokens
    out, _, status = command(decode.main, "--checkpoint", path, "--dtype", "int8", "--prompt", "1,2,3", "--max-new-tokens", 5)
    assert status is None and " ".join(map(str, tokens)) in out
