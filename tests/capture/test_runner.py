"""A model's rows as they lie in the store: bits of transformers itself, whatever the order, the halving, the growth."""

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import capture
from capture import forward, runner
from capture.errors import CaptureError, RequestError
from capture.loading import Loaded, describe, load
from capture.runner import Tick, carry_out
from datastore import chunkwork
from datastore.codec import encode_pieces
from datastore.dtype import numpy_dtype, upcast
from datastore.errors import ReadOnlyError
from datastore.schema import Rollout
from tests.capture import cli, stored, tiny
from tests.capture.stories import MODEL

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "stories260K" / "golden.json").read_text())
LENGTHS = (9, 40, 17, 33, 21, 5, 28, 12)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(describe(MODEL), device="cpu")


def made(lengths: Sequence[int] = LENGTHS, *, vocab: int = 512) -> list[Rollout]:
    random = np.random.default_rng(5)
    return [
        Rollout(rollout_id=f"r{i}", token_ids=random.integers(3, vocab, n, np.int32), prompt_end=n // 2)
        for i, n in enumerate(lengths)
    ]


def take(loaded: Loaded, store: Path, rollouts: Sequence[Rollout] | None = None, **options: Any) -> capture.Done:
    """Capture in batches of a few rollouts, of which each has another length."""
    settings = {"batch_tokens": 90, "most_tokens": 16} | options
    return capture.run(loaded.model, loaded.tokenizer, rollouts or made(), store, **settings)


class Starved:
    """A model with room for so many padded tokens only; how many forwards fitted, and at which Ctrl-C comes."""

    def __init__(self, model: Any, tokens: int, *, stop_at: int = 0) -> None:
        self.fitted, self._tokens, self._stop_at = 0, tokens, stop_at
        self._handle = model.register_forward_pre_hook(self._check, with_kwargs=True)

    def _check(self, _: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].numel() > self._tokens:
            raise torch.OutOfMemoryError("out of memory, says the test")
        self.fitted += 1
        if self.fitted == self._stop_at:
            raise KeyboardInterrupt

    def __enter__(self) -> "Starved":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def stop_after(batches: int) -> Callable[[Tick], None]:
    """Press Ctrl-C when so many batches are done."""
    seen: list[Tick] = []

    def tick(now: Tick) -> None:
        seen.append(now)
        if len(seen) > batches:
            raise KeyboardInterrupt

    return tick


# -- bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_rows_are_output_hidden_states_of_the_same_batches(tmp_path: Path, dtype: str) -> None:
    tower: Any = load(describe(MODEL), device="cpu").model if dtype == "float32" else None
    model: Any = tower or tiny.tiny_model("llama", dtype=torch.bfloat16)
    rollouts = made(vocab=tiny.VOCAB)
    done = capture.run(model, None, rollouts, tmp_path / "s.zarr", batch_tokens=90, most_tokens=16)
    assert (done.rollouts, done.tokens, done.captures) == (len(LENGTHS), sum(LENGTHS), [1])
    found, tokens = stored.rows(tmp_path / "s.zarr"), {r.rollout_id: r.token_ids for r in rollouts}
    checked = 0
    for batch in stored.attributes(tmp_path / "s.zarr", 1)["batches"]:
        lengths = [len(tokens[name]) for name in batch]
        ids, mask = torch.zeros(len(batch), max(lengths), dtype=torch.long), torch.zeros(len(batch), max(lengths))
        for row, name in enumerate(batch):
            ids[row, : lengths[row]] = torch.from_numpy(tokens[name].astype(np.int64))
            mask[row, : lengths[row]] = 1
        places = torch.arange(max(lengths)).expand_as(ids)
        with torch.inference_mode():
            states = model(ids, mask.long(), places, use_cache=False, output_hidden_states=True).hidden_states
        layers = model.config.num_hidden_layers
        for layer in range(layers - 1):  # the last of them is normed
            for row, name in enumerate(batch):
                bits = states[layer + 1][row, : lengths[row]].view(torch.int16 if dtype == "bfloat16" else torch.int32)
                width = np.uint16 if dtype == "bfloat16" else np.uint32
                assert np.array_equal(found["residual", layer, name], bits.numpy().view(width))
                checked += 1
        for row, name in enumerate(batch):
            last = found["residual", layers - 1, name]
            values = last.view(ml_dtypes.bfloat16).astype(np.float32) if dtype == "bfloat16" else last.view(np.float32)
            normed = model.norm(torch.from_numpy(values).to(model.dtype))
            assert torch.equal(normed, states[layers][row, : lengths[row]])
    assert checked == len(LENGTHS) * (layers - 1)


def test_the_stored_last_layer_goes_on_as_the_golden_texts_do(loaded: Loaded, tmp_path: Path) -> None:
    """The rows predict the tokens that another program found greedily: weights, tokenizer, positions are right."""
    texts = {name: np.array(GOLDEN[name], np.int32) for name in ("greedy_from_bos", "greedy_Zoo")}
    rollouts = [Rollout(rollout_id=name, token_ids=ids) for name, ids in texts.items()]
    take(loaded, tmp_path / "s.zarr", rollouts, layers="4", batch_tokens=4096)
    model: Any = loaded.model
    for name, ids in texts.items():
        last = torch.from_numpy(stored.rows(tmp_path / "s.zarr")["residual", 4, name].view(np.float32))
        predicted = (model.norm(last) @ model.embed_tokens.weight.T).argmax(-1).numpy()
        assert (predicted[10:-1] == ids[11:]).all()
        assert len(ids) > 60


# -- growth ------------------------------------------------------------------------------------------------------------


def test_layers_and_components_added_later_have_the_bits_of_all_at_once(loaded: Loaded, tmp_path: Path) -> None:
    both = ("residual", "mlp_out")
    take(loaded, tmp_path / "once.zarr", components=both)
    grown = tmp_path / "grown.zarr"
    take(loaded, grown, layers="1,3")
    take(loaded, grown, [r for r in made() if r.rollout_id in ("r2", "r5")], layers="all")
    take(loaded, grown, components=both, layers="0-2")
    take(loaded, grown, components=both)
    assert len(stored.captures(grown)) > 4, "ragged remainders are captures of their own"
    stored.assert_same(stored.rows(grown), stored.rows(tmp_path / "once.zarr"))


def test_memory_that_is_used_again_for_the_next_rows_is_not_what_is_written(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows through slabs, as from a GPU, with a writer that is slower than the batches to come."""
    long = made([40, 64, 64, 30, 64, 50, 61, 33])
    take(loaded, tmp_path / "plain.zarr", long, batch_tokens=64)
    to_host, encode = forward._Rows._to_host, encode_pieces

    def through_slab(self: Any, tensor: torch.Tensor) -> torch.Tensor:
        rows = to_host(self, tensor)
        self.slab = self.slab or self._staging.slab(self._n_bytes)
        return self.slab.take(tuple(rows.shape), rows.dtype).copy_(rows)  # type: ignore[no-any-return]

    def slowly(*args: Any) -> Any:
        time.sleep(0.02)
        return encode(*args)

    monkeypatch.setattr(forward._Rows, "_to_host", through_slab)
    monkeypatch.setattr(chunkwork, "encode_pieces", slowly)
    take(loaded, tmp_path / "staged.zarr", long, batch_tokens=64)
    stored.assert_same(stored.rows(tmp_path / "staged.zarr"), stored.rows(tmp_path / "plain.zarr"))


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_write_the_files_that_threads_write(loaded: Loaded, tmp_path: Path, processes: int) -> None:
    take(loaded, tmp_path / "threads.zarr", memory=1 << 20)
    done = take(loaded, tmp_path / "processes.zarr", memory=1 << 20, processes=processes)
    assert done.captures == [1]
    stored.assert_same(stored.rows(tmp_path / "processes.zarr"), stored.rows(tmp_path / "threads.zarr"))
    chunks = [
        one for one in (tmp_path / "threads.zarr" / "captures" / "0001" / "residual" / "c").rglob("*") if one.is_file()
    ]
    assert chunks
    for file in chunks:
        other = tmp_path / "processes.zarr" / file.relative_to(tmp_path / "threads.zarr")
        assert other.read_bytes() == file.read_bytes()


def test_beside_a_gpu_a_process_of_several_takes_its_share_of_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runner._writing_processes() == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert runner._writing_processes() == 12
    for name, value in {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert runner._writing_processes() == 3


def test_rollouts_added_later_leave_those_that_are_there(loaded: Loaded, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    take(loaded, store, made()[:3])
    before = stored.rows(store)
    done = take(loaded, store, made())
    assert (done.captures, done.rollouts) == ([2], len(LENGTHS) - 3)
    stored.assert_same(stored.rows(store), before)
    assert take(loaded, store, made()).captures == []


def test_nothing_left_to_do_needs_no_model(loaded: Loaded, tmp_path: Path) -> None:
    take(loaded, tmp_path / "s.zarr")

    def refuse() -> Any:
        raise AssertionError("the model was asked for")

    assert carry_out([], tmp_path / "s.zarr", source=refuse).captures == []


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lengths", "room"), [(LENGTHS, 200), ((80,), 50)], ids=["batch halved", "rollout split"])
def test_what_did_not_fit_is_computed_the_same_way_when_resumed(
    loaded: Loaded, tmp_path: Path, lengths: Sequence[int], room: int
) -> None:
    """Stopped in the midst of the pieces, and gone on with where there is room: the bits of one not stopped."""
    whole, resumed, one = tmp_path / "whole.zarr", tmp_path / "resumed.zarr", made(lengths)
    with Starved(loaded.model, room):
        assert len(take(loaded, whole, one, batch_tokens=4096).notes) == 1
    with Starved(loaded.model, room, stop_at=2), pytest.raises(KeyboardInterrupt):
        take(loaded, resumed, one, batch_tokens=4096)
    assert stored.captures(resumed) == []
    with Starved(loaded.model, 10**6) as roomy:
        assert take(loaded, resumed, one, batch_tokens=4096).notes == []
    assert roomy.fitted == 2
    assert cli.contents(resumed) == cli.contents(whole)


def test_halving_is_recorded_and_reused_when_layers_are_added(loaded: Loaded, tmp_path: Path) -> None:
    whole, grown, unstarved = tmp_path / "whole.zarr", tmp_path / "grown.zarr", tmp_path / "unstarved.zarr"
    with Starved(loaded.model, 60):
        take(loaded, whole)
        take(loaded, grown, layers="1")
    notes = stored.attributes(grown, 1)["provenance"]["notes"]
    assert len(notes["halved"]) >= 2
    with Starved(loaded.model, 90) as roomy:
        assert take(loaded, grown).notes == []
    take(loaded, unstarved)
    batches = len(stored.attributes(unstarved, 1)["batches"])
    assert roomy.fitted == batches + len(notes["halved"])
    stored.assert_same(stored.rows(grown), stored.rows(whole))


def test_a_rollout_split_for_memory_is_split_again_when_layers_are_added(loaded: Loaded, tmp_path: Path) -> None:
    whole, grown = tmp_path / "whole.zarr", tmp_path / "grown.zarr"
    one = made([80])
    with Starved(loaded.model, 50):
        done = take(loaded, whole, one)
        take(loaded, grown, one, layers="0")
    assert done.notes == ["rollout 'r0' did not fit in memory and was computed in pieces of 40 tokens"]
    assert stored.attributes(whole, 1)["provenance"]["notes"]["split"] == [
        {"from_token": 0, "piece_tokens": 40, "rollout_id": "r0"}
    ]
    with Starved(loaded.model, 1000) as roomy:
        take(loaded, grown, one)
    assert roomy.fitted == 2
    stored.assert_same(stored.rows(grown), stored.rows(whole))


def test_a_rollout_with_too_many_rows_for_the_host_is_computed_in_pieces_from_the_outset(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, grown, one = tmp_path / "whole.zarr", tmp_path / "grown.zarr", made([80])
    row = getattr(torch, loaded.dtype).itemsize * loaded.info.hidden * loaded.info.n_layers
    monkeypatch.setattr(runner, "MOST_ROWS", 30 * row)
    assert take(loaded, whole, one).notes == ["rollout 'r0' has too many rows for one forward: pieces of 30 tokens"]
    assert take(loaded, grown, one, layers="0").notes == []
    monkeypatch.setattr(runner, "MOST_ROWS", 1 << 40)
    with Starved(loaded.model, 1000) as roomy:
        take(loaded, tmp_path / "again.zarr", one)
    assert roomy.fitted == 1
    pieces, at_once = stored.rows(whole), stored.rows(tmp_path / "again.zarr")
    for cell, bits in pieces.items():
        a, b = (upcast(one.view(numpy_dtype(loaded.dtype))) for one in (bits, at_once[cell]))
        assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(b), cell


def test_memory_is_logged_by_batch_where_asked_for(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take(loaded, tmp_path / "quiet.zarr")
    assert "memory after" not in capsys.readouterr().err
    monkeypatch.setenv("GENERATION_MEMORY_LOG", "1")
    take(loaded, tmp_path / "told.zarr")
    batches = len(stored.attributes(tmp_path / "told.zarr", 1)["batches"])
    assert len(re.findall(r"memory after \d+ rollouts from r\d+: host [\d.]+ .B", capsys.readouterr().err)) == batches


# -- values that are not finite ----------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(tmp_path: Path) -> Loaded:
    """The small model with NaN for one token that only one rollout has; attention spreads it over that rollout."""
    loaded = load(describe(shutil.copytree(MODEL, tmp_path / "poisoned")), device="cpu")
    embedding: Any = loaded.model
    embedding.embed_tokens.weight[2] = float("nan")
    return loaded


def with_poison() -> list[Rollout]:
    rollouts = made()
    ids = rollouts[3].token_ids.copy()
    ids[-1] = 2
    rollouts[3] = Rollout(rollout_id="r3", token_ids=ids)
    return rollouts


def test_nan_is_stored_counted_and_named(poisoned: Loaded, tmp_path: Path) -> None:
    take(poisoned, tmp_path / "s.zarr", with_poison())
    attrs, found = stored.attributes(tmp_path / "s.zarr", 1), stored.rows(tmp_path / "s.zarr")
    bad = {cell: int(np.isnan(values.view(np.float32)).sum()) for cell, values in found.items()}
    assert {rollout for (_, _, rollout), count in bad.items() if count} == {"r3"}
    assert attrs["nonfinite"] == {"residual": sum(bad.values())}
    assert attrs["nonfinite_tokens"][0] == {"component": "residual", "layer": 0, "rollout_id": "r3", "position": 0}


def test_strict_stops_at_it_and_commits_nothing(poisoned: Loaded, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"residual at layer 0 of rollout 'r3' is not finite at token 0 .*--strict"):
        take(poisoned, tmp_path / "s.zarr", with_poison(), strict=True)
    assert stored.captures(tmp_path / "s.zarr") == []


# -- the machine -------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_refused_before_the_first_forward(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.storage.free_bytes", lambda _: 1000)
    with Starved(loaded.model, 10**6) as model, pytest.raises(CaptureError, match=r"about [\d,]+ bytes .* 1,000 bytes"):
        take(loaded, tmp_path / "s.zarr")
    assert model.fitted == 0


def test_chunks_that_are_there_need_no_room_again(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        take(loaded, tmp_path / "s.zarr", tick=stop_after(2))
    there = sum(file.stat().st_size for file in (tmp_path / "s.zarr.plans").rglob("*") if file.is_file())
    assert cli.chunks(tmp_path / "s.zarr")
    monkeypatch.setattr("capture.runner.expected_bytes", lambda _: 10**7)
    monkeypatch.setattr("datastore.storage.free_bytes", lambda _: 10**7 - there - 1)
    with pytest.raises(CaptureError, match="would not fit"):
        take(loaded, tmp_path / "s.zarr")
    monkeypatch.setattr("datastore.storage.free_bytes", lambda _: 10**7 - there)
    assert take(loaded, tmp_path / "s.zarr").captures == [1]


@pytest.fixture
def unwritable() -> Iterator[Path]:
    """A directory that this process may read and not write, also where the tests are run by root."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o555)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    yield directory
    os.seteuid(me)
    directory.chmod(0o755)
    shutil.rmtree(directory)


def test_a_directory_that_can_not_be_written_is_one_sentence(loaded: Loaded, unwritable: Path) -> None:
    message = r"s\.zarr can't be written .*nothing was captured"
    with Starved(loaded.model, 10**6) as model, pytest.raises(ReadOnlyError, match=message):
        take(loaded, unwritable / "s.zarr")
    assert model.fitted == 0


def test_another_environment_does_not_go_on_with_a_plan(loaded: Loaded, tmp_path: Path) -> None:
    begun = {"model": {"name": "m"}, "environment": {"versions": {"torch": "1.0", "numpy": "2.0"}, "device": "cpu"}}
    with pytest.raises(KeyboardInterrupt):
        take(loaded, tmp_path / "s.zarr", provenance=begun, tick=stop_after(1))
    now = {"model": {"name": "m"}, "environment": {"versions": {"torch": "2.0", "numpy": "2.0"}, "device": "cpu"}}
    with pytest.raises(CaptureError, match=r"begun with torch 1.0 and now runs with torch 2.0.*delete .*s.zarr.plans"):
        take(loaded, tmp_path / "s.zarr", provenance=now)


def test_the_number_of_threads_is_that_of_the_plan(loaded: Loaded, tmp_path: Path) -> None:
    begun = {"model": {"name": "m"}, "environment": {"threads": 2}}
    here, seen = torch.get_num_threads(), []
    take(loaded, tmp_path / "s.zarr", provenance=begun, tick=lambda _: seen.append(torch.get_num_threads()))
    assert set(seen) == {2}
    assert torch.get_num_threads() == here
