"""How to decode: every setting, checked, each also a flag of decode.py and eval.py."""

from dataclasses import dataclass, fields

from common.config import option
from common.errors import UserError
from confidence import FUNCTIONS, SCHEDULES, resolve
from decoding.prediction import AMATEURS, CONTRASTS, Contrast, Sampling
from decoding.thresholds import THRESHOLDS, Constant
from formats.classifiers import check_classifiers
from formats.shape import check_layers
from model import ModelConfig

EXITS, CONTRASTED, SAMPLED = "more about exits", "contrast", "more about sampling"  # groups of flags
AUTO_CHOOSES = ("exit_layers", "layer_thresholds", "max_owed")  # what draft = auto leaves nobody else to say
COLDEST = 1e-4  # temperature: below, float32 knows no other token than the best


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode. Layers count from 1; exit layer l is after l blocks."""

    max_new_tokens: int = option(64, "tokens at most; fewer where the model's positions end")
    confidence: str | None = option(
        None, f"{', '.join(FUNCTIONS)}, package.module:function, or none: the full model"
    )
    threshold: float = option(
        0.8, "exit when confidence >= threshold, 0 to 1; at 0 the question is not asked"
    )
    exit_layers: tuple[int, ...] | None = option(
        None,
        "layers after which to ask, 1 to L-1; none: those that the model was trained to exit at, or every one",
    )
    verify: bool = option(
        False, "take early tokens as drafts and let the full model judge them: its output, exactly, sooner"
    )
    max_owed: int | None = option(
        None, "after so many early tokens the next pass goes to the top; none: no bound"
    )
    prune: str = option(
        "none", "candidates kept once an exit layer is asked: none (all), fixed, decaying or adaptive"
    )
    temperature: float = option(0.0, "sampling temperature; 0 is greedy")

    shortlist: int | None = option(
        None,
        "ask over so many frequent ids with those of the text, and exit at layer L, too; none: over the whole "
        "vocabulary",
        EXITS,
    )
    draft: str = option(
        "fixed",
        "verified mode, what decides how long to draft: fixed (the exits and thresholds given), or auto (exit layer, "
        "threshold and number of drafts by measurement)",
        EXITS,
    )
    layer_thresholds: tuple[float, ...] | None = option(
        None, "one for each of exit_layers, in place of threshold", EXITS
    )
    threshold_schedule: str = option(
        "constant",
        "constant, decaying over the steps (CALM), or adaptive: learned while decoding (FREE)",
        EXITS,
    )
    tau: float = option(4.0, "how fast the decaying threshold falls, above 0", EXITS)
    target: float = option(
        0.9,
        "adaptive threshold: wanted probability that an early token is the full model's, between 0 and 1",
        EXITS,
    )
    min_layer: int = option(1, "first layer at which an exit is allowed", EXITS)
    fill: str = option(
        "parallel",
        "keys and values of skipped layers: parallel (exact, when next needed) or copy (approximate, at once)",
        EXITS,
    )
    premature_layers: tuple[int, ...] | None = option(
        None, "layers that jsd may contrast with; none: all from 2 on", EXITS
    )
    prune_k: int = option(64, "candidates kept at first, at least 2", EXITS)
    prune_min: int = option(
        16, "candidates that decaying and adaptive pruning always keep, 2 to prune_k", EXITS
    )

    predict: str = option(
        "own",
        "what a token is taken from: own (the distribution of its layer) or contrast (against an amateur's)",
        CONTRASTED,
    )
    contrast: str = option(
        "half",
        "contrast with: half (layer l/2), a layer's number, jsd, or dola (jsd without the distance)",
        CONTRASTED,
    )
    form: str = option(
        "dcd",
        "dcd (sums to 1 with what is not plausible), ratio or beta (both nothing outside the plausible)",
        CONTRASTED,
    )
    alpha: float = option(
        0.1,
        "plausible are tokens of at least this share of the largest probability, above 0, up to 1",
        CONTRASTED,
    )
    beta: float = option(0.5, "weight of the amateur in form beta, above 0", CONTRASTED)
    amateur_temperature: float = option(
        1.0, "temperature of a second model's distribution, above 0", CONTRASTED
    )

    top_k: int | None = option(None, "sample from the k most probable tokens", SAMPLED)
    top_p: float = option(
        1.0, "sample from the most probable tokens of this total mass, above 0, up to 1", SAMPLED
    )
    repetition_penalty: float = option(
        1.0, "makes tokens that occurred less likely (CTRL); at least 1, which is off", SAMPLED
    )
    seed: int = option(0, "seed of the sampling", SAMPLED)
    stop_tokens: tuple[int, ...] = option(
        (), "token ids that end a text, besides the model's own end of text", SAMPLED
    )

    def __post_init__(self):
        for name in ("exit_layers", "premature_layers", "layer_thresholds", "stop_tokens"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self.check_choices()
        self.check_ranges()
        if self.prune in ("decaying", "adaptive") and self.prune_min > self.prune_k:
            raise UserError(f"prune_min is {self.prune_min}, above prune_k {self.prune_k}; lower it")
        if self.layer_thresholds is not None and self.exit_layers is None:
            raise UserError("layer_thresholds belong to exit_layers, one each; give these, too")
        if self.exit_layers is not None and len(set(self.exit_layers)) < len(self.exit_layers):
            raise UserError(f"exit_layers are {','.join(map(str, self.exit_layers))}; each can be given once")
        if self.layer_thresholds is not None and len(self.layer_thresholds) != len(self.exit_layers):
            raise UserError(
                f"layer_thresholds has {len(self.layer_thresholds)} values; give one for each of "
                f"exit_layers ({len(self.exit_layers)})"
            )
        if self.fill == "copy" and self.max_owed is not None:
            raise UserError(
                f"max_owed is {self.max_owed}, but fill is copy, which owes nothing; leave one of them out"
            )
        if self.verify and self.fill != "parallel":
            raise UserError(
                "verify is True, but fill is copy; only exact keys and values can judge, so fill must be "
                "parallel"
            )
        if self.verify and self.predict != "own":
            raise UserError(
                "verify is True, but predict is contrast; drafts are judged by the full model's own "
                "distribution"
            )
        if self.draft == "auto":
            self.check_auto()
        if self.confidence is not None:
            resolve(self.confidence)

    def check_auto(self) -> None:
        """Raises UserError for what contradicts drafting by measurement."""
        if not self.verify:
            raise UserError(
                "draft is auto, but verify is False; only drafts that the full model judges can teach, so "
                "set verify"
            )
        if self.confidence is None:
            raise UserError("draft is auto, but confidence is none; name one, such as softmax")
        for name in AUTO_CHOOSES:
            if getattr(self, name) is not None:
                raise UserError(f"draft is auto, which chooses {name} itself; leave it out")
        if self.threshold_schedule != "constant":
            raise UserError(
                f"draft is auto, but threshold_schedule is {self.threshold_schedule}; auto chooses "
                "thresholds itself, so leave it out"
            )

    def check_choices(self) -> None:
        """Raises UserError for a word that is not known."""
        choices = {
            "threshold_schedule": THRESHOLDS,
            "fill": ("parallel", "copy"),
            "prune": SCHEDULES,
            "draft": ("fixed", "auto"),
            "predict": ("own", "contrast"),
            "form": CONTRASTS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(known)}")
        if self.contrast not in AMATEURS and not self.contrast.isdecimal():
            raise UserError(
                f"unknown contrast {self.contrast!r}; choose from {', '.join(AMATEURS)}, or a layer's number"
            )

    def check_ranges(self) -> None:
        """Raises UserError for a number outside its range."""
        least = {
            "max_new_tokens": 1,
            "min_layer": 1,
            "max_owed": 1,
            "top_k": 1,
            "prune_min": 2,
            "prune_k": 2,
            "shortlist": 2,
            "temperature": 0,
            "seed": 0,
            "repetition_penalty": 1,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value < 2**63:
                raise UserError(f"{name} is {value}; it must be at least {low}, and finite")
        if 0 < self.temperature < COLDEST:
            raise UserError(
                f"temperature is {self.temperature}; it must be 0, which is greedy, or at least {COLDEST}"
            )
        for token in self.stop_tokens:
            if not 0 <= token < 2**63:
                raise UserError(f"stop_tokens has {token}; token ids are at least 0")
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

    def exits(self, shape: ModelConfig) -> dict[int, float]:
        """The layers at which this model may exit, with their thresholds. Raises UserError for one that it
        does not have, and if none is left."""
        L, layers = shape.n_layers, self.exit_layers
        beyond = (L,) if self.shortlist else ()  # after all blocks, but not the head over the vocabulary
        if layers is None:
            layers = shape.exit_layers or tuple(range(1, L))
            layers += () if self.confidence == "classifier" else beyond  # the last layer has none
        check_layers("exit_layers", [layer for layer in layers if layer not in beyond], L)
        check_layers("premature_layers", self.premature_layers or (), L)
        check_layers("contrast", [int(self.contrast)] if self.contrast.isdecimal() else (), L)
        if not self.confidence:
            return {}
        thresholds = self.layer_thresholds or [self.threshold] * len(layers)
        allowed = {
            layer: threshold for layer, threshold in zip(layers, thresholds) if layer >= self.min_layer
        }
        if not layers:
            remedy = (
                "leave the flag out"
                if L > 1
                else "give a shortlist, or confidence none: one layer has no exit"
            )
            raise UserError(f"exit_layers are none; {remedy}")
        if not allowed:
            raise UserError(
                f"min_layer is {self.min_layer}, which leaves no exit layer; lower it or give other "
                "exit_layers"
            )
        if self.confidence == "classifier":
            check_classifiers(shape, [layer for layer, threshold in allowed.items() if threshold > 0])
        return allowed

    def thresholds(self, shape: ModelConfig) -> Constant:
        """A fresh threshold schedule over the exits of a model."""
        return THRESHOLDS[self.threshold_schedule](self.exits(shape), self.tau, self.target)

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.seed, self.verify
        )

    @property
    def contrasting(self) -> Contrast | None:
        """None: tokens come from a layer's own distribution."""
        if self.predict == "own":
            return None
        return Contrast(self.contrast, self.form, self.alpha, self.beta, self.amateur_temperature)

    def full(self) -> "DecodeConfig":
        """Every token from the last layer, under the same length, prediction and sampling; of settings that
        differ only in their exits the same."""
        kept = [
            "max_new_tokens",
            "stop_tokens",
            "repetition_penalty",
            "temperature",
            "top_k",
            "top_p",
            "seed",
        ]
        if self.predict == "contrast":
            kept += [
                "predict",
                "contrast",
                "form",
                "alpha",
                "beta",
                "amateur_temperature",
                "premature_layers",
            ]
        return DecodeConfig(**{name: getattr(self, name) for name in kept})

    def describe(self, shape: ModelConfig) -> str:
        """What is in force, in a line: confidence, exit layers with their thresholds, and what differs from
        the defaults."""
        if self.confidence is None:
            shown = ["the full model"]
        else:
            exits = self.exits(shape)
            layers, thresholds = (
                ",".join(map(str, exits)),
                ",".join(f"{t:g}" for t in sorted(set(exits.values()))),
            )
            shown = [f"{self.confidence} at layers {layers} from {thresholds} on"]
            if self.draft == "auto":
                shown = [f"{self.confidence} at one of the layers {layers}, as measured"]
        told = {"confidence", "threshold", "layer_thresholds", "exit_layers"}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name not in told and value != each.default:
                shown.append(each.name if value is True else f"{each.name} {value}")
        return ", ".join(shown)
