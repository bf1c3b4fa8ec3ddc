"""Annotations: the two formats told apart, and text spans as token ranges."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import ExperimentError, TextSpan, TokenSpan, read_annotations, token_range


def annotated(tmp_path: Path, text: str) -> dict[str, tuple[TokenSpan | TextSpan, ...]]:
    path = tmp_path / "set_annotations.json"
    path.write_text(text)
    return read_annotations(path)


def test_text_spans(tmp_path: Path) -> None:
    found = annotated(
        tmp_path,
        '{"metadata": {}, "annotations": [{"idx": 0, "spans": [{"span": "a b", "category": "lie", "intensity": 2}], '
        '"borderline": [{"span": "c"}]}, {"id": "7", "spans": []}, {"id": 0, "spans": [{"span": "d"}]}]}',
    )
    assert found == {"0": (TextSpan(span="a b", label="lie"), TextSpan(span="d", label="")), "7": ()}


def test_token_ranges_even_of_an_id_called_annotations(tmp_path: Path) -> None:
    one = '{"annotations": [{"token_start": 812, "token_end": 901, "label": "audit_question"}]}'
    expected = (TokenSpan(token_start=812, token_end=901, label="audit_question"),)
    assert annotated(tmp_path, f'{{"71": {one}}}') == {"71": expected}
    assert annotated(tmp_path, f'{{"annotations": {one}}}') == {"annotations": expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"detailed": {}}', "neither text spans .* nor token ranges"),
        ("[]", "neither text spans"),
        ('{"annotations": [{"spans": []}]}', r"an annotation is not valid: `id"),
        ('{"annotations": [{"id": 1, "spans": [{"span": ""}]}]}', r"not valid: `spans.0.span`"),
        ('{"1": {"annotations": [{"token_start": 2, "token_end": 1, "label": "a"}]}}', "token_end 1 lies before"),
        ('{"1": {"annotations": [{"token_start": -2, "token_end": 1, "label": "a"}]}}', "not valid: `token_start`"),
        ("", "is empty"),
    ],
)
def test_neither_format_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message) as caught:
        annotated(tmp_path, text)
    assert "set_annotations.json" in str(caught.value)


@given(st.data())
def test_the_range_holds_the_text_and_no_token_more(data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet="abé世 İ🙂", min_size=1, max_size=20))
    a = data.draw(st.integers(0, len(text) - 1))
    b = data.draw(st.integers(a + 1, len(text)))
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=8)))
    pieces = [raw[i:j] for i, j in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    found = token_range(pieces, text[a:b])
    assert found is not None
    start, stop = found
    # The oracle: the first place where the bytes occur, token by token.
    at = raw.find(text[a:b].encode())
    end = at + len(text[a:b].encode())
    overlapping = []
    position = 0
    for i, piece in enumerate(pieces):
        if position < end and position + len(piece) > at and piece:
            overlapping.append(i)
        position += len(piece)
    assert (start, stop) == (overlapping[0], overlapping[-1] + 1)


def test_a_span_differing_in_case_is_found_last_and_an_absent_one_not() -> None:
    pieces = [b"The CAT", b" and the", b" cat"]
    assert token_range(pieces, " cat") == (2, 3)
    assert token_range(pieces, "the cat") == (1, 3)
    assert token_range(pieces[:1], "the cat") == (0, 1)
    assert token_range(pieces, "dog") is None
    assert token_range([b"a", b"\xff", b"", b"b"], "b") == (3, 4)
