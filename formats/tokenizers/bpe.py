"""Byte-level BPE (Sennrich 2016; on bytes: GPT-2, Radford 2019), the tokenizer of Llama 3, Qwen, SmolLM and
many others.

A text becomes token ids in three steps:
1. A regular expression splits it into words (formats/tokenizers/splitting.py).
2. Every word becomes its UTF-8 bytes, and every byte a token: 256 tokens can write any text, so nothing is
   unknown.
3. Neighbouring tokens merge, always the pair that was merged first in training, until no pair is in the list
   of merges.
"""

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields

from common.errors import UserError
from common.files import reading
from formats.tokenizers.splitting import compile_rule

FORMAT = "byte-level BPE 1"
GUARD = "\ufdd0"  # a noncharacter: in a template's text it keeps what a user typed from being a special token
CACHED_WORDS = 1 << 17  # words whose tokens are remembered

# ---------------------------------------------------------------- bytes as printable characters


def printable_bytes() -> dict[int, str]:
    """A printable character for each of the 256 bytes, so that tokens can be written in a text file
    (`bytes_to_unicode` of GPT-2): the byte's own where Latin-1 prints something, else the next free one from
    U+0100 on. The space becomes Ġ, the end of a line Ċ."""
    free = itertools.count(256)
    table = {}
    for byte in range(256):
        printed = chr(byte).isprintable() and not chr(byte).isspace()
        table[byte] = chr(byte if printed else next(free))
    return table


PRINTABLE = printable_bytes()
BYTES = {char: byte for byte, char in PRINTABLE.items()}


def to_bytes(token: str) -> bytes | None:
    """The bytes of a token in printable characters; None for one that has other characters."""
    codes = [BYTES.get(char, -1) for char in token]
    return None if -1 in codes else bytes(codes)


def to_printable(token: bytes) -> str:
    """The inverse of `to_bytes`."""
    return "".join(PRINTABLE[byte] for byte in token)


# ---------------------------------------------------------------- the tokenizer


def check_text(text: str) -> None:
    """Raises UserError for text that cannot be encoded as UTF-8: Python reads bytes that are not UTF-8 as
    surrogates, halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise UserError(f"the text is not in UTF-8: character {at + 1} is {text[at]!a}") from None


def split_at(found: dict[str, int], text: str) -> Iterator[tuple[str, int | None]]:
    """Yields the parts of a text: those in `found` (the longest where several fit) with their id, and what
    lies between them with None."""
    longest_first = sorted(found, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first)) or "(?!)"  # (?!) is found nowhere
    for number, part in enumerate(re.split(f"({pattern})", text)):
        if part:
            yield part, found[part] if number % 2 else None


@dataclass(eq=False, repr=False)
class BPE:
    """A byte-level BPE tokenizer. Raises UserError for ids that are out of range, KeyError for merges whose
    result is not a token."""

    tokens: list[bytes | None]  # the bytes of every id; None: no token has this id
    merges: list[tuple[int, int]]  # pairs of ids, the first merged first
    rules: tuple[str, ...]  # splitting rules; each one splits the words of the one before
    added: dict[str, int]  # text -> id of tokens that are found in a text before it is split
    special: Collection[int] = ()  # added tokens that no user can type, and that decode to nothing
    nfc: bool = False  # whether a text is brought to Unicode's composed form first
    prefix_space: bool = False  # whether a text gets a space in front
    whole_words: bool = False  # whether a word that is a token needs no merges (`ignore_merges`)
    begin: int | None = None  # the id before every text
    ends: tuple[int, ...] = ()  # ids that end a text

    separator = None  # between prompt and completion: no such token

    def __post_init__(self):
        self.size, self.special, self.ends = len(self.tokens), frozenset(self.special), tuple(self.ends)
        self.rules = tuple(self.rules)
        tokens, added = self.tokens, self.added
        for id in {*added.values(), *self.special, self.begin} - {None}:
            if not 0 <= id < self.size:
                raise UserError(f"token id {id} is named, but the tokenizer has {self.size} tokens")
        self.specials = {text: id for text, id in added.items() if id in self.special}
        self.ids: dict[bytes, int] = {}
        for id, token in enumerate(tokens):
            if token and id not in self.special:
                self.ids.setdefault(token, id)  # the vocabulary's own id, if an added token repeats it
        self.byte_ids = [self.ids.get(bytes([byte])) for byte in range(256)]
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.merged = [self.ids[tokens[left] + tokens[right]] for left, right in self.merges]  # by rank
        self._rules = [compile_rule(rule) for rule in self.rules]
        self.plain = {text: id for text, id in added.items() if id not in self.special}
        self._cached = functools.lru_cache(CACHED_WORDS)(self._encode_word)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """See Tokenizer. This leaves out bytes that the vocabulary lacks, as Hugging Face's library does (21
        rare bytes, for SmolLM2)."""
        check_text(text)
        ids = []
        for part, id in split_at(self.added if special else self.plain, text):
            if id is not None:
                ids.append(id)
                continue
            for word in self.split(part.replace(GUARD, "") if special else part):
                ids += self._cached(word)
        return ids

    def split(self, text: str) -> list[str]:
        """The words of a text."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        words = [" " + text if self.prefix_space and not text.startswith(" ") else text]
        for rule in self._rules:
            parts = [rule.split(word) for word in words]
            words = [word for part in parts for word in part if word]
        return words

    def _encode_word(self, word: str) -> list[int]:
        raw = word.encode()
        if self.whole_words and raw in self.ids:
            return [self.ids[raw]]
        return self.merge([self.byte_ids[byte] for byte in raw if self.byte_ids[byte] is not None])

    def merge(self, ids: list[int]) -> list[int]:
        """Merges neighbours until no pair has a rank: the pair of the lowest rank first, the leftmost of
        equal ones. The whole word is searched again after every merge: words are short (one of 1,000 bytes
        takes about 70 ms)."""
        while True:
            pairs = enumerate(itertools.pairwise(ids))
            ranked = [(self.ranks[pair], at) for at, pair in pairs if pair in self.ranks]
            if not ranked:
                return ids
            rank, at = min(ranked)
            ids[at : at + 2] = [self.merged[rank]]

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer. Bytes that are not UTF-8 become U+FFFD, and so does an unfinished last character."""
        raw = [self.tokens[id] or b"" for id in ids if 0 <= id < self.size and id not in self.special]
        return b"".join(raw).decode("utf-8", "replace")

    def piece(self, id: int) -> str:
        """See Tokenizer."""
        return (self.tokens[id] or b"").decode("utf-8", "replace") if 0 <= id < self.size else ""

    def to_blob(self) -> bytes:
        """The tokenizer as JSON, tokens in printable characters; `from_blob` reads it."""
        content = {"format": FORMAT, **{field.name: getattr(self, field.name) for field in fields(self)}}
        content["tokens"] = [None if token is None else to_printable(token) for token in self.tokens]
        content["merges"] = list(itertools.chain(*self.merges))
        content["special"] = sorted(self.special)
        return json.dumps(content, ensure_ascii=False).encode()

    @classmethod
    def from_blob(cls, blob: bytes) -> "BPE":
        """The inverse of `to_blob`. Raises UserError for a damaged one."""
        with reading("the tokenizer", "damaged"):
            content = json.loads(blob)
            if content.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            texts = content.pop("tokens")
            tokens = [None if text is None else bytes(BYTES[char] for char in text) for text in texts]
            merges, rules = content.pop("merges"), content.pop("rules")
            return cls(tokens, list(zip(merges[::2], merges[1::2], strict=True)), rules, **content)
