"""What a request may ask: numbers and ranges, a safe condition on the rollout table, answers that are not too large.

Everything here is checked before anything is read.
"""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from datastore.choose import choose
from datastore.errors import AbsentError, MisuseError

__all__ = [
    "CELL_BYTES",
    "JSON_BYTES",
    "Limits",
    "TooLargeError",
    "check_condition",
    "filtered",
    "picked_layers",
    "ranges",
]

MOST_TEXT = 2000
_CALLS = {"startswith", "endswith", "isna", "notna"}
_ALLOWED = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.Invert, ast.USub, ast.BinOp, ast.Add,
    ast.Sub, ast.Div, ast.BitAnd, ast.BitOr, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In,
    ast.NotIn, ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple,
)  # fmt: skip
_HOW = "label == 'fabrication' and n_tokens > 500"


JSON_BYTES = 24
"""Of memory that a number in JSON takes on its way: the number itself and its digits."""
CELL_BYTES = 160
"""Of memory that a cell of a table takes on its way to JSON."""


class TooLargeError(MisuseError):
    """The answer would be larger than what is sent in one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How large one answer may be.

    Attributes
    ----------
    json_values : int
        Numbers or table cells written as JSON, about ten bytes each.
    binary_bytes : int
        Bytes of an answer as npy or Arrow.
    """

    json_values: int = 2_000_000
    binary_bytes: int = 512 * 2**20

    def check(self, values: int, *, what: str, cure: str, itemsize: int | None = None) -> None:
        """Refuse an answer of too many values; `itemsize` is None for JSON.

        Raises
        ------
        TooLargeError
            The message says how to ask for less.
        """
        most = self.json_values if itemsize is None else self.binary_bytes // itemsize
        if values <= most:
            return
        form = "JSON" if itemsize is None else "binary form"
        also = "" if itemsize is not None else "; npy and Arrow (see the Accept header) carry more than JSON"
        raise TooLargeError(
            f"{what} are {values:,} values, and one answer in {form} holds at most {most:,}, so nothing was read; "
            f"{cure}{also}"
        )


def ranges(text: str, *, what: str) -> list[range]:
    """Read `10,15,20-25`, both ends of a range included.

    Raises
    ------
    MisuseError
        It is something else.

    Examples
    --------
    >>> ranges("3,10-12", what="layers")
    [range(3, 4), range(10, 13)]
    """
    found = []
    for part in text[:MOST_TEXT].split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not (_is_number(first) and (_is_number(last) or not dash)):
            raise MisuseError(f"{what} {text[:80]!r} are no numbers; write them like 10,15 or 10-20")
        found.append(range(int(first), int(last if dash else first) + 1))
        if not found[-1]:
            raise MisuseError(f"{what} {part.strip()!r} go backwards; write the lower number first")
    return found


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= 9


def picked_layers(text: str | None, there: Sequence[int]) -> list[int] | None:
    """Return the layers that a text names: each number as it stands, of a range those that are there.

    Raises
    ------
    MisuseError, AbsentError
        It is no list of layers, or a range holds none.
    """
    if text is None:
        return None
    found: list[int] = []
    for one in ranges(text, what="layers"):
        inside = [one.start] if len(one) == 1 else [layer for layer in there if layer in one]
        if not inside:
            raise AbsentError(
                f"no layer in {one.start}-{one.stop - 1} is there; there are {', '.join(map(str, there))}"
            )
        found += inside
    return list(dict.fromkeys(found))


def filtered(
    table: pd.DataFrame,
    *,
    where: str | None = None,
    labels: Sequence[str] = (),
    tags: Sequence[str] = (),
    prompt_set: str | None = None,
) -> pd.DataFrame:
    """Return the rows of a rollout table that satisfy everything that is asked; perhaps none.

    Parameters
    ----------
    table : DataFrame
    where : str, optional
        A pandas condition of columns, numbers and texts; it can call and reach nothing else.
    labels : sequence of str
        `name=value`, the value as JSON or CSV would write it.
    tags : sequence of str
    prompt_set : str, optional

    Raises
    ------
    MisuseError
        A condition is none, or names a column that is not there.
    """
    if where is not None:
        check_condition(where, [str(table.index.name), *map(str, table.columns)])
        try:
            table = table.loc[choose(table, where=where)]
        except MisuseError as error:
            if "nothing is selected" not in str(error):
                raise
            table = table.iloc[:0]
    for label in labels:
        name, equals, value = label.partition("=")
        if not equals or name not in table.columns:
            there = ", ".join(map(str, table.columns))
            raise MisuseError(f"label {label[:80]!r} is not NAME=VALUE of a column that is there: {there}")
        table = table[[_same(one, value) for one in table[name]]]
    for tag in tags:
        table = table[[tag in one for one in table["tags"]]]
    return table if prompt_set is None else table[table["prompt_set"] == prompt_set]


def _same(value: object, text: str) -> bool:
    if isinstance(value, bool) or type(value).__name__ == "bool":
        return str(value).lower() == text.lower()
    if isinstance(value, int | float):
        try:
            return float(text) == value
        except ValueError:
            return False
    return isinstance(value, str) and value == text


def check_condition(where: str, columns: Sequence[str]) -> None:
    """Refuse a condition that is more than comparisons of columns.

    pandas evaluates a condition with the attributes, the methods and, after `@`, the variables of this process, so what
    comes from a request may hold only what is known to be harmless.

    Raises
    ------
    MisuseError
        It holds something else.
    """
    try:
        tree = ast.parse(where[: MOST_TEXT + 1].strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        tree = None
    if tree is None or len(where) > MOST_TEXT:
        raise MisuseError(f'where {where[:80]!r} is not a condition; write it like "{_HOW}"')
    for node in _parts(tree):
        strange = isinstance(node, ast.Constant) and not isinstance(node.value, str | int | float)
        if strange or not isinstance(node, _ALLOWED):
            shown = ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__
            raise MisuseError(
                f"where holds {shown[:80]!r}, which a condition here may not; compare columns with numbers and texts, "
                f'like "{_HOW}"'
            )
        if isinstance(node, ast.Name) and node.id not in columns:
            raise MisuseError(f"where names {node.id!r}, which is no column; there are {', '.join(columns)}")


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes; of a call that is known to be harmless, only what it is called on and with."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if isinstance(one, ast.Call) and (column := _called_on(one)) is not None:
            waiting += [column, *one.args]
            continue
        yield one
        waiting += list(ast.iter_child_nodes(one))


def _called_on(call: ast.Call) -> ast.expr | None:
    """Return the column of `column.isna()` or `column.str.startswith("x")`; None for any other call."""
    target = call.func
    if not isinstance(target, ast.Attribute) or target.attr not in _CALLS or call.keywords:
        return None
    owner = target.value
    if target.attr in ("isna", "notna"):
        return owner if isinstance(owner, ast.Name) and not call.args else None
    plain = len(call.args) == 1 and isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    if plain and isinstance(owner, ast.Attribute) and owner.attr == "str" and isinstance(owner.value, ast.Name):
        return owner.value
    return None
