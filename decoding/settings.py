"""How to decode: every setting, with its range, each also a flag of decode.py and eval.py."""

from dataclasses import dataclass

from common.config import check_limits, option
from common.errors import UserError
from confidence import FUNCTIONS, check_classifiers, read_pruning, resolve
from decoding.thresholds import Constant, read_schedule
from model import ModelConfig, check_exit_layers

EXITS, SAMPLED = "more about exits", "more about sampling"  # groups of flags
AUTO_CHOOSES = ("exit_layers", "layer_thresholds", "max_owed")  # fields that draft = auto sets itself

# The help of some flags:
ABOUT_CONFIDENCE = f"{', '.join(FUNCTIONS)}, your own as package.module:function, or none for the full model"
ABOUT_EXITS = "layers with a confidence check (none: those that the model was trained to exit at, or all)"
ABOUT_VERIFY = "let the full model verify early tokens, so that the text is the full model's"
ABOUT_OWED = "run all layers after this many early tokens in a row (none: no limit)"
ABOUT_PRUNE = "candidates that checks score: none (all tokens), fixed:K, decaying:K:MIN or adaptive:K:MIN"
ABOUT_SHORTLIST = "let checks score only this many frequent tokens; layer L can then be an exit, too"
ABOUT_DRAFT = "fixed: verified mode uses the exits given here; auto: it chooses them from its measurements"
ABOUT_SCHEDULE = "constant, decaying:TAU (falls over the text; CALM) or adaptive:TARGET (learned; FREE)"
ABOUT_FILL = "how skipped layers get keys and values: parallel (later, exact) or copy (at once, approximate)"
ABOUT_PREDICT = "own, or contrasted with a middle layer (acd), a varying one (dola) or a second model (cd)"


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode. Layers are numbered from 1; exit layer l is after l blocks."""

    max_new_tokens: int = option(64, "generate at most this many tokens", least=1)
    confidence: str | None = option(None, ABOUT_CONFIDENCE)
    threshold: float = option(0.8, "exit if the confidence is at least this (0: always)", least=0, most=1)
    exit_layers: tuple[int, ...] | None = option(None, ABOUT_EXITS)
    verify: bool = option(False, ABOUT_VERIFY)
    max_owed: int | None = option(None, ABOUT_OWED, rare=True, least=1)
    prune: str = option("none", ABOUT_PRUNE, choices=read_pruning)
    temperature: float = option(0.0, "sampling temperature (0: greedy)", least=0)
    shortlist: int | None = option(None, ABOUT_SHORTLIST, EXITS, rare=True, least=2)
    draft: str = option("fixed", ABOUT_DRAFT, EXITS, choices=("fixed", "auto"))
    layer_thresholds: tuple[float, ...] | None = option(
        None, "one threshold for each exit layer, instead of --threshold", EXITS, rare=True, least=0, most=1
    )
    threshold_schedule: str = option("constant", ABOUT_SCHEDULE, EXITS, rare=True, choices=read_schedule)
    fill: str = option("parallel", ABOUT_FILL, EXITS, rare=True, choices=("parallel", "copy"))
    predict: str = option("own", ABOUT_PREDICT, SAMPLED, rare=True, choices=("own", "acd", "dola", "cd"))
    top_k: int | None = option(None, "sample from the k most probable tokens", SAMPLED, rare=True, least=1)
    top_p: float = option(1.0, "keep top tokens of this total probability", SAMPLED, True, above=0, most=1)
    repetition_penalty: float = option(1.0, "above 1, repetition is less likely", SAMPLED, True, least=1)
    seed: int = option(0, "seed for sampling", SAMPLED, least=0, most=2**63 - 1)
    stop_tokens: tuple[int, ...] = option((), "ids of other tokens that end a text", SAMPLED, True, least=0)

    def __post_init__(self):
        for name in ("exit_layers", "layer_thresholds", "stop_tokens"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_limits(self)
        if self.layer_thresholds is not None:
            count, layers = len(self.layer_thresholds), len(self.exit_layers or ())
            if count != layers:
                raise UserError(
                    f"layer_thresholds has {count} values, exit_layers {layers}; give as many of both"
                )
        if self.fill == "copy" and (self.max_owed is not None or self.verify):
            name = "verify" if self.verify else "max_owed"
            raise UserError(f"fill is copy, which owes nothing and is not exact; leave {name} out")
        if self.verify and self.predict != "own":
            raise UserError(f"predict is {self.predict}, but verify keeps the full model's own distribution")
        if self.draft == "auto":
            self.check_auto()
        if self.confidence is not None:
            resolve(self.confidence)

    def check_auto(self) -> None:
        """Raises UserError for settings that contradict adaptive drafting."""
        if not self.verify or self.confidence is None:
            raise UserError("draft is auto, which needs verify and a confidence function, such as softmax")
        given = [name for name in AUTO_CHOOSES if getattr(self, name) is not None]
        given += ["threshold_schedule"] if self.threshold_schedule != "constant" else []
        if given:
            raise UserError(f"draft is auto, which chooses {given[0]} itself; leave it out")

    def check_prompt(self, prompt: list[int], shape: ModelConfig) -> None:
        """Raises UserError unless `prompt` is one non-empty list of a model's token ids with room for an
        answer, and the stop tokens are ids of the model, too."""
        if len(prompt) == 0 or not all(isinstance(token, int) for token in prompt):
            raise UserError("the prompt must be one non-empty list of token ids (batch size 1)")
        if len(prompt) >= shape.max_len:
            room = f"this model has {shape.max_len} positions"
            raise UserError(f"the prompt has {len(prompt)} tokens, and {room}; shorten it")
        last = shape.vocab_size - 1
        for token in (*prompt, *self.stop_tokens):
            if not 0 <= token <= last:
                where = "the prompt" if token in prompt else "stop_tokens"
                raise UserError(f"{where} has the id {token}; this model's lie in 0 to {last}")

    def exits(self, shape: ModelConfig) -> dict[int, float]:
        """The layers at which this model may exit, with their thresholds. Raises UserError for a layer that
        it does not have, or that needs a classifier and has none, and if there is no exit layer."""
        L, layers = shape.n_layers, self.exit_layers
        beyond = (L,) if self.shortlist else ()  # after all blocks, but before the LM head
        if layers is None:
            layers = shape.exit_layers or tuple(range(1, L))
            layers += () if self.confidence == "classifier" else beyond  # the last layer has no classifier
        check_exit_layers("exit_layers", [layer for layer in layers if layer not in beyond], L)
        if not self.confidence:
            return {}
        if not layers:
            raise UserError("there is no exit layer; name some, give a shortlist, or choose confidence none")
        thresholds = dict(zip(layers, self.layer_thresholds or [self.threshold] * len(layers)))
        if self.confidence == "classifier":
            check_classifiers(shape, [layer for layer, threshold in thresholds.items() if threshold > 0])
        return thresholds

    def thresholds(self, shape: ModelConfig) -> Constant:
        """A fresh threshold schedule over the exits of a model."""
        schedule, numbers = read_schedule(self.threshold_schedule)
        return schedule(self.exits(shape), *numbers)

    def full(self) -> "DecodeConfig":
        """The full model under the same length, prediction and sampling. It is the same for settings that
        differ only in their exits."""
        kept = ("max_new_tokens", "stop_tokens", "predict", "repetition_penalty")
        kept += ("temperature", "top_k", "top_p", "seed")
        return DecodeConfig(**{name: getattr(self, name) for name in kept})
