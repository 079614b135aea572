"""What README and docs say: their commands parse, their links lead somewhere, and the included model is what
it should be."""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from decode import generate, load_checkpoint
from decoding.presets import DEFAULT_CHECKPOINT, read_configurations
from decoding.settings import DecodeConfig
from evaluation.configurations import MAIN
from evaluation.recipes import RECIPES
from formats.tokenizers.tokenizer import encode_prompt
from training.losses import find_loss

ROOT = Path(__file__).parent.parent
FOLDERS = (
    "common", "decoding", "evaluation", "exercises", "formats", "tools", "training", "tests", "checkpoints", "data", "docs",
)  # fmt: skip
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
PAGES += [ROOT / folder / "README.md" for folder in ("exercises", "data", "checkpoints")]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS["README.md"]
TOUR, EXTENDING = TEXTS["docs/tour.md"], TEXTS["docs/extending.md"]
PAPERS = "arxiv.org", "aclanthology.org", "openreview.net", "github.com"  # the sites that a link may lead to

LAUNCHER = r"(?:python|torchrun --\S+ \d+) "
SCRIPT = r"((?:(?:decode|train|eval|convert|minimal)\.py|-m (?:tools\.\w+|pytest))[^`\n<]*)"
COMMANDS = sorted({command for text in TEXTS.values() for command in re.findall(LAUNCHER + SCRIPT, text)})
INLINE, DEFINED = r"\[([^]\n]*)\]\(([^)\s]+)\)", r"(?m)^\[([^]\n]+)\]: +(\S+)$"  # [text](target), [text]: target
ALL_LINKS = sorted({(page, *link) for page, text in TEXTS.items() for link in re.findall(INLINE, text) + re.findall(DEFINED, text)})
LINKS = [link for link in ALL_LINKS if ":" not in link[2]]
OUTSIDE = [link for link in ALL_LINKS if ":" in link[2]]


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
    module = "decoding.command" if script == "decode.py" else script.removesuffix(".py")
    parser = importlib.import_module(module).make_parser()
    if words or script not in ("decode.py", "convert.py"):  # named alone in a sentence, these two lack what they need
        parser.parse_args(words)


def test_the_commands_are_found():
    first = {" ".join(command.split()[:2]) for command in COMMANDS}
    assert {f"eval.py {name}" for name in ("sweep", "calibrate", "tune", "prompt")} < first and len(COMMANDS) >= 40


def test_the_test_command_is_the_one_that_ci_runs():
    command = "pip install -r requirements.txt && python -m pytest"
    assert f"\n{command}\n" in README and command in (ROOT / ".ci" / "run").read_text()
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_the_functions_shown_are_taken(tmp_path, monkeypatch):
    """The confidence function, the loss and the lines of Python, each as docs/extending.md prints it."""
    stable, smooth, lines = python_blocks(EXTENDING)
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


def test_the_measured_table_of_readme_has_six_rows_and_at_most_eight_columns():
    marked = README[README.index("<!-- table: python eval.py -->") : README.index("<!-- end of table -->")]
    header, _, *rows = table_lines(marked)
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


# ---------------------------------------------------------------- links, pictures, names


@pytest.mark.parametrize("page, text, target", LINKS)
def test_every_link_and_picture_leads_to_a_file_here(page, text, target):
    assert (ROOT / page).parent.joinpath(target.split("#")[0]).is_file()


@pytest.mark.parametrize("page, text, target", OUTSIDE)
def test_every_other_link_is_the_address_of_a_paper_or_its_code(page, text, target):
    """Well-formed, that is: nothing is fetched."""
    address = urlsplit(target)
    assert address.scheme == "https" and address.netloc in PAPERS and not address.query and not address.fragment
    forms = {"arxiv.org": r"/abs/\d{4}\.\d{5}", "github.com": r"/[\w.-]+/[\w.-]+"}
    assert re.fullmatch(forms.get(address.netloc, r"/\S+"), address.path)
    assert len({target for _, _, target in OUTSIDE}) >= 15


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
    assert is_named_in("decode.plain", ROOT / "decode.py") and is_named_in("KVCache.climb", ROOT / "cache.py")
    assert not is_named_in("decode.splain", ROOT / "decode.py") and not is_named_in("Other.join", ROOT / "cache.py")
    assert len(CODE_LINKS) > 40


def test_the_tour_has_a_command_lines_to_read_and_a_folded_answer_at_every_stop():
    stops = re.split(r"^## (?=\d)", TOUR, flags=re.MULTILINE)[1:]
    assert len(stops) == 9
    for stop in stops:
        assert "python " in stop and "](../" in stop and "*Question.*" in stop
        assert stop.count("<details><summary>Answer</summary>") == stop.count("</details>") == 1


def test_every_recipe_has_a_section_and_its_command():
    methods = TEXTS["docs/methods.md"]
    headings = {heading.lower() for heading in re.findall(r"^### (.*)$", methods, re.MULTILINE)}
    assert headings >= {*RECIPES, "contrastive decoding"}
    assert all(f"python eval.py --compare {name} " in methods for name in RECIPES)


def test_the_version_to_cite_is_the_one_of_the_change_log():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version, date = (re.search(rf"^{field}: (\S+)$", citation, re.MULTILINE)[1] for field in ("version", "date-released"))
    assert f"\n## {version} ({date})\n" in TEXTS["CHANGELOG.md"]


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z]+@|TODO|TBD", "\n".join(TEXTS.values()))


# ---------------------------------------------------------------- the included model


def test_the_included_model_is_small_and_plain():
    assert DEFAULT_CHECKPOINT.stat().st_size < 25e6
    content = torch.load(DEFAULT_CHECKPOINT, weights_only=True)
    assert {weight.dtype for weight in content["weights"].values() if weight.dim() > 1} == {torch.float16}
    assert 8e6 <= sum(weight.numel() for weight in content["weights"].values()) <= 12e6


@pytest.mark.parametrize("task", ["translation", "e2e"])
def test_the_included_settings_fit_the_included_model(task):
    model, _ = load_checkpoint(DEFAULT_CHECKPOINT)
    rows = read_configurations(DEFAULT_CHECKPOINT.with_suffix(".json"), task)
    assert all(DecodeConfig(**fields).exits(model.config) for fields in rows.values())
    assert set(MAIN) <= set(rows) and {name.split()[0] for name in rows} == set(MAIN) and len(rows) == 14


def test_the_included_model_translates_and_describes():
    model, tokenizer = load_checkpoint(DEFAULT_CHECKPOINT)
    assert tokenizer.decode(generate(model, encode_prompt(tokenizer, "Ich liebe dich."), DecodeConfig()).tokens) == "I love you."
    facts = encode_prompt(tokenizer, "name[The Punter], eatType[pub], food[Italian]")
    text = tokenizer.decode(generate(model, facts, DecodeConfig()).tokens)
    assert "The Punter" in text and "Italian" in text and "pub" in text
