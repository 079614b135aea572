"""Byte-level BPE tokenizers as public checkpoints have them: tokenizer.json, vocab.json with merges.txt,
tiktoken's rank file, the metadata of GGUF."""

import base64
import binascii
import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from common.files import read_json
from formats.bpe import BPE, to_bytes
from formats.splitting import DIGIT, GPT_2, LLAMA_3, NUMBER, QWEN_2, TEKKEN

MAX_TOKENS = 1 << 22  # ids beyond are a damaged file's; the largest vocabularies of today have 2^18 tokens


class Family(NamedTuple):
    """What a source that only names its splitting rule leaves unsaid, as the family's own tokenizer.json says
    it."""

    rules: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    begin: bool = False  # whether texts begin with the token for that, where the source does not say


GPT_2_FAMILY, QWEN_2_FAMILY = Family((GPT_2,)), Family((QWEN_2,), nfc=True)
LLAMA_3_FAMILY = Family((LLAMA_3,), whole_words=True, begin=True)
GGUF_RULES = {  # tokenizer.ggml.pre, by llama.cpp's names
    "gpt-2": GPT_2_FAMILY,
    "llama-bpe": LLAMA_3_FAMILY, "llama3": LLAMA_3_FAMILY, "llama-v3": LLAMA_3_FAMILY,
    "smaug-bpe": LLAMA_3_FAMILY._replace(begin=False),
    "qwen2": QWEN_2_FAMILY, "deepseek-r1-qwen": QWEN_2_FAMILY,
    "smollm": Family((DIGIT, GPT_2)),
    "tekken": Family((TEKKEN,), whole_words=True, begin=True),
}  # fmt: skip
CLASSES = {
    "GPT2Tokenizer": GPT_2_FAMILY,
    "Qwen2Tokenizer": QWEN_2_FAMILY,
}  # tokenizer_class in tokenizer_config.json
CONTROL, USER_DEFINED = 3, 4  # token types of GGUF

# The special tokens that follow Llama 3's 128,000 ranks (llama-models, tokenizer.py, 3.1 and later). In 3.0
# some of these ids are reserved ones of other numbers, which nothing uses.
LLAMA_3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(2, 247)),
]  # fmt: skip
LLAMA_3_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def find_bpe(folder: Path) -> BPE | None:
    """The byte-level BPE tokenizer of a Hugging Face or Meta folder, None if it has no file of one. Raises
    UserError."""
    if (folder / "tokenizer.json").is_file():
        with reading(folder / "tokenizer.json"):
            tokenizer = from_json(load_json(folder / "tokenizer.json"))
    elif (folder / "vocab.json").is_file() or (folder / "merges.txt").is_file():
        tokenizer = from_vocab(folder)
    elif (folder / "tokenizer.model").is_file():
        with reading(folder / "tokenizer.model"):
            return from_ranks((folder / "tokenizer.model").read_bytes())
    else:
        return None
    with reading(folder):
        tokenizer.end_with(stated_ends(folder, tokenizer))
        return tokenizer


def stated_ends(folder: Path, tokenizer: BPE) -> list[int]:
    """The ids that end a text: the tokenizer's own in tokenizer_config.json first, then what generation ends
    with."""
    own = text_of(load_json(folder / "tokenizer_config.json").get("eos_token"))
    ends = [] if own is None else [find(tokenizer, own)]
    for name in ("generation_config.json", "config.json"):
        stated = load_json(folder / name).get("eos_token_id")
        if stated is not None:
            ends += stated if isinstance(stated, list) else [stated]
    return list(dict.fromkeys(ends))


@contextlib.contextmanager
def reading(where) -> Iterator[None]:
    """What goes wrong inside is a UserError that says where."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except KeyError as error:
        raise UserError(f"{where}: no tokenizer that can be read; it lacks {error}") from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{where}: no tokenizer that can be read ({str(error)[:100]})") from None


def load_json(path: Path) -> dict:
    """The object in a JSON file, {} where there is no file. Raises UserError."""
    return read_json(path, "a part of a tokenizer") if path.is_file() else {}


def text_of(token) -> str | None:
    """A token's text, which stands by itself or in an object with its properties."""
    return token["content"] if isinstance(token, dict) else token


def find(tokenizer: BPE, text: str) -> int:
    """The id of a token by its text. Raises UserError."""
    id = tokenizer.added.get(text, tokenizer.ids.get(text.encode()))
    if id is None:
        raise UserError(f"texts end with {text!r}, which is no token")
    return id


def id_table(ids: dict[str, int]) -> list[bytes | None]:
    """The bytes of every id, from tokens in printable characters; None where no token has an id. A token with
    other characters is meant as it stands. Raises UserError for an id that is none, or is given twice."""
    for token, id in ids.items():
        if type(id) is not int or not 0 <= id < MAX_TOKENS:
            raise UserError(f"token {token!r} has the id {id!r}; ids are integers from 0 to {MAX_TOKENS - 1}")
    table: list[bytes | None] = [None] * (max(ids.values(), default=-1) + 1)
    for token, id in ids.items():
        if table[id] is not None:
            raise UserError(f"token {token!r} has the id {id}, which another has, too")
        raw = to_bytes(token)
        table[id] = token.encode() if raw is None else raw
    return table


def pairs_of(merges: Iterable, ids: dict[str, int]) -> list[tuple[int, int]]:
    """Merges, "a b" or ["a", "b"] in printable characters, as pairs of ids. Raises UserError."""
    pairs = []
    for number, merge in enumerate(merges, start=1):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2:
            raise UserError(f"merge {number} is {merge!r}; it must be of two tokens")
        for part in parts:
            if part not in ids:
                raise UserError(f"merge {number} names {part!r}, which is no token of the vocabulary")
        pairs.append((ids[parts[0]], ids[parts[1]]))
    return pairs


def add_tokens(table: list[bytes | None], added: dict[str, int]) -> list[bytes | None]:
    """The table with the added tokens at their ids, as their texts stand."""
    if not all(type(id) is int and 0 <= id < MAX_TOKENS for id in added.values()):
        raise UserError(f"an added token has an id that is no integer from 0 to {MAX_TOKENS - 1}")
    table = table + [None] * (max(added.values(), default=-1) + 1 - len(table))
    for text, id in added.items():
        table[id] = text.encode()
    return table


# ---------------------------------------------------------------- tokenizer.json


def from_json(content: dict) -> BPE:
    """From the content of Hugging Face's tokenizer.json. Raises UserError for a kind or a step that is not
    known here."""
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"its tokenizer is {model['type']}, not byte-level BPE")
    for word in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(word):
            raise UserError(f"its BPE has {word} {model[word]!r}, which is not supported")
    rules, prefix_space = splitting(content.get("pre_tokenizer"))
    added, special = {}, []
    for token in content.get("added_tokens", []):
        for word in ("lstrip", "rstrip", "single_word"):
            if token.get(word):
                raise UserError(f"the added token {token['content']!r} has {word}, which is not supported")
        added[token["content"]] = token["id"]
        if token.get("special"):
            special.append(token["id"])
    return BPE(
        add_tokens(id_table(model["vocab"]), added),
        pairs_of(model["merges"], model["vocab"]),
        rules,
        added=added,
        special=special,
        nfc=normal_form(content.get("normalizer")),
        prefix_space=prefix_space,
        whole_words=bool(model.get("ignore_merges")),
        begin=begin_of(content.get("post_processor")),
    )


def steps_of(part: dict | None, plural: str) -> list[dict]:
    """The steps of a part of tokenizer.json, which may be none, one, or a sequence."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part[plural] for step in steps_of(inner, plural)]


def splitting(part: dict | None) -> tuple[list[str], bool]:
    """(splitting rules, whether a space is put before a text) of a pre_tokenizer. Raises UserError."""
    rules, prefix_space, bytewise = [], False, False
    for step in steps_of(part, "pretokenizers"):
        kind = step["type"]
        if (
            kind == "Split"
            and step["behavior"] == "Isolated"
            and not step.get("invert")
            and "Regex" in step["pattern"]
        ):
            rules.append(step["pattern"]["Regex"])
        elif kind == "Digits":
            rules.append(DIGIT if step["individual_digits"] else NUMBER)
        elif kind == "ByteLevel":
            bytewise, prefix_space = True, step["add_prefix_space"]
            if prefix_space and rules:
                raise UserError(
                    "a space before every word (add_prefix_space after another rule) is not supported"
                )
            if step.get("use_regex", True):
                rules.append(GPT_2)
        else:
            raise UserError(f"the pre_tokenizer {kind} ({json.dumps(step)[:80]}) is not supported")
    if not bytewise:
        raise UserError(
            "no ByteLevel among its pre_tokenizers, so not byte-level; it takes a tokenizer.model"
        )
    return rules, prefix_space


def normal_form(part: dict | None) -> bool:
    """Whether a normalizer asks for NFC. Raises UserError for any other."""
    kinds = [step["type"] for step in steps_of(part, "normalizers")]
    for kind in kinds:
        if kind != "NFC":
            raise UserError(f"the normalizer {kind} is not supported; known is NFC")
    return bool(kinds)


def begin_of(part: dict | None) -> int | None:
    """The id that a post_processor puts before a text."""
    for step in steps_of(part, "processors"):
        first = step["single"][0] if step["type"] == "TemplateProcessing" else {}
        if "SpecialToken" in first:
            return step["special_tokens"][first["SpecialToken"]["id"]]["ids"][0]
    return None


# ---------------------------------------------------------------- vocab.json with merges.txt


def from_vocab(folder: Path) -> BPE:
    """From vocab.json and merges.txt, the form before tokenizer.json. tokenizer_class names the splitting
    rule; added tokens are in tokenizer_config.json or added_tokens.json. Raises UserError."""
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} is missing; it takes vocab.json and merges.txt, or tokenizer.json"
            )
    settings = load_json(folder / "tokenizer_config.json")
    kind = str(settings.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    if kind not in CLASSES:
        raise UserError(f"{folder}: how {kind} splits is not known here; it takes the model's tokenizer.json")
    with reading(folder / "vocab.json"):
        vocab = load_json(folder / "vocab.json")
        table = id_table(vocab)
    with reading(folder / "merges.txt"):
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        if lines[0].startswith("#version"):  # other lines may begin with #, too, and are merges
            del lines[0]
        pairs = pairs_of([line for line in lines if line], vocab)
    with reading(folder):
        added = load_json(folder / "added_tokens.json")
        stated = settings.get("added_tokens_decoder", {})
        added |= {token["content"]: int(id) for id, token in stated.items()}
        begin = text_of(settings.get("bos_token")) if settings.get("add_bos_token") else None
        for text in (begin, text_of(settings.get("eos_token"))):
            if text is not None and text in vocab:
                added.setdefault(text, vocab[text])  # special by its use
        plain = {token["content"] for token in stated.values() if not token.get("special")}
        return BPE(
            add_tokens(table, added),
            pairs,
            CLASSES[kind].rules,
            added=added,
            special=[id for text, id in added.items() if text not in plain],
            nfc=CLASSES[kind].nfc,
            begin=None if begin is None else added[begin],
        )


# ---------------------------------------------------------------- tiktoken's rank file


def from_ranks(raw: bytes) -> BPE:
    """From Meta's tokenizer.model of Llama 3: lines of a token's bytes in base64 and its rank, which is its
    id. They do not say how to split and which special tokens follow; both are Llama 3's. Raises UserError."""
    table: dict[int, bytes] = {}
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line:
            continue
        try:
            coded, rank = line.split()
            token, rank = base64.b64decode(coded, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"line {number} is {line[:40]!r}; it must be base64 and a rank") from None
        if not token:
            raise UserError(f"line {number}: a token of no bytes")
        if rank in table:
            raise UserError(f"line {number}: rank {rank} is there twice")
        table[rank] = token
    if not table or sorted(table) != list(range(len(table))):
        raise UserError(f"its ranks are {len(table)}, but not those from 0 to {len(table) - 1}; cut short?")
    if len(set(table.values())) < len(table):
        raise UserError("a token has two ranks")
    tokens = [table[rank] for rank in range(len(table))]
    added = {text: len(tokens) + number for number, text in enumerate(LLAMA_3_SPECIAL)}
    return BPE(
        add_tokens(tokens, added),
        None,
        LLAMA_3_FAMILY.rules,
        added=added,
        special=added.values(),
        whole_words=LLAMA_3_FAMILY.whole_words,
        begin=added["<|begin_of_text|>"],
        ends=[added[text] for text in LLAMA_3_ENDS],
    )


# ---------------------------------------------------------------- GGUF


def from_gguf(fields: dict) -> BPE:
    """From the metadata of a GGUF file, name -> value. Raises UserError."""
    get = lambda key, default=None: fields.get(f"tokenizer.ggml.{key}", default)  # noqa: E731
    if get("model") != "gpt2":
        raise UserError(f"its tokenizer is {get('model')!r}; byte-level BPE is called gpt2")
    if get("pre") not in GGUF_RULES:
        known = ", ".join(GGUF_RULES)
        raise UserError(f"unknown splitting rule {get('pre')!r} (tokenizer.ggml.pre); known are {known}")
    with reading("its tokenizer"):
        family, tokens, merges = GGUF_RULES[get("pre")], get("tokens", []), get("merges")
        types = get("token_type", [1] * len(tokens))
        if len(types) != len(tokens) or not tokens or merges is None:
            count = "no" if merges is None else len(merges)
            raise UserError(f"{len(tokens)} tokens, {len(types)} types and {count} merges")
        ids: dict[str, int] = {}
        for id, token in enumerate(tokens):
            if ids.setdefault(token, id) != id:
                raise UserError(f"token {token!r} has the ids {ids[token]} and {id}")
        added = {token: id for token, id in ids.items() if types[id] in (CONTROL, USER_DEFINED)}
        special = [id for id in added.values() if types[id] == CONTROL]
        begin = get("bos_token_id") if get("add_bos_token", family.begin) else None
        ends = [get(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id") if get(key) is not None]
        return BPE(
            add_tokens(id_table(ids), added),
            pairs_of(merges, ids),
            family.rules,
            added=added,
            special=special,
            nfc=family.nfc,
            prefix_space=bool(get("add_space_prefix", False)),
            whole_words=family.whole_words,
            begin=begin,
            ends=dict.fromkeys(ends),
        )
