"""Metrics: hand-worked numbers, properties, and values of the packages that define them (literals: none is
needed to run this)."""

import math
import random

import numpy as np
import pytest

from decoding.record import first_difference
from evaluation.metrics import (
    METRICS,
    ROUGE_VARIANTS,
    distinct,
    interval,
    repetition,
    resampled_means,
    rouge_f1,
    rouge_l,
    rouge_l_f1,
    squad_exact_match,
    squad_f1,
    token_agreement,
)
from evaluation.tokens import ptb_tokens


def bleu(hypotheses, references, lowercase=False) -> float:
    return METRICS["bleu_lower" if lowercase else "bleu"](hypotheses, references)


def rouge(hypothesis, references, stemming=False) -> dict[str, float]:
    """Every variant."""
    return {variant: rouge_f1(hypothesis, references, variant, stemming) for variant in ROUGE_VARIANTS}


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
SUMMARIES = [  # hypothesis, references: a line is a sentence
    (
        "The miller's daughters were running to the river.\nThe river had risen.",
        ["A miller and his daughter run to the rivers.\nThe rivers rise quickly."],
    ),
    (
        "Anna asks Ben for 2 tickets.\nBen has only one ticket left.\nThey will meet at 7:30.",
        ["Ben has one ticket left.\nAnna asked for two tickets.", "Anna and Ben are meeting at 7:30 because of the tickets."],
    ),
    ("d a c b e\nc b a d", ["a b c d\nb a d c e", "e d c b a\na c b d"]),
    ("the cafés, the CAFÉS, the cafés", ["The café closes; the cafes close."]),
    (
        "The king gave the fox gold, the fox gave the king a general's relational hopefulness.",
        ["The fox was given gold by hopeful kings.\nA general relation of foxes and kings."],
    ),
]
TEXT_SCORES = {  # text against text, so that the properties below hold for all of them
    "bleu": lambda hypothesis, reference: bleu([hypothesis], [[reference]]),
    "rouge_l": lambda hypothesis, reference: rouge_l(hypothesis, [reference]),
    "rouge_l_f1": rouge_l_f1,
    "rougeL": lambda hypothesis, reference: rouge(hypothesis, [reference])["rougeL"],
    "rouge1_stem": lambda hypothesis, reference: rouge(hypothesis, [reference], stemming=True)["rouge1"],
    "squad_exact_match": lambda hypothesis, reference: squad_exact_match(hypothesis, [reference]),
    "squad_f1": lambda hypothesis, reference: squad_f1(hypothesis, [reference]),
    "token_agreement": lambda hypothesis, reference: token_agreement(hypothesis.split(), reference.split()),
}
every_text_score = pytest.mark.parametrize("score", TEXT_SCORES.values(), ids=TEXT_SCORES.keys())


@every_text_score
def test_scores_lie_between_zero_for_nothing_in_common_and_one_for_equal_texts(score):
    assert score("It isn't a pub, is it?", "It isn't a pub, is it?") == pytest.approx(1.0, abs=1e-12)
    assert score("one two three four five", "six seven eight nine ten") == score("", "a b c d") == score("a b c d", "") == 0.0
    draw = random.Random(0)
    for _ in range(200):
        hypothesis, reference = (" ".join(draw.choices("abcd", k=draw.randint(1, 8))) for _ in range(2))
        assert 0.0 <= score(hypothesis, reference) <= 1.0 + 1e-12


def test_bleu_clips_counts_and_halves_the_credit_of_each_order_without_a_match():
    # Papineni's example: "the" counts twice at most; orders 2, 3 and 4 match nothing among 6, 5 and 4 n-grams
    score = bleu(["the the the the the the the"], [["The cat is on the mat", "There is a cat on the mat"]], lowercase=True)
    assert score == pytest.approx((2 / 7 * (1 / 2) / 6 * (1 / 4) / 5 * (1 / 8) / 4) ** 0.25, rel=1e-12)


def test_bleu_penalizes_texts_shorter_than_the_closest_reference_the_shorter_of_two():
    assert bleu(["a b c d"], [["a b c d e f", "a b c d e f g"]]) == pytest.approx(math.exp(1 - 6 / 4), rel=1e-12)
    assert bleu(["a b c d e"], [["a b c d e f", "a b c d"]]) == pytest.approx(1.0, rel=1e-12)


def test_bleu_pools_counts_over_the_corpus():
    # 9 of 10, 7 of 8, 5 of 6 and 3 of 4 n-grams match: neither input's score is averaged
    score = bleu(["a b c d e", "a b c d x"], [["a b c d e"], ["a b c d e"]])
    assert score == pytest.approx((9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25, rel=1e-12)


@pytest.mark.parametrize("lowercase, references, expected", [
    (False, REFERENCES, 0.40161488005957563),
    (True, REFERENCES, 0.5965987539384402),
    (False, FIRST_REFERENCES, 0.3229257788926105),
    (True, FIRST_REFERENCES, 0.4198418283721081),
])  # fmt: skip
def test_bleu_equals_sacrebleu(lowercase, references, expected):
    # sacrebleu 2.6.0: corpus_bleu(..., lowercase=lowercase).score / 100, missing references given as None
    assert bleu(HYPOTHESES, references, lowercase) == pytest.approx(expected, rel=1e-12)


def test_smoothed_bleu_equals_sacrebleu():
    # sacrebleu 2.6.0; no 3-gram and no 4-gram matches
    assert bleu(["the cat sat on the mat"], [["a dog sat on one"]]) == pytest.approx(0.16233395773754952, rel=1e-12)


def test_rouge_l_weighs_recall_and_takes_both_from_the_best_reference_each():
    # LCS 2: P = 1, R = 2/5, so 2.44 * 0.4 / (0.4 + 1.44)
    assert rouge_l("a d", ["a b c d e"]) == pytest.approx(2.44 * 0.4 / 1.84, rel=1e-12)
    # "a b" gives P = 2/3 and R = 1, "a b c d e f" gives P = 1 and R = 1/2: both maxima are 1
    assert rouge_l("a b c", ["a b", "a b c d e f"]) == pytest.approx(1.0, rel=1e-12)


def test_rouge_l_equals_coco_evaluation():
    # pycocoevalcap 1.2: Rouge on PTBTokenizer's output
    scores = [rouge_l(hypothesis, texts) for hypothesis, texts in zip(HYPOTHESES, REFERENCES)]
    assert scores == pytest.approx([0.7942708333333333, 0.9165275459098498, 1.0], rel=1e-12)


@pytest.mark.parametrize("text, tokens", [
    ("It's £20-25, isn't it?", "it 's # 20-25 is n't it"),
    ("Café Rouge: £20-£25; a non-family-friendly 'pub'.", "café rouge # 20 # 25 a non-family-friendly pub"),
    ("I'm gonna meet Mr. O'Neil at 6 p.m.; you can't come, can you?", "i 'm gon na meet mr. o'neil at 6 p.m. you ca n't come can you"),
    ('Don’t pay 1,000 or £30.99 for the 5-star "food & wine"!', "do n't pay 1,000 or # 30.99 for the 5-star food & wine"),
    ("I'd've left at 12:45, the boys' kites - gone...", "i 'd 've left at 12:45 the boys kites gone"),
])  # fmt: skip
def test_tokens_equal_the_penn_treebank_tokenizer_of_coco_evaluation(text, tokens):
    # pycocoevalcap 1.2: PTBTokenizer (Stanford CoreNLP 3.4.1)
    assert ptb_tokens(text) == tokens.split()


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


ROUGE = [  # hypothesis, reference, {variant: by hand}
    ("The cat, a mat", "the cat on the mat", {"rouge1": 2 * 3 / 9, "rouge2": 2 * 1 / 7, "rougeL": 2 * 3 / 9}),
    ("a a a", "a a b", {"rouge1": 2 / 3, "rouge2": 1 / 2}),  # "a" counts twice of three times, "a a" once of twice
    ("a c y z e\na b v w x", "a b c d e", {"rougeL": 2 * 3 / 15}),
    ("c d\na b", "a b\n\nc d\n", {"rougeL": 1 / 2, "rouge1": 1}),
]


@pytest.mark.parametrize("hypothesis, reference, by_hand", ROUGE)
def test_rouge_by_hand(hypothesis, reference, by_hand):
    scores = rouge(hypothesis, [reference])
    assert {variant: scores[variant] for variant in by_hand} == pytest.approx(by_hand, rel=1e-12)


def test_stemming_joins_the_forms_of_words_longer_than_three_letters():
    assert rouge("connected", ["connections"])["rouge1"] == 0.0
    assert rouge("connected", ["connections"], stemming=True)["rouge1"] == 1.0
    assert rouge("ties", ["tie"], stemming=True)["rouge1"] == 1.0
    assert rouge("gas", ["ga"], stemming=True)["rouge1"] == 0.0  # of three letters, though its stem is "ga"


@pytest.mark.parametrize("stemming, expected", [
    (False, [
        [0.3076923076923077, 0.08333333333333333, 0.3076923076923077],
        [0.5714285714285714, 0.23076923076923078, 0.35714285714285715],
        [1.0, 0.5, 0.6666666666666666],
        [0.4, 0.15384615384615385, 0.4],
        [0.3225806451612903, 0.1379310344827586, 0.3225806451612903],
    ]),
    (True, [
        [0.6153846153846154, 0.4166666666666667, 0.6153846153846154],
        [0.6428571428571429, 0.30769230769230765, 0.4],
        [1.0, 0.5, 0.6666666666666666],
        [0.4, 0.15384615384615385, 0.4],
        [0.6451612903225806, 0.20689655172413796, 0.45161290322580644],
    ]),
])  # fmt: skip
def test_rouge_equals_the_rouge_score_package(stemming, expected):
    # rouge_score 0.1.2: RougeScorer([...], use_stemmer=stemming).score_multi, fmeasure of rouge1, rouge2
    # and rougeL
    for (hypothesis, references), values in zip(SUMMARIES, expected):
        assert rouge(hypothesis, references, stemming) == pytest.approx(dict(zip(ROUGE_VARIANTS, values)), rel=1e-12)


@pytest.mark.parametrize("hypothesis, references, exact, f1", [
    ("the Golden  Fox!", ["a golden fox"], 1, 1),
    ("a red fox, red", ["The red fox ran"], 0, 2 / 3),  # red fox red, red fox ran
    ("fox red", ["red fox"], 0, 1),  # order counts for exact matches alone
    ("in 1890", ["1890", "the year 1890", "in the year 1890"], 0, 4 / 5),  # 2/3, 1/2 and 4/5
    ("well-known", ["wellknown"], 1, 1),  # a hyphen goes without leaving a space
    ("theatre", ["atre"], 0, 0),  # articles are whole words
    ("«fox»", ["fox"], 0, 0),  # only ASCII punctuation goes
    ("CAFÉ", ["café"], 1, 1),
    ("fox", [""], 0, 0),
    ("", [""], 1, 0),  # no answer at all: equal texts, but no common token
    ("The ...", ["an!"], 1, 0),
])  # fmt: skip
def test_squad_scores_of_hand_worked_answers(hypothesis, references, exact, f1):
    # torchmetrics 1.9.0 (squad) agrees, but for the f1 of two texts without words, 1 in SQuAD v2.0
    assert squad_exact_match(hypothesis, references) == exact
    assert squad_f1(hypothesis, references) == pytest.approx(f1, rel=1e-12)


def test_distinct_counts_the_ngrams_of_all_texts_together():
    texts = ["a b a", "A b c"]  # bigrams: ab ba, ab bc
    assert distinct(texts, 1) == 3 / 6 and distinct(texts, 2) == 3 / 4 and distinct(texts, 3) == 1.0


def test_repetition_of_hand_worked_sequences():
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5, rel=1e-12)  # the last of five 4-grams
    assert repetition([9] * 7) == 3 / 4
    assert repetition(range(10)) == 0.0
    assert repetition([]) == repetition([9, 9, 9]) == repetition([9, 9, 9, 9]) == 0.0


def test_repetition_is_the_share_of_ngrams_seen_before():
    draw = random.Random(4)
    for _ in range(100):
        tokens = draw.choices(range(3), k=draw.randint(4, 60))
        ngrams = [tokens[i : i + 4] for i in range(len(tokens) - 3)]
        assert repetition(tokens) == pytest.approx(sum(ngram in ngrams[:i] for i, ngram in enumerate(ngrams)) / len(ngrams), abs=1e-12)


@pytest.mark.parametrize(
    "tokens, full_tokens, position",
    [([], [], None), ([5, 6], [5, 6], None), ([5, 6], [5, 7], 1), ([5], [5, 6], 1), ([5, 6, 7], [5, 6], 2), ([], [5], 0), ([0], [], 0)],
)
def test_first_difference_is_where_the_sequences_part(tokens, full_tokens, position):
    assert first_difference(tokens, full_tokens) == first_difference(full_tokens, tokens) == position


def test_token_agreement_counts_positions_over_the_longer_sequence():
    assert token_agreement([5, 6, 7, 8], [5, 9, 7]) == 2 / 4
    assert token_agreement([5, 9, 7], [5, 6, 7, 8]) == 2 / 4
    assert token_agreement([6, 7, 8], [5, 6, 7, 8]) == 0.0  # a shift by one agrees nowhere
    assert token_agreement([], []) == 1.0


def test_resampled_means_of_two_values():
    # a resample of {0, 1} has the mean 0, 1/2 or 1 with probability 1/4, 1/2 and 1/4
    means = resampled_means([0, 1])
    assert [round(np.mean(means == mean), 1) for mean in (0, 0.5, 1)] == pytest.approx([0.25, 0.5, 0.25], abs=0.06)
    assert interval(means) == [0.0, 1.0] and interval(means, 0.4) == [0.5, 0.5]


@pytest.mark.parametrize("name", METRICS)
def test_every_registered_score_is_one_for_equal_texts_and_zero_for_strange_ones(name):
    texts = ["one two three four", "five six seven eight"]
    assert METRICS[name](texts, [["nothing", texts[0]], [texts[1], ""]]) == pytest.approx(1.0, rel=1e-12)
    assert METRICS[name](texts, [["", "none of these"], ["?!"]]) == 0.0


@pytest.mark.parametrize("variant", ROUGE_VARIANTS)
def test_registered_rouge_stems_where_its_name_says_so(variant):
    hypotheses, references = zip(*SUMMARIES)
    for stemming, name in ((False, variant), (True, f"{variant}_stem")):
        expected = np.mean([rouge(h, texts, stemming)[variant] for h, texts in SUMMARIES])
        assert METRICS[name](hypotheses, references) == pytest.approx(expected, rel=1e-12)
