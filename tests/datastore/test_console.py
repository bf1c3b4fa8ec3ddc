"""Tests of the shared command line: which command runs, what it is given, and what the shell gets back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from datastore import console

HEAVY = ("zarr", "xarray", "pandas", "numpy", "torch", "transformers", "dask")


@dataclass
class Calls:
    """What the commands of a group were called with."""

    seen: list[tuple[str, Any]]


def group(calls: Calls, *, argument: bool = False) -> console.CommandGroup:
    """Build a group with a default action (with an argument or without) and the subcommand `import`."""
    app = console.CommandGroup(help="Put rows in.", default="capture")

    if argument:

        @app.command("capture", hidden=True)
        def view(store: Annotated[str, typer.Argument(help="The store.")], port: int = 80) -> None:
            calls.seen.append(("capture", (store, port)))

    else:

        @app.command("capture", hidden=True)
        def capture(
            *,
            store: Annotated[str, typer.Option(help="The store.")],
            ids: console.Ids = None,
            memory: console.Memory = console.DEFAULT_MEMORY,
        ) -> None:
            calls.seen.append(("capture", (store, ids, memory)))

    @app.command("import")
    def import_(source: Annotated[str, typer.Argument()], *, yes: console.Yes = False) -> None:
        """Bring rows over."""
        calls.seen.append(("import", (source, yes)))

    return app


def status(app: typer.Typer, *words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        console.run(app, words)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.parametrize(
    ("argument", "words", "expected"),
    [
        (False, ["--store", "a.zarr"], ("capture", ("a.zarr", None, 10**9))),
        (False, ["--store", "import", "--ids", "1,2"], ("capture", ("import", "1,2", 10**9))),
        (False, ["--prompt-ids", "7", "--store", "a", "--memory", "2MiB"], ("capture", ("a", "7", 2**21))),
        (False, ["import", "src"], ("import", ("src", False))),
        (False, ["import", "capture", "-y"], ("import", ("capture", True))),
        (True, ["run.zarr"], ("capture", ("run.zarr", 80))),
        (True, ["--port", "81", "run.zarr"], ("capture", ("run.zarr", 81))),
        (True, ["./import"], ("capture", ("./import", 80))),
        (True, ["import", "src"], ("import", ("src", False))),
    ],
)
def test_the_first_word_chooses_the_command(argument: bool, words: list[str], expected: tuple[str, Any]) -> None:
    calls = Calls([])
    assert status(group(calls, argument=argument), *words) == 0
    assert calls.seen == [expected]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing option '--store'"),
        (["improt", "x"], "No such command 'improt'. Did you mean 'import'?\nTry '"),
        (["--store"], "requires an argument"),
        (["--store", "a", "--memory", "lots"], "'lots' is not a size of at least one byte; write it like 1GB"),
        (["import"], "Missing argument"),
    ],
)
def test_misuse_is_one_sentence_and_a_hint(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    calls = Calls([])
    assert status(group(calls), *words) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("error: ")
    assert len(shown.err.splitlines()) <= 2
    assert shown.out == ""
    assert calls.seen == []


def test_help_shows_the_options_of_the_default_and_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    calls = Calls([])
    assert status(group(calls), "--help") == 0
    shown = capsys.readouterr().out
    for part in ("Put rows in.", "--store", "--prompt-ids", "--memory", "1GB", "import", "Bring rows over.", "--help"):
        assert part in shown
    assert status(group(calls), "import", "--help") == 0
    assert "--store" not in capsys.readouterr().out
    assert calls.seen == []


def test_help_leaves_the_commands_as_they_were() -> None:
    calls = Calls([])
    app = group(calls)
    assert [status(app, "--help"), status(app, "import", "src"), status(app, "--store", "a")] == [0, 0, 0]
    assert [name for name, _ in calls.seen] == ["import", "capture"]


def test_a_group_without_default_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    app = console.CommandGroup(help="Look at a store.")
    app.command("info")(lambda: None)
    assert status(app) == 2
    shown = capsys.readouterr()
    assert "info" in shown.out
    assert "error" not in shown.err
    assert status(app, "info") == 0


class Refused(Exception):
    """An error of some package."""

    exit_code = 1


class Misused(Exception):
    """An error of some package that is the caller's."""

    exit_code = 2


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (Refused("The store is full; delete something."), 1, "error: The store is full; delete something.\n"),
        (Misused("No layer 99; the store has 0, 1."), 2, "error: No layer 99; the store has 0, 1.\n"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), 1, "error: a.json: No such file or directory.\n"),
        (console.Interrupted("Stopped; go on with the same command."), 130, "error: Stopped; go on with the same"),
        (KeyboardInterrupt(), 130, "error: Interrupted.\n"),
        (typer.Abort(), 1, "error: Stopped; nothing more was done.\n"),
        (typer.Exit(1), 1, ""),
        (typer.Exit(0), 0, ""),
    ],
)
def test_how_a_command_ends(
    raised: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    app = console.CommandGroup(help="Fail.", default="fail")

    @app.command("fail")
    def fail() -> None:
        raise raised

    assert status(app) == code
    shown = capsys.readouterr()
    assert shown.err.startswith(message)
    assert bool(shown.err) == bool(message)
    assert shown.out == ""


def test_a_bug_keeps_its_traceback() -> None:
    app = console.CommandGroup(help="Fail.", default="fail")

    @app.command("fail")
    def fail() -> None:
        raise ZeroDivisionError("the bug")

    with pytest.raises(ZeroDivisionError, match="the bug"):
        console.run(app, [])


SCRIPT = """
    import sys
    from datastore import console
    app = console.CommandGroup(help="Count.", default="count")

    @app.command("count", hidden=True)
    def count(*, upto: int = 100000, note: bool = False) -> None:
        with console.progress(quiet=False) as bar:
            task = bar.add_task("count", total=upto, note="n")
            for number in range(upto):
                print(number)
            bar.update(task, completed=upto)

    console.run(app)
"""


def script(path: Path) -> list[str]:
    path.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    return [sys.executable, str(path)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(console.__file__).parents[1])}


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    command = " ".join(script(tmp_path / "count.py")) + " | head -n 1"
    done = subprocess.run(command, shell=True, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
    assert done.stderr == ""


def test_progress_is_silent_when_not_at_a_terminal(tmp_path: Path) -> None:
    command = [*script(tmp_path / "count.py"), "--upto", "3"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "0\n1\n2\n"
    assert done.stderr == ""


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    heavy = f"import atexit, sys; atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules]))"
    path = tmp_path / "count.py"
    script(path)
    path.write_text(f"{heavy}\n{path.read_text(encoding='utf-8')}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(path), "--help"], env=environment(), capture_output=True, text=True, check=True
    )
    assert "--upto" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GB", 10**9), ("1g", 10**9), ("512 MiB", 2**29), ("1.5kB", 1500), ("4096", 4096), (7, 7), ("2TiB", 2**41)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert console.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "GB", "-1", "1XB", "1 G B", "0.2", "nan", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a size of at least one byte"):
        console.parse_bytes(text)


@given(st.integers(1, 10**15))
def test_a_shown_size_is_read_back_to_three_digits(size: int) -> None:
    shown = console.human_bytes(size)
    assert abs(console.parse_bytes(shown) - size) <= 0.005 * size
    assert len([digit for digit in shown if digit.isdigit()]) <= 4


def test_lists(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("71\n\n 73 \n71\n", encoding="utf-8")
    assert console.parse_list(None) is None
    assert console.parse_list("71, 73,71") == ("71", "73")
    assert console.parse_list(f"@{path}") == ("71", "73")


def test_lists_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="'' names nothing; leave the option out to take all"):
        console.parse_list("")
    with pytest.raises(typer.BadParameter, match=r"The list '.*missing' can't be read: .*No such file"):
        console.parse_list(f"@{tmp_path / 'missing'}")


def test_json_holds_what_the_commands_have(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit_json(
        {
            1: np.float32(1.5),
            "array": np.arange(3, dtype=np.int8),
            "nan": float("nan"),
            "infinite": np.array([np.inf, 1.0]),
            "path": Path("a/b"),
            "set": {"b", "a"},
            "record": Calls([("é", None)]),
            "flag": np.bool_(True),
        }
    )
    assert json.loads(capsys.readouterr().out) == {
        "1": 1.5,
        "array": [0, 1, 2],
        "nan": None,
        "infinite": [None, 1.0],
        "path": "a/b",
        "set": ["a", "b"],
        "record": {"seen": [["é", None]]},
        "flag": True,
    }


def test_a_question_without_a_person_needs_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    console.confirm("Delete it?", yes=True)
    with open(os.devnull, encoding="utf-8") as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        with pytest.raises(typer.BadParameter, match=r"Delete it\? Nobody is at the terminal to answer; give --yes"):
            console.confirm("Delete it?", yes=False)


def test_a_warning_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    console.warn("two rollouts are empty")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "warning: two rollouts are empty\n")
