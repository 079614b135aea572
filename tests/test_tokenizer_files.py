"""Tokenizers beside public checkpoints, rebuilt, equal the originals; those that do not fit are refused."""

import io
import struct
from functools import partial

import pytest
import sentencepiece as spm

import convert
from common.errors import UserError
from formats.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, build_tokenizer, encode_prompt
from formats.tokenizer_files import gguf_tokenizer
from model import load_checkpoint
from tests.public import (
    LLAMA,
    write_hf,
    write_llama2c,
)


@pytest.fixture
def tiny_model(tiny_model):
    """Public checkpoints have no classifiers."""
    return partial(tiny_model, classifiers=())


# ---------------------------------------------------------------- tokenizers

TEXTS = ["Grüße aus dem Café, señor!", "👍🏽 ok 🧑‍🚀", "日本語と中文 한국어", "a\nb\n\n\nc\n",
         "  two   three    spaces ",
         "\ttab",
         "x<b>y</b>", " ", "the cat"]  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def original(request) -> spm.SentencePieceProcessor:
    """A sentencepiece model as Llama's (with a space put before the text) or Gemma's (without)."""
    lines = ["the cat sat on the mat, and two cats sat too", "Grüße aus dem Café", "a cat is a cat is a cat"] * 5
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=320, model_type="bpe",
        byte_fallback=True, minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=request.param, user_defined_symbols=["<b>", "▁▁", "▁▁▁", "\n"],
        hard_vocab_limit=False,
    )  # fmt: skip
    return spm.SentencePieceProcessor(model_proto=out.getvalue())


def described(sp: spm.SentencePieceProcessor) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types as a GGUF file has them: spaces in user-defined tokens are written as such."""
    ids = range(sp.vocab_size())
    user = {sp.piece_to_id(piece) for piece in ("<b>", "▁▁", "▁▁▁", "\n")}
    tests = ((sp.is_unknown, UNKNOWN), (sp.is_control, CONTROL), (sp.is_byte, BYTE), (user.__contains__, USER_DEFINED))
    types = [next((kind for test, kind in tests if test(i)), NORMAL) for i in ids]
    tokens = [sp.id_to_piece(i).replace("▁", " ") if i in user else sp.id_to_piece(i) for i in ids]
    return tokens, [sp.get_score(i) for i in ids], types


def test_the_rebuilt_tokenizer_equals_the_original(original):
    tokens, scores, types = described(original)
    prefix = original.encode("cat", out_type=str)[0].startswith("▁")
    rebuilt = spm.SentencePieceProcessor(model_proto=build_tokenizer(tokens, scores, types, 0, 1, 2, prefix))
    for text in TEXTS:
        ids = original.encode(text)
        assert rebuilt.encode(text) == ids
        assert rebuilt.decode(ids) == original.decode(ids) == text
    assert (rebuilt.bos_id(), rebuilt.eos_id(), rebuilt.unk_id(), rebuilt.pad_id()) == (1, 2, 0, -1)
    assert encode_prompt(rebuilt, "cat") == [1, *original.encode("cat")]


def test_a_tokenizer_without_bos_puts_none(original):
    tokens, scores, types = described(original)
    rebuilt = spm.SentencePieceProcessor(model_proto=build_tokenizer(tokens, scores, types, 0, None, 2, True))
    assert rebuilt.bos_id() == -1 and encode_prompt(rebuilt, "cat") == rebuilt.encode("cat")


@pytest.mark.parametrize("original", [True], indirect=True, ids=["prefix"])
@pytest.mark.parametrize("beside", ["tokenizer.bin", "tokenizer.model", None])
def test_the_tokenizer_of_llama2c(tiny_model, tmp_path, original, beside):
    model = tiny_model(3, **{**LLAMA, "vocab_size": original.vocab_size()})
    write_llama2c(tmp_path / "model.bin", model, 0)
    exported = struct.pack("<i", 20)  # tokenizer.py of llama2.c
    for i in range(original.vocab_size()):
        piece = {1: "\n<s>\n", 2: "\n</s>\n"}.get(i, original.id_to_piece(i)).replace("▁", " ").encode()
        exported += struct.pack("<fi", original.get_score(i), len(piece)) + piece
    if beside:
        (tmp_path / beside).write_bytes(exported if beside.endswith("bin") else original.serialized_model_proto())
    report = convert.convert(tmp_path / "model.bin", tmp_path / "out.pt")
    _, tokenizer = load_checkpoint(tmp_path / "out.pt")
    if beside is None:
        assert tokenizer is None and "no tokenizer, unless --tokenizer" in report
        return
    for text in ["the cat sat", "Grüße aus dem Café, señor!", "👍🏽"]:
        assert tokenizer.encode(text) == original.encode(text)
    assert (tokenizer.bos_id(), tokenizer.eos_id()) == (1, 2)


@pytest.mark.parametrize(("change", "message"), [
    ({"unknown_token_id": 5}, "its unknown_token_id is 5; the tokenizer has the ids 0 to 2"),
    ({"eos_token_id": -1}, "eos_token_id is -1"),
    ({"bos_token_id": 2**40}, "bos_token_id"), ({"bos_token_id": "1"}, "bos_token_id is '1'"),
    ({"scores": [0.0]}, "3 tokens, 1 scores"),
    ({"tokens": ["a", 3, "b"]}, "tokens that are no text"),
])  # fmt: skip
def test_a_tokenizer_in_gguf_whose_parts_do_not_fit_is_refused(tmp_path, change, message):
    fields = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>"],
        "scores": [0.0] * 3,
        "token_type": [2, 3, 3],
        "eos_token_id": 2,
    }
    assert gguf_tokenizer(tmp_path, {f"tokenizer.ggml.{name}": value for name, value in fields.items()})[0]
    with pytest.raises(UserError, match=message):
        gguf_tokenizer(tmp_path, {f"tokenizer.ggml.{name}": value for name, value in {**fields, **change}.items()})


def test_a_tokenizer_that_does_not_fit_is_refused(tiny_model, tmp_path, original):
    write_hf(tmp_path / "hf", tiny_model(1, **LLAMA))
    for content, message in (
        (original.serialized_model_proto(), "pieces, the model only 50"),
        (b"\x0a\x05damaged", "is damaged"),
    ):
        (tmp_path / "hf" / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            convert.convert(tmp_path / "hf", tmp_path / "out.pt")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # Llama 3's is byte-level BPE
    assert "byte-level BPE" in convert.convert(tmp_path / "hf", tmp_path / "out.pt")
