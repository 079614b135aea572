"""The decoding loop: stop early, pay the debt later. `python decode.py --prompt ...` shows each token by its exit
layer.

Dimensions: R rows of a pass, d model width, L layers, V vocabulary. The loop knows token ids only; text begins at
`main`.
"""

import common.threads  # noqa: F401  before torch

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from cache import KVCache
from common.errors import run as run_command
from common.files import check_replaceable
from common.flags import Parser, add_flags, add_model_flags, given, loading
from confidence import Trace, resolve
from decoding.checks import check_amateur, check_prompt
from decoding.choosing import COMMAND, settings_of, variants
from decoding.copying import copy_up
from decoding.display import difference, read_amateur, read_prompt, show
from decoding.page import Page
from decoding.prediction import Companion, Predictor
from decoding.record import Counters, Generation, Token
from decoding.replay import Recorder, recorded
from decoding.settings import DecodeConfig
from decoding.shortlist import Shortlist
from decoding.verification import verified
from formats.chat import conversation, load_chat
from model import Transformer, load_checkpoint

DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "default.pt"


def plain(run: "Run") -> Iterator[Token]:
    """The loop in its plain form, where every token is settled at once: pass, exit or go on, emit, owe."""
    tokens = run.prompt
    while run.unfinished:
        trace, layer = run.advance(tokens, run.exits())  # up to the first exit layer that is confident, or the top
        token = run.emit(trace, layer)                   # from the distribution of the layer reached
        run.owe(layer)                                   # the layers above get its keys and values later, or a copy now
        run.settle([token], trace)
        yield token
        tokens = [token.id]


def run_pass(model: Transformer, cache: KVCache, tokens: list[int], trace: Trace, exits: dict[int, float]) -> int:
    """One pass: advances the staircase by `tokens` until one of `exits` (layer -> threshold) finds the next token
    decided, and returns the layer reached, L + 1 for the top: the head over the vocabulary, whose logits are then
    trace.final. Rows that stopped below a layer in earlier passes join there, so that keys and values are those of a
    full forward pass. Without tokens, what is owed is paid."""
    first, stop = cache.filled[0], cache.filled[0] + len(tokens)
    cache.filled[0] = stop
    ids = torch.tensor(tokens, dtype=torch.int64, device=cache.hidden.device)
    x = model.embed(ids)  # (R, d), the positions first .. stop - 1
    trace.hidden.append(x)
    for layer, block in enumerate(model.blocks, 1):
        first, x = cache.join(layer, first, x)
        if first < stop:  # else, without new tokens, nothing is owed so far down
            x = block.forward(x, partial(cache.attend, layer))  # not block(...): hooks cost time at every call
        trace.hidden.append(x)
        if layer in exits and trace.decided(exits[layer]):
            cache.hidden[first:stop] = x  # here they wait, at this depth
            return layer
    top = len(model.blocks) + 1
    first, x = cache.join(top, first, x)
    if first < stop:
        trace.final = model.head(x)  # (R, V)
        trace.flops[top] = 2 * model.unembed.numel() * len(x)
    cache.filled[top] = stop
    return top


class Run:
    """What a run keeps: the staircase, the text so far, its settings made ready, and the count of the work."""

    def __init__(self, model: Transformer, prompt: list[int], config: DecodeConfig, counters: Counters,
                 trace_type: type[Trace] = Trace, amateur: Transformer | None = None):
        check_prompt(prompt, model)
        self.model, self.config, self.counters = model, config, counters
        self.top = model.config.n_layers + 1
        self.length = min(len(prompt) + config.max_new_tokens, model.config.max_len)  # of the text, at most
        self.start, self.settled, self.text = len(prompt), len(prompt), list(prompt)  # the text: drafts included
        self.ends, self.ended = model.config.ends.union(config.stop_tokens), False
        self.early = 0  # tokens emitted since a pass last reached the top
        self.thresholds = config.thresholds(model.config)
        self.owe_head = config.verify or (self.thresholds.learns and config.fill == "parallel")  # early tokens, that is
        self.cache = KVCache(model, self.length)
        self.cache.waive(len(prompt) - 1)
        companion = None
        if amateur is not None:
            check_amateur(amateur, model, config.contrasting, self.length)
            companion = Companion(amateur, self.length, run_pass, counters)
        self.predictor = Predictor(config.sampling, config.contrasting, companion, counters, model.embedding.device)
        confidence = config.confidence and resolve(config.confidence)
        pruning = (config.prune, config.prune_k, config.prune_min)
        self.shortlist = Shortlist(model, config.shortlist, self.length) if config.shortlist else None
        self.new_trace = partial(trace_type, model, confidence, *pruning, config.premature_layers, self.shortlist)
        self.prompt = list(prompt)
        if config.fill == "copy" and config.confidence and len(prompt) > 1:  # CALM: a prompt gets exact ones
            self.advance(prompt[:-1], {})
            self.prompt = prompt[-1:]

    @property
    def unfinished(self) -> bool:
        return self.settled < self.length and not self.ended

    def exits(self) -> dict[int, float]:
        """The exit layers of the next pass with their thresholds; none once max_owed early tokens wait for the top."""
        if self.config.max_owed is not None and self.early >= self.config.max_owed:
            return {}
        return self.thresholds.at(len(self.text) - self.start, self.length - self.start)

    def advance(self, tokens: list[int], exits: dict[int, float]) -> tuple[Trace, int]:
        """One pass, counted, and shown to thresholds that learn: its trace, and the layer reached."""
        if self.shortlist:
            self.shortlist.add(tokens)
        trace, before = self.new_trace(), list(self.cache.filled)
        layer = run_pass(self.model, self.cache, tokens, trace, exits)
        self.counters.add_pass(self.model, before, self.cache, layer, trace)
        self.early = 0 if layer == self.top else self.early + 1
        if self.thresholds.learns and trace.final is not None:
            self.thresholds.compare(trace)
        elif self.thresholds.learns and self.owe_head:
            self.thresholds.hold(trace, layer)
        return trace, layer

    def emit(self, trace: Trace, layer: int) -> Token:
        """The next token, from the distribution of the layer reached, added to the text."""
        token = self.predictor.token(trace, layer, self.text)
        if layer == self.top:
            self.counters.add_miss(trace, token.id)
        self.text.append(token.id)
        return token

    def owe(self, layer: int) -> None:
        """What becomes of the layers above the one reached: they are owed the newest position (parallel fill), or get a
        copy at once. A settled token owes the head nothing, unless thresholds learn from it."""
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
def stream(model: Transformer, prompt: list[int], config: DecodeConfig, counters: Counters | None = None,
           trace_type: type[Trace] = Trace, amateur: Transformer | None = None) -> Iterator[Token]:
    """Yields tokens up to and including the end of the text, adding the work to `counters`. Batch size 1: `prompt` is
    one list of token ids. `trace_type` may be a Trace that observes; `amateur` is a second model to contrast with.
    Raises UserError for a prompt that is empty or too long, for layers that the model does not have, and for an
    amateur that cannot be."""
    run = Run(model, prompt, config, counters or Counters(), trace_type, amateur)
    yield from verified(run) if config.verify else plain(run)


def generate(model: Transformer, prompt: list[int], config: DecodeConfig = DecodeConfig(),
             trace_type: type[Trace] = Trace, amateur: Transformer | None = None) -> Generation:
    """Decodes one prompt; see `stream` for what it raises."""
    counters = Counters()
    return Generation.of(stream(model, prompt, config, counters, trace_type, amateur), counters)


# ---------------------------------------------------------------- the command line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--prompt", required=True,
                        help="text; token ids, separated by commas, where the checkpoint has no tokenizer")
    parser.add_argument("--chat", action="store_true",
                        help="the prompt is a turn in a chat, by the template of the checkpoint; needs jinja2")
    parser.add_argument("--compare", metavar="NAMES",
                        help="show several settings, and where each first differs from the full model: confidence "
                             "functions or full, with changes, as in softmax,jsd+threshold=0.5,softmax+verify")
    parser.add_argument("--trace", metavar="FILE",
                        help="write one JSON line per token: id, text, exit layer, confidences, time, ..")
    parser.add_argument("--html", metavar="FILE",
                        help="write a page that shows the run beside the full model's: every token by its exit layer, "
                             "what each layer would have said, the staircase pass by pass")
    parser.add_argument("--staircase", action="store_true",
                        help="after every token print filled: 4×13 12×7 is 13 positions in layers 1 to 4, 7 in 5 to 12")
    parser.add_argument("--thresholds", metavar="FILE",
                        help="JSON file of settings, as calibration writes it; flags outrank it")
    parser.add_argument("--amateur", metavar="CHECKPOINT",
                        help="a second, weaker model to contrast with (Contrastive Decoding)")
    add_model_flags(parser, DEFAULT_CHECKPOINT)
    add_flags(parser, COMMAND, "decoding")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    options = loading(args)
    model, tokenizer = load_checkpoint(args.checkpoint, **options)
    contrast = {"predict": "contrast"} if args.amateur else {}
    config, source = settings_of(args.checkpoint, args.thresholds, contrast | given(args, DecodeConfig))
    prompt, amateur = read_prompt(args.prompt, tokenizer), read_amateur(args.amateur, tokenizer, options)
    if args.chat:
        chat = load_chat(args.checkpoint, tokenizer)
        (prompt,) = chat.encode([conversation(args.prompt)])
        config = replace(config, stop_tokens=(*config.stop_tokens, *chat.ends))
    configs = variants(config, args.compare) if args.compare else {"": config}
    check_prompt(prompt, model)
    for each in configs.values():
        each.exits(model.config)  # a mistake there leaves an old trace file alone
    if args.html:
        check_replaceable(args.html)
    full, runs = Recorder(), {}
    if args.compare or args.html:
        generate(model, prompt, replace(config.full(), max_new_tokens=4), amateur=amateur)  # warms up
        full = recorded(stream, model, prompt, config.full(), amateur)
        runs["full model"] = config.full(), full
    print(f"settings: {config.describe(model.config)} ({source})", file=sys.stderr)
    print(args.prompt)
    with open(args.trace, "w", encoding="utf-8") if args.trace else nullcontext() as trace:
        for name, each in configs.items():
            if name:
                print(f"--- {name}")
            recorder = Recorder()
            tokens = recorder.watch(stream(model, prompt, each, recorder, recorder.trace, amateur), len(prompt))
            ids = show(tokens, tokenizer, model.config.n_layers, recorder, trace, args.staircase)
            if name:
                print(f"{difference(ids, [token.id for token in full.settled], tokenizer)}\n")
            if each.confidence or each.full() != config.full():
                runs[name or each.confidence] = each, recorder
    if args.html:
        page = Page(model, tokenizer, Path(args.checkpoint).name)
        page.add(args.prompt, prompt, runs)
        page.write(args.html)
        print(f"wrote {args.html}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
