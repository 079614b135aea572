"""Tasks: prompts, where an answer ends, the metrics that score it, and which inputs are used for what."""

import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from formats import data
from formats.chat import Chat, conversation
from formats.data import Example
from formats.tokenizers.tokenizer import GUARD, encode_prompt

OPENING, OPENINGS = 40, 30  # words of an opening to continue; about how many openings to take from a book
TUNING_SHARE = 0.5  # of the texts of dev, or of a single file; calibration uses the others


@dataclass(frozen=True)
class Task:
    """One kind of input and what counts as a good output."""

    name: str
    metrics: dict[str, str]  # score -> its name in metrics.METRICS; `calibrate --risk task` uses the first
    file: str  # "{}" stands for dev or test
    one_line: bool = True  # an answer ends with its line, unless the tokenizer has a separator
    max_new_tokens: int = 100
    openings: bool = False  # prompts are the first words of a text's paragraphs
    shots: tuple[tuple[str, str], ...] = ()  # solved examples: the prompt in the template, and the answer
    chat: Chat | None = None  # prompts, and shots before them, are turns in a chat

    @property
    def template(self) -> str:
        """The template of a prompt if the tokenizer has no separator; it ends where the answer begins."""
        return "{}" if self.openings else data.template_of(self.file)

    def text(self, prompt: str, tokenizer) -> str:
        """Returns the prompt as the model gets it."""
        if self.chat:
            return self.chat.text(self.turns(prompt)).replace(GUARD, "")
        if tokenizer.separator is not None and not self.shots:
            return prompt
        solved = [f"{shot}{answer}\n\n" for shot, answer in self.shots]
        return "".join(solved) + data.in_template(prompt, self.template)

    def turns(self, prompt: str) -> list[tuple[str, str]]:
        """Returns the prompt as the last turn of a chat."""
        shots = [(shot.strip(), answer) for shot, answer in self.shots]
        return conversation(data.in_template(prompt, self.template).strip(), shots)

    def encode(self, prompt: str, tokenizer, room: int) -> tuple[list[int], bool]:
        """Returns the token ids of a prompt, and whether it was truncated on the left to fit `room` tokens.
        The start token is kept; in a chat, only the prompt itself is truncated. Raises UserError for shots
        that leave the prompt no room."""
        if not self.chat:
            ids = encode_prompt(tokenizer, self.text(prompt, tokenizer))
            begin, excess = 0 if tokenizer.begin is None else 1, max(0, len(ids) - room)
            return [*ids[:begin], *ids[begin + excess :]], excess > 0
        ids, body, excess = self.chat.encode(self.turns(prompt)), tokenizer.encode(prompt), 0
        while len(ids) > room:
            excess += len(ids) - room
            if excess >= len(body):
                remedy = "leave no room for it; use fewer --shots"
                raise UserError(f"{self.name}: the turns around a prompt {remedy}")
            ids = self.chat.encode(self.turns(tokenizer.decode(body[excess:])))
        return ids, excess > 0

    def stop_tokens(self, tokenizer) -> tuple[int, ...]:
        """Returns the tokens that end an answer, in addition to the end of text: those with a newline if an
        answer is one line (and the tokenizer has no separator), or in a chat the end of the turn."""
        if self.chat:
            return self.chat.ends
        if not self.one_line or tokenizer.separator is not None:
            return ()
        return tuple(id for id in range(tokenizer.size) if "\n" in tokenizer.piece(id))

    def with_shots(self, examples: list[Example]) -> "Task":
        """Returns the same task with solved examples before every prompt."""
        solved = [(data.in_template(each.prompt, self.template), each.references[0]) for each in examples]
        return replace(self, shots=tuple(solved))


QA = {"f1": "f1", "exact_match": "exact_match", "rougeL": "rougeL"}
SUMMARY = {name: f"{name}_stem" for name in ("rougeL", "rouge1", "rouge2")}
TRANSLATION = {"bleu": "bleu", "rougeL": "rougeL_coco"}
DESCRIPTION = {"bleu": "bleu_lower", "rougeL": "rougeL_coco"}
TASKS = {
    "translation": Task("translation", TRANSLATION, data.FILES["translation"]),
    "e2e": Task("e2e", DESCRIPTION, data.FILES["e2e"]),
    "fairytaleqa": Task("fairytaleqa", QA, data.FILES["fairytaleqa"], max_new_tokens=30),
    "stories": Task("stories", {}, data.FILES["stories"], one_line=False, openings=True),
    "squad": Task("squad", QA, "", max_new_tokens=30),
    "samsum": Task("samsum", SUMMARY, "", max_new_tokens=60),
    "file": Task("file", {"rougeL": "rougeL", "bleu": "bleu"}, ""),
    "answers": Task("answers", {"f1": "f1", "exact_match": "exact_match"}, "", max_new_tokens=30),
}


def find_task(name: str) -> Task:
    """Returns the included task of this name, or for NAME=FILE a task of the same kind on another file.
    Raises UserError."""
    kind, _, file = name.partition("=")
    if kind not in TASKS:
        choices = f"{', '.join(TASKS)}, or file=FILE for your own file"
        raise UserError(f"unknown task {kind!r}; choose from {choices}")
    task = replace(TASKS[kind], file=file or TASKS[kind].file)
    if not task.file:
        raise UserError(f"task {kind} needs its file: {kind}=FILE")
    if kind in ("file", "answers"):
        task = replace(task, name=Path(file).name.split(".")[0])
        if task.name in (*TASKS, "decode", "provenance"):  # settings files use these names
            raise UserError(f"{file}: a task is named after its file, and {task.name} is taken; rename it")
    return task


def read_task(task: Task, split: str, skipped: list[str] | None = None) -> list[Example]:
    """Reads the examples of the train, dev or test split; for stories, the openings to continue. Raises and
    skips as `data.read_pairs` does."""
    path = data.locate(task.file.replace("{}", split))
    if task.openings:
        return openings(path, skipped)
    examples = data.read_examples(path, skipped)
    if not all(example.prompt for example in examples):
        raise UserError(f"{path}: holds texts without a prompt; stories={path} continues their openings")
    return examples


def openings(path: str | Path, skipped: list[str] | None = None) -> list[Example]:
    """Selects long paragraphs, spread over each text. The first OPENING words of each are the prompt, and the
    others are the reference. Raises UserError if there is none."""
    examples = []
    for _, text in data.read_pairs(path, skipped):
        paragraphs = [line.split() for line in text.splitlines()]
        long = [words for words in paragraphs if len(words) >= 2 * OPENING]
        step = max(1, len(long) // OPENINGS)
        for words in long[::step]:
            examples.append(Example(" ".join(words[:OPENING]), (" ".join(words[OPENING:]),)))
    if not examples:
        raise UserError(f"{path}: has no paragraph of {2 * OPENING} words or more to continue")
    return examples


# ---------------------------------------------------------------- which inputs are used for what


def sample(examples: list[Example], limit: int, seed: int) -> list[Example]:
    """Draws `limit` of the examples with this seed, and keeps their order. A limit of 0 means all."""
    if not 0 < limit < len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), limit))]


def source(example: Example) -> str:
    """Returns the text that an input is about: the context of its question, or else the whole prompt."""
    text, _, _ = example.prompt.rpartition("\nQuestion: ")
    return text or example.prompt


def between(examples: list[Example], low: float, high: float) -> list[Example]:
    """Returns the examples whose source is hashed to a place from `low` to below `high` on a fixed scale from
    0 to 1. All questions about one text have the same place, whatever the seed and the file, so disjoint
    ranges never share a text."""

    def place(example: Example) -> float:
        return int.from_bytes(hashlib.sha256(source(example).encode()).digest()[:6], "big") / 2**48

    return [example for example in examples if low <= place(example) < high]


def one_of_each_source(examples: list[Example], seed: int) -> list[Example]:
    """Draws one question for each text with this seed, so that the inputs are independent of each other."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(source(example), []).append(example)
    draw = random.Random(seed)
    return [draw.choice(group) for group in groups.values()]
