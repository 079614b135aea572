"""The exercises can be solved, and are not solved yet: every test of theirs fails with the stubs and passes
with the solutions."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "exercises"
NAMES = sorted(path.name for path in FOLDER.glob("[0-9]*.py"))


def read(path: Path) -> ModuleType:
    """The module in this file, a fresh one."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checks(exercise: ModuleType) -> list:
    """Its test functions."""
    return [value for name, value in vars(exercise).items() if name.startswith("test_")]


def passes(test) -> bool:
    try:
        test()
    except Exception:
        return False
    return True


def test_there_are_nine_each_with_a_text_a_test_and_a_solution():
    assert [name[:2] for name in NAMES] == [f"0{number}" for number in range(1, 10)]
    assert NAMES == sorted(path.name for path in (FOLDER / "solutions").glob("*.py"))
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        exercise = read(FOLDER / name)
        assert f"python -m pytest exercises/{name}" in exercise.__doc__ and checks(exercise) and name in readme


@pytest.mark.parametrize("name", NAMES)
def test_every_test_fails_before(name):
    exercise = read(FOLDER / name)
    assert not any(passes(test) for test in checks(exercise))


@pytest.mark.parametrize("name", NAMES)
def test_every_test_passes_with_the_solution(name):
    exercise, solution = read(FOLDER / name), read(FOLDER / "solutions" / name)
    for key, value in vars(solution).items():
        if getattr(value, "__module__", None) == solution.__name__:  # written there, not imported
            setattr(exercise, key, value)
    for test in checks(exercise):
        test()
