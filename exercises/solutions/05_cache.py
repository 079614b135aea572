"""The first token has no key in layers 5 to 12, because it did not run through them. The second token's own
key in layer 5 is right, since it is made from its state after layer 4; but in layer 5 it attends to the first
one's missing key, so that its state is wrong from there on, and with it its keys in layers 6 to 12. With one
exit for all, no layer above it ever runs."""

from minimal import Staircase


class Forgetful(Staircase):
    def climb(self, model, text, exits, threshold, drafts=0):
        layer, logits = super().climb(model, text, exits, threshold, drafts)
        self.filled = [len(text)] * (model.L + 1)
        return layer, logits


def wrong_layers(model, right, broken, position):
    wrong = []
    for layer in range(1, model.L + 1):
        difference = right.cache[layer, 0][:, position] - broken.cache[layer, 0][:, position]  # (H, C)
        if difference.abs().max() > 1e-6:
            wrong.append(layer)
    return wrong
