"""The decoding loop: a pass may stop early, and a later pass computes what is owed.
`python decode.py "Guten Morgen!"` shows each token in the color of its exit layer.

Dimensions: R rows of a pass, d model width, L layers, V vocabulary. The loop knows token ids only.
"""

import common.threads  # noqa: F401  sets variables that torch reads

from collections.abc import Iterator
from dataclasses import replace

import torch

from cache import KVCache
from common.errors import run as run_command
from confidence import resolve
from decoding.loading import load_checkpoint  # noqa: F401  for users: from decode import generate, load_checkpoint
from decoding.prediction import Companion, Predictor, check_amateur
from decoding.record import Counters, Generation, Token
from decoding.settings import DecodeConfig
from decoding.shortlist import Shortlist
from decoding.trace import Trace
from model import Transformer


def plain(run: "Run") -> Iterator[Token]:
    """The plain loop: run a pass to an exit or to the top, output its token at once, and leave the layers
    above for later."""
    tokens = run.unread
    while run.unfinished:
        trace, layer = run.advance(tokens, run.exits())  # to the first confident exit layer, or to the top
        token = run.emit(trace, layer)  # from the distribution of the layer reached
        run.skip_above(layer)  # keys and values of the layers above: later, or from a copy now
        run.settle([token], trace)
        yield token
        tokens = [token.id]


def verified(run: "Run", drafting=None) -> Iterator[Token]:
    """The verified loop: early exit that cannot change the output (speculative decoding of a model by its own
    lower layers). An early token is a *draft*: the next pass continues from it, but it is not output yet. A
    pass that reaches the top judges all drafts at once. `drafting` (Drafting in decoding/drafting.py) chooses
    the exit layer, the threshold and the number of drafts from measurements.

    This needs more FLOPs than the full model, because every row goes through every block in the end, and
    wrong drafts are wasted. It is faster nevertheless: at batch size 1 the time goes into reading weights,
    and a block reads its weights once, whether it processes one row or eight."""
    tokens, drafts, passes = run.unread, [], []  # passes: the traces since the last judgement
    while run.unfinished:
        if run.drafts_end(drafts):  # a pass without a new token brings the rows that judge drafts to the top
            trace, layer = run.advance([], exits={})
        else:
            exits = drafting.exits(len(drafts)) if drafting else run.exits()
            trace, layer = run.advance(tokens, exits)
        passes.append(trace)
        if layer < run.top:
            drafts.append(run.emit(trace, layer))
            run.settle([], trace)  # no run.skip_above: the LM head will judge the draft
            tokens = [drafts[-1].id]
        else:
            settled, kept = run.judge(trace, drafts)
            if drafting:
                drafting.learn(run, passes, drafts, settled, kept)
            run.settle(settled, trace)
            yield from settled
            tokens, drafts, passes = [settled[-1].id], [], []  # the last token has not been read yet


def run_pass(
    model: Transformer, cache: KVCache, tokens: list[int], trace: Trace, exits: dict[int, float]
) -> int:
    """One pass: advances the staircase by `tokens` until one of `exits` (layer -> threshold) finds the next
    token decided. Returns the layer reached, L + 1 for the top: the LM head, whose logits are then
    trace.final (None if it is owed no row). Rows that stopped below a layer in earlier passes join
    there, so that keys and values are those of a full forward pass. Without tokens, the pass computes what is
    owed."""
    top = model.config.n_layers + 1
    x = model.embed(torch.tensor([tokens], dtype=torch.int64, device=model.device))  # h_0 (1, R, d)
    cache.begin(x)
    trace.hidden.append(x)
    for layer, block in enumerate(model.blocks, 1):
        # All rows that are owed to this layer, also from earlier passes, go through it (none, if there are no
        # new tokens and nothing is owed). It becomes the trace's newest layer, which `decided` is about.
        trace.hidden.append(cache.climb(block))
        if layer in exits and trace.decided(exits[layer]):
            return layer  # here the rows wait, in cache.hidden, for a pass that goes deeper
    logits = [model.head(rows[0]) for rows in cache.pieces(cache.head_filled)]  # those owed to the LM head
    if logits:
        trace.final = torch.cat(logits)  # (R, V)
        trace.flops[top] = len(trace.final) * 2 * model.config.vocab_size * model.config.d_model
    cache.head_filled = cache.begun
    return top


class Run:
    """The state of one decoding run: the staircase, the text so far, the settings, and the counters."""

    def __init__(
        self, model: Transformer, prompt: list[int], config: DecodeConfig, counters: Counters, amateur
    ):
        config.check_prompt(prompt, model.config)
        # The maximum length of prompt plus answer:
        self.length = min(len(prompt) + config.max_new_tokens, model.config.max_len)
        check_amateur(amateur, model, config.predict, self.length)
        self.model, self.counters = model, counters
        self.thresholds = config.thresholds(model.config)
        self.config = replace(config, confidence=config.confidence and resolve(config.confidence))
        self.top = model.config.n_layers + 1  # the LM head is the step above layer L
        self.ends, self.ended = model.config.ends.union(config.stop_tokens), False
        self.text = list(prompt)  # including drafts
        self.start = len(prompt)  # where the answer begins in the text
        self.settled_length = len(prompt)  # of the text without drafts
        self.early = 0  # number of tokens emitted since a pass last reached the top
        # Early tokens still owe their row to the LM head in verified mode, and if thresholds learn from it:
        self.owe_head = config.verify or (self.thresholds.learns and config.fill == "parallel")
        self.cache = KVCache(model, self.length)
        self.cache.head_filled = len(prompt) - 1  # only the last token of the prompt predicts
        self.shortlist = Shortlist(model, config.shortlist, self.length) if config.shortlist else None
        companion = None if amateur is None else Companion(amateur, self.length, counters)
        self.predictor = Predictor(config, companion, counters, model.device)
        self.unread = list(prompt)  # the tokens of the prompt that the loop begins with
        # copy_up copies one row, so the prompt goes through all layers first. (In CALM an encoder reads it.)
        if config.fill == "copy" and config.confidence and len(prompt) > 1:
            self.advance(prompt[:-1], {})
            self.unread = prompt[-1:]

    @property
    def unfinished(self) -> bool:
        return self.settled_length < self.length and not self.ended

    def exits(self) -> dict[int, float]:
        """The exit layers of the next pass with their thresholds; none after max_owed early tokens since the
        last pass to the top."""
        if self.config.max_owed is not None and self.early >= self.config.max_owed:
            return {}
        return self.thresholds.at(len(self.text) - self.start, self.length - self.start)

    def advance(self, tokens: list[int], exits: dict[int, float]) -> tuple[Trace, int]:
        """Runs and counts a pass, and shows it to thresholds that learn. Returns its trace and its layer."""
        if self.shortlist:
            self.shortlist.add(tokens)
        trace = self.counters.new_trace(self.model, self.config, self.shortlist)
        before = self.cache.heights()
        layer = run_pass(self.model, self.cache, tokens, trace, exits)
        self.early = 0 if layer == self.top else self.early + 1
        if self.thresholds.learns:
            self.teach(trace, layer)
        self.counters.add_pass(before, self.cache, layer, trace)
        return trace, layer

    def teach(self, trace: Trace, layer: int) -> None:
        """Shows a pass to thresholds that learn: its confidences and, at the top, which exits were right."""
        if trace.final is not None:
            checked = [(value, trace.guess(exit_layer)) for exit_layer, value in trace.confidences.items()]
            self.thresholds.compare(trace.final.argmax(-1).tolist(), checked)
        elif self.owe_head:
            self.thresholds.hold(trace.confidences.get(layer), trace.guess(layer))

    def emit(self, trace: Trace, layer: int) -> Token:
        """The next token, from the distribution of the layer reached, added to the text."""
        token = self.predictor.token(trace, layer, self.text)
        if layer == self.top:
            self.counters.add_miss(trace, token.id)
        self.text.append(token.id)
        return token

    def skip_above(self, layer: int) -> None:
        """Skips the layers above an exit. The newest position's keys and values are owed to them (fill
        parallel), or are computed now from a copy of its state (fill copy). Its row is never owed to the LM
        head, unless thresholds learn from it. (After a pass to the top, no layer is skipped.)"""
        if self.config.fill == "copy":
            copy_up(self.model, self.cache, layer)
            self.counters.add_copies(self.model.config, len(self.model.blocks[layer:]))
        if not self.owe_head:
            self.cache.head_filled = self.cache.begun

    def settle(self, tokens: list[Token], trace: Trace) -> None:
        """Counts the tokens that a pass has settled, and notes whether they end the text. Also counts the
        FLOPs of the pass's heads, which are complete only now, since emitting and learning may add some."""
        self.settled_length += len(tokens)
        self.ended = bool(tokens) and tokens[-1].id in self.ends
        self.counters.tokens += len(tokens)
        self.counters.head_flops += sum(trace.flops.values())

    def drafts_end(self, drafts: list[Token]) -> bool:
        """Whether the newest draft ends the text, or fills it."""
        return bool(drafts) and (drafts[-1].id in self.ends or len(self.text) == self.length)

    def judge(self, trace: Trace, drafts: list[Token]) -> tuple[list[Token], int]:
        """The drafts that the full model keeps, with its own token after them (none, if the last draft is
        kept and ends the text), and how many it keeps. In trace.final the row of a position judges the token
        after it, so the first row, of the last verified token, judges the first draft. The first draft that
        the full model would not have chosen is replaced, the drafts after it are dropped, and the staircase
        is rolled back."""
        before = self.text[: len(self.text) - len(drafts)]
        kept, own = self.predictor.judge(trace.final, drafts, before)  # its own token: an id, or None
        for draft in drafts:
            draft.probs = None  # V numbers each, no longer needed
        settled = drafts[:kept]
        if own is not None:
            replaced = tuple(draft.id for draft in drafts[kept:])
            settled.append(Token(own, self.model.config.n_layers, rolled_back=replaced))
        self.counters.add_judgement(len(drafts), kept)
        if kept == len(drafts) and own is not None:  # `own` follows the position of the trace
            self.counters.add_miss(trace, own)
            settled[-1].explain(trace)
        first = self.cache.begun - len(trace.final)  # the position whose row judges the first draft
        self.cache.rollback(first + 1 + kept)  # keeps that position and those of the kept drafts
        self.text = before + [token.id for token in settled]
        return settled, kept


def copy_up(model: Transformer, cache: KVCache, layer: int) -> None:
    """The approximate alternative to owing, CALM's state propagation (Schuster 2022, section 3.2): every
    layer above `layer` projects keys and values from the newest position's state at `layer`, without
    attention or MLP."""
    for block in model.blocks[layer:]:
        owed = cache.hidden[:, cache.filled[block.layer] : cache.begun]
        _, k, v = block.heads(owed, cache)
        cache.extend(block.layer, k, v, block.window)


@torch.inference_mode()
def stream(
    model: Transformer, prompt: list[int], config: DecodeConfig, counters=None, amateur=None, drafting=None
) -> Iterator[Token]:
    """Yields tokens up to and including the end of the text. Batch size 1: `prompt` is one list of token ids.
    `counters` (Counters) counts the work, and may record more (decoding/replay.py); `amateur` (Transformer)
    is the second model of Contrastive Decoding; `drafting` (Drafting) remembers what earlier texts taught it.
    Raises UserError for a prompt that is empty or too long, for layers that the model does not have, and for
    an unsuitable amateur."""
    run = Run(model, prompt, config, counters or Counters(), amateur)
    if not config.verify:
        yield from plain(run)
    elif config.draft == "auto":
        from decoding.drafting import Drafting  # here, so that `import decode` stays small

        yield from verified(run, drafting or Drafting.of(model, config))
    else:
        yield from verified(run)


def generate(
    model: Transformer, prompt: list[int], config: DecodeConfig = DecodeConfig(), counters=None, **others
) -> Generation:
    """Decodes one prompt. See `stream` for the arguments and the errors."""
    counters = counters or Counters()
    return Generation.of(stream(model, prompt, config, counters, **others), counters)


def main() -> None:
    from decoding.command import Session, make_parser  # there token ids become text

    session = Session(make_parser().parse_args())
    for config, counters, show in session.runs():
        show(stream(session.model, session.prompt, config, counters, session.amateur))
    session.end()


if __name__ == "__main__":
    run_command(main)
