"""5. Break the cache, and see why it breaks.

The commonest mistake in early exit: a token leaves at layer 4, the cache is marked as complete, and later
tokens attend to keys and values that were never written. The text stays fluent for a while, then becomes
gibberish.

Make the mistake on purpose, in minimal.py's staircase: after every pass, pretend that all layers hold all
positions.

    stairs.filled[layer]      how many positions have their key and value in the layer, 1 to model.L
    stairs.cache[layer, 0]    the layer's keys, (H, limit, C)

Then find the damage: which layers hold a wrong key for a given position? Before you run the test, guess: a
token left at layer 4 of 12; the next one went to the top. Which layers are wrong for the first, which for the
second, and why?

    python -m pytest exercises/05_cache.py

(To think about: why does the mistake do no harm at all where every token leaves at the same layer?)
"""

import torch

from decoding.presets import DEFAULT_CHECKPOINT
from minimal import Llama, Staircase


class Forgetful(Staircase):
    """A staircase that forgets what is owed."""

    def climb(self, model, text, exits, threshold, drafts=0):
        """Climbs as a Staircase does (`super().climb`), then claims that every layer holds all of `text`."""
        raise NotImplementedError("your turn")


def wrong_layers(model, right, broken, position):
    """The layers, in ascending order, whose keys at `position` differ between two staircases by more than
    rounding (1e-6)."""
    raise NotImplementedError("your turn")


# ---------------------------------------------------------------- the test: nothing to change below


def climbed(kind, model, text, depths):
    """A staircase after one pass for each (length of the text, exits) in `depths`. Every exit is taken."""
    stairs = kind(model, len(text))
    stairs.cache.zero_()
    for length, exits in depths:
        stairs.climb(model, text[:length], exits, 0.0)
    return stairs


def test_the_damage_begins_above_the_exit_and_climbs_on_with_the_next_token():
    model = Llama(DEFAULT_CHECKPOINT, torch.float64)
    text = [model.tokenizer.bos_id(), *model.tokenizer.encode("Die Katze sitzt auf dem Tisch.<sep>")]
    last = len(text) - 1
    # One token leaves at layer 4; those before and after it go to the top.
    depths = [(last - 1, ()), (last, (4,)), (last + 1, ())]
    right = climbed(Staircase, model, text, depths)
    broken = climbed(Forgetful, model, text, depths)
    believed = [len(text)] * model.L  # the cache believes that all is well
    assert broken.filled[1:] == right.filled[1:] == believed
    assert wrong_layers(model, right, broken, 0) == []
    assert wrong_layers(model, right, broken, last - 1) == [5, 6, 7, 8, 9, 10, 11, 12]
    assert wrong_layers(model, right, broken, last) == [6, 7, 8, 9, 10, 11, 12]


def test_a_static_exit_never_looks_above_itself():
    model = Llama(DEFAULT_CHECKPOINT, torch.float64)
    text = [model.tokenizer.bos_id(), *model.tokenizer.encode("Guten Morgen!<sep>")]
    depths = [(length, (4,)) for length in range(1, len(text) + 1)]
    right, broken = climbed(Staircase, model, text, depths), climbed(Forgetful, model, text, depths)
    for position in range(len(text)):
        assert wrong_layers(model, right, broken, position) == []
