"""Independent references that the code is compared with: the transformer in NumPy, the naive loop, and the
distribution of samples."""

import numpy as np
import torch

from decoding.prediction import distribution
from decoding.record import Generation, first_difference
from decoding.settings import DecodeConfig
from formats.checkpoint import weights_of
from model import Transformer

PROMPT = [1, 7, 3, 9]


# ---------------------------------------------------------------- the naive loop


def read_out(model: Transformer, states: list[torch.Tensor], position: int, layer: int | None = None) -> int:
    """The best token after a position of a full pass, by the exit head of `layer` (None: the last)."""
    layer = layer or model.config.n_layers
    return int(model.head(states[layer][0, position], layer).argmax())


def naive(model: Transformer, prompt: list[int], steps: int, layer: int | None = None) -> list[int]:
    """A whole forward pass for every token, without a cache, reading out after `layer`."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(read_out(model, model.hidden_states(torch.tensor([tokens])), -1, layer))
        if tokens[-1] in model.config.ends:
            break
    return tokens[len(prompt) :]


def exact_tokens(model: Transformer, prompt: list[int], out: Generation) -> list[int]:
    """What a full pass over the generated text reads out at each token's own exit layer."""
    states = model.hidden_states(torch.tensor([prompt + out.tokens]))
    return [read_out(model, states, i, layer) for i, layer in enumerate(out.exit_layers, len(prompt) - 1)]


def first_gap(model: Transformer, prompt: list[int], tokens: list[int], full: list[int]) -> float:
    """How far apart the logits of two texts' tokens are where the texts first differ, 0 if they do not: in half
    precision, rows that are judged together round otherwise than one by one, so texts may part at near ties."""
    at = first_difference(tokens, full)
    if at is None:
        return 0.0
    logits = model(torch.tensor([prompt + tokens], device=model.device))[0, len(prompt) - 1 + at]
    return float((logits[tokens[at]] - logits[full[at]]).abs())


# ---------------------------------------------------------------- the distribution of samples


def joint_distribution(model: Transformer, prompt: list[int], config: DecodeConfig) -> dict[tuple, float]:
    """The exact probability of every text of three tokens from the full model."""
    joint, V = {}, model.config.vocab_size
    for a in range(V):
        for b in range(V):
            logits = model(torch.tensor([[*prompt, a, b]]))[0, len(prompt) - 1 :]
            p = [distribution(row, config) for row in logits]
            joint.update({(a, b, c): float(p[0][a] * p[1][b] * p[2][c]) for c in range(V)})
    return joint


def exceeds(joint: dict[tuple, float], draws: list[tuple]) -> float:
    """Pearson's statistic of the draws over its bound, df + 4.8 sqrt(2 df) + 15, which lies above the 1 - 1e-6
    quantile of chi-square: draws from `joint` exceed 1 with less than that probability. Outcomes expected fewer
    than 5 times are pooled into one."""
    often = [outcome for outcome, p in joint.items() if p * len(draws) >= 5]
    expected = [joint[outcome] * len(draws) for outcome in often]
    found = [draws.count(outcome) for outcome in often]
    expected, found = [*expected, max(len(draws) - sum(expected), 1e-3)], [*found, len(draws) - sum(found)]
    statistic, df = sum((f - e) ** 2 / e for f, e in zip(found, expected)), len(often)
    return statistic / (df + 4.8 * (2 * df) ** 0.5 + 15)


# ---------------------------------------------------------------- the transformer in NumPy


def numpy_forward(model: Transformer, tokens: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """States h_0..h_L (T, d) and final logits (T, V) in float64, one position and one head at a time,
    straight from the definitions."""
    c = model.config
    w = {name: weight.double().numpy() for name, weight in weights_of(model).items()}
    H, K, C = c.n_heads, c.n_kv_heads, c.head_dim

    def norm(x, weight):
        return x / np.sqrt((x**2).mean() + c.norm_eps) * weight

    def cap(x, limit):
        return x if limit is None else limit * np.tanh(x / limit)

    def activation(x):
        if c.activation == "silu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def speed(i, slides):
        """Radians a position of the pair (i, i + C/2)."""
        if slides and c.local_rope_base:
            return c.local_rope_base ** (-2 * i / C)
        fast = c.rope_base ** (-2 * i / C)
        if not c.rope_bands:
            return fast / c.rope_factor
        low, high, length = c.rope_bands
        turns = length * fast / (2 * np.pi)
        if turns < low or turns > high:
            return fast / c.rope_factor if turns < low else fast
        smooth = (turns - low) / (high - low)
        return (1 - smooth) * fast / c.rope_factor + smooth * fast

    def rotated(x, position, slides, layer):
        if layer + 1 in c.unrotated_layers:
            return x
        pairs = [(x[i], x[i + C // 2], position * speed(i, slides)) for i in range(C // 2)]
        return np.array([a * np.cos(t) - b * np.sin(t) for a, b, t in pairs] + [b * np.cos(t) + a * np.sin(t) for a, b, t in pairs])

    states = [np.array([w["embedding"][token] * c.embedding_scale for token in tokens])]
    for layer in range(c.n_layers):
        b = {name.split(".")[2]: weight for name, weight in w.items() if name.startswith(f"blocks.{layer}.")}
        slides = c.window is not None and layer + 1 not in c.global_layers
        keys, values, rows = [], [], []
        for position, x in enumerate(states[-1]):
            qkv = b["qkv"] @ norm(x, b["attn_norm"]) + b.get("qkv_bias", 0)
            q, k, v = np.split(qkv, [H * C, (H + K) * C])
            q, k = q.reshape(H, C), k.reshape(K, C)
            if c.qk_norm:
                q, k = ([norm(head, b[name]) for head in heads] for heads, name in ((q, "q_norm"), (k, "k_norm")))
            keys.append([rotated(head, position, slides, layer) for head in k])
            values.append(v.reshape(K, C))
            heads = []
            seen = range(max(0, position - c.window + 1) if slides else 0, position + 1)
            for number, head in enumerate(q):
                group = number // (H // K)
                scores = np.array([rotated(head, position, slides, layer) @ keys[at][group] for at in seen])
                scores = cap(scores * (c.query_scale or 1 / np.sqrt(C)), c.attention_cap)
                share = np.exp(scores - scores.max())
                heads.append(sum(s * values[at][group] for s, at in zip(share / share.sum(), seen)))
            attended = b["out"] @ np.concatenate(heads)
            x = x + (norm(attended, b["attn_post_norm"]) if c.post_norms else attended)
            gate, up = np.split(b["gate_up"] @ norm(x, b["mlp_norm"]), 2)
            added = b["down"] @ (activation(gate) * up)
            rows.append(x + (norm(added, b["mlp_post_norm"]) if c.post_norms else added))
        states.append(np.array(rows))
    unembed = w["embedding"] if c.tie_embeddings else w["unembedding"]
    return states, np.array([cap(unembed @ norm(x, w["norm"]), c.logit_cap) for x in states[-1]])
