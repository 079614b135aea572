"""Both agree because the staircase skips nothing for good: when a position runs through a layer, all earlier
ones did so before or do so now, from the states that the naive loop computes, only later and once."""

import torch


def naive(model, prompt, exits, threshold, steps):
    """Runs the whole text anew for every token. Returns the tokens and their exit layers."""
    text, layers = list(prompt), []
    while len(layers) < steps and text[-1] != model.config.eos_id:
        states = model.hidden_states(torch.tensor([text]))
        for layer in (*exits, model.config.n_layers):
            logits = model.head(states[layer][0, -1], layer)
            best, second = logits.softmax(-1).topk(2).values
            if best - second >= threshold:
                break
        text.append(int(logits.argmax()))  # of the exit, or of the last layer
        layers.append(layer)
    return text[len(prompt) :], layers
