"""What is asked of a model, and how an answer is scored: prompts, where an answer ends, and the metrics of every task."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from evaluation.metrics import SCORES
from formats import data
from formats.data import Example
from formats.tokenizer import SEP, encode_prompt

TITLES = {"bleu": "BLEU", "bleu_lower": "BLEU (lower case)", "rougeL_coco": "ROUGE-L (COCO)", "rougeL": "ROUGE-L",
          "rouge1_stem": "ROUGE-1 (stems)", "rouge2_stem": "ROUGE-2 (stems)", "rougeL_stem": "ROUGE-L (stems)",
          "rougeLsum_stem": "ROUGE-Lsum (stems)", "exact_match": "exact match", "f1": "F1"}  # fmt: skip
OPENING, OPENINGS = 40, 30  # words of a story that a continuation begins with; about so many from a book


@dataclass(frozen=True)
class Task:
    """One kind of input and what counts as a good output."""

    name: str
    scores: dict[str, str]        # of each figure its function in metrics.SCORES; the first is the one to keep
    file: str                     # "{}" stands for dev or test
    template: str = "{}"          # of a prompt, for models whose tokenizer has no separator; ends where the answer begins
    one_line: bool = True         # such a model's answer ends with its line
    max_new_tokens: int = 100
    openings: bool = False        # prompts are the first words of a text's paragraphs
    shots: str = ""               # solved examples before the prompt, in the template

    def text(self, prompt: str, tokenizer) -> str:
        """The prompt as the model gets it."""
        return self.shots + (prompt if has_separator(tokenizer) and not self.shots else self.template.format(prompt))

    def encode(self, prompt: str, tokenizer, room: int) -> tuple[list[int], bool]:
        """Token ids of a prompt, and whether its left had to go to leave at most `room`; the start token stays."""
        ids = encode_prompt(tokenizer, self.text(prompt, tokenizer))
        return (ids, False) if len(ids) <= room else ([*ids[:1], *ids[len(ids) - room + 1 :]], True)

    def stop_tokens(self, tokenizer) -> tuple[int, ...]:
        """Pieces that end an answer, besides the end of text: those with a line end, where an answer is one line."""
        if not self.one_line or has_separator(tokenizer):
            return ()
        return tuple(i for i in range(tokenizer.vocab_size()) if "\n" in tokenizer.id_to_piece(i) or tokenizer.id_to_piece(i) == "<0x0A>")

    def score(self, texts: list[str], references: list[list[str]]) -> dict[str, float]:
        """Every figure of the task, each in [0, 1]."""
        return {name: SCORES[function](texts, references) for name, function in self.scores.items()}

    def with_shots(self, examples: list[Example]) -> "Task":
        """The same with solved examples before every prompt."""
        return replace(self, shots="".join(f"{self.template.format(each.prompt)}{each.references[0]}\n\n" for each in examples))


QA, SUMMARY = {"f1": "f1", "exact_match": "exact_match", "rougeL": "rougeL"}, {
    variant: f"{variant}_stem" for variant in ("rougeL", "rouge1", "rouge2", "rougeLsum")}  # fmt: skip
TASKS = {
    "translation": Task("translation", {"bleu": "bleu", "rougeL": "rougeL_coco"}, data.FILES["translation"], "German: {}\nEnglish:\n"),
    "e2e": Task("e2e", {"bleu": "bleu_lower", "rougeL": "rougeL_coco"}, data.FILES["e2e"], "Facts: {}\nSentence:\n"),
    "fairytaleqa": Task("fairytaleqa", QA, data.FILES["fairytaleqa"], max_new_tokens=30),
    "stories": Task("stories", {}, data.FILES["stories"], one_line=False, max_new_tokens=100, openings=True),
    "squad": Task("squad", QA, "", max_new_tokens=30),
    "samsum": Task("samsum", SUMMARY, "", max_new_tokens=60),
    "file": Task("file", {"rougeL": "rougeL", "bleu": "bleu"}, "", "{}\n"),
}


def has_separator(tokenizer) -> bool:
    return tokenizer.piece_to_id(SEP) != tokenizer.unk_id()


def find_task(name: str) -> Task:
    """An embedded task by its name, or NAME=FILE: another file of its kind. Raises ValueError."""
    kind, _, file = name.partition("=")
    if kind not in TASKS:
        raise UserError(f"unknown task {kind!r}; choose from {', '.join(TASKS)}, or NAME=FILE for a file of your own")
    task = replace(TASKS[kind], file=file or TASKS[kind].file)
    if not task.file:
        raise UserError(f"task {kind} needs its file: {kind}=FILE")
    if kind == "file":
        task = replace(task, name=Path(file).name.split(".")[0])
    return task


def read_task(task: Task, split: str, skipped: list[str] | None = None) -> list[Example]:
    """Its examples of the train, dev or test split; of stories, openings to go on from. Raises and skips as `data.read_pairs` does."""
    path = data.locate(task.file.replace("{}", split))
    if not Path(path).is_file():
        raise UserError(f"{path}: no such data file")
    if task.openings:
        return openings(path, skipped)
    examples = data.read_examples(path, skipped)
    if not all(example.prompt for example in examples):
        raise UserError(f"{path}: holds texts without a prompt; the task stories={path} goes on from their openings")
    return examples


def openings(path: str | Path, skipped: list[str] | None = None) -> list[Example]:
    """The first words of paragraphs of at least twice as many, far apart, and what follows them there. Raises ValueError if there is
    none."""
    examples = []
    for _, text in data.read_pairs(path, skipped):
        long = [words for words in map(str.split, text.splitlines()) if len(words) >= 2 * OPENING]
        examples += [Example(" ".join(words[:OPENING]), (" ".join(words[OPENING:]),)) for words in long[:: max(1, len(long) // OPENINGS)]]
    if not examples:
        raise UserError(f"{path}: has no paragraph of {2 * OPENING} words or more, to go on from its first {OPENING}")
    return examples


def sample(examples: list[Example], limit: int, seed: int) -> list[Example]:
    """`limit` of the examples in their order, drawn by the seed; all for 0."""
    if not 0 < limit < len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), limit))]
