"""The settings of eval.py's commands."""

from dataclasses import dataclass, field

from common.config import check_limits, option
from common.errors import UserError
from evaluation.tasks import TASKS

# The help of some flags:
ABOUT_TASKS = f"{', '.join(TASKS)}, each also as NAME=FILE (none: those of the settings)"
ABOUT_COMPARE = """entries of the settings file, recipes, confidence functions or full, with changes, as in
softmax,my_file:stable+exit-layers=4,8,full+checkpoint=small.pt"""
ABOUT_RISK = "consistency (1 - ROUGE-L to the full model's text) or task (how much the score drops)"
ABOUT_SHOTS = "file with the examples for --shots (none: the task's training file)"


@dataclass(frozen=True)
class EvalConfig:
    """The settings of all commands. Each command has flags for some of them; common flags come first."""

    tasks: tuple[str, ...] | None = option(None, ABOUT_TASKS)
    limit: int = option(60, "number of inputs from each task (0: all), drawn at random", least=0)
    compare: str | None = option(None, ABOUT_COMPARE)
    all: bool = option(False, "compare all entries of the settings file")
    wide: bool = option(False, "show all columns, also the time of confidence checks")
    tolerance: float = option(0.05, "largest expected risk allowed, between 0 and 1", above=0, most=0.99)
    error: float = option(0.05, "probability that the risk is larger, between 0 and 1", above=0, most=0.99)
    risk: str = option("consistency", ABOUT_RISK, choices=("consistency", "task"))
    out: str | None = option(None, "file to write (none, with tune: the settings file)")
    overwrite: bool = option(False, "replace the entries that the file has for these tasks")
    results: str = option("sweep.json", "file with the results, from which an interrupted sweep resumes")
    repeat: int = option(1, "decode every input this many times and use the median time", least=1)
    json: str | None = option(None, "write all figures to this file")
    plot: str | None = option(None, "draw plots in this folder (needs matplotlib)", rare=True)
    html: str | None = option(None, "write a page that shows three inputs of each task")
    settings: str | None = option(None, "settings file (none: that of the model or --heads)", rare=True)
    split: str = option("test", "use the dev or the test data", choices=("dev", "test"))
    seed: int = option(0, "seed for drawing inputs and for sampling", rare=True, least=0)
    shots: int = option(0, "number of solved examples before every prompt", rare=True, least=0)
    shot_file: str | None = option(None, ABOUT_SHOTS, rare=True)
    chat: bool = option(False, "put inputs and shots into the model's chat template", rare=True)
    skip_bad: bool = option(False, "skip malformed lines of a data file and count them", rare=True)

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
            raise UserError("--shot-file needs --shots, the number of examples")
        if self.compare and self.all:
            raise UserError("--all compares every settings entry; give only one of --all and --compare")
