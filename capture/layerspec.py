"""The text form of a choice of layers, `0-75:5,50%`, turned into layer numbers."""

import re
from fractions import Fraction

from capture.errors import RequestError

_END = r"\d+(?:\.\d+)?%|\d+"
_PIECE = re.compile(rf"(?P<first>{_END})(?:\s*-\s*(?P<last>{_END})(?:\s*:\s*(?P<step>\d+))?)?")


def parse_layers(spec: str, n_layers: int) -> tuple[int, ...]:
    """Layers named by `spec`, ascending, each once.

    Parameters
    ----------
    spec : str
        Pieces joined by commas: `all`, a layer `16`, a range with both ends in it `5-20`, a range with a step
        `0-75:5`, a depth `50%`, a range of depths `30%-60%` (also with a step). A depth p is layer
        floor(n_layers * p / 100), and 100% is the last layer.
    n_layers : int
        Layers of the model, numbered from 0.

    Returns
    -------
    tuple of int

    Raises
    ------
    RequestError
        Where a piece can't be read, selects nothing, or names a layer that the model has not.

    Examples
    --------
    >>> parse_layers("5-8,30%-60%:2", 10)
    (3, 5, 6, 7, 8)
    """
    if n_layers < 1:
        raise RequestError(f"the model has {n_layers} layers, so there is none to choose from")
    pieces = [piece.strip() for piece in spec.split(",")]
    return tuple(sorted({layer for piece in pieces for layer in _piece(piece, spec, n_layers)}))


def _piece(piece: str, spec: str, n_layers: int) -> range:
    if piece == "all":
        return range(n_layers)
    match = _PIECE.fullmatch(piece)
    if match is None:
        raise _refused(piece, "is not a layer, a range or a depth", spec=spec, n_layers=n_layers)
    first, last, step = match["first"], match["last"] or match["first"], int(match["step"] or 1)
    if first.endswith("%") != last.endswith("%"):
        raise _refused(piece, "mixes a layer number and a depth", spec=spec, n_layers=n_layers)
    if step == 0:
        raise _refused(piece, "has step 0", spec=spec, n_layers=n_layers)
    start, stop = (_layer(end, piece, spec=spec, n_layers=n_layers) for end in (first, last))
    if start > stop:
        raise _refused(piece, "selects nothing, its end comes before its start", spec=spec, n_layers=n_layers)
    return range(start, stop + 1, step)


def _layer(end: str, piece: str, *, spec: str, n_layers: int) -> int:
    if end.endswith("%"):
        share = Fraction(end[:-1]) / 100
        if share > 1:
            raise _refused(piece, "is deeper than 100%", spec=spec, n_layers=n_layers)
        return min(int(n_layers * share), n_layers - 1)
    if int(end) >= n_layers:
        raise _refused(piece, f"names layer {end}, which does not exist", spec=spec, n_layers=n_layers)
    return int(end)


def _refused(piece: str, why: str, *, spec: str, n_layers: int) -> RequestError:
    return RequestError(
        f"layers {spec!r}: {piece!r} {why}; this model has layers 0 to {n_layers - 1}, "
        "written as all, 16, 5,10, 5-20, 0-75:5, 50% or 30%-60%"
    )
