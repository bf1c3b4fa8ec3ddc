"""A choice of captured layers as text, `5-20,30`, turned into layer numbers."""

import re
from collections.abc import Sequence

from datastore.errors import AbsentError, MisuseError
from datastore.query import Store

__all__ = ["captured_layers", "parse_captured"]

_PIECE = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")


def parse_captured(spec: str, captured: Sequence[int]) -> tuple[int, ...]:
    """Return the layers that a spec names, ascending; a range stands for the captured layers in it.

    Parameters
    ----------
    spec : str
        Pieces joined by commas: `all`, a layer `16`, a range with both ends in it `5-20`, with a step `0-75:5`.
    captured : sequence of int

    Raises
    ------
    MisuseError
        A piece is none of these.
    AbsentError
        A piece names no captured layer.

    Examples
    --------
    >>> parse_captured("10-30:10,45", [10, 15, 20, 25, 30, 45])
    (10, 20, 30, 45)
    """
    return tuple(sorted({layer for piece in spec.split(",") for layer in _piece(piece.strip(), spec, captured)}))


def captured_layers(spec: str | None, stores: Sequence[Store], component: str) -> list[int] | None:
    """Return the layers that a spec names of those that the stores have of a component; None for no spec or `all`."""
    if spec is None or spec.strip() == "all":
        return None
    captured = {int(layer) for store in stores for layer in store.captured(component).columns.tolist()}
    return list(parse_captured(spec, sorted(captured)))


def _piece(piece: str, spec: str, captured: Sequence[int]) -> list[int]:
    match = _PIECE.fullmatch(piece)
    if piece == "all":
        return list(captured)
    step = int(match[3] or 1) if match else 0
    if match is None or step < 1:
        raise MisuseError(f"--layers {spec!r}: {piece!r} is no layer or range; write it like all, 16, 5-20 or 0-75:5")
    first, last = int(match[1]), int(match[2] or match[1])
    found = [layer for layer in captured if first <= layer <= last and (layer - first) % step == 0]
    if not found:
        raise AbsentError(
            f"--layers {spec!r}: {piece!r} names no captured layer; captured are {', '.join(map(str, captured))}"
        )
    return found
