"""How good is a generated text? BLEU, ROUGE, and answers against human references; variety; agreement with
the full model's output.

Only the standard library and NumPy are needed. Every score lies in [0, 1], and higher is better except for
repetition; multiply by 100 for the usual points.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from evaluation.tokens import mteval_tokens, ptb_tokens, rouge_tokens, squad_tokens

MAX_ORDER = 4  # BLEU-4 counts 1-grams to 4-grams
COCO_BETA = 1.2  # weight of recall against precision in COCO's ROUGE-L
ROUGE_VARIANTS = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Metric:
    """A score of many texts that is computed from sums over them, so that scoring a resample of the texts
    costs one sum.

    counts: (text, its references) -> numbers, the same number of them for every text. score: their sums over
    the texts -> [0, 1].
    """

    counts: Callable[[str, list[str]], Sequence[float]]
    score: Callable[[np.ndarray], float]

    def count(self, hypotheses: list[str], references: list[list[str]]) -> np.ndarray:
        """Returns the `counts` of every text: (texts, numbers)."""
        pairs = zip(hypotheses, references, strict=True)
        return np.array([self.counts(*pair) for pair in pairs], dtype=float)

    def __call__(self, hypotheses: list[str], references: list[list[str]]) -> float:
        return self.score(self.count(hypotheses, references).sum(0))


def mean_of(score: Callable[[str, list[str]], float]) -> Metric:
    """Makes a metric that is the mean over texts of a score of one text."""
    return Metric(lambda *texts: (score(*texts), 1), lambda sums: float(sums[0] / sums[1]))


def bleu_counts(hypothesis: str, references: list[str], lowercase: bool) -> list[int]:
    """Returns the counts that BLEU sums over texts: matching n-grams and all n-grams, each for n = 1..4, and
    the lengths h of the text and r of the reference closest to it in length."""
    tokens = mteval_tokens(hypothesis, lowercase)
    reference_tokens = [mteval_tokens(text, lowercase) for text in references]
    matches, totals = [], []
    for n in range(1, MAX_ORDER + 1):
        counts = _ngrams(tokens, n)
        limits = Counter()
        for r in reference_tokens:
            limits |= _ngrams(r, n)  # union of multisets: the maximum over references
        matches.append((counts & limits).total())
        totals.append(counts.total())
    _, closest = min((abs(len(r) - len(tokens)), len(r)) for r in reference_tokens)
    return [*matches, *totals, len(tokens), closest]


def bleu_score(sums: np.ndarray) -> float:
    """Corpus BLEU-4 in [0, 1] from the sums of `bleu_counts`, equal to sacrebleu's default corpus_bleu (13a
    tokens, exponential smoothing) divided by 100.

    BP * exp(mean over n = 1..4 of log p_n), with p_n the share of hypothesis n-grams found in the references,
    each counted at most as often as in the one reference that has it most often. BP = exp(1 - r / h) if the
    hypotheses' total length h is below r, the total of the reference lengths closest to each hypothesis (the
    shorter on ties). The k-th order without a match counts 1 / 2^k matches; without any match, or without any
    4-gram, the score is 0. Inputs may have different numbers of references: do not pad them with empty texts,
    which would count as references of length 0.

    Sources: Papineni et al. 2002; smoothing and tokens as in NIST's mteval-v13a. On lower-cased texts, this
    is the BLEU of the E2E challenge.
    """
    matches, totals = sums[:MAX_ORDER], sums[MAX_ORDER : 2 * MAX_ORDER]
    hypothesis_length, reference_length = sums[2 * MAX_ORDER :]
    if not any(matches) or not all(totals):
        return 0.0
    log_precision, credit = 0.0, 1.0
    for matched, total in zip(matches, totals):
        if matched == 0:
            credit /= 2
        log_precision += math.log((matched or credit) / total) / MAX_ORDER
    return min(1.0, math.exp(1 - reference_length / hypothesis_length)) * math.exp(log_precision)


def rouge_l(hypothesis: str, references: list[str]) -> float:
    """ROUGE-L of one text in [0, 1] as in COCO caption evaluation, which the E2E challenge used; a corpus
    score is the mean over texts.

    With P = max over references of LCS / hypothesis length, R = max over references of LCS / reference length
    and beta = 1.2: (1 + beta^2) P R / (R + beta^2 P). P and R may come from different references. LCS is the
    longest common subsequence of the lower-cased Penn Treebank tokens without punctuation. Two texts without
    tokens count as equal.

    Sources: Lin 2004; Chen et al. 2015 (pycocoevalcap).
    """
    # as in COCO, a text without tokens has one empty token, which matches only another empty token
    tokens = ptb_tokens(hypothesis) or [""]
    reference_tokens = [ptb_tokens(text) or [""] for text in references]
    common = [_lcs_length(tokens, r) for r in reference_tokens]
    precision = max(common) / len(tokens)
    recall = max(c / len(r) for c, r in zip(common, reference_tokens))
    return (1 + COCO_BETA**2) * precision * recall / (recall + COCO_BETA**2 * precision) if recall else 0.0


def rouge_l_f1(hypothesis: str, reference: str) -> float:
    """ROUGE-L F1 in [0, 1] of an early-exit text compared with the full model's text, equal to rougeL of the
    rouge_score package.

    2 P R / (P + R) with P = LCS / hypothesis length and R = LCS / reference length, on lower-cased runs of
    a-z and 0-9. Unlike in rouge_score, identical texts score 1 even if they contain no such run. Source: Lin
    2004.
    """
    return 1.0 if hypothesis == reference else rouge_f1(hypothesis, [reference], "rougeL")


def rouge_f1(hypothesis: str, references: list[str], variant: str, stemming: bool = False) -> float:
    """F1 in [0, 1] of a ROUGE variant for one text, the best over the references, equal to that of the
    rouge_score package.

    2 P R / (P + R), with P the share of the hypothesis' tokens that match and R that of the reference's.
    rouge1 and rouge2 count n-grams in place of tokens, each at most as often as in the other text. rougeL
    matches the longest common subsequence. Tokens are lower-cased runs of a-z and 0-9; stemming reduces those
    of more than three letters to their stems. A text without tokens scores 0.

    Source: Lin 2004.
    """
    tokens = rouge_tokens(hypothesis, stemming)
    return max(_rouge_f1(variant, tokens, rouge_tokens(text, stemming)) for text in references)


def squad_exact_match(hypothesis: str, references: list[str]) -> float:
    """1 if an answer equals one of the references, else 0, as in the official evaluation of SQuAD v1.1; a
    corpus score is the mean.

    Case, ASCII punctuation, the words a, an and the, and the amount of white space do not count. Source:
    Rajpurkar et al. 2016.
    """
    return float(any(squad_tokens(hypothesis) == squad_tokens(text) for text in references))


def squad_f1(hypothesis: str, references: list[str]) -> float:
    """Best F1 in [0, 1] of an answer's tokens over the references, as in the official evaluation of SQuAD
    v1.1.

    Tokens are the words that squad_exact_match compares, in any order, each counted at most as often as in
    the other text. Without a common token F1 is 0, even for two texts without tokens, which are an exact
    match.
    """
    counts = Counter(squad_tokens(hypothesis))
    return max(_overlap_f1(counts, Counter(squad_tokens(text))) for text in references)


def distinct(texts: list[str], n: int) -> float:
    """distinct-n in [0, 1], a measure of variety: the number of different n-grams divided by that of all
    n-grams, over all texts. Tokens are lower-cased and separated by white space.

    After Li et al. 2016, who divide by the number of tokens instead. It is 0 if there is no n-gram.
    """
    counts = Counter()
    for text in texts:
        counts.update(_ngrams(text.lower().split(), n))
    return len(counts) / counts.total() if counts else 0.0


def repetition(tokens: Sequence[int]) -> float:
    """rep-4 in [0, 1), lower is better: the share of a sequence's 4-grams that occurred in it before, 0 for
    fewer than 4 tokens.

    1 - different 4-grams / 4-grams, the seq-rep-4 of Welleck et al. 2020.
    """
    counts = _ngrams(tokens, 4)
    return 1 - len(counts) / counts.total() if counts else 0.0


def token_agreement(tokens: Sequence[int], full_tokens: Sequence[int]) -> float:
    """Returns the share in [0, 1] of positions with the same token in both sequences, over the length of the
    longer one. It is 1 for two empty sequences."""
    longest = max(len(tokens), len(full_tokens))
    return sum(a == b for a, b in zip(tokens, full_tokens)) / longest if longest else 1.0


def resampled_sums(counts: np.ndarray, resamples=1000, seed=0) -> np.ndarray:
    """Returns the sums of `counts` (texts, numbers) over bootstrap resamples of the texts, drawn with
    replacement (Efron 1979): (resamples, numbers). The resamples are the same for every `counts` with equally
    many texts, so that two rows of a table can be compared resample by resample."""
    texts = len(counts)
    times_drawn = np.random.default_rng(seed).multinomial(texts, np.full(texts, 1 / texts), size=resamples)
    return times_drawn @ counts


def resampled_means(values: Sequence[float]) -> np.ndarray:
    """Returns the means of bootstrap resamples of the values: (resamples,)."""
    return resampled_sums(np.array(values, dtype=float)[:, None])[:, 0] / len(values)


def interval(values: Sequence[float], level: float = 0.95) -> list[float]:
    """Returns the quantiles between which the share `level` of the values lies. For resamples, this is a
    bootstrap interval."""
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()


def _f1(common: int, length: int, reference_length: int) -> float:
    """2 P R / (P + R), with P = common / length and R = common / reference length; 0 if nothing is common."""
    return 2 * common / (length + reference_length) if common else 0.0


def _overlap_f1(counts: Counter, reference_counts: Counter) -> float:
    return _f1((counts & reference_counts).total(), counts.total(), reference_counts.total())


def _ngrams(tokens: Sequence, n: int) -> Counter:
    return Counter(zip(*(tokens[i:] for i in range(n))))


def _lcs_length(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence, with a few integer operations for each token of b (Hyyrö
    2004): bit i of `row` is 0 where the LCS of a and the tokens of b so far grows at a[i]."""
    positions: dict[str, int] = {}
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << i
    everything = row = (1 << len(a)) - 1
    for token in b:
        matched = row & positions.get(token, 0)
        row = (row + matched | row - matched) & everything
    return len(a) - row.bit_count()


def _rouge_f1(variant: str, tokens: list[str], reference_tokens: list[str]) -> float:
    if variant == "rougeL":
        return _f1(_lcs_length(tokens, reference_tokens), len(tokens), len(reference_tokens))
    n = int(variant[-1])
    return _overlap_f1(_ngrams(tokens, n), _ngrams(reference_tokens, n))


METRICS: dict[str, Metric] = {
    "bleu": Metric(partial(bleu_counts, lowercase=False), bleu_score),
    "bleu_lower": Metric(partial(bleu_counts, lowercase=True), bleu_score),
    "rougeL_coco": mean_of(rouge_l),
    "exact_match": mean_of(squad_exact_match),
    "f1": mean_of(squad_f1),
}
for _variant in ROUGE_VARIANTS:
    METRICS[_variant] = mean_of(partial(rouge_f1, variant=_variant))
    METRICS[f"{_variant}_stem"] = mean_of(partial(rouge_f1, variant=_variant, stemming=True))
