"""Checks on this machine that exits do not change a single bit: keys, values and logits of passes that stop
at random layers equal those of one position at a time through all layers. Prints a line for every form of
weights.

    python -m tools.exact --checkpoint model.pt
"""

import common.threads  # noqa: F401  sets variables that torch reads

import random

import torch
from torch import Tensor

from cache import KVCache
from common.config import check_range
from common.errors import run
from common.flags import Parser, add_thread_flag, use_threads
from decode import load_checkpoint, run_pass
from decoding.presets import DEFAULT_CHECKPOINT
from decoding.settings import DecodeConfig
from decoding.trace import Trace
from decoding.weights import packs
from model import Transformer

PROMPTS, LENGTH = (1, 300), 60  # tokens: the shortest and the longest prompt, and what follows
Seen = tuple[Tensor, Tensor, Tensor]  # keys, values (L, 1, K, T, C) and logits (T', V) of a text


@torch.inference_mode()
def passes(model: Transformer, tokens: list[int], prompt: int, stops: list[int], drafts: list[int]) -> Seen:
    """Reads a text: its first `prompt` tokens in one pass, the others one by one. Pass i stops at layer
    stops[i] (L + 1: the LM head). After it, drafts[i] wrong tokens are read, up to layer 1, and rolled
    back."""
    L, cache, logits = model.config.n_layers, KVCache(model, len(tokens) + max(drafts)), []
    cache.head_filled = prompt - 1

    def read(part: list[int], stop: int) -> None:
        trace = Trace(model, DecodeConfig())
        run_pass(model, cache, part, trace, {stop: 0.0} if stop <= L else {})
        if trace.final is not None:
            logits.append(trace.final)

    for i, (stop, wrong) in enumerate(zip(stops, drafts)):
        read(tokens[:prompt] if i == 0 else tokens[prompt + i - 1 : prompt + i], stop)
        begun = cache.begun
        for _ in range(wrong):
            read([0], 1)
        cache.rollback(begun)
    read([], L + 1)
    keys, values = (torch.stack(kind[1:])[..., : len(tokens), :] for kind in (cache.keys, cache.values))
    return keys, values, torch.cat(logits)


def differences(
    model: Transformer, runs: int, prompts: tuple[int, int] = PROMPTS, length: int = LENGTH
) -> list[float]:
    """For each of some random texts with random exits, the largest difference of a key, value or logit from
    one position at a time; 0 if all are equal to the bit."""
    L, draw, found = model.config.n_layers, random.Random(0), []
    for _ in range(runs):
        prompt = min(draw.randint(*prompts), model.config.max_len - length)
        tokens = [draw.randrange(model.config.vocab_size) for _ in range(prompt + length - 8)]
        count = length - 7  # passes
        deep = draw.random() ** 2  # how often a pass goes to the top
        stops = [L + 1 if draw.random() < deep else draw.randint(1, L) for _ in range(count)]
        drafts = [draw.choice((0, 0, 0, 1, 5)) for _ in range(count)]
        expected = passes(model, tokens, prompt, [L + 1] * count, [0] * count)
        pairs = zip(passes(model, tokens, prompt, stops, drafts), expected)
        found.append(max(0.0 if torch.equal(a, b) else float((a - b).abs().max()) or 1e-45 for a, b in pairs))
    return found


def make_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m tools.exact")
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="the model (default: %(default)s)")
    parser.add_argument(
        "--runs", type=int, default=10, help="random texts for each form (default: %(default)s)"
    )
    add_thread_flag(parser)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    check_range("runs", args.runs, least=1)
    use_threads(args.threads)
    forms = {"packed float32": (torch.float32, "packed"), "packed bfloat16": (torch.bfloat16, "packed")}
    forms |= {"int8": (torch.int8, None), "plain float32": (torch.float32, "plain")}
    for name, (dtype, form) in forms.items():
        if form == "packed" and not packs(dtype):
            print(f"{name:16} cannot be multiplied on this CPU")
            continue
        model, _ = load_checkpoint(args.checkpoint, dtype=dtype, form=form)
        found = differences(model, args.runs)
        differ = sum(difference > 0 for difference in found)
        verdict = (
            f"differ in {differ} (largest difference {max(found):.1g})" if differ else "are equal to the bit"
        )
        print(f"{name:16} keys, values and logits of {args.runs} runs {verdict}")


if __name__ == "__main__":
    run(main)
