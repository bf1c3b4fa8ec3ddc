"""The packages of this checkout and who may import whom: one table for the tests that prove it."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Package -> the packages of ours that it may import, directly or through others.
MAY_IMPORT = {
    "datastore": set(),
    "experiments": set(),
    "capture": {"datastore", "experiments"},
    "calibrate": {"datastore", "experiments"},
    "project": {"datastore", "experiments"},
    "view": {"calibrate", "datastore", "experiments", "project"},
}
# A recipe inside a package: it may import anything, and nothing imports it.
LEAF = "experiments.secret_number"
PACKAGES = tuple(package for package in MAY_IMPORT if (ROOT / package / "__init__.py").is_file())


def tracked(suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files of this checkout that end so, those that git ignores left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:  # a source archive
        tops = (*PACKAGES, "tests", "docs")
        names = [str(path.relative_to(ROOT)) for top in tops for path in (ROOT / top).rglob("*")]
    else:
        names = listed.stdout.splitlines()
    return sorted(path for name in names if (path := ROOT / name).is_file() and path.name.endswith(suffixes))


def sources(package: str) -> list[Path]:
    """Return the modules of a package."""
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree: ast.Module, *, anywhere: bool) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of what a module imports: anywhere in it, or only while it is being imported."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
        elif not anywhere and (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _only_for_types(node)):
            continue
        waiting.extend(ast.iter_child_nodes(node))


def _only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
