"""1. The margin: how far is the best token ahead of the second?

A model may stop after layer l if the next token is decided there. CALM's simplest answer (Schuster 2022,
section 3.5, "softmax response"): take the distribution p_l over the vocabulary that layer l would predict,
and subtract the second largest probability from the largest. 1 means certain, 0 a tie.

A confidence function gets the trace of the newest position and a layer, and returns a number in [0, 1].
`trace.logits(layer)` are the layer's logits, (n,). Write it below, then

    python -m pytest exercises/01_margin.py

When it passes, watch it decide:
    python decode.py --prompt "Guten Morgen!" --confidence exercises.01_margin:margin
(To think about: why not simply the largest probability? Name two distributions that it cannot tell apart.)
"""

import torch

from confidence import register
from decode import DecodeConfig, generate, load_checkpoint
from decoding.presets import DEFAULT_CHECKPOINT


def margin(trace, layer):
    """The largest probability at `layer` minus the second largest."""
    raise NotImplementedError("your turn")


# ---------------------------------------------------------------- the test: nothing to change below


class FixedTrace:
    """A trace of one layer with these probabilities."""

    def __init__(self, probs):
        self.probs = torch.tensor(probs)

    def logits(self, layer):
        return self.probs.log() + 7  # logits are defined up to a constant


def test_by_hand():
    for probs, expected in (([0.5, 0.3, 0.2], 0.2), ([0.25] * 4, 0.0), ([0.01, 0.98, 0.01], 0.97)):
        value = margin(FixedTrace(probs), 1)
        assert value.shape == () and abs(float(value) - expected) < 1e-5


def test_it_stops_where_softmax_response_stops():
    model, tokenizer = load_checkpoint(DEFAULT_CHECKPOINT)
    register("my_margin")(margin)
    prompt = [tokenizer.begin, *tokenizer.encode("Die Katze sitzt auf dem Tisch.<sep>")]
    runs = []
    for name in ("my_margin", "softmax"):
        config = DecodeConfig(confidence=name, threshold=0.5, exit_layers=(4, 6, 8), max_new_tokens=20)
        runs.append(generate(model, prompt, config))
    assert runs[0].exit_layers == runs[1].exit_layers and min(runs[0].exit_layers) < model.config.n_layers
    assert runs[0].tokens == runs[1].tokens
