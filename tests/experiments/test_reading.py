"""Transcripts from files, directories and globs: every format, and one clear sentence for what is none."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import ExperimentError, TextSpan, TokenSpan, Transcript, natural_key, read

DATA = Path(__file__).parents[1] / "data"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def test_every_kind_of_chat(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "chats.jsonl",
        {"id": 10, "messages": CHAT, "tools": [{"type": "function"}], "score": 0.5, "ok": True, "note": None},
        {"id": "2", "prompt": "a", "response": "b", "system_prompt": "be good"},
        {"id": 3, "token_ids": [5, 6, 7], "prompt_end": 2, "tags": ["x"], "prompt_set": "p", "tokens": ["a", "b", "c"]},
        {"id": "4", "text": "once", "nested": {"b": [1, "é"], "a": None}},
    )
    two, three, four, ten = read(path)
    assert [one.kind for one in (two, three, four, ten)] == ["prompt", "token_ids", "text", "messages"]
    assert (two.prompt, two.response, two.labels) == ("a", "b", {"system_prompt": "be good"})
    assert (three.token_ids, three.prompt_end, three.tags, three.prompt_set) == ((5, 6, 7), 2, ("x",), "p")
    assert three.labels == {}
    assert four.labels == {"nested": '{"a":null,"b":[1,"é"]}'}
    assert ten.labels == {"score": 0.5, "ok": True}
    assert [(m.role, m.content) for m in ten.messages or ()] == [("user", "hi"), ("assistant", "yes")]
    assert ten.source == f"{path}, line 1"


def test_the_same_by_content_in_a_json_file(tmp_path: Path) -> None:
    records = [{"id": str(i), "text": "once\u2028more"} for i in range(3)]
    (tmp_path / "list.json").write_text(json.dumps(records))
    as_list = read(tmp_path / "list.json")
    as_lines = read(lines(tmp_path / "lines.json", *records))
    raw = tmp_path / "raw.jsonl"  # a line separator unescaped inside a string ends no line
    raw.write_text("\ufeff" + "\n".join(json.dumps(one, ensure_ascii=False) for one in records), encoding="utf-8")
    texts = [[(one.id, one.text) for one in found] for found in (as_list, as_lines, read(raw))]
    assert texts == [[(str(i), "once\u2028more") for i in range(3)]] * 3


def test_the_real_tau_bench_runs() -> None:
    path = DATA / "rollouts" / "gpt-4o-airline_mixed_outcome_subset.json"
    raw = json.loads(path.read_text())
    found = read(DATA / "rollouts")
    assert [one.id for one in found] == [f"{r['task_id']}-{r['trial']}" for r in raw]
    for one, run in zip(found, raw, strict=True):
        assert one.labels == {key: run[key] for key in ("task_id", "trial", "reward")}
        assert one.messages is not None
        for message, original in zip(one.messages, run["traj"], strict=True):
            kept = message.as_dict()
            assert {**kept, "tool_calls": list(kept.get("tool_calls", ()))} == {
                **original,
                "content": original["content"] or "",
                "tool_calls": original.get("tool_calls") or [],
            }
    assert {one.labels["reward"] for one in found} == {0.0, 1.0}


def test_a_directory_of_responses_with_its_sidecars(tmp_path: Path) -> None:
    folder = tmp_path / "set1"
    folder.mkdir()
    for i in (1, 2, 10):
        body = {"prompt": "p", "response": "r s", "token_ids": [1, 2, 3, 4], "prompt_end": 2, "tags": ["own"]}
        (folder / f"{i}.json").write_text(json.dumps(body))
    (folder / "_tags.json").write_text('{"2": ["later", "own"]}')
    (folder / "x_annotations.json").write_text("{not read}")
    (tmp_path / "set1_annotations.json").write_text(
        '{"annotations": [{"idx": 2, "spans": [{"span": "r s", "category": "c"}]}]}'
    )
    found = read(folder)
    assert [one.id for one in found] == ["1", "2", "10"]
    assert found[1].tags == ("own", "later")
    assert found[1].annotations == (TextSpan(span="r s", label="c"),)
    assert found[0].tags == ("own",)
    assert found[0].annotations == ()
    assert [one.id for one in read(f"{folder}/*.json")] == ["1", "2", "10"]
    assert [one.id for one in read([folder / "10.json", folder / "1.json"])] == ["1", "10"]
    assert len(read([folder, f"{folder}/*.json"])) == 3  # a file named twice is read once
    with pytest.raises(ExperimentError, match=r"_tags\.json holds tags or annotations, not transcripts"):
        read(folder / "_tags.json")


def test_what_a_rollouts_source_says_becomes_labels(tmp_path: Path) -> None:
    body = {
        "prompt": "p",
        "response": "",
        "token_ids": [1, 2, 3],
        "prompt_end": 3,
        "turn_boundaries": [
            {"role": "user", "token_start": 0, "token_end": 1},
            {"role": "tool_result", "token_start": 1, "token_end": 3, "tool_name": "x"},
        ],
        "source": {"type": "audit", "run": "run-37", "sample_idx": 4, "classification": None, "truncated": False},
        "sentence_boundaries": [{"sentence_num": 0, "token_start": 0, "token_end": 0, "cue_p": 0.1}],
    }
    (tmp_path / "71.json").write_text(json.dumps(body))
    (one,) = read(tmp_path)
    assert one.labels == {"source_type": "audit", "run": "run-37", "sample_idx": 4, "truncated": False}
    assert [(t.role, t.token_start, t.token_end) for t in one.turns] == [("user", 0, 1), ("tool", 1, 3)]
    assert one.annotations == (TokenSpan(token_start=3, token_end=3, label="sentence 0"),)


BAD = {
    '{"id": 1, "text": "a"}\n{"id": 2, "te': r"line 2, column \d+: not valid JSON: .*",
    '[{"id": 1, "text": "a"},': r"line 1, column \d+: not valid JSON: the file ends too early, it may be cut short",
    "": "is empty; it should hold transcripts",
    "[]": "holds an empty list",
    "3": r"not a transcript \(no keys\)",
    '[{"weights": 1}]': r"item 0: not a transcript \(keys weights\); a chat has `messages`",
    '[{"text": "a"}]': "item 0: a transcript without `id`",
    '[{"id": "", "text": "a"}]': "transcript without `id` is not valid: `id`",
    '[{"id": true, "text": "a"}]': "transcript True is not valid: `id`",
    '[{"id": 1, "text": ""}]': "transcript 1 is empty: there is no text to capture",
    '[{"id": 1, "messages": []}]': "transcript 1 is empty",
    '[{"id": 1, "token_ids": []}]': "transcript 1 is empty: `token_ids` has no tokens",
    '[{"id": 1, "token_ids": [1, -2]}]': "token id -2 at position 1 is not a whole number",
    '[{"id": 1, "token_ids": [1, true]}]': "token id True at position 1",
    '[{"id": 1, "token_ids": [1], "prompt_end": 2}]': "`prompt_end` 2 is outside its 1 tokens",
    '[{"id": 1, "response": "a"}]': "transcript 1 has a `response` and no `prompt`",
    '[{"id": 1, "text": "a", "prompt": "b"}]': "transcript 1 has both `prompt` and `text`; give one of",
    '[{"id": 1, "text": "a", "prompt_end": 1}]': "which count tokens, but no `token_ids`",
    '[{"id": 1, "text": "a", "n_tokens": 1}]': "has a label `n_tokens`, a column the rollout table has already; rename",
    '[{"id": 1, "text": "a", "a/b": 1}]': "has a label named 'a/b', which can't name an array",
    '[{"id": 1, "text": "a", "big": 9223372036854775808}]': "has a label `big` beyond 64 bits",
    '[{"id": 1, "text": "a", "big": 1e999}]': "has a label `big` that is infinite",
    '[{"id": 1, "text": "\\ud800"}]': "holds half a surrogate pair",
    '[{"id": 1, "messages": [{"role": "narrator", "content": "a"}]}]': "is not valid: `messages.0.role`",
    '[{"id": 1, "messages": [{"role": "user", "content": [{"type": "image"}]}]}]': "part of type 'image' is not text",
    '[{"id": 1, "token_ids": [1], "annotations": 3}]': "`annotations` must be a list, not int",
    '[{"id": 1, "token_ids": [1], "annotations": [{"token_start": 0, "token_end": 2, "label": "a"}]}]': (
        "annotation 'a' ends at token 2, beyond its 1 tokens"
    ),
    '[{"id": 1, "token_ids": [1], "turn_boundaries": [{"role": "user", "token_start": 1, "token_end": 0}]}]': (
        "turn ends at token 0, before its start 1"
    ),
    '[{"task_id": 1, "reward": 1.0, "traj": []}]': r"a tau-bench run \(it has `traj`\) without `trial`",
    '[{"id": 1, "text": "a"}, {"id": "1", "text": "b"}]': "transcript id '1' is there twice: .*item 0 and .*item 1",
    "[" * 100_000: "nested too deeply",
    '{"id": ' + "9" * 5000 + ', "text": "a"}': "not usable JSON: .*digit",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:60])
def test_bad_files_in_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ExperimentError, match=BAD[text]) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_bad_paths_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="no input was named"):
        read([])
    with pytest.raises(ExperimentError, match=r"gone\.json does not exist"):
        read(tmp_path / "gone.json")
    with pytest.raises(ExperimentError, match=r"\*\.json matches no file"):
        read(f"{tmp_path}/*.json")
    with pytest.raises(ExperimentError, match=r"holds no \.json or \.jsonl file"):
        read(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"id": 1,\n"text": "\xe9"}')
    with pytest.raises(ExperimentError, match=r"latin\.json, line 2: not UTF-8"):
        read(tmp_path / "latin.json")
    with pytest.raises(ExperimentError, match="/dev/null is not a plain file"):
        read("/dev/null")


def test_a_file_over_the_limit_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"id": 1, "text": "x" * 100})
    assert len(read(path, max_bytes=path.stat().st_size)) == 1
    with pytest.raises(ExperimentError, match=r"larger than the 100 bytes read at once; split it .*max_bytes"):
        read(path, max_bytes=100)


def test_a_name_with_brackets_is_a_name_before_it_is_a_glob(tmp_path: Path) -> None:
    path = lines(tmp_path / "a[1].jsonl", {"id": 1, "text": "x"})
    assert len(read(str(path))) == 1


@given(st.lists(st.integers(0, 10**30), unique=True))
def test_natural_order_of_numbers_is_their_order(numbers: list[int]) -> None:
    assert sorted(map(str, numbers), key=natural_key) == [str(n) for n in sorted(numbers)]


@given(st.lists(st.text(alphabet="a1b0.-2", max_size=6), unique=True))
def test_natural_order_is_total(names: list[str]) -> None:
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)


# fmt: off
KEYS = [
    "id", "messages", "role", "content", "prompt", "response", "token_ids", "text", "traj", "tools", "tags", "source",
    "turn_boundaries", "annotations", "sentence_boundaries", "prompt_end", "prompt_set", "trial", "task_id", "reward",
    "token_start", "token_end", "label",
]
# fmt: on
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(json_values.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=30))
def test_any_bytes_are_transcripts_or_one_sentence(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "fuzz.json"
    path.write_bytes(raw)
    try:
        found = read(path)
    except ExperimentError as error:
        message = str(error)
    else:
        assert found
        assert all(isinstance(one, Transcript) for one in found)
        return
    assert str(path) in message
