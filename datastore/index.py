"""The xarray index of the token axis: `sel(rollout="71")` over 50 million tokens with one entry per rollout.

It knows the runs of rollouts that make up the axis (`datastore.axis.Axis`) and their names. Its coordinate `rollout` is
computed when it is looked at.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from xarray.core import indexing
from xarray.core.indexing import IndexSelResult

from datastore.axis import Axis
from datastore.errors import AbsentError, MisuseError

__all__ = ["RolloutIndex", "TokenVariable"]


class _Names(xr.backends.BackendArray):
    """The rollout id of every token, looked up when indexed."""

    def __init__(self, ids: NDArray[np.str_], axis: Axis) -> None:
        self.ids, self.axis = ids, axis
        self.shape, self.dtype = (axis.n_tokens,), ids.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> NDArray[Any]:
        if not isinstance(key, indexing.VectorizedIndexer):
            return np.asarray(self._read(key.tuple))
        found = indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)
        return np.asarray(found)

    def _read(self, key: tuple[Any, ...]) -> Any:
        if isinstance(key[0], int | np.integer):
            return self.ids[self.axis.rollout[self.axis.locate(np.array([key[0]]))[0][0]]]
        axis = self.axis.take(key[0])
        return axis.spread(self.ids[axis.rollout])


class TokenVariable(xr.Variable):
    """A coordinate of tokens: it stays what it is when a dataset is chunked: dask arrays can't be grouped by."""

    __slots__ = ()

    def chunk(self, *args: Any, **kwargs: Any) -> Self:
        """Return the variable as it is."""
        return self.copy(deep=False)

    def to_base_variable(self) -> xr.Variable:
        """Return the variable as it is: xarray would make a plain one of every coordinate that is no index."""
        return self.copy(deep=False)


class RolloutIndex(xr.Index):
    """Label-based selection of rollouts on a token axis.

    Parameters
    ----------
    ids : fixed-width unicode array (R,)
        Names of the rollouts that the axis counts.
    axis : Axis
    name, dim : str
        Of the coordinate and of its dimension.
    """

    def __init__(self, ids: NDArray[np.str_], axis: Axis, *, name: str = "rollout", dim: str = "token") -> None:
        self.ids, self.axis, self.name, self.dim = ids, axis, name, dim

    @classmethod
    def from_variables(cls, variables: Mapping[Any, xr.Variable], *, options: Mapping[str, Any]) -> Self:
        """Build the index from one coordinate of rollout ids along one dimension, as `set_xindex` does."""
        ((name, variable),) = variables.items()
        if variable.ndim != 1:
            raise MisuseError(f"coordinate {name!r} has dimensions {variable.dims}; rollout ids lie along one of them")
        codes, ids = pd.factorize(np.asarray(variable.values).astype(np.str_))
        seen = pd.Series(codes).groupby(codes).cumcount().to_numpy()
        axis = Axis.of(codes, seen, seen + 1)
        return cls(np.asarray(ids, dtype=np.str_), axis, name=str(name), dim=str(variable.dims[0]))

    @classmethod
    def concat(cls, indexes: Sequence[Self], dim: Any, positions: Iterable[Iterable[int]] | None = None) -> Self:
        """Return the index of tokens end to end."""
        names = np.concatenate([one.ids for one in indexes])
        codes, ids = pd.factorize(names)
        offsets = np.cumsum([0, *(len(one.ids) for one in indexes)])
        axis = Axis.joined([one.axis.renamed(codes[at:]) for one, at in zip(indexes, offsets, strict=False)])
        if positions is not None:
            order = np.concatenate([np.asarray(list(p), dtype=np.int64) for p in positions])
            axis = axis.take(np.argsort(order, kind="stable"))
        return cls(np.asarray(ids, dtype=np.str_), axis, name=indexes[0].name, dim=str(dim))

    def create_variables(self, variables: Mapping[Any, xr.Variable] | None = None) -> dict[Any, xr.Variable]:
        """Return the coordinate, looked up when it is used."""
        given = (variables or {}).get(self.name)
        data = indexing.LazilyIndexedArray(_Names(self.ids, self.axis))
        attrs = None if given is None else given.attrs
        encoding = None if given is None else given.encoding
        return {self.name: TokenVariable((self.dim,), data, attrs, encoding)}

    def to_pandas_index(self) -> "pd.Index[Any]":
        """Return the rollout id of every token."""
        index: pd.Index[Any] = pd.Index(self.axis.spread(self.ids[self.axis.rollout]), name=self.name)
        return index

    def isel(self, indexers: Mapping[Any, Any]) -> "RolloutIndex | None":
        """Return the index of some tokens; None where one token is left, or they no longer lie along one dimension."""
        key = indexers.get(self.dim)
        if key is None:
            return self
        if isinstance(key, xr.Variable):
            if key.dims != (self.dim,):
                return None
            key = key.values
        if not isinstance(key, slice):
            key = np.asarray(key)
            if key.ndim != 1:
                return None
            key = np.flatnonzero(key) if key.dtype == np.bool_ else key
        return self._of(self.axis.take(key))

    def compact(self) -> "RolloutIndex":
        """Return the index with the names that its axis needs."""
        return self._of(self.axis)

    def _of(self, axis: Axis) -> "RolloutIndex":
        used, rollout = np.unique(axis.rollout, return_inverse=True)
        if len(used) == len(self.ids):
            return RolloutIndex(self.ids, axis, name=self.name, dim=self.dim)
        axis = Axis(rollout.astype(np.int64), axis.start, axis.stop)
        return RolloutIndex(self.ids[used], axis, name=self.name, dim=self.dim)

    def sel(self, labels: dict[Any, Any], method: str | None = None, tolerance: Any = None) -> IndexSelResult:
        """Return where the tokens of one rollout, or of several in the order asked for, are.

        Raises
        ------
        AbsentError
            A rollout is not on this axis; the message lists some that are.
        MisuseError
            The label is a slice, or `method` is given: ids have no order.
        """
        label = labels[self.name]
        if isinstance(label, slice) or method is not None or tolerance is not None:
            raise MisuseError(
                f"{self.name} was asked for as {label!r} with method={method!r}, but ids have no order to slice or "
                "search; give one id or a list of ids"
            )
        if isinstance(label, xr.Variable | xr.DataArray):
            label = label.values
        wanted = [str(one) for one in np.atleast_1d(np.asarray(label)).tolist()]
        parts = [self._tokens_of(one) for one in wanted]
        runs = [run for part in parts for run in part]
        if len(runs) == 1:
            return IndexSelResult({self.dim: slice(*runs[0])})
        places = [np.arange(low, high) for low, high in runs]
        return IndexSelResult({self.dim: np.concatenate([np.zeros(0, np.int64), *places])})

    def _tokens_of(self, name: str) -> list[tuple[int, int]]:
        """Return the runs of a rollout on this axis, neighbours joined."""
        code = np.flatnonzero(self.ids == name)
        runs = np.flatnonzero(self.axis.rollout == code[0]) if len(code) else np.zeros(0, np.int64)
        if not len(runs):
            some = ", ".join(self.ids[:8].tolist()) + (f" and {len(self.ids) - 8} more" if len(self.ids) > 8 else "")
            raise AbsentError(f"rollout {name!r} is not here; there are {some or 'no rollouts'}")
        groups = np.split(runs, np.flatnonzero(np.diff(runs) != 1) + 1)
        return [(int(self.axis.edges[g[0]]), int(self.axis.edges[g[-1] + 1])) for g in groups]

    def equals(self, other: xr.Index, *, exclude: frozenset[Any] | None = None) -> bool:
        """Whether both are of the same tokens."""
        if not isinstance(other, RolloutIndex) or len(self.axis.rollout) != len(other.axis.rollout):
            return False
        return (
            np.array_equal(self.ids[self.axis.rollout], other.ids[other.axis.rollout])
            and np.array_equal(self.axis.start, other.axis.start)
            and np.array_equal(self.axis.stop, other.axis.stop)
        )

    def join(self, other: Self, how: Any = "inner") -> Self:
        """Raise: tokens are matched when they are the same, never by label."""
        mine, others = f"{self.axis.n_tokens} tokens", f"{other.axis.n_tokens} tokens"
        raise MisuseError(
            f"one array has {mine} of {len(self.ids)} rollouts and the other {others} of {len(other.ids)}, or others "
            "of them, so they can't be put together; select the same tokens of both"
        )

    def reindex_like(self, other: Self) -> dict[Any, Any]:
        """Raise: tokens are matched when they are the same, never by label."""
        self.join(other)
        return {}

    def rename(self, name_dict: Mapping[Any, Any], dims_dict: Mapping[Any, Any]) -> "RolloutIndex":
        """Return the index under other names."""
        name, dim = str(name_dict.get(self.name, self.name)), str(dims_dict.get(self.dim, self.dim))
        return RolloutIndex(self.ids, self.axis, name=name, dim=dim)

    def roll(self, shifts: Mapping[Any, int]) -> "RolloutIndex":
        """Return the index of tokens moved along, those at the end coming to the front."""
        n = max(1, self.axis.n_tokens)
        return self._of(self.axis.take((np.arange(self.axis.n_tokens) - shifts.get(self.dim, 0)) % n))

    def __repr__(self) -> str:
        return f"RolloutIndex({len(self.ids)} rollouts, {self.axis.n_tokens} tokens)"

    def _repr_inline_(self, max_width: int) -> str:
        return repr(self)[:max_width]
