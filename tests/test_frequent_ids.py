"""Frequent ids: counted as training sees the text, kept in a checkpoint or beside it, refused where they are
none."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

import decode
from common.errors import UserError, run
from decoding.choosing import DEFAULT_CHECKPOINT
from decoding.settings import DecodeConfig
from formats.checkpoint import read_checkpoint, save_checkpoint
from formats.frequent_ids import find_frequent_ids
from formats.tokenizer import encode_prompt
from model import load_checkpoint
from tools import shortlist

PAIRS = [(f"Guten Tag, das ist Satz {n}.", f"Good day, this is sentence {n}.") for n in range(25)]
EOS = 2  # of the embedded tokenizer


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    """A tiny model with the embedded tokenizer, in a file that holds something more."""
    tokenizer = read_checkpoint(DEFAULT_CHECKPOINT)["tokenizer"].numpy().tobytes()
    path = tmp_path / "tiny.pt"
    save_checkpoint(path, tiny_model(0, vocab_size=4096, eos_id=EOS), tokenizer, note="kept")
    return path


@pytest.fixture
def data(tmp_path):
    """Pairs, and a text without a prompt."""
    path = tmp_path / "data.jsonl"
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS] + [{"text": "Once more."}]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command; what it printed, and what it said on stderr."""

    def call(main, *words):
        monkeypatch.setattr("sys.argv", ["command", *map(str, words)])
        try:
            run(main)
        except SystemExit as end:
            assert end.code == 2
        return capsys.readouterr()

    return call


def expected_ids(checkpoint) -> list[int]:
    """By falling count, of equal counts the lower id first, counted once more, in another way."""
    _, tokenizer = load_checkpoint(checkpoint)
    counts = np.zeros(4096, int)
    for _, completion in PAIRS:
        np.add.at(counts, [*tokenizer.encode(completion), EOS], 1)
    np.add.at(counts, [*tokenizer.encode("Once more."), EOS], 1)
    order = np.argsort(-counts, kind="stable")
    return order[: np.count_nonzero(counts)].tolist()


def test_ids_go_by_falling_count_and_equal_counts_by_id():
    assert shortlist.by_count(Counter([7, 3, 3, 9, 9, 1])) == [3, 9, 1, 7]


def test_every_tenth_document_is_left_out():
    documents = [([1], [number]) for number in range(100, 125)]
    counts, held_counts, held = shortlist.count(documents)
    assert held == [([1], [109]), ([1], [119])] and held_counts == {109: 1, 119: 1}
    assert counts[1] == 0 == counts[109] and counts[110] == 1 and counts.total() == 23


def test_coverage_by_hand():
    """Of the completion 5 8 9 9 the list [5] holds one of four tokens; in decoding, after the prompt 5 5 8, 5
    is listed, 8 stands in the prompt, and the second 9 is in the text by then: three of four."""
    assert shortlist.coverage([5], [([5, 5, 8], [5, 8, 9, 9])]) == (1 / 4, 3 / 4)
    assert shortlist.coverage([5], [([5, 5, 8], [5, 8, 9, 9]), ([], [5])]) == (2 / 5, 4 / 5)


def test_a_copy_of_the_checkpoint_has_the_ids_and_all_else(checkpoint, data, command):
    out = checkpoint.with_name("counted.pt")
    said = command(shortlist.main, "--checkpoint", checkpoint, "--data", data, "--out", out)
    before, after = read_checkpoint(checkpoint), read_checkpoint(out)
    ids = after.pop("frequent_ids")
    assert ids.dtype == torch.int32 and ids.tolist() == expected_ids(checkpoint)
    assert after.keys() == before.keys() and after["note"] == "kept" and after["config"] == before["config"]
    assert all(torch.equal(after["weights"][name], weight) for name, weight in before["weights"].items())
    model, tokenizer = load_checkpoint(out)
    assert model.frequent_ids.dtype == torch.int64 and model.frequent_ids.tolist() == ids.tolist()
    assert tokenizer is not None and load_checkpoint(checkpoint)[0].frequent_ids is None
    assert f"{len(ids)} of 4,096 ids" in said.out and "on every 10th pair (2)" in said.out


def test_a_checkpoint_can_be_counted_anew_in_place_and_survives_a_failure(checkpoint, data, command, monkeypatch):
    command(shortlist.main, "--checkpoint", checkpoint, "--data", data, "--out", checkpoint)
    counted = checkpoint.read_bytes()
    assert load_checkpoint(checkpoint)[0].frequent_ids.tolist() == expected_ids(checkpoint)

    def full_disk(content, path):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full_disk)
    said = command(shortlist.main, "--checkpoint", checkpoint, "--data", data, "--out", checkpoint)
    assert "the old file is kept" in said.err and checkpoint.read_bytes() == counted


def test_the_ids_alone_are_a_small_file_that_outranks_the_checkpoint(checkpoint, data, command):
    out = checkpoint.with_name("ids.npy")
    command(shortlist.main, "--checkpoint", checkpoint, "--data", data, "--out", out)
    ids = np.load(out)
    assert ids.dtype == np.int32 and ids.tolist() == expected_ids(checkpoint)
    content = {"frequent_ids": torch.tensor([4, 2])}
    assert find_frequent_ids(None, checkpoint, None, content, 4096).tolist() == [4, 2]
    assert find_frequent_ids(out, checkpoint, None, content, 4096).tolist() == ids.tolist()
    assert find_frequent_ids(None, checkpoint, None, {}, 4096) is None
    out.rename(checkpoint.with_suffix(".ids.npy"))
    assert find_frequent_ids(None, checkpoint, None, {}, 4096).tolist() == ids.tolist()
    assert find_frequent_ids(None, checkpoint, checkpoint.with_name("heads.pt"), {}, 4096).tolist() == ids.tolist()
    np.save(checkpoint.with_name("heads.ids.npy"), ids[:3])
    assert find_frequent_ids(None, checkpoint, checkpoint.with_name("heads.pt"), {}, 4096).tolist() == ids[:3].tolist()
    assert load_checkpoint(checkpoint)[0].frequent_ids.tolist() == ids.tolist()
    assert find_frequent_ids(None, checkpoint, None, content, 4096).tolist() == [4, 2]


def test_the_flag_gives_a_checkpoint_its_ids(checkpoint, data, command, monkeypatch):
    out, seen = checkpoint.with_name("ids.npy"), []
    command(shortlist.main, "--checkpoint", checkpoint, "--data", data, "--out", out)
    words = ["--checkpoint", checkpoint, "--prompt", "Guten Tag", "--shortlist", 20, "--max-new-tokens", 3]
    assert "no frequent ids are known" in command(decode.main, *words).err
    stream = decode.stream

    def watched(model, prompt, config, *rest, **options):
        seen.append((model.frequent_ids.tolist(), config.shortlist))
        return stream(model, prompt, config, *rest, **options)

    monkeypatch.setattr(decode, "stream", watched)
    said = command(decode.main, *words, "--frequent-ids", out)
    assert seen == [(expected_ids(checkpoint), 20)] and "shortlist 20" in said.err


@pytest.mark.parametrize("ids, message", [
    ([3, 4096], "holds the id 4096, but the model's run from 0 to 4095"),
    ([-1, 3], "holds the id -1, but the model's run from 0 to 4095"),
    ([3, 5, 3], "holds an id twice"),
    ([[3, 5]], "no list of token ids"),
    ([], "no list of token ids"),
    ([0.5], "no list of token ids"),
    (["a"], "no list of token ids"),
])  # fmt: skip
def test_what_is_no_list_of_ids_is_refused_in_a_file_and_in_a_checkpoint(ids, message, checkpoint, tmp_path):
    array = np.array(ids, np.int64 if not ids or isinstance(ids[0], int) else None)
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(UserError, match=rf"bad\.npy: {message}"):
        load_checkpoint(checkpoint, frequent_ids=tmp_path / "bad.npy")
    inside = ids if array.dtype.kind == "U" else torch.from_numpy(array)
    with pytest.raises(UserError, match=rf"tiny\.pt, frequent_ids: {message}"):
        find_frequent_ids(None, checkpoint, None, {"frequent_ids": inside}, 4096)


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00", b"PK\x03\x04"])
def test_a_file_that_is_no_array_is_one_line(content, checkpoint, tmp_path):
    (tmp_path / "bad.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.npy: no list of token ids"):
        load_checkpoint(checkpoint, frequent_ids=tmp_path / "bad.npy")
    np.savez(tmp_path / "several.npz", np.arange(3))
    with pytest.raises(UserError, match=r"several\.npz: no list of token ids"):
        load_checkpoint(checkpoint, frequent_ids=tmp_path / "several.npz")
    with pytest.raises(UserError, match=r"gone\.npy: no such file"):
        load_checkpoint(checkpoint, frequent_ids=tmp_path / "gone.npy")


def test_mistakes_of_the_command_are_one_line_and_write_nothing(checkpoint, data, command, tiny_model, tmp_path):
    bare, blank, out = tmp_path / "bare.pt", tmp_path / "blank.txt", tmp_path / "out.npy"
    save_checkpoint(bare, tiny_model(0), None)
    blank.write_text("  \n")
    before, text = set(tmp_path.iterdir()), data.read_bytes()
    for words, message in [
        (("--checkpoint", bare, "--data", data, "--out", out), "bare.pt: has no tokenizer"),
        (("--checkpoint", checkpoint, "--data", blank, "--out", out), "blank.txt: holds no data"),
        (("--checkpoint", checkpoint, "--data", tmp_path / "gone.txt", "--out", out), "gone.txt: no such data file"),
        (("--checkpoint", checkpoint, "--data", data, "--out", data), "is read, and would be overwritten"),
        (("--checkpoint", checkpoint, "--data", data, "--out", tmp_path), "is no regular file"),
    ]:
        said = command(shortlist.main, *words)
        assert said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1
    assert set(tmp_path.iterdir()) == before and data.read_bytes() == text


def test_a_corpus_too_small_to_leave_pairs_out_is_counted_whole(checkpoint, command, tmp_path):
    text, out = tmp_path / "one.txt", tmp_path / "ids.npy"
    text.write_text("Once upon a time.")
    said = command(shortlist.main, "--checkpoint", checkpoint, "--data", text, "--out", out)
    _, tokenizer = load_checkpoint(checkpoint)
    assert "on every 10th pair" not in said.out
    assert set(np.load(out).tolist()) == {*tokenizer.encode("Once upon a time."), EOS}


def test_decoding_goes_on_from_counted_ids(checkpoint, data, command):
    """With all ids of the corpus listed, verified text is the full model's."""
    out = checkpoint.with_name("counted.pt")
    command(shortlist.main, "--checkpoint", checkpoint, "--data", data, "--out", out)
    model, tokenizer = load_checkpoint(out)
    prompt = encode_prompt(tokenizer, "Guten Tag")
    config = DecodeConfig(
        max_new_tokens=12, confidence="softmax", threshold=0.0, verify=True, shortlist=len(model.frequent_ids), exit_layers=(5,), max_owed=4
    )
    assert decode.generate(model, prompt, config).tokens == decode.generate(model, prompt, config.full()).tokens
