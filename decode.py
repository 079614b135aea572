"""The decoding loop: stop early, pay the debt later. `python decode.py --prompt ...` shows each token by the layer at which it exited.

Dimensions: R rows of a pass, d model width, n candidates, L layers, V vocabulary. The loop knows token ids only; text begins at `main`.
"""

import common.threads  # noqa: F401  before torch

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cache import KVCache
from common.config import read_field
from common.errors import UserError, run
from common.flags import Parser, add_flags, add_model_flags, device_and_dtype, given
from confidence import Trace, resolve
from decoding.display import difference, show
from decoding.prediction import judge, penalize, pick, scores
from decoding.record import Counters, Generation, Token
from decoding.settings import DecodeConfig, from_json, with_thresholds
from decoding.thresholds import Constant
from formats.tokenizer import encode_prompt
from model import Transformer, load_checkpoint

DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "default.pt"


def run_pass(model: Transformer, cache: KVCache, tokens: list[int], trace: Trace, exits: dict[int, float]) -> int:
    """Advances the staircase by `tokens` until one of `exits` (layer -> threshold) finds the next token decided, and returns the layer
    reached. Rows that stopped below a layer in earlier passes join there, so that keys and values are those of a full forward pass. Without
    tokens, what is owed is paid."""
    first, stop = cache.filled[0], cache.filled[0] + len(tokens)
    cache.filled[0] = stop
    x = model.embed(torch.tensor(tokens, dtype=torch.int64, device=cache.hidden.device))  # (R, d)
    trace.hidden.append(x)
    for layer, block in enumerate(model.blocks, 1):
        if cache.filled[layer] < first:
            x = torch.cat([cache.owed(layer, first), x])
            first = cache.filled[layer]
        if stop > first:  # else, without new tokens, nothing is owed so far down
            x = block.forward(x, partial(cache.attend, layer))  # not block(...): hooks cost time at every call
        trace.hidden.append(x)
        if layer in exits and trace.decided(exits[layer]):
            cache.hidden[first:stop] = x
            break
    return layer


def copy_up(model: Transformer, cache: KVCache, layer: int, counters: Counters) -> None:
    """CALM's state propagation (Schuster 2022, section 3.2): every layer above projects keys and values from the state at the exit."""
    for above, block in enumerate(model.blocks[layer:], layer + 1):
        rows = cache.owed(above, cache.filled[0])
        cache.store(above, block.project(rows))
        counters.block_flops += 2 * block.qkv.numel() * len(rows)


class Companion:
    """A second model in step with the first, the amateur of Contrastive Decoding: always at full depth, with a cache of its own."""

    def __init__(self, model: Transformer, length: int):
        self.model, self.cache = model, KVCache(model, length)

    def logits(self, text: list[int], counters: Counters) -> Tensor:
        """Its logits (V,) for the token after `text`, which begins with what it has read already."""
        trace, first = Trace(self.model), self.cache.filled[0]
        layers = run_pass(self.model, self.cache, text[first:], trace, {})
        counters.block_flops += layers * self.model.block_flops(first, len(text))
        counters.head_flops += 2 * self.model.unembed.numel()
        return self.model.head(trace.hidden[-1][-1:])[0]


@torch.inference_mode()
def stream(
    model: Transformer, prompt: list[int], config: DecodeConfig, counters: Counters | None = None, trace_type: type[Trace] = Trace,
    amateur: Transformer | None = None,
) -> Iterator[Token]:  # fmt: skip
    """Yields tokens up to and including the end of the text, adding the work to `counters`. Batch size 1: `prompt` is one list of token
    ids. `trace_type` may be a Trace that observes; `amateur` is a second model to contrast with.
    Raises ValueError for a prompt that is empty or too long, for layers that the model does not have, and for an amateur that cannot be."""
    L, counters, thresholds = model.config.n_layers, counters or Counters(), config.thresholds(model.config.n_layers)
    check_prompt(prompt, model)
    steps = min(config.max_new_tokens, model.config.max_len - len(prompt))
    cache = KVCache(model, len(prompt) + steps)
    companion = amateur and Companion(check_amateur(amateur, model, config, len(prompt) + steps), len(prompt) + steps)
    generator = torch.Generator(cache.hidden.device).manual_seed(config.seed)
    confidence = config.confidence and resolve(config.confidence)
    new_trace = partial(trace_type, model, confidence, config.prune, config.prune_k, config.prune_min, config.premature_layers)
    ends = {*model.config.ends, *config.stop_tokens}
    text, tokens = list(prompt), list(prompt)  # all so far, drafts included; those that the next pass begins with
    if config.fill == "copy" and config.confidence and len(prompt) > 1:  # a prompt has its exact keys and values, as in CALM
        run_pass(model, cache, tokens[:-1], new_trace(), {})
        counters.add_blocks(model, [0] * (L + 1), len(prompt) - 1, L)
        tokens = tokens[-1:]

    generated, drafts, guesses = 0, [], []  # since the last deep pass: tokens to be verified; what exits said, for thresholds that learn
    while generated < steps:
        step, ended = generated + len(drafts), bool(drafts) and drafts[-1].id in ends
        tokens = [] if ended or step == steps else tokens  # nothing more to draft: pay what is owed and judge
        full = not tokens or (config.max_owed is not None and cache.filled[0] - cache.filled[L] >= config.max_owed)
        trace, before = new_trace(), list(cache.filled)
        layer = run_pass(model, cache, tokens, trace, {} if full else thresholds.at(step, steps))
        counters.add_blocks(model, before, cache.filled[0], layer)
        asked, other = dict(trace.flops), companion and companion.logits(text, counters)
        if layer < L:
            z = penalize(scores(trace, layer, config, other), text, config.repetition_penalty, trace.candidates)  # (n,)
            choice, probs = pick(z, config, generator)
            token = Token(trace.token(choice), layer, trace.confidences, trace.thresholds, trace.amateurs, trace.spread(probs))
            settled, drafts = ([], [*drafts, token]) if config.verify else ([token], [])
            text.append(token.id)
            if thresholds.learns and config.fill == "parallel":
                guesses.append((trace.confidences.get(layer), trace.guess(layer)))
            if config.fill == "copy":
                copy_up(model, cache, layer, counters)
            heads = sum(trace.flops.values())
        else:
            logits = model.head(trace.hidden[L][-(max(len(drafts), len(guesses)) + bool(tokens)) :])  # (R, V)
            whole = trace.whole(L, logits[-1])
            final = logits[-(len(drafts) + bool(tokens)) :] if config.predict == "own" else scores(whole, L, config, other)[None]
            kept, choice = judge(final, drafts, text[: len(text) - len(drafts)], config, generator)
            settled = drafts[:kept]
            if choice is not None:  # each row judges the draft after it; the newest gives one more token
                why = (trace.confidences, trace.thresholds, trace.amateurs | whole.amateurs) if kept == len(drafts) else ({}, {}, {})
                settled.append(Token(choice, L, *why, rolled_back=tuple(draft.id for draft in drafts[kept:])))
            if thresholds.learns:
                teach(thresholds, guesses, trace, logits.argmax(-1).tolist())
            heads = sum(trace.flops.values()) + sum(whole.flops.values()) + 2 * model.unembed.numel() * len(logits)
            counters.add_judgement(trace, len(drafts), kept, choice)
            cache.rollback(cache.filled[0] - len(final) + kept + 1)
            text[len(text) - len(drafts) :] = [token.id for token in settled]
            drafts, guesses = [], []
        counters.add_heads(asked, layer, heads)
        for token in settled:
            generated, counters.tokens = generated + 1, counters.tokens + 1
            yield token
            if token.id in ends:
                return
        tokens = [token.id]  # the newest, settled or a draft


def teach(thresholds: Constant, guesses: list[tuple[float | None, int]], trace: Trace, truth: list[int]) -> None:
    """Tells thresholds that learn what a deep pass found out: of the early tokens since the last one, and of every layer asked in it,
    the confidence and whether the exit head's token was the full model's (`truth`, one for each row, the newest position last)."""
    for (confidence, guess), token in zip(guesses, truth):
        if confidence is not None:
            thresholds.learn(confidence, guess == token)
    for layer, confidence in trace.confidences.items():
        thresholds.learn(confidence, trace.guess(layer) == truth[-1])
    thresholds.update()


def check_amateur(amateur: Transformer, model: Transformer, config: DecodeConfig, length: int) -> Transformer:
    """The amateur. Raises ValueError unless it can read and contrast what the model writes."""
    if config.predict != "contrast":
        raise UserError(f"there is an amateur, but predict is {config.predict}; set it to contrast")
    if amateur.config.vocab_size != model.config.vocab_size:
        raise UserError(f"the amateur knows {amateur.config.vocab_size} tokens, the model {model.config.vocab_size}; that must be equal")
    if amateur.config.max_len < length:
        raise UserError(f"the amateur has {amateur.config.max_len} positions, {length} are needed; shorten the prompt or the answer")
    return amateur


def check_prompt(prompt: list[int], model: Transformer) -> None:
    """Raises ValueError unless `prompt` is one non-empty list of token ids with room for an answer."""
    if len(prompt) == 0 or not all(isinstance(token, int) for token in prompt):
        raise UserError("the prompt must be one non-empty list of token ids (batch size 1)")
    if len(prompt) >= model.config.max_len:
        raise UserError(f"the prompt has {len(prompt)} tokens, this model {model.config.max_len} positions; shorten the prompt")
    if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
        raise UserError(f"a token id of the prompt lies outside 0 to {model.config.vocab_size - 1}")


def generate(
    model: Transformer, prompt: list[int], config: DecodeConfig = DecodeConfig(), trace_type: type[Trace] = Trace,
    amateur: Transformer | None = None,
) -> Generation:  # fmt: skip
    """Decodes one prompt; see `stream` for what it raises."""
    counters = Counters()
    return Generation.of(stream(model, prompt, config, counters, trace_type, amateur), counters)


# ---------------------------------------------------------------- the command line


def read_prompt(text: str, tokenizer) -> list[int]:
    """Token ids of a prompt. A checkpoint without a tokenizer takes ids, separated by commas."""
    if tokenizer is not None:
        if not text.strip():
            raise UserError("the prompt is empty; give some text")
        return encode_prompt(tokenizer, text)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError("this checkpoint has no tokenizer: give the prompt as token ids, separated by commas") from None


DEMO = DecodeConfig(confidence="softmax", threshold=0.6, prune="fixed", max_new_tokens=100)  # what the command does


def demo_exits(n_layers: int) -> tuple[int, ...]:
    """Exits after a third, a half and two thirds of the layers, where the model is deep enough."""
    return tuple(sorted({max(1, round(n_layers * share)) for share in (1 / 3, 1 / 2, 2 / 3)} - {n_layers}))


def chosen(args: argparse.Namespace, n_layers: int) -> DecodeConfig:
    """What the command does by itself, changed by `decode` in the settings beside the checkpoint, by --thresholds, and by the flags."""
    contrast = {"predict": "contrast"} if args.amateur else {}
    base = replace(DEMO, exit_layers=demo_exits(n_layers))
    return replace(base, **{**beside(args.checkpoint), **contrast, **with_thresholds(args.thresholds, given(args, DecodeConfig))})


def beside(checkpoint: str) -> dict:
    """Fields of DecodeConfig that the settings beside a checkpoint name for `decode`. Raises ValueError for unusable ones."""
    path = Path(checkpoint).with_suffix(".json")
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")).get("decode", {})) if path.is_file() else {}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not usable as settings of decode ({error})") from None


def variant(config: DecodeConfig, name: str) -> DecodeConfig:
    """`config` changed as --compare names it: a confidence function or full, then +field or +field=value: softmax+verify+prune-k=32."""
    first, *changes = name.split("+")
    values = {"confidence": None if first == "full" else first}
    for change in changes:
        key, _, value = change.partition("=")
        values[key.replace("-", "_")] = read_field(DecodeConfig, key, value)
    return replace(config, **values)


def read_amateur(path: str | None, tokenizer, device: str, dtype: torch.dtype | None) -> Transformer | None:
    """The second model of --amateur. Raises ValueError if its tokenizer is another."""
    if path is None:
        return None
    amateur, other = load_checkpoint(path, device, dtype)
    if tokenizer and (not other or other.serialized_model_proto() != tokenizer.serialized_model_proto()):
        raise UserError(f"{path}: has another tokenizer than the model; an amateur must read the same tokens")
    return amateur


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--prompt", required=True, help="text; token ids, separated by commas, where the checkpoint has no tokenizer")
    parser.add_argument("--trace", metavar="FILE", help="write one JSON line per token: id, text, exit layer, confidences, time, ..")
    parser.add_argument("--compare", metavar="NAMES", help="show several settings, and where each first differs from the full model: "
                        "confidence functions or full, each with changes, as in softmax,jsd+threshold=0.5,softmax+verify")  # fmt: skip
    parser.add_argument("--thresholds", metavar="FILE", help="JSON file of settings, as calibration writes it; flags outrank it")
    parser.add_argument("--amateur", metavar="CHECKPOINT", help="a second, weaker model to contrast with (Contrastive Decoding)")
    add_model_flags(parser, DEFAULT_CHECKPOINT)
    add_flags(parser, DEMO, "decoding")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    place = device_and_dtype(args)
    model, tokenizer = load_checkpoint(args.checkpoint, *place, check=args.check)
    L = model.config.n_layers
    config = chosen(args, L)
    amateur, prompt = read_amateur(args.amateur, tokenizer, *place), read_prompt(args.prompt, tokenizer)
    configs = {name: variant(config, name) for name in args.compare.split(",")} if args.compare else {"": config}
    check_prompt(prompt, model)
    for each in configs.values():
        each.exits(L)  # a mistake there leaves an old trace file alone
    full = generate(model, prompt, config.full(), amateur=amateur).tokens if args.compare else []
    if tokenizer is None:
        print("this checkpoint has no tokenizer: token ids in, token ids out", file=sys.stderr)
    with open(args.trace, "w", encoding="utf-8") if args.trace else nullcontext() as trace:
        for name, each in configs.items():
            if name:
                print(f"--- {name}")
            counters = Counters()
            ids = show(stream(model, prompt, each, counters, amateur=amateur), tokenizer, L, counters, trace)
            if name:
                print(f"{difference(ids, full, tokenizer)}\n")


if __name__ == "__main__":
    run(main)
