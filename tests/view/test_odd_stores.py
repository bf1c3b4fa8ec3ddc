"""What the page does where something is missing, wrong, or changes while it is open; and one file without a server."""

import shutil
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import datastore
import project
from datastore.labels import add_labels
from datastore.maintenance import drop
from tests import commands
from tests.view import oracle, stores
from tests.view.browser import IMAGE, Viewer, becomes, running, same, serving, settled, shows, until, visiting

RELOAD = "The store has changed: reload"
ORDER = sorted(stores.TRAITS)
ABSENT = np.full(72, np.nan)
"""The curve of a rollout that has no score."""
NAMES = ("plain.zarr", "partly.zarr", "empty.zarr", "long.zarr", "gaps.zarr", "changing.zarr", "leaving.zarr")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores without scores, scored in part, captured in part, empty, with a long rollout; and two that will change."""
    root = tmp_path_factory.mktemp("odd")
    stores.plain_store(root / "plain.zarr", pairs=1)
    partly = stores.plain_store(root / "partly.zarr", pairs=2)
    project.scores(partly, stores.directions(layers=(4,)))
    project.scores(partly, stores.directions(("mood/calm",), layers=(12,)), rollouts=["g0-lie", "g1-lie"])
    empty = stores.plain_store(root / "empty.zarr", pairs=1)
    drop(empty.path, rollouts=[str(name) for name in empty.rollouts.index])
    stores.long_store(root / "long.zarr")
    captured_in_part(root / "gaps.zarr")
    stores.game_store(root / "changing.zarr", pairs=2)
    stores.plain_store(root / "leaving.zarr", pairs=1)
    return root


def captured_in_part(path: Path) -> None:
    """Honest rollouts at three layers, lies at the first alone."""
    for kind, layers in (("honest", stores.LAYERS), ("lie", stores.LAYERS[:1])):
        rollouts = [stores.game_rollout(game, kind) for game in range(2)]
        store = stores.write(path, rollouts, stores.activations, vocab=stores.vocabulary(), layers=layers)
        names = [one.rollout_id for one in rollouts]
        for layer in set(layers) & {4, 8}:
            project.scores(store, stores.directions(layers=(layer,)), rollouts=names)


@pytest.fixture(scope="module")
def served(kept: Path) -> Iterator[tuple[Any, str]]:
    with serving([kept / name for name in NAMES]) as found:
        yield found


@pytest.fixture
def viewer(served: tuple[Any, str]) -> Iterator[Viewer]:
    with visiting(*served) as one:
        yield one


def test_a_store_without_scores_says_how_to_make_them(viewer: Viewer, kept: Path) -> None:
    viewer.open("?store=plain.zarr")
    viewer.page.get_by_text("python -m project plain.zarr --vectors DIR").wait_for()
    viewer.button("Trajectories").click()
    _, wanted = oracle.score(datastore.open(kept / "plain.zarr"), "g0-honest", "bs/lying@4")
    shows(viewer, "norms", {"residual@4": wanted}, rtol=1e-5)
    assert viewer.lines("scores") == {}
    for view in ("Transcript", "Compare", "Overview"):
        viewer.button(view).click()
    for section in ("Heatmaps", "Spans", "Correlation", "Calibration", "Captured"):
        viewer.button(section).click()
    becomes(viewer, viewer.page.locator(".t").count, 72)


def test_a_store_scored_in_part_shows_what_is_there(viewer: Viewer, kept: Path) -> None:
    viewer.open("?store=partly.zarr&view=Trajectories&lines=layer&trait=mood/calm&smooth=1&rollout=g0-lie")
    store = datastore.open(kept / "partly.zarr")
    rows = np.asarray(store.select("residual", rollouts="g0-lie", layers=12).values, np.float64)
    unit = np.asarray(stores.directions(("mood/calm",), layers=(12,))[0].values, np.float64)
    wanted = rows @ (unit / np.linalg.norm(unit)) / np.linalg.norm(rows, axis=1)
    shows(viewer, "scores", {"mood/calm@12": wanted}, rtol=1e-4)
    assert len(viewer.lines("scores")) == 2
    viewer.open("?store=partly.zarr&view=Trajectories&lines=layer&trait=mood/calm&smooth=1&rollout=g0-honest")
    shows(viewer, "scores", {"mood/calm@12": ABSENT})
    assert len(viewer.lines("scores")) == 2
    for view in ("Compare", "Overview"):
        viewer.button(view).click()


def test_a_store_captured_in_part_shows_what_is_there(viewer: Viewer, kept: Path) -> None:
    viewer.open("?store=gaps.zarr&section=Captured")
    names = [str(name) for name in datastore.open(kept / "gaps.zarr").rollouts.index]
    wanted = [1.0 if layer == 4 or "honest" in name else 0.0 for layer in stores.LAYERS for name in names]
    becomes(viewer, lambda: viewer.evaluate(IMAGE, "captured-residual"), wanted)
    viewer.page.get_by_text("residual: 67% of rollouts x layers").wait_for()
    viewer.open("?store=gaps.zarr&view=Trajectories&rollout=g0-lie&lines=layer&trait=bs/lying&smooth=1")
    store = datastore.open(kept / "gaps.zarr")
    curve = oracle.drawn(store, "g0-lie", "bs/lying@4", smooth=1)
    same(viewer, "scores", {"bs/lying@4": curve, "bs/lying@8": ABSENT})
    becomes(viewer, lambda: set(viewer.lines("norms")), {"residual@4"})
    viewer.open("?store=gaps.zarr&view=Compare&rollout=g0-honest&rollout=g0-lie&smooth=1&layer=4&traits=bs/lying")
    a, b = (oracle.drawn(store, f"g0-{kind}", "bs/lying@4", smooth=1) for kind in ("honest", "lie"))
    same(viewer, "difference", {"bs/lying@4": b - a})
    viewer.field("Layer").select_option("8")
    shows(viewer, "difference", {"bs/lying@8": ABSENT})
    for choice in ("Groups", "Stores", "Overview", "Rollouts", "Heatmaps", "Spans", "Correlation", "Calibration"):
        viewer.button(choice).click()


def test_an_empty_store_says_so(viewer: Viewer) -> None:
    viewer.open("?store=empty.zarr", text=False)
    viewer.page.get_by_text("This store holds no rollouts").wait_for()
    for view in ("Trajectories", "Transcript", "Compare", "Overview"):
        viewer.button(view).click()


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("?store=partly.zarr&trait=gone/away", "there are no scores of the trait 'gone/away'"),
        ("?store=partly.zarr&rollout=nobody", "the store has no rollout 'nobody'"),
        ("?store=gone.zarr", "the store 'gone.zarr' is not served here"),
        ("?mode=loud&smooth=99", "mode of the address can't be read; smooth of the address can't be read"),
    ],
)
def test_an_address_that_names_what_is_not_there_is_answered(viewer: Viewer, query: str, said: str) -> None:
    viewer.open(query)
    viewer.page.get_by_text(said).wait_for()


def test_cleaning_without_a_calibration_says_what_to_run(viewer: Viewer) -> None:
    viewer.open("?store=partly.zarr&view=Trajectories")
    viewer.field("Massive dimensions taken out").select_option("all")
    viewer.page.get_by_text("no calibration of residual says which dimensions are massive").wait_for()
    viewer.field("Massive dimensions taken out").select_option("none")
    viewer.page.get_by_text("says which dimensions are massive").wait_for(state="hidden")
    assert until(lambda: viewer.lines("scores"), bool, page=viewer.page)


def test_a_store_that_changed_offers_to_be_reloaded(viewer: Viewer, kept: Path) -> None:
    viewer.open("?store=partly.zarr")
    viewer.page.get_by_role("columnheader", name="stakes").wait_for()
    assert viewer.page.get_by_role("columnheader", name="verdict").count() == 0
    add_labels(kept / "partly.zarr", {"g0-lie": {"verdict": "caught"}})
    viewer.page.get_by_role("button", name=RELOAD).click()
    viewer.page.get_by_role("columnheader", name="verdict").wait_for()


def test_an_address_outlives_a_change_of_the_store(viewer: Viewer, kept: Path) -> None:
    asked = "?store=changing.zarr&view=Trajectories&rollout=g1-lie&trait=mood/calm&mode=raw&smooth=1&token=45"
    viewer.open(asked)
    address = until(lambda: viewer.page.evaluate("location.search"), lambda q: "mood" in q, page=viewer.page)
    add_labels(kept / "changing.zarr", {"g1-lie": {"verdict": "caught"}})
    viewer.page.get_by_role("button", name=RELOAD).click()
    viewer.page.get_by_role("button", name=RELOAD).wait_for(state="hidden")
    store = datastore.open(kept / "changing.zarr")
    curves = {f"{trait}@4": oracle.drawn(store, "g1-lie", f"{trait}@4", mode="raw", smooth=1) for trait in ORDER}
    same(viewer, "scores", curves)
    becomes(viewer, lambda: viewer.page.evaluate("location.search"), address)
    viewer.open(address)  # what was kept before the change shows the same after it
    same(viewer, "scores", curves)
    becomes(viewer, lambda: viewer.page.locator(".t.pinned").get_attribute("data-i"), "45")
    drop(kept / "changing.zarr", rollouts=["g1-lie"])
    viewer.page.get_by_role("button", name=RELOAD).click()
    viewer.page.get_by_text("the store has no rollout 'g1-lie'").wait_for()
    viewer.open(address)
    viewer.page.get_by_text("the store has no rollout 'g1-lie'; something else is shown").wait_for()
    becomes(viewer, viewer.field("Rollout").input_value, "g0-honest")
    becomes(viewer, viewer.field("Trait").input_value, "mood/calm")  # what is still there is restored
    becomes(viewer, viewer.field("Scores as").input_value, "raw")


def test_a_store_that_is_taken_away_is_said_to_be_gone(viewer: Viewer, kept: Path) -> None:
    viewer.open("?store=leaving.zarr")
    shutil.rmtree(kept / "leaving.zarr")
    viewer.page.get_by_text("leaving.zarr does not exist").wait_for()
    viewer.field("Store").select_option("plain.zarr")
    viewer.page.get_by_text("leaving.zarr does not exist").wait_for(state="hidden")
    becomes(viewer, viewer.page.locator(".t").count, 72)


def test_a_long_rollout_is_drawn_and_zoomed_into(viewer: Viewer, kept: Path) -> None:
    viewer.open("?store=long.zarr&rollout=long&view=Trajectories&smooth=1&mode=raw")
    full = lambda lines: len(lines) == 11 and all(map(len, lines.values()))  # noqa: E731
    found = until(lambda: viewer.lines("scores"), full, page=viewer.page)
    store = datastore.open(kept / "long.zarr")
    scores = store.scores(rollouts="long", traits=["set/trait 0"]).score.values[:, 0]
    shown = np.array(found["set/trait 0@4"], float)
    assert len(shown) <= 3000
    assert {shown.min(), shown.max()} == {scores.min(), scores.max()}  # thinned, and yet its peaks are all there
    becomes(viewer, viewer.page.locator(".t").count, 14_000)
    zoom = """() => { const one = Bokeh.documents[0].get_model_by_name("scores");
      const view = Bokeh.index.find_one(one); view.set_range?.call; one.x_range.start = 7000; one.x_range.end = 8000;
      view.trigger_ranges_update_event(); }"""
    viewer.evaluate(zoom)
    part = until(
        lambda: np.array(viewer.lines("scores")["set/trait 0@4"], float), lambda p: len(p) == 1003, page=viewer.page
    )
    np.testing.assert_allclose(part, scores[6999:8002], rtol=1e-6)
    viewer.button("Transcript").click()
    viewer.token(13990).click()
    assert until(lambda: viewer.page.evaluate("location.search"), lambda q: "token=13990" in q, page=viewer.page)


@pytest.mark.filterwarnings("ignore:Widget.name is deprecated:PendingDeprecationWarning")
@pytest.mark.filterwarnings("ignore:button_type is deprecated:PendingDeprecationWarning")
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame")
def test_one_file_needs_no_server(served: tuple[Any, str], kept: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    command = ["export", str(kept / "partly.zarr"), "--ids", "g0-honest,g0-lie", "--out", str(out)]
    assert commands.here("view", *command) == 0
    assert "http://" not in out.read_text(encoding="utf-8").replace("http://www.w3.org", "").split("<script")[0]
    with visiting(served[0], out.as_uri()) as viewer:
        _read_alone(viewer, kept)


def _read_alone(viewer: Viewer, kept: Path) -> None:
    page = viewer.page
    page.goto(viewer.address)
    page.locator(".t").first.wait_for()
    becomes(viewer, page.locator(".t").count, 2 * 72)
    store = datastore.open(kept / "partly.zarr")
    shows(viewer, "scores-of-g0-lie", {"bs/lying@4": oracle.drawn(store, "g0-lie", "bs/lying@4")})
    colour = partial(viewer.colour, viewer.token(60).nth(1))
    before = settled(viewer, colour)
    page.get_by_label("Shaded by").nth(1).select_option("bs/lying@4")
    page.locator(".legend .name", has_text="bs/lying@4").first.wait_for()
    viewer.token(45).nth(1).click()
    becomes(viewer, lambda: page.locator(".t.pinned").get_attribute("data-i"), "45")
    assert until(colour, lambda found: found not in ("", before), page=page) not in ("", before)


def test_the_command_line_refuses_in_one_sentence(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert commands.here("view", kept / "plain.zarr", "--port", port) == 1
    assert f"port {port} is taken by another program" in capsys.readouterr().err
    cases = {
        ("nowhere.zarr",): (2, "nowhere.zarr does not exist"),
        (str(tmp_path),): (2, "is not an activation store"),
        (str(kept / "plain.zarr" / "zarr.json"),): (2, "is not an activation store|is not a directory"),
        (str(kept / "plain.zarr"), "--host", "0.0.0.0"): (2, "give --token WORD"),
        ("export", str(kept / "plain.zarr"), "--ids", "g0-lie"): (2, "Name with --out"),
        ("export", str(kept / "plain.zarr"), "--ids", "x", "--out", "a.html"): (2, "'x'|x; there are"),
        ("export", str(kept / "plain.zarr"), "--out", str(tmp_path)): (1, "can't be written as a file"),
        ("export", str(kept / "plain.zarr"), "--export", "pdf", "--out", "a"): (2, "'pdf' is not known"),
    }
    for arguments, (code, said) in cases.items():
        left = commands.here("view", *arguments)
        text = " ".join(capsys.readouterr().err.split())
        assert left == code, text
        assert any(one in text for one in said.split("|")), text
        assert "Traceback" not in text


def test_a_token_is_asked_for_where_others_can_come(kept: Path) -> None:
    import urllib.error
    import urllib.request

    with running([kept / "plain.zarr"], "--token", "open sesame") as address:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/")
        with urllib.request.urlopen(f"{address}/?token=open+sesame") as answer:
            assert answer.status == 200
            assert "HttpOnly" in answer.headers["set-cookie"]
        asked = urllib.request.Request(f"{address}/", headers={"Authorization": "Bearer open sesame"})
        with urllib.request.urlopen(asked) as answer:
            assert answer.status == 200
        elsewhere = urllib.request.Request(f"{address}/?token=open+sesame", headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(elsewhere)
