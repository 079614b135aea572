"""Pretraining, fine-tuning and training of exit heads. Without arguments it trains the embedded default from
the embedded data.

    python train.py --out runs/mine --max-steps 50
    python train.py --init model.pt --train heads --exits 4,8 --data mine.jsonl --dev dev.jsonl --out runs/heads
    python train.py --loss my_file:smooth --out runs/smooth         a loss of your own: training/losses.py says how
    torchrun --nproc-per-node 4 train.py --out runs/mine            on several GPUs of one machine
    torchrun --nproc-per-node 4 train.py --shard --out runs/mine    so, each with its part of the model alone
    python train.py --plot runs/mine/log.jsonl                      draws loss and agreement of every exit

Memory of --train all: 16 bytes a weight (float32 weight, gradient and AdamW's two moments), with --dtype
bfloat16 2 more while a step runs: 18 GB for 1B weights. With --recompute, the states between blocks and one
block's insides are small beside that; so are logits (training/chunked.py).
"""

import common.threads  # noqa: F401  before torch

import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.errors import UserError, run
from common.flags import Parser, add_flags, add_thread_flag, given, use_threads, warn_if_busy
from common.plugins import name_and_file
from common.processes import process_group, processes, tell, total
from model import ModelConfig, Transformer
from training.batches import batches
from training.device import DeviceBatch, autocast, on_device, set_precision
from training.losses import find_loss
from training.objective import make_objective, skipped_layers, synced, unwrapped
from training.optimizer import learning_rate, make_optimizer
from training.runs import Run, check_outputs, locked, noted_signals
from training.settings import TrainConfig
from training.sharding import check_sharding, heads_whole, whole
from training.start import check_start, load_data, make_model, shape_from
from training.utilization import peak_flops, speeds
from training.validation import VALIDATION_BATCHES, result_table, validate


def train_loop(
    training: Run, objective: nn.Module, records: np.ndarray, dev: dict[str, np.ndarray], signals: list
) -> None:
    """Steps until the last one, or until any process got a signal."""
    config = training.config
    rank, world = processes()
    start = training.step * config.accumulate * world + rank
    stream = on_device(batches(records, config.rows, config.length, config.seed, start, every=world), config)
    positions = config.rows * config.length * config.accumulate * world  # of a step
    peak, counted = peak_flops(config), unwrapped(objective)
    counts = {"total": config.max_steps, "initial": training.step, "unit": "step"}
    with tqdm(**counts, dynamic_ncols=True, mininterval=1, disable=rank > 0) as bar:
        while training.step < config.max_steps and not total(len(signals), config.device):
            started, before = time.perf_counter(), counted.flops
            loss = train_step(objective, training.optimizer, stream, config, training.step)
            training.step += 1
            at_end = training.step == config.max_steps
            speed = speeds(positions, counted.flops - before, time.perf_counter() - started, peak)
            training.note({"step": training.step, "loss": round(loss, 4), **speed})
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", **speed)
            if training.step % config.validate_every == 0 or at_end:
                validate_all(training, objective, dev, bar)
            if training.step % config.save_every == 0 or at_end:
                training.save()
        if training.step < config.max_steps:
            training.save()  # while signals are still only noted


def train_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[DeviceBatch],
    config: TrainConfig,
    step: int,
) -> float:
    """One update of the weights, by the mean loss over the learned targets of all micro-batches of all
    processes. Returns that of the deepest layer trained. Raises UserError, before the update, if loss or
    gradient are not finite."""
    rank, world = processes()
    model = unwrapped(objective).model
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    parts = [next(stream) for _ in range(config.accumulate)]
    targets = total(float(sum(len(part.targets) for part in parts)), config.device)
    sums = torch.zeros(2, device=config.device)
    for turn, batch in enumerate(parts):
        share = len(batch.targets) / targets
        number = step * config.accumulate + turn
        if not config.shard:  # where processes gather every block together, they leave out the same ones
            number = number * world + rank
        skipped = skipped_layers(config, model.config.n_layers, number)
        with autocast(config), synced(objective, turn == config.accumulate - 1):
            loss, deepest = objective(batch, step, skipped)
            (loss * (share * world)).backward()  # the processes' gradients are averaged
        sums += share * torch.stack([loss.detach().float(), deepest.float()])
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    norm = whole(nn.utils.clip_grad_norm_(trained, config.clip))
    *means, norm = torch.cat([sums, norm[None]]).tolist()  # a GPU is waited for once a step
    mean, deepest = total(means, config.device)
    check_finite(mean, deepest, norm, config, step)
    optimizer.step()
    optimizer.zero_grad()
    return deepest


def check_finite(loss: float, deepest: float, norm: float, config: TrainConfig, step: int) -> None:
    """Raises UserError for a loss or a gradient that is not finite."""
    if math.isfinite(loss + deepest + norm):
        return
    called = f" of {name_and_file('loss', config.loss, find_loss(config.loss))}" if ":" in config.loss else ""
    raise UserError(
        f"the loss is {loss}, its gradient {norm} at step {step}{called}; the last checkpoint, if any, is kept: "
        "train anew with a lower --lr in another --out"
    )


def validate_all(training: Run, objective: nn.Module, dev: dict[str, np.ndarray], bar: tqdm) -> None:
    """Validates on every file, into the log, and prints the table. The first process does it alone, unless
    the model is sharded."""
    if processes()[0] > 0 and not training.config.shard:
        return
    for file, records in dev.items():
        progress = partial(show_validation, bar, file)
        with heads_whole(objective):
            training.results[file] = validate(training.model, records, training.config, progress)
        training.note({"step": training.step, "dev": file, "layers": training.results[file]})
    bar.set_postfix_str("")
    tell(result_table(training.step, training.results))


def show_validation(bar: tqdm, file: str, done: int) -> None:
    """How far a validation is, beside the progress bar of the training."""
    name = f"{Path(file).parent.name}/{Path(file).name}"
    bar.set_postfix_str(f"validating on {name}, {done} of at most {VALIDATION_BATCHES} batches")


def run_training(
    config: TrainConfig, shape: ModelConfig, folder: Path, overwrite: bool = False
) -> Transformer:
    """Trains in `folder`, going on from its checkpoint.pt if there is one, and writes model.pt at the end
    (float16, or as --init is); interrupted or not, to the same weights (on the same CPU and number of
    threads). Raises UserError for unusable settings or data, for other settings than the checkpoint's, for
    files that are there already, for another run in the same folder, and for a loss that is not finite."""
    check_start(config, shape)
    check_outputs(config, folder)
    check_sharding(config)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        training = Run(config, shape, folder, overwrite)
        tokenizer, records, dev = load_data(config, shape, folder)
        set_precision(config)
        model = make_model(config, shape)
        objective = make_objective(model, config)
        optimizer = make_optimizer(model, config)
        training.begin(model, optimizer, tokenizer, records)
        with noted_signals() as signals:
            train_loop(training, objective, records, dev, signals)
        training.end(signals)
    return model


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.usage = "python train.py [--flag VALUE ...]"  # all of them would fill the screen
    add = parser.add_argument
    add(
        "--out",
        default="runs/default",
        metavar="FOLDER",
        help="for checkpoint, log and model (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="start anew, even if --out holds a training or a model")
    add(
        "--plot",
        type=Path,
        metavar="LOG",
        help="draw the curves of a log.jsonl beside it, and end (needs matplotlib)",
    )
    add_thread_flag(parser)
    add_flags(parser, TrainConfig(), "what to train")
    add_flags(
        parser,
        ModelConfig(),
        "shape of the model; with --init, that of the checkpoint",
        skip=("exit_layers",),
    )
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.plot:
        from evaluation.plots import draw_training

        print(f"wrote {draw_training(args.plot)}")
        return
    use_threads(args.threads)
    warn_if_busy()
    config = TrainConfig(**given(args, TrainConfig))
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"{args.out}: is a file; --out takes a folder")
    with process_group(config.device):
        run_training(config, shape_from(config, given(args, ModelConfig)), Path(args.out), args.overwrite)


if __name__ == "__main__":
    run(main)
