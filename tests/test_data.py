"""Data: every format and its mistakes, the tokenizer, and the promise of packing: each document once an
epoch, its completion learned."""

import gzip
import itertools
import json
import lzma
import re
from collections import Counter

import numpy as np
import pytest

from common.errors import UserError
from formats import data
from formats.checkpoint import save_checkpoint
from formats.data import Example, read_examples, read_pairs, task_file
from formats.tokenizers.files import load_tokenizer
from formats.tokenizers.pieces import SEP, build_tokenizer, train_tokenizer
from formats.tokenizers.tokenizer import SentencePiece, encode_prompt
from training import batches as batching
from training.batches import LEARN, START, batches, cut_text

TASKS = ("translation", "e2e")
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
LENGTH = 64  # of the rows in the tests of packing


def included_pairs(count: int) -> list[tuple[str, str]]:
    """The first pairs of each task's dev file."""
    return [pair for task in TASKS for pair in itertools.islice(read_pairs(task_file(task, "dev")), count)]


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePiece(train_tokenizer(included_pairs(150), 400))


@pytest.fixture
def prepare(tokenizer, tmp_path):
    """pairs -> (array, statistics), by way of the file."""

    def prepare(pairs, length: int = LENGTH):
        stats = batching.tokenize(pairs, tokenizer, tmp_path / "tokens.npy", length)
        assert [path.name for path in tmp_path.iterdir()] == ["tokens.npy"]  # nothing half-written stays behind
        return np.load(tmp_path / "tokens.npy", mmap_mode="r"), stats

    return prepare


@pytest.fixture(scope="module")
def short_pairs(tokenizer):
    """200 distinct pairs of all sizes up to what fills a row."""
    pairs = dict.fromkeys((prompt[:12], text[: 4 + 7 * i % 60]) for i, (prompt, text) in enumerate(included_pairs(150)))
    return [pair for pair in pairs if len(learned_document(tokenizer, *pair)[0]) <= LENGTH][:200]


def learned_document(tokenizer, prompt: str, completion: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Inputs and targets of one document, from the definition: [bos] prompt [sep] completion [eos], learned
    after [sep]."""
    before = [tokenizer.begin, *tokenizer.encode(prompt), tokenizer.separator]
    after = [*tokenizer.encode(completion), tokenizer.ends[0]]
    return tuple((before + after)[:-1]), tuple([-1] * (len(before) - 1) + after)


def unpack(batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Inputs and targets of every document in a batch, row by row."""
    documents = []
    for inputs, targets, numbers in zip(batch.inputs.tolist(), batch.targets.tolist(), batch.documents.tolist()):
        for number in sorted(set(numbers) - {0}):
            at = [i for i, n in enumerate(numbers) if n == number]
            documents.append((tuple(inputs[i] for i in at), tuple(targets[i] for i in at)))
    return documents


def epochs(array, count: int, seed: int = 0, rows: int = 3) -> list[list]:
    """The documents of the first `count` epochs; a batch belongs to one epoch."""
    stream, size, found = batches(array, rows, LENGTH, seed), int((array["flags"] & batching.START > 0).sum()), []
    for _ in range(count):
        epoch = []
        while len(epoch) < size:
            epoch += unpack(next(stream))
        found.append(epoch)
    return found


# ---------------------------------------------------------------- readers

PAIRS = [("name[Café Größe]", "Ein Café, „groß“ 😀"), ("漢字, two", 'she said "no"'), ("name[Café Größe]", "second reference")]
FILES = {
    ".csv": 'mr,ref\nname[Café Größe],"Ein Café, „groß“ 😀"\r\n"漢字, two","she said ""no"""\nname[Café Größe],second reference\n',
    ".tsv": "\r\n".join("\t".join(pair) for pair in PAIRS),
    ".jsonl": "\n".join(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) for prompt, text in PAIRS),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("ending", COMPRESS)
def test_every_format_gives_the_same_pairs_compressed_or_not(tmp_path, kind, ending):
    path = tmp_path / f"some.data{kind}{ending}"
    path.write_bytes(COMPRESS[ending](f"{FILES[kind]}\n\n".encode()))  # empty lines at the end hold nothing
    assert list(read_pairs(path)) == list(read_pairs(str(path))) == PAIRS
    assert read_examples(path) == [Example(PAIRS[0][0], (PAIRS[0][1], PAIRS[2][1])), Example(PAIRS[1][0], (PAIRS[1][1],))]


@pytest.mark.parametrize("ending", COMPRESS)
def test_plain_text_is_one_document_without_a_prompt_and_kept_as_it_is(tmp_path, ending):
    (tmp_path / f"a.txt{ending}").write_bytes(COMPRESS[ending](" Größe\n\n  two\r\n".encode()))
    assert list(read_pairs(tmp_path / f"a.txt{ending}")) == [("", " Größe\n\n  two\r\n")]


def test_json_lines_may_list_several_references_or_hold_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "references": ["one", "two"], "id": 7}\n{"text": "one\\ntwo", "title": "x"}\n')
    assert read_examples(tmp_path / "a.jsonl") == [Example("p", ("one", "two")), Example("", ("one\ntwo",))]


@pytest.mark.parametrize("name, content, complaint", [
    ("text.jsonl", '{"text": " "}\n', "text.jsonl, line 1: needs a non-empty text"),
    ("three.tsv", "a\tb\n\nc\td\te\n", "line 3: has 3 columns; 2 are needed"),
    ("one.csv", 'mr,ref\na,"b\nb"\nc\n', "line 4: needs two non-empty texts"),
    ("more.csv", "mr,ref\na,b,c\n", "line 2: has more columns than the header"),
    ("header.csv", "meaning,text\na,b\n", "line 1: the header must name the columns mr and ref"),
    ("bad.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', "line 2: not JSON"),
    ("empty.txt", " \n", "holds no data"),
    ("latin1.txt", "a\nb\nGröße".encode("latin-1"), "latin1.txt: is not valid UTF-8"),
    ("truncated.tsv.xz", lzma.compress(b"a\tb\n" * 9)[:-20], "damaged, or not in a known layout"),
    ("corrupt.tsv.gz", gzip.compress(bytes(range(32, 127)) * 99)[:40] + b"?" * 40, "damaged, or not in a known layout"),
    ("quote.csv", 'mr,ref\na,"b\nc,d\n', "line 3: not CSV (unexpected end of data)"),
    ("data.yaml", "{}", "unknown kind of data file; its name must end in .csv, .tsv, .jsonl, .json, .txt"),
    ("missing/a.tsv", None, "no such data file"),
])  # fmt: skip
def test_a_malformed_file_is_named_in_one_line_with_what_is_wrong(tmp_path, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(complaint)) as error:
        list(read_pairs(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)


MIXED = {
    ".tsv": b"a\tb\nGr\xf6\xdfe\tx\nc\td\n",
    ".csv": b'mr,ref\na,b\nGr\xf6\xdfe,x\n"one" two,x\nc,d\n',
    ".jsonl": b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xf6", "completion": "x"}\n{\n'
              b'{"prompt": "c", "completion": "d"}\n',
    ".json": b'[{"prompt": "a", "completion": "b"}, {"prompt": "\xf6", "completion": "x"}, '
             b'{"prompt": "c", "completion": "d"}]',
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("ending", COMPRESS)
def test_a_bad_line_is_skipped_alone_where_that_is_asked_for(tmp_path, kind, ending):
    path, skipped = tmp_path / f"mixed{kind}{ending}", []
    path.write_bytes(COMPRESS[ending](MIXED[kind]))
    assert list(read_pairs(path, skipped)) == [("a", "b"), ("c", "d")]
    assert len(skipped) == {".csv": 2, ".jsonl": 2}.get(kind, 1)
    assert all(re.match(rf".*mixed{kind}{ending}, (line|record) \d: ", line) and "\n" not in line for line in skipped)


def test_columns_of_e2e_are_found_by_name(tmp_path):
    """The cleaned set has mr,ref,fixed,orig_mr."""
    (tmp_path / "a.csv").write_text('fixed,ref,mr\nTrue,"b, c",a\n')
    assert list(read_pairs(tmp_path / "a.csv")) == [("a", "b, c")]


@pytest.mark.parametrize("task", TASKS)
def test_included_files_are_found_from_anywhere_and_share_no_prompt(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = [read_examples(task_file(task, split)) for split in ("train", "dev", "test")]
    train, dev, test = ({example.prompt for example in examples} for examples in sets)
    assert min(len(dev), len(test)) > 500 and len(train) > 4000
    assert not train & dev and not train & test and not dev & test


# ---------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("text", ["Café naïve £20", "Größe, äöüß", "👩‍🚀 🎉", "漢字かな 한국어", "two\nlines\tand a tab", "e\u0301 ﬁ ① x²"])
def test_the_tokenizer_represents_every_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.model.unk_id() not in ids


def test_a_prompt_is_encoded_between_bos_and_one_separator(tokenizer, monkeypatch):
    sep = tokenizer.separator
    assert tokenizer.size == 400 and tokenizer.encode(SEP)[-1] == sep and tokenizer.piece(sep) == SEP
    assert encode_prompt(tokenizer, "Hallo du!") == [tokenizer.begin, *tokenizer.encode("Hallo du!"), sep]
    monkeypatch.setattr("formats.tokenizers.tokenizer.SEP", "<a piece that it lacks>")
    without = SentencePiece(tokenizer.to_blob())
    assert without.separator is None and encode_prompt(without, "Hallo du!") == [tokenizer.begin, *tokenizer.encode("Hallo du!")]


def test_a_vocabulary_that_the_text_cannot_fill_is_smaller_and_one_that_cannot_hold_it_is_named():
    pairs = [("", "one two three")] * 20
    assert 256 < SentencePiece(train_tokenizer(pairs, 100_000)).size < 400
    with pytest.raises(ValueError, match="no tokenizer of 10 pieces") as error:
        train_tokenizer(pairs, 10)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- documents and batches


def test_every_document_comes_once_an_epoch_with_exactly_its_completion_learned(tokenizer, prepare, short_pairs):
    array, stats = prepare(short_pairs)
    expected = [learned_document(tokenizer, *pair) for pair in short_pairs]
    in_order = [document for batch in batches(array, 3, LENGTH, seed=None) for document in unpack(batch)]
    assert len(short_pairs) > 150 and Counter(in_order) == Counter(expected)
    assert all(Counter(epoch) == Counter(expected) for epoch in epochs(array, 3))
    assert stats == {
        "documents": len(expected),
        "tokens": sum(len(inputs) + 1 for inputs, _ in expected),
        "learned": sum(target >= 0 for _, targets in expected for target in targets),
        "shortened": 0,
    }


def test_documents_lie_side_by_side_numbered_from_one_and_little_is_padding_which_teaches_nothing(prepare, short_pairs):
    packed = list(batches(prepare(short_pairs)[0], 3, LENGTH, seed=None))
    assert any((batch.documents == 0).any() for batch in packed) and any(batch.documents.max() > 2 for batch in packed)
    for batch in packed:
        assert batch.inputs.shape == batch.targets.shape == batch.documents.shape == (3, LENGTH)
        assert (batch.targets[batch.documents == 0] == -1).all()
        for numbers in batch.documents:
            used = numbers[numbers > 0]
            assert (numbers[len(used) :] == 0).all() and set(np.diff(used, prepend=0)) <= {0, 1}
    assert np.mean([batch.documents > 0 for batch in packed[:-1]]) > 0.85


def test_the_order_depends_on_seed_and_epoch_alone(prepare, short_pairs):
    array, _ = prepare(short_pairs)
    np.random.seed(1)
    first, second = epochs(array, 2)
    np.random.seed(2)
    assert [first, second] == epochs(array, 2)
    assert first != second and sorted(first) == sorted(second) and first != epochs(array, 1, seed=1)[0]


@pytest.mark.parametrize("seed", [0, 5, None])
def test_starting_at_a_batch_equals_dropping_those_before_and_each_process_gets_every_other(prepare, short_pairs, seed):
    array, _ = prepare(short_pairs)
    whole = [unpack(batch) for batch in itertools.islice(batches(array, 3, LENGTH, seed), 120)]
    for start in (1, 7, 100 if seed is not None else 20):  # 100 lies in a later epoch
        for every in (1, 2):
            expected = whole[start::every]
            resumed = itertools.islice(batches(array, 3, LENGTH, seed, start, every), len(expected))
            assert [unpack(batch) for batch in resumed] == expected != []


def test_a_document_that_is_too_long_loses_the_left_of_its_prompt_and_is_counted(tokenizer, prepare):
    long_prompt, long_answer = "a very long prompt " * 9 + "its end", "a very long answer " * 9
    pairs = [("a short prompt", "yes"), (long_prompt, "an answer"), ("a prompt", long_answer)]
    array, stats = prepare(pairs)
    short, long, answer = itertools.chain(*(unpack(batch) for batch in batches(array, 1, LENGTH, seed=None)))
    inputs, targets = learned_document(tokenizer, *pairs[1])
    assert len(inputs) > LENGTH and long == ((inputs[0], *inputs[1 - LENGTH :]), targets[-LENGTH:])  # [bos] stays
    body, ends = tuple(tokenizer.encode(pairs[2][1])), (tokenizer.begin, tokenizer.separator)
    assert len(body) > LENGTH
    assert answer == ((*ends, *body[: LENGTH - 2]), (-1, *body[: LENGTH - 1]))  # as does [sep]; then its own end
    assert short == learned_document(tokenizer, *pairs[0]) and stats["shortened"] == 2


def test_a_text_is_cut_at_line_ends_and_every_token_learned_once(tokenizer, prepare):
    text = "\n\n".join(completion for _, completion in included_pairs(20)) + "\n"
    for length in (150, 300, 100_000):
        array, stats = prepare([("", text)], length)
        learned = [list(part["token"]) for part in np.split(array, np.flatnonzero(array["flags"] & START)[1:])]
        assert all(part.pop(0) == tokenizer.begin and len(part) <= length for part in learned)
        assert learned[-1].pop() == tokenizer.ends[0]
        assert all((part["flags"] == LEARN) | (part["flags"] == START) for part in array)
        parts = [tokenizer.decode(list(map(int, part))) for part in learned]
        assert "".join(parts) == text and all(part.endswith("\n") for part in parts)
        assert stats["documents"] == len(parts) and stats["learned"] == sum(map(len, learned)) + 1


def test_a_line_longer_than_a_document_is_cut(tokenizer):
    line = "a long line with no end " * 9
    ids = [*tokenizer.encode(line), tokenizer.ends[0]]
    assert list(cut_text(line, tokenizer, 7)) == [ids[i : i + 7] for i in range(0, len(ids), 7)]


def test_a_tokenizer_has_a_separator_only_where_there_are_prompts():
    tokenizer = SentencePiece(train_tokenizer([("", "one two three\nfour")] * 20, 280))
    assert SEP not in [tokenizer.piece(i) for i in range(280)]
    assert encode_prompt(tokenizer, "one two") == [tokenizer.begin, *tokenizer.encode("one two")]


# ---------------------------------------------------------------- tasks' own formats

QA = {"id": "x", "context": "A king had a ring.", "question": "Who had it?", "answers": ["the king", "a king"]}
SQUAD = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": QA["context"], "qas": [
    {"id": "1", "question": QA["question"], "answers": [{"text": text, "answer_start": 0} for text in QA["answers"]]},
]}]}]}  # fmt: skip
ASKED = ("A king had a ring.\nQuestion: Who had it?\nAnswer:\n", ("the king", "a king"))
SAID = ("A: hi\nB: ho\nSummary:\n", ("They greet.",))


@pytest.mark.parametrize("name, content, expected", [
    ("fairytaleqa.jsonl", json.dumps(QA), ASKED),
    ("squad.jsonl", json.dumps({**QA, "answers": {"text": QA["answers"], "answer_start": [0, 1]}}), ASKED),
    ("squad.json", json.dumps(SQUAD), ASKED),
    ("listed.jsonl", json.dumps({**QA, "answers": [{"text": text} for text in QA["answers"]]}), ASKED),
    ("samsum.jsonl", json.dumps({"dialogue": "A: hi\r\nB: ho", "summary": "They greet."}), SAID),
    ("samsum.json", json.dumps([{"dialogue": "A: hi\nB: ho", "summary": "They greet."}]), SAID),
])  # fmt: skip
def test_a_tasks_own_format_becomes_prompts_and_references(name, content, expected, tmp_path):
    (tmp_path / name).write_text(content)
    assert read_examples(tmp_path / name) == [Example(*expected)]


def test_documents_of_a_tokenizer_without_a_start_have_none_and_one_without_an_end_is_refused(tmp_path):
    pieces, kinds = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b"], [2, 3, *[6] * 256, 1, 1]

    def build(eos: int | None) -> SentencePiece:
        return SentencePiece(build_tokenizer(pieces, [0.0] * 260, kinds, 0, None, eos, True))

    stats = batching.tokenize([("", "ab"), ("a", "b")], build(1), tmp_path / "x.npy", 20)
    records = np.load(tmp_path / "x.npy")
    assert stats["documents"] == 2 and list(np.flatnonzero(records["flags"] & START)) == [0, 3]
    with pytest.raises(ValueError, match="no piece for the end of a text"):
        batching.tokenize([("a", "b")], build(None), tmp_path / "y.npy", 20)


def test_questions_without_an_answer_are_left_out(tmp_path):
    """SQuAD 2.0 as it is published, and with its answers in lists side by side."""
    squad = json.loads(json.dumps(SQUAD))
    squad["data"][0]["paragraphs"][0]["qas"].append({"id": "2", "question": "Who lost it?", "answers": [], "is_impossible": True})
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    assert read_examples(tmp_path / "squad.json") == [Example(*ASKED)]
    asked = {"context": "c", "question": "q", "answers": {"text": [], "answer_start": []}}
    assert list(data.from_record(asked, "here")) == []
    (found,) = data.from_record({**asked, "answers": []}, "here")  # not marked: malformed
    assert isinstance(found, UserError)


def test_a_tokenizer_comes_from_a_checkpoint_or_a_file_of_its_own(tokenizer, tiny_model, tmp_path):
    raw = tokenizer.to_blob()
    (tmp_path / "own.model").write_bytes(raw)
    save_checkpoint(tmp_path / "with.pt", tiny_model(), raw)
    save_checkpoint(tmp_path / "without.pt", tiny_model(), None)
    assert load_tokenizer(tmp_path / "own.model") == raw == load_tokenizer(tmp_path / "with.pt")
    with pytest.raises(ValueError, match=r"without.pt: has no tokenizer"):
        load_tokenizer(tmp_path / "without.pt")
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(ValueError, match=r"text\.model: the tokenizer: damaged, or no sentencepiece model"):
        load_tokenizer(tmp_path / "text.model")
