"""Word stems, so that "connected" and "connections" count as one word: Porter's algorithm as a table of
rules.

A word is read as a pattern of consonants (c) and vowels (v); its measure m is the number of times that a
vowel is followed by a consonant, roughly its number of syllables: m = 0 in "tree", 1 in "trouble", 2 in
"private". Nearly every rule has a condition on the pattern of the word without the suffix, written as a
regular expression: vc means that m is above 0, vc.*vc that it is above 1.
"""

import re
from collections.abc import Callable
from functools import cache

# a suffix, what replaces it, and the condition on the start of the word before it
Rule = tuple[str, str, Callable[[str], bool]]


@cache
def stem(word: str) -> str:
    """The stem of one word, in lower case; it need not be a word itself: "relational" gives "relat".

    Source: Porter 1980, An algorithm for suffix stripping; equal to nltk's PorterStemmer in its default mode,
    NLTK_EXTENSIONS. This mode leaves words of at most two letters unchanged, lists some irregular words, and
    has rules that the paper lacks, marked "later" below.
    """
    word = word.lower()
    if word in IRREGULAR or len(word) <= 2:
        return IRREGULAR.get(word, word)
    for rules in STEPS:
        before, word = word, _apply(rules, word)
        if rules is PARTICIPLES and word != before:
            word = _repair(word)
    return word


def _apply(rules: list[Rule], word: str) -> str:
    """Replaces the first suffix that fits, if its condition holds. No other suffix is tried, so a longer one
    must come before a shorter one that it ends with."""
    for suffix, replacement, condition in rules:
        if word.endswith(suffix):
            start = word.removesuffix(suffix)
            return start + replacement if condition(start) else word
    return word


def _repair(start: str) -> str:
    """Restores a word from which a participle's ending was removed: conflat(ed) and fil(ing) get an e back,
    hopp(ing) loses a p."""
    if start.endswith(("at", "bl", "iz")) or (_measure(start) == 1 and _short_end(start)):
        return start + "e"
    doubled = start[-2:] == 2 * start[-1] and _pattern(start).endswith("c")
    return start[:-1] if doubled and start[-1] not in "lsz" else start


def _pattern(start: str) -> str:
    """Returns "c" for each consonant and "v" for each vowel; y is a vowel after a consonant: "toy" is cvc,
    "system" cvccvc."""
    pattern = ""
    for letter in start:
        pattern += "v" if letter in "aeiou" or (letter == "y" and pattern.endswith("c")) else "c"
    return pattern


def _measure(start: str) -> int:
    return _pattern(start).count("vc")


def _short_end(start: str) -> bool:
    """Whether a start ends like "hop": consonant, vowel, and a consonant except w, x or y, so that an e may
    have followed. Later: or the whole start is like "us"."""
    return _pattern(start) == "vc" or (_pattern(start).endswith("cvc") and start[-1] not in "wxy")


def _rules(form: str, pairs: str) -> list[Rule]:
    """Makes rules (suffix:replacement) for starts whose pattern matches the regular expression `form`."""

    def condition(start: str) -> bool:
        return re.search(form, _pattern(start)) is not None

    return [(*pair.split(":"), condition) for pair in pairs.split()]


# later: words with stems of their own, and words that are left unchanged
IRREGULAR = {"skies": "sky", "dying": "die", "lying": "lie", "tying": "tie"}
IRREGULAR |= {"innings": "inning", "outings": "outing", "cannings": "canning"}
IRREGULAR |= {word: word for word in ("sky", "news", "inning", "outing", "canning", "howe")}
IRREGULAR |= {word: word for word in ("proceed", "exceed", "succeed")}
# ied: later
PARTICIPLES = _rules("", "ied:i") + _rules("vc", "eed:ee") + _rules("v", "ed: ing:")
STEPS = [
    _rules("^.$", "ies:ie"),  # later: ties, not flies
    _rules("", "sses:ss ies:i ss:ss s:"),
    _rules("^.$", "ied:ie"),  # later
    PARTICIPLES,
    _rules(".c$", "y:i"),  # the paper: after any start with a vowel
    _rules("vc", "alli:al"),  # later: a step of its own, so that "rationally" continues as "rational"
    [
        *_rules("vc", "ational:ate tional:tion enci:ence anci:ance izer:ize entli:ent eli:e ousli:ous"),
        *_rules("vc", "ization:ize ation:ate ator:ate"),
        *_rules("vc", "alism:al iveness:ive fulness:ful ousness:ous aliti:al iviti:ive biliti:ble"),
        *_rules("vc", "bli:ble fulli:ful"),  # later: the paper has abli:able
        *_rules("v", "logi:log"),  # later; with the l, which is a consonant, m is above 0
    ],
    _rules("vc", "icate:ic ative: alize:al iciti:ic ical:ic ful: ness:"),
    [
        *_rules("vc.*vc", "al: ance: ence: er: ic: able: ible: ant: ement: ment: ent: ou: ism: ate: iti:"),
        *_rules("vc.*vc", "ous: ive: ize:"),
        *_rules("vc.*v", "sion:s tion:t"),  # with the s or t, m is above 1
    ],
    [("e", "", lambda start: _measure(start) > 1 or (_measure(start) == 1 and not _short_end(start)))],
    _rules("vc.*v", "ll:l"),  # with the l, m is above 1
]
