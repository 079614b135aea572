"""Where the time of decoding goes: against a plain loop, by rows of a pass, by kind of check; its memory; what copy fill gets wrong.

    python -m tools.bench
    python -m tools.bench --large-vocabulary        checks of a random model with V = 262,144, the shape of Gemma 3 270M
    python -m tools.bench --training                tokens a second of every training loss, beside a plain PyTorch model
"""

import common.threads  # noqa: F401  before torch

import argparse
import itertools
import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache import KVCache
from common.errors import UserError, run
from common.flags import Parser, add_model_flags, loading, read_dtype
from confidence import FUNCTIONS, Trace
from decode import DEFAULT_CHECKPOINT, copy_up, generate, run_pass
from decoding.record import Counters
from decoding.settings import DecodeConfig
from formats.data import read_examples, task_file
from formats.tokenizer import encode_prompt
from formats.weights import store
from model import ModelConfig, Transformer, load_checkpoint, rope_table
from train import train_step
from training.batches import Batch
from training.device import autocast, on_device, to_device
from training.losses import LOSSES
from training.objective import Objective
from training.optimizer import make_optimizer
from training.settings import TrainConfig
from training.start import make_model

PROMPT = 32  # tokens


@torch.inference_mode()
def plain_loop(model: Transformer, prompt: list[int], steps: int) -> list[int]:
    """Greedy decoding as one writes it first: F.linear everywhere, norms and rotation by their formulas, caches grown by torch.cat."""
    c = model.config
    H, K, C = c.n_heads, c.n_kv_heads, c.head_dim
    keys, values, tokens, out = {}, {}, torch.tensor([prompt], device=model.embedding.device), []

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + c.norm_eps) * weight

    def rotate(x: Tensor, start: int) -> Tensor:
        frequency = c.rope_base ** (-torch.arange(0, C, 2, device=x.device) / C)
        angle = torch.arange(start, start + x.shape[2], device=x.device)[:, None] * frequency
        cos, sin = torch.cat([angle.cos()] * 2, -1).to(x.dtype), torch.cat([angle.sin()] * 2, -1).to(x.dtype)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    for _ in range(steps):
        T, start = tokens.shape[1], keys[0].shape[2] if keys else 0
        x = F.embedding(tokens, model.embedding)  # (1, T, d)
        for layer, block in enumerate(model.blocks):
            q, k, v = F.linear(norm(x, block.attn_norm), block.qkv).split((H * C, K * C, K * C), -1)
            q, k, v = (part.view(1, T, -1, C).transpose(1, 2) for part in (q, k, v))
            q, k = rotate(q, start), rotate(k, start)
            if start:
                k, v = torch.cat([keys[layer], k], 2), torch.cat([values[layer], v], 2)
            keys[layer], values[layer] = k, v
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=H != K)
            x = x + F.linear(attended.transpose(1, 2).reshape(1, T, -1), block.out)
            gate, up = F.linear(norm(x, block.mlp_norm), block.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, block.down)
        out.append(int(F.linear(norm(x[0, -1], model.norm), model.unembed).argmax()))
        tokens = torch.tensor([[out[-1]]], device=tokens.device)
    return out


def seconds(actions: dict[str, Callable[[], object]], device: str, repeat: int) -> dict[str, float]:
    """Median time of each action; they take turns."""
    times = {name: [] for name in actions}
    for turn in range(repeat + 1):  # the first warms up
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in times.items()}


@torch.inference_mode()
def advance(model: Transformer, cache: KVCache, rows: int, passes: int) -> None:
    """`passes` passes to the top, of `rows` positions each."""
    for _ in range(passes):
        cache.rollback(PROMPT)
        run_pass(model, cache, [5] * rows, Trace(model), {})


@torch.inference_mode()
def check(model: Transformer, states: list[Tensor], layers: tuple[int, ...], name: str | None, prune: str, k: int, passes: int) -> None:
    """`passes` passes' worth of the heads alone: a check at each of `layers`, or (None) the final head."""
    for _ in range(passes):
        trace = Trace(model, FUNCTIONS.get(name), prune, k)
        for layer in layers:
            trace.hidden = states[: layer + 1]
            if name:
                trace.decided(math.inf)
        if not name:
            model.head(states[-1])


@torch.inference_mode()
def copy_error(model: Transformer, prompts: list[list[int]], config: DecodeConfig) -> dict[int, tuple[float, float]]:
    """Layer -> relative distances |K' - K| / |K| of the keys, and likewise of the values, that copy fill gave to the positions that stopped
    below it, from those of a full pass over the same text."""
    L, sums = model.config.n_layers, defaultdict(lambda: torch.zeros(4, dtype=torch.float64))
    for prompt in prompts:
        out = generate(model, prompt, config)
        text = prompt + out.tokens[:-1]
        exact, copied = KVCache(model, len(text)), KVCache(model, len(text))
        run_pass(model, exact, text, Trace(model), {})
        run_pass(model, copied, prompt[:-1], Trace(model), {})  # nothing, for a prompt of one token
        for token, layer in zip(text[len(prompt) - 1 :], out.exit_layers):
            run_pass(model, copied, [token], Trace(model), {layer: 0.0})
            copy_up(model, copied, layer, Counters())
        for layer in range(1, L + 1):
            rows = [i for i, reached in enumerate(out.exit_layers, len(prompt) - 1) if reached < layer]
            for at, name in ((0, "keys"), (2, "values")):
                true, found = (getattr(cache, name)[layer - 1][:, :, rows].double() for cache in (exact, copied))
                sums[layer][at : at + 2] += torch.stack([(found - true).square().sum(), true.square().sum()]).cpu()
    return {layer: (math.sqrt(s[0] / s[1]), math.sqrt(s[2] / s[3])) for layer, s in sums.items() if s[1] > 0}


def peak_mib() -> float:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def random_model(args: argparse.Namespace) -> Transformer:
    """Random weights in the shape of Gemma 3 270M, whose vocabulary is large."""
    config = ModelConfig(vocab_size=262_144, n_layers=18, d_model=640, n_heads=4, n_kv_heads=1, head_dim=256, d_ff=2048, eos_id=None)
    device, dtype = (loading(args)[name] for name in ("device", "dtype"))
    torch.manual_seed(0)
    model = Transformer(config).to(device, dtype or torch.float32).requires_grad_(False)
    if device == "cpu":
        store(model, None)
    return model


def print_checks(model: Transformer, device: str, exits: tuple[int, ...], k: int, repeat: int, passes: int) -> None:
    """Time of the checks of one token that exits nowhere, without pruning and with it, beside that of the token itself."""
    prompt, cache = [5] * PROMPT, KVCache(model, PROMPT + 1)
    with torch.inference_mode():
        states = [state[-1:] for state in model.hidden_states(torch.tensor([prompt], device=device))]
        run_pass(model, cache, prompt, Trace(model), {})
    actions = {"full depth": partial(advance, model, cache, 1, passes),
               "final head": partial(check, model, states, (), None, "none", k, passes)} | {
        f"{name}, {prune}": partial(check, model, states, exits, name, prune, k, passes)
        for name in ("softmax", "weighted", "jsd") for prune in ("none", "fixed")
    }  # fmt: skip
    spent = {name: 1e6 * value / passes for name, value in seconds(actions, device, repeat).items()}
    token = spent["full depth"] + spent["final head"]
    print(f"a token at full depth: {token:.0f} µs, of which the final head {spent['final head']:.0f}; checks after layers "
          f"{','.join(map(str, exits))}, all in vain:")  # fmt: skip
    for name in ("softmax", "weighted", "jsd"):
        none, fixed = spent[f"{name}, none"], spent[f"{name}, fixed"]
        print(f"  {name}: {none:.0f} µs unpruned, {fixed:.0f} with fixed k = {k} ({none / fixed:.1f} times less), "
              f"{fixed / (token + fixed):.0%} of the time")  # fmt: skip


class Plain(nn.Module):
    """The embedded model's shape from the library's parts, trained on the last layer alone, as one writes it first (cf. nanoGPT): every
    position learned, documents seeing each other."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, self.heads, self.rope = config.d_model, config.n_heads, rope_table(config)[0]
        self.embedding = nn.Embedding(config.vocab_size, d)
        sizes = {"qkv": (d, 3 * d), "out": (d, d), "gate": (d, config.d_ff), "up": (d, config.d_ff), "down": (config.d_ff, d)}
        norms, linear = ("norm", "mlp_norm"), partial(nn.Linear, bias=False)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.RMSNorm(d) for name in norms} | {name: linear(*size) for name, size in sizes.items()})
            for _ in range(config.n_layers)
        )
        self.norm = nn.RMSNorm(d)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        (B, T), cos, sin = tokens.shape, *self.rope[:, : tokens.shape[1]].to(tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in block["qkv"](block["norm"](x)).chunk(3, -1))
            q, k = ((part * cos + part.roll(part.shape[-1] // 2, -1) * sin).type_as(v) for part in (q, k))
            x = x + block["out"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1))
            y = block["mlp_norm"](x)
            x = x + block["down"](F.silu(block["gate"](y)) * block["up"](y))
        return F.cross_entropy(F.linear(self.norm(x), self.embedding.weight).flatten(0, 1), targets)


def training(config: TrainConfig, repeat: int) -> None:
    """Prints tokens a second of a step with each loss, all positions learned, beside the plain model, and what share that is of the rate
    of matrix products here."""
    shape, N = ModelConfig(), config.rows * config.length
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (config.rows, config.length + 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones_like(tokens[:, 1:]))
    plain = Plain(shape).to(config.device)
    optimizer = torch.optim.AdamW(plain.parameters(), fused=True)

    def plain_step() -> None:
        here = to_device(batch, config.device)
        with autocast(config):
            plain(here.inputs, here.targets).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()

    def steps(setting: TrainConfig) -> Callable[[], float]:
        model, stream, numbers = make_model(setting, shape), on_device(itertools.repeat(batch), setting), itertools.count()
        objective, optimizer = Objective(model, setting), make_optimizer(model, setting)
        return lambda: train_step(objective, optimizer, stream, setting, next(numbers))

    left, right = (torch.randn(*size, device=config.device, dtype=getattr(torch, config.dtype)) for size in ((N, 256), (256, 1024)))
    actions = {"products": lambda: [left @ right for _ in range(20)], "plain PyTorch": plain_step}
    actions |= {loss: steps(replace(config, loss=loss)) for loss in LOSSES}
    actions["rotate, layer dropout 0.2"] = steps(replace(config, layer_dropout=0.2))
    spent = seconds(actions, config.device, repeat)
    rate = 20 * 2 * left.numel() * right.shape[1] / spent.pop("products")
    print(f"{torch.get_num_threads()} threads, {config.dtype}, {config.rows} x {config.length} tokens a step, all of them learned; "
          f"products of {N} x 256 and 256 x 1024: {rate / 1e9:.0f} GFLOP/s")  # fmt: skip
    work = 6 * N * sum(weight.numel() for weight in plain.parameters())
    for name, value in spent.items():
        used = f", {work / value / rate:.0%} of the products' rate" if name in ("none", "plain PyTorch") else ""
        print(f"  {name}: {N / value:.0f} tokens/s, {value / spent['none']:.2f} times the time of none{used}")


def thirds(n_layers: int) -> tuple[int, ...]:
    """Exits after a third, a half and two thirds of the layers, where the model is deep enough."""
    return tuple(sorted({max(1, round(n_layers * share)) for share in (1 / 3, 1 / 2, 2 / 3)} - {n_layers}))


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add_model_flags(parser, str(DEFAULT_CHECKPOINT))
    parser.add_argument("--large-vocabulary", action="store_true", help="only the checks, of a random model with V = 262,144")
    parser.add_argument("--training", action="store_true", help="only training, on one batch of random tokens")
    parser.add_argument("--repeat", type=int, default=15, help="turns; the median counts (default: %(default)s)")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.repeat < 1:
        raise UserError(f"repeat is {args.repeat}; it must be at least 1")
    if args.training:
        dtype = str(read_dtype(args.dtype or "float32")).removeprefix("torch.")
        training(TrainConfig(device=loading(args)["device"], dtype=dtype, warmup=0, lr=1e-4), args.repeat)
        return
    if args.large_vocabulary:
        model = random_model(args)
        print(f"{torch.get_num_threads()} threads, {str(model.embedding.dtype).removeprefix('torch.')}, weights {model.form}")
        for exits in ((6, 9, 12), tuple(range(2, 18))):
            print_checks(model, args.device, exits, 512, args.repeat, 1)
        return
    before = peak_mib()
    model, tokenizer = load_checkpoint(args.checkpoint, **loading(args))
    ends, model.config = model.config, replace(model.config, eos_id=None)  # every run has the same length
    L, prompt, config = model.config.n_layers, [5] * PROMPT, DecodeConfig(max_new_tokens=64)
    generate(model, prompt, config)
    peak = peak_mib() - before
    weights = sum(weight.nbytes for weight in model.parameters()) / 2**20
    print(f"{torch.get_num_threads()} threads, {str(model.embedding.dtype).removeprefix('torch.')}, weights {model.form}")
    print(f"memory over the imports: at most {peak:.0f} MiB, of which weights {weights:.0f}")

    plain, _ = load_checkpoint(args.checkpoint, **{**loading(args), "form": "plain"})
    loops = {"plain": lambda: plain_loop(plain, prompt, 64), "full": lambda: generate(model, prompt, config)}
    times = seconds(loops, args.device, args.repeat)
    same = plain_loop(plain, prompt, 64) == generate(model, prompt, config).tokens
    print(f"full depth, 64 tokens after {PROMPT}: plain loop {64 / times['plain']:.0f} tokens/s, this project {64 / times['full']:.0f}, "
          f"{times['plain'] / times['full']:.2f} times as fast, {'the same' if same else 'not the same'} tokens")  # fmt: skip

    cache = KVCache(model, PROMPT + 16)
    with torch.inference_mode():
        run_pass(model, cache, prompt, Trace(model), {})
    rows = {str(count): partial(advance, model, cache, count, 20) for count in (1, 2, 4, 8, 16)}
    for count, spent in seconds(rows, args.device, args.repeat).items():
        print(f"a pass of {count:>2} rows: {1e6 * spent / 20 / L:.0f} µs a block")
    print_checks(model, args.device, thirds(L), 64, args.repeat, 20)

    model.config = ends
    if tokenizer:
        settings = DecodeConfig(confidence="softmax", threshold=0.6, exit_layers=thirds(L), prune="fixed", fill="copy")
        files = [task_file(task, "test") for task in ("translation", "e2e")]
        prompts = [encode_prompt(tokenizer, each.prompt) for file in files for each in read_examples(file)[::100]]
        print(f"copy fill on {len(prompts)} test inputs, relative distance of its keys (values) from the exact ones, by layer: "
              + "  ".join(f"{layer}: {k:.2f} ({v:.2f})" for layer, (k, v) in copy_error(model, prompts, settings).items()))  # fmt: skip


if __name__ == "__main__":
    run(main)
