"""Trains a model with exits, fine-tunes one, or trains exit heads. Without arguments, it trains a model with
the shape of the included one on the included data.

    python train.py --out runs/mine --max-steps 50
    python train.py --data mine.jsonl --out runs/mine              holds out its last documents for validation
    python train.py --init model.pt --train heads --exits 4,8 --data mine.jsonl --out runs/heads
    python train.py --loss my_file:smooth --out runs/smooth        with a loss of your own
    torchrun --nproc-per-node 4 train.py --out runs/mine           on several GPUs of one machine
    python train.py --plot runs/mine/log.jsonl                     plots loss and agreement of every exit

--train all needs 16 bytes per weight (the float32 weight, its gradient and AdamW's two moments), and 2 more
during a step with --dtype bfloat16, which makes 18 GB for 1B weights. With --recompute, activations need
little memory compared with that. So do logits, which are computed in chunks (training/losses.py).
"""

import common.threads  # noqa: F401  sets variables that torch reads

import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from common.errors import UserError, run
from common.flags import Parser, add_flags, add_thread_flag, given, use_threads
from model import ModelConfig, Transformer
from training import parallel
from training.batches import batches
from training.device import DeviceBatch, on_device
from training.objective import Objective
from training.runs import Run, locked, noted_signals
from training.settings import TrainConfig
from training.start import Data, check_start, load_data, make_model, shape_from
from training.validation import result_table, validate

SAVE_EVERY = 250  # steps between checkpoints; there is one after every validation, too
LARGEST_NORM = 1.0  # of the gradient, which is clipped to it, as in GPT-3 and Llama 2
LOWEST_RATE = 0.02  # learning rate at the last step, as a share of the peak
WEIGHT_DECAY = 0.1  # of matrices, as GPT-3 (Brown 2020, appendix B) and Llama 2 (Touvron 2023, section 2.2)


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """AdamW for the weights that are trained; only matrices have weight decay."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in trained if weight.dim() > 1]
    vectors = [weight for weight in trained if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to LOWEST_RATE · lr at max_steps."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.max_steps - config.warmup)
    return config.lr * (LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * progress)))


def train_step(
    objective: nn.Module,
    optimizer: Optimizer,
    micro_batches: list[DeviceBatch],
    config: TrainConfig,
    step: int,
) -> float:
    """Updates the weights once, by the mean loss over the targets of all micro-batches. Returns the loss of
    the deepest layer trained. Raises UserError, before the update, if loss or gradient is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    sums = torch.zeros(2, device=config.device)
    for batch in micro_batches:
        loss, deepest = objective(batch, step)
        (batch.share * loss).backward()
        sums += batch.share * torch.stack([loss.detach().float(), deepest.float()])
    norm = nn.utils.clip_grad_norm_(objective.parameters(), LARGEST_NORM)
    loss, deepest, norm = torch.cat([sums, norm[None]]).tolist()  # waits for a GPU, once a step
    if not math.isfinite(loss + deepest + norm):
        found = f"the loss {config.loss} is {loss}, its gradient {norm} at step {step}"
        remedy = "the last checkpoint is kept: train anew with a lower --lr in another --out"
        raise UserError(f"{found}; {remedy}")
    optimizer.step()
    optimizer.zero_grad()
    return deepest


def train_loop(training: Run, objective: nn.Module, data: Data, signals: list[int]) -> None:
    """Trains until the last step, or until any process gets a signal (then the average number of signals is
    above 0 in all processes, and all stop at the same step)."""
    config, (rank, world) = training.config, parallel.processes()
    start = training.step * config.accumulate * world + rank
    own = batches(data.records, config.rows, config.length, config.seed, start, every=world)
    parts_of_steps = parallel.steps(on_device(own, config.device), config, training.step)
    positions = config.rows * config.length * config.accumulate * world  # of a step
    shown = {"total": config.max_steps, "initial": training.step, "unit": "step"}
    with tqdm(**shown, dynamic_ncols=True, mininterval=1, disable=rank > 0) as bar:
        while training.step < config.max_steps and not parallel.average(len(signals), config.device):
            started = time.perf_counter()
            loss = train_step(objective, training.optimizer, next(parts_of_steps), config, training.step)
            loss = parallel.average(loss, config.device)
            training.step += 1
            speed = round(positions / (time.perf_counter() - started))
            training.note({"step": training.step, "loss": round(loss, 4), "positions_per_s": speed})
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", positions_per_s=speed)
            validates = training.step % config.validate_every == 0 or training.step == config.max_steps
            if validates:
                validate_all(training, data.dev, bar)
            if training.step % SAVE_EVERY == 0 or validates:
                training.save()
        if training.step < config.max_steps:
            training.save()  # here, where another signal cannot interrupt it


def validate_all(training: Run, dev: dict[str, np.ndarray], bar: tqdm) -> None:
    """Validates on every file, notes the results in the log, and prints them. The first process does it
    alone."""
    if not parallel.is_first():
        return
    training.results = {}
    for file, records in dev.items():
        bar.set_postfix_str(f"validating on {file}")
        training.results[file] = validate(training.model, records, training.config)
        training.note({"step": training.step, "dev": file, "layers": training.results[file]})
    bar.set_postfix_str("")
    parallel.tell(result_table(training.step, training.results))


def run_training(
    config: TrainConfig, shape: ModelConfig, folder: Path, overwrite: bool = False
) -> Transformer:
    """Trains in `folder`, resuming from its checkpoint.pt if there is one, and writes model.pt at the end
    (float16, or the dtype of --init). A resumed run reaches the same weights as an uninterrupted one (on the
    same CPU and number of threads). Raises UserError for unusable settings or data, for other settings than
    those of the checkpoint, for files that already exist, for another run in the same folder, and for a loss
    that is not finite."""
    check_start(config, shape)
    with locked(folder):
        training = Run(config, shape, folder, overwrite)
        with parallel.first_alone():  # the first process makes the files of tokens, the others read them
            data = load_data(config, shape, folder)
        if torch.device(config.device).type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 in the float32 products that remain
        model = make_model(config, shape)
        objective = parallel.distribute(Objective(model, config), config)
        optimizer = make_optimizer(model, config)
        training.begin(model, optimizer, data)
        with noted_signals() as signals:
            train_loop(training, objective, data, signals)
        training.end(signals)
    return model


def make_parser() -> Parser:
    # With `usage`, since a list of all flags would fill the screen.
    parser = Parser(__doc__, usage="python train.py [--flag VALUE ...]")
    add = parser.add_argument
    default = Path("runs/default")
    add("--out", type=Path, default=default, metavar="FOLDER", help="for the results (default: %(default)s)")
    add("--overwrite", action="store_true", help="start again even if --out contains a training run")
    text = "do not train, but plot a log.jsonl as a PNG next to it (needs matplotlib)"
    add("--plot", type=Path, metavar="LOG", help=text)
    add_thread_flag(parser)
    add_flags(parser, TrainConfig(), "what to train")
    title = "shape of the model (with --init, that model's; --n-layers N then keeps its first N layers)"
    add_flags(parser, ModelConfig(), title, skip=("exit_layers",), common=("n_layers", "d_model", "adapter"))
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.plot:
        from evaluation.plots import draw_training

        print(f"wrote {draw_training(args.plot)}")
        return
    use_threads(args.threads)
    config = TrainConfig(**given(args, TrainConfig))
    with parallel.process_group(config.device):
        run_training(config, shape_from(config, given(args, ModelConfig)), args.out, args.overwrite)


if __name__ == "__main__":
    run(main)
