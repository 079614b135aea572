"""How byte-level BPE splits a text into words, so that no token extends beyond the end of one.

Every family has a regular expression for it, written for a library that supports Unicode's categories (\\p{L}
is any letter). Python's `re` does not, so the categories are expanded to ranges of characters here, made from
`unicodedata`.
"""

import functools
import itertools
import re
import sys
import unicodedata

from common.errors import UserError
from common.files import reading

# The rules of the families, as in their tokenizer.json. \p{L}: letters, \p{N}: numbers, \p{M}: marks; among
# letters, \p{Lu}: capital, \p{Ll}: small, \p{Lt}: title case, \p{Lm}: modifiers, \p{Lo}: others, such as
# those of scripts without capitals.
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# These come before another rule: SmolLM splits off the digits, then GPT-2's rule splits the rest.
DIGIT, NUMBER = r"\p{N}", r"\p{N}+"

# Unicode's white space; Python's \s has U+001C to U+001F, too.
WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
TOKEN = re.compile(r"\\([pP])\{(\w+)\}|\\(.)|([\[\]])|[^\\\[\]]+|.", re.DOTALL)  # of a regular expression


@functools.cache
def categories() -> list[tuple[int, int, str]]:
    """(first, last, general category) of all runs of characters that have one category in common."""
    runs, every_code = [], range(sys.maxunicode + 1)
    for category, run in itertools.groupby(every_code, lambda code: unicodedata.category(chr(code))):
        codes = list(run)
        runs.append((codes[0], codes[-1], category))
    return runs


@functools.cache
def character_class(name: str, inverted: bool) -> str:
    r"""What [] must contain for \p{name}, or if inverted for \P{name}: the characters whose category begins,
    or if inverted does not begin, with this name."""
    members = ""
    for first, last, category in categories():
        if category.startswith(name) != inverted:
            members += rf"\U{first:08x}-\U{last:08x}"
    if not members:
        raise UserError(f"unknown character category {name!r}")
    return members


def compile_rule(pattern: str) -> re.Pattern:
    r"""Compiles a splitting rule for Python's `re`, as one group, so that `split` returns the matches, too.
    Raises UserError for anything that `re` would read differently from the library that the rule was written
    for (Oniguruma)."""
    out, inside = [], False
    for found in TOKEN.finditer(pattern):
        kind, name, escaped, bracket = found.groups()
        other = "" if kind or escaped or bracket else found[0]
        unknown_escape = escaped and escaped.isalnum() and escaped not in ("rnts" if inside else "rntsS")
        nested = bracket and (bracket == "[") == inside
        if unknown_escape or nested or ("&&" in other if inside else re.search(r"[$^.]", other)):
            raise UserError(f"the splitting rule has {found[0]}, which is not supported there")
        if kind:
            members = character_class(name, kind == "P")
            out.append(members if inside else f"[{members}]")
        elif escaped == "s" or (escaped == "S" and not inside):
            out.append(WHITE_SPACE if inside else f"[{'^' * (escaped == 'S')}{WHITE_SPACE}]")
        else:
            out.append(found[0])
        inside = bracket == "[" if bracket else inside
    with reading("the splitting rule", "is no regular expression"):
        rule = re.compile("(" + "".join(out) + ")")
    if rule.groups > 1 or rule.match(""):
        raise UserError("the splitting rule has groups, or matches nothing at all; neither is supported")
    return rule
