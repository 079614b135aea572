"""Pretraining, fine-tuning and training of exit heads. Without arguments it trains the embedded default from the embedded data.

    python train.py --out runs/mine --max-steps 50
    python train.py --init model.pt --train heads --exits 4,8 --data mine.jsonl --dev dev.jsonl --out runs/heads
    torchrun --nproc-per-node 4 train.py --out runs/mine            on several GPUs of one machine
    python train.py --plot runs/mine/log.jsonl                      draws loss and agreement of every exit

Memory of --train all: 16 bytes a weight (float32 weight, gradient and AdamW's two moments), with --dtype bfloat16 2 more while a step runs:
18 GB for 1B weights. With --recompute, the states between blocks and one block's insides are small beside that; so are logits (losses.py).
"""

import common.threads  # noqa: F401  before torch

import math
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.config import option
from common.errors import UserError, run
from common.files import digest, whole_file
from common.flags import Parser, add_flags, given
from common.processes import gathered, process_group, processes, tell, total
from formats.checkpoint import fitting, load_tokenizer, read_checkpoint, read_tokenizer, save_checkpoint
from formats.data import Corpus, task_file
from formats.tokenizer import train_tokenizer
from model import ModelConfig, Transformer, check_layers
from training.batches import Batch, batches, describe, prepare_file, read_prepared
from training.losses import LOSSES, Objective, exit_loss, layers_of_step, skipped_layers
from training.runs import Log, check_resumable, noted_signals

VALIDATION_BATCHES = 16
FREE_TO_CHANGE = {"dev", "max_steps", "device", "compile", "recompute", "validate_every", "save_every"}  # what a resumed run may change
HEADS = ("exit_norms", "adapters", "classifiers")  # what --train heads trains


@dataclass(frozen=True)
class TrainConfig:
    """How to train. One step is one update of the weights."""

    data: tuple[str, ...] = option(tuple(task_file(task, "train") for task in ("translation", "translation", "e2e")),
                                   "training files; one named twice is seen twice as often")  # fmt: skip
    dev: tuple[str, ...] = option(tuple(task_file(task, "dev") for task in ("translation", "e2e")), "validation files, scored one by one")
    tokenizer: str | None = option(None, "sentencepiece model, or checkpoint that holds one; none: that of --init, or a new one")
    init: str | None = option(None, "checkpoint to start from, shape and tokenizer included; none: random weights")
    train: str = option("all", "all: every weight; heads: norm, adapter and classifier of each exit, the model's own output unchanged")
    loss: str = option("rotate", "none: the last layer alone; weighted: every exit, every step; rotate: some exits a step, in turn; "
                                 "distill: so, towards the last layer's distribution; hidden: rotate, and states to deeper")  # fmt: skip
    exits: tuple[int, ...] = option((2, 3, 4, 6, 8, 10), "exit layers to train")
    exit_weights: tuple[float, ...] = option((), "weights of the exits' losses, lowest first, then the last layer's; none: by depth")
    per_step: int = option(2, "rotate, distill, hidden: exits a step")
    hidden_weight: float = option(1.0, "hidden: weight of the distance between states")
    layer_dropout: float = option(0.0, "chance to leave out the last layer, less for lower ones, 0 to 1")
    classifier: bool = option(False, "also train a confidence classifier at every exit")
    max_steps: int = option(7500, "steps in all")
    rows: int = option(16, "rows of a micro-batch")
    length: int = option(128, "positions of a row; documents are packed into rows")
    accumulate: int = option(1, "micro-batches of a step, in each process")
    lr: float = option(1.5e-3, "peak learning rate")
    min_lr: float = option(0.02, "learning rate at the end, as a share of the peak, 0 to 1")
    warmup: int = option(300, "steps of linear warm-up, before the cosine")
    weight_decay: float = option(0.1, "weight decay of matrices; norms have none")
    clip: float = option(1.0, "largest norm of the gradient")
    dtype: str = option("float32", "float32 or bfloat16 (autocast)")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    compile: bool = option(False, "torch.compile every block")
    recompute: bool = option(False, "make the insides of blocks anew for the gradient: less memory, a third more work")
    validate_every: int = option(750, "steps between validations")
    save_every: int = option(250, "steps between checkpoints")
    seed: int = option(0, "seed of the weights, of the data's order and of the layers left out")

    def __post_init__(self):
        object.__setattr__(self, "exits", tuple(sorted(set(self.exits))))
        if len(self.exit_weights) not in (0, len(self.exits) + 1) or not all(weight > 0 for weight in self.exit_weights):
            raise UserError(f"exit_weights are {self.exit_weights}; give {len(self.exits) + 1} above 0, one an exit and the last layer's")
        for name in ("data", "dev"):
            object.__setattr__(self, name, tuple(map(str, getattr(self, name))))
        for name, known in {"loss": LOSSES, "dtype": ("float32", "bfloat16"), "train": ("all", "heads")}.items():
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(known)}")
        least = dict.fromkeys(("per_step", "max_steps", "rows", "length", "accumulate", "validate_every", "save_every"), 1)
        for name, low in {**least, "warmup": 0, "weight_decay": 0, "seed": 0, "hidden_weight": 0}.items():
            if not low <= getattr(self, name) < 2**63:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {low}, and finite")
        if not (self.lr > 0 and self.clip > 0 and 0 <= self.min_lr <= 1 and 0 <= self.layer_dropout <= 1):
            raise UserError(f"lr {self.lr}, clip {self.clip}, min_lr {self.min_lr}, layer_dropout {self.layer_dropout}: lr and clip must "
                             "be above 0, min_lr and layer_dropout between 0 and 1")  # fmt: skip
        if not self.data:
            raise UserError("there is nothing to train on; name a file with --data")
        if self.train == "heads" and (self.init is None or self.loss in ("none", "hidden") or self.layer_dropout):
            raise UserError("train is heads, which needs --init, a loss of the exits (weighted, rotate or distill) and no layer_dropout")
        if self.classifier and self.loss == "none":
            raise UserError("classifier is True, but loss is none, which asks no exit; choose another loss")
        if not self.exits and (self.train == "heads" or self.loss in ("distill", "hidden") or self.classifier):
            raise UserError(f"train {self.train}, loss {self.loss}, classifier {self.classifier}: there must be exits to train")


# ---------------------------------------------------------------- one step, and its validation


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to min_lr · lr at max_steps."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.max_steps - config.warmup)
    return config.lr * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: Transformer, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what is trained; only matrices decay."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [{"params": [weight for weight in trained if weight.dim() > 1], "weight_decay": config.weight_decay},
              {"params": [weight for weight in trained if weight.dim() == 1], "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


def on_device(batch: Batch, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """inputs (B, T), targets (B T), documents (B, T)."""
    inputs, targets, documents = (torch.from_numpy(part).to(device) for part in (batch.inputs, batch.targets, batch.documents))
    return inputs, targets.flatten(), documents


def autocast(config: TrainConfig) -> torch.autocast:
    """Matrix products in the dtype of training, what is summed in float32."""
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def train_step(objective: nn.Module, optimizer: torch.optim.Optimizer, stream: Iterator[Batch], config: TrainConfig, step: int,
               rank: int = 0, world: int = 1) -> float:  # fmt: skip
    """One update by `accumulate` micro-batches of each of `world` processes; returns the mean loss of the deepest layer trained. Raises
    ValueError, before the update, if loss or gradient are not finite."""
    model = getattr(objective, "module", objective).model
    layers, mean = layers_of_step(config, model.config.n_layers, step), 0.0
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    for turn in range(config.accumulate):
        number = (step * config.accumulate + turn) * world + rank
        skipped, synced = skipped_layers(config, model.config.n_layers, number), world == 1 or turn == config.accumulate - 1
        with autocast(config), nullcontext() if synced else objective.no_sync():
            loss, deepest = objective(*on_device(next(stream), config.device), layers, skipped)
            (loss / config.accumulate).backward()
        mean += deepest.item() / config.accumulate
    norm = nn.utils.clip_grad_norm_([weight for weight in model.parameters() if weight.requires_grad], config.clip).item()
    mean = total(mean, config.device) / world
    if not math.isfinite(mean + norm):
        raise UserError(f"the loss is {mean}, its gradient {norm} at step {step}; the last checkpoint, if any, is kept: "
                         "train anew with a lower --lr in another --out")  # fmt: skip
    optimizer.step()
    optimizer.zero_grad()
    return mean


@torch.no_grad()
def validate(model: Transformer, array: np.ndarray, config: TrainConfig) -> dict[int, list[float]]:
    """[loss in nats per target, agreement with the last layer's argmax in [0, 1]] of every trained exit and of the last layer, over the
    first batches of a validation set."""
    layers = [*config.exits, model.config.n_layers]
    sums, count = {layer: [0.0, 0.0] for layer in layers}, 0
    for batch, _ in zip(batches(array, config.rows, config.length, seed=None), range(VALIDATION_BATCHES)):
        inputs, targets, documents = on_device(batch, config.device)
        learned = (targets >= 0).nonzero()[:, 0]
        with autocast(config):
            states = model.hidden_states(inputs, documents)
            rows = {layer: states[layer][learned] for layer in layers}
            _, losses, agreed = exit_loss(model, rows, targets[learned], dict.fromkeys(layers, 1.0), compare=True)
        for layer in layers:
            sums[layer][0] += losses[layer].item() * len(learned)
            sums[layer][1] += agreed[layer].sum().item() if layer in agreed else len(learned)
        count += len(learned)
    return {layer: [round(value / count, 4) for value in pair] for layer, pair in sums.items()}


def score_table(step: int, scores: dict[str, dict[int, list[float]]]) -> str:
    """Loss and agreement of every layer on each validation file."""
    lines = []
    for file, layers in scores.items():
        losses, agreements = zip(*layers.values())
        lines += [f"step {step}, {file}", "  layer     " + "".join(f"{layer:7}" for layer in layers),
                  "  loss      " + "".join(f"{loss:7.3f}" for loss in losses),
                  "  agreement " + "".join(f"{same:7.3f}" for same in agreements)]  # fmt: skip
    return "\n".join(lines)


# ---------------------------------------------------------------- the run


def prepare_tokenizer(config: TrainConfig, folder: Path, vocab_size: int) -> bytes:
    """The tokenizer that the settings name, or one trained on the files, once for these files and this size."""
    if config.tokenizer or config.init:
        return load_tokenizer(config.tokenizer or config.init)
    files = tuple(dict.fromkeys(config.data))
    if prepared := [file for file in files if file.endswith(".npy")]:
        raise UserError(f"{prepared[0]} is prepared data; name the tokenizer that it was made with: --tokenizer FILE")
    path = folder / f"{digest(*map(Path, files), vocab_size)}.model"
    if not path.exists():
        model = train_tokenizer(Corpus(files), vocab_size)
        with whole_file(path) as part:
            Path(part).write_bytes(model)
    return path.read_bytes()


def prepare_data(files: tuple[str, ...], tokenizer: bytes, folder: Path, length: int) -> np.ndarray:
    """The files' documents as one memory-mapped array, tokenized once for these files, tokenizer and length; a prepared file as it is."""
    if any(file.endswith(".npy") for file in files):
        if len(files) > 1:
            raise UserError(f"{', '.join(files)}: a prepared file comes alone; prepare all of the data in one")
        return read_prepared(Path(files[0]), tokenizer, length)
    path = folder / f"{digest(*map(Path, files), tokenizer, length)}.npy"
    if not path.with_suffix(".json").exists():  # written last
        tqdm.write(f"{', '.join(files)}: {describe(prepare_file(files, tokenizer, path, length))}")
    return read_prepared(path, tokenizer, length)


def shape_from(config: TrainConfig, given: dict) -> ModelConfig:
    """The shape of the model to train: that of --init, or of the flags; with the heads that the settings ask for. Raises ValueError."""
    shape = {}
    if config.init:
        with fitting(config.init):
            shape = asdict(ModelConfig(**read_checkpoint(config.init)["config"]))
        if other := set(given) - {"exit_norms", "classifiers", "adapter_rank", "max_len", "eos_id"}:
            raise UserError(f"{sorted(other)[0]} comes from --init {config.init}; leave the flag out")
    shape |= given
    if config.train == "heads":
        shape["exit_norms"] = tuple(sorted({*shape.get("exit_norms", ()), *config.exits}))
    if config.classifier:
        shape["classifiers"] = tuple(sorted({*shape.get("classifiers", ()), *config.exits}))
    return ModelConfig(**shape)


def make_model(config: TrainConfig, shape: ModelConfig) -> Transformer:
    """The model at the start, its weights float32 (with heads: the frozen ones in the dtype of training); heads that --init lacks begin
    as the final norm, the identity, and a classifier that is undecided. Raises ValueError if --init has other weights."""
    torch.manual_seed(config.seed)
    model = Transformer(shape)
    if config.init:
        with fitting(config.init):
            missing, more = model.load_state_dict(read_checkpoint(config.init)["weights"], strict=False)
            if lost := [name for name in missing if not name.startswith(HEADS)]:
                raise KeyError(f"{lost[0]} is missing")
            if more:
                raise KeyError(f"{more[0]} has no place in it; exit_norms, classifiers and adapter_rank may only add to it")
        for name in missing:
            if name.startswith("exit_norms"):
                model.get_parameter(name).data.copy_(model.norm.data)
    if config.train == "heads":
        for name, weight in model.named_parameters():
            if not name.startswith(HEADS):
                weight.requires_grad_(False).data = weight.data.to(getattr(torch, config.dtype))
    return model.to(config.device)


def train(config: TrainConfig, shape: ModelConfig, folder: Path, overwrite: bool = False) -> Transformer:
    """Trains in `folder`, going on from its checkpoint.pt if there is one, and writes model.pt at the end (float16, or as --init is);
    interrupted or not, to the same weights (on the same CPU and number of threads). Raises ValueError for unusable settings or data, for
    other settings than the checkpoint's, for a model that is there already, and for a loss that is not finite."""
    rank, world = processes()
    check_layers("exits", config.exits, shape.n_layers)
    if shape.max_len < config.length:
        raise UserError(f"length is {config.length}, the model has {shape.max_len} positions; lower --length or raise --max-len")
    missing = [file for file in (*config.data, *config.dev) if not Path(file).is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such data file; check --data and --dev")
    checkpoint, step, scores = folder / "checkpoint.pt", 0, {}
    outputs = [checkpoint, folder / "model.pt", folder / "log.jsonl"]
    for source in filter(None, (config.init, config.tokenizer)):
        if Path(source).resolve() in [path.resolve() for path in outputs]:
            raise UserError(f"{source}: is in --out, where it would be overwritten; give another --out")
    content = read_checkpoint(checkpoint) if checkpoint.exists() and not overwrite else None
    settings = {**asdict(config), "accumulate": config.accumulate * world}
    if content:
        check_resumable(checkpoint, content, {**settings, **asdict(shape)}, FREE_TO_CHANGE)
    elif (folder / "model.pt").exists() and not overwrite:
        raise UserError(f"{folder / 'model.pt'} is there already; give another --out, or --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    mistake = None
    if rank == 0:  # the first process prepares what all then read
        try:
            load_arrays(config, shape, folder)
        except (ValueError, OSError) as error:
            mistake = str(error)
    if mistake := gathered(mistake)[0]:
        raise UserError(mistake)
    tokenizer, array, dev_arrays = load_arrays(config, shape, folder)
    fingerprint = zlib.crc32(array.view(np.uint8))
    if content and (content["tokenizer"].numpy().tobytes() != tokenizer or content["training"]["data"] != fingerprint):
        raise UserError(f"{checkpoint}: the training files have changed since; give another --out, or --overwrite")

    model = make_model(config, shape)
    optimizer = make_optimizer(model, config)
    if content:
        model.load_state_dict(content["weights"])
        optimizer.load_state_dict(content["training"]["optimizer"])
        step, scores = content["training"]["step"], content["training"]["scores"]
        tell(f"going on from {checkpoint} at step {step} of {config.max_steps}")
    if config.compile:
        for block in model.blocks:
            block.compile()
    objective = Objective(model, config)
    if world > 1:
        unused = bool(config.layer_dropout or shape.exit_norms or shape.classifiers)  # in some steps
        objective = DistributedDataParallel(objective, find_unused_parameters=unused, gradient_as_bucket_view=True)
    if overwrite and rank == 0:
        for path in outputs:
            path.unlink(missing_ok=True)
    log = Log(folder / "log.jsonl", step) if rank == 0 else None

    def save() -> None:
        if rank == 0:
            training = {"step": step, "scores": scores, "config": settings, "data": fingerprint, "optimizer": optimizer.state_dict()}
            save_checkpoint(checkpoint, model, tokenizer, training=training)

    stream = batches(array, config.rows, config.length, config.seed, start=step * config.accumulate * world + rank, every=world)
    bar = tqdm(total=config.max_steps, initial=step, unit="step", dynamic_ncols=True, mininterval=1, disable=rank > 0)
    with bar, noted_signals() as signals:
        while step < config.max_steps and not total(len(signals), config.device):
            started = time.perf_counter()
            loss = train_step(objective, optimizer, stream, config, step, rank, world)
            step += 1
            last = step == config.max_steps
            if rank == 0:
                speed = round(config.rows * config.length * config.accumulate * world / (time.perf_counter() - started))
                log.write({"step": step, "loss": round(loss, 4), "tokens_per_s": speed})
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=speed)
            if rank == 0 and (step % config.validate_every == 0 or last):
                for file, dev in dev_arrays.items():
                    scores[file] = validate(model, dev, config)
                    log.write({"step": step, "dev": file, "layers": scores[file]})
                tqdm.write(score_table(step, scores))
            if step % config.save_every == 0 or last:
                save()
        if step < config.max_steps:
            save()  # while signals are still only noted
    if step < config.max_steps:
        tell(f"stopped by a signal; {checkpoint} is at step {step} of {config.max_steps}, and the same command goes on from there")
        sys.exit(128 + (signals or [15])[0])
    if rank == 0:
        dtype = torch.float16
        if config.init:
            weights = read_checkpoint(config.init)["weights"]
            dtype = weights["embedding"].dtype
            for name, weight in weights.items():
                if not model.get_parameter(name).requires_grad:
                    model.get_parameter(name).data = weight.to(config.device)  # as it was, whatever the dtype of training
        provenance = {"command": " ".join(sys.argv), "config": asdict(config), "steps": step, "loss and agreement by layer": scores}
        save_checkpoint(folder / "model.pt", model, tokenizer, dtype, provenance=provenance)
        tell(f"wrote {folder / 'model.pt'}")
    return model


def load_arrays(config: TrainConfig, shape: ModelConfig, folder: Path) -> tuple[bytes, np.ndarray, dict[str, np.ndarray]]:
    """Tokenizer, training data, and validation data by file; made if they are not there yet. Raises ValueError for a tokenizer that does
    not fit the model."""
    tokenizer = prepare_tokenizer(config, folder, shape.vocab_size)
    end = read_tokenizer(config.tokenizer or config.init or folder, tokenizer, shape.vocab_size).eos_id()
    if config.train == "all" and end not in shape.ends:
        raise UserError(f"eos_id is {shape.eos_id}, but the tokenizer ends texts with {end}; give --eos-id {end}")
    dev = {file: prepare_data((file,), tokenizer, folder, config.length) for file in config.dev}
    return tokenizer, prepare_data(config.data, tokenizer, folder, config.length), dev


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--out", default="runs/default", metavar="FOLDER", help="where checkpoint, log and model go (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="start anew, even if --out holds a training or a model")
    parser.add_argument("--plot", type=Path, metavar="LOG", help="draw the curves of a log.jsonl beside it, and end (needs matplotlib)")
    add_flags(parser, TrainConfig(), "training")
    add_flags(parser, ModelConfig(), "model")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.plot:
        from evaluation.plots import draw_training

        print(f"wrote {draw_training(args.plot)}")
        return
    config = replace(TrainConfig(), **given(args, TrainConfig))
    with process_group(config.device):
        train(config, shape_from(config, given(args, ModelConfig)), Path(args.out), args.overwrite)


if __name__ == "__main__":
    run(main)
