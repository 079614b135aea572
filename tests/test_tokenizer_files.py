"""Tokenizers beside public checkpoints, rebuilt, equal the originals; those that do not fit are refused."""

import base64
import io
import json
import struct
from functools import partial
from pathlib import Path

import pytest
import sentencepiece as spm

import convert
from common.errors import UserError
from formats.bpe_sources import from_gguf, from_json
from formats.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, build_tokenizer, train_tokenizer
from formats.tokenizer import SentencePiece, encode_prompt
from formats.tokenizer_files import gguf_tokenizer, load_tokenizer
from model import load_checkpoint
from tests.public import LLAMA, write_hf, write_llama2c, write_meta
from tests.test_bpe import SAMPLE, gguf_fields, json_content, write


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
    rebuilt = SentencePiece(build_tokenizer(tokens, scores, types, 0, 1, 2, prefix))
    for text in TEXTS:
        ids = original.encode(text)
        assert rebuilt.encode(text) == ids
        assert rebuilt.decode(ids) == original.decode(ids) == text
    assert (rebuilt.begin, rebuilt.ends, rebuilt.model.unk_id(), rebuilt.model.pad_id()) == (1, (2,), 0, -1)
    assert encode_prompt(rebuilt, "cat") == [1, *original.encode("cat")]


def test_a_tokenizer_without_bos_puts_none(original):
    tokens, scores, types = described(original)
    rebuilt = SentencePiece(build_tokenizer(tokens, scores, types, 0, None, 2, True))
    assert rebuilt.begin is None and encode_prompt(rebuilt, "cat") == rebuilt.encode("cat")


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
    assert (tokenizer.begin, tokenizer.ends) == (1, (2,))


@pytest.mark.parametrize(("change", "message"), [
    ({"unknown_token_id": 5}, "its unknown_token_id is 5; the tokenizer has the ids 0 to 2"),
    ({"eos_token_id": -1}, "eos_token_id is -1"),
    ({"bos_token_id": 2**40}, "bos_token_id"), ({"bos_token_id": "1"}, "bos_token_id is '1'"),
    ({"scores": [0.0]}, "3 tokens, 1 scores"),
    ({"tokens": ["a", 3, "b"]}, "tokens that are no text"),
])  # fmt: skip
def test_a_tokenizer_in_gguf_whose_parts_do_not_fit_is_refused(tmp_path, change, message):
    fields = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>"], "scores": [0.0] * 3, "token_type": [2, 3, 3], "eos_token_id": 2}
    assert gguf_tokenizer(tmp_path, {f"tokenizer.ggml.{name}": value for name, value in fields.items()})[0]
    with pytest.raises(UserError, match=message):
        gguf_tokenizer(tmp_path, {f"tokenizer.ggml.{name}": value for name, value in {**fields, **change}.items()})


def test_a_tokenizer_that_does_not_fit_is_refused(tiny_model, tmp_path, original):
    write_hf(tmp_path / "hf", tiny_model(1, **LLAMA))
    for content, message in ((original.serialized_model_proto(), "pieces, the model only 50"), (b"\x0a\x05damaged", "is damaged")):
        (tmp_path / "hf" / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            convert.convert(tmp_path / "hf", tmp_path / "out.pt")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # Llama 3's ranks, and 256 special tokens
    with pytest.raises(ValueError, match="has 258 pieces, the model only 50"):
        convert.convert(tmp_path / "hf", tmp_path / "out.pt")


# ---------------------------------------------------------------- byte-level BPE in the one file

SIZE = 269  # tokens of the tiny tokenizer of test_bpe


def converted(tiny_model, tmp_path, tokenizer=None, **files):
    """(report, tokenizer read back) of a folder with these files beside the weights."""
    write_hf(tmp_path / "hf", tiny_model(1, **{**LLAMA, "vocab_size": SIZE}))
    write(tmp_path / "hf", **files)
    report = convert.convert(tmp_path / "hf", tmp_path / "out.pt", tokenizer=tokenizer)
    return report, load_checkpoint(tmp_path / "out.pt")[1]


def test_byte_level_bpe_stays_in_the_one_file(tiny_model, tmp_path):
    report, tokenizer = converted(tiny_model, tmp_path, tokenizer_json=json_content())
    original = from_json(json_content())
    assert "with its tokenizer" in report
    assert tokenizer.encode(SAMPLE) == original.encode(SAMPLE) and tokenizer.begin == 267
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE


def test_a_sentencepiece_model_goes_before_the_tokenizer_json_beside_it(tiny_model, tmp_path):
    pieces = train_tokenizer([("", "one two three\nfour")] * 20, SIZE)
    files = {"tokenizer_model": pieces, "tokenizer_json": {"model": {"type": "Unigram"}}}
    _, tokenizer = converted(tiny_model, tmp_path, **files)
    assert tokenizer.to_blob() == pieces


@pytest.mark.parametrize("kind", ["tokenizer.json", "ranks"])
def test_a_tokenizer_of_its_own_file_takes_the_place_of_one_that_cannot_be_read(tiny_model, tmp_path, kind):
    """A file of ranks is known by its lines, whatever its name."""
    with pytest.raises(UserError, match=r"Unigram, not byte-level BPE; --tokenizer none converts the model without"):
        converted(tiny_model, tmp_path, tokenizer_json={"model": {"type": "Unigram"}})
    report, tokenizer = converted(tiny_model, tmp_path, tokenizer=Path("none"))
    assert tokenizer is None and "without a tokenizer" in report
    own = tmp_path / "own"
    if kind == "ranks":
        lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(13)]
        own.write_bytes(b"\n".join(lines))
    else:
        own.write_text(json.dumps(json_content()))
    _, tokenizer = converted(tiny_model, tmp_path, tokenizer=own)
    assert tokenizer.size == SIZE and tokenizer.begin == {"ranks": 13, "tokenizer.json": 267}[kind]
    assert load_tokenizer(own) == tokenizer.to_blob() == load_tokenizer(tmp_path / "out.pt")


def test_texts_end_as_the_tokenizer_says_where_the_configuration_does_not(tiny_model, tmp_path):
    """Meta's folder of Llama 3: params.json has no ids."""
    model = tiny_model(2, **{**LLAMA, "vocab_size": SIZE})
    write_meta(tmp_path / "meta", model, 1)
    lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(13)]
    (tmp_path / "meta" / "tokenizer.model").write_bytes(b"\n".join(lines))
    convert.convert(tmp_path / "meta", tmp_path / "out.pt", max_len=64)
    loaded, tokenizer = load_checkpoint(tmp_path / "out.pt")
    assert loaded.config.ends == {14, 21, 22} == set(tokenizer.ends)


def test_byte_level_bpe_in_gguf(tmp_path):
    blob, note = gguf_tokenizer(tmp_path, gguf_fields())
    assert not note and blob == from_gguf(gguf_fields()).to_blob()
    with pytest.raises(UserError, match=r"unknown splitting rule 'new' .*; --tokenizer none converts"):
        gguf_tokenizer(tmp_path, gguf_fields(pre="new"))
    assert gguf_tokenizer(tmp_path, {"tokenizer.ggml.model": "t5"})[0] is None
