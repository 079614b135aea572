"""The largest probability alone cannot tell (0.5, 0.5, 0, ..), a toss-up, from (0.5, 0.001, 0.001, ..), a
decision."""


def margin(trace, layer):
    best, second = trace.logits(layer).softmax(-1).topk(2).values
    return best - second
