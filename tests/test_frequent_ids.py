"""Frequent ids: counted as training sees the text, kept in a checkpoint or next to it, refused where they are
none."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

import decode
from common.errors import UserError
from decode import load_checkpoint
from decoding.presets import DEFAULT_CHECKPOINT
from decoding.shortlist import find_frequent_ids
from formats.checkpoint import read_checkpoint, save_checkpoint
from tools import shortlist

PAIRS = [(f"Guten Tag, das ist Satz {n}.", f"Good day, this is sentence {n}.") for n in range(25)]
EOS = 2  # of the included tokenizer


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    """A tiny model with the included tokenizer, in a file that holds something more."""
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
    counts, held = shortlist.count(documents)
    assert held == [([1], [109]), ([1], [119])]
    assert counts[1] == 0 == counts[109] and counts[110] == 1 and counts.total() == 23


def test_coverage_by_hand():
    """Of the completion 5 8 9 9 the list [5] holds one of four tokens; in decoding, after the prompt 5 5 8, 5
    is listed, 8 stands in the prompt, and the second 9 is in the text by then: three of four."""
    assert shortlist.coverage([5], [([5, 5, 8], [5, 8, 9, 9])]) == (1 / 4, 3 / 4)
    assert shortlist.coverage([5], [([5, 5, 8], [5, 8, 9, 9]), ([], [5])]) == (2 / 5, 4 / 5)


@pytest.fixture
def count(checkpoint, data, command):
    """Counts the ids of the data for the checkpoint; what the command printed and said."""
    return lambda out, **more: command(shortlist.main, *words_of({"checkpoint": checkpoint, "data": data, "out": out, **more}))


def words_of(flags: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def test_ids_are_those_of_the_file_named_then_of_the_checkpoint_then_of_a_file_next_to_it(checkpoint, count):
    out, heads = checkpoint.with_name("ids.npy"), checkpoint.with_name("heads.pt")
    printed, _, status = count(out)
    ids = np.load(out)
    assert status is None and f"{len(ids)} of 4,096 ids" in printed and "coverage of every 10th pair (2, not counted here)" in printed
    assert ids.dtype == np.int32 and ids.tolist() == expected_ids(checkpoint)

    def found(file=None, beside=None, **content) -> list[int] | None:
        ids = find_frequent_ids(file, checkpoint, beside, content, 4096)
        return None if ids is None else ids.tolist()

    inside = torch.tensor([4, 2])
    assert found(out, frequent_ids=inside) == ids.tolist() and found(frequent_ids=inside) == [4, 2] and found() is None
    out.rename(checkpoint.with_suffix(".ids.npy"))
    assert found() == found(beside=heads) == load_checkpoint(checkpoint)[0].frequent_ids.tolist() == ids.tolist()
    np.save(heads.with_suffix(".ids.npy"), ids[:3])
    assert found(beside=heads) == ids[:3].tolist() and found(frequent_ids=inside) == [4, 2]


def test_the_flag_gives_a_checkpoint_its_ids(checkpoint, count, command):
    out = checkpoint.with_name("ids.npy")
    count(out)
    words = words_of({"checkpoint": checkpoint, "prompt": "Guten Tag", "shortlist": 20, "max-new-tokens": 3})
    for more, said, ended in ([], "no frequent ids are known", 2), ([f"--frequent-ids={out}"], "shortlist 20", None):
        _, err, status = command(decode.main, *words, *more)
        assert said in err and status == ended
    assert load_checkpoint(checkpoint, frequent_ids=out)[0].frequent_ids.tolist() == expected_ids(checkpoint)


@pytest.mark.parametrize("ids, message", [
    ([3, 4096], "holds the id 4096"), ([-1, 3], "holds the id -1"), ([3, 5, 3], "holds an id twice"),
    *[(ids, "is not a list of token ids") for ids in ([[3, 5]], [], [0.5], ["a"])],
])  # fmt: skip
def test_what_is_no_list_of_ids_is_refused_in_a_file_and_in_a_checkpoint(ids, message, checkpoint, tmp_path):
    array = np.array(ids, np.int64 if not ids or isinstance(ids[0], int) else None)
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(UserError, match=rf"bad\.npy: {message}"):
        load_checkpoint(checkpoint, frequent_ids=tmp_path / "bad.npy")
    inside = ids if array.dtype.kind == "U" else torch.from_numpy(array)
    with pytest.raises(UserError, match=rf"tiny\.pt, frequent_ids: {message}"):
        find_frequent_ids(None, checkpoint, None, {"frequent_ids": inside}, 4096)


def test_mistakes_of_the_command_are_one_line_and_write_nothing(checkpoint, data, count, tiny_model, tmp_path):
    bare, blank, out = tmp_path / "bare.pt", tmp_path / "blank.txt", tmp_path / "out.npy"
    save_checkpoint(bare, tiny_model(0), None)
    blank.write_text("  \n")
    before, text = set(tmp_path.iterdir()), data.read_bytes()
    for flags, message in (
        ({"checkpoint": bare, "out": out}, "bare.pt: has no tokenizer"),
        ({"data": blank, "out": out}, "blank.txt: holds no data"),
        ({"data": tmp_path / "gone.txt", "out": out}, "gone.txt: no such data file"),
        ({"out": data}, "and would be overwritten"),
        ({"out": tmp_path / "counted.pt"}, "counted.pt: ids are written to a file that ends in .npy"),
    ):
        _, err, status = count(**flags)
        assert status == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert set(tmp_path.iterdir()) == before and data.read_bytes() == text
