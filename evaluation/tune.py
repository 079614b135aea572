"""How `eval.py tune` chooses the entries of a settings file, with a margin.

For the threshold of each confidence function, with exit layers that were chosen before on other inputs, and
for the static exit, candidates are tested from cautious to bold (evaluation/walk.py) as long as they keep
99 % of every score of the full model in 95 % of the bootstrap resamples. Shortlists for these functions are
then tested likewise, if frequent ids are known. The chance that a chosen configuration keeps less on inputs
of the same source is therefore about 5 % for each walk, given a few hundred inputs: a bootstrap misses losses
that its inputs do not show, and a loss that none of n inputs shows may still occur in 3 of n. The other
pruning schedules and copy fill share the chosen layers and threshold without a guarantee of their own.
Verified mode keeps everything anyway. No margin can guarantee that test and dev inputs share a source.
"""

import math
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from decoding.settings import DecodeConfig
from evaluation.configurations import differing_fields, exit_layers_of
from evaluation.figures import quality_kept, tokens_per_second, written
from evaluation.inputs import Setup, encode_inputs, say
from evaluation.measure import Configuration, run_in_turns
from evaluation.recipes import nearest_exit
from evaluation.tasks import Task
from evaluation.walk import walk
from formats.data import Example

KEPT = 0.99  # the share of the full model's scores that a configuration must keep
ERROR = 0.05  # the share of resamples that may keep less
FIRST = 60  # inputs on which layers and drafts are chosen; thresholds are chosen on the others
# sets of exits, in twelfths of the depth; DRAFTS is for verified mode, whose early tokens are drafts
LAYERS = ((3,), (4,), (6,), (3, 6), (4, 8), (6, 8), (4, 6, 8), (3, 4, 6), (3, 4, 6, 8))
DRAFTS = ((2,), (3,), (4,), (3, 6))
COARSE, FINE = (0.6, 0.3), (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # thresholds, from cautious to bold
LOOSE, OWED = (0.6, 0.4, 0.2), (8, 16)  # verified mode: thresholds, values of max_owed
SHORTLISTS = (32768, 8192, 2048, 1024)  # from cautious to bold; tried up to half the vocabulary
PRUNING = ("none", "decaying", "adaptive:512")


@dataclass(frozen=True)
class Tried:
    """A candidate, its speed-up, and how much of the full model's scores it keeps: the estimate, and
    bootstrap resamples of it."""

    config: DecodeConfig
    speedup: float
    kept: float
    resampled: np.ndarray


class Tuning:
    """Chooses all configurations of one task on examples of dev: exit layers (for softmax) and the drafts of
    verified mode on some of them; a static exit, and each function's threshold for these layers, on the
    others. Up to FIRST examples are too few to split, so all of them serve both purposes."""

    def __init__(self, setup: Setup, task: Task, examples: list[Example]):
        self.setup, self.task, self.model = setup, task, setup.model
        self.exits = exit_layers_of(setup.model)
        step = math.ceil(len(examples) / FIRST)
        self.some = examples[::step]
        self.provenance = {"inputs": len(examples), "of": "dev (the part that calibrate does not use)"}
        self.provenance |= {"kept": KEPT, "error": ERROR, "seed": setup.config.seed}
        self.provenance |= {name: setup.record[name] for name in ("checkpoint_id", "commit")}
        self.others = [example for i, example in enumerate(examples) if i % step] or self.some

    def rows(self) -> dict[str, dict]:
        """Chooses all configurations. Returns, by name, their fields that are not DecodeConfig's defaults."""
        chosen = {}
        candidates = self.grid("softmax", self.exit_sets(LAYERS), COARSE)
        layers = self.choose(fastest, self.some, "softmax", candidates).exit_layers
        chosen["static"] = self.choose(boldest, self.others, "static", self.static_candidates())
        for name in ("softmax", "weighted", "jsd"):
            candidates = self.grid(name, [layers], FINE)
            chosen[name] = self.choose_both(boldest, self.others, name, candidates)
        verified = self.verified_candidates("softmax")
        chosen["verified"] = self.choose_both(fastest, self.some, "verified", verified)
        for name, prune in product(("softmax", "jsd"), PRUNING):
            chosen[f"{name} {prune.partition(':')[0]}"] = replace(chosen[name], prune=prune)
        chosen["softmax copy"] = replace(chosen["softmax"], fill="copy")
        verified = self.verified_candidates("jsd")
        chosen["jsd verified"] = self.choose_both(fastest, self.some, "jsd verified", verified)
        default = DecodeConfig(max_new_tokens=self.task.max_new_tokens)
        auto = replace(default, confidence="softmax", verify=True, draft="auto")  # needs no tuning
        chosen["verified auto"] = replace(auto, shortlist=chosen["verified"].shortlist)
        return {name: differing_fields(config, default) for name, config in chosen.items()}

    # ------------------------------------------------------------ candidates, from cautious to bold

    def static_candidates(self) -> list[DecodeConfig]:
        """Every static exit."""
        base = DecodeConfig(confidence="softmax", threshold=0.0, max_new_tokens=self.task.max_new_tokens)
        return [replace(base, exit_layers=(layer,)) for layer in reversed(self.exits)]

    def verified_candidates(self, confidence: str) -> list[DecodeConfig]:
        """Every combination of exits, threshold and `max_owed` to try in verified mode."""
        configs = self.grid(confidence, self.exit_sets(DRAFTS), LOOSE)
        return [replace(config, verify=True, max_owed=owed) for config, owed in product(configs, OWED)]

    def exit_sets(self, twelfths: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
        """The sets of exits nearest to these twelfths of the depth, each once."""
        depth = self.model.config.n_layers
        sets = [{nearest_exit(self.exits, share * depth / 12) for share in wanted} for wanted in twelfths]
        return sorted({tuple(sorted(layers)) for layers in sets})

    def grid(self, confidence: str, layer_sets, thresholds: tuple[float, ...]) -> list[DecodeConfig]:
        base = DecodeConfig(confidence=confidence, prune="fixed:64", max_new_tokens=self.task.max_new_tokens)
        pairs = product(layer_sets, thresholds)
        return [replace(base, exit_layers=layers, threshold=threshold) for layers, threshold in pairs]

    def with_shortlists(self, row: DecodeConfig) -> list[DecodeConfig]:
        """Returns a configuration over the whole vocabulary, and over shortlists where enough frequent ids
        are known."""
        known = 0 if self.model.frequent_ids is None else len(self.model.frequent_ids)
        sizes = [size for size in SHORTLISTS if size <= min(known, self.model.config.vocab_size // 2)]
        return [row, *(replace(row, shortlist=size) for size in sizes)]

    # ------------------------------------------------------------ trying and choosing

    def tried(self, examples: list[Example], title: str, configs: list[DecodeConfig]) -> list[Tried]:
        """Decodes the examples with every candidate, in turn with the full model."""
        numbered = {str(number): Configuration(config, self.model) for number, config in enumerate(configs)}
        prompts, stopping = encode_inputs(self.setup, self.task, examples, numbered)
        rows = run_in_turns(stopping, prompts, 1, f"{self.task.name}, {title}")
        tokenizer = self.setup.tokenizer
        full = rows.pop("full")
        full_texts, references = written(tokenizer, full), [example.references for example in examples]
        tried = []
        for config, row in zip(configs, rows.values()):
            kept, resampled = quality_kept(self.task, written(tokenizer, row), full_texts, references)
            tried.append(Tried(config, tokens_per_second(row) / tokens_per_second(full), kept, resampled))
        return tried

    def choose_both(self, chooser, examples: list[Example], title: str, configs: list[DecodeConfig]):
        """Chooses a candidate, then a shortlist for it."""
        row = self.choose(chooser, examples, title, configs)
        return self.choose(chooser, examples, f"{title}, shortlists", self.with_shortlists(row))

    def choose(self, chooser, examples: list[Example], title: str, configs: list[DecodeConfig]):
        """Returns the candidate that `chooser` (`fastest` or `boldest`) selects, and prints its figures."""
        if len(configs) == 1:
            return configs[0]
        each = chooser(self.tried(examples, title, configs))
        low, config = np.quantile(each.resampled, ERROR), each.config
        fields = differing_fields(config, DecodeConfig(max_new_tokens=config.max_new_tokens))
        words = ", ".join(f"{name} {value}" for name, value in fields.items())
        kept = f"keeps {each.kept:.1%} (95 % of the resamples: at least {low:.1%})"
        say(f"{self.task.name}, {title}: {words}: {kept}, {each.speedup:.2f} times the full model's speed")
        return config


def fastest(tried: list[Tried]) -> Tried:
    """Returns the fastest that is estimated to keep the scores; if there is none, the one that keeps most."""
    good = [each for each in tried if each.kept >= KEPT]
    return max(good, key=lambda each: each.speedup) if good else max(tried, key=lambda each: each.kept)


def boldest(tried: list[Tried]) -> Tried:
    """Returns the fastest of the candidates that pass a walk; if even the first fails, returns it without a
    guarantee."""
    passed = walk(tried, lambda each: (each.resampled < KEPT).mean(), ERROR)
    if not passed:
        say(f"even the most cautious candidate may keep less than {KEPT:.0%}; it is used anyway")
    return max(passed, key=lambda each: each.speedup) if passed else tried[0]
