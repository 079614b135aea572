"""What README and docs say: their commands parse, their links lead somewhere, and the embedded model is what
it should be."""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from decode import generate
from decoding.choosing import DEFAULT_CHECKPOINT
from decoding.settings import DecodeConfig
from evaluation.recipes import RECIPES
from evaluation.rows import MAIN, read_settings
from evaluation.tasks import find_task
from formats.tokenizer import encode_prompt
from model import load_checkpoint
from training.losses import find_loss

ROOT = Path(__file__).parent.parent
FOLDERS = (
    "common", "decoding", "evaluation", "exercises", "formats", "tools", "training", "tests", "checkpoints", "data", "docs",
)  # fmt: skip
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += [ROOT / folder / "README.md" for folder in ("exercises", "data", "checkpoints")]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS["README.md"]
TOUR, STUDY = TEXTS["docs/tour.md"], TEXTS["docs/study.md"]

LAUNCHER = r"(?:python|torchrun --\S+ \d+) "
SCRIPT = r"((?:(?:decode|train|eval|convert|minimal)\.py|-m (?:tools\.\w+|pytest))[^`\n<]*)"
COMMANDS = sorted({command for text in TEXTS.values() for command in re.findall(LAUNCHER + SCRIPT, text)})
LINKS = sorted({(page, *link) for page, text in TEXTS.items() for link in re.findall(r"\[([^]\n]*)\]\(([^)\s]+)\)", text)})


def python_blocks(text: str) -> list[str]:
    """The code of every ```python block."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    script, *words = shlex.split(command.removesuffix("-->").rstrip(" ,.;:)"), comments=True)
    if script == "minimal.py":
        assert not any(word.startswith("-") for word in words)
        return
    if script == "-m":
        script, *words = words
        if script == "pytest":
            assert all((ROOT / word).is_file() for word in words if word.endswith(".py")), words
            return
    parser = importlib.import_module(script.removesuffix(".py")).make_parser()
    if words or script not in ("decode.py", "convert.py"):  # named alone in a sentence, these two lack what they need
        parser.parse_args(words)


def test_the_commands_are_found():
    scripts = {command.split()[0] for command in COMMANDS}
    assert scripts >= {"convert.py", "decode.py", "train.py", "eval.py", "minimal.py", "-m"} and len(COMMANDS) >= 40
    assert {command.split()[1] for command in COMMANDS if command.startswith("eval.py ")} >= {"sweep", "calibrate", "tune", "prompt"}


def test_the_test_command_is_the_one_that_ci_runs():
    command = "pip install -r requirements.txt && python -m pytest"
    assert f"\n{command}\n" in README and command in (ROOT / ".ci" / "run").read_text()
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_the_functions_shown_in_readme_are_taken(tmp_path, monkeypatch):
    """The confidence function, the loss and the lines of Python, each as README prints it."""
    stable, smooth, lines = python_blocks(README)
    (tmp_path / "my_file.py").write_text(f"{stable}\n{smooth}")
    monkeypatch.delitem(sys.modules, "my_file", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)
    settings = DecodeConfig(confidence="my_file:stable", exit_layers=(4, 6, 8), max_new_tokens=4)
    model, tokenizer = load_checkpoint(DEFAULT_CHECKPOINT)
    out = generate(model, encode_prompt(tokenizer, "Guten Morgen!"), settings)
    assert {value for asked in out.confidences for value in asked.values()} <= {0.0, 1.0} and min(out.exit_layers) < 12
    assert find_loss("my_file:smooth").__name__ == "smooth"
    exec(lines, {})
    monkeypatch.delitem(sys.modules, "my_file")


def test_the_staircase_shown_in_the_tour_never_rises(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = python_blocks(TOUR)
    exec(code, {})
    for line in capsys.readouterr().out.splitlines():
        heights = ast.literal_eval(line[line.index("[") :])
        assert heights == sorted(heights, reverse=True) and len(heights) == 12


# ---------------------------------------------------------------- README's limits, the file list


def test_readme_is_one_page():
    assert len(README.splitlines()) < 200 and len(README.encode()) < 14_000
    assert max(map(len, table_lines(README))) <= 100


def test_readme_has_one_table_of_six_rows_and_at_most_eight_columns():
    header, _, *rows = table_lines(README)
    assert [row.split("|")[1].strip() for row in rows] == ["full", *MAIN] and header.count("|") - 1 <= 8
    assert README.count("<!-- table: python eval.py -->") == 1


def test_the_file_list_is_complete():
    listed = re.findall(r"^    (\w+\.py|\w+/)  +\S", README, re.MULTILINE)
    there = {path.name for path in ROOT.glob("*.py")} | {f"{name}/" for name in FOLDERS}
    assert set(listed) == there and len(listed) == len(there)


def test_every_folder_is_one_of_those_listed():
    made = {"__pycache__", "runs", "pictures", "build", "dist", "venv"}  # what commands and tools leave
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert folders - made <= set(FOLDERS)


def test_every_exercise_is_listed_and_its_test_command_given():
    exercises = TEXTS["exercises/README.md"]
    for path in ROOT.glob("exercises/[0-9]*.py"):
        assert f"`{path.name}`" in exercises, path.name
    assert "python -m pytest exercises/01_margin.py" in exercises


# ---------------------------------------------------------------- links, pictures, names


@pytest.mark.parametrize("page, text, target", LINKS)
def test_every_link_and_picture_leads_to_a_file_here(page, text, target):
    assert (ROOT / page).parent.joinpath(target.split("#")[0]).is_file()


def names_in(path: Path) -> set[str]:
    """The functions and classes of a file; methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def is_named_in(name: str, path: Path) -> bool:
    """Whether a link's text names a function, class or method of the file: `rotate`,
    `training/losses.rotate`, `Trace.prune`, or a method alone."""
    names = names_in(path)
    name = name.rpartition("/")[2].removeprefix(f"{path.stem}.")
    return name in names or any(each.endswith(f".{name}") for each in names if "." in each)


CODE_LINKS = [(page, text, target) for page, text, target in LINKS if target.endswith(".py") and not text.endswith(".py")]


@pytest.mark.parametrize("page, text, target", CODE_LINKS)
def test_every_function_that_a_link_names_is_there(page, text, target):
    assert is_named_in(text, (ROOT / page).parent / target)


def test_names_are_looked_for_and_not_found_where_they_are_not():
    assert is_named_in("decode.plain", ROOT / "decode.py") and is_named_in("KVCache.join", ROOT / "cache.py")
    assert not is_named_in("decode.splain", ROOT / "decode.py") and not is_named_in("Other.join", ROOT / "cache.py")
    assert len(CODE_LINKS) > 40


def test_the_tour_has_a_command_lines_to_read_and_a_folded_answer_at_every_stop():
    stops = re.split(r"^## (?=\d)", TOUR, flags=re.MULTILINE)[1:]
    assert len(stops) == 9
    for stop in stops:
        assert "python " in stop and "](../" in stop and "*Question.*" in stop
        assert stop.count("<details><summary>Answer</summary>") == stop.count("</details>") == 1


def test_every_recipe_has_a_section_and_its_command():
    recipes = TEXTS["docs/recipes.md"]
    headings = {heading.lower() for heading in re.findall(r"^## (.*)$", recipes, re.MULTILINE)}
    assert headings == {*RECIPES, "contrastive decoding"}
    assert all(f"python eval.py --rows {name} " in recipes for name in RECIPES)


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z]+@|TODO|TBD", "\n".join(TEXTS.values()))


# ---------------------------------------------------------------- the embedded model


def test_the_embedded_model_is_small_and_plain():
    assert DEFAULT_CHECKPOINT.stat().st_size < 25e6
    content = torch.load(DEFAULT_CHECKPOINT, weights_only=True)
    assert {weight.dtype for weight in content["weights"].values() if weight.dim() > 1} == {torch.float16}
    assert 8e6 <= sum(weight.numel() for weight in content["weights"].values()) <= 12e6


@pytest.mark.parametrize("task", ["translation", "e2e"])
def test_the_embedded_settings_fit_the_embedded_model(task):
    model, _ = load_checkpoint(DEFAULT_CHECKPOINT)
    rows = read_settings(DEFAULT_CHECKPOINT.with_suffix(".json"), find_task(task), model, {})
    assert set(MAIN) <= set(rows) and {name.split()[0] for name in rows} == set(MAIN) and len(rows) == 14


def test_the_embedded_model_translates_and_describes():
    model, tokenizer = load_checkpoint(DEFAULT_CHECKPOINT)
    assert tokenizer.decode(generate(model, encode_prompt(tokenizer, "Ich liebe dich."), DecodeConfig()).tokens) == "I love you."
    facts = encode_prompt(tokenizer, "name[The Punter], eatType[pub], food[Italian]")
    text = tokenizer.decode(generate(model, facts, DecodeConfig()).tokens)
    assert "The Punter" in text and "Italian" in text and "pub" in text
