"""Where the time of decoding goes: against a plain loop, by rows of a pass, by kind of question; its memory;
what copy fill gets wrong.

    python -m tools.bench
    python -m tools.bench --split               where the missing efficiency goes (tools/bench_split.py)
    python -m tools.bench --large-vocabulary    only questions, to a random model with V = 262,144, as Gemma 3 270M
    python -m tools.bench --training            tokens a second of every training loss (tools/bench_training.py)

Dimensions: T positions of a pass, d model width, H query heads, K key/value heads, C width of a head, L
layers.
"""

import common.threads  # noqa: F401  before torch

import argparse
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from cache import KVCache
from common.config import check_range
from common.errors import run
from common.flags import Parser, add_model_flags, loading, read_dtype
from confidence import FUNCTIONS, Trace
from decode import generate, run_pass
from decoding.choosing import DEFAULT_CHECKPOINT
from decoding.copying import copy_up
from decoding.record import Counters
from decoding.settings import DecodeConfig
from decoding.shortlist import Shortlist
from evaluation.measure import peak_resident
from formats.data import read_examples, task_file
from formats.tokenizer import encode_prompt
from formats.weights import store
from model import ModelConfig, Transformer, load_checkpoint
from tools.bench_split import print_split
from tools.bench_training import print_training
from tools.timing import seconds
from training.settings import TrainConfig

PROMPT, ANSWER = 32, 64  # tokens
PASSES = 20  # of the embedded model in one measurement: one is too short for the clock
ASKED = ("softmax", "weighted", "jsd")
LARGE = {
    "vocab_size": 262_144,
    "n_layers": 18,
    "d_model": 640,
    "n_heads": 4,
    "n_kv_heads": 1,
    "head_dim": 256,
    "d_ff": 2048,
    "eos_id": None,
}
SHORTLIST = 8192  # ids, of the large vocabulary


# ---------------------------------------------------------------- decoding as one writes it first


@torch.inference_mode()
def plain_loop(model: Transformer, prompt: list[int], steps: int) -> list[int]:
    """Greedy decoding with F.linear everywhere, norms and rotation by their formulas, caches grown by
    torch.cat."""
    tokens, out, cache = torch.tensor([prompt], device=model.embedding.device), [], {}
    for _ in range(steps):
        x = F.embedding(tokens, model.embedding)  # (1, T, d)
        for layer, block in enumerate(model.blocks):
            x = plain_block(model.config, block, x, cache, layer)
        logits = F.linear(plain_norm(x[0, -1], model.norm, model.config.norm_eps), model.unembed)
        out.append(int(logits.argmax()))
        tokens = torch.tensor([[out[-1]]], device=tokens.device)
    return out


def plain_block(
    config: ModelConfig, block, x: Tensor, cache: dict[int, tuple[Tensor, Tensor]], layer: int
) -> Tensor:
    """One layer, x (1, T, d) -> (1, T, d); cache[layer] holds its keys and values, (1, K, S, C) each."""
    H, K, C, T = config.n_heads, config.n_kv_heads, config.head_dim, x.shape[1]
    start = cache[layer][0].shape[2] if layer in cache else 0
    qkv = F.linear(plain_norm(x, block.attn_norm, config.norm_eps), block.qkv)
    parts = qkv.split((H * C, K * C, K * C), -1)
    q, k, v = (part.view(1, T, -1, C).transpose(1, 2) for part in parts)
    q, k = plain_rotation(q, start, config.rope_base), plain_rotation(k, start, config.rope_base)
    if start:
        keys, values = cache[layer]
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    cache[layer] = k, v
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=H != K)
    x = x + F.linear(attended.transpose(1, 2).reshape(1, T, -1), block.out)
    gate, up = F.linear(plain_norm(x, block.mlp_norm, config.norm_eps), block.gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, block.down)


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def plain_rotation(x: Tensor, start: int, base: float) -> Tensor:
    """Queries or keys (1, H, T, C) of the positions from `start` on, rotated."""
    C, T = x.shape[-1], x.shape[2]
    frequency = base ** (-torch.arange(0, C, 2, device=x.device) / C)
    angle = torch.arange(start, start + T, device=x.device)[:, None] * frequency
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)


def print_loops(args: argparse.Namespace, model: Transformer) -> None:
    """Full depth, beside the plain loop on the same weights, or where those are int8 on float32 ones."""
    options = loading(args) | {"form": "plain"}
    if model.form == "int8":
        options["dtype"] = torch.float32
    plain, _ = load_checkpoint(args.checkpoint, **options)
    prompt, config = [5] * PROMPT, DecodeConfig(max_new_tokens=ANSWER)
    loops = {
        "plain": lambda: plain_loop(plain, prompt, ANSWER),
        "full": lambda: generate(model, prompt, config),
    }
    spent = seconds(loops, args.device, args.repeat)
    same = plain_loop(plain, prompt, ANSWER) == generate(model, prompt, config).tokens
    print(
        f"full depth, {ANSWER} tokens after {PROMPT}: plain loop {ANSWER / spent['plain']:.0f} tokens/s, this "
        f"project {ANSWER / spent['full']:.0f}, {spent['plain'] / spent['full']:.2f} times as fast, "
        f"{'the same' if same else 'not the same'} tokens"
    )


# ---------------------------------------------------------------- rows of a pass


@torch.inference_mode()
def advance(model: Transformer, cache: KVCache, rows: int, passes: int) -> None:
    """`passes` passes to the top, of `rows` positions each, after the prompt."""
    for _ in range(passes):
        cache.rollback(PROMPT)
        run_pass(model, cache, [5] * rows, Trace(model), {})


@torch.inference_mode()
def filled_cache(model: Transformer, rows: int) -> KVCache:
    """The staircase after a prompt, with room for `rows` positions."""
    cache = KVCache(model, PROMPT + rows)
    run_pass(model, cache, [5] * PROMPT, Trace(model), {})
    return cache


def print_rows(model: Transformer, device: str, repeat: int) -> None:
    """The time of a block by rows of a pass."""
    cache, counts = filled_cache(model, 16), (1, 2, 4, 8, 16)
    spent = seconds(
        {count: partial(advance, model, cache, count, PASSES) for count in counts}, device, repeat
    )
    for count, value in spent.items():
        block = 1e6 * value / PASSES / model.config.n_layers
        print(f"a pass of {count:>2} rows: {block:.0f} µs a block")


# ---------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """What a token is asked that exits nowhere."""

    confidence: str
    layers: tuple[int, ...]  # after which it is asked
    prune: str
    shortlist: int | None  # frequent ids to ask over; None: the whole vocabulary


@torch.inference_mode()
def ask(
    model: Transformer, states: list[Tensor], question: Question, k: int, short: Shortlist | None, passes: int
) -> None:
    """The questions of `passes` tokens alone, without the blocks: states holds h_0 .. h_L, (1, d) each."""
    for _ in range(passes):
        trace = Trace(model, FUNCTIONS[question.confidence], question.prune, k, shortlist=short)
        for layer in question.layers:
            trace.hidden = states[: layer + 1]
            trace.decided(math.inf)


@torch.inference_mode()
def head(model: Transformer, states: list[Tensor], passes: int) -> None:
    """The final head of `passes` tokens."""
    for _ in range(passes):
        model.head(states[-1])


def time_questions(
    model: Transformer, device: str, questions: list[Question], k: int, repeat: int, passes: int
) -> dict[Question | str, float]:
    """Microseconds a token of every question, of a pass to the top ("token"), and of the final head in it
    ("head")."""
    prompt, cache = [5] * PROMPT, filled_cache(model, 1)
    with torch.inference_mode():
        states = [state[-1:] for state in model.hidden_states(torch.tensor([prompt], device=device))]
    actions = {
        "token": partial(advance, model, cache, 1, passes),
        "head": partial(head, model, states, passes),
    }
    for question in questions:
        short = None
        if question.shortlist:
            short = Shortlist(model, question.shortlist, PROMPT)
            short.add(prompt)
        actions[question] = partial(ask, model, states, question, k, short, passes)
    return {name: 1e6 * value / passes for name, value in seconds(actions, device, repeat).items()}


def print_questions(
    model: Transformer,
    device: str,
    layers: list[tuple[int, ...]],
    k: int,
    repeat: int,
    passes: int,
    shortlist: int | None = None,
) -> None:
    """A table of what questions after these layers cost, all in vain: over the vocabulary, and over a
    shortlist if there is one; without pruning, and with `fixed` to k candidates."""
    lists = [None, shortlist] if shortlist else [None]
    questions = [Question(*values) for values in product(ASKED, layers, ("none", "fixed"), lists)]
    spent = time_questions(model, device, questions, k, repeat, passes)
    token = spent["token"]
    print(f"a token at full depth: {token:.0f} µs, of which the final head {spent['head']:.0f}")
    for exits in layers:
        print(
            f"questions after layers {','.join(map(str, exits))}, all in vain: µs, and as a share of such a token"
        )
        print(f"  {'':30} {'not pruned':>18} {f'fixed, k = {k}':>18}")
        for name, size in product(ASKED, lists):
            asked = (
                f"{name}: a shortlist of {size:,}" if size else f"{name}: all {model.config.vocab_size:,} ids"
            )
            pair = [spent[Question(name, exits, prune, size)] for prune in ("none", "fixed")]
            cells = [f"{value:.0f} ({value / token:.1%})" for value in pair]
            print(f"  {asked:30} {cells[0]:>18} {cells[1]:>18}")


def random_model(args: argparse.Namespace) -> Transformer:
    """Random weights in the shape of Gemma 3 270M, whose vocabulary is large; the ids counted are random,
    too."""
    options = loading(args)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**LARGE)).requires_grad_(False)
    model.frequent_ids = torch.randperm(model.config.vocab_size)
    small = options["dtype"] == torch.int8
    model.to(options["device"], torch.float32 if small else options["dtype"] or torch.float32)
    if options["device"] == "cpu":
        store(model, "int8" if small else options["form"])
    return model


def print_large(args: argparse.Namespace) -> None:
    """What questions cost where the head costs more than the blocks: one, three, and one after every
    layer."""
    model = random_model(args)
    print_weights(model)
    L, size = model.config.n_layers, min(SHORTLIST, model.config.vocab_size)
    print_questions(model, args.device, [(L // 2,), thirds(L), tuple(range(2, L))], 512, args.repeat, 1, size)


# ---------------------------------------------------------------- memory, and copied keys and values


@torch.inference_mode()
def copy_error(
    model: Transformer, prompts: list[list[int]], config: DecodeConfig
) -> dict[int, tuple[float, float]]:
    """Layer -> relative distances |K' - K| / |K| of the keys, and likewise of the values, that copy fill gave
    to the positions that stopped below it, from those of a full pass over the same text."""
    sums = defaultdict(lambda: torch.zeros(2, 2, dtype=torch.float64))  # keys, values; |K' - K|^2, |K|^2
    for prompt in prompts:
        out = generate(model, prompt, config)
        text, last = prompt + out.tokens[:-1], len(prompt) - 1
        exact, copied = KVCache(model, len(text)), KVCache(model, len(text))
        run_pass(model, exact, text, Trace(model), {})
        run_pass(model, copied, prompt[:-1], Trace(model), {})  # nothing, for a prompt of one token
        for token, layer in zip(text[last:], out.exit_layers):
            run_pass(model, copied, [token], Trace(model), {layer: 0.0})
            copy_up(model, copied, layer, Counters())
        for layer in range(1, model.config.n_layers + 1):
            rows = [position for position, reached in enumerate(out.exit_layers, last) if reached < layer]
            pairs = zip(exact.keys_values[layer - 1].chunk(2, 1), copied.keys_values[layer - 1].chunk(2, 1))
            for kind, (right, wrong) in enumerate(pairs):  # keys, values
                sums[layer][kind] += squares(right, wrong, rows)
    errors = {}
    for layer, each in sums.items():
        distance, size = each.unbind(1)
        if size.min() > 0:
            keys, values = (distance / size).sqrt().tolist()
            errors[layer] = keys, values
    return errors


def squares(exact: Tensor, copied: Tensor, rows: list[int]) -> Tensor:
    """|copied - exact|^2 and |exact|^2 over some positions of (1, K, S, C): (2,)."""
    exact, copied = exact[:, :, rows].double(), copied[:, :, rows].double()
    return torch.stack([(copied - exact).square().sum(), exact.square().sum()]).cpu()


def print_copy_error(model: Transformer, tokenizer) -> None:
    """How far copied keys and values are off on test inputs of both tasks."""
    layers = thirds(model.config.n_layers)
    config = DecodeConfig(confidence="softmax", threshold=0.6, exit_layers=layers, prune="fixed", fill="copy")
    prompts = []
    for task in ("translation", "e2e"):
        for example in read_examples(task_file(task, "test"))[::100]:
            prompts.append(encode_prompt(tokenizer, example.prompt))
    errors = copy_error(model, prompts, config)
    listed = "  ".join(f"{layer}: {keys:.2f} ({values:.2f})" for layer, (keys, values) in errors.items())
    print(
        f"copy fill on {len(prompts)} test inputs, relative distance of its keys (values) from the exact ones, by "
        f"layer: {listed}"
    )


# ---------------------------------------------------------------- the command line


def thirds(n_layers: int) -> tuple[int, ...]:
    """Exits after a third, a half and two thirds of the layers, where the model is deep enough."""
    return tuple(sorted({max(1, round(n_layers * share)) for share in (1 / 3, 1 / 2, 2 / 3)} - {n_layers}))


def print_weights(model: Transformer) -> None:
    dtype = str(model.embedding.dtype).removeprefix("torch.")
    print(f"{torch.get_num_threads()} threads, {dtype}, weights {model.form}")


def print_decoding(args: argparse.Namespace) -> None:
    """What the command prints without flags."""
    before = peak_resident()
    model, tokenizer = load_checkpoint(args.checkpoint, **loading(args))
    ends, model.config = model.config, replace(model.config, eos_id=None)  # every run has the same length
    generate(model, [5] * PROMPT, DecodeConfig(max_new_tokens=ANSWER))
    peak, weights = peak_resident() - before, sum(weight.nbytes for weight in model.parameters()) / 2**20
    print_weights(model)
    print(f"memory over the imports: at most {peak:.0f} MiB, of which weights {weights:.0f}")
    print_loops(args, model)
    print_rows(model, args.device, args.repeat)
    print_questions(model, args.device, [thirds(model.config.n_layers)], 64, args.repeat, PASSES)
    model.config = ends
    if tokenizer:
        print_copy_error(model, tokenizer)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add_model_flags(parser, str(DEFAULT_CHECKPOINT))
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--split", action="store_true", help="only where the missing efficiency goes, on dev inputs"
    )
    text = "only questions, to a random model with V = 262,144"
    parts.add_argument("--large-vocabulary", action="store_true", help=text)
    parts.add_argument("--training", action="store_true", help="only training, on one batch of random tokens")
    parser.add_argument(
        "--repeat", type=int, default=15, help="turns; the median counts (default: %(default)s)"
    )
    return parser


def main() -> None:
    args = make_parser().parse_args()
    check_range("repeat", args.repeat, least=1, most=10**6)
    if args.training:
        dtype = str(read_dtype(args.dtype or "float32")).removeprefix("torch.")
        device = loading(args)["device"]
        print_training(TrainConfig(device=device, dtype=dtype, warmup=0, lr=1e-4), args.repeat)
    elif args.large_vocabulary:
        print_large(args)
    elif args.split:
        print_split(args)
    else:
        print_decoding(args)


if __name__ == "__main__":
    run(main)
