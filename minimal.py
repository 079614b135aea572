"""Early exit in one file: python minimal.py "Guten Morgen!"

After some of its layers, a Llama checks whether the next token is decided. If it is, the model emits the
token and skips the layers above, which then lack the keys and values of this position: it is *owed* to them.
The next pass that goes so far computes them, exactly: each layer runs all positions that it lacks in one
call. That is cheap, because reading the weights of the layer is what takes the time.

    layer 4 │■■■■■■■■■■        filled[4] = 10   filled never increases from a layer to the next. So the
    layer 3 │■■■■■■■■■■■■■     filled[3] = 13   positions owed to a layer, filled[layer] to the newest, are
    layer 2 │■■■■■■■■■■■■■■    filled[2] = 14   consecutive, and the layer below has processed all of them.

R rows of a pass, S positions so far, d width, H heads, C = d / H, V vocabulary; layers are numbered 1 .. L.
"""

import sys
from functools import partial
from statistics import median
from timeit import repeat

import sentencepiece
import torch
import torch.nn.functional as F


class Llama:
    def __init__(self, path, dtype=torch.float32):  # or float64, as in its tests
        file = torch.load(path, weights_only=True)
        config = file["config"]
        self.weights = {name: weight.to(dtype) for name, weight in file["weights"].items()}
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_proto=file["tokenizer"].numpy().tobytes())
        self.L, self.d, self.H = config["n_layers"], config["d_model"], config["n_heads"]
        self.C, self.eps, self.eos = self.d // self.H, config["norm_eps"], config["eos_id"]
        frequency = config["rope_base"] ** -(torch.arange(0, self.C, 2, dtype=torch.float64) / self.C)
        angle = torch.arange(config["max_len"])[:, None] * frequency  # (max_len, C/2)
        self.turns = torch.exp(1j * angle).to(torch.complex64)  # a factor that rotates a pair by its angle

    def rotate(self, x, first):
        """Rotary embedding of the positions from `first` on: x (H, R, C), the pairs are (i, i + C/2)."""
        pairs = torch.complex(*x.chunk(2, dim=-1)) * self.turns[first : first + x.shape[1]]  # (H, R, C/2)
        return torch.cat([pairs.real, pairs.imag], dim=-1)  # (H, R, C)

    def block(self, layer, x, first, keys, values):
        """x (R, d), from position `first` on -> (R, d). Stores k and v in keys and values (H, limit, C)."""
        w, here = self.weights, f"blocks.{layer - 1}."
        R, S = len(x), first + len(x)
        normed = F.rms_norm(x, (self.d,), w[here + "attn_norm"], self.eps)
        qkv = F.linear(normed, w[here + "qkv"])
        q, k, v = qkv.view(R, 3, self.H, self.C).permute(1, 2, 0, 3)  # (H, R, C) each
        keys[:, first:S], values[:, first:S] = self.rotate(k, first), v
        seen = torch.ones(R, S, dtype=torch.bool).tril(first)  # row i: 0 .. first + i
        q, k, v = self.rotate(q, first)[None], keys[None, :, :S], values[None, :, :S]  # (1, H, R or S, C)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)[0]  # (H, R, C)
        x = x + F.linear(heads.transpose(0, 1).reshape(R, self.d), w[here + "out"])  # (R, d)
        normed = F.rms_norm(x, (self.d,), w[here + "mlp_norm"], self.eps)
        gate, up = F.linear(normed, w[here + "gate_up"]).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, w[here + "down"])  # (R, d)

    def head(self, x, layer):
        """Logits after any layer, with a norm of its own if it has one: (R, d) -> (R, V)."""
        norm = self.weights.get(f"exit_norms.{layer}", self.weights["norm"])
        return F.linear(F.rms_norm(x, (self.d,), norm, self.eps), self.weights["embedding"])


class Staircase:
    def __init__(self, model, limit):
        # How many positions have their key and value in each layer; [0] is not used:
        self.filled = [0] * (model.L + 1)
        # Every position's state, at the depth that it reached; keys and values of every layer:
        self.hidden = model.weights["embedding"].new_empty(limit, model.d)
        self.cache = self.hidden.new_empty(model.L + 1, 2, model.H, limit, model.C)

    def climb(self, model, text, exits, threshold, drafts=0):
        """One pass, to a confident exit or to the top. Returns the layer, and the logits of the newest row
        or, at the top, of drafts + 1 rows, from the last verified token to the last draft."""
        first_new, stop = self.filled[1], len(text)  # every pass runs layer 1: what is missing there is new
        self.hidden[first_new:stop] = model.weights["embedding"][text[first_new:]]
        for layer in range(1, model.L + 1):
            first = self.filled[layer]  # rows first .. stop - 1: those owed, then the new ones
            self.hidden[first:stop] = model.block(layer, self.hidden[first:stop], first, *self.cache[layer])
            self.filled[layer] = stop
            if layer in exits and layer < model.L:
                logits = model.head(self.hidden[stop - 1 : stop], layer)
                best, second = logits[0].softmax(-1).topk(2).values
                if best - second >= threshold:  # CALM's "softmax response"
                    return layer, logits  # (1, V)
        judging = self.hidden[stop - 1 - drafts : stop]
        return model.L, model.head(judging, model.L)  # (drafts + 1, V); row i judges draft i


def generate(model, prompt, exits=(), threshold=0.6, limit=200):
    """Returns the new tokens and the layer that each came from. limit: tokens of prompt and answer."""
    stairs, text, layers = Staircase(model, limit), list(prompt), []
    while len(text) < limit and text[-1] != model.eos:
        layer, logits = stairs.climb(model, text, exits, threshold)
        text.append(int(logits[0].argmax()))
        layers.append(layer)
    return text[len(prompt) :], layers


def generate_verified(model, prompt, exits=(), threshold=0.6, limit=200):
    """Generates the full model's text faster: early tokens are drafts, judged by the next pass to the top."""
    stairs, text, layers = Staircase(model, limit), list(prompt), []
    verified = len(prompt)  # text[verified:] are drafts
    while verified < limit and text[verified - 1] != model.eos:
        ended = len(text) == limit or text[-1] == model.eos  # nothing more to draft: go up to the top
        allowed = () if ended else exits
        layer, logits = stairs.climb(model, text, allowed, threshold, drafts=len(text) - verified)
        best = logits.argmax(-1).tolist()
        if not ended:
            text.append(best[-1])
            layers.append(layer)
        if layer == model.L:
            # Row i - verified judges text[i]; if best[-1] was just appended, it is compared with itself.
            for i in range(verified, len(text)):
                if text[i] != best[i - verified]:
                    text[i:] = [best[i - verified]]
                    layers[i - len(prompt) :] = [model.L]
                    break
            verified = len(text)
            stairs.filled = [min(count, verified - 1) for count in stairs.filled]  # text[-1] is still unread
    return text[len(prompt) :], layers


if __name__ == "__main__":
    model, exits, full = Llama("checkpoints/default.pt"), (4, 6, 8), None
    prompt = [model.tokenizer.bos_id(), *model.tokenizer.encode(" ".join(sys.argv[1:]) + "<sep>")]
    if len(prompt) >= 200:
        sys.exit(f"the prompt has {len(prompt)} tokens, but prompt and answer have room for 200")
    for decode, used in (generate, ()), (generate, exits), (generate_verified, exits):
        tokens, layers = decode(model, prompt, used)  # once before the clock runs
        runs = sorted(repeat(partial(decode, model, prompt, used), number=1, repeat=5))
        seconds = runs[1:4]  # without the fastest and the slowest
        full = full or seconds  # the times of full depth, which comes first
        overlap = max(seconds) >= min(full) and max(full) >= min(seconds) and seconds is not full  # of times
        times = f"{median(full) / median(seconds):.2f} times full depth"
        speed = "too short to tell it from full depth" if overlap else times
        print(f"{decode.__name__} {used}: {len(tokens) / median(seconds):.0f} tokens/s, {speed}")
        print(model.tokenizer.decode(tokens), " exit layers:", *layers, "\n")
