"""The papers' settings as rows of the table: `python eval.py --rows calm,free,layerskip`, on any checkpoint.

Each is a dict of DecodeConfig's fields, with its source and what is not as in the paper. Layers are named by
their share of the depth, since the papers' models have 24 layers and more.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One method as settings."""

    source: str
    differs: str  # from the paper
    settings: dict  # fields of DecodeConfig
    depth: float | None = None  # of its only exit, a share of the layers; None: every layer trained to exit

    def fields(self, n_layers: int, exits: list[int]) -> dict:
        """The settings for a model that exits at `exits`: its only exit is the one nearest to the depth."""
        if self.depth is None:
            return dict(self.settings)
        wanted = self.depth * n_layers
        return {**self.settings, "exit_layers": (min(exits, key=lambda layer: abs(layer - wanted)),)}


RECIPES = {
    "calm": Recipe(
        "CALM: Confident Adaptive Language Modeling (Schuster 2022): softmax response, a threshold that decays over "
        "the text, states of skipped layers copied up",
        "a decoder alone in place of T5; the threshold is not calibrated (`python eval.py calibrate` does that)",
        {
            "confidence": "softmax",
            "threshold": 0.9,
            "threshold_schedule": "decaying",
            "tau": 4.0,
            "fill": "copy",
        },
    ),
    "free": Recipe(
        "FREE: Fast and Robust Early-Exiting (Bae 2023): one shallow exit, skipped layers run later in parallel, a "
        "threshold learned while decoding from a mixture of two Beta distributions",
        "a decoder alone in place of T5; the exit at a quarter of the depth; the threshold is learned anew in every "
        "text, where FREE goes on from text to text",
        {"confidence": "softmax", "threshold": 0.9, "threshold_schedule": "adaptive"},
        depth=1 / 4,
    ),
    "layerskip": Recipe(
        "LayerSkip (Elhoushi 2024): self-speculative decoding, a fixed exit drafts a fixed number of tokens, the other "
        "layers verify them together",
        "exit and draft length are a quarter of the depth and 6, where the paper chooses both for model and task; its "
        "training is `--loss rotate --layer-dropout` of train.py",
        {"confidence": "softmax", "threshold": 0.0, "verify": True, "max_owed": 6},
        depth=1 / 4,
    ),
    "del": Recipe(
        "DEL (Entezari Zarch 2025): self-speculative decoding whose exit layer and number of drafts follow from what "
        "was kept so far, of every layer",
        "the threshold follows, too; costs are seconds measured on this machine, where the paper counts layers; exits "
        "not in use are asked now and then, where the paper reads them all in every round",
        {"confidence": "softmax", "verify": True, "draft": "auto"},
    ),
    "acd": Recipe(
        "ACD: autocontrastive decoding (Gera 2023): every token from the last layer contrasted with a fixed lower one",
        "the amateur is the layer at half the depth, read by its exit head; compared with the model's own prediction",
        {"confidence": None, "predict": "contrast", "contrast": "half", "form": "dcd"},
    ),
    "dola": Recipe(
        "DoLa (Chuang 2023): every token from the last layer contrasted with the lower one that differs most",
        "every layer from 2 on may be the amateur, where the paper takes one half of them; no repetition "
        "penalty (1.2 there)",
        {"confidence": None, "predict": "contrast", "contrast": "dola", "form": "ratio"},
    ),
}
