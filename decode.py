"""The decoding loop: stop early, pay the debt later. `python decode.py --prompt ...` shows each token by its
exit layer.

Dimensions: R rows of a pass, d model width, L layers, V vocabulary. The loop knows token ids only.
"""

import common.threads  # noqa: F401  before torch

from collections.abc import Iterator
from functools import partial

import torch

from cache import KVCache
from common.errors import run as run_command
from confidence import Trace, resolve
from decoding.checks import check_amateur, check_prompt, check_stops
from decoding.command import make_parser, show_runs
from decoding.copying import copy_up
from decoding.drafting import Drafting
from decoding.prediction import Companion, Predictor
from decoding.record import Counters, Generation, Token
from decoding.settings import DecodeConfig
from decoding.shortlist import Shortlist
from decoding.verification import verified
from model import Transformer


def plain(run: "Run") -> Iterator[Token]:
    """The loop in its plain form, where every token is settled at once: pass, exit or go on, emit, owe."""
    tokens = run.unread
    while run.unfinished:
        trace, layer = run.advance(
            tokens, run.exits()
        )  # up to the first exit layer that is confident, or the top
        token = run.emit(trace, layer)  # from the distribution of the layer reached
        run.owe(layer)  # the layers above get its keys and values later, or a copy now
        run.settle([token], trace)
        yield token
        tokens = [token.id]


def run_pass(
    model: Transformer, cache: KVCache, tokens: list[int], trace: Trace, exits: dict[int, float]
) -> int:
    """One pass: advances the staircase by `tokens` until one of `exits` (layer -> threshold) finds the next
    token decided, and returns the layer reached, L + 1 for the top: the head over the vocabulary, whose
    logits are then trace.final (None if no row owes the head anything). Rows that stopped below a layer in
    earlier passes join there, so that keys and values are those of a full forward pass. Without tokens, what
    is owed is paid."""
    first, stop = cache.filled[0], cache.filled[0] + len(tokens)
    cache.filled[0] = stop
    ids = torch.tensor(tokens, dtype=torch.int64, device=cache.hidden.device)
    x = model.embed(ids)  # (R, d), the positions first .. stop - 1; R grows and first falls as owed rows join
    trace.hidden.append(x)
    for layer, block in enumerate(model.blocks, 1):
        first, x = cache.join(layer, first, x)
        if first < stop:  # without new tokens there are no rows until a layer that is owed some
            attend = partial(
                cache.attend, layer
            )  # stores these rows' keys and values (filled[layer] = stop), attends
            x = block.forward(x, attend)  # not block(x, attend): a module's hooks cost time at every call
        trace.hidden.append(x)
        if layer in exits and trace.decided(exits[layer]):
            cache.hidden[first:stop] = x  # here they wait, at this depth, for a pass that goes on
            return layer
    top = len(model.blocks) + 1
    first, x = cache.join(top, first, x)  # here it leaves out the rows of settled tokens
    if first < stop:
        trace.final = model.head(x)  # (R, V)
        trace.flops[top] = 2 * model.unembed.numel() * len(x)
    cache.filled[top] = stop
    return top


class Run:
    """What a run keeps: the staircase, the text so far, its settings made ready, and the count of the
    work."""

    def __init__(
        self,
        model: Transformer,
        prompt: list[int],
        config: DecodeConfig,
        counters: Counters,
        trace_type: type[Trace] = Trace,
        amateur: Transformer | None = None,
    ):
        check_prompt(prompt, model)
        check_stops(config.stop_tokens, model)
        self.model, self.config, self.counters = model, config, counters
        self.top = model.config.n_layers + 1
        self.length = min(len(prompt) + config.max_new_tokens, model.config.max_len)  # of the text, at most
        self.text = list(prompt)  # so far, drafts included
        self.start = self.settled = len(prompt)  # tokens of the prompt; of the text, without drafts
        self.ends, self.ended = model.config.ends.union(config.stop_tokens), False
        self.early = 0  # tokens emitted since a pass last reached the top
        self.thresholds = config.thresholds(model.config)
        learns = self.thresholds.learns and config.fill == "parallel"
        self.owe_head = (
            config.verify or learns
        )  # must early tokens give it their row, to be judged or learned from?
        confidence = config.confidence and resolve(config.confidence)
        self.cache = KVCache(model, self.length)
        self.cache.waive(len(prompt) - 1)  # only the last token of the prompt predicts
        companion = None
        if amateur is not None:
            check_amateur(amateur, model, config.contrasting, self.length)
            companion = Companion(amateur, self.length, run_pass, counters)
        self.predictor = Predictor(
            config.sampling, config.contrasting, companion, counters, model.embedding.device
        )
        self.shortlist = Shortlist(model, config.shortlist, self.length) if config.shortlist else None
        asking = (config.prune, config.prune_k, config.prune_min, config.premature_layers, self.shortlist)
        self.new_trace = partial(
            trace_type, model, confidence, *asking, {}
        )  # {}: classifiers, made ready once
        self.unread = list(prompt)  # what of the prompt the loop begins with
        if config.fill == "copy" and config.confidence and len(prompt) > 1:  # CALM: a prompt gets exact ones
            self.advance(prompt[:-1], {})
            self.unread = prompt[-1:]

    @property
    def unfinished(self) -> bool:
        return self.settled < self.length and not self.ended

    def exits(self) -> dict[int, float]:
        """The exit layers of the next pass with their thresholds; none once max_owed early tokens wait for
        the top."""
        if self.config.max_owed is not None and self.early >= self.config.max_owed:
            return {}
        return self.thresholds.at(len(self.text) - self.start, self.length - self.start)

    def advance(self, tokens: list[int], exits: dict[int, float]) -> tuple[Trace, int]:
        """One pass, counted, and shown to thresholds that learn: its trace, and the layer reached."""
        if self.shortlist:
            self.shortlist.add(tokens)
        trace, before = self.new_trace(), list(self.cache.filled)
        layer = run_pass(self.model, self.cache, tokens, trace, exits)
        self.early = 0 if layer == self.top else self.early + 1
        if self.thresholds.learns and trace.final is not None:
            self.thresholds.compare(trace)
        elif self.thresholds.learns and self.owe_head:
            self.thresholds.hold(trace, layer)
        self.counters.add_pass(self.model, before, self.cache, layer, trace)
        return trace, layer

    def emit(self, trace: Trace, layer: int) -> Token:
        """The next token, from the distribution of the layer reached, added to the text."""
        token = self.predictor.token(trace, layer, self.text)
        if layer == self.top:
            self.counters.add_miss(trace, token.id)
        self.text.append(token.id)
        return token

    def owe(self, layer: int) -> None:
        """The layers above the one reached get a copy of the newest position at once, or are owed it, which
        takes no step (parallel fill). A settled token owes the head nothing, unless thresholds learn from
        it."""
        if self.config.fill == "copy":
            copy_up(self.model, self.cache, layer, self.counters)
        if not self.owe_head:
            self.cache.waive(self.cache.filled[0])

    def settle(self, tokens: list[Token], trace: Trace) -> None:
        """Counts what a pass has settled, and its heads."""
        self.settled += len(tokens)
        self.ended = bool(tokens) and tokens[-1].id in self.ends
        self.counters.tokens += len(tokens)
        self.counters.head_flops += sum(trace.flops.values())


@torch.inference_mode()
def stream(
    model: Transformer,
    prompt: list[int],
    config: DecodeConfig,
    counters: Counters | None = None,
    trace_type: type[Trace] = Trace,
    amateur: Transformer | None = None,
    drafting: Drafting | None = None,
) -> Iterator[Token]:
    """Yields tokens up to and including the end of the text, adding the work to `counters`. Batch size 1:
    `prompt` is one list of token ids. `trace_type` may be a Trace that observes; `amateur` is a second model
    to contrast with; `drafting` goes on with what earlier texts taught. Raises UserError for a prompt that is
    empty or too long, for layers that the model does not have, and for an amateur that cannot be."""
    run = Run(model, prompt, config, counters or Counters(), trace_type, amateur)
    yield from verified(run, drafting) if config.verify else plain(run)


def generate(
    model: Transformer,
    prompt: list[int],
    config: DecodeConfig = DecodeConfig(),
    trace_type: type[Trace] = Trace,
    amateur: Transformer | None = None,
    drafting: Drafting | None = None,
) -> Generation:
    """Decodes one prompt; see `stream` for what it raises."""
    counters = Counters()
    return Generation.of(stream(model, prompt, config, counters, trace_type, amateur, drafting), counters)


def main() -> None:
    show_runs(make_parser().parse_args(), stream)  # there token ids become text


if __name__ == "__main__":
    run_command(main)
