"""A run remembered pass by pass: what `--staircase` prints and the page replays. The loop knows nothing of
it: it is given a Trace and Counters that also take notes.

L layers; step L + 1 is the head over the vocabulary. Positions count from 0, passes too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter

from torch import Tensor

from cache import KVCache
from confidence import Trace
from decoding.record import Counters, Token
from decoding.settings import DecodeConfig
from model import Transformer


class States(list):
    """h_0 .. h_l of a pass, and when each was there. On a GPU these are the times at which blocks were
    started, which say nothing of how long they take."""

    def __init__(self):
        super().__init__()
        self.begun: list[
            float
        ] = []  # when a block could begin: after the state below, and the question about it
        self.ended: list[float] = []  # when its state was there

    def append(self, state: Tensor) -> None:
        super().append(state)
        self.ended.append(perf_counter())
        self.begun.append(self.ended[-1])


class NotingTrace(Trace):
    """A Trace that also notes how many candidates each question was asked over, and when things happened."""

    def __init__(self, *args):
        super().__init__(*args)
        self.hidden = States()
        self.candidates_asked: dict[int, int] = {}  # layer asked -> n

    def decided(self, threshold: float) -> bool:
        answer = super().decided(threshold)
        self.candidates_asked[self.layer] = self.n
        self.hidden.begun[-1] = perf_counter()
        return answer


@dataclass
class Pass:
    """One pass of the staircase."""

    before: list[int]  # filled[0 .. L + 1] before it
    stop: int  # filled[0] while it ran: positions begun
    reached: int  # layer at which it stopped; L + 1: the head over the vocabulary
    asked: dict[
        int, tuple
    ]  # layer -> confidence (None: not computed), threshold, candidates, layer contrasted with
    block_seconds: dict[int, float]  # layer -> time of its block
    after: list[int] = field(
        default_factory=list
    )  # filled once the pass was over: copied, waived or rolled back
    drafted: int = 0  # verified mode, at the head: drafts judged
    kept: int = 0  # of these, kept
    # From the beginning of the run to the end of this pass:
    seconds: float = 0.0
    block_runs: int = 0
    flops: int = 0

    def rows(self, layer: int) -> int:
        """Rows that ran through `layer`, 1 to L + 1."""
        return self.stop - self.before[layer] if layer <= self.reached else 0


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
    for token in recorder.watch(stream(model, prompt, config, recorder, recorder.trace), len(prompt)): ...
    """

    passes: list[Pass] = field(default_factory=list)
    emitted: list[Emitted] = field(default_factory=list)

    @property
    def filled(self) -> list[int]:
        """filled[0 .. L + 1] now."""
        return list(self._cache.filled)

    @property
    def settled(self) -> list[Token]:
        """The tokens of the text."""
        return [each.token for each in self.emitted if not each.rolled_back]

    def trace(self, *args) -> Trace:
        """The trace of the next pass; what came before is over."""
        self.close_pass()
        return NotingTrace(*args)

    def add_pass(
        self, model: Transformer, before: list[int], cache: KVCache, layer: int, trace: NotingTrace
    ) -> None:
        super().add_pass(model, before, cache, layer, trace)
        self._cache = cache
        asked, seconds = {}, {}
        for exit_layer, threshold in trace.thresholds.items():
            confidence, amateur = trace.confidences.get(exit_layer), trace.amateurs.get(exit_layer)
            asked[exit_layer] = confidence, threshold, trace.candidates_asked[exit_layer], amateur
        for block in range(1, len(trace.hidden)):
            seconds[block] = trace.hidden.ended[block] - trace.hidden.begun[block - 1]
        self.passes.append(Pass(before, cache.filled[0], layer, asked, seconds))

    def add_judgement(self, drafted: int, kept: int) -> None:
        super().add_judgement(drafted, kept)
        self.passes[-1].drafted, self.passes[-1].kept = drafted, kept

    def close_pass(self) -> None:
        """Notes how the newest pass left things, anew where it is asked about for the sake of drafting."""
        if self.passes:
            newest = self.passes[-1]
            newest.after, newest.block_runs = self.filled, self.block_runs
            newest.flops = self.block_flops + self.head_flops
            newest.seconds = perf_counter() - self._started

    def watch(self, tokens: Iterator[Token], start: int) -> Iterator[Token]:
        """Hands on the tokens of a run whose prompt has `start` tokens. The clock stands still while they are
        away."""
        self._started = perf_counter()
        seen, at = -1, start
        for token in tokens:
            newest = len(self.passes) - 1
            if newest != seen:  # its first token
                seen, drafts = newest, list(range(newest - self.passes[-1].drafted, newest))
            made = drafts.pop(0) if drafts and not token.rolled_back else newest
            for place, draft in enumerate(token.rolled_back):
                lost = Token(draft, self.passes[drafts[place]].reached)
                self.emitted.append(Emitted(lost, at + place, drafts[place], newest, rolled_back=True))
            self.emitted.append(Emitted(token, at, made, newest))
            at += 1
            left = perf_counter()
            yield token
            self._started += perf_counter() - left
        self.close_pass()


def recorded(
    stream: Callable[..., Iterator[Token]],
    model: Transformer,
    prompt: list[int],
    config: DecodeConfig,
    amateur: Transformer | None = None,
) -> Recorder:
    """Decodes one prompt with decode.stream, and remembers the run."""
    recorder = Recorder()
    for _ in recorder.watch(stream(model, prompt, config, recorder, recorder.trace, amateur), len(prompt)):
        pass
    return recorder
