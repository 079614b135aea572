"""8. A loss of one's own: teach the exits two things at once.

An exit can learn from the text (cross-entropy with the next token) or from the model's own last layer (KL
divergence from its distribution, which gets no gradient: the exit is to follow the last layer, not the
reverse). Here, take half of each:

    loss = ½ · -log p_l(target)  +  ½ · KL(p_L‖p_l)
    KL(p_L‖p_l) = sum over x of p_L(x) (log p_L(x) - log p_l(x))

`final` is a function that returns the last layer's logits, (n, V), without gradient; it is None when the
layer is the last one itself, which has no other to learn from: there the loss is the cross-entropy alone.
Return one loss for each target.

    python -m pytest exercises/08_loss.py

Training accepts a loss of this form: the docstring of training/losses.py says how to pass it to train.py.
(To think about: for early exit, which half matters more? What would an exit learn where the last layer is
wrong?)
"""

import math

import torch

from model import ModelConfig, Transformer


def mixed(logits, targets, final):
    """The loss of every target: (n,). logits (n, V) of a layer, targets (n,) token ids, final: see above."""
    raise NotImplementedError("your turn")


# ---------------------------------------------------------------- the test: nothing to change below


def test_by_hand():
    p, q = torch.tensor([[[0.5, 0.5], [0.25, 0.75]], [[0.25, 0.75], [0.25, 0.75]]])  # last layer, exit
    targets = torch.tensor([0, 1])
    loss = mixed(q.log(), targets, lambda: p.log() + 2)
    divergence = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)  # of row 0; that of row 1 is 0
    expected = torch.stack([-q[0, 0].log() / 2 + divergence / 2, -q[1, 1].log() / 2])
    assert loss.shape == (2,) and (loss - expected).abs().max() < 1e-5
    assert (mixed(q.log(), targets, None) + q[[0, 1], targets].log()).abs().max() < 1e-5  # at the last layer


def test_exits_of_a_tiny_model_learn_to_agree_with_its_last_layer():
    """Counting in steps of three modulo eleven; 80 steps of training, one second."""
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=11, n_layers=3, d_model=32, n_heads=2, n_kv_heads=2, d_ff=64, max_len=16)
    model = Transformer(shape)
    first = torch.arange(11)[:, None]
    text = (first + 3 * torch.arange(12)) % 11  # (11, 12)
    targets = text[:, 1:].flatten()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def logits_of_layers():
        states = model.hidden_states(text[:, :-1])
        return [model.head(states[layer].flatten(0, 1), layer) for layer in (1, 2, 3)]  # (n, V) each

    for _ in range(80):
        *exits, last = logits_of_layers()
        total = mixed(last, targets, None).mean()
        for logits in exits:
            total = total + mixed(logits, targets, last.detach).mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    with torch.no_grad():
        *exits, last = logits_of_layers()
    assert (last.argmax(-1) == targets).float().mean() > 0.95
    for logits in exits:
        assert (logits.argmax(-1) == last.argmax(-1)).float().mean() > 0.95
