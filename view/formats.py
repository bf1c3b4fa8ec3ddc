"""Answers as bytes: JSON, npy or an Arrow stream, whichever the request's Accept header prefers."""

import io
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import Response
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, WithJsonSchema
from starlette.requests import Request
from starlette.responses import StreamingResponse

from datastore.errors import MisuseError

__all__ = [
    "ARROW",
    "JSON",
    "NPY",
    "PIECE",
    "Answer",
    "NotAcceptableError",
    "Values",
    "arrow",
    "as_json",
    "chosen_form",
    "npy",
]

JSON, NPY, ARROW = "application/json", "application/x-npy", "application/vnd.apache.arrow.stream"
PIECE = 1 << 20
"""Bytes that are handed to a connection at a time."""


class Answer(BaseModel):
    """Base of every answer: what it documents is what is sent."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, extra="forbid")


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"anyOf": [{"type": "number"}, {"type": "null"}]}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


class Values:
    """Arrays of numbers in an answer, by depth of nesting; what is not finite is null."""

    Two = Annotated[NDArray[np.float32], WithJsonSchema(_nested(2))]
    Three = Annotated[NDArray[np.float32], WithJsonSchema(_nested(3))]


class NotAcceptableError(MisuseError):
    """The request takes none of the forms that an answer comes in."""


def chosen_form(request: Request, *, among: Sequence[str] = (JSON, NPY, ARROW)) -> str:
    """Return which of these media types a request prefers, the first of equals.

    Raises
    ------
    NotAcceptableError
        It takes none of them.
    """
    best: tuple[float, str] | None = None
    header = request.headers.get("accept", "*/*")
    accepted = _accepted(header)
    for form in among:
        group = form.partition("/")[0] + "/*"
        quality = next((accepted[name] for name in (form, group, "*/*") if name in accepted), 0.0)
        if quality > 0 and (best is None or quality > best[0]):
            best = quality, form
    if best is None:
        raise NotAcceptableError(
            f"the Accept header {header[:80]!r} takes none of {', '.join(among)}; name one of them"
        )
    return best[1]


def _accepted(header: str) -> dict[str, float]:
    found = {}
    for part in header.split(","):
        name, *settings = (word.strip().lower() for word in part.split(";"))
        quality = next((word[2:] for word in settings if word.startswith("q=")), "1")
        try:
            found[name] = float(quality)
        except ValueError:
            found[name] = 0.0
    return found


def as_json(answer: BaseModel) -> Response:
    """Return an answer as JSON: float32 in the fewest digits that give it back, null for what is not finite."""
    fields = {name: getattr(answer, name) for name in type(answer).model_fields}
    body = orjson.dumps(fields, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, media_type=JSON)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value)
    raise TypeError(f"{type(value).__name__} is no part of an answer")


def npy(values: NDArray[Any], headers: Mapping[str, str]) -> Response:
    """Return one array as a `.npy` file; what its axes are is in the headers."""
    whole = np.ascontiguousarray(values)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(whole))
    body = whole.reshape(-1).view(np.uint8).data
    return _in_pieces(head.getbuffer(), body, media_type=NPY, headers=headers)


def arrow(columns: Mapping[str, Any], metadata: Mapping[str, str]) -> Response:
    """Return columns as an Arrow IPC stream; a two-dimensional array is a column of fixed-size lists."""
    import pyarrow as pa  # a quarter of a second

    arrays = {name: _arrow_array(pa, values) for name, values in columns.items()}
    table = pa.table(arrays).replace_schema_metadata({key: str(value) for key, value in metadata.items()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return _in_pieces(memoryview(sink.getvalue()), media_type=ARROW)


def _in_pieces(*parts: memoryview, media_type: str, headers: Mapping[str, str] | None = None) -> Response:
    """Send large parts piece by piece, without a copy: a body in one would be copied into the connection's buffer."""

    async def pieces() -> AsyncIterator[memoryview]:
        for part in parts:
            for start in range(0, len(part), PIECE):
                yield part[start : start + PIECE]

    known = {"Content-Length": str(sum(map(len, parts))), **(headers or {})}
    return StreamingResponse(pieces(), media_type=media_type, headers=known)


def _arrow_array(pa: Any, values: Any) -> Any:
    if not isinstance(values, np.ndarray):
        return pa.array(values).dictionary_encode()
    if values.ndim == 1:
        return pa.array(values)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
