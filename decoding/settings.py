"""How to decode: every setting, checked, each also a flag of decode.py and eval.py; and thresholds from a file."""

import json
from dataclasses import dataclass
from pathlib import Path

from common.config import option, read_field
from common.errors import UserError
from confidence import FUNCTIONS, SCHEDULES, resolve
from decoding.prediction import AMATEURS, FORMS
from decoding.thresholds import THRESHOLDS, Constant
from model import check_layers


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode. Layers count from 1; exit layer l is after l blocks."""

    max_new_tokens: int = option(64, "tokens at most; fewer where the model's positions end")
    stop_tokens: tuple[int, ...] = option((), "token ids that end a text, besides the model's own end of text")
    confidence: str | None = option(None, f"{', '.join(FUNCTIONS)}, package.module:function, or none: the full model")
    threshold: float = option(0.8, "exit when confidence >= threshold, 0 to 1; at 0 the question is not asked")
    layer_thresholds: tuple[float, ...] | None = option(None, "one threshold for each of exit_layers, in place of threshold")
    threshold_schedule: str = option("constant", "constant, decaying over the steps (CALM), or adaptive: learned while decoding (FREE)")
    tau: float = option(4.0, "how fast the decaying threshold falls, above 0")
    target: float = option(0.9, "adaptive threshold: wanted probability that an early token is the full model's, between 0 and 1")
    exit_layers: tuple[int, ...] | None = option(None, "layers after which to ask, 1 to L-1; none: every one")
    min_layer: int = option(1, "first layer at which an exit is allowed")
    fill: str = option("parallel", "keys and values of skipped layers: parallel (exact, when next needed) or copy (approximate, at once)")
    max_owed: int | None = option(None, "with so many positions owed to the last layer the next pass goes to the top; none: no bound")
    verify: bool = option(False, "take early tokens as drafts and let the full model judge them: its output, exactly, only sooner")
    prune: str = option("none", "candidates kept from the first exit layer asked on: none (all), fixed, decaying or adaptive")
    prune_k: int = option(64, "candidates kept at first, at least 2")
    prune_min: int = option(16, "candidates that decaying and adaptive pruning always keep, 2 to prune_k")
    premature_layers: tuple[int, ...] | None = option(None, "layers that jsd may contrast with; none: all from 2 on")
    predict: str = option("own", "what a token is taken from: own (the distribution of its layer) or contrast (against an amateur's)")
    contrast: str = option("half", "contrast with: half (layer l/2), a layer's number, jsd, or dola (jsd without the distance)")
    form: str = option("dcd", "contrast: dcd (sums to 1 with what is not plausible), ratio or beta (both nothing outside the plausible)")
    alpha: float = option(0.1, "contrast: plausible are tokens of at least this share of the largest probability, above 0, up to 1")
    beta: float = option(0.5, "contrast: weight of the amateur in form beta, above 0")
    amateur_temperature: float = option(1.0, "contrast: temperature of a second model's distribution, above 0")
    repetition_penalty: float = option(1.0, "makes tokens that occurred less likely (CTRL); at least 1, which is off")
    temperature: float = option(0.0, "sampling temperature; 0 is greedy")
    top_k: int | None = option(None, "sample from the k most probable tokens")
    top_p: float = option(1.0, "sample from the most probable tokens of this total mass, above 0, up to 1")
    seed: int = option(0, "seed of the sampling")

    def __post_init__(self):
        for name in ("exit_layers", "premature_layers", "layer_thresholds", "stop_tokens"):
            object.__setattr__(self, name, None if getattr(self, name) is None else tuple(getattr(self, name)))
        choices = {"threshold_schedule": THRESHOLDS, "fill": ("parallel", "copy"), "prune": SCHEDULES, "predict": ("own", "contrast"),
                   "form": FORMS}  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(known)}")
        if self.contrast not in AMATEURS and not self.contrast.isdecimal():
            raise UserError(f"unknown contrast {self.contrast!r}; choose from {', '.join(AMATEURS)}, or a layer's number")
        least = {"max_new_tokens": 1, "min_layer": 1, "max_owed": 1, "prune_min": 2, "prune_k": 2, "top_k": 1, "temperature": 0, "seed": 0,
                 "repetition_penalty": 1}  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value < 2**63:
                raise UserError(f"{name} is {value}; it must be at least {low}, and finite")
        for threshold in (self.threshold, *(self.layer_thresholds or ())):
            if not 0 <= threshold <= 1:
                raise UserError(f"threshold is {threshold}; it must lie between 0 and 1")
        for name in ("top_p", "alpha"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie above 0 and up to 1")
        for name in ("tau", "beta", "amateur_temperature"):
            if not 0 < getattr(self, name) < 2**63:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie above 0, and be finite")
        if not 0 < self.target < 1:
            raise UserError(f"target is {self.target}; it must lie between 0 and 1")
        if self.prune in ("decaying", "adaptive") and self.prune_min > self.prune_k:
            raise UserError(f"prune_min is {self.prune_min}, above prune_k {self.prune_k}; lower it")
        if self.layer_thresholds is not None and len(self.layer_thresholds) != len(self.exit_layers or ()):
            raise UserError(f"layer_thresholds has {len(self.layer_thresholds)} values; give one for each of exit_layers "
                             f"({len(self.exit_layers or ())})")  # fmt: skip
        if self.verify and self.fill != "parallel":
            raise UserError("verify is True, but fill is copy; only exact keys and values can judge, so fill must be parallel")
        if self.verify and self.predict != "own":
            raise UserError("verify is True, but predict is contrast; drafts are judged by the full model's own distribution")
        if self.confidence is not None:
            resolve(self.confidence)

    def exits(self, n_layers: int) -> dict[int, float]:
        """The layers at which this model may exit, with their thresholds. Raises ValueError for one that it does not have, and if none is
        left."""
        layers = range(1, n_layers) if self.exit_layers is None else self.exit_layers
        check_layers("exit_layers", layers, n_layers)
        check_layers("premature_layers", self.premature_layers or (), n_layers)
        check_layers("contrast", [int(self.contrast)] if self.contrast.isdecimal() else (), n_layers)
        thresholds = self.layer_thresholds or [self.threshold] * len(layers)
        allowed = {layer: threshold for layer, threshold in zip(layers, thresholds) if layer >= self.min_layer}
        if self.confidence and n_layers > 1 and not allowed:
            raise UserError(f"min_layer is {self.min_layer}, which leaves no exit layer; lower it or give other exit_layers")
        return allowed if self.confidence else {}

    def full(self) -> "DecodeConfig":
        """Every token from the last layer, under the same length, prediction and sampling; of settings that differ only in their exits the
        same."""
        kept = ["max_new_tokens", "stop_tokens", "repetition_penalty", "temperature", "top_k", "top_p", "seed"]
        if self.predict == "contrast":
            kept += ["predict", "contrast", "form", "alpha", "beta", "amateur_temperature", "premature_layers"]
        return DecodeConfig(**{name: getattr(self, name) for name in kept})

    def thresholds(self, n_layers: int) -> Constant:
        """A fresh threshold schedule over the exits of a model."""
        return THRESHOLDS[self.threshold_schedule](self.exits(n_layers), self.tau, self.target)


def with_thresholds(path: Path | None, flags: dict) -> dict:
    """The fields of DecodeConfig in a file of thresholds, if there is one, and the flags, which outrank it: a threshold among them those
    of single layers, too."""
    settings = {} if path is None else read_thresholds(path)
    if "threshold" in flags:
        settings.pop("layer_thresholds", None)
    return {**settings, **flags}


def read_thresholds(path: Path) -> dict:
    """Settings from a JSON file, as calibration writes it: fields of DecodeConfig, and their `provenance`, which is not read. Raises
    ValueError for what is not that."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return from_json({name: value for name, value in content.items() if name != "provenance"})
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not usable as thresholds ({error})") from None


def from_json(content: dict) -> dict:
    """Fields of DecodeConfig, each as its flag would read it. Raises ValueError for what no flag would take."""
    if not isinstance(content, dict):
        raise UserError(f"settings must be fields and values, not {content!r:.40}")
    texts = {name: ",".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in content.items()}
    settings = {name.replace("-", "_"): read_field(DecodeConfig, name, text) for name, text in texts.items()}
    DecodeConfig(**settings)
    return settings
