"""Groups, families, spans and correlations against what loops over plain arrays give."""

from itertools import pairwise

import numpy as np
import pytest
import xarray as xr

import datastore
import project
from datastore.errors import MisuseError
from datastore.schema import Annotation, Rollout
from project import groups, spans
from tests.project.stores import direction, exact, values_of, write_store

ONE, OTHER = direction("bs/lying", 10), direction("x/calm", 20)


def made(name: str, ids: list[int], **extra: object) -> Rollout:
    return Rollout(rollout_id=name, token_ids=np.array(ids, np.int32), prompt_end=4, **extra)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> datastore.Store:
    shared = [1, 2, 3, 4, 5, 6, 7, 8]
    turn = np.array([0] * 4 + [1] * 8, np.int32)
    role = np.array([2] * 4 + [3] * 8, np.int8)
    spans_ = (Annotation(token_start=5, token_end=9, label="lie"),)
    rollouts = [
        made("a", [*shared, 1, 1, 1, 1], labels={"lying": True}, turn=turn, role=role, annotations=spans_),
        made("b", [*shared, 1, 2, 2, 2], labels={"lying": False}, turn=turn, role=role, annotations=spans_),
        made("c", [*shared, 3, 3, 3, 3], labels={"lying": True}, turn=turn, role=role),
        made("d", [9] * 12, labels={"lying": False}, turn=turn, role=role),
        made("e", [1, 2] + [7] * 8),
    ]
    return write_store(tmp_path_factory.mktemp("s") / "run.zarr", rollouts)


@pytest.fixture(scope="module")
def scored(store: datastore.Store) -> xr.Dataset:
    return project.scores(store, [ONE, OTHER])


def score(name: str, one: project.Direction, n_tokens: int = 12) -> np.ndarray:
    return exact(values_of(name, one.layer, n_tokens=n_tokens, width=24), one.values)


def test_families_are_found_from_token_ids(store: datastore.Store, scored: xr.Dataset) -> None:
    (family,) = groups.families(store)
    assert (set(family.rollouts), family.fork) == ({"a", "b", "c"}, 8)
    (wider,) = groups.families(store, least=2)
    assert (set(wider.rollouts), wider.fork) == ({"a", "b", "c", "e"}, 2)
    assert [f.fork for f in groups.families(store, rollouts=["a", "b"])] == [9]
    assert groups.families(store, rollouts=["a", "d"]) == []
    side = groups.aligned(scored, wider)
    assert side.attrs["fork"] == 2
    np.testing.assert_allclose(side.sel(rollout="b").values[:, 0], score("b", ONE), atol=1e-4)
    assert np.isnan(side.sel(rollout="e").values[10:]).all()
    assert side.shared.values.sum() == 2


def test_groups_have_their_means_intervals_and_areas(store: datastore.Store, scored: xr.Dataset) -> None:
    table = groups.compare(store, scored, "lying", segment="response")
    row = table[(table.direction == "bs/lying@10") & (table.group == "True")].iloc[0]
    ours = np.array([score(name, ONE)[4:].mean() for name in ("a", "c")])
    theirs = np.array([score(name, ONE)[4:].mean() for name in ("b", "d")])
    assert (row.n_rollouts, row.n_tokens) == (2, 16)
    np.testing.assert_allclose(row["mean"], ours.mean(), rtol=1e-4)
    assert row.low <= row["mean"] <= row.high
    np.testing.assert_allclose(row.auroc, np.mean([a > b for a in ours for b in theirs]))
    spread = np.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / 2)
    np.testing.assert_allclose(row.effect_size, (ours.mean() - theirs.mean()) / spread, rtol=1e-3)


@pytest.mark.parametrize(
    ("per", "key", "names", "tokens"),
    [
        ("turn", 1, ("a", "c"), slice(4, 12)),
        ("role", "user", ("a", "c"), slice(0, 4)),
        ("annotation", "lie", ("a",), slice(5, 9)),
    ],
)
def test_means_by_turn_role_and_annotation(
    store: datastore.Store, scored: xr.Dataset, per: str, key: object, names: tuple[str, ...], tokens: slice
) -> None:
    table = groups.compare(store, scored, "lying", per=per)
    row = table[(table.direction == "x/calm@20") & (table.group == "True") & (table[per] == key)].iloc[0]
    np.testing.assert_allclose(
        row["mean"], np.mean([score(name, OTHER)[tokens] for name in names]), rtol=1e-4, atol=1e-6
    )
    assert row.n_rollouts == len(names)


def test_correlations_with_lag(scored: xr.Dataset) -> None:
    found = groups.lag_correlation(scored, max_lag=2)
    lengths = {"a": 12, "b": 12, "c": 12, "d": 12, "e": 10}
    first = np.concatenate([score(n, ONE, t)[:-2] for n, t in lengths.items()])
    later = np.concatenate([score(n, OTHER, t)[2:] for n, t in lengths.items()])
    at = found.sel(lag=2, direction="bs/lying@10", other="x/calm@20")
    np.testing.assert_allclose(at, np.corrcoef(first, later)[0, 1], rtol=1e-3)
    np.testing.assert_allclose(found.sel(lag=-2).values, found.sel(lag=2).values.T, rtol=1e-6)
    np.testing.assert_allclose(np.diag(found.sel(lag=0)), 1)
    means = np.array([[score(n, one, t).mean() for one in (ONE, OTHER)] for n, t in lengths.items()])
    np.testing.assert_allclose(groups.rollout_correlation(scored).values, np.corrcoef(means.T), rtol=1e-3)


def test_the_strongest_windows_do_not_overlap(store: datastore.Store, scored: xr.Dataset) -> None:
    found = spans.top_spans(store, scored, "bs/lying@10", window=4, most=4, per_rollout=2)
    assert list(found["mean"].abs()) == sorted(found["mean"].abs(), reverse=True)
    best = max(
        (abs(score(n, ONE, 12 if n != "e" else 10)[i : i + 4].mean()), n, i)
        for n in "abcde"
        for i in range((12 if n != "e" else 10) - 3)
    )
    top = found.iloc[0]
    assert (top.rollout, top.start, top.stop) == (best[1], best[2], best[2] + 4)
    for _, mine in found.groupby("rollout"):
        edges = sorted(zip(mine.start, mine.stop, strict=True))
        assert all(a[1] <= b[0] for a, b in pairwise(edges))
        assert len(mine) <= 2


def test_wrong_questions(store: datastore.Store, scored: xr.Dataset) -> None:
    with pytest.raises(MisuseError, match="have no label 'nothing'; they have n_tokens"):
        groups.compare(store, scored, "nothing")
    with pytest.raises(MisuseError, match="per 'word' is not known"):
        groups.compare(store, scored, "lying", per="word")
    with pytest.raises(MisuseError, match="direction 'y' has no scores here"):
        spans.top_spans(store, scored, "y")
    with pytest.raises(MisuseError, match="choose window or clause"):
        spans.top_spans(store, scored, "bs/lying@10", by="line")
    with pytest.raises(MisuseError, match="rollout 'd' has no scores here"):
        groups.aligned(scored.sel(rollout="a"), groups.Family(("a", "d"), 0))
    with pytest.raises(MisuseError, match="a lag of at most -1 tokens"):
        groups.lag_correlation(scored, max_lag=-1)
