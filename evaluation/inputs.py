"""What every command of eval.py begins with: the model, the tasks, their inputs and solved examples; and what
`prompt` shows."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from common.files import digest
from common.flags import loading
from common.processes import processes, tell
from evaluation.measure import environment
from evaluation.rows import default_tasks
from evaluation.tasks import Task, find_task, read_task, sample
from formats.chat import load_chat
from formats.data import Example
from model import Transformer, load_checkpoint


def note(text: str) -> None:
    """Says something about the run on stderr, from the first process."""
    if processes()[0] == 0:
        tqdm.write(text, file=sys.stderr)


def chosen_tasks(args: argparse.Namespace) -> list[Task]:
    """Those of --tasks, else those that the checkpoint has settings for. Raises UserError for two of one
    name."""
    tasks = [
        find_task(name) for name in (args.tasks.split(",") if args.tasks else default_tasks(args.settings))
    ]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"two tasks would be called {max(names, key=names.count)}; evaluate them one by one")
    return tasks


def load_model(args: argparse.Namespace) -> tuple[Transformer, object]:
    """The model and its tokenizer; with --chat its chat, too, is in `args`. Raises UserError if it has
    none."""
    model, tokenizer = load_checkpoint(args.checkpoint, **loading(args))
    if tokenizer is None:
        raise UserError(
            f"{args.checkpoint}: has no tokenizer, which these tasks need, being text; decode.py takes token ids"
        )
    chats = getattr(args, "chat", False)  # not every tool has this flag
    args.template = load_chat(args.checkpoint, tokenizer) if chats else None
    return model, tokenizer


def from_here(path) -> str:
    """The path as seen from this folder, if it lies in it."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def run_record(args: argparse.Namespace, model: Transformer) -> dict:
    """How a run was made, which is said on stderr and kept beside its figures."""
    record = environment(model)
    files = [args.checkpoint, args.heads] if args.heads else [args.checkpoint]
    record |= {"checkpoint": " with ".join(map(from_here, files)), "checkpoint_id": digest(*map(Path, files))}
    record |= {
        "split_of_data": args.split,
        "limit": args.limit,
        "repeat": args.repeat,
        "seed": args.draw_seed,
        "shots": args.shots,
        "chat": args.chat,
    }
    note(", ".join(f"{name} {value}" for name, value in record.items()))
    return record


def load_inputs(args: argparse.Namespace, task: Task, split: str) -> tuple[Task, list[Example]]:
    """The task with its shots, and all of its inputs but these. Says how many references were merged, and
    what was skipped."""
    skipped: list[str] | None = [] if args.skip_bad else None
    examples = read_task(task, split, skipped)
    shots = []
    if args.chat and task.openings:
        raise UserError(f"{task.name}: goes on from a text, so it takes no --chat")
    if args.shots:
        if task.openings:
            raise UserError(f"{task.name}: goes on from a text, so it takes no --shots")
        if not args.shot_file and "{}" not in task.file:
            raise UserError(f"{task.name}: name the file that the shots come from with --shot-file")
        solved = read_task(replace(task, file=args.shot_file or task.file), "train", skipped)
        if args.shots > len(solved):
            raise UserError(
                f"shots is {args.shots}, but {task.name} has {len(solved)} solved examples; take fewer"
            )
        shots = sample(solved, args.shots, args.draw_seed)
    for message in skipped or []:
        tell(f"skipped: {message}")
    if skipped:
        tell(f"{task.name}: {len(skipped)} malformed lines skipped")
    pairs = sum(len(example.references) for example in examples)
    if pairs > len(examples):
        note(
            f"{task.name}: {pairs} pairs of prompt and reference are {len(examples)} inputs: "
            "the references of equal prompts are put together"
        )
    task = replace(task.with_shots(shots), chat=args.template)
    left = [example for example in examples if example not in shots]
    if shots and not left:
        raise UserError(
            f"shots is {args.shots}: all inputs of {task.name}; take fewer, or another --shot-file"
        )
    return task, left


def show_prompts(args: argparse.Namespace) -> None:
    """`eval.py prompt`: the first prompt of each task, as the model gets it, and its references."""
    tasks = chosen_tasks(args)
    _, tokenizer = load_model(args)
    for task in tasks:
        task, examples = load_inputs(args, task, args.split)
        first = sample(examples, args.limit, args.draw_seed)[0]
        lines = [
            f"--- {task.name}, {args.split}",
            task.text(first.prompt, tokenizer),
            "--- references",
            *first.references,
        ]
        tell("\n".join(lines))
