"""One batch through the decoder blocks: rows of every component and layer, unpadded, as arrays of the stored dtype.

Rows leave only after the forward that made them has succeeded, so an attempt that ran out of memory leaves nothing
behind, and no row is handed out twice.
"""

import gc
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import ml_dtypes
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from capture.batching import halves
from capture.components import ComponentTable, Hook
from capture.errors import CaptureError, NoMemoryError, RequestError
from capture.hooks import tapped
from capture.staging import Slab, Staging

_LEAST_PIECE = 16
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")

T = TypeVar("T")


class Put(Protocol):
    """Takes rows: `values` is (n, width) in the stored dtype, the rollout's tokens from `start` on.

    They may be kept, but not where `run_batch` was given a `Staging`: its memory is used again.
    """

    def __call__(self, component: str, layer: int, rollout_id: str, values: NDArray[Any], *, start: int) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Halved:
    """A batch that did not fit in memory: it was divided, or its one rollout is computed in pieces with a KV cache.

    Attributes
    ----------
    rollout_ids : tuple of str
        The batch that failed.
    into : tuple of tuples of str
        The batches computed in its place; empty where the rollout is split.
    from_token, piece_tokens : int
        Where the rollout is split: from this token on, pieces of this many tokens.
    """

    rollout_ids: tuple[str, ...]
    into: tuple[tuple[str, ...], ...] = ()
    from_token: int = 0
    piece_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What is the same for every attempt at a batch."""

    model: nn.Module
    decoder: nn.Module
    table: ComponentTable
    hooks: tuple[Hook, ...]
    put: Put
    on_halve: Callable[[Halved], object]
    staging: Staging | None


@dataclass(frozen=True, slots=True)
class _Sequence:
    rollout_id: str
    token_ids: NDArray[np.int64]


def run_batch(
    model: nn.Module,
    table: ComponentTable,
    batch: Sequence[tuple[str, ArrayLike]],
    *,
    layers: Sequence[int],
    components: Sequence[str],
    put: Put,
    on_halve: Callable[[Halved], object] = lambda _: None,
    piece_tokens: int | None = None,
    staging: Staging | None = None,
) -> None:
    """Run one batch and hand every rollout's rows of every component and layer to `put`, once each.

    The forward is that of the decoder without head or KV cache, right-padded, with explicit positions, and without the
    blocks above the highest layer asked for. Out of memory: the batch is halved until one rollout is left, and that is
    computed in pieces with a KV cache (equal within rounding).

    Parameters
    ----------
    model : nn.Module
        In which `table` was found; left as it was.
    batch : sequence of (rollout id, token ids)
        Token ids are integers [n], n >= 1.
    layers, components : sequences
    put : callable
        Called as `put(component, layer, rollout_id, values, start=...)` once a forward has succeeded.
    on_halve : callable, optional
        Told of each division, in order.
    piece_tokens : int, optional
        A rollout longer than this is computed in pieces of this many tokens from the outset, which bounds the rows
        that wait in host memory.
    staging : Staging, optional
        Rows from a GPU pass through it: `put` is then called in its thread, while the next batch may already run, and
        they are all handed on once it is flushed.

    Raises
    ------
    RequestError
        For a component or layer that does not exist, a rollout without tokens or with ids beyond the vocabulary.
    NoMemoryError
        Where even the smallest piece of one rollout does not fit.
    CaptureError
        Where a tensor is not of the dtype or shape that the table says.
    """
    job = _Job(
        model=model,
        decoder=model.get_submodule(table.decoder),
        table=table,
        hooks=tuple(table.hook(component, layer) for layer in sorted(set(layers)) for component in components),
        put=put,
        on_halve=on_halve,
        staging=staging,
    )
    if not job.hooks:
        raise RequestError(f"{len(components)} components on {len(layers)} layers select nothing to capture")
    sequences = tuple(_checked(rollout_id, token_ids, table) for rollout_id, token_ids in batch)
    with _evaluating(model), _without_higher_blocks(model, table, max(layers)), torch.inference_mode():
        _run_halving(job, sequences, piece_tokens)


def _run_halving(job: _Job, sequences: tuple[_Sequence, ...], piece_tokens: int | None) -> None:
    waiting = [sequences]
    while waiting:
        batch = waiting.pop()
        longest = max((s.token_ids.size for s in batch), default=0)
        if len(batch) == 1 and piece_tokens is not None and longest > piece_tokens:
            _run_in_pieces(job, batch[0], piece_tokens)
        elif batch and (rows := _attempt(partial(_run_whole, job, batch))) is not None:
            _put_rows(job, batch, rows)
        elif len(batch) > 1:
            first, second = halves(batch)
            job.on_halve(Halved(rollout_ids=_ids(batch), into=(_ids(first), _ids(second))))
            waiting += [second, first]
        elif batch:
            piece = _half_piece(batch[0], longest, 0)
            job.on_halve(Halved(rollout_ids=_ids(batch), piece_tokens=piece))
            _run_in_pieces(job, batch[0], piece)


def _run_whole(job: _Job, batch: tuple[_Sequence, ...]) -> "_Rows":
    lengths = [s.token_ids.size for s in batch]
    ids = np.zeros((len(batch), max(lengths)), np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(batch):
        ids[row, : lengths[row]] = sequence.token_ids
        mask[row, : lengths[row]] = 1
    with _gathering(job, lengths, ids.shape[1]) as rows:
        with tapped(job.model, job.hooks, rows.take):
            _forward(job, ids, mask, start=0, use_cache=False)
        rows.finish(job.hooks)
    return rows


@contextmanager
def _gathering(job: _Job, lengths: Sequence[int], longest: int) -> "Iterator[_Rows]":
    """Rows of one forward; one that fails gives its memory back."""
    row_bytes = sum(hook.width for hook in job.hooks) * getattr(torch, job.table.dtype).itemsize
    rows = _Rows(job.table.dtype, lengths, longest, staging=job.staging, n_bytes=row_bytes * sum(lengths))
    try:
        yield rows
    except BaseException:
        rows.discard()
        raise


def _put_rows(job: _Job, batch: tuple[_Sequence, ...], rows: "_Rows", *, start: int = 0) -> None:
    """Hand rows to `put`: now, or once they are copied and those before them are through."""
    work = partial(_put_now, job, batch, rows, start=start)
    if rows.slab is None or job.staging is None:
        work()
    else:
        job.staging.hand_on(rows.slab, work)


def _put_now(job: _Job, batch: tuple[_Sequence, ...], rows: "_Rows", *, start: int) -> None:
    for hook in job.hooks:
        for sequence, values in zip(batch, rows.arrays(hook.component, hook.layer), strict=True):
            job.put(hook.component, hook.layer, sequence.rollout_id, values, start=start)


def _run_in_pieces(job: _Job, sequence: _Sequence, piece: int) -> None:
    """One rollout piece by piece; what was put stays, and a smaller piece goes on from there over a rebuilt cache."""
    done = 0
    while done < sequence.token_ids.size:
        for start, stop, rows in _pieces(job, sequence, piece, done=done):
            if rows is None:
                piece = _half_piece(sequence, min(piece, stop - start), done)
                job.on_halve(Halved(rollout_ids=(sequence.rollout_id,), from_token=done, piece_tokens=piece))
                break
            if start >= done:
                _put_rows(job, (sequence,), rows, start=start)
                done = stop
            else:
                rows.discard()


def _pieces(job: _Job, sequence: _Sequence, piece: int, *, done: int) -> Iterator[tuple[int, int, "_Rows | None"]]:
    cache = None
    bounds = [*range(0, done, piece), *range(done, sequence.token_ids.size, piece), sequence.token_ids.size]
    for start, stop in pairwise(bounds):
        result = _attempt(partial(_run_piece, job, sequence, start=start, stop=stop, cache=cache))
        if result is None:
            cache = None
            yield start, stop, None
            return
        rows, cache = result
        yield start, stop, rows


def _run_piece(job: _Job, sequence: _Sequence, *, start: int, stop: int, cache: Any) -> tuple["_Rows", Any]:
    with _gathering(job, [stop - start], stop - start) as rows:
        with tapped(job.model, job.hooks, rows.take):
            ids, mask = sequence.token_ids[None, start:stop], np.ones((1, stop), np.int64)
            out = _forward(job, ids, mask, start=start, cache=cache, use_cache=True)
        rows.finish(job.hooks)
    cache = getattr(out, "past_key_values", None)
    if cache is None:
        raise NoMemoryError(
            f"rollout {sequence.rollout_id} of {sequence.token_ids.size} tokens does not fit in memory and "
            f"{job.table.model_type} gives no KV cache to split it with; capture fewer layers or cut it with "
            "--truncate"
        )
    return rows, cache


def _half_piece(sequence: _Sequence, tokens: int, done: int) -> int:
    piece = (tokens + 1) // 2
    if piece < _LEAST_PIECE:
        raise NoMemoryError(
            f"rollout {sequence.rollout_id} of {sequence.token_ids.size} tokens ran out of memory at token "
            f"{done} even in pieces of "
            f"{tokens} tokens, so none of its later rows is there; ask for fewer layers or components, or use "
            "a larger device"
        )
    return piece


def _forward(
    job: _Job, ids: NDArray[np.int64], mask: NDArray[np.int64], *, start: int, use_cache: bool, cache: Any = None
) -> Any:
    device = _input_device(job.decoder)
    positions = np.broadcast_to(np.arange(start, start + ids.shape[1]), ids.shape).copy()
    arguments = {
        "input_ids": torch.from_numpy(np.ascontiguousarray(ids)).to(device),
        "attention_mask": torch.from_numpy(mask).to(device),
        "position_ids": torch.from_numpy(positions).to(device),
        "use_cache": use_cache,
    }
    if cache is not None:
        arguments["past_key_values"] = cache
    accepted = inspect.signature(job.decoder.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        arguments = {name: value for name, value in arguments.items() if name in accepted}
    return job.decoder(**arguments)


class _Rows:
    """Rows of one forward, without padding, copied out of the model by layer as they appear."""

    def __init__(
        self, dtype: str, lengths: Sequence[int], longest: int, *, staging: Staging | None, n_bytes: int
    ) -> None:
        self._staging, self._n_bytes = staging, n_bytes
        self.slab: Slab | None = None
        self._dtype = dtype
        self._lengths = lengths
        self._longest = longest
        self._rows: dict[tuple[str, int], Tensor] = {}
        self._kept: dict[torch.device, Tensor] = {}
        self._copying: set[torch.device] = set()

    def take(self, component: str, layer: int, tensor: Tensor) -> None:
        expected = (len(self._lengths), self._longest)
        if tensor.ndim == 2 and tensor.shape[0] == expected[0] * expected[1]:
            tensor = tensor.reshape(*expected, -1)
        name = str(tensor.dtype).removeprefix("torch.")
        if tensor.ndim != 3 or tensor.shape[:2] != expected or name != self._dtype:
            raise CaptureError(
                f"{component} of layer {layer} is {tuple(tensor.shape)} in {name}, not ({expected[0]}, "
                f"{expected[1]}, width) in "
                f"{self._dtype}, so it can't be stored bit for bit; give another module with --hook-path "
                f"{component}=..."
            )
        self._rows[component, layer] = self._to_host(tensor)

    def _to_host(self, tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1, tensor.shape[-1]) if self._padded else tensor.flatten(0, 1)
        if tensor.device.type == "cpu":
            return (
                flat[self._index(tensor.device)] if self._padded else flat.clone(memory_format=torch.contiguous_format)
            )
        if tensor.device.type != "cuda":
            return (flat.index_select(0, self._index(tensor.device)) if self._padded else flat).cpu()
        self._copying.add(tensor.device)
        if self._staging is None:
            flat = flat.index_select(0, self._index(tensor.device)) if self._padded else flat
            return torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat, non_blocking=True)
        return self._staged(flat, self._staging)

    def _staged(self, flat: Tensor, staging: Staging) -> Tensor:
        """Copy on the staging's stream; the model may write to its tensor meanwhile, so the device keeps a copy."""
        device = flat.device
        kept = flat.index_select(0, self._index(device)) if self._padded else flat.clone()
        if self.slab is None:
            self.slab = staging.slab(self._n_bytes)
        host, stream = self.slab.take(tuple(kept.shape), kept.dtype), staging.stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            host.copy_(kept, non_blocking=True)
        kept.record_stream(stream)
        return host

    def discard(self) -> None:
        """Give the memory of rows back that nobody will take, once no copy into it is on its way."""
        self._rows.clear()
        if self.slab is not None and self._staging is not None:
            for device in self._copying:
                self._staging.stream(device).synchronize()
            self._staging.give_back(self.slab)
            self.slab = None

    @property
    def _padded(self) -> bool:
        return any(length != self._longest for length in self._lengths)

    def _index(self, device: torch.device) -> Tensor:
        if device not in self._kept:
            kept = [np.arange(length) + row * self._longest for row, length in enumerate(self._lengths)]
            self._kept[device] = torch.from_numpy(np.concatenate(kept)).to(device)
        return self._kept[device]

    def finish(self, hooks: Sequence[Hook]) -> None:
        """See that copies will be waited for, and that every hook fired with the width that the plan was made with."""
        for device in self._copying:
            if self.slab is None or self._staging is None:
                torch.cuda.synchronize(device)
            else:
                self.slab.filled_after(self._staging.stream(device).record_event())
        for hook in hooks:
            rows = self._rows.get((hook.component, hook.layer))
            if rows is None:
                raise CaptureError(
                    f"{hook.path} did not run, so {hook.component} of layer {hook.layer} is missing; nothing "
                    "of this batch was stored"
                )
            if rows.shape[1] != hook.width:
                raise CaptureError(
                    f"{hook.component} of layer {hook.layer} at {hook.path} is {rows.shape[1]} wide, not "
                    f"{hook.width}, so it does not "
                    f"fit the plan; give another module with --hook-path {hook.component}=..."
                )

    def arrays(self, component: str, layer: int) -> list[NDArray[Any]]:
        """Rows of each rollout of the batch, views of one array that nothing else writes to."""
        rows = self._rows[component, layer]
        values = (
            rows.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if rows.dtype is torch.bfloat16 else rows.numpy()
        )
        return np.split(values, np.cumsum(self._lengths)[:-1])


def _attempt(work: Callable[[], T]) -> T | None:
    """Result of `work`, or None where it ran out of memory.

    The frames that the exception kept alive are emptied, and only outside the handler, where nothing refers to it any
    more, can the memory be collected.
    """
    try:
        return work()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _forget_frames(error)
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        word in str(error).lower() for word in _MEMORY_WORDS
    )


def _forget_frames(error: BaseException) -> None:
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__


def _checked(rollout_id: str, token_ids: ArrayLike, table: ComponentTable) -> _Sequence:
    ids = np.asarray(token_ids, np.int64).reshape(-1)
    if not ids.size:
        raise RequestError(f"rollout {rollout_id} has no tokens, so it has no rows; leave it out")
    bad = ids[(ids < 0) | (ids >= table.vocab_size)] if table.vocab_size is not None else ids[ids < 0]
    if bad.size:
        raise RequestError(
            f"rollout {rollout_id} has token id {bad[0]}, and {table.model_type} knows ids 0 to "
            f"{(table.vocab_size or 0) - 1}; "
            "it was made with another tokenizer"
        )
    return _Sequence(rollout_id, ids)


def _ids(batch: Sequence[_Sequence]) -> tuple[str, ...]:
    return tuple(sequence.rollout_id for sequence in batch)


def _input_device(decoder: nn.Module) -> torch.device:
    device = next(decoder.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device  # an offloaded block's hooks fetch their inputs


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


@contextmanager
def _without_higher_blocks(model: nn.Module, table: ComponentTable, highest: int) -> Iterator[None]:
    parent_path, _, name = table.blocks.rpartition(".")
    parent = model.get_submodule(parent_path)
    blocks = getattr(parent, name)
    setattr(parent, name, blocks[: highest + 1])
    try:
        yield
    finally:
        setattr(parent, name, blocks)
