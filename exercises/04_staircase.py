"""4. The naive loop and the staircase give the same tokens.

A cache is an optimization: it must change nothing. Write the loop that needs none. For every token, run the
whole model over the whole text; then walk through the exit layers from below, and stop at the first whose
margin (exercise 1) reaches the threshold; if none does, take the last layer. This is how the project's own
tests know what is right.

    states = model.hidden_states(torch.tensor([text]))  states[l] (1, T, d) are those after layer l
    model.head(states[l][0, -1], l)                     logits of the newest position at layer l, (V,)

    python -m pytest exercises/04_staircase.py

(To think about: the naive loop computes every layer of every position anew for every token, and so has the
exact keys and values of all. The staircase has skipped some layers of early tokens. Why do both agree?)
"""

import torch

from decode import DecodeConfig, generate, load_checkpoint
from decoding.presets import DEFAULT_CHECKPOINT


def naive(model, prompt, exits, threshold, steps):
    """Returns two lists, the new tokens and the layer that each came from: at most `steps` tokens, including
    the end of text (model.config.eos_id). exits: layers in ascending order."""
    raise NotImplementedError("your turn")


# ---------------------------------------------------------------- the test: nothing to change below


def test_the_staircase_is_exact():
    """In float64, so that rounding decides nothing."""
    model, tokenizer = load_checkpoint(DEFAULT_CHECKPOINT, dtype=torch.float64)
    used, exits, threshold = set(), (3, 4, 6, 8), 0.4
    texts = "Guten Morgen!", "Die Katze sitzt auf dem Tisch.", "Ich habe heute keine Zeit, aber morgen schon."
    for text in texts:
        prompt = [tokenizer.begin, *tokenizer.encode(text + "<sep>")]
        config = DecodeConfig(confidence="softmax", threshold=threshold, exit_layers=exits, max_new_tokens=15)
        out = generate(model, prompt, config)
        with torch.inference_mode():
            tokens, layers = naive(model, prompt, exits, threshold, 15)
        assert tokens == out.tokens and layers == out.exit_layers
        used.update(layers)
    assert len(used) > 2  # early and late ones, or the test would show nothing
