"""Byte-level BPE: splitting and merging against hand-worked cases and slow references, every source in tiny
form, and damaged ones."""

import itertools
import json
import random
import unicodedata

import pytest

from common.errors import UserError
from formats.tokenizers import splitting
from formats.tokenizers.bpe import BPE, to_bytes, to_printable
from formats.tokenizers.bpe_sources import GGUF_RULES, bpe_of_gguf, bpe_of_json, find_bpe
from formats.tokenizers.files import gguf_tokenizer
from formats.tokenizers.pieces import train_tokenizer
from formats.tokenizers.tokenizer import SentencePiece, encode_prompt, read_blob

ALPHABET = [bytes([byte]) for byte in range(256)]
RULES = {
    "gpt-2": (splitting.GPT_2,),
    "llama 3": (splitting.LLAMA_3,),
    "qwen 2": (splitting.QWEN_2,),
    "smollm": (splitting.DIGIT, splitting.GPT_2),
    "tekken": (splitting.TEKKEN,),
}


def splitter(name: str) -> BPE:
    return BPE(ALPHABET, [], RULES[name], added={})


# ---------------------------------------------------------------- bytes


def test_every_byte_has_a_printable_character_of_its_own():
    assert [to_printable(bytes([byte])) for byte in (0, 10, 32, 65, 127, 160, 173, 233, 255)] == list("ĀĊĠAġłŃéÿ")
    characters = to_printable(bytes(range(256)))
    assert len(set(characters)) == 256 and characters.isprintable() and " " not in characters
    assert to_bytes(characters) == bytes(range(256))
    assert to_bytes("a b") is None and to_bytes("日") is None


# ---------------------------------------------------------------- splitting

TEXT = "I'll say HELLO'S 2025 times:\n\n  über-GPTs,  ok?!\n x²"
SPACED = [" ", " über", "-GPTs", ",", " ", " ok", "?!\n", " x", "²"]
WORDS = {
    "gpt-2": ["I", "'ll", " say", " HELLO", "'", "S", " 2025", " times", ":", "\n\n ", " über", "-", "GPTs", ",", " ",
              " ok", "?!", "\n", " x", "²"],
    "llama 3": ["I", "'ll", " say", " HELLO", "'S", " ", "202", "5", " times", ":\n\n", *SPACED],
    "qwen 2": ["I", "'ll", " say", " HELLO", "'S", " ", "2", "0", "2", "5", " times", ":\n\n", *SPACED],
    "smollm": ["I", "'ll", " say", " HELLO", "'", "S", " ", "2", "0", "2", "5", " times", ":", "\n\n ", " über", "-",
               "GPTs", ",", " ", " ok", "?!", "\n", " x", "²"],
    "tekken": ["I", "'ll", " say", " HELLO", "'S", " ", "2", "0", "2", "5", " times", ":\n\n", *SPACED],
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rules_split_as_worked_out_by_hand(name):
    assert splitter(name).split(TEXT) == WORDS[name]


WHITE = {*"\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000", *map(chr, range(0x2000, 0x200B))}


def is_kind(char: str, *kinds: str) -> bool:
    return unicodedata.category(char).startswith(kinds)


def is_other(char: str) -> bool:
    return char not in WHITE and not is_kind(char, "L", "N")


def run_end(text: str, at: int, test, most: int = 10**9) -> int:
    end = at
    while end < len(text) and end - at < most and test(text[end]):
        end += 1
    return end


def spaces_end(text: str, at: int) -> int:
    """A run of white space leaves its last character to the word after it."""
    end = run_end(text, at, WHITE.__contains__)
    return end if end == len(text) or end == at + 1 else end - 1


def contraction_end(text: str, at: int, fold) -> int:
    for ending in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"):
        if fold(text[at : at + len(ending)]) == ending:
            return at + len(ending)
    return at


def gpt_2_end(text: str, at: int) -> int:
    if (end := contraction_end(text, at, str)) > at:
        return end
    start = at + (text[at] == " ")
    for test in (lambda char: is_kind(char, "L"), lambda char: is_kind(char, "N"), is_other):
        if (end := run_end(text, start, test)) > start:
            return end
    return spaces_end(text, at)


def letters_end(text: str, at: int, start: int, tekken: bool) -> int:
    if not tekken:
        return run_end(text, start, lambda char: is_kind(char, "L"))
    big = run_end(text, start, lambda char: is_kind(char, "Lu", "Lt", "Lm", "Lo", "M"))
    for middle in range(big, start - 1, -1):
        if (end := run_end(text, middle, lambda char: is_kind(char, "Ll", "Lm", "Lo", "M"))) > middle:
            return end
    return start


def later_end(text: str, at: int, digits: int, tekken: bool = False) -> int:
    """Llama 3's, Qwen's (1 digit) and tekken's rules."""
    fold = lambda part: part.lower().replace("ſ", "s")  # noqa: E731
    if not tekken and (end := contraction_end(text, at, fold)) > at:
        return end
    starts = [at] if text[at] in "\r\n" or is_kind(text[at], "L", "N") else [at + 1, at]
    for start in starts:
        if (end := letters_end(text, at, start, tekken)) > start:
            return end
    for start in starts if tekken else []:  # capital letters alone
        if (end := run_end(text, start, lambda char: is_kind(char, "Lu", "Lt", "Lm", "Lo", "M"))) > start:
            return end
    if (end := run_end(text, at, lambda char: is_kind(char, "N"), digits)) > at:
        return end
    start = at + (text[at] == " ")
    if (end := run_end(text, start, is_other)) > start:
        return run_end(text, end, lambda char: char in ("\r\n/" if tekken else "\r\n"))
    run = text[at : run_end(text, at, WHITE.__contains__)]
    newline = max(run.rfind("\r"), run.rfind("\n"))
    return at + newline + 1 if newline >= 0 else spaces_end(text, at)


ENDS = {
    "gpt-2": gpt_2_end,
    "llama 3": lambda text, at: later_end(text, at, 3),
    "qwen 2": lambda text, at: later_end(text, at, 1),
    "tekken": lambda text, at: later_end(text, at, 1, tekken=True),
}


def walk(name: str, text: str) -> list[str]:
    """The words of a text, found character by character."""
    if name == "smollm":
        parts, at = [], 0
        for place, char in enumerate(text):
            if is_kind(char, "N"):
                parts += [text[at:place], char]
                at = place + 1
        return [word for part in [*parts, text[at:]] for word in walk("gpt-2", part)]
    words, at = [], 0
    while at < len(text):
        end = ENDS[name](text, at)
        words.append(text[at:end])
        at = end
    return words


OFTEN = "    \n\n\r\t'''sSſtTrReEvVmMlLdDaAbB1234/.,-!\x85\xa0\x1c\u2028\u200b\u200d\u3000\u0301ǅʰ中½٣é👨\ufe0f"


def random_text(rng: random.Random, length: int) -> str:
    seldom = [*range(0x3000), *range(0xFE00, 0xFFFE), *range(0x10000, 0x10400), *range(0x1F300, 0x1F700)]
    return "".join(rng.choice(OFTEN) if rng.random() < 0.8 else chr(rng.choice(seldom)) for _ in range(length))


@pytest.mark.parametrize("name", RULES)
def test_rules_split_as_a_walk_by_single_characters_does(name):
    rng, tokenizer = random.Random(0), splitter(name)
    for _ in range(500):
        text = random_text(rng, rng.randrange(1, 25))
        words = tokenizer.split(text)
        assert words == walk(name, text), ascii(text)
        assert "".join(words) == text


@pytest.mark.parametrize(("pattern", "message"), [
    (r"\w+", r"has \\w"), (r"[a&&b]", "&&"), (r"a.", r"has a\."), (r"\p{Q}", "category 'Q'"), (r"(a)|b", "groups"),
    (r"a*", "matches nothing"), (r"a(", "no regular expression"),
])  # fmt: skip
def test_rules_that_would_mean_something_else_here_are_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        splitting.compile_rule(pattern)


# ---------------------------------------------------------------- merging

MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "Ġ Ġ", "1 2", "e l"]


def vocabulary(merges: list[str]) -> dict[str, int]:
    """The 256 bytes, then what the merges make."""
    texts = [*map(to_printable, ALPHABET), *(merge.replace(" ", "") for merge in merges)]
    return {text: id for id, text in enumerate(texts)}


def tokenizer_of(merges: list[str] = MERGES, rule: str = splitting.GPT_2, **more) -> BPE:
    ids = vocabulary(merges)
    pairs = [tuple(ids[part] for part in merge.split()) for merge in merges]
    return BPE([to_bytes(text) for text in ids], pairs, [rule], added=more.pop("added", {}), **more)


def test_merges_go_by_rank_as_worked_out_by_hand():
    tokenizer = tokenizer_of()
    ids = vocabulary(MERGES)
    names = lambda text: [list(ids)[id] for id in tokenizer.encode(text)]  # noqa: E731
    assert names("hello world") == ["hello", "Ġwor", "l", "d"]
    assert names("hel") == ["he", "l"]  # h e comes before e l
    assert names("lll") == ["ll", "l"]  # of equal ranks the left one
    assert names("12 112") == ["12", "Ġ", "1", "12"]
    assert names("é") == ["Ã", "©"]
    assert names("") == []


def merge_naively(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    parts = list(word)
    while True:
        pairs = [(ranks[pair], at) for at, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
        if not pairs:
            return parts
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def random_merges(rng: random.Random, letters: str, count: int) -> list[str]:
    """Merges in an order that no training would find, too: a pair may come before the merges that make its
    parts."""
    texts, merges = list(letters), {}
    while len(merges) < count:
        left, right = rng.choice(texts), rng.choice(texts)
        if len(left + right) <= 6 and left + right not in texts:
            texts.append(left + right)
            merges[f"{left} {right}"] = None
    merges = list(merges)
    rng.shuffle(merges)
    return merges


def test_merging_equals_a_search_for_the_lowest_rank_after_every_merge():
    rng = random.Random(1)
    for _ in range(20):
        merges = random_merges(rng, "abc", 25)
        tokenizer, ids = tokenizer_of(merges), vocabulary(merges)
        ranks = {tuple(merge.split()): rank for rank, merge in enumerate(merges)}
        for _ in range(50):
            word = "".join(rng.choices("abc", k=rng.randrange(1, 40)))
            assert tokenizer.encode(word) == [ids[part] for part in merge_naively(word, ranks)]


def test_a_word_that_is_a_token_is_taken_whole_only_where_the_tokenizer_says_so():
    merges = ["a b", "b c", "a bc"]  # a b comes first, so that no merge makes abc
    assert len(tokenizer_of(merges).encode("abc")) == 2
    assert tokenizer_of(merges, whole_words=True).encode("abc") == [vocabulary(merges)["abc"]]


# ---------------------------------------------------------------- text and back

SPECIAL = {"<|end|>": 266, "<|turn|>": 267, "<tool>": 268}


def with_special(**more) -> BPE:
    base = tokenizer_of()
    tokens = base.tokens + [text.encode() for text in SPECIAL]
    return BPE(tokens, base.merges, base.rules, added=SPECIAL, special=[266, 267], begin=267, ends=[266], **more)


@pytest.mark.parametrize("name", RULES)
def test_any_text_comes_back(name):
    rng = random.Random(4)
    base = tokenizer_of()
    tokenizer = BPE(base.tokens, base.merges, RULES[name], added={})
    for _ in range(300):
        text = random_text(rng, rng.randrange(60))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        raw = rng.randbytes(rng.randrange(60))
        assert tokenizer.decode(list(raw)) == raw.decode("utf-8", "replace")
        text = raw.decode("latin-1")
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_made_only_when_asked_for_and_decode_to_nothing():
    tokenizer = with_special()
    text = "<|turn|>hello<|end|>"
    typed = tokenizer.encode(text)
    assert not set(typed) & {266, 267} and tokenizer.decode(typed) == text
    hello = vocabulary(MERGES)["hello"]
    assert tokenizer.encode(text, special=True) == [267, hello, 266]
    assert tokenizer.decode([267, hello, 266]) == "hello" and tokenizer.piece(266) == "<|end|>"
    assert tokenizer.encode("<tool>hello") == [268, hello]  # added, but not special: always found
    assert tokenizer.decode([268]) == "<tool>"
    assert encode_prompt(tokenizer, "hello") == [267, hello]


def test_an_added_token_that_repeats_one_of_the_vocabulary_is_no_part_of_words():
    base = tokenizer_of()
    tokenizer = BPE([*base.tokens, b"he"], base.merges, base.rules, added={"he": 266})
    ids = vocabulary(MERGES)
    assert tokenizer.encode("he") == [266]
    assert tokenizer.merge([ids["h"], ids["e"]]) == [ids["he"]]


def test_texts_are_composed_and_begun_with_a_space_where_the_tokenizer_says_so():
    assert tokenizer_of(nfc=True).encode("e\u0301") == list("é".encode())
    assert tokenizer_of().encode("e\u0301") == list("e\u0301".encode())
    spaced = with_special(prefix_space=True)
    assert spaced.decode(spaced.encode("world")) == " world" and spaced.decode(spaced.encode(" world")) == " world"
    assert spaced.encode("") == [] and spaced.decode(spaced.encode("a<tool>a")) == " a<tool> a"


@pytest.fixture(scope="module")
def tokenizers() -> list:
    lines = ["one two three four", "five six seven", "the quick brown fox"] * 20
    return [with_special(), SentencePiece(train_tokenizer([(line, line) for line in lines], 300))]


def test_both_kinds_share_one_interface(tokenizers):
    text = "one two\nthree 日本 é 👩‍👩‍👧 fox"
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and max(ids) < tokenizer.size
        assert any("\n" in tokenizer.piece(id) for id in ids)
        again = read_blob(tokenizer.to_blob())
        assert again.encode(text) == ids and again.to_blob() == tokenizer.to_blob()
        assert tokenizer.decode([*ids, *tokenizer.ends, tokenizer.size]) == text
        assert tokenizer.piece(tokenizer.size) == ""
        assert tokenizer.begin is not None and len(tokenizer.ends) == 1
        end = tokenizer.piece(tokenizer.ends[0])
        assert tokenizer.encode(f"{end}one", special=True)[0] == tokenizer.ends[0]
        assert tokenizer.ends[0] not in tokenizer.encode(f"{end}one")
        expected = [tokenizer.begin, *ids] + [tokenizer.separator] * (tokenizer.separator is not None)
        assert encode_prompt(tokenizer, text) == expected
    assert [tokenizer.separator is None for tokenizer in tokenizers] == [True, False]


def test_what_is_shown_of_a_growing_text_is_never_taken_back(tokenizers):
    text = "aé日👩‍👩‍👧z"
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        texts = [tokenizer.decode(ids[:length]) for length in range(len(ids) + 1)]
        shown = [part for part in texts if not part.endswith("\ufffd")]
        assert len(shown) < len(texts) and all(text.startswith(part) for part in shown)


def test_lone_surrogates_are_refused(tokenizers):
    for tokenizer in tokenizers:
        with pytest.raises(UserError, match=r"the text is not in UTF-8: character 3 is '\\ud800'"):
            tokenizer.encode("ab\ud800")


# ---------------------------------------------------------------- sources

END, TURN, TOOL = SPECIAL


def json_content(**changes) -> dict:
    """A tokenizer.json that says what `with_special` is."""
    return {
        "model": {"type": "BPE", "vocab": vocabulary(MERGES), "merges": list(MERGES)},
        "added_tokens": [{"id": id, "content": text, "special": text != TOOL} for text, id in SPECIAL.items()],
        "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": TURN}}, {"Sequence": {"id": "A"}}],
            "special_tokens": {TURN: {"id": TURN, "ids": [267]}},
        },
        **changes,
    }  # fmt: skip


def changed(**model) -> dict:
    content = json_content()
    content["model"].update(model)
    return content


def added(**changes) -> dict:
    token = {"id": 266, "content": "<x>", "special": True, **changes}
    return json_content(added_tokens=[token], post_processor=None)


def gguf_fields(**changes) -> dict:
    tokens = [*vocabulary(MERGES), *SPECIAL]
    fields = {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": list(MERGES), "token_type": [1] * 266 + [3, 3, 4],
        "bos_token_id": 267, "eos_token_id": 266, "add_bos_token": True, **changes,
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}


def write(folder, **files):
    """Files by their names, _ for the point; JSON of what is no text."""
    for name, content in files.items():
        path = folder / name[::-1].replace("_", ".", 1)[::-1]
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


SAMPLE = "hello world, it's <|turn|>12 é 日<tool>\n\n  x 8123"


def assert_same(tokenizer: BPE, ends: tuple[int, ...]):
    expected = with_special()
    for special in (False, True):
        assert tokenizer.encode(SAMPLE, special) == expected.encode(SAMPLE, special)
    assert (tokenizer.begin, tokenizer.ends, tokenizer.size) == (267, ends, 269)
    assert tokenizer.special == expected.special and tokenizer.added == expected.added


def test_tokenizer_json(tmp_path):
    write(tmp_path, tokenizer_json=json_content(), tokenizer_config_json={"eos_token": END})
    write(tmp_path, config_json={"eos_token_id": 266}, generation_config_json={"eos_token_id": [267, 266]})
    assert_same(find_bpe(tmp_path), (266, 267))
    write(tmp_path, tokenizer_json=changed(merges=[merge.split() for merge in MERGES]))  # as newer files have them
    assert_same(find_bpe(tmp_path), (266, 267))


def read_json_content(tmp_path, content: dict) -> BPE:
    return bpe_of_json(write(tmp_path, tokenizer_json=content) / "tokenizer.json")


def test_the_steps_that_tokenizer_json_states_are_taken(tmp_path):
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": splitting.LLAMA_3}, "behavior": "Isolated", "invert": False}
    steps = {"type": "Sequence", "pretokenizers": [split, level]}
    content = json_content(pre_tokenizer=steps, normalizer={"type": "NFC"})
    content["model"]["ignore_merges"] = True
    tokenizer = read_json_content(tmp_path, content)
    assert tokenizer.rules == (splitting.LLAMA_3,) and tokenizer.nfc and tokenizer.whole_words
    assert not tokenizer.prefix_space
    digits = {"type": "Digits", "individual_digits": True}
    steps = {"type": "Sequence", "pretokenizers": [digits, {**level, "use_regex": True}]}
    tokenizer = read_json_content(tmp_path, json_content(pre_tokenizer=steps, post_processor=None))
    assert tokenizer.rules == RULES["smollm"] and not tokenizer.nfc and not tokenizer.whole_words
    assert tokenizer.begin is None
    content = json_content(pre_tokenizer={**level, "add_prefix_space": True, "use_regex": True})
    assert read_json_content(tmp_path, content).prefix_space


def test_gguf_metadata():
    assert_same(bpe_of_gguf(gguf_fields()), (266,))
    assert bpe_of_gguf(gguf_fields(eot_token_id=267, eom_token_id=266)).ends == (266, 267)
    assert bpe_of_gguf(gguf_fields(add_bos_token=None)).begin is None
    assert bpe_of_gguf(gguf_fields(add_bos_token=None, pre="llama-bpe")).begin == 267
    for name in GGUF_RULES:
        assert bpe_of_gguf(gguf_fields(pre=name)).rules in RULES.values()
    assert bpe_of_gguf(gguf_fields(pre="smollm")).rules == RULES["smollm"] and bpe_of_gguf(gguf_fields(pre="qwen2")).nfc


# ---------------------------------------------------------------- what is damaged or not supported


SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
BAD_JSON = {
    "another kind": (changed(type="Unigram"), "Unigram, not byte-level BPE"),
    "an unknown token in a merge": (changed(merges=["h e", "q zz"]), "KeyError: 'zz'"),
    "a merge that makes no token": (changed(merges=["h e", "h o"]), "KeyError: b'ho'"),
    "an added token that strips": (added(rstrip=True), "has rstrip"),
    "marks of word ends": (changed(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "no bytes": (json_content(pre_tokenizer=None), "not ByteLevel"),
    "an unknown split": (json_content(pre_tokenizer=SPLIT), "pre_tokenizer Split"),
    "an unknown normalizer": (json_content(normalizer={"type": "NFKC"}), "normalizer NFKC"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_tokenizer_json_ends_in_one_line_that_names_the_file(tmp_path, case):
    content, message = BAD_JSON[case]
    write(tmp_path, tokenizer_json=content)
    with pytest.raises(UserError, match=message) as error:
        find_bpe(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'tokenizer.json'}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"pre": "mystery"}, "unknown splitting rule 'mystery'"),
    ({"merges": ["a"]}, "no tokenizer that can be read"), ({"bos_token_id": 999}, "token id 999 is named"),
])  # fmt: skip
def test_bad_gguf_metadata_end_in_one_line(changes, message):
    with pytest.raises(UserError, match=rf"model.gguf: .*{message}"):
        gguf_tokenizer("model.gguf", gguf_fields(**changes))


@pytest.mark.parametrize("change", [{"format": "x"}, {"merges": [1, 999]}, {"special": [999]}, None])
def test_damaged_blobs_end_in_one_line(change):
    blob = with_special().to_blob()
    damaged = blob[:500] if change is None else json.dumps({**json.loads(blob), **change}).encode()
    with pytest.raises(UserError, match=r"^the tokenizer") as error:
        read_blob(damaged)
    assert "\n" not in str(error.value)


def test_the_blob_keeps_every_setting():
    for tokenizer in (with_special(nfc=True, prefix_space=True), splitter("smollm"), tokenizer_of(whole_words=True)):
        again = read_blob(tokenizer.to_blob())
        for name in ("tokens", "merges", "rules", "added", "special", "begin", "ends", "nfc", "prefix_space", "whole_words"):
            assert getattr(again, name) == getattr(tokenizer, name), name
