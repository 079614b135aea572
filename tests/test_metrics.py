"""Metrics: hand-worked numbers, properties, and values of the packages that define them (literals: none is needed to run this)."""

import math
import random

import numpy as np
import pytest

from metrics import _ptb_tokens, bleu, bootstrap, rouge_l, rouge_l_f1, token_agreement

HYPOTHESES = [
    "The Punter is a kid-friendly pub near Café Rouge, under £20.",
    "blue spice isn't cheap; it costs £20-25 per meal.",
    "It's a Coffee Shop.",
]
REFERENCES = [  # a different number for every input
    [
        "The Punter is a pub near Café Rouge for less than £20.",
        "Near Café Rouge, The Punter is a kid friendly pub under £20.",
        "A cheap pub: The Punter.",
    ],
    ["Blue Spice isn't cheap, it costs £20-25."],
    ["It is a coffee shop in the city.", "It's a coffee shop."],
]
FIRST_REFERENCES = [texts[:1] for texts in REFERENCES]
TEXT_SCORES = {  # text against text, so that the properties below hold for all of them
    "bleu": lambda hypothesis, reference: bleu([hypothesis], [[reference]]),
    "rouge_l": lambda hypothesis, reference: rouge_l(hypothesis, [reference]),
    "rouge_l_f1": rouge_l_f1,
    "token_agreement": lambda hypothesis, reference: token_agreement(hypothesis.split(), reference.split()),
}
every_text_score = pytest.mark.parametrize("score", TEXT_SCORES.values(), ids=TEXT_SCORES.keys())


@every_text_score
def test_identical_texts_score_one(score):
    assert score("It isn't a pub, is it?", "It isn't a pub, is it?") == pytest.approx(1.0, abs=1e-12)


@every_text_score
def test_texts_without_a_common_token_score_zero(score):
    assert score("one two three four five", "six seven eight nine ten") == 0.0


@every_text_score
def test_an_empty_text_scores_zero_against_words(score):
    assert score("", "a b c d") == 0.0
    assert score("a b c d", "") == 0.0


@every_text_score
def test_scores_stay_between_zero_and_one(score):
    draw = random.Random(0)
    for _ in range(200):
        hypothesis, reference = (" ".join(draw.choices("abcd", k=draw.randint(1, 8))) for _ in range(2))
        assert 0.0 <= score(hypothesis, reference) <= 1.0 + 1e-12


def test_bleu_clips_counts_and_halves_the_credit_of_each_order_without_a_match():
    # Papineni's example: "the" counts twice at most; orders 2, 3 and 4 match nothing among 6, 5 and 4 n-grams
    score = bleu(["the the the the the the the"], [["The cat is on the mat", "There is a cat on the mat"]], lowercase=True)
    assert score == pytest.approx((2 / 7 * (1 / 2) / 6 * (1 / 4) / 5 * (1 / 8) / 4) ** 0.25, rel=1e-12)


def test_bleu_penalizes_texts_shorter_than_the_closest_reference():
    assert bleu(["a b c d"], [["a b c d e f", "a b c d e f g"]]) == pytest.approx(math.exp(1 - 6 / 4), rel=1e-12)


def test_bleu_takes_the_shorter_of_two_equally_close_references():
    assert bleu(["a b c d e"], [["a b c d e f", "a b c d"]]) == pytest.approx(1.0, rel=1e-12)


def test_bleu_pools_counts_over_the_corpus():
    # 9 of 10, 7 of 8, 5 of 6 and 3 of 4 n-grams match: neither input's score is averaged
    score = bleu(["a b c d e", "a b c d x"], [["a b c d e"], ["a b c d e"]])
    assert score == pytest.approx((9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25, rel=1e-12)


def test_bleu_of_texts_shorter_than_four_tokens_is_zero():
    assert bleu(["a b c"], [["a b c"]]) == 0.0


@pytest.mark.parametrize(
    "lowercase, references, expected",
    [
        (False, REFERENCES, 0.40161488005957563),
        (True, REFERENCES, 0.5965987539384402),
        (False, FIRST_REFERENCES, 0.3229257788926105),
        (True, FIRST_REFERENCES, 0.4198418283721081),
    ],
)
def test_bleu_equals_sacrebleu(lowercase, references, expected):
    # sacrebleu 2.6.0: corpus_bleu(..., lowercase=lowercase).score / 100, missing references given as None
    assert bleu(HYPOTHESES, references, lowercase) == pytest.approx(expected, rel=1e-12)


def test_smoothed_bleu_equals_sacrebleu():
    # sacrebleu 2.6.0; no 3-gram and no 4-gram matches
    assert bleu(["the cat sat on the mat"], [["a dog sat on one"]]) == pytest.approx(0.16233395773754952, rel=1e-12)


def test_the_order_of_references_does_not_matter():
    reversed_references = [texts[::-1] for texts in REFERENCES]
    assert bleu(HYPOTHESES, reversed_references) == bleu(HYPOTHESES, REFERENCES)
    for hypothesis, texts in zip(HYPOTHESES, REFERENCES):
        assert rouge_l(hypothesis, texts[::-1]) == rouge_l(hypothesis, texts)


def test_rouge_l_takes_precision_and_recall_from_the_best_reference_each():
    # "a b" gives P = 2/3 and R = 1, "a b c d e f" gives P = 1 and R = 1/2: both maxima are 1
    assert rouge_l("a b c", ["a b", "a b c d e f"]) == pytest.approx(1.0, rel=1e-12)


def test_rouge_l_weighs_recall_by_beta():
    # LCS 2: P = 1, R = 2/5, so 2.44 * 0.4 / (0.4 + 1.44)
    assert rouge_l("a d", ["a b c d e"]) == pytest.approx(2.44 * 0.4 / 1.84, rel=1e-12)


def test_rouge_l_ignores_case_and_punctuation():
    assert rouge_l("IT'S A PUB!", ["it's a pub."]) == pytest.approx(1.0, rel=1e-12)


def test_rouge_l_equals_coco_evaluation():
    # pycocoevalcap 1.2: Rouge on PTBTokenizer's output
    scores = [rouge_l(hypothesis, texts) for hypothesis, texts in zip(HYPOTHESES, REFERENCES)]
    assert scores == pytest.approx([0.7942708333333333, 0.9165275459098498, 1.0], rel=1e-12)


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("It's £20-25, isn't it?", "it 's # 20-25 is n't it"),
        ("Café Rouge: £20-£25; a non-family-friendly 'pub'.", "café rouge # 20 # 25 a non-family-friendly pub"),
        (
            "I'm gonna meet Mr. O'Neil at 6 p.m.; you can't come, can you?",
            "i 'm gon na meet mr. o'neil at 6 p.m. you ca n't come can you",
        ),
        ('Don’t pay 1,000 or £30.99 for the 5-star "food & wine"!', "do n't pay 1,000 or # 30.99 for the 5-star food & wine"),
        ("I'd've left at 12:45, the boys' kites - gone...", "i 'd 've left at 12:45 the boys kites gone"),
    ],
)
def test_tokens_equal_the_penn_treebank_tokenizer_of_coco_evaluation(text, tokens):
    # pycocoevalcap 1.2: PTBTokenizer (Stanford CoreNLP 3.4.1)
    assert _ptb_tokens(text) == tokens.split()


def test_rouge_l_f1_of_a_hand_worked_pair():
    # LCS "the cat mat": P = 3/4, R = 3/5, F1 = 2 * 3 / (4 + 5)
    assert rouge_l_f1("The cat, a mat", "the cat on the mat") == pytest.approx(6 / 9, rel=1e-12)


def test_rouge_l_f1_equals_the_rouge_score_package():
    # rouge_score 0.1.2: RougeScorer(["rougeL"]), fmeasure
    scores = [rouge_l_f1(hypothesis, texts[0]) for hypothesis, texts in zip(HYPOTHESES, REFERENCES)]
    assert scores == pytest.approx([0.75, 0.9, 0.6153846153846154], rel=1e-12)


def test_rouge_l_f1_finds_the_longest_common_subsequence():
    def longest(a, b):  # the textbook table, one row per token of a
        row = [0] * (len(b) + 1)
        for x in a:
            above, row = row, [0]
            for j, y in enumerate(b):
                row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
        return row[-1]

    draw = random.Random(1)
    for _ in range(200):
        a, b = (draw.choices("abc", k=draw.randint(1, 90)) for _ in range(2))  # also longer than a machine word
        assert rouge_l_f1(" ".join(a), " ".join(b)) == pytest.approx(2 * longest(a, b) / (len(a) + len(b)), rel=1e-12)


@pytest.mark.parametrize("text", ["", "?!"])
def test_identical_texts_without_words_agree_fully(text):
    assert rouge_l(text, [text]) == 1.0
    assert rouge_l_f1(text, text) == 1.0


def test_token_agreement_counts_positions_over_the_longer_sequence():
    assert token_agreement([5, 6, 7, 8], [5, 9, 7]) == 2 / 4
    assert token_agreement([5, 9, 7], [5, 6, 7, 8]) == 2 / 4
    assert token_agreement([6, 7, 8], [5, 6, 7, 8]) == 0.0  # a shift by one agrees nowhere


def test_two_empty_sequences_agree_fully():
    assert token_agreement([], []) == 1.0


def test_bootstrap_interval_of_two_values():
    # a resample of {0, 1} has the mean 0, 1/2 or 1 with probability 1/4, 1/2 and 1/4
    assert bootstrap(np.mean, [0, 1], level=0.95) == [0.0, 1.0]
    assert bootstrap(np.mean, [0, 1], level=0.6) == [0.0, 1.0]
    assert bootstrap(np.mean, [0, 1], level=0.4) == [0.5, 0.5]


def test_bootstrap_draws_the_columns_together():
    # every resample of equal columns has the same ratio of sums
    assert bootstrap(lambda a, b: a.sum() / b.sum(), [1, 2, 3], [2, 4, 6]) == [0.5, 0.5]


def test_bootstrap_interval_holds_the_median_and_widens_with_the_level():
    draw = random.Random(2)
    values = [draw.gauss(0, 1) for _ in range(41)]
    low, high = bootstrap(np.median, values, level=0.5)
    wide_low, wide_high = bootstrap(np.median, values, level=0.99)
    assert wide_low < low <= sorted(values)[20] <= high < wide_high


def test_bootstrap_interval_depends_on_the_seed_alone():
    draw = random.Random(3)
    values = [draw.random() for _ in range(50)]
    assert bootstrap(np.median, values, seed=1) == bootstrap(np.median, values, seed=1)
    assert bootstrap(np.median, values, resamples=20, seed=1) != bootstrap(np.median, values, resamples=20, seed=2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bleu([], []),
        lambda: bleu(["a"], []),
        lambda: bleu(["a"], [[]]),
        lambda: bleu(["a"], ["a"]),  # a text in place of a list of texts
        lambda: rouge_l("a", []),
        lambda: rouge_l("a", "a"),
        lambda: bootstrap(np.mean, []),
        lambda: bootstrap(np.mean, [1.0], level=95),
    ],
)
def test_unusable_input_is_refused(call):
    with pytest.raises(ValueError, match=r"need|give|choose"):
        call()
