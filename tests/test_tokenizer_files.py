"""Tokenizers of public checkpoints, rebuilt, equal the originals; those that do not fit are refused."""

import io
import json
from functools import partial
from pathlib import Path

import pytest
import sentencepiece as spm

import convert
from common.errors import UserError
from decode import load_checkpoint
from formats.tokenizers.files import gguf_tokenizer, load_tokenizer
from formats.tokenizers.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, build_tokenizer, train_tokenizer
from formats.tokenizers.tokenizer import SentencePiece, encode_prompt
from tests.public import LLAMA, write_hf
from tests.test_bpe import json_content, with_special, write


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
    without = SentencePiece(build_tokenizer(tokens, scores, types, 0, None, 2, prefix))
    assert without.begin is None and encode_prompt(without, "cat") == original.encode("cat")


@pytest.mark.parametrize(("change", "message"), [
    ({"eos_token_id": 5}, "no tokenizer that can be read"), ({"scores": [0.0]}, "no tokenizer that can be read"),
    ({"model": "t5"}, "its tokenizer is t5, neither byte-level BPE nor sentencepiece"),
])  # fmt: skip
def test_a_tokenizer_in_gguf_whose_parts_do_not_fit_is_refused(tmp_path, change, message):
    fields = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>"], "scores": [0.0] * 3, "token_type": [2, 3, 3], "eos_token_id": 2}
    assert gguf_tokenizer(tmp_path, {f"tokenizer.ggml.{name}": value for name, value in fields.items()})
    assert gguf_tokenizer(tmp_path, {}) is None
    with pytest.raises(UserError, match=message):
        gguf_tokenizer(tmp_path, {f"tokenizer.ggml.{name}": value for name, value in {**fields, **change}.items()})


def test_a_tokenizer_that_does_not_fit_is_refused(tiny_model, tmp_path, original):
    """Also one whose pieces are no UTF-8 any more."""
    write_hf(tmp_path / "hf", tiny_model(1, **LLAMA))
    raw = original.serialized_model_proto()
    spoiled = raw.replace("▁cat".encode(), b"\xff" * 6)
    assert spoiled != raw
    for content, message in ((raw, "pieces, the model only 50"), (b"\x0a\x05damaged", "damaged"), (spoiled, "damaged")):
        (tmp_path / "hf" / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match=message):
            convert.convert(tmp_path / "hf", tmp_path / "out.pt")


# ---------------------------------------------------------------- byte-level BPE in the one file

SIZE = 269  # tokens of the tiny tokenizer of test_bpe


def converted(tiny_model, tmp_path, tokenizer=None, **files):
    """(report, tokenizer read back) of a folder with these files next to the weights."""
    write_hf(tmp_path / "hf", tiny_model(1, **{**LLAMA, "vocab_size": SIZE, "eos_id": None}))
    write(tmp_path / "hf", **files)
    report = convert.convert(tmp_path / "hf", tmp_path / "out.pt", tokenizer=tokenizer)
    return report, load_checkpoint(tmp_path / "out.pt")[1]


def test_byte_level_bpe_stays_in_the_one_file(tiny_model, tmp_path):
    """Texts end as the tokenizer says where the configuration does not."""
    files = {"tokenizer_json": json_content(), "tokenizer_config_json": {"eos_token": "<|end|>"}}
    report, tokenizer = converted(tiny_model, tmp_path, **files)
    assert "with its tokenizer" in report and tokenizer.to_blob() == with_special().to_blob()
    assert load_checkpoint(tmp_path / "out.pt")[0].config.ends == {266}


def test_a_sentencepiece_model_goes_before_the_tokenizer_json_beside_it(tiny_model, tmp_path):
    pieces = train_tokenizer([("", "one two three\nfour")] * 20, SIZE)
    files = {"tokenizer_model": pieces, "tokenizer_json": {"model": {"type": "Unigram"}}}
    _, tokenizer = converted(tiny_model, tmp_path, **files)
    assert tokenizer.to_blob() == pieces


def test_a_tokenizer_of_its_own_file_takes_the_place_of_one_that_cannot_be_read(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"Unigram, not byte-level BPE; --tokenizer none converts the model without"):
        converted(tiny_model, tmp_path, tokenizer_json={"model": {"type": "Unigram"}})
    report, tokenizer = converted(tiny_model, tmp_path, tokenizer=Path("none"))
    assert tokenizer is None and "without a tokenizer" in report
    own = tmp_path / "own"
    own.write_text(json.dumps(json_content()))
    _, tokenizer = converted(tiny_model, tmp_path, tokenizer=own)
    assert tokenizer.size == SIZE and tokenizer.begin == 267
    assert load_tokenizer(own) == tokenizer.to_blob() == load_tokenizer(tmp_path / "out.pt")
