"""Choose rollouts by id, by a query on the rollout table, and by number: the same everywhere."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from datastore.errors import MisuseError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["choose"]


def choose(
    table: "pd.DataFrame",
    *,
    ids: Sequence[str] | None = None,
    where: str | None = None,
    limit: int | None = None,
) -> list[str]:
    """Return the rollout ids that are asked for, in the table's order.

    Parameters
    ----------
    table : DataFrame
        Indexed by rollout_id; labels are columns.
    ids : sequence of str, optional
        Only these; each must be in the table.
    where : str, optional
        Only rows that satisfy this pandas query.
    limit : int, optional
        At most the first so many of what is left.

    Raises
    ------
    MisuseError
        An id is not in the table, the query names no column or is no condition, or nothing is left.
    """
    if ids is not None:
        unknown = [i for i in dict.fromkeys(ids) if i not in table.index]
        if unknown:
            raise MisuseError(
                f"{len(unknown)} of the ids asked for are not there: {_some(unknown)}; there are "
                f"{_some(list(table.index))}"
            )
        table = table[table.index.isin(set(ids))]
    if where is not None:
        table = _query(table, where)
    if limit is not None:
        table = table.head(limit)
    if not len(table):
        raise MisuseError(f"nothing is selected: no rollout is left after {_asked(ids, where)}; ask for less")
    return [str(i) for i in table.index]


def _query(table: "pd.DataFrame", where: str) -> "pd.DataFrame":
    import pandas as pd

    try:
        keep = table.eval(where, engine="python")
    except (pd.errors.UndefinedVariableError, KeyError) as error:
        raise MisuseError(
            f"--where {where!r} names a column that is not there ({error}); the rollout table has "
            f"{', '.join(['rollout_id', *map(str, table.columns)])}"
        ) from error
    except Exception as error:
        raise MisuseError(
            f"--where {where!r} is not a query ({' '.join(str(error).split())}); write it like "
            "\"label == 'fabrication' and n_tokens > 500\""
        ) from error
    if not isinstance(keep, pd.Series) or keep.dtype != bool:
        raise MisuseError(f'--where {where!r} is not a condition on each rollout; write it like "n_tokens > 500"')
    return table[keep]


def _asked(ids: Sequence[str] | None, where: str | None) -> str:
    asked = [f"{len(ids)} ids" if ids is not None else "", f"--where {where!r}" if where is not None else ""]
    return " and ".join(a for a in asked if a) or "selecting all"


def _some(names: list[str], most: int = 8) -> str:
    listed = ", ".join(map(str, names[:most])) or "none"
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
