"""What every command of eval.py begins with: the model, the tasks, and their inputs."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from common.files import check_outputs, digest
from decode import load_checkpoint
from decoding.presets import read_settings_file, settings_file
from evaluation.measure import Configuration, baseline, by_baseline, place_of_run
from evaluation.settings import EvalConfig
from evaluation.tasks import TASKS, Task, between, find_task, one_of_each_source, read_task, sample
from formats.chat import load_chat
from formats.data import Example
from model import Transformer


def note(text: str) -> None:
    """Prints a note about the run to stderr."""
    tqdm.write(text, file=sys.stderr)


def say(text: str) -> None:
    """Prints a result above any progress bar, and at once, even if the output is a file."""
    tqdm.write(text)
    sys.stdout.flush()


@dataclass
class Table:
    """Some inputs of a task, and configurations to compare with the same full model on them."""

    task: Task
    examples: list[Example]
    available: int  # inputs that the examples were drawn from
    configurations: dict[str, Configuration]


class Setup:
    """The model, its tokenizer and the tasks of a command. Problems with the files are reported before
    anything is measured."""

    def __init__(self, config: EvalConfig, *outputs: str | Path | None, rows: Path | None = None):
        """`outputs`: files that the command writes at the end, which are opened now as a test; `rows`: one
        more, which may be the settings file."""
        self.config = config
        self.settings_file = settings_file(config.heads or config.checkpoint, config.settings)
        self.tasks = self.find_tasks()
        self.try_outputs(outputs, rows)
        self.model, self.tokenizer = load_checkpoint(config.checkpoint, **config.loading)
        if self.tokenizer is None:
            raise UserError(f"{config.checkpoint}: has no tokenizer, which these tasks need")
        self.chat = load_chat(config.checkpoint, self.tokenizer) if config.chat else None
        self.models = {None: self.model}  # by checkpoint; None: the command's own
        # The conditions of the run, for stderr and for the files:
        self.record = place_of_run(self.model)
        files = [Path(os.path.relpath(file)) for file in (config.checkpoint, config.heads) if file]
        self.record |= {"checkpoint": " with ".join(map(str, files)), "checkpoint_id": digest(*files)}
        self.record["split_of_data"] = config.split
        self.record |= {name: getattr(config, name) for name in ("limit", "repeat", "seed", "shots", "chat")}
        note(", ".join(f"{name} {value}" for name, value in self.record.items()))

    def find_tasks(self) -> list[Task]:
        """Returns the tasks of --tasks, else the included tasks that have entries in the settings file, else
        those of the included model. Raises UserError for two tasks of the same name."""
        in_file = read_settings_file(self.settings_file)
        included = [name for name in in_file if name in TASKS and TASKS[name].file]
        tasks = [find_task(name) for name in self.config.tasks or included or ["translation", "e2e"]]
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            twice = max(names, key=names.count)
            raise UserError(f"two tasks would be named {twice}; evaluate them one by one")
        return tasks

    def try_outputs(self, outputs: tuple[str | Path | None, ...], rows: Path | None) -> None:
        """Checks the files to write, and creates the folder for plots. Raises UserError, or OSError, for a
        file that cannot be written, or that would replace a file that is read."""
        config = self.config
        read = [config.checkpoint, config.heads, config.thresholds, config.shot_file]
        read += [config.loading.get("frequent_ids"), *(task.file for task in self.tasks)]
        check_outputs([*outputs], [*read, self.settings_file])
        check_outputs([rows], read)
        if config.plot:
            from evaluation.plots import make_folder

            make_folder(Path(config.plot))

    def model_of(self, checkpoint: str | None) -> Transformer:
        """Returns the model of a configuration: that of its own checkpoint, which is loaded once, or (None)
        the command's. Raises UserError for a checkpoint with another tokenizer."""
        if checkpoint not in self.models:
            options = self.config.loading | {"heads": None, "frequent_ids": None}
            self.models[checkpoint], tokenizer = load_checkpoint(checkpoint, **options)
            if tokenizer is None or tokenizer.to_blob() != self.tokenizer.to_blob():
                raise UserError(f"{checkpoint}: has a different tokenizer from {self.config.checkpoint}")
        return self.models[checkpoint]

    def tables(self, choose: Callable[[Task], dict[str, Configuration]]) -> list[Table]:
        """Returns the tables to measure. choose(task) returns the configurations for a task by name."""
        tables = []
        for task in self.tasks:
            task, examples = self.inputs(task)
            drawn = self.sample(examples)
            for configurations in by_baseline(choose(task)):
                tables.append(Table(task, drawn, len(examples), configurations))
        return tables

    def sample(self, examples: list[Example]) -> list[Example]:
        return sample(examples, self.config.limit, self.config.seed)

    def part(self, examples: list[Example], low: float, high: float) -> list[Example]:
        """Draws inputs of a part of the texts (see `between`), one of each text, so that they are
        independent. Raises UserError if there is none."""
        found = one_of_each_source(between(examples, low, high), self.config.seed)
        if not found:
            raise UserError("there are too few texts to split; give --tasks a larger file")
        return self.sample(found)

    def inputs(self, task: Task, split: str | None = None) -> tuple[Task, list[Example]]:
        """Returns the task with its shots, and all other inputs. Prints the malformed lines skipped."""
        config = self.config
        if task.openings and (config.chat or config.shots):
            raise UserError(f"{task.name}: continues a text; leave out --chat and --shots")
        skipped: list[str] | None = [] if config.skip_bad else None
        examples = read_task(task, split or config.split, skipped)
        shots = self.shots_of(task, skipped) if config.shots else []
        if skipped:
            say("\n".join([f"{task.name}: skipped {len(skipped)} malformed lines", *skipped]))
        left = [example for example in examples if example not in shots]
        if not left:
            raise UserError(f"shots is {config.shots}, which uses every input of {task.name}; use fewer")
        return replace(task.with_shots(shots), chat=self.chat), left

    def shots_of(self, task: Task, skipped: list[str] | None) -> list[Example]:
        """Draws the solved examples that precede every prompt."""
        config = self.config
        if not config.shot_file and "{}" not in task.file:
            raise UserError(f"{task.name}: name the file that the shots come from with --shot-file")
        solved = read_task(replace(task, file=str(config.shot_file or task.file)), "train", skipped)
        if config.shots > len(solved):
            available = f"{task.name} has {len(solved)} solved examples"
            raise UserError(f"shots is {config.shots}, but {available}; use fewer")
        return sample(solved, config.shots, config.seed)


def encode_inputs(
    setup: Setup, task: Task, examples: list[Example], configurations: dict[str, Configuration]
) -> tuple[list[list[int]], dict[str, Configuration]]:
    """Returns the token ids of the prompts, truncated on the left where they leave no room for an answer, and
    the configurations, preceded by the full model that they are compared with. The tokens that end an answer
    of this task are added to the stop tokens of each."""
    full = baseline(next(iter(configurations.values())).decode)
    configurations = {"full": Configuration(full, setup.model), **configurations}
    longest = max(each.decode.max_new_tokens for each in configurations.values())
    positions = min(each.model.config.max_len for each in configurations.values())
    if longest > positions - 2:
        raise UserError(f"max_new_tokens is {longest}; give at most {positions - 2} ({positions} positions)")
    inputs = [task.encode(example.prompt, setup.tokenizer, positions - longest) for example in examples]
    prompts, cut = zip(*inputs)
    if any(cut):
        room = f"to leave {longest} positions to the answer"
        note(f"{task.name}: {sum(cut)} of {len(cut)} prompts were cut on the left {room}")
    stops, stopping = task.stop_tokens(setup.tokenizer), {}
    for name, each in configurations.items():
        decode = replace(each.decode, stop_tokens=(*each.decode.stop_tokens, *stops))
        stopping[name] = replace(each, decode=decode)
    return list(prompts), stopping
