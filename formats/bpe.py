"""Byte-level BPE (Sennrich 2016; of bytes: GPT-2, Radford 2019), the tokenizer of Llama 3, Qwen, SmolLM and
many others.

A text becomes token ids in three steps:
1. It is split into words by a regular expression (formats/splitting.py).
2. Every word becomes its UTF-8 bytes, and every byte a token: 256 tokens can write any text, so nothing is unknown.
3. Neighbouring tokens merge, always the pair that was merged first in training, until no pair is in the list of merges.
"""

import heapq
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence

from common.errors import UserError
from formats.splitting import compile_rule

FORMAT = "byte-level BPE 1"
GUARD = "\ufdd0"  # no character: in a template's text it keeps what a user typed from being a special token
CACHED_WORDS = 1 << 17  # words whose tokens are remembered
CACHED_LENGTH = 64  # characters of the longest of them

# ---------------------------------------------------------------- bytes as printable characters


def printable_bytes() -> dict[int, str]:
    """A printable character for each of the 256 bytes, so that tokens can be written in a text file
    (`bytes_to_unicode` of GPT-2): itself where Latin-1 prints something, else the next free one from U+0100
    on. The space becomes Ġ, the end of a line Ċ."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    table = {byte: chr(byte) for byte in printed}
    for number, byte in enumerate(others):
        table[byte] = chr(256 + number)
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
    """Raises UserError for a text that has no UTF-8: one half of a surrogate pair by itself is no
    character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise UserError(
            f"the text is not Unicode: character {at + 1} is the lone surrogate {text[at]!a}"
        ) from None


def any_of(texts: list[str]) -> re.Pattern | None:
    """A pattern for any of the texts, of several that begin alike the longest; None for none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if texts else None


class BPE:
    """A byte-level BPE tokenizer.

    tokens:        the bytes of every id; None: no token has this id
    merges:        pairs of ids, the first merged first. None: tiktoken's way, any two neighbours merge whose bytes
                   together are a token, the token of lowest id first
    rules:         splitting rules, one after another: each splits the words of the last into its matches and what lies
                   between these
    added:         text -> id of tokens that are found in a text before it is split
    special:       ids of added tokens that are found only when asked for, so that no user can type them, and that
                   decode to nothing
    nfc:           whether a text is brought to Unicode's composed form first
    prefix_space:  whether a text gets a space in front
    whole_words:   whether a word that is a token is taken as that, whatever the merges say (`ignore_merges`)
    begin, ends:   id before every text or None, ids that end a text
    Raises UserError for values that contradict each other."""

    separator = None  # between prompt and completion: no such token

    def __init__(
        self,
        tokens: Sequence[bytes | None],
        merges: Sequence[tuple[int, int]] | None,
        rules: Sequence[str],
        *,
        added: dict[str, int],
        special: Iterable[int] = (),
        nfc: bool = False,
        prefix_space: bool = False,
        whole_words: bool = False,
        begin: int | None = None,
        ends: Iterable[int] = (),
    ):
        self.tokens, self.size = list(tokens), len(tokens)
        self.added, self.special, self.begin = added, frozenset(special), begin
        self.specials = {text: id for text, id in added.items() if id in self.special}
        self.rules, self.nfc, self.prefix_space, self.whole_words = (
            tuple(rules),
            nfc,
            prefix_space,
            whole_words,
        )
        self.end_with(ends)
        named = [*added.values(), *self.special] + ([] if begin is None else [begin])
        for id in named:
            if type(id) is not int or not 0 <= id < self.size:
                raise UserError(f"token id {id} is named, but the tokenizer has {self.size} tokens")
        if "" in added:
            raise UserError(f"token {added['']} is added for an empty text")
        self.ids: dict[bytes, int] = {}
        for id, token in enumerate(self.tokens):
            if token and id not in self.special:
                self.ids.setdefault(
                    token, id
                )  # words are made of the first, where an added token repeats one
        self.byte_ids = [self.ids.get(bytes([byte])) for byte in range(256)]
        self.merges = merges
        self.ranks, self.merged = (
            None,
            range(self.size),
        )  # without a list the rank is the id of what the two become
        if merges is not None:
            self.ranks, self.merged = self._rank(merges)
        self._rules = [compile_rule(rule) for rule in rules]
        self._added = [
            any_of([text for text, id in added.items() if id not in self.special]),
            any_of(list(added)),
        ]
        self._words: dict[str, list[int]] = {}  # the tokens of words met before

    def end_with(self, ends: Iterable[int]) -> None:
        """Texts end with these ids; the model may have more of them than the tokenizer has tokens."""
        self.ends = tuple(ends)
        if not all(type(id) is int and id >= 0 for id in self.ends):
            raise UserError(f"texts end with {list(self.ends)}; these must be token ids")

    def _rank(self, merges: Sequence[tuple[int, int]]) -> tuple[dict[tuple[int, int], int], list[int]]:
        """(pair -> its rank, which is its place in the list; rank -> the token that comes of it)."""
        ranks, merged = {}, []
        for rank, (left, right) in enumerate(merges):
            if not (
                0 <= left < self.size and 0 <= right < self.size and self.tokens[left] and self.tokens[right]
            ):
                raise UserError(f"merge {rank + 1} is of {left} and {right}; one of them is no token")
            both = self.tokens[left] + self.tokens[right]
            if both not in self.ids:
                raise UserError(
                    f"merge {rank + 1} makes {to_printable(both)!r}, which is no token of the vocabulary"
                )
            if (left, right) in ranks:
                raise UserError(
                    f"merge {rank + 1} is the same as merge {ranks[left, right] + 1}; a pair has one rank"
                )
            ranks[left, right] = rank
            merged.append(self.ids[both])
        return ranks, merged

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text, without begin or end. `special`: the text comes from a template, not from a
        user, and the special tokens written in it are tokens; GUARDs are left out. So is a byte that the
        vocabulary lacks, as Hugging Face's library does (SmolLM2 lacks 21, which hardly any text has). Raises
        UserError for a text that has no UTF-8."""
        check_text(text)
        added, ids = self._added[special], []
        for number, part in enumerate(added.split(text) if added else [text]):
            if number % 2:  # what the pattern found, and what lies between, take turns
                ids.append(self.added[part])
            elif part:
                part = part.replace(GUARD, "") if special else part
                for word in self.split(part):
                    ids += self._words.get(word) or self._encode_word(word)
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
            ids = [self.ids[raw]]
        else:
            ids = self.merge([self.byte_ids[byte] for byte in raw if self.byte_ids[byte] is not None])
        if len(word) <= CACHED_LENGTH:
            if len(self._words) >= CACHED_WORDS:
                self._words.clear()
            self._words[word] = ids
        return ids

    def rank(self, left: int, right: int) -> int | None:
        """The rank of a pair, the lowest merges first; None: it never merges."""
        if self.ranks is not None:
            return self.ranks.get((left, right))
        return self.ids.get(self.tokens[left] + self.tokens[right])

    def merge(self, ids: list[int]) -> list[int]:
        """Merges neighbours until no pair has a rank, lowest rank first, of equal ranks the left one. The
        candidates wait in a heap, the tokens form a chain: n log n steps, where searching the word again
        after every merge takes n^2."""
        end, heap = len(ids), []
        before, after = list(range(-1, end - 1)), list(range(1, end + 1))

        def propose(at: int) -> None:
            if at >= 0 and after[at] < end:
                left, right = ids[at], ids[after[at]]
                rank = self.rank(left, right)
                if rank is not None:
                    heapq.heappush(heap, (rank, at, left, right))

        for at in range(end - 1):
            propose(at)
        while heap:
            rank, at, left, right = heapq.heappop(heap)
            gone = after[at]
            if ids[at] != left or gone >= end or ids[gone] != right:
                continue  # one of the two has become part of another token since
            ids[at], ids[gone] = self.merged[rank], None
            after[at] = after[gone]
            if after[at] < end:
                before[after[at]] = at
            propose(before[at])
            propose(at)
        return [id for id in ids if id is not None]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens; special ones, and ids that no token has, add nothing. Bytes that are no
        UTF-8 become U+FFFD, and so does a character at the end whose last bytes are still to come."""
        raw = [self.tokens[id] or b"" for id in ids if 0 <= id < self.size and id not in self.special]
        return b"".join(raw).decode("utf-8", "replace")

    def piece(self, id: int) -> str:
        """What to show for one token by itself, special ones by their names."""
        return (self.tokens[id] or b"").decode("utf-8", "replace") if 0 <= id < self.size else ""

    def to_blob(self) -> bytes:
        """The tokenizer as JSON, tokens in printable characters; `from_blob` reads it."""
        content = {
            "format": FORMAT,
            "tokens": [None if token is None else to_printable(token) for token in self.tokens],
            "merges": None if self.merges is None else [id for pair in self.merges for id in pair],
            "rules": self.rules, "added": self.added, "special": sorted(self.special), "nfc": self.nfc,
            "prefix_space": self.prefix_space, "whole_words": self.whole_words, "begin": self.begin, "ends": self.ends,
        }  # fmt: skip
        return json.dumps(content, ensure_ascii=False).encode()

    @classmethod
    def from_blob(cls, blob: bytes) -> "BPE":
        """The inverse of `to_blob`. Raises UserError for a damaged one."""
        try:
            content = json.loads(blob)
            if content.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            texts = content.pop("tokens")
            tokens = [None if text is None else bytes(BYTES[char] for char in text) for text in texts]
            merges, rules = content.pop("merges"), content.pop("rules")
            if merges is not None:
                merges = list(zip(merges[::2], merges[1::2], strict=True))
            return cls(tokens, merges, rules, **content)
        except UserError as error:
            raise UserError(f"the tokenizer is damaged: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"the tokenizer is damaged ({str(error)[:100]})") from None
