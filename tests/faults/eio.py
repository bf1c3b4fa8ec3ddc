"""The library `eio.c`, compiled here, and what a process does under it: one call of one kind fails, then it tells.

Preloaded, the library stands between a process and the C library, so that it meets Python, Zarr, NumPy and torch alike.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import typer

from datastore import console

SOURCE = Path(__file__).with_name("eio.c")
KINDS = ("open", "create", "read", "write", "sync", "rename", "list")
"""As the enumeration in the source has them: calls that open, create, read, write, sync, rename or link, and list."""


def may_compile() -> bool:
    """Whether there is a compiler, and a system that preloads libraries."""
    return sys.platform == "linux" and shutil.which("cc") is not None


def compiled(directory: Path) -> Path:
    """Compile the library into a directory and return its path."""
    library = directory / "eio.so"
    words = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl", "-lpthread"]
    subprocess.run(words, check=True, capture_output=True, text=True)
    return library


def under(log: str, fault: str, call: str, *arguments: str) -> None:
    """Do a task in this process as a command does, let a call of it fail, and write down what was seen.

    Parameters
    ----------
    log : str
        JSON is written here: `seen`, the calls of each kind, and `failed`, the paths of those that failed.
    fault : str
        JSON: folder, index of the kind, which call of that kind (0: none), errno, whether all that follow fail too.
    call : str
        `module:function`, and its arguments.
    """
    library = ctypes.CDLL(None)
    library.fault_seen.restype, library.fault_path.restype = ctypes.c_long, ctypes.c_char_p
    module, _, name = call.partition(":")
    function, app = getattr(import_module(module), name), typer.Typer()
    folder, kind, at, error, lasting = json.loads(fault)
    app.command()(lambda: function(*arguments))
    library.fault_arm(folder.encode(), kind, ctypes.c_long(at), error, int(lasting))
    try:
        console.run(app, [])
    finally:
        library.fault_disarm()
        seen = {one: library.fault_seen(place) for place, one in enumerate(KINDS)}
        Path(log).write_text(json.dumps({"seen": seen, "failed": library.fault_path().decode().splitlines()}))
