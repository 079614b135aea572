"""What `eval.py --html` shows: some inputs of a task, each decoded under all rows of the table
(decoding/page.py)."""

import argparse
from pathlib import Path

from common.errors import UserError
from common.processes import processes, tell
from decode import stream
from decoding.page import Page
from decoding.replay import recorded
from decoding.settings import DecodeConfig
from evaluation.figures import baseline
from evaluation.measure import encode_inputs
from evaluation.tasks import Task
from formats.data import Example


class Pages:
    """The page of --html, which only the first process writes; without the flag none."""

    def __init__(self, args: argparse.Namespace, model, tokenizer):
        self.path = args.html if processes()[0] == 0 else None
        self.places = args.html_inputs or (1, 2, 3)
        self.page = Page(model, tokenizer, Path(args.checkpoint).name)

    def add(self, task: Task, examples: list[Example], configs: dict[str, DecodeConfig]) -> None:
        """The inputs asked for, under these configs and their full model, in runs of their own."""
        if self.path is None:
            return
        model, tokenizer = self.page.model, self.page.tokenizer
        chosen = [examples[place - 1] for place in self.places if place <= len(examples)]
        if not chosen:
            raise UserError(f"{task.name} has {len(examples)} inputs; choose --html-inputs among them")
        prompts, configs = encode_inputs(model, tokenizer, task, chosen, configs)
        configs = {"full": baseline(next(iter(configs.values()))), **configs}
        for example, prompt in zip(chosen, prompts):
            runs = {
                name: (config, recorded(stream, model, prompt, config)) for name, config in configs.items()
            }
            self.page.add(task.text(example.prompt, tokenizer), prompt, runs, example.references)

    def write(self) -> None:
        """Writes the page, unless it has nothing to show."""
        if self.path is not None:
            self.page.write(self.path)
            tell(f"wrote {self.path}")


def check_page(args: argparse.Namespace) -> None:
    """Raises UserError for a page that could not be written, or inputs that are none."""
    places = args.html_inputs or (1,)
    if args.html_inputs and not args.html:
        raise UserError("--html-inputs chooses what --html shows; give --html a file, too")
    if min(places) < 1 or (args.limit and max(places) > args.limit):
        limit = f"{args.limit}, the --limit" if args.limit else "their number"
        raise UserError(f"--html-inputs is {','.join(map(str, places))}; inputs count from 1 to {limit}")
