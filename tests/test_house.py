"""The house numbers, counted: length of files and functions, parameters, tables of contents, no machine's paths."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import house

MOST_LINES_OF_A_FILE = 600
MOST_LINES_OF_A_FUNCTION = 40
MOST_POSITIONAL = 3
# "datastore/x.py:f" -> why it may be longer, or take more.
LONGER: dict[str, str] = {
    "capture/commands.py:capture": "the main command: its body hands thirty flags on, a line each",
    "project/commands.py:project": "the same",
}
WIDER = {
    "capture/experts_triton.py:_kernel": "Triton passes a kernel's parameters by position",
    "capture/forward.py:__call__": "where rows go and the rows, as Writer.put takes them",
    "capture/runner.py:_put": "the same",
    "capture/runner.py:run": "model, tokenizer, rollouts, store: the call of the design, in the order one says it",
    "datastore/compiled.py:add_tiles": "numba compiles one signature ahead of its first use, by position",
    "datastore/compiled.py:_widen": "numba does not bind keyword-only parameters of such a function",
    "datastore/writer.py:put": "component, layer, rollout and their rows: one place and what goes there",
}

CODE = [path for package in house.PACKAGES for path in house.sources(package)]
PYTHON = house.tracked((".py",))
MACHINE_PATH = re.compile(r"(?<![\w.)}])/(?:home|Users|root|work|mnt|opt)/\w|\b[A-Z]:\\\\?Users\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def shown(path: Path) -> str:
    return path.relative_to(house.ROOT).as_posix()


def functions(path: Path) -> Iterator[tuple[str, Function, bool]]:
    """Yield where it is, the function, and whether it is a method."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owners = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield f"{shown(path)}:{node.name}", node, isinstance(owners.get(id(node)), ast.ClassDef)


def body_lines(node: Function) -> int:
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body and body[-1].end_lineno else 0


def positional(node: Function, *, method: bool) -> int:
    static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)
    return len(node.args.posonlyargs) + len(node.args.args) - (method and not static)


@pytest.mark.parametrize("path", PYTHON, ids=shown)
def test_a_file_is_short_and_says_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES_OF_A_FILE
    assert not text.strip() or (ast.get_docstring(ast.parse(text)) or "").strip(), "its first line says what it is for"


@pytest.mark.parametrize("path", PYTHON, ids=shown)
def test_functions_are_short(path: Path) -> None:
    long = {name: lines for name, node, _ in functions(path) if (lines := body_lines(node)) > MOST_LINES_OF_A_FUNCTION}
    assert not {name: lines for name, lines in long.items() if name not in LONGER}


@pytest.mark.parametrize("path", CODE, ids=shown)
def test_functions_take_few_positional_parameters(path: Path) -> None:
    counts = {name: positional(node, method=method) for name, node, method in functions(path)}
    assert not {name: count for name, count in counts.items() if count > MOST_POSITIONAL and name not in WIDER}


@pytest.mark.parametrize("path", PYTHON, ids=shown)
def test_no_relative_imports(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize("package", house.PACKAGES)
def test_a_package_lists_all_it_offers(package: str) -> None:
    """Every name in `__all__` is there, and every public name is in `__all__`; ruff keeps it sorted."""
    path = house.ROOT / package / "__init__.py"
    offered = importlib.import_module(package).__all__
    assert len(set(offered)) == len(offered)
    assert [name for name in offered if not hasattr(importlib.import_module(package), name)] == []
    assert public_names(ast.parse(path.read_text(encoding="utf-8")), package) - set(offered) == set()


def public_names(tree: ast.Module, package: str) -> set[str]:
    """Return what an `__init__.py` defines or takes from its own modules, for types only or for all."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == package:
            found |= {name.asname or name.name for name in node.names}
    found |= {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    return {name for name in found if not name.startswith("_")}


def test_no_file_knows_a_machine() -> None:
    texts = house.tracked((".py", ".md", ".toml", ".txt", ".yml", ".json", "Makefile", ".ci/run"))
    found = [
        f"{shown(path)}:{number}: {line.strip()[:120]}"
        for path in texts
        if "fixtures" not in path.parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_every_exception_to_a_number_still_exists() -> None:
    existing = {name for path in PYTHON for name, _, _ in functions(path)}
    assert {*LONGER, *WIDER} <= existing
