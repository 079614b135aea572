"""Porter's stemmer: each rule on words worked by hand, and the stems of nltk (literals: the package is not
needed to run this)."""

from evaluation.stemmer import stem

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


def test_stems_equal_nltk():
    # nltk 3.10.4: PorterStemmer().stem
    pairs = dict(pair.split(":") for pair in NLTK_STEMS.split())
    assert {word: stem(word) for word in pairs} == pairs


def test_words_of_at_most_two_letters_stay():
    assert all(stem(word) == word for word in ("", "s", "is", "as", "ed"))


def test_only_the_first_suffix_that_fits_is_tried():
    # "ment" fits and would go, but "ement" fits first and leaves "d", whose m is 0
    assert stem("dement") == "dement"
    # "eed" fits first and leaves "f", so that "ed" is not taken off
    assert stem("feed") == "feed"
    # "dies" loses an s, then "aied" would lose a d: both rules for words of four letters in turn
    assert stem("aieds") == "aie"
