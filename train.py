"""Pretraining and fine-tuning with exit losses. Without arguments it trains the embedded default from the embedded data.

    python train.py --out runs/mine --max-steps 50

Dimensions: B rows, T positions, N learned targets of a batch, d model width, V vocabulary.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
from cli import Parser, add_flags, check_device, given, option, run, whole_file
from model import ModelConfig, Transformer, check_layers, read_checkpoint, save_checkpoint

LOSSES = ("none", "weighted", "rotate")
VALIDATION_BATCHES = 16
FREE_TO_CHANGE = {"dev", "max_steps", "device", "compile", "validate_every", "save_every"}  # settings that a resumed run may change


@dataclass(frozen=True)
class TrainConfig:
    """How to train. One step is one update of the weights."""

    train: tuple[str, ...] = option(tuple(data.task_file(task, "train") for task in ("translation", "translation", "e2e")),
                                    "training files; one named twice is seen twice as often")  # fmt: skip
    dev: tuple[str, ...] = option(tuple(data.task_file(task, "dev") for task in data.TASKS), "validation files, scored one by one")
    loss: str = option("rotate", "none: the final layer alone; weighted: every exit, every step; rotate: some exits a step, in turn")
    exits: tuple[int, ...] = option((2, 3, 4, 6, 8, 10), "exit layers to train")
    per_step: int = option(2, "rotate: exits a step")
    max_steps: int = option(7500, "steps in all")
    rows: int = option(16, "rows of a micro-batch")
    length: int = option(128, "positions of a row; documents are packed into rows")
    accumulate: int = option(1, "micro-batches of a step")
    lr: float = option(1.5e-3, "peak learning rate")
    min_lr: float = option(0.02, "learning rate at the end, as a share of the peak, 0 to 1")
    warmup: int = option(300, "steps of linear warm-up, before the cosine")
    weight_decay: float = option(0.1, "weight decay of matrices; norms have none")
    clip: float = option(1.0, "largest norm of the gradient")
    dtype: str = option("float32", "float32 or bfloat16 (autocast)")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    compile: bool = option(False, "torch.compile every block")
    validate_every: int = option(750, "steps between validations")
    save_every: int = option(250, "steps between checkpoints")
    seed: int = option(0, "seed of the weights and of the data's order")

    def __post_init__(self):
        object.__setattr__(self, "exits", tuple(sorted(set(self.exits))))
        for name in ("train", "dev"):
            object.__setattr__(self, name, tuple(map(str, getattr(self, name))))
        for name, known in {"loss": LOSSES, "dtype": ("float32", "bfloat16")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(known)}")
        least = dict.fromkeys(("per_step", "max_steps", "rows", "length", "accumulate", "validate_every", "save_every"), 1)
        for name, low in {**least, "warmup": 0, "weight_decay": 0, "seed": 0}.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        if not (self.lr > 0 and self.clip > 0 and 0 <= self.min_lr <= 1):
            raise ValueError(f"lr {self.lr}, clip {self.clip}, min_lr {self.min_lr}: lr and clip must be above 0, min_lr between 0 and 1")
        if not self.train:
            raise ValueError("there is nothing to train on; name a file with --train")


# ---------------------------------------------------------------- the loss


def layers_of_step(config: TrainConfig, n_layers: int, step: int) -> list[int]:
    """Layers whose heads are trained at `step`, the last one always. `rotate`: every R-th exit, from an offset that moves on by one each
    step (LayerSkip, Elhoushi 2024, section 4.1.2, rotational early exit)."""
    stride = {"none": len(config.exits) + 1, "weighted": 1, "rotate": max(1, math.ceil(len(config.exits) / config.per_step))}[config.loss]
    exits = config.exits[step % stride :: stride] if config.loss != "none" else ()
    return [*exits, n_layers]


def exit_loss(model: Transformer, states: list[Tensor], targets: Tensor, layers: list[int]) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the learned targets, averaged over `layers` with weights proportional to depth, w_l = l / sum (CALM,
    Schuster 2022, Eq. 6). Returns it and the last layer's own. states: h_0..h_L, (B T, d) each; targets (B T), -1 where not learned."""
    learned = targets >= 0
    losses = [F.cross_entropy(model.head(states[layer][learned], layer), targets[learned]) for layer in layers]  # over (N, V)
    return sum(layer * loss for layer, loss in zip(layers, losses)) / sum(layers), losses[-1].detach()


@torch.no_grad()
def validate(model: Transformer, array: np.ndarray, config: TrainConfig) -> dict[int, list[float]]:
    """[loss in nats per target, agreement with the last layer's argmax in [0, 1]] of every trained exit and of the last layer, over the
    first batches of a validation set."""
    layers = [*config.exits, model.config.n_layers]
    sums, count = {layer: [0.0, 0.0] for layer in layers}, 0
    for batch, _ in zip(data.batches(array, config.rows, config.length, seed=None), range(VALIDATION_BATCHES)):
        inputs, targets, documents = on_device(batch, config.device)
        states, learned = model.hidden_states(inputs, documents), targets >= 0
        final = model.head(states[-1][learned]).argmax(-1)
        count += len(final)
        for layer in layers:
            logits = model.head(states[layer][learned], layer)
            sums[layer][0] += F.cross_entropy(logits, targets[learned], reduction="sum").item()
            sums[layer][1] += (logits.argmax(-1) == final).sum().item()
    return {layer: [round(value / count, 4) for value in pair] for layer, pair in sums.items()}


def on_device(batch: data.Batch, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """inputs (B, T), targets (B T), documents (B, T)."""
    inputs, targets, documents = (torch.from_numpy(part).to(device) for part in (batch.inputs, batch.targets, batch.documents))
    return inputs, targets.flatten(), documents


# ---------------------------------------------------------------- the run


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to min_lr · lr at max_steps."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.max_steps - config.warmup)
    return config.lr * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: Transformer, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


def digest(files: tuple[str, ...], *rest) -> str:
    """A name for what is made from these files, as they are now, and the rest."""
    state = [(file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((state, rest)).encode()).hexdigest()[:16]


def prepare_tokenizer(files: tuple[str, ...], folder: Path, vocab_size: int) -> bytes:
    """A sentencepiece model trained on the files, once for these files and this size."""
    files = tuple(dict.fromkeys(files))
    path = folder / f"{digest(files, vocab_size)}.model"
    if not path.exists():
        model = data.train_tokenizer((pair for file in files for pair in data.read_pairs(file)), vocab_size)
        with whole_file(path) as part:
            Path(part).write_bytes(model)
    return path.read_bytes()


def prepare_data(files: tuple[str, ...], tokenizer: bytes, folder: Path, length: int) -> np.ndarray:
    """The files' documents as one memory-mapped array, tokenized once for these files, tokenizer and length."""
    path = folder / f"{digest(files, tokenizer, length)}.npy"
    if not path.exists():
        pairs = (pair for file in files for pair in data.read_pairs(file))
        stats = data.tokenize(pairs, spm.SentencePieceProcessor(model_proto=tokenizer), path, length)
        tqdm.write(f"{', '.join(map(str, files))}: " + ", ".join(f"{count:,} {name}" for name, count in stats.items()))
    return np.load(path, mmap_mode="r")


def train(config: TrainConfig, shape: ModelConfig, folder: Path) -> Transformer:
    """Trains in `folder`, going on from its checkpoint.pt if there is one, and writes model.pt (float16) at the end; interrupted or not,
    to the same weights (on the same CPU and number of threads). Raises ValueError for unusable settings or data, for other settings than
    the checkpoint's, and for a loss that is not finite."""
    check_layers("exits", config.exits, shape.n_layers)
    if shape.max_len < config.length:
        raise ValueError(f"length is {config.length}, the model has {shape.max_len} positions; lower --length or raise --max-len")
    missing = [file for file in (*config.train, *config.dev) if not Path(file).is_file()]
    if missing:
        raise ValueError(f"{missing[0]}: no such data file; check --train and --dev")
    checkpoint, step, scores = folder / "checkpoint.pt", 0, {}
    content = read_checkpoint(checkpoint) if checkpoint.exists() else None
    if content:
        check_resumable(checkpoint, content, config, shape)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = prepare_tokenizer(config.train, folder, shape.vocab_size)
    if content and content["tokenizer"].numpy().tobytes() != tokenizer:
        raise ValueError(f"{checkpoint} was trained with another tokenizer: the training files have changed; give another --out")
    array = prepare_data(config.train, tokenizer, folder, config.length)
    dev_arrays = {file: prepare_data((file,), tokenizer, folder, config.length) for file in config.dev}

    torch.manual_seed(config.seed)
    model = Transformer(shape).to(config.device)
    optimizer = make_optimizer(model, config)
    if content:
        model.load_state_dict(content["weights"])
        optimizer.load_state_dict(content["training"]["optimizer"])
        step, scores = content["training"]["step"], content["training"]["scores"]
        tqdm.write(f"going on from {checkpoint} at step {step} of {config.max_steps}")
    if config.compile:
        for block in model.blocks:
            block.compile()

    stream = data.batches(array, config.rows, config.length, config.seed, start=step * config.accumulate)
    with tqdm(total=config.max_steps, initial=step, unit="step", dynamic_ncols=True, mininterval=1) as bar:
        while step < config.max_steps:
            started = time.perf_counter()
            loss = train_step(model, optimizer, stream, config, step)
            step += 1
            speed = round(config.rows * config.length * config.accumulate / (time.perf_counter() - started))
            write_log(folder, {"step": step, "loss": round(loss, 4), "tokens_per_s": speed})
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=speed)
            last = step == config.max_steps
            if step % config.validate_every == 0 or last:
                for file, dev in dev_arrays.items():
                    scores[file] = validate(model, dev, config)
                    write_log(folder, {"step": step, "dev": file, "layers": scores[file]})
                    cells = "  ".join(f"{layer}: {loss:.3f} ({same:.3f})" for layer, (loss, same) in scores[file].items())
                    tqdm.write(f"step {step}, {file}: loss (agreement with the last layer) by layer  {cells}")
            if step % config.save_every == 0 or last:
                training = {"step": step, "scores": scores, "config": asdict(config), "optimizer": optimizer.state_dict()}
                save_checkpoint(checkpoint, model, tokenizer, training=training)
    provenance = {"command": " ".join(sys.argv), "config": asdict(config), "steps": step, "loss and agreement by layer": scores}
    save_checkpoint(folder / "model.pt", model, tokenizer, torch.float16, provenance=provenance)
    tqdm.write(f"wrote {folder / 'model.pt'}")
    return model


def train_step(model: Transformer, optimizer: torch.optim.Optimizer, stream: Iterator[data.Batch], config: TrainConfig, step: int) -> float:
    """One update; returns the final layer's loss. Raises ValueError, before the update, if loss or gradient are not finite."""
    layers, mean = layers_of_step(config, model.config.n_layers, step), 0.0
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    for _ in range(config.accumulate):
        inputs, targets, documents = on_device(next(stream), config.device)
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss, final = exit_loss(model, model.hidden_states(inputs, documents), targets, layers)
        (loss / config.accumulate).backward()
        mean += final.item() / config.accumulate
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
    if not math.isfinite(mean + norm):
        raise ValueError(f"the loss is {mean}, its gradient {norm} at step {step}; the last checkpoint is kept: "
                         "train anew with a lower --lr in another --out")  # fmt: skip
    optimizer.step()
    optimizer.zero_grad()
    return mean


def check_resumable(checkpoint: Path, content: dict, config: TrainConfig, shape: ModelConfig) -> None:
    """Raises ValueError if the run that wrote the checkpoint had other settings, or has gone beyond max_steps."""
    if "training" not in content:
        raise ValueError(f"{checkpoint}: holds a model but no training to go on with; give another --out")
    then, now = {**content["training"]["config"], **asdict(ModelConfig(**content["config"]))}, {**asdict(config), **asdict(shape)}
    other = [name for name in now if now[name] != then.get(name) and name not in FREE_TO_CHANGE]
    if other:
        raise ValueError(f"{checkpoint} was trained with {other[0]} {then.get(other[0])}, not {now[other[0]]}; give another --out")
    if content["training"]["step"] > config.max_steps:
        raise ValueError(f"{checkpoint} is at step {content['training']['step']}, beyond max_steps {config.max_steps}; give another --out")


def write_log(folder: Path, row: dict) -> None:
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(row) + "\n")


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--out", default="runs/default", metavar="FOLDER", help="where checkpoint, log and model go (default: %(default)s)")
    add_flags(parser, TrainConfig(), "training")
    add_flags(parser, ModelConfig(), "model")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    config = replace(TrainConfig(), **given(args, TrainConfig))
    check_device(config.device)
    train(config, ModelConfig(**given(args, ModelConfig)), Path(args.out))


if __name__ == "__main__":
    run(main)
