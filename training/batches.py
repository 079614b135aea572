"""Documents as token ids, and packed training batches.

A document is [bos] prompt [sep] completion [eos], of which only the completion is learned; plain text has no
prompt and is learned whole.
"""

import itertools
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import whole_file
from formats.tokenizers.tokenizer import Tokenizer, encode_prompt

LEARN, START = 1, 2  # flags of a token: it is a training target; a document starts here


def tokenize(
    pairs: Iterable[tuple[str, str]], tokenizer: Tokenizer, path: str | Path, length: int
) -> dict[str, int]:
    """Writes an array of (token, flags) records to `path` (.npy), which can be memory-mapped, and returns
    its statistics. Documents of more than `length` + 1 tokens are shortened: first at the left of the
    prompt, after the start token, then at the end of the completion. Texts are cut into documents
    (`cut_text`). Raises UserError for a tokenizer that has no end of text."""
    if not tokenizer.ends:
        raise UserError("the tokenizer has no piece for the end of a text, which documents need")
    tokens, flags, bos = array("I"), array("B"), [] if tokenizer.begin is None else [tokenizer.begin]
    eos = tokenizer.ends[0]
    begin = len(bos)  # the number of tokens that every prompt keeps at its beginning
    stop = len(encode_prompt(tokenizer, "")) - begin  # and at its end
    stats = {"documents": 0, "tokens": 0, "learned": 0, "shortened": 0}
    for prompt, completion in pairs:
        if prompt:
            head, body = encode_prompt(tokenizer, prompt), [*tokenizer.encode(completion), eos]
            excess = max(0, len(head) + len(body) - length - 1)
            stats["shortened"] += excess > 0
            del head[begin : min(begin + excess, len(head) - stop)]
            documents = [(head, body[: length + 1 - len(head)])]
        else:
            documents = ((bos, part) for part in cut_text(completion, tokenizer, length))
        for head, body in documents:
            tokens.extend(head + body)
            flags.extend([0] * len(head) + [LEARN] * len(body))
            flags[-len(head) - len(body)] |= START
            stats["documents"] += 1
            stats["learned"] += len(body)
    stats["tokens"] = len(tokens)
    record = np.dtype([("token", "<u2" if tokenizer.size <= 65536 else "<u4"), ("flags", "u1")])
    records = np.empty(len(tokens), record)
    records["token"], records["flags"] = tokens, flags
    with whole_file(path) as part, open(part, "wb") as file:
        np.save(file, records)
    return stats


def cut_text(text: str, tokenizer: Tokenizer, length: int) -> Iterator[list[int]]:
    """Token ids of a text in parts of at most `length`. Each part holds as many whole lines as fit, so
    that [bos] is mostly followed by the beginning of a paragraph, as in a prompt; only a longer line is
    itself cut. [eos] ends the last part."""
    part, size, parts = [], 0, []
    for line in text.splitlines(keepends=True):
        more = len(tokenizer.encode(line)) + 1  # 1 of slack: within a text, a line may need more
        if part and size + more > length:
            parts.append("".join(part))
            part, size = [], 0
        part.append(line)
        size += more
    for number, lines in enumerate([*parts, "".join(part)]):
        ids = tokenizer.encode(lines) + ([tokenizer.ends[0]] if number == len(parts) else [])
        yield from (ids[i : i + length] for i in range(0, len(ids), length))


@dataclass(frozen=True)
class Batch:
    """B rows of T positions. A row holds several documents, which do not attend to each other. Arrays are
    (B, T) int64."""

    inputs: np.ndarray
    targets: np.ndarray  # -1 where nothing is learned
    documents: np.ndarray  # number of the document within its row; 0 is padding


def batches(
    records: np.ndarray, rows: int, length: int, seed: int | None = 0, start: int = 0, every: int = 1
) -> Iterator[Batch]:
    """Packs the documents of `records` (from `tokenize`) into batches, endlessly, in an order that depends
    only on `seed` and the epoch, so that skipping `start` batches resumes exactly. With `every` = n, it
    yields every n-th batch, the share of one of n processes. With `seed=None`, it yields one epoch in the
    order of the file. A document goes into the first row of the batch that has room; one that fits nowhere
    waits for the next batch, and 16 waiting documents close the batch. No document may be longer than
    length + 1 tokens, which `tokenize` ensures."""
    begins = np.flatnonzero(records["flags"] & START)
    ends = np.append(begins[1:], len(records))
    count = len(begins)
    if seed is None:
        orders = [range(count)]
    else:
        orders = (np.random.default_rng((seed, epoch)).permutation(count) for epoch in itertools.count())
    plans = itertools.chain.from_iterable(_pack(order, ends - begins - 1, rows, length) for order in orders)
    for plan in itertools.islice(plans, start, None, every):
        yield _fill(records, plan, begins, ends, rows, length)


def _pack(order, sizes, rows: int, length: int) -> Iterator[list[list[int]]]:
    """Plans, one for each batch: the documents of every row, each put into the first row with room for it."""
    waiting: list[int] = []
    source = iter(order)
    while True:
        plan, room, late = [[] for _ in range(rows)], [length] * rows, []
        for document in itertools.chain(waiting, source):
            row = next((r for r in range(rows) if room[r] >= sizes[document]), None)
            if row is None:
                late.append(document)
                if len(late) == 16:
                    break
            else:
                plan[row].append(document)
                room[row] -= sizes[document]
        if not any(plan):
            return
        yield plan
        waiting = late


def _fill(records, plan, begins, ends, rows: int, length: int) -> Batch:
    inputs = np.zeros((rows, length), np.int64)
    targets = np.full((rows, length), -1, np.int64)
    documents = np.zeros((rows, length), np.int64)
    for row, members in enumerate(plan):
        at = 0
        for number, document in enumerate(members, 1):
            piece = records[begins[document] : ends[document]]
            span = slice(at, at + len(piece) - 1)
            inputs[row, span] = piece["token"][:-1]
            targets[row, span] = np.where(piece["flags"][1:] & LEARN, piece["token"][1:].astype(np.int64), -1)
            documents[row, span] = number
            at = span.stop
    return Batch(inputs, targets, documents)
