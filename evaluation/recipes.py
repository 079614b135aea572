"""The papers' settings as configurations: `python eval.py --compare calm,free,layerskip`, on any checkpoint.
docs/methods.md explains each method.

Each recipe is a dict of DecodeConfig's fields; comments name the source and what differs from the paper. The
papers' models have 24 layers and more, so a layer is given as a share of the depth.
"""

RECIPES = {
    # CALM: Confident Adaptive Language Modeling (Schuster 2022): softmax response, a threshold that decays
    # over the text, states of skipped layers copied up. Here the model is decoder-only, where the paper uses
    # T5, and the threshold is not calibrated (`python eval.py calibrate` does that).
    "calm": {"confidence": "softmax", "threshold": 0.9, "threshold_schedule": "decaying:4", "fill": "copy"},
    # FREE: Fast and Robust Early-Exiting (Bae 2023): one shallow exit, skipped layers run later in parallel,
    # a threshold learned while decoding from a mixture of two Beta distributions. Here the model is
    # decoder-only, where the paper uses T5, and the threshold is learned anew in every text, where FREE
    # carries it over from text to text.
    "free": {"confidence": "softmax", "threshold": 0.9, "threshold_schedule": "adaptive:0.9"},
    # LayerSkip (Elhoushi 2024), self-speculative decoding: a fixed exit drafts a fixed number of tokens, and
    # the other layers verify them together. Here the exit is at a quarter of the depth and drafts 6 tokens;
    # the paper chooses both for model and task. Its training is `train.py --loss layerskip --layer-dropout`.
    "layerskip": {"confidence": "softmax", "threshold": 0.0, "verify": True, "max_owed": 6},
    # DEL (Entezari Zarch 2025): self-speculative decoding whose exit layer and number of drafts depend on
    # how many drafts of every layer were kept so far. Here layer, threshold and number are chosen jointly;
    # costs are seconds measured on this machine, where the paper counts layers; exits not in use are checked
    # now and then, where the paper checks all in every round.
    "del": {"confidence": "softmax", "verify": True, "draft": "auto"},
    # ACD: autocontrastive decoding (Gera 2023): every token comes from the last layer, contrasted with a
    # fixed lower one. Here the amateur is the layer at half the depth, with its exit head.
    "acd": {"confidence": None, "predict": "acd"},
    # DoLa (Chuang 2023): every token comes from the last layer, contrasted with the lower one that differs
    # most. Here every layer from 2 on may be the amateur, where the paper uses even layers of one part of the
    # model, and there is no repetition penalty (1.2 there).
    "dola": {"confidence": None, "predict": "dola"},
}
# The only exit of a recipe, as a share of the depth; the others use every exit of the model.
EXIT_DEPTH = {"free": 1 / 4, "layerskip": 1 / 4}


def recipe_fields(name: str, n_layers: int, exits: list[int]) -> dict:
    """The settings of a recipe for a model that exits at `exits`."""
    if name not in EXIT_DEPTH:
        return RECIPES[name]
    return {**RECIPES[name], "exit_layers": (nearest_exit(exits, EXIT_DEPTH[name] * n_layers),)}


def nearest_exit(exits: list[int], layer: float) -> int:
    """The exit that is nearest to a layer; the first of two that are equally near."""
    return min(exits, key=lambda exit_layer: abs(exit_layer - layer))
