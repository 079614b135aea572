"""How good is a generated text? BLEU and ROUGE-L against human references, and agreement with the full model's output.

Standard library and NumPy only. Every score lies in [0, 1], higher is better; multiply by 100 for the usual BLEU points.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

MAX_ORDER = 4  # BLEU-4 counts 1-grams to 4-grams
COCO_BETA = 1.2  # weight of recall against precision in COCO's ROUGE-L


def bleu(hypotheses: list[str], references: list[list[str]], lowercase: bool = False) -> float:
    """Corpus BLEU-4 in [0, 1], equal to sacrebleu's default corpus_bleu (13a tokens, exponential smoothing) divided by 100.

    BP * exp(mean over n = 1..4 of log p_n), with p_n the share of hypothesis n-grams found in the references, each counted at
    most as often as in the one reference that has it most often. BP = exp(1 - r / h) if the hypotheses' total length h is below r,
    the total of the reference lengths closest to each hypothesis (the shorter on ties). The k-th order without a match counts
    1 / 2^k matches; without any match, or without any 4-gram, the score is 0. Inputs may have different numbers of references:
    do not pad them with empty texts, which would count as references of length 0.

    Sources: Papineni et al. 2002; smoothing and tokens as in NIST's mteval-v13a. With lowercase=True, the BLEU of the E2E challenge.
    Raises ValueError for no hypotheses, for lists of different length, and for an input without a reference.
    """
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(f"got {len(hypotheses)} hypotheses and {len(references)} lists of references: need equal numbers, at least 1")
    matches, totals = [0] * MAX_ORDER, [0] * MAX_ORDER
    hypothesis_length = reference_length = 0
    for hypothesis, texts in zip(hypotheses, references):
        _require_references(texts)
        tokens = _mteval_tokens(hypothesis, lowercase)
        reference_tokens = [_mteval_tokens(text, lowercase) for text in texts]
        hypothesis_length += len(tokens)
        reference_length += min((abs(len(r) - len(tokens)), len(r)) for r in reference_tokens)[1]
        for n in range(1, MAX_ORDER + 1):
            counts = _ngrams(tokens, n)
            limits = Counter()
            for r in reference_tokens:
                limits |= _ngrams(r, n)  # union of multisets: the maximum over references
            matches[n - 1] += (counts & limits).total()
            totals[n - 1] += counts.total()

    if not any(matches) or not all(totals):
        return 0.0
    log_precision, credit = 0.0, 1.0
    for matched, total in zip(matches, totals):
        if matched == 0:
            credit /= 2
        log_precision += math.log((matched or credit) / total) / MAX_ORDER
    return min(1.0, math.exp(1 - reference_length / hypothesis_length)) * math.exp(log_precision)


def rouge_l(hypothesis: str, references: list[str]) -> float:
    """ROUGE-L of one text in [0, 1] as in COCO caption evaluation, which the E2E challenge used; a corpus scores the mean over texts.

    With P = max over references of LCS / hypothesis length, R = max over references of LCS / reference length and beta = 1.2:
    (1 + beta^2) P R / (R + beta^2 P). P and R may come from different references. LCS is the longest common subsequence of
    the lower-cased Penn Treebank tokens without punctuation. Two texts without tokens count as equal.

    Sources: Lin 2004; Chen et al. 2015 (pycocoevalcap). Raises ValueError for no references.
    """
    _require_references(references)
    tokens = _ptb_tokens(hypothesis) or [""]  # as in COCO, no tokens are one empty token, which matches only another one
    reference_tokens = [_ptb_tokens(text) or [""] for text in references]
    common = [_lcs_length(tokens, r) for r in reference_tokens]
    precision = max(common) / len(tokens)
    recall = max(c / len(r) for c, r in zip(common, reference_tokens))
    return _f_measure(precision, recall, COCO_BETA)


def rouge_l_f1(hypothesis: str, reference: str) -> float:
    """ROUGE-L F1 in [0, 1] of an early-exit text against the full model's text, equal to the rouge_score package's rougeL.

    2 P R / (P + R) with P = LCS / hypothesis length and R = LCS / reference length, on lower-cased runs of a-z and 0-9.
    One exception to rouge_score: identical texts score 1 even where no such run is left. Source: Lin 2004.
    """
    if hypothesis == reference:
        return 1.0
    tokens, reference_tokens = (re.findall("[a-z0-9]+", text.lower()) for text in (hypothesis, reference))
    if not tokens or not reference_tokens:
        return 0.0
    common = _lcs_length(tokens, reference_tokens)
    return _f_measure(common / len(tokens), common / len(reference_tokens), beta=1.0)


def token_agreement(tokens: Sequence[int], full_tokens: Sequence[int]) -> float:
    """Share in [0, 1] of positions with the same token in both sequences, over the longer one's length; 1 for two empty ones."""
    longest = max(len(tokens), len(full_tokens))
    return sum(a == b for a, b in zip(tokens, full_tokens)) / longest if longest else 1.0


def bootstrap(statistic: Callable[..., float], *columns: Sequence[float], level=0.95, resamples=1000, seed=0) -> list[float]:
    """Percentile bootstrap interval [low, high] of `statistic(*columns)`, the columns' rows being drawn together, with replacement.

    The (1 - level) / 2 and (1 + level) / 2 quantiles of the statistic over the resamples (Efron 1979); the same seed gives the same
    interval. Raises ValueError for no rows and for a level outside (0, 1).
    """
    table = np.asarray(columns, dtype=float)  # (columns, rows)
    if table.size == 0:
        raise ValueError("got no values: give at least 1 row")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: choose a share between 0 and 1, such as 0.95")
    draws = np.random.default_rng(seed).integers(0, table.shape[1], size=(resamples, table.shape[1]))
    values = [statistic(*table[:, draw]) for draw in draws]
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()


def _require_references(references: list[str]) -> None:
    if isinstance(references, str) or not references:
        raise ValueError(f"got references {references!r}: give every hypothesis a list of at least 1 text")


def _f_measure(precision: float, recall: float, beta: float) -> float:
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _ngrams(tokens: list[str], n: int) -> Counter:
    return Counter(zip(*(tokens[i:] for i in range(n))))


def _lcs_length(a: list[str], b: list[str]) -> int:
    """Longest common subsequence, one integer operation per token of b (Hyyrö 2004): bit i of row is 0 where the LCS grows at a[i]."""
    positions: dict[str, int] = {}
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << i
    everything = row = (1 << len(a)) - 1
    for token in b:
        matched = row & positions.get(token, 0)
        row = (row + matched | row - matched) & everything
    return len(a) - row.bit_count()


def _mteval_tokens(text: str, lowercase: bool) -> list[str]:
    """NIST's mteval-v13a tokens: ASCII punctuation stands alone, save for points and commas in numbers, hyphens and apostrophes."""
    text = (text.lower() if lowercase else text).rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = re.sub(r"([{-~[-` -&(-+:-@/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)
    return text.split()


_CLITIC = r"n't\b|'(?:s|m|d|ll|re|ve)\b"
_PTB_SPLIT = re.compile(rf"(?<=\w)(?:{_CLITIC})|(?<=\bcan)not\b|(?<=\b(?:gon|wan))na\b|(?<=\bgot)ta\b|(?<=\b(?:gim|lem))me\b")
_PTB_TOKEN = re.compile(rf"""
    {_CLITIC}
    | \b(?:mr|mrs|ms|dr|prof|st|mt|jr|vs|etc)\. | (?:\b[a-z]\.){{2,}}  # abbreviations keep their points
    | \d+(?:[.,:]\d+)+                                             # 1,000 or 30.99 or 12:45
    | \w+(?:[-'/]\w+)*                                            # words and hyphenated words, 20-25, o'clock
    | [#$%&+=@*]                                                  # symbols are tokens, punctuation is dropped
""", re.VERBOSE)


def _ptb_tokens(text: str) -> list[str]:
    """Penn Treebank tokens as COCO evaluation makes them: "It's under £20, isn't it?" gives it 's under # 20 is n't it."""
    text = text.lower().replace("’", "'").replace("£", "#")  # CoreNLP writes pounds as #
    return _PTB_TOKEN.findall(_PTB_SPLIT.sub(r" \g<0>", text))
