"""Verified decoding: early exit that cannot change the output (speculative decoding of a model by its own
lower layers).

An early token is a *draft*: the next pass goes on from it, but it is not shown. When a pass reaches the top,
its head sees the rows of all drafts at once: the row of a position judges the token after it, so the first
row, of the last verified token, judges the first draft. Drafts that the full model would have put there are
kept; the first that it would not is replaced, and what followed is forgotten: the staircase rolls back. So
the text is the full model's own.

It is faster although every row runs every block in the end, wrong drafts in vain, so that more FLOPs are
spent than without exits: at batch 1 the time goes into reading weights, and eight rows read them once.

`run` is a decode.Run, `trace` the confidence.Trace of its last pass.
"""

from collections.abc import Iterator

from decoding.costs import costs_of
from decoding.drafting import Drafting
from decoding.record import Token


def verified(run, drafting: Drafting | None = None) -> Iterator[Token]:
    """Yields the tokens of a run once they are verified. `drafting`: what earlier texts taught, where `draft`
    is auto; None: this text begins anew."""
    if run.config.draft != "auto":
        drafting = None
    elif drafting is None:
        drafting = Drafting(costs_of(run.model, run.config, type(run)))
    tokens, drafts, passes = run.unread, [], []
    while run.unfinished:
        if drafting_is_over(run, drafts):  # a pass without a new token: it takes the drafts' rows to the top
            trace, layer = run.advance([], exits={})
        else:
            exits = drafting.exits(len(drafts)) if drafting else run.exits()
            trace, layer = run.advance(tokens, exits)
        passes.append(trace)
        if layer < run.top:
            drafts.append(run.emit(trace, layer))
            run.settle([], trace)  # and no run.owe: a draft goes on owing the head its row
            tokens = [drafts[-1].id]
        else:
            settled, kept = judged(run, trace, drafts)
            if drafting:
                drafting.learn(run, passes, drafts, settled, kept)
            run.settle(settled, trace)
            yield from settled
            tokens, drafts, passes = [settled[-1].id], [], []  # the last one has not been read yet


def drafting_is_over(run, drafts: list[Token]) -> bool:
    """Whether the newest draft ends the text, or fills it."""
    return bool(drafts) and (drafts[-1].id in run.ends or len(run.text) == run.length)


def judged(run, trace, drafts: list[Token]) -> tuple[list[Token], int]:
    """The drafts that the full model keeps, with its own token after them, and how many it keeps; both the
    text and the staircase follow."""
    before = run.text[: len(run.text) - len(drafts)]
    kept, token = run.predictor.judge(trace.final, drafts, before)
    for draft in drafts:
        draft.probs = None  # V numbers each, of no more use
    settled = drafts[:kept]
    if token is not None:
        settled.append(Token(token, run.top - 1, rolled_back=tuple(draft.id for draft in drafts[kept:])))
    run.counters.add_judgement(len(drafts), kept)
    if kept == len(drafts) and token is not None:  # that of the newest row, which the trace is about
        run.counters.add_miss(trace, token)
        settled[-1].explain(trace)
    first = run.cache.filled[0] - len(trace.final)  # the position whose row judges the first draft
    run.cache.rollback(first + 1 + kept)  # that one stays, and those of the kept drafts
    run.text = before + [token.id for token in settled]
    return settled, kept
