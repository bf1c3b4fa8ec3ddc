"""The grammar of layer choices, against its case table and a plain set model."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.errors import RequestError
from capture.layerspec import parse_layers


@pytest.mark.parametrize(
    ("spec", "n_layers", "layers"),
    [
        ("all", 5, (0, 1, 2, 3, 4)),
        ("16", 61, (16,)),
        ("5,10,15", 61, (5, 10, 15)),
        ("15, 5,10 ,5", 61, (5, 10, 15)),
        ("5-8", 61, (5, 6, 7, 8)),
        ("7-7", 61, (7,)),
        ("0-75:5", 80, tuple(range(0, 76, 5))),
        ("0-6:4", 61, (0, 4)),
        ("30%-60%", 61, tuple(range(18, 37))),
        ("50%", 61, (30,)),
        ("0%-100%", 61, tuple(range(61))),
        ("100%", 61, (60,)),
        ("29%", 100, (29,)),
        ("12.5%", 8, (1,)),
        ("0%-50%:10", 40, (0, 10, 20)),
        ("1,2-4,50%", 12, (1, 2, 3, 4, 6)),
        ("3,all", 4, (0, 1, 2, 3)),
    ],
)
def test_what_each_form_selects(spec: str, n_layers: int, layers: tuple[int, ...]) -> None:
    assert parse_layers(spec, n_layers) == layers


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("", "'' is not a layer"),
        ("5,", "'' is not a layer"),
        ("-1", "'-1' is not a layer"),
        ("best", "'best' is not a layer"),
        ("5:2", "'5:2' is not a layer"),
        ("99", "names layer 99, which does not exist"),
        ("0-61", "names layer 61, which does not exist"),
        ("20-5", "selects nothing, its end comes before its start"),
        ("60%-30%", "selects nothing, its end comes before its start"),
        ("5-20:0", "has step 0"),
        ("10-50%", "mixes a layer number and a depth"),
        ("101%", "is deeper than 100%"),
        ("1e3", "'1e3' is not a layer"),
    ],
)
def test_refusals_name_the_piece_and_the_layers_there_are(spec: str, why: str) -> None:
    with pytest.raises(RequestError, match=r"this model has layers 0 to 60, written as all, 16,") as caught:
        parse_layers(spec, 61)
    assert why in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_model_without_layers() -> None:
    with pytest.raises(RequestError, match="the model has 0 layers"):
        parse_layers("all", 0)


@given(st.integers(1, 90).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))))
def test_any_set_written_out_comes_back_ascending(case: tuple[int, set[int]]) -> None:
    n_layers, layers = case
    assert parse_layers(",".join(map(str, layers)), n_layers) == tuple(sorted(layers))


@given(st.text("0123456789-%:,.al ", max_size=8), st.integers(1, 70))
def test_any_text_selects_layers_that_exist_or_is_refused(spec: str, n_layers: int) -> None:
    try:
        layers = parse_layers(spec, n_layers)
    except RequestError:
        return
    assert layers
    assert set(layers) <= set(range(n_layers))
    assert list(layers) == sorted(set(layers))


@pytest.mark.parametrize("module", ["capture.layerspec", "capture.batching", "capture.errors"])
def test_pure_modules_do_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
