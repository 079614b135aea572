"""Where the time of decoding goes: against a plain loop, by rows of a pass, by kind of check; and the memory it takes.

    python bench.py
"""

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from cli import Parser, add_model_flags, device_and_dtype, run
from confidence import FUNCTIONS, Trace
from decode import DEFAULT_CHECKPOINT, DecodeConfig, generate, run_pass
from model import KVCache, Transformer, load_checkpoint

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
def advance(model: Transformer, cache: KVCache, rows: int, passes: int = 20) -> None:
    """`passes` passes to the top, of `rows` positions each."""
    for _ in range(passes):
        cache.rollback(PROMPT)
        run_pass(model, cache, [5] * rows, Trace(model), {})


@torch.inference_mode()
def check(model: Transformer, states: list[Tensor], layers: tuple[int, ...], name: str | None, prune: str, passes: int = 20) -> None:
    """`passes` passes' worth of the heads alone: a check at each of `layers`, or (None) the final head."""
    for _ in range(passes):
        trace = Trace(model, FUNCTIONS.get(name), prune)
        for layer in layers:
            trace.hidden = states[: layer + 1]
            if name:
                trace.decided(math.inf)
        if not name:
            model.head(states[-1])


def peak_mib() -> float:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add_model_flags(parser, str(DEFAULT_CHECKPOINT))
    parser.add_argument("--repeat", type=int, default=15, help="turns; the median counts (default: %(default)s)")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.repeat < 1:
        raise ValueError(f"repeat is {args.repeat}; it must be at least 1")
    before = peak_mib()
    model, _ = load_checkpoint(args.checkpoint, *device_and_dtype(args))
    model.config = replace(model.config, eos_id=None)  # every run has the same length
    L, prompt, config = model.config.n_layers, [5] * PROMPT, DecodeConfig(max_new_tokens=64)
    generate(model, prompt, config)
    peak = peak_mib() - before
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 2**20
    print(f"{torch.get_num_threads()} threads, {str(model.embedding.dtype).removeprefix('torch.')}, weights {model.form}")
    print(f"memory over the imports: at most {peak:.0f} MiB, of which weights {weights:.0f}")

    plain, _ = load_checkpoint(args.checkpoint, *device_and_dtype(args), plain=True)
    loops = {"plain": lambda: plain_loop(plain, prompt, 64), "full": lambda: generate(model, prompt, config)}
    times = seconds(loops, args.device, args.repeat)
    same = plain_loop(plain, prompt, 64) == generate(model, prompt, config).tokens
    print(f"full depth, 64 tokens after {PROMPT}: plain loop {64 / times['plain']:.0f} tokens/s, this project {64 / times['full']:.0f}, "
          f"{times['plain'] / times['full']:.2f} times as fast, {'the same' if same else 'not the same'} tokens")  # fmt: skip

    cache = KVCache(model, PROMPT + 16)
    with torch.inference_mode():
        run_pass(model, cache, prompt, Trace(model), {})
        states = [state[-1:] for state in model.hidden_states(torch.tensor([prompt], device=args.device))]
    rows = {str(count): partial(advance, model, cache, count) for count in (1, 2, 4, 8, 16)}
    for count, spent in seconds(rows, args.device, args.repeat).items():
        print(f"a pass of {count:>2} rows: {1e6 * spent / 20 / L:.0f} µs a block")
    third, half, two = round(L / 3), round(L / 2), round(2 * L / 3)
    checks = {"final head": partial(check, model, states, (), None, "none")} | {
        f"{name}, exits {third},{half},{two}, {prune}": partial(check, model, states, (third, half, two), name, prune)
        for name in ("softmax", "weighted", "jsd") for prune in ("none", "fixed")
    }  # fmt: skip
    for name, spent in seconds(checks, args.device, args.repeat).items():
        print(f"{name}: {1e6 * spent / 20:.0f} µs a token")


if __name__ == "__main__":
    run(main)
