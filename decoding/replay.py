"""A run recorded pass by pass: what `--staircase` prints and what the page replays.

L layers; step L + 1 of the staircase is the LM head. Positions and passes count from 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from cache import KVCache
from decoding.record import Counters, Token
from decoding.trace import Trace


class Check(NamedTuple):
    """One confidence check."""

    confidence: float | None  # None: the threshold is 0, so nothing was computed
    threshold: float
    candidates: int
    amateur: int | None  # the layer that this one was contrasted with


@dataclass
class Pass:
    """One pass. The heights of the staircase are those of KVCache.heights()."""

    before: list[int]  # heights before it
    stop: int  # how many positions had been begun while it ran
    reached: int  # the layer at which it stopped; L + 1: the LM head
    checks: dict[int, Check]  # by layer
    after: list[int] = field(default_factory=list)  # heights once copies and rollbacks were done
    drafted: int = 0  # verified mode, at the LM head: drafts judged
    kept: int = 0  # of these, kept
    block_runs: int = 0  # from the beginning of the run to the end of this pass
    flops: int = 0  # likewise


@dataclass
class Emitted:
    """One token that a pass put into the text: settled, or a draft that was rolled back."""

    token: Token
    at: int  # its position in the text
    made: int  # the pass that it came from
    settled: int  # the pass that settled it, or rolled it back
    rolled_back: bool = False


@dataclass
class Recorder(Counters):
    """Counters that remember every pass, and every token with the passes that made and settled it. Use:

    recorder = Recorder()
    for token in recorder.watch(stream(model, prompt, config, recorder)): ...
    """

    passes: list[Pass] = field(default_factory=list)
    emitted: list[Emitted] = field(default_factory=list)

    @property
    def heights(self) -> list[int]:
        """The staircase as it is now."""
        return self._cache.heights()

    @property
    def settled(self) -> list[Token]:
        """The tokens of the text."""
        return [each.token for each in self.emitted if not each.rolled_back]

    def new_trace(self, *args) -> Trace:
        self.close_pass()
        return super().new_trace(*args)

    def add_pass(self, before: list[int], cache: KVCache, layer: int, trace: Trace) -> None:
        super().add_pass(before, cache, layer, trace)
        checks = {}
        for exit_layer, threshold in trace.thresholds.items():
            confidence, amateur = trace.confidences.get(exit_layer), trace.amateurs.get(exit_layer)
            checks[exit_layer] = Check(confidence, threshold, trace.checked[exit_layer], amateur)
        self.passes.append(Pass(before, cache.begun, layer, checks))
        self._cache = cache

    def add_judgement(self, drafted: int, kept: int) -> None:
        super().add_judgement(drafted, kept)
        self.passes[-1].drafted, self.passes[-1].kept = drafted, kept

    def close_pass(self) -> None:
        """Completes the record of the newest pass. (Adaptive drafting may still do work after the pass.)"""
        if self.passes:
            newest = self.passes[-1]
            newest.after, newest.block_runs = self.heights, self.block_runs
            newest.flops = self.block_flops + self.head_flops

    def watch(self, tokens: Iterator[Token]) -> Iterator[Token]:
        """Records and yields tokens; `at` is `stop` of the pass of a token, or of the draft it replaced."""
        seen, drafts = -1, []
        for token in tokens:
            newest = len(self.passes) - 1
            if newest != seen:  # the first token that this pass settles
                seen, drafts = newest, list(range(newest - self.passes[-1].drafted, newest))
            if token.rolled_back:  # the full model's own, in the place of the first draft that was wrong
                made, place = newest, drafts[0]
            else:
                made = place = drafts.pop(0) if drafts else newest
            for draft, draft_made in zip(token.rolled_back, drafts):
                source = self.passes[draft_made]
                lost = Token(draft, source.reached)
                self.emitted.append(Emitted(lost, source.stop, draft_made, newest, rolled_back=True))
            self.emitted.append(Emitted(token, self.passes[place].stop, made, newest))
            yield token
        self.close_pass()
