"""Verified decoding: early exit that cannot change the output (speculative decoding of a model by its own lower
layers).

An early token is a *draft*: the next pass goes on from it, but it is not shown. When a pass reaches the top, its head
sees the rows of all drafts at once, and row i judges the token placed at i + 1. Kept is what the full model would
have put there; the first that it would not is replaced, and what followed is forgotten: the staircase rolls back. So
the text is the full model's own. It is faster although every row runs every block in the end, and more FLOPs are
spent than without exits: at batch 1 the time goes into reading weights, and eight rows read them once.
"""

from collections.abc import Iterator

from decoding.record import Token


def verified(run) -> Iterator[Token]:
    """Yields the tokens of a run (decode.Run) once they are verified."""
    tokens, drafts = run.prompt, []
    while run.unfinished:
        over = bool(drafts) and (drafts[-1].id in run.ends or len(run.text) == run.length)
        if over:  # nothing more to draft: the pass pays what is owed, without a new token, and judges
            trace, layer = run.advance([], exits={})
        else:
            trace, layer = run.advance(tokens, run.exits())
        if layer < run.top:
            draft = run.emit(trace, layer)
            run.settle([], trace)
            drafts.append(draft)
            tokens = [draft.id]
        else:
            settled = judged(run, trace, drafts)
            run.settle(settled, trace)
            yield from settled
            tokens, drafts = [settled[-1].id], []


def judged(run, trace, drafts: list[Token]) -> list[Token]:
    """The drafts that the full model keeps, and its own token after them; both the text and the staircase follow."""
    before = run.text[: len(run.text) - len(drafts)]
    kept, token = run.predictor.judge(trace.final, drafts, before)
    settled = drafts[:kept]
    if token is not None:
        replaced = tuple(draft.id for draft in drafts[kept:])
        asked = (trace.confidences, trace.thresholds, trace.amateurs) if kept == len(drafts) else ({}, {}, {})
        settled.append(Token(token, run.top - 1, *asked, rolled_back=replaced))
    run.counters.add_judgement(len(drafts), kept)
    if kept == len(drafts):
        run.counters.add_miss(trace, token)
    judging = run.cache.filled[0] - len(trace.final)  # the position of the first row that judges
    run.cache.rollback(judging + kept + 1)
    run.text = before + [token.id for token in settled]
    return settled
