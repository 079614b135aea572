"""The settings of eval.py's commands."""

from dataclasses import dataclass, field

from common.config import check_limits, option
from common.errors import UserError
from evaluation.tasks import TASKS

# What some flags say of their values:
ABOUT_TASKS = f"of {', '.join(TASKS)}, each also as NAME=FILE; none: those of the settings file"
ABOUT_COMPARE = """rows of the settings file, recipes, confidence functions or full, each with changes, as in
softmax,my_file:stable+exit-layers=4,8,full+checkpoint=small.pt"""
ABOUT_RISK = "loss: consistency (1 - ROUGE-L to the full model's text), or task (how much lower its score is)"
ABOUT_SHOTS = "file with the examples of --shots; none: the task's training file"


@dataclass(frozen=True)
class EvalConfig:
    """The settings of all commands, each of which has flags for some of them, those needed first on top."""

    tasks: tuple[str, ...] | None = option(None, ABOUT_TASKS)
    limit: int = option(60, "inputs of each task, drawn by --seed; 0: all", least=0)
    compare: str | None = option(None, ABOUT_COMPARE)
    all: bool = option(False, "all rows of the settings file")
    wide: bool = option(False, "all figures, and the time of confidence checks")
    tolerance: float = option(0.05, "largest expected loss, between 0 and 1", above=0, most=0.99)
    error: float = option(0.05, "probability that the loss is larger, between 0 and 1", above=0, most=0.99)
    risk: str = option("consistency", ABOUT_RISK, choices=("consistency", "task"))
    out: str | None = option(None, "the file to write; none, for tune: the settings file")
    overwrite: bool = option(False, "replace the rows that the file has for these tasks")
    results: str = option("sweep.json", "the file where an interrupted sweep goes on")
    repeat: int = option(1, "how often an input is decoded; the median counts", least=1)
    json: str | None = option(None, "write all figures, also those of each prompt")
    plot: str | None = option(None, "draw pictures in this folder (needs matplotlib)", rare=True)
    html: str | None = option(None, "write a page that shows three inputs of each task, pass by pass")
    settings: str | None = option(None, "file of rows by task; none: next to the model or --heads", rare=True)
    split: str = option("test", "dev or test", choices=("dev", "test"))
    seed: int = option(0, "seed that draws the inputs, and samples", rare=True, least=0)
    shots: int = option(0, "solved examples before every prompt", rare=True, least=0)
    shot_file: str | None = option(None, ABOUT_SHOTS, rare=True)
    chat: bool = option(False, "inputs and shots are turns in a chat, by the model's template", rare=True)
    skip_bad: bool = option(False, "count and skip malformed lines of a data file", rare=True)

    # from flags that decode.py has, too, and from --over
    checkpoint: str = ""
    heads: str | None = None
    loading: dict = field(default_factory=dict)  # options of load_checkpoint
    thresholds: str | None = None
    decoding: dict = field(default_factory=dict)  # fields of DecodeConfig that flags give
    over: tuple = ()  # what is swept: lists of a field of DecodeConfig and its values

    def __post_init__(self):
        check_limits(self)
        if self.shot_file and not self.shots:
            raise UserError("--shot-file gives solved examples; say how many with --shots")
