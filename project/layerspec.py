"""Which layers to score: the grammar of `--layers`, and the nearest captured layer for one that was not captured."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from datastore.errors import AbsentError, MisuseError

__all__ = ["LayerRequest", "parse_layer_requests", "snapped"]

_BEST = re.compile(r"best([+-]\d+)?")
_RANGE = re.compile(r"(\d+)-(\d+)(?::(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRequest:
    """One item of a layer spec: an offset from the best layer, one layer, or a range.

    Attributes
    ----------
    text : str
        As it was written.
    offset : int or None
        Layers above the best; None where the layer does not depend on it.
    layer : int or None
    span : range or None
        Ends included; it stands for the captured layers in it.
    """

    text: str
    offset: int | None = None
    layer: int | None = None
    span: range | None = None


def parse_layer_requests(spec: str | int | Sequence[int]) -> tuple[LayerRequest, ...]:
    """Read a layer spec: `best`, `best+N`, `best-N`, integers and ranges (`10-20`, `0-75:5`), joined by commas.

    Raises
    ------
    MisuseError
        If an item is none of these.

    Examples
    --------
    >>> [request.offset for request in parse_layer_requests("best,best+5")]
    [0, 5]
    """
    if not isinstance(spec, str):
        spec = ",".join(map(str, [spec] if isinstance(spec, int) else spec))
    requests = tuple(_parsed(item.strip()) for item in spec.split(",") if item.strip())
    if not requests:
        raise MisuseError(f"layers {spec!r} name no layer; give for example best,best+5 or 10,15 or 10-20")
    return requests


def snapped(layer: int, captured: Sequence[int], *, within: int = 2) -> int:
    """Return the nearest captured layer at most `within` away, the lower of two.

    Raises
    ------
    AbsentError
        If there is none; the text lists the captured layers.
    """
    nearest = min(sorted(captured), key=lambda other: abs(other - layer), default=None)
    if nearest is None or abs(nearest - layer) > within:
        raise AbsentError(
            f"layer {layer} is not captured and no captured layer is within {within} of it; captured are "
            f"{', '.join(map(str, sorted(captured))) or 'none'}, so choose one of them or raise --snap"
        )
    return nearest


def _parsed(item: str) -> LayerRequest:
    if found := _BEST.fullmatch(item):
        return LayerRequest(text=item, offset=int(found[1] or 0))
    if item.isdecimal():
        return LayerRequest(text=item, layer=int(item))
    if (found := _RANGE.fullmatch(item)) and int(found[1]) <= int(found[2]) and found[3] != "0":
        return LayerRequest(text=item, span=range(int(found[1]), int(found[2]) + 1, int(found[3] or 1)))
    raise MisuseError(f"{item!r} is no layer; write best, best+5, best-5, 16, 10-20 or 0-75:5")
