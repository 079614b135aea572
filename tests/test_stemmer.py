"""Porter's stemmer: each rule on words worked by hand, and the stems of nltk (literals: the package is not
needed to run this)."""

import pytest

from evaluation.stemmer import _measure, _pattern, stem

NLTK_STEMS = """
caresses:caress ponies:poni ties:tie cats:cat gas:ga boss:boss flies:fli flied:fli dies:die died:die feed:feed agreed:agre
proceed:proceed proceeding:proceed plastered:plaster bled:bled motoring:motor sing:sing conflated:conflat troubled:troubl sized:size
hopping:hop tanned:tan falling:fall hissing:hiss fizzed:fizz failing:fail filing:file used:use axed:axe owed:owe happy:happi sky:sky
skies:sky enjoy:enjoy say:say cry:cri crying:cri yyy:yyy relational:relat conditional:condit rational:ration rationally:ration
valency:valenc hesitancy:hesit digitizer:digit conformably:conform possibly:possibl radically:radic differently:differ vilely:vile
analogously:analog predication:predic operator:oper feudalism:feudal decisiveness:decis hopefulness:hope hopefully:hope
callousness:callous formality:formal sensitivity:sensit sensibility:sensibl theologically:theolog geology:geolog theology:theolog
triplicate:triplic formative:form formalize:formal electricity:electr electrical:electr hopeful:hope goodness:good revival:reviv
allowance:allow inference:infer airliner:airlin gyroscopic:gyroscop adjustable:adjust defensible:defens irritant:irrit
replacement:replac adjustment:adjust dependent:depend adoption:adopt station:station homology:homolog communism:commun
activate:activ angularity:angular effective:effect probate:probat rate:rate cease:ceas ate:ate use:use controll:control roll:roll
dying:die innings:inning news:news generalizations:gener oscillators:oscil syzygies:syzygi b2b:b2b 1990s:1990 naïveté:naïveté
played:play snowed:snow boxing:box companion:companion bys:by
"""


@pytest.mark.parametrize("pair", NLTK_STEMS.split())
def test_stems_equal_nltk(pair):
    # nltk 3.10.4: PorterStemmer().stem
    word, expected = pair.split(":")
    assert stem(word) == expected


@pytest.mark.parametrize(
    "word, pattern, measure",
    [
        ("", "", 0),
        ("tree", "ccvv", 0),
        ("y", "c", 0),
        ("by", "cv", 0),
        ("toy", "cvc", 1),
        ("system", "cvccvc", 2),
        ("trouble", "ccvvccv", 1),
        ("oats", "vvcc", 1),
        ("private", "ccvcvcv", 2),
        ("yyyy", "cvcv", 1),
        ("é1", "cc", 0),
    ],
)
def test_y_is_a_vowel_after_a_consonant_and_m_counts_vowels_before_consonants(word, pattern, measure):
    assert _pattern(word) == pattern and _measure(word) == measure


@pytest.mark.parametrize("words", ["connect connected connecting connection connections", "hope hoped hopes hoping hopeful hopefulness"])
def test_forms_of_a_word_share_its_stem(words):
    assert len({stem(word) for word in words.split()}) == 1


def test_words_are_lower_cased():
    assert stem("Running") == stem("RUNNING") == stem("running") == "run"


@pytest.mark.parametrize("word", ["", "s", "is", "as", "ed"])
def test_words_of_at_most_two_letters_stay(word):
    assert stem(word) == word


def test_only_the_first_suffix_that_fits_is_tried():
    # "ment" fits and would go, but "ement" fits first and leaves "d", whose m is 0
    assert stem("dement") == "dement"
    # "eed" fits first and leaves "f", so that "ed" is not taken off
    assert stem("feed") == "feed"
    # "dies" loses an s, then "aied" would lose a d: both rules for words of four letters in turn
    assert stem("aieds") == "aie"


def test_a_participle_is_repaired_only_where_it_lost_its_ending():
    assert stem("filing") == "file" and stem("fil") == "fil"
    assert stem("rubbing") == "rub" and stem("rubb") == "rubb"
