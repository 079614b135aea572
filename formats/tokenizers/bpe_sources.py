"""Byte-level BPE tokenizers as public checkpoints have them: tokenizer.json, and the metadata of GGUF."""

import json
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError
from common.files import read_json, reading
from formats.tokenizers.bpe import BPE, to_bytes
from formats.tokenizers.pieces import CONTROL, USER_DEFINED
from formats.tokenizers.splitting import DIGIT, GPT_2, LLAMA_3, NUMBER, QWEN_2, TEKKEN

UNREADABLE = "no tokenizer that can be read"
# Settings that tokenizer.json spells out, but that a GGUF file implies by the name of its splitting rule
# (tokenizer.ggml.pre, in llama.cpp's names). begin: whether texts get a begin token if the file does not say.
GGUF_LLAMA_3 = {"rules": (LLAMA_3,), "whole_words": True, "begin": True}
GGUF_QWEN_2 = {"rules": (QWEN_2,), "nfc": True}
GGUF_RULES = {
    "gpt-2": {"rules": (GPT_2,)}, "smollm": {"rules": (DIGIT, GPT_2)},
    "llama-bpe": GGUF_LLAMA_3, "llama3": GGUF_LLAMA_3, "llama-v3": GGUF_LLAMA_3,
    "smaug-bpe": {**GGUF_LLAMA_3, "begin": False}, "qwen2": GGUF_QWEN_2, "deepseek-r1-qwen": GGUF_QWEN_2,
    "tekken": {**GGUF_LLAMA_3, "rules": (TEKKEN,)},
}  # fmt: skip


def token_table(ids: dict[str, int], added: dict[str, int]) -> list[bytes | None]:
    """The bytes of every id, None where no token has it. Tokens in `ids` are written in printable characters,
    those in `added` as plain text."""
    table: list[bytes | None] = [None] * (max([*ids.values(), *added.values()], default=-1) + 1)
    for token, id in ids.items():
        table[id] = to_bytes(token) or token.encode()
    for text, id in added.items():
        table[id] = text.encode()
    return table


def pairs_of(merges: Iterable, ids: dict[str, int]) -> list[tuple[int, int]]:
    """Merges, "a b" or ["a", "b"] in printable characters, as pairs of ids."""
    pairs = []
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pairs.append((ids[left], ids[right]))
    return pairs


# ---------------------------------------------------------------- tokenizer.json


def find_bpe(folder: Path) -> BPE:
    """The byte-level BPE tokenizer of a Hugging Face folder that has a tokenizer.json. The ids that end a
    text are the tokenizer's own in tokenizer_config.json first, then those that end a generation. Raises
    UserError."""
    tokenizer = bpe_of_json(folder / "tokenizer.json")
    ends = []
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        path = folder / name
        settings = read_json(path, "a part of a tokenizer") if path.is_file() else {}
        with reading(path, UNREADABLE):
            token, stated = settings.get("eos_token"), settings.get("eos_token_id", [])
            if token is not None:
                text = token["content"] if isinstance(token, dict) else token
                id = tokenizer.added.get(text)
                ends.append(tokenizer.ids[text.encode()] if id is None else id)
            ends += stated if isinstance(stated, list) else [stated]
    tokenizer.ends = tuple(dict.fromkeys(id for id in ends if id is not None))
    return tokenizer


def bpe_of_json(path: Path) -> BPE:
    """Reads Hugging Face's tokenizer.json. Raises UserError for a kind or a step that is not supported."""
    content = read_json(path, "a tokenizer")
    with reading(path, UNREADABLE):
        model = content["model"]
        if model.get("type", "BPE") != "BPE":
            raise UserError(f"its tokenizer is {model['type']}, not byte-level BPE")
        for word in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(word):
                raise UserError(f"its BPE has {word} {model[word]!r}, which is not supported")
        rules, prefix_space = splitting_rules(content.get("pre_tokenizer"))
        listed = content.get("added_tokens", [])
        for token in listed:
            for word in ("lstrip", "rstrip", "single_word"):
                if token.get(word):
                    raise UserError(f"the token {token['content']!r} has {word}, which is not supported")
        added = {token["content"]: token["id"] for token in listed}
        return BPE(
            token_table(model["vocab"], added),
            pairs_of(model["merges"], model["vocab"]),
            rules,
            added,
            special=[token["id"] for token in listed if token.get("special")],
            nfc=is_nfc(content.get("normalizer")),
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


def splitting_rules(part: dict | None) -> tuple[list[str], bool]:
    """(splitting rules, whether a space is put before a text) of a pre_tokenizer. Raises UserError."""
    rules, prefix_space, bytewise = [], False, False
    for step in steps_of(part, "pretokenizers"):
        kind = step["type"]
        isolates = step.get("behavior") == "Isolated" and not step.get("invert")
        if kind == "Split" and isolates and "Regex" in step["pattern"]:
            rules.append(step["pattern"]["Regex"])
        elif kind == "Digits":
            rules.append(DIGIT if step["individual_digits"] else NUMBER)
        elif kind == "ByteLevel" and not (rules and step["add_prefix_space"]):  # no space before each word
            bytewise, prefix_space = True, step["add_prefix_space"]
            if step.get("use_regex", True):
                rules.append(GPT_2)
        else:
            raise UserError(f"the pre_tokenizer {kind} ({json.dumps(step)[:80]}) is not supported")
    if not bytewise:
        raise UserError("its pre_tokenizer is not ByteLevel, so it is not byte-level BPE")
    return rules, prefix_space


def is_nfc(part: dict | None) -> bool:
    """Whether a normalizer is NFC. Raises UserError for any other."""
    kinds = {step["type"] for step in steps_of(part, "normalizers")}
    if kinds - {"NFC"}:
        raise UserError(f"the normalizer {', '.join(sorted(kinds))} is not supported; only NFC is")
    return bool(kinds)


def begin_of(part: dict | None) -> int | None:
    """The id that a post_processor puts before a text."""
    for step in steps_of(part, "processors"):
        first = step["single"][0] if step["type"] == "TemplateProcessing" else {}
        if "SpecialToken" in first:
            return step["special_tokens"][first["SpecialToken"]["id"]]["ids"][0]
    return None


# ---------------------------------------------------------------- GGUF


def bpe_of_gguf(fields: dict) -> BPE:
    """Reads the tokenizer in a GGUF file's metadata, name -> value. Raises UserError for a splitting rule
    that is not known; damaged lists raise other exceptions, which `reading` handles."""
    get = lambda key, default=None: fields.get(f"tokenizer.ggml.{key}", default)  # noqa: E731
    if get("pre") not in GGUF_RULES:
        known = ", ".join(GGUF_RULES)
        raise UserError(f"unknown splitting rule {get('pre')!r} (tokenizer.ggml.pre); supported: {known}")
    rule, tokens = dict(GGUF_RULES[get("pre")]), get("tokens")
    begins = get("add_bos_token", rule.pop("begin", False))
    ids = {token: id for id, token in enumerate(tokens)}
    types = dict(zip(tokens, get("token_type", [1] * len(tokens)), strict=True))
    added = {token: id for token, id in ids.items() if types[token] in (CONTROL, USER_DEFINED)}
    ends = [get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    return BPE(
        token_table(ids, added),
        pairs_of(get("merges"), ids),
        added=added,
        special=[id for token, id in added.items() if types[token] == CONTROL],
        prefix_space=bool(get("add_space_prefix", False)),
        begin=get("bos_token_id") if begins else None,
        ends=dict.fromkeys(id for id in ends if id is not None),
        **rule,
    )
