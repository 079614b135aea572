"""3. Entropy, and patience: two more ways to be sure.

Entropy: a distribution that is spread out is undecided. H(p) = -sum p log p lies between 0 and log n for n
tokens, so

    entropy confidence = 1 - H(p_l) / log n

Patience (after PABEE, Zhou 2020): stop when several layers in a row agree on the best token, however sure
each may be. Here: 1.0 if layers l, l - 1 and l - 2 have the same best token, else 0.0. Below layer 3, where
there are not three layers, it is 0.0.

`trace.logits(j)` are the logits of any layer j up to the newest, computed when they are first needed.

    python -m pytest exercises/03_patience.py

(To think about: which of the two costs more, and by how much? After which layers would you check for
patience?)
"""

import math

import torch

from confidence import register
from decode import DecodeConfig, generate, load_checkpoint
from decoding.presets import DEFAULT_CHECKPOINT


def entropy(trace, layer):
    """1 - H(p) / log n of the distribution at `layer`: a scalar tensor."""
    raise NotImplementedError("your turn")


def patience(trace, layer):
    """Whether the best token is the same at `layer` and the two before: a scalar tensor, 1.0 or 0.0."""
    raise NotImplementedError("your turn")


# ---------------------------------------------------------------- the test: nothing to change below


class FixedTrace:
    """A trace whose layers 1, 2, .. have these probabilities."""

    def __init__(self, *probs):
        self.probs = torch.tensor(probs)

    def logits(self, layer):
        assert layer >= 1, "there are no logits below layer 1"
        return self.probs[layer - 1].log() - 3


def test_entropy_by_hand():
    trace = FixedTrace([0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25])
    assert abs(float(entropy(trace, 1)) - (1 - 1.75 * math.log(2) / math.log(4))) < 1e-5
    assert abs(float(entropy(trace, 2))) < 1e-5


def test_patience_by_hand():
    a, b, unsure = [0.1, 0.8, 0.1], [0.8, 0.1, 0.1], [0.3, 0.4, 0.3]
    found = [float(patience(FixedTrace(a, a, unsure, a, b), layer)) for layer in (1, 2, 3, 4, 5)]
    assert found == [0, 0, 1, 1, 0]
    assert float(patience(FixedTrace(a, b, a), 3)) == 0  # a, then b, then a again


def test_whoever_stops_early_by_patience_has_three_layers_that_agree():
    model, tokenizer = load_checkpoint(DEFAULT_CHECKPOINT, dtype=torch.float64)
    register("my_patience")(patience)
    prompt = [tokenizer.begin, *tokenizer.encode("Die Katze sitzt auf dem Tisch.<sep>")]
    config = DecodeConfig(confidence="my_patience", threshold=1.0, exit_layers=(4, 6, 8), max_new_tokens=20)
    out = generate(model, prompt, config)
    states = model.hidden_states(torch.tensor([prompt + out.tokens]))
    assert min(out.exit_layers) < model.config.n_layers
    for row, (token, layer) in enumerate(zip(out.tokens, out.exit_layers), len(prompt) - 1):
        if layer < model.config.n_layers:
            for j in (layer, layer - 1, layer - 2):
                assert int(model.head(states[j][0, row], j).argmax()) == token
