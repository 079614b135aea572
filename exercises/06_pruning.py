"""6. A pruning schedule: check fewer tokens.

A head over the whole vocabulary costs as much as a block and a half of this model, eight of a 135M Llama,
thirty of Gemma 3 270M. But a token that is not among the best 64 after layer 4 will hardly win in the end. So
keep only the best candidates after the first check, and compute later heads for these alone. What is pruned
is lost to the exits, not to the last layer.

Write a schedule that halves: k candidates after the first check, then half of those left, rounded up, but
never fewer than k_min. And write the step that prunes. The trap in it: an index into the logits is not a
token id any more.

    python -m pytest exercises/06_pruning.py

(To think about: pruning never changes what the last layer says. How can it change the text all the same?)
"""

import torch

from decode import load_checkpoint
from decoding.presets import DEFAULT_CHECKPOINT


def halving(n, k, k_min):
    """How many of the n candidates to keep. If n is more than k, there has been no check yet."""
    raise NotImplementedError("your turn")


def keep(logits, candidates, size):
    """The `size` candidates with the largest logits, the best first. logits (n,), candidates (n,) token ids
    -> (size,)"""
    raise NotImplementedError("your turn")


# ---------------------------------------------------------------- the test: nothing to change below


def test_the_schedule_by_hand():
    for n, kept in ((4096, 50), (50, 25), (25, 13), (13, 10), (10, 10)):
        assert halving(n, 50, 10) == kept


def test_pruning_keeps_token_ids_and_their_order():
    candidates = torch.tensor([70, 3, 41, 9])
    assert keep(torch.tensor([0.1, 2.0, -1.0, 3.0]), candidates, 3).tolist() == [9, 3, 70]
    again = keep(torch.tensor([5.0, 0.0, 1.0]), torch.tensor([9, 3, 70]), 2)
    assert again.tolist() == [9, 70]


def missed(model, text, exits, k, k_min):
    """The share of positions whose final token has been pruned away by the exits below."""
    states = model.hidden_states(torch.tensor([text]))
    final = model.head(states[-1][0]).argmax(-1)  # (T,)
    lost = 0
    for row, token in enumerate(final.tolist()):
        candidates = torch.arange(model.config.vocab_size)
        for layer in exits:
            logits = model.head(states[layer][0, row], layer)  # (V,)
            candidates = keep(logits[candidates], candidates, halving(len(candidates), k, k_min))
        lost += token not in candidates
    return lost / len(final)


def test_on_a_real_text_little_is_missed_and_with_fewer_candidates_more():
    model, tokenizer = load_checkpoint(DEFAULT_CHECKPOINT)
    ids = tokenizer.encode("Die Katze sitzt auf dem Tisch.<sep>The cat is sitting on the table.")
    text = [tokenizer.begin, *ids]
    with torch.inference_mode():
        nothing = missed(model, text, (3, 4, 6, 8), 4096, 4096)
        little = missed(model, text, (3, 4, 6, 8), 64, 16)
        more = missed(model, text, (3, 4, 6, 8), 3, 2)
    assert nothing == 0 and little <= 0.2 and little < more
