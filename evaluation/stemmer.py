"""Word stems, so that "connected" and "connections" count as one word: Porter's algorithm as a table of
rules.

A word is read as a pattern of consonants (c) and vowels (v); its measure m is the number of times that a
vowel is followed by a consonant, about its syllables: m = 0 in "tree", 1 in "trouble", 2 in "private". Nearly
every rule has a condition on the m of what it leaves.
"""

from collections.abc import Callable
from functools import cache

# a suffix, what replaces it, and the condition on the start of the word before it
Rule = tuple[str, str, Callable[[str], bool]]


@cache
def stem(word: str) -> str:
    """The stem of one word, in lower case; it need not be a word itself: "relational" gives "relat".

    Source: Porter 1980, An algorithm for suffix stripping; equal to nltk's PorterStemmer in its default mode,
    NLTK_EXTENSIONS. That leaves words of at most two letters, knows some irregular ones, and has rules that
    the paper lacks, marked "later" below.
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
    """Replaces the first suffix that fits, if its condition holds; no other is tried, so longer suffixes come
    before their endings."""
    for suffix, replacement, condition in rules:
        if word.endswith(suffix):
            start = word.removesuffix(suffix)
            return start + replacement if condition(start) else word
    return word


def _repair(start: str) -> str:
    """Makes a word again from what a participle's ending left: conflat(ed) and fil(ing) get an e back,
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
    have followed. Later: or it is like "us", as a whole."""
    return _pattern(start) == "vc" or (_pattern(start).endswith("cvc") and start[-1] not in "wxy")


def _rules(condition: Callable[[str], bool], pairs: str) -> list[Rule]:
    """Rules with the same condition, written suffix:replacement."""
    return [(*pair.split(":"), condition) for pair in pairs.split()]


def _always(start: str) -> bool:
    return True


def _one_letter(start: str) -> bool:
    return len(start) == 1


def _has_vowel(start: str) -> bool:
    return "v" in _pattern(start)


def _positive(start: str) -> bool:
    return _measure(start) > 0


def _long(start: str) -> bool:
    return _measure(start) > 1


# later: words with stems of their own, and words that stay as they are
IRREGULAR = {"skies": "sky", "dying": "die", "lying": "lie", "tying": "tie"}
IRREGULAR |= {"innings": "inning", "outings": "outing", "cannings": "canning"}
IRREGULAR |= {word: word for word in ("sky", "news", "inning", "outing", "canning", "howe")}
IRREGULAR |= {word: word for word in ("proceed", "exceed", "succeed")}
# ied: later
PARTICIPLES = _rules(_always, "ied:i") + _rules(_positive, "eed:ee") + _rules(_has_vowel, "ed: ing:")
STEPS = [
    _rules(_one_letter, "ies:ie"),  # later: ties, not flies
    _rules(_always, "sses:ss ies:i ss:ss s:"),
    _rules(_one_letter, "ied:ie"),  # later
    PARTICIPLES,
    # the paper: after any start with a vowel
    [("y", "i", lambda start: len(start) > 1 and _pattern(start).endswith("c"))],
    _rules(_positive, "alli:al"),  # a step of its own later, so that "rationally" goes on as "rational"
    [
        *_rules(_positive, "ational:ate tional:tion enci:ence anci:ance izer:ize entli:ent eli:e ousli:ous"),
        *_rules(_positive, "ization:ize ation:ate ator:ate"),
        *_rules(_positive, "alism:al iveness:ive fulness:ful ousness:ous aliti:al iviti:ive biliti:ble"),
        *_rules(_positive, "bli:ble fulli:ful"),  # later: the paper has abli:able
        ("logi", "log", lambda start: _positive(start + "l")),  # later
    ],
    _rules(_positive, "icate:ic ative: alize:al iciti:ic ical:ic ful: ness:"),
    [
        *_rules(_long, "al: ance: ence: er: ic: able: ible: ant: ement: ment: ent: ou: ism: ate: iti:"),
        *_rules(_long, "ous: ive: ize:"),
        ("ion", "", lambda start: _long(start) and start[-1] in "st"),
    ],
    [("e", "", lambda start: _long(start) or (_measure(start) == 1 and not _short_end(start)))],
    [("ll", "l", lambda start: _long(start + "l"))],
]
