"""What every command shares: files written whole, JSON of others, errors in one line, flags and their groups,
threads."""

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common import flags
from common.config import Number, check_limits, forms, option, read_choice
from common.errors import UserError, run
from common.files import check_input, read_json, whole_file
from common.flags import Parser, add_flags, add_model_flags, as_text, loading, read_field, reader
from common.plugins import find_function

HERE = Path(__file__).parent.parent


# ---------------------------------------------------------------- files


def write(path, text: str) -> None:
    with whole_file(path) as part:
        Path(part).write_text(text)


def test_a_link_stays_one_and_the_file_that_it_points_to_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").read_text() == "new"
    (tmp_path / "dangling").symlink_to(tmp_path / "real" / "other")
    write(tmp_path / "dangling", "new")
    assert (tmp_path / "dangling").is_symlink() and (tmp_path / "real" / "other").read_text() == "new"
    assert not list(tmp_path.rglob("*.part"))


def test_what_is_to_be_read_must_be_a_file_and_a_folder_is_called_one(tmp_path):
    write(tmp_path / "file", "text")
    check_input(tmp_path / "file")
    with pytest.raises(UserError, match=r"none: no such file; look elsewhere$"):
        check_input(tmp_path / "none", "no such file; look elsewhere")
    with pytest.raises(UserError, match=rf"^{tmp_path}: is a folder; name a file in it$"):
        check_input(tmp_path)


def test_where_nothing_may_be_written_is_said_by_name(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*none to write to"):
        write(tmp_path / "none" / "file", "new")
    with pytest.raises(UserError, match="is not a regular file and is not replaced"):
        write(tmp_path, "new")
    (tmp_path / "file.part").mkdir()  # stands for a folder that is read-only, which root may write to
    with pytest.raises(OSError, match=r"file\.part"):
        write(tmp_path / "file", "new")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    said = pytest.raises(UserError, match=r"could not be written \(No space left")
    with said as error, whole_file(tmp_path / "file"), open("/dev/full", "w") as full:
        full.write("new")
    assert "\n" not in str(error.value) and (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("content, message", [
    (b"{", "not JSON"), (b'{"a": "\xff"}', "not JSON .*utf-8"), (b"[1]", "is not a JSON object"),
])  # fmt: skip
def test_json_that_cannot_be_used_is_one_line_that_names_the_file(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_json(tmp_path / "a.json", "settings")
    assert str(error.value).startswith(str(tmp_path / "a.json")) and "\n" not in str(error.value)


# ---------------------------------------------------------------- errors


def failing(error: Exception):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize("error", [
    UserError("a mistake"), FileNotFoundError(2, "not there", "some file"), OSError(28, "No space left on device"),
    torch.OutOfMemoryError("CUDA out of memory"),
])  # fmt: skip
def test_what_a_user_can_mend_is_one_line_and_status_2(error, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(failing(error))
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


def test_a_status_stays_and_ctrl_c_is_130():
    for error, status in ((SystemExit(1), 1), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as exit_:
            run(failing(error))
        assert exit_.value.code == status


def test_only_what_the_user_names_is_looked_for_in_the_current_folder(tmp_path, monkeypatch):
    """It may be a downloaded folder, whose modules must not stand in for packages."""
    (tmp_path / "users_own.py").write_text("def steady(trace, layer):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    found, before = [], list(sys.path)
    run(lambda: found.append(importlib.util.find_spec("users_own")))
    assert found == [None]
    assert find_function("confidence", "users_own:steady", {}, ("trace", "layer"))(None, 1) == 1.0
    monkeypatch.delitem(sys.modules, "users_own")
    assert sys.path == before and importlib.util.find_spec("users_own") is None


# ---------------------------------------------------------------- flags


@dataclass(frozen=True)
class Settings:
    first: int = option(1, "a first")
    rare: float = option(2.0, "a rare one", group="rare ones")
    second: tuple[int, ...] = option((3, 4), "a second")
    exotic: bool = option(False, "an exotic one", group="exotic ones")
    odd: str | None = option(None, "an odd one", group="rare ones")
    hidden: str = option("x", "one that few need", rare=True, choices=("x", "y"))


def test_flags_stand_in_groups_in_the_order_of_the_fields():
    parser = Parser("text")
    add_flags(parser, Settings(), "main")
    said = parser.format_help()
    order = ["main:", "--first", "--second", "rare ones:", "--rare", "--odd", "exotic ones:", "--exotic"]
    places = [said.rindex(word) for word in order]
    assert places == sorted(places) and "a second (default: 3,4)" in said
    assert flags.given(parser.parse_args(["--second", "5", "--odd", "none"]), Settings) == {"second": (5,), "odd": None}


def test_rare_flags_are_shown_by_help_all_only_and_taken_anyway(capsys):
    for words, shown in ((["--help"], False), (["--help-all"], True)):
        parser = Parser("text")
        add_flags(parser, Settings(), "main")
        with pytest.raises(SystemExit) as end:
            parser.parse_args(words)
        printed = capsys.readouterr().out
        assert end.value.code == 0 and "a first (default: 1)" in printed and ("one that few need" in printed) == shown
    assert parser.parse_args(["--hidden", "y"]).hidden == "y"


def test_an_unknown_setting_names_the_one_that_was_meant():
    parser = Parser("text")
    add_flags(parser, Settings(), "main")
    with pytest.raises(UserError, match=r"^unrecognized arguments: --secund=5; did you mean --second\?"):
        parser.parse_args(["--secund=5"])
    with pytest.raises(UserError, match=r"^unknown setting 'secund'; did you mean second\?"):
        read_field(Settings, "secund", "5")
    with pytest.raises(UserError, match="unrecognized arguments: --fir"):  # no shortened flags
        parser.parse_args(["--fir", "5"])


KNOWN = {"none": (), "fixed": (Number("K", 64, {"least": 2}),), "mlp": (Number("WIDTH"),),
         "both": (Number("K", 64), Number("SHARE", 0.5, {"above": 0}, float))}  # fmt: skip


def test_a_choice_is_read_with_its_numbers():
    texts = ("none", "fixed", "fixed:8", "mlp:256", "both", "both:3", "both:3:0.25")
    found = [read_choice("x", text, KNOWN) for text in texts]
    assert found == [("none", []), ("fixed", [64]), ("fixed", [8]), ("mlp", [256]), ("both", [64, 0.5]), ("both", [3, 0.5]),
                     ("both", [3, 0.25])]  # fmt: skip
    assert forms(KNOWN) == ["none", "fixed[:K]", "mlp:WIDTH", "both[:K][:SHARE]"]


@pytest.mark.parametrize("text, said", [
    ("fix", "unknown x 'fix'; choose from none, fixed\\[:K\\]"), ("none:3", "unknown x 'none:3'"), ("mlp", "unknown x 'mlp'"),
    ("", "unknown x ''"), ("both:1:2:3", "unknown x"), ("fixed:a", "K cannot be 'a'"), ("fixed:2.5", "K cannot be '2.5'"),
    ("fixed:", "K cannot be ''"), ("fixed:1", "K of x fixed:1 is 1; it must be at least 2"), ("both:3:nan", "is nan; it must be above 0"),
])  # fmt: skip
def test_what_is_no_choice_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        read_choice("x", text, KNOWN)


@dataclass(frozen=True)
class Limited:
    share: float = option(0.5, "a share", least=0, most=1)
    rate: float | None = option(None, "a rate", above=0)
    free: int = option(0, "anything")
    parts: tuple[float, ...] | None = option((), "several shares", least=0, most=1)
    word: str = option("up", "a word", choices=("up", "down"))


def test_a_value_outside_its_limits_is_named_alone_with_them():
    check_limits(Limited(1, math.inf, -5))
    for settings, said in (
        (Limited(1.5, -1), r"^share is 1.5; it must be at least 0 and at most 1$"),
        (Limited(math.nan), r"^share is nan; it must be at least 0 and at most 1$"),
        (Limited(parts=(0.5, 2.0)), r"^parts is 2.0; it must be at least 0 and at most 1$"),
        (Limited(word="left"), r"^unknown word 'left'; choose from up, down$"),
        (Limited(rate=0), r"^rate is 0; it must be above 0$"),
    ):
        with pytest.raises(UserError, match=said):
            check_limits(settings)


def parsed(*words: str):
    parser = Parser("text")
    add_model_flags(parser, "some.pt")
    return parser.parse_args(words)


@pytest.fixture
def threads():
    """The number of threads, put back at the end."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_threads_are_set_as_asked_and_left_alone_otherwise(threads):
    defaults = {"device": "cpu", "dtype": None, "form": None, "check": False, "frequent_ids": None, "heads": None}
    assert loading(parsed()) == defaults and torch.get_num_threads() == threads
    assert loading(parsed("--threads", "3", "--dtype", "bf16"))["dtype"] == torch.bfloat16
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("words, message", [
    (("--threads", "0"), "threads is 0; it must be at least 1 and at most 1024"), (("--dtype", "int3"), "--dtype: invalid choice: 'int3'"),
    (("--device", "mps"), "device 'mps' is not supported; choose cpu or cuda"),
])  # fmt: skip
def test_what_the_machine_cannot_be_is_refused(words, message, threads):
    with pytest.raises(UserError, match=message):
        loading(parsed(*words))


@pytest.mark.parametrize("kind, text, value", [
    (int, "3", 3), (int | None, "none", None), (tuple[int, ...], "4,8", (4, 8)), (tuple[int, ...], "none", ()),
    (tuple[float, ...] | None, "None", None), (tuple[str, ...], "a", ("a",)),
])  # fmt: skip
def test_settings_are_read_as_help_shows_them(kind, text, value):
    assert reader(kind)(text) == value == reader(kind)(as_text(value))


# ---------------------------------------------------------------- how threads wait


@pytest.mark.parametrize("module, variables, count", [
    *[(module, {}, "30000") for module in ("model", "confidence", "eval", "convert", "tools.bench")],
    ("model", {"GOMP_SPINCOUNT": "7"}, "7"), ("model", {"OMP_WAIT_POLICY": "PASSIVE"}, "None"),
])  # fmt: skip
def test_threads_spin_little_unless_the_user_says_otherwise(module, variables, count):
    """Seen from within torch's place: what an imported torch would find."""
    code = f"""
import os, sys
class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            os._exit(0)
sys.meta_path.insert(0, Torch())
import {module}
"""
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    out = subprocess.run([sys.executable, "-c", code], env={**clean, **variables}, cwd=HERE, capture_output=True, text=True)
    assert out.stdout.strip() == count
