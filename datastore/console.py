"""What all command lines share: one command group with a default action, the flags, the error policy, JSON, progress.

Kept light on purpose: nothing here imports Zarr, xarray, pandas or torch, so that every `--help` answers at once. A
`commands.py` builds on it and imports what it computes with inside its commands.

Exit codes: 0 done, 1 failed, 2 misuse, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = [
    "DEFAULT_MEMORY",
    "CommandGroup",
    "Components",
    "DryRun",
    "Export",
    "Ids",
    "Input",
    "Interrupted",
    "Json",
    "Layers",
    "Limit",
    "Memory",
    "Out",
    "Scheduler",
    "Segment",
    "Where",
    "Workers",
    "Yes",
    "confirm",
    "emit_json",
    "human_bytes",
    "parse_bytes",
    "parse_list",
    "progress",
    "run",
    "stderr",
    "stdout",
    "warn",
]

DEFAULT_MEMORY = 1_000_000_000
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
PIPE_WIDTH = 200
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


# --- reading values -----------------------------------------------------------------------------------------------


def parse_bytes(text: str | int) -> int:
    """Read a size such as `1GB`, `512 MiB`, `1.5g` or `4096`.

    Parameters
    ----------
    text
        A positive number with an optional unit, in any case: k, M, G, T are powers of 1000; Ki, Mi, Gi, Ti of 1024.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    typer.BadParameter
        If it is not a size, or not at least one byte.

    Examples
    --------
    >>> parse_bytes("1GB"), parse_bytes("2 KiB")
    (1000000000, 2048)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", str(text), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise typer.BadParameter(f"{text!r} is not a size of at least one byte; write it like 1GB, 512MiB or 4096.")
    return size


def parse_list(text: str | None) -> tuple[str, ...] | None:
    """Read `71,73`, or `@file` with one entry a line; None stays None (nothing was asked).

    Raises
    ------
    typer.BadParameter
        If the file can't be read, or there is no entry at all: an empty choice is a mistake, not "everything".
    """
    if text is None:
        return None
    if text.startswith("@"):
        try:
            entries = Path(text[1:]).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise typer.BadParameter(f"The list {text[1:]!r} can't be read: {_sentence(error)}") from error
    else:
        entries = text.split(",")
    found = tuple(dict.fromkeys(stripped for entry in entries if (stripped := entry.strip())))
    if not found:
        raise typer.BadParameter(f"{text!r} names nothing; leave the option out to take all.")
    return found


# --- the flags, the same in every package -------------------------------------------------------------------------

Ids = Annotated[
    str | None,
    typer.Option("--ids", "--prompt-ids", metavar="ID,ID|@FILE", help="Only these rollouts."),
]
Where = Annotated[
    str | None,
    typer.Option("--where", metavar="QUERY", help="Only rollouts whose row of the rollout table satisfies this query."),
]
Layers = Annotated[
    str | None,
    typer.Option("--layers", metavar="SPEC", help="Layers: all, 16, 5,10, 5-20, 0-75:5, 30%-60%, 50%."),
]
Components = Annotated[
    str | None,
    typer.Option("--components", metavar="NAME,NAME", help="Which tensors of each layer."),
]
Segment = Annotated[
    str | None,
    typer.Option("--segment", metavar="prompt|response", help="Only the tokens of this segment."),
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="At most the first N rollouts.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output: one JSON document on standard output.")]
Export = Annotated[str | None, typer.Option("--export", metavar="FORMAT", help="Write the result in this format.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="PATH", help="Where to write.")]
Memory = Annotated[
    int,
    typer.Option("--memory", metavar="SIZE", parser=parse_bytes, show_default="1GB", help="Memory to stay under."),
]
Scheduler = Annotated[
    str | None,
    typer.Option("--scheduler", metavar="ADDRESS", help="A dask scheduler: tcp://host:8786, or its .json file."),
]
Workers = Annotated[
    int | None, typer.Option("--workers", metavar="N", min=1, help="Processes to start on this machine.")
]
Input = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="PATH", help="Transcripts: a file, a directory or a quoted glob; repeatable."),
]


# --- the command group --------------------------------------------------------------------------------------------


class _Group(TyperGroup):
    """Subcommands beside one command that runs when none of them is named."""

    default: str | None = None

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if self.default is not None and self._is_for_default(words):
            return self.commands[self.default].main(words, *rest, **extra)
        return super().main(words, *rest, **extra)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        own = self.params
        self.params = [*self._default_params(), *own]
        try:
            super().format_help(ctx, formatter)
        finally:
            self.params = own

    def _default_params(self) -> list[Any]:
        return self.commands[self.default].params if self.default is not None else []

    def _is_for_default(self, words: Sequence[str]) -> bool:
        if not words or words[0].startswith("-"):
            return words[:1] != ["--help"]
        # A word that is no subcommand is the default's argument if it takes one, else a slip worth a suggestion.
        takes_words = any(param.param_type_name == "argument" for param in self._default_params())
        return takes_words and words[0] not in self.commands


class CommandGroup(typer.Typer):
    """The command line of one package: subcommands, and perhaps a default action beside them.

    With `default="capture"`, the command registered under that name runs when the first word is not a subcommand:
    `python -m capture --store run.zarr` is the default action, `python -m capture import SRC` a subcommand, and
    `python -m view run.zarr` a default action with an argument. `--help` shows the default's options and the
    subcommands together. A file that is called like a subcommand is reached as `./import`.

    Parameters
    ----------
    help
        The first lines of `--help`.
    default
        Name of the default command; register it with `@app.command(default, hidden=True)`. None: a subcommand must
        be named, and none at all prints the help.
    """

    def __init__(self, *, help: str, default: str | None = None) -> None:
        super().__init__(
            cls=type("_GroupWithDefault", (_Group,), {"default": default}),
            help=help,
            callback=_no_action,  # without one, a group of one command would lose that command's name
            no_args_is_help=default is None,
            subcommand_metavar="COMMAND [ARGS]..." if default is None else "| COMMAND [ARGS]...",
            add_completion=False,
            pretty_exceptions_enable=False,
        )


def _no_action() -> None:
    """Stand for the group itself, which does nothing before its commands."""


# --- running, and what the shell gets back ------------------------------------------------------------------------


class Interrupted(Exception):
    """Ctrl-C came, and the command has put things in order; the text says how to go on."""

    exit_code = EXIT_INTERRUPTED


def run(app: typer.Typer, args: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and leave the interpreter with its exit code.

    An exception with an `exit_code` (the errors of every package, and misuse found by the parser) and an OSError are
    one sentence on standard error, never a traceback. Anything else is a bug and keeps its traceback.

    Parameters
    ----------
    app
        The command group.
    args
        The words after the program's name; None takes those of the process.
    """
    sys.exit(_status(app, args))


def _status(app: typer.Typer, args: Sequence[str] | None) -> int:
    try:
        result = typer.main.get_command(app).main(args, standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has enough. Python flushes again at exit, which must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except typer.Abort:
        return _fail("Stopped; nothing more was done.", EXIT_FAILED)
    except Exception as error:
        code = getattr(error, "exit_code", EXIT_FAILED if isinstance(error, OSError) else None)
        if code is None:
            raise
        return _fail(_sentence(error), code, hint=_help_hint(error))
    if result == EXIT_INTERRUPTED:  # a KeyboardInterrupt that no command answered
        return _fail("Interrupted.", EXIT_INTERRUPTED)
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int, *, hint: str = "") -> int:
    if message:
        print(f"error: {message}", hint, sep="\n" if hint else "", file=sys.stderr)
    return code


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        named = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{named}: {error.strerror}." if named else f"{error.strerror}."
    shown = getattr(error, "format_message", None)
    if isinstance(error, typer.BadParameter) and error.param is None:
        return error.message  # our own, which names the option; the parser's begins with the one it was at
    return str(shown() if shown else error)


def _help_hint(error: BaseException) -> str:
    context = getattr(error, "ctx", None)
    return f"Try '{context.command_path} --help'." if context is not None else ""


# --- writing ------------------------------------------------------------------------------------------------------


def stdout() -> Console:
    """Return a rich console on standard output, for tables and results; plain text when that is not a terminal.

    A pipe has no width: tables get room enough not to be cut.
    """
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def stderr() -> Console:
    """Return a rich console on standard error, for all that is not the result."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def warn(message: str) -> None:
    """Say on standard error what the reader of the result should know."""
    print(f"warning: {message}", file=sys.stderr)


def emit_json(value: object) -> None:
    """Write one JSON document to standard output.

    NumPy scalars and arrays, paths, dataclasses, sets and mappings are written as plain JSON; NaN and infinities,
    which JSON lacks, as null.
    """
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [_plain(item) for item in sorted(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays, without importing NumPy for it
        return _plain(value.tolist())
    return str(value)


def human_bytes(size: float) -> str:
    """Return a size in powers of 1000 with three digits, such as `1.43 GB`.

    Examples
    --------
    >>> human_bytes(999), human_bytes(1_430_000_000)
    ('999 B', '1.43 GB')
    """
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.5 or unit == "TB":
            break
    return f"{size:.{max(0, 2 - int(math.log10(size)))}f} {unit}"


def confirm(question: str, *, yes: bool) -> None:
    """Go on only if `--yes` was given or a person at a terminal agrees.

    Raises
    ------
    typer.BadParameter
        If there is nobody to ask: a script must say `--yes`.
    typer.Abort
        If the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"{question} Nobody is at the terminal to answer; give --yes to go on.")
    typer.confirm(question, abort=True, err=True)


@contextlib.contextmanager
def progress(*, quiet: bool = False) -> Iterator[Progress]:
    """Show progress bars on standard error while the block runs; nothing when it is quiet or not a terminal.

    Parameters
    ----------
    quiet
        Show nothing, as with `--json`.

    Yields
    ------
    rich.progress.Progress
        `task = bar.add_task("capture", total=n, note="")`, then `bar.update(task, advance=1, note="812 tokens/s")`:
        the note stands behind the count.
    """
    from rich import progress as bars

    console = stderr()
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[note]}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, disable=quiet or not console.is_terminal) as shown:
        yield shown
