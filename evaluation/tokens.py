"""Splits texts into words: each published score has a tokenization of its own, and only scores with the same
tokenization can be compared."""

import re
import string

from evaluation.stemmer import stem


def rouge_tokens(text: str, stemming: bool) -> list[str]:
    tokens = re.findall("[a-z0-9]+", text.lower())
    return [stem(token) if stemming and len(token) > 3 else token for token in tokens]


def squad_tokens(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(?:an?|the)\b", " ", text).split()


def mteval_tokens(text: str, lowercase: bool) -> list[str]:
    """NIST's mteval-v13a tokens: ASCII punctuation is split off, except for points and commas in numbers,
    apostrophes, and hyphens that do not follow a digit."""
    text = text.lower().rstrip() if lowercase else text.rstrip()
    replaced = {"<skipped>": "", "-\n": "", "\n": " ", "&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
    for old, new in replaced.items():
        text = text.replace(old, new)
    text = re.sub(r"([{-~[-` -&(-+:-@/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)
    return text.split()


_CLITIC = r"n't\b|'(?:s|m|d|ll|re|ve)\b"
_PTB_SPLIT = re.compile(
    rf"(?<=\w)(?:{_CLITIC})|(?<=\bcan)not\b|(?<=\b(?:gon|wan))na\b|(?<=\bgot)ta\b|(?<=\b(?:gim|lem))me\b"
)
_PTB_TOKEN = re.compile(
    rf"""
    {_CLITIC}
    | \b(?:mr|mrs|ms|dr|prof|st|mt|jr|vs|etc)\. | (?:\b[a-z]\.){{2,}}  # abbreviations keep their points
    | \d+(?:[.,:]\d+)+                                             # 1,000 or 30.99 or 12:45
    | \w+(?:[-'/]\w+)*                                            # words and hyphenated words, 20-25, o'clock
    | [#$%&+=@*]                                                  # symbols are tokens, punctuation is dropped
""",
    re.VERBOSE,
)


def ptb_tokens(text: str) -> list[str]:
    """Penn Treebank tokens as COCO evaluation makes them: "It's under £20, isn't it?" gives it 's under # 20
    is n't it."""
    text = text.lower().replace("’", "'").replace("£", "#")  # CoreNLP writes pounds as #
    return _PTB_TOKEN.findall(_PTB_SPLIT.sub(r" \g<0>", text))
