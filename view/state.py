"""What a reader is looking at, as one object, and as the query of an address that restores it."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, urlencode

import param

from view.treatment import CLEANING, LINES, MODES, Treatment

__all__ = ["FIRST", "VIEWS", "State", "from_query", "to_query"]

VIEWS = ("Overview", "Transcript", "Trajectories", "Compare")
FIRST = "first"
"""Of a trait that is scored at several layers, the first."""


class State(param.Parameterized):
    """Everything that an address keeps; one for each visitor."""

    store = param.String(doc="Name of the store.")
    view: Any = param.Selector(default="Overview", objects=list(VIEWS))
    rollout = param.String(doc="The rollout that is shown.")
    others = param.List(default=[], item_type=str, doc="Rollouts that it is compared with.")
    trait = param.String(doc="The trait that shades the text, and that single-trait plots show.")
    traits = param.List(default=[], item_type=str, doc="Traits that have a line; all where empty.")
    layer = param.String(default=FIRST, doc="A layer number; of several the nearest is taken.")
    lines: Any = param.Selector(default="trait", objects=list(LINES))
    mode: Any = param.Selector(default="cosine", objects=list(MODES))
    smooth = param.Integer(default=5, bounds=(1, 25))
    centred = param.Boolean(default=False)
    velocity = param.Boolean(default=False)
    clean: Any = param.Selector(default="none", objects=list(CLEANING))
    token = param.Integer(default=-1, doc="The pinned position, -1 for none.")
    folded = param.Boolean(default=False, doc="Thinking is folded.")
    label = param.String(doc="The label that groups rollouts.")
    reference = param.String(doc="The value of the label that others are compared with.")
    per: Any = param.Selector(default="fork", objects=["fork", "turn", "role", "annotation"])
    other_store = param.String(doc="The store that this one is compared with.")
    spans: Any = param.Selector(default="window", objects=["window", "clause"])
    window = param.Integer(default=10, bounds=(1, 100))
    scope: Any = param.Selector(default="this rollout", objects=["this rollout", "all rollouts"])
    lag = param.Integer(default=0, bounds=(-10, 10))
    section: Any = param.Selector(
        default="Rollouts", objects=["Rollouts", "Heatmaps", "Spans", "Correlation", "Calibration", "Captured"]
    )
    part = param.Integer(
        default=1, bounds=(1, 10_000), doc="Which part of the rollouts a heatmap of them shows, from 1."
    )
    against: Any = param.Selector(default="Pair", objects=["Pair", "Groups", "Stores"])

    @property
    def layer_number(self) -> int | None:
        """The layer that is asked for, None for each trait's first."""
        return int(self.layer) if self.layer.isdecimal() else None

    @property
    def treatment(self) -> Treatment:
        """What is done to scores before they are drawn."""
        return Treatment(
            mode=self.mode, clean=self.clean, centred=self.centred, smooth=self.smooth, velocity=self.velocity
        )

    @property
    def rollouts(self) -> tuple[str, ...]:
        """The rollouts that are compared, the shown one first."""
        return tuple(dict.fromkeys([self.rollout, *self.others]))


_OF_A_ROLLOUT = ("name", "others")
FIELDS = tuple(name for name in State.param if name not in _OF_A_ROLLOUT)


def to_query(state: State) -> str:
    """Return the query of the address that restores a state; what is as at first is left out.

    Examples
    --------
    >>> to_query(State(store="run.zarr", rollout="71", others=["72"], mode="raw"))
    '?store=run.zarr&view=Overview&rollout=71&rollout=72&mode=raw'
    """
    pairs: list[tuple[str, str]] = []
    for name in FIELDS:
        value = getattr(state, name)
        if name == "rollout":
            pairs += [("rollout", one) for one in (value, *state.others) if one]
        elif isinstance(value, list):
            pairs += [(name, one) for one in value]
        elif name in ("store", "view") or value != State.param[name].default:
            pairs.append((name, str(value)))
    return "?" + urlencode(pairs)


def from_query(query: str | Mapping[str, Sequence[str | bytes]]) -> tuple[dict[str, Any], list[str]]:
    """Read the query of an address.

    Returns
    -------
    values : dict
        Values for a State, those that it can hold; whether a store has such a rollout or trait is not known here.
    wrong : list of str
        Names of what could not be read.

    Examples
    --------
    >>> from_query("?rollout=71&rollout=72&smooth=9&mode=loud")
    ({'rollout': '71', 'others': ['72'], 'smooth': 9}, ['mode'])
    """
    given = parse_qs(query.lstrip("?")) if isinstance(query, str) else query
    texts = {
        key: [one.decode("utf-8", "replace") if isinstance(one, bytes) else str(one) for one in many]
        for key, many in given.items()
    }
    values: dict[str, Any] = {}
    wrong = []
    for name in FIELDS:
        if not texts.get(name):
            continue
        try:
            values |= _parsed(name, texts[name])
        except ValueError:
            wrong.append(name)
    return values, wrong


def _parsed(name: str, texts: Sequence[str]) -> dict[str, Any]:
    kind = State.param[name]
    value: Any = texts[0]
    if name == "rollout":
        return {"rollout": texts[0], "others": list(texts[1:])}
    if isinstance(kind, param.List):
        value = list(texts)
    elif isinstance(kind, param.Boolean):
        if value not in ("True", "False"):
            raise ValueError(value)
        value = value == "True"
    elif isinstance(kind, param.Integer):
        value = int(value)
    State(**{name: value})  # raises ValueError where it can't hold it
    return {name: value}
