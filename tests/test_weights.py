"""The forms in which a CPU stores weights: each is the plain model's function, for every option of ModelConfig, is a
module like others, and is chosen by the CPU."""

import copy

import pytest
import torch
from torch.testing import assert_close

import convert
import decode
from common.errors import UserError
from decode import DecodeConfig, generate, load_checkpoint
from decoding import weights
from decoding.weights import FEW, FORMS, Int8Linear, PackedLinear, default_form, has_kernel, multiplies_integers, packs, prepare, quantized
from formats.checkpoint import read_checkpoint, save_checkpoint
from model import Transformer
from tests.public import LLAMA, write_hf
from tests.test_model import FEATURES, SHAPES, random_tokens

HEADS = {"exit_norms": (2, 3), "adapter": "lowrank:4"}
FULL = DecodeConfig(max_new_tokens=9)
WIDE = {"d_model": 64, "head_dim": 16, "d_ff": 64}  # sizes that the int8 kernel takes
CACHED = (packs, has_kernel, multiplies_integers)


def prepared(model: Transformer, form: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model in this form; skips the test where this machine cannot multiply it."""
    if form == "packed" and not packs(dtype):
        pytest.skip(f"this machine does not multiply packed weights of {dtype}")
    prepare(model, form, dtype, {})
    return model


@pytest.fixture
def without(monkeypatch):
    """Makes a function of torch raise, as on a machine that lacks it, and forgets what was tried before."""

    def remove(owner, name: str) -> None:
        def raising(*_):
            raise RuntimeError(f"{name}: bf16 path needs the cpu support avx_ne_convert or avx512bw")

        monkeypatch.setattr(owner, name, raising)
        for tried in CACHED:
            tried.cache_clear()

    yield remove
    for tried in CACHED:
        tried.cache_clear()


# ---------------------------------------------------------------- the same function


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("form", ["packed", "int8"])
@pytest.mark.parametrize("shape", [*SHAPES, *FEATURES, HEADS], ids=str)
def test_every_form_is_the_plain_models_function(tiny_model, form, shape, rows):
    """States, logits and exit heads, for few rows and for many; int8 within a tenth, and its best token is mostly the
    same. (In 3ebc093, states of int8 had nothing to do with those of float32 if there were query or post norms.)"""
    model, tokens = tiny_model(1, **{**WIDE, **shape}), random_tokens(0, 1, rows)
    small = prepared(copy.deepcopy(model), form)
    states, exact = small.hidden_states(tokens), model.hidden_states(tokens)
    pairs = [*zip(states, exact), (small(tokens), model(tokens))]
    pairs += [(small.head(state, layer), model.head(state, layer)) for layer, state in enumerate(exact) if layer]
    for found, expected in pairs:
        assert found.dtype == torch.float32
        if form == "int8":
            assert (found - expected).norm() < 0.1 * expected.norm()
        else:
            assert_close(found, expected, rtol=1e-3, atol=1e-3)
    if rows == 40 and form == "int8":
        assert (small(tokens).argmax(-1) == model(tokens).argmax(-1)).float().mean() > 0.7


def test_a_wide_matrix_is_packed_in_parts(tiny_model):
    weight, x = torch.randn(32, 2500), torch.randn(3, 2500)
    if not packs(torch.float32):
        pytest.skip("this machine does not multiply packed weights")
    wide = PackedLinear(weight)
    assert len(list(wide.parameters())) == 3 and torch.equal(wide.state_dict()["weight"], weight)
    assert_close(wide(x), x @ weight.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", ["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32(tiny_model, reloaded, form, dtype):
    if form == "packed" and not packs(dtype):
        pytest.skip(f"this machine does not multiply packed weights of {dtype}")
    shape = {"qkv_bias": True, "qk_norm": True, "post_norms": True}
    model = reloaded(tiny_model(0, **shape), dtype=dtype, form=form)
    out = generate(model, [1, 2, 3], DecodeConfig(max_new_tokens=12, confidence="jsd", threshold=0.1))
    tokens = torch.tensor([[1, 2, 3, *out.tokens]])
    states, exact = (each.hidden_states(tokens)[-1] for each in (model, tiny_model(0, **shape)))
    assert len(out.tokens) == 12 and states.dtype == dtype and (states - exact).norm() < 0.05 * exact.norm()


# ---------------------------------------------------------------- a module like others


@pytest.mark.parametrize("form", ["plain", "packed", "int8"])
@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": False, "qkv_bias": True, **HEADS}], ids=str)
def test_a_prepared_model_counts_saves_copies_and_takes_hooks_on_blocks(tiny_model, tmp_path, form, shape):
    plain = tiny_model(0, **shape)
    model = prepared(copy.deepcopy(plain), form)
    scales = sum(len(weight) for name, weight in model.named_parameters() if name.endswith("scale"))
    assert sum(weight.numel() for weight in model.parameters()) - scales == sum(weight.numel() for weight in plain.parameters())
    save_checkpoint(tmp_path / "again.pt", model, None)
    again, _ = load_checkpoint(tmp_path / "again.pt", dtype=torch.int8 if form == "int8" else None, form=None if form == "int8" else form)
    tokens = random_tokens(0, 1, 7)
    assert torch.equal(copy.deepcopy(model)(tokens), model(tokens)) and torch.equal(again(tokens), model(tokens))
    seen = []
    model.blocks[2].register_forward_hook(lambda block, _, out: seen.append(out.shape))
    generate(model, [1, 2, 3], FULL)
    assert seen == [(1, 3, 32)] + [(1, 1, 32)] * 8


@pytest.mark.parametrize("form", ["packed", "int8"])
@pytest.mark.parametrize("attempt", [
    lambda model: model.double(), lambda model: model.to(torch.bfloat16), lambda model: model.blocks.cuda(),
    lambda model: model.load_state_dict(model.state_dict()), lambda model: model.lm_head.register_forward_hook(print),
])  # fmt: skip
def test_what_a_prepared_model_cannot_do_is_refused_in_one_line(tiny_model, form, attempt):
    with pytest.raises(UserError, match="load the model as plain"):
        attempt(prepared(tiny_model(0), form))


def test_a_plain_model_moves_and_converts_as_a_whole_and_stays_tied(tiny_model, reloaded):
    model = reloaded(tiny_model(0), form="plain").double()
    assert {weight.dtype for weight in model.parameters()} == {torch.float64} and model.lm_head.weight is model.embedding.weight
    assert_close(model(random_tokens(0, 1, 7)), tiny_model(0)(random_tokens(0, 1, 7)), rtol=1e-3, atol=1e-3)
    assert len({id(block.rotary) for block in model.blocks}) == 1


def test_two_generations_at_once_do_not_disturb_each_other(tiny_model):
    model = prepared(tiny_model(0), "packed")
    config = DecodeConfig(max_new_tokens=12, confidence="softmax", threshold=0.15)
    alone = [generate(model, prompt, config).tokens for prompt in ([1, 2, 3], [4, 5, 6, 7, 8])]
    both = [decode.stream(model, prompt, config) for prompt in ([1, 2, 3], [4, 5, 6, 7, 8])]
    assert [list(tokens) for tokens in zip(*([token.id for token in pair] for pair in zip(*both)))] == alone


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize("vendor, capability, form", [
    ("GenuineIntel", "AVX512", "plain"), ("GenuineIntel", "AVX2", "packed"), ("AuthenticAMD", "AVX512", "packed"), ("", "NO AVX", "packed"),
])  # fmt: skip
def test_the_rule_goes_by_the_cpus_vendor_and_instructions(tiny_model, reloaded, monkeypatch, vendor, capability, form):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(weights, "cpu", lambda: f"vendor_id : {vendor}")
    form = form if packs(torch.float32) else "plain"
    assert default_form(torch.float32) == reloaded(tiny_model(0)).form == form


@pytest.mark.parametrize("flags, slow", [("avx512f avx512_bf16", False), ("avx512f amx_bf16", False), ("avx512f", True), (None, False)])
def test_bfloat16_is_slow_where_the_cpu_has_no_instructions_for_it(monkeypatch, flags, slow):
    monkeypatch.setattr(weights, "cpu", lambda: "" if flags is None else f"flags : {flags}")
    assert weights.slow_dtype(torch.bfloat16) == slow and not weights.slow_dtype(torch.float32)


@pytest.mark.parametrize("missing", ["_reorder_linear_weight", "_linear_pointwise"])
def test_where_the_packed_product_raises_weights_are_plain(tiny_model, tmp_path, without, missing):
    """As on a CPU without AVX-512, where bfloat16 cannot be packed: it is tried before it is used."""
    save_checkpoint(tmp_path / "model.pt", tiny_model(0), None)
    without(torch.ops.mkldnn, missing)
    model, _ = load_checkpoint(tmp_path / "model.pt")
    assert model.form == "plain" and generate(model, [1, 2, 3], FULL).tokens == generate(tiny_model(0), [1, 2, 3], FULL).tokens
    with pytest.raises(ValueError, match="cannot multiply packed weights of float32"):
        load_checkpoint(tmp_path / "model.pt", form="packed")


@pytest.mark.parametrize("options", [{"form": "int3"}, {"form": "packed", "dtype": torch.int8}, {"device": "meta", "dtype": torch.int8},
                                     {"form": "packed", "device": "meta"}])  # fmt: skip
def test_a_form_that_cannot_be_is_refused(tiny_model, reloaded, options):
    assert "int3" not in FORMS
    with pytest.raises(ValueError, match=r"form of weights 'int3'|int8 needs a CPU|--weights applies only to a CPU"):
        reloaded(tiny_model(0), **options)


# ---------------------------------------------------------------- int8


def test_a_row_is_kept_as_the_nearest_multiples_of_a_127th_of_its_largest():
    """4 / 127 = 0.031496 is 0.031494140625 in bfloat16; 1 / that = 31.75, 0.5 / that = 15.88, -4 / that =
    -127.008."""
    rows, scale = quantized(torch.tensor([[1.0, -4.0, 0.5], [0.0, 0.0, 0.0]]))
    assert rows.tolist() == [[32, -127, 16], [0, 0, 0]] and scale[0].item() == 0.031494140625
    assert weights.dequantized(rows, scale).tolist() == [[1.0078125, -3.999755859375, 0.50390625], [0, 0, 0]]


@pytest.mark.parametrize("shape", [(48, 32), (5000, 64)])
def test_no_weight_is_further_from_its_int8_than_half_a_step(shape):
    weight = torch.randn(*shape) * torch.rand(shape[0], 1) * 9
    rows, scale = quantized(weight)
    error = (weights.dequantized(rows, scale) - weight).abs() / scale.float()[:, None]
    assert error.max() <= 0.5 + 127 / 256  # the largest of a row, whose scale was rounded down, is cut to 127
    assert error.mean() < 0.27 and rows.abs().amax(1).min() >= 126


@pytest.mark.parametrize("rows", [1, 3, FEW, FEW + 1, 90])
@pytest.mark.parametrize("missing", [None, "_weight_int8pack_mm", "_int_mm"])
@pytest.mark.parametrize("large", [False, True])
def test_a_product_is_that_of_the_matrix_it_stands_for(monkeypatch, without, rows, missing, large):
    """By the kernel for few rows, in integers, or, as with a torch that has neither, of the float matrix. Products of
    integers are precise."""
    if missing:
        without(torch, missing)
    monkeypatch.setattr(weights, "LARGE", 64 if large else weights.LARGE)
    matrix, x = quantized(torch.randn(96, 64)), torch.randn(rows, 64)
    x[0] = 0
    expected = x @ weights.dequantized(*matrix).T
    error = (Int8Linear(*matrix)(x) - expected).norm() / (expected.norm() + 1e-9)
    assert error < (1e-4 if multiplies_integers() and (large or rows > FEW or missing) else 0.005)  # bfloat16


@pytest.mark.parametrize("option", [{}, {"qk_norm": True, "qkv_bias": True}])
def test_vectors_of_a_bfloat16_file_are_float32_with_int8_matrices(tiny_model, reloaded, option):
    model = reloaded(tiny_model(0, **option).to(torch.bfloat16), dtype=torch.int8)
    states = model.hidden_states(torch.tensor([[1, 2, 3]]))
    gains = [module.gain for module in model.modules() if isinstance(module, weights.FastNorm)]
    biases = [block.qkv.bias for block in model.blocks if option]
    assert {each.dtype for each in [*states, *gains, *biases]} == {torch.float32} and len(gains) == 11 + 5 * len(option)


def test_weights_in_int8_take_at_most_three_tenths_of_float32s_memory(tiny_model, reloaded):
    model = tiny_model(0, vocab_size=4096, d_model=64, d_ff=128, head_dim=16, classifiers=())
    small = reloaded(model, dtype=torch.int8)
    assert sum(weight.nbytes for weight in small.parameters()) < 0.3 * sum(weight.nbytes for weight in model.parameters())


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
        assert whole.embedding.weight.dtype == dtype and (whole(tokens) - read(tokens)).norm() < 0.05 * read(tokens).norm()


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
