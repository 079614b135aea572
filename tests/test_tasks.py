"""Tasks: what the model gets, where its answer ends, what is drawn."""

import json
from dataclasses import replace

import numpy as np
import pytest

from decode import generate
from decoding.settings import DecodeConfig
from evaluation.figures import quality_figures
from evaluation.tasks import OPENING, TASKS, find_task, openings, read_task, sample
from formats.data import Example, read_pairs, task_file
from formats.tokenizers.bpe import BPE
from formats.tokenizers.pieces import train_tokenizer
from formats.tokenizers.tokenizer import SentencePiece
from training.batches import LEARN
from training.start import prepare_data


def tokenizer_of(pairs) -> SentencePiece:
    return SentencePiece(train_tokenizer(pairs, 350))


@pytest.fixture(scope="module")
def with_separator():
    return tokenizer_of(list(read_pairs(task_file("translation", "dev")))[:300])


@pytest.fixture(scope="module")
def without():
    return tokenizer_of([("", f"{prompt}\n{text}") for prompt, text in list(read_pairs(task_file("translation", "dev")))[:300]])


def test_a_template_is_for_models_without_a_separator(with_separator, without):
    task = find_task("translation")
    assert task.text("Guten Tag.", with_separator) == "Guten Tag."
    assert task.text("Guten Tag.", without) == "German: Guten Tag.\nEnglish:\n"
    assert find_task("fairytaleqa").text("story\nQuestion: q?\nAnswer:\n", without) == "story\nQuestion: q?\nAnswer:\n"


@pytest.mark.parametrize("kind", ["with_separator", "without"])
@pytest.mark.parametrize(
    ("task", "file", "text"),
    [
        ("translation", "a.tsv", "Guten Tag\tGood day"),
        ("e2e", "a.csv", "mr,ref\nname[A],A is here"),
        ("file", "a.jsonl", '{"prompt": "eins", "completion": "one"}'),
        ("file", "a.tsv", "eins\tone"),
        ("e2e", "a.jsonl", '{"prompt": "name[A]", "references": ["A is here"]}'),
        ("file", "a.jsonl", '{"prompt": "eins\\n", "completion": "one"}'),
        ("samsum", "a.jsonl", '{"dialogue": "A: Ja?", "summary": "A asks."}'),
        ("squad", "a.jsonl", '{"context": "Ja.", "question": "Ja?", "answers": ["ja"]}'),
    ],
)
def test_training_and_evaluation_give_the_model_the_same_prompt(task, file, text, kind, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    (tmp_path / file).write_text(text)
    found = find_task(f"{task}={tmp_path / file}")
    (example,) = read_task(found, "test")
    prompt, _ = found.encode(example.prompt, tokenizer, 99)
    records = prepare_data((str(tmp_path / file),), tokenizer.blob, tmp_path, 99)
    assert [*records["token"][: len(prompt)]] == prompt
    assert list(np.flatnonzero(records["flags"] & LEARN)) == list(range(len(prompt), len(records)))


def test_solved_examples_come_before_every_prompt(without):
    task = find_task("e2e").with_shots([Example("a", ("A.", "other")), Example("b", ("B.",))])
    assert task.text("c", without) == "Facts: a\nSentence:\nA.\n\nFacts: b\nSentence:\nB.\n\nFacts: c\nSentence:\n"


def test_a_long_prompt_loses_its_left_but_not_its_start(with_separator):
    task = find_task("translation")
    whole, cut = task.encode("eins zwei drei vier", with_separator, 99)
    assert not cut and whole[0] == with_separator.begin
    short, cut = task.encode("eins zwei drei vier", with_separator, 5)
    assert cut and short == [whole[0], *whole[-4:]]


def test_a_long_prompt_has_no_start_to_keep_where_there_is_none(without, monkeypatch):
    monkeypatch.setattr(without, "begin", None)
    task = find_task("translation")
    whole, _ = task.encode("eins zwei drei vier", without, 99)
    assert task.encode("eins zwei drei vier", without, 5) == (whole[-5:], True)


def test_an_answer_of_one_line_ends_there(with_separator, without, tiny_model):
    assert find_task("translation").stop_tokens(with_separator) == find_task("stories").stop_tokens(without) == ()
    stops = find_task("translation").stop_tokens(without)
    assert without.encode("a\nb")[1] in stops and all("\n" in without.decode([token]) for token in stops)
    model = tiny_model()
    for verify in (False, True):
        config = DecodeConfig(confidence="softmax", threshold=0.3, max_owed=4, verify=verify, max_new_tokens=20)
        free = generate(model, [1, 2, 3], config).tokens
        stop = free[7]
        assert generate(model, [1, 2, 3], replace(config, stop_tokens=(49, stop))).tokens == free[: free.index(stop) + 1]


def test_a_line_ends_at_every_token_of_byte_level_bpe_that_has_one():
    """Of a tokenizer of the 256 bytes, and two of them together."""
    tokens = [bytes([byte]) for byte in range(256)] + [b".\n"]
    tokenizer = BPE(tokens, [(46, 10)], [], added={})
    task = find_task("translation")
    assert task.stop_tokens(tokenizer) == (10, 256)
    assert task.encode("a.", tokenizer, 99) == ([*b"German: a", 256, *b"English:\n"], False)


@pytest.mark.parametrize("name", ["translation", "e2e", "fairytaleqa", "stories"])
def test_included_tasks_are_there_and_score_their_references_fully(name):
    task = find_task(name)
    for split in ("dev", "test"):
        examples = read_task(task, split)
        assert len(examples) >= 15 and all(example.prompt and example.references for example in examples)
    references = [example.references for example in examples[:20]]
    scores = quality_figures(task, [texts[0] for texts in references], references)["scores"]
    assert list(scores) == list(task.metrics) and all(score > 0.99 for score in scores.values())


def test_a_file_of_your_own(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "p", "references": ["a", "b"]}\n')
    (tmp_path / "chat.jsonl").write_text(json.dumps({"dialogue": "A: hi", "summary": "s"}))
    mine, chat = find_task(f"file={tmp_path}/mine.jsonl"), find_task(f"samsum={tmp_path}/chat.jsonl")
    assert (mine.name, read_task(mine, "test")) == ("mine", [Example("p", ("a", "b"))])
    assert read_task(chat, "dev") == [Example("A: hi\nSummary:\n", ("s",))]
    assert list(chat.metrics) == ["rougeL", "rouge1", "rouge2"] and set(chat.metrics.values()) == {
        f"{name}_stem" for name in chat.metrics}  # fmt: skip


def test_openings_are_the_first_words_of_long_paragraphs_far_apart(tmp_path):
    lines = [" ".join(f"w{number}.{i}" for i in range(90 if number % 2 else 20)) for number in range(180)]
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "\n".join(lines)}))
    found = openings(tmp_path / "b.jsonl")
    assert len(found) == 30 and [example.prompt.split()[0] for example in found] == [f"w{number}.0" for number in range(1, 180, 6)]
    assert all(len(each.prompt.split()) == OPENING and len(each.references[0].split()) == 50 for each in found)


def test_a_sample_keeps_the_order_and_is_the_same_for_the_same_seed():
    examples = [Example(str(i), ("x",)) for i in range(50)]
    some = sample(examples, 10, 3)
    assert len(some) == 10 and some == sorted(some, key=examples.index) == sample(examples, 10, 3) != sample(examples, 10, 4)
    assert sample(examples, 0, 3) == sample(examples, 60, 3) == examples


def test_every_metric_of_every_task_exists_and_has_a_title():
    from evaluation.metrics import METRICS
    from evaluation.table import TITLES

    assert {name for task in TASKS.values() for name in task.metrics.values()} <= set(METRICS) & set(TITLES)
