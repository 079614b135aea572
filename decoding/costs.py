"""What passes cost on this machine, for adaptive drafting: measured once in a process for each model and
configuration, and kept in memory."""

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from time import perf_counter

import torch

from cache import KVCache
from confidence import resolve
from decoding.prediction import Predictor, pick
from decoding.record import Counters
from decoding.settings import DecodeConfig
from decoding.shortlist import Shortlist
from decoding.trace import Trace
from model import Transformer

ROWS = (1, 2, 4, 8, 16)  # of the passes that are measured
PROMPT = 32  # tokens before them
TURNS, AT_LEAST = 9, 3.0  # the fewest turns and seconds of a measurement, whose median is used

_MEASURED = weakref.WeakKeyDictionary()  # model -> (settings, threads) -> its costs


@dataclass(frozen=True)
class Costs:
    """Seconds, by rows of a pass or by exit layer."""

    layers: int  # of the model
    block: dict[int, float]  # rows -> one block
    top: dict[int, float]  # rows -> the LM head, and a token from each row
    check: dict[int, float]  # exit layer -> its confidence check, and a draft


def costs_of(model: Transformer, config: DecodeConfig) -> Costs:
    """Returns the costs of a model under these settings. If they have not been measured in this process,
    measures them, and says so on stderr."""
    known = _MEASURED.setdefault(model, {})
    key = replace(config, seed=0, stop_tokens=(), max_new_tokens=1), torch.get_num_threads()
    if key not in known:
        started = perf_counter()
        known[key] = measure_costs(model, config)
        print(f"measured the cost of passes here in {perf_counter() - started:.0f} s", file=sys.stderr)
    return known[key]


@torch.inference_mode()
def measure_costs(model: Transformer, config: DecodeConfig) -> Costs:
    """Times passes of 1 to 16 rows to the top, the LM head alone, and the confidence check of every exit, in
    turns, so that a change in the machine's speed affects all alike."""
    positions, L = model.config.max_len, model.config.n_layers
    rows, layers = [count for count in ROWS if count < positions], list(config.exits(model.config))
    config = replace(config, confidence=resolve(config.confidence))
    length = min(PROMPT, positions - rows[-1])
    prompt = torch.full((1, length + rows[-1]), model.config.vocab_size // 2, device=model.device)
    cache = KVCache(model, length + rows[-1])
    predictor = Predictor(config, None, Counters(), model.device)
    shortlist = Shortlist(model, config.shortlist, length) if config.shortlist else None

    def climb(count: int, layer: int) -> list[torch.Tensor]:
        """h_0 .. h_layer of `count` new positions, whose keys and values are forgotten afterwards."""
        states = [model.embed(prompt[:, :count])]
        cache.begin(states[0])
        for block in model.blocks[:layer]:
            states.append(cache.climb(block))
        cache.rollback(length)
        return states

    def pick_tokens(state: torch.Tensor) -> None:
        for row in model.head(state[0]):
            pick(row, config, predictor.generator)  # which also waits for a GPU

    def deep(count: int) -> float:
        started = perf_counter()
        pick_tokens(climb(count, L)[-1])
        return perf_counter() - started

    def top(count: int) -> float:
        started = perf_counter()
        pick_tokens(newest.repeat(1, count, 1))
        return perf_counter() - started

    def check(layer: int) -> float:
        """Times one check and its draft, after the blocks below, which leave little of the head in the CPU's
        cache."""
        states = climb(1, layer)
        if model.device.type == "cuda":
            torch.cuda.synchronize()  # the blocks are not part of the check
        started = perf_counter()
        predictor.token(Trace(model, config, shortlist).checked_at(states), layer, [])
        return perf_counter() - started

    newest = climb(length, L)[-1][:, -1:]  # fills the cache
    actions = [*product((deep, top), rows), *product((check,), layers)]
    spent = medians(actions)
    tops = {count: spent[top, count] for count in rows}
    blocks = {count: max(1e-9, spent[deep, count] - tops[count]) / L for count in rows}
    return Costs(L, blocks, tops, {layer: spent[check, layer] for layer in layers})


def medians(actions: list[tuple[Callable[[int], float], int]]) -> dict[tuple, float]:
    """The median of the seconds that each action (a function and its argument) returns, over all turns but
    the first, which is a warm-up."""
    times = {action: [] for action in actions}
    begun, turns = perf_counter(), 0
    while turns <= TURNS or perf_counter() - begun < AT_LEAST:
        turns += 1
        for function, argument in actions:
            times[function, argument].append(function(argument))
    return {action: median(values[1:]) for action, values in times.items()}
