"""Every block of Python and of shell in README.md and docs/ is run, page by page and in order, in an empty directory.

A page is one reader's session: its Python blocks share their names, its shell blocks the directory. A shell block of
nothing but our own commands is run in this process, any other one by bash. A block that can't be run has a reason on
the line above its fence: `<!-- no-test: needs a network -->`. Examples in docstrings run too.
"""

from __future__ import annotations

import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import commands, house

RUN = ("python", "bash")
SHOWN = ("text", "json", "toml", "yaml")  # `text` for output, layouts on disk and the like
PAGES = [house.ROOT / "README.md", *sorted((house.ROOT / "docs").rglob("*.md"))]
EXAMPLES = [
    ".".join(path.relative_to(house.ROOT).with_suffix("").parts)
    for package in house.PACKAGES
    for path in house.sources(package)
    if "\n    >>> " in path.read_text(encoding="utf-8")
]
FENCE = re.compile(r"^```(\w*)\s*$")
OURS = re.compile(rf"python -m (?:{'|'.join(house.PACKAGES)})(?: [^|&;<>$`*?~\\\\]*)?")
"""A line without anything that only a shell understands."""
REASON = re.compile(r"<!-- no-test: \S.* -->")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block of a page."""

    line: int  # of its first line of code, from 1
    language: str
    code: str
    skipped: bool


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    lines = text.splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if start is None and (fence := FENCE.match(line)):
            start, language = number, fence[1]
        elif start is not None and line == "```":
            above = next((above for above in reversed(lines[:start]) if above.strip()), "")
            code = "\n".join(lines[start + 1 : number]) + "\n"
            yield Block(line=start + 2, language=language, code=code, skipped=bool(REASON.fullmatch(above.strip())))
            start = None
    assert start is None, f"the block that starts on line {(start or 0) + 1} has no end"


def run_python(block: Block, page: Path, names: dict[str, object]) -> None:
    """Run a block in the names of the page; a traceback shows the page's own line."""
    exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True), names)


def run_bash(block: Block, page: Path) -> None:
    """Run a block as a reader would type it: bash has this interpreter's commands first on the path."""
    lines = [line.partition(" #")[0].strip() for line in block.code.splitlines() if line.strip()]
    if all(map(OURS.fullmatch, lines)):
        for line in lines:
            code = commands.here(*shlex.split(line)[2:])
            assert code == 0, f"{page}:{block.line}: {line} returned {code}"
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(house.ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{page}:{block.line} returned {done.returncode}\n{done.stdout}\n{done.stderr}"


def run_page(page: Path) -> int:
    """Run the blocks of a page in the current directory; return how many were run."""
    names: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for block in blocks(page.read_text(encoding="utf-8")):
        assert block.language in RUN + SHOWN, f"{page}:{block.line}: {block.language!r} is neither run nor shown"
        if block.language in RUN and not block.skipped:
            run_python(block, page, names) if block.language == "python" else run_bash(block, page)
            ran += 1
    return ran


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(house.ROOT).as_posix())
def test_a_page_does_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page)


@pytest.mark.parametrize("module", EXAMPLES)
def test_the_examples_in_docstrings_do_what_they_say(module: str) -> None:
    ran = doctest.testmod(importlib.import_module(module))
    assert ran.attempted > 0
    assert ran.failed == 0


PAGE = """
```bash
echo 6 > number.txt
```

```python
number = 6
```

<!-- no-test: destroys the world -->

```python
raise SystemExit
```

```text
nothing
```

```python
from pathlib import Path

Path("product.txt").write_text(str(number * 7))
```
"""


def page_of(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_blocks_share_names_and_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_page(page_of(tmp_path, PAGE)) == 3
    assert (tmp_path / "product.txt").read_text(encoding="utf-8") == "42"
    assert (tmp_path / "number.txt").read_text(encoding="utf-8") == "6\n"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("```bash\nfalse | true\n```\n", AssertionError, r"page.md:2 returned 1"),
        ("\n```python\n1 / 0\n```\n", ZeroDivisionError, "division by zero"),
        ("```sh\ntrue\n```\n", AssertionError, "'sh' is neither run nor shown"),
        ("```\ntrue\n```\n", AssertionError, "'' is neither run nor shown"),
        ("```python\n1\n", AssertionError, "the block that starts on line 1 has no end"),
        ("<!-- no-test: -->\n```python\n1 / 0\n```\n", ZeroDivisionError, "division by zero"),
    ],
)
def test_a_page_that_is_wrong_fails(
    text: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        run_page(page_of(tmp_path, text))
