"""Raw activation files: what torch, safetensors and NumPy wrote is read to the bit; everything else is one sentence."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file

from experiments.errors import ExperimentError
from experiments.rawfile import RawFile
from experiments.rawfiles import check_content, raw_files, read_raw, write_raw

RAW = Path(__file__).parents[1] / "data" / "golden" / "toy_experiment" / "inference" / "instruct" / "raw"
SET1 = RAW / "residual" / "set1"
Cells = dict[tuple[str, int], NDArray[Any]]


def contents(raw: RawFile) -> Cells:
    """Return the rows of a file, put together."""
    found: dict[tuple[str, int], list[NDArray[Any]]] = {}
    for rows in raw.rows():
        found.setdefault((rows.component, rows.layer), []).append(rows.values.copy())
    return {cell: np.concatenate(many) for cell, many in found.items()}


def bits(values: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(values).tobytes()


def parts(n_prompt: int, n_response: int, activations: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the nested dictionary that such files hold."""
    random = torch.Generator().manual_seed(n_prompt * 31 + n_response)

    def part(n: int, first: int) -> dict[str, Any]:
        tensor = torch.randn(n, 8, generator=random).bfloat16()
        return {
            "text": "x" * n,
            "tokens": ["x"] * n,
            "token_ids": list(range(first, first + n)),
            "activations": {2: {"residual": tensor, "attn_out": tensor * 2}, 5: {"residual": tensor * 3}},
            "attention": {},
        }

    made = {"prompt": part(n_prompt, 0), "response": part(n_response, n_prompt)}
    for name, value in (activations or {}).items():
        made[name]["activations"] = value
    return made


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("a/data.pkl", pickled)
        file.writestr("a/version", "3\n")
        file.writestr("a/byteorder", "little")
    return path


@pytest.mark.parametrize("name", ["1", "2", "3"])
def test_the_golden_files_are_read_to_the_bit(name: str) -> None:
    raw = read_raw(SET1 / f"{name}.pt")
    golden = torch.load(SET1 / f"{name}.pt", weights_only=True)
    prompt, response = golden["prompt"], golden["response"]
    assert raw.token_ids.tolist() == prompt["token_ids"] + response["token_ids"]
    assert raw.prompt_end == len(prompt["token_ids"])
    assert raw.strings == tuple(prompt["tokens"] + response["tokens"])
    found = contents(raw)
    assert sorted(found) == [("residual", 1), ("residual", 3), ("residual", 5)]
    for (component, layer), values in found.items():
        whole = torch.cat([part["activations"][layer][component] for part in (prompt, response)])
        assert bits(values) == whole.view(torch.uint16).numpy().tobytes()


def test_several_components_and_layers_and_a_part_without_tokens(tmp_path: Path) -> None:
    made = parts(3, 0)
    raw = read_raw(saved(tmp_path / "7.pt", made))
    assert (raw.prompt_end, raw.left_out, len(raw.token_ids)) == (3, 0, 3)
    found = contents(raw)
    assert sorted(found) == [("attn_out", 2), ("residual", 2), ("residual", 5)]
    attn_out = made["prompt"]["activations"][2]["attn_out"]
    assert bits(found["attn_out", 2]) == attn_out.view(torch.uint16).numpy().tobytes()


def test_a_view_of_a_whole_batch_gives_its_own_rows_only(tmp_path: Path) -> None:
    batch = torch.arange(4 * 10 * 8, dtype=torch.float32).reshape(4, 10, 8)
    own = {"prompt": {2: {"residual": batch[1, 3:5]}}, "response": {2: {"residual": batch[1, 5:10]}}}
    path = saved(tmp_path / "7.pt", parts(2, 5, own))
    assert path.stat().st_size > batch.nbytes
    assert bits(contents(read_raw(path))["residual", 2]) == bits(batch[1, 3:10].numpy())
    write_raw(tmp_path / "own.pt", contents(read_raw(path)), record(7, 2))
    assert torch.load(tmp_path / "own.pt", weights_only=True)["response"]["activations"][2][
        "residual"
    ].untyped_storage().nbytes() == 5 * 8 * 4


def test_a_file_of_the_response_only_says_what_it_leaves_out(tmp_path: Path) -> None:
    raw = read_raw(saved(tmp_path / "7.pt", parts(3, 4, {"prompt": {}})))
    assert (raw.left_out, raw.prompt_end, raw.token_ids.tolist()) == (3, 0, [3, 4, 5, 6])
    assert len(contents(raw)["residual", 5]) == 4


def record(n: int, cut: int) -> dict[str, Any]:
    return {"token_ids": list(range(n)), "prompt_end": cut, "tokens": ["x"] * n, "prompt": "x" * cut, "response": ""}


@settings(max_examples=25)
@given(
    n=st.integers(1, 6),
    cut=st.integers(0, 6),
    dtype=st.sampled_from(["bfloat16", "float16", "float32", "float64"]),
    form=st.sampled_from(["pt", "safetensors", "npz"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_written_is_read_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, n: int, cut: int, dtype: str, form: str, seed: int
) -> None:
    wide = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    random = np.random.default_rng(seed)  # random bits: every kind of NaN and infinity among them
    arrays: Cells = {
        (name, layer): np.frombuffer(random.bytes(n * width * wide.itemsize), wide).reshape(n, width)
        for name, width in (("residual", 4), ("k_proj", 2))
        for layer in (0, 9)
    }
    path = tmp_path_factory.mktemp("raw") / f"7.{form}"
    write_raw(path, arrays, record(n, min(cut, n)))
    raw = read_raw(path)
    assert (raw.token_ids.tolist(), raw.prompt_end) == (list(range(n)), min(cut, n))
    found = contents(raw)
    assert {cell: bits(values) for cell, values in found.items()} == {cell: bits(v) for cell, v in arrays.items()}
    assert {str(values.dtype) for values in found.values()} == {dtype}


def test_a_request_of_an_inference_server_needs_its_layers(tmp_path: Path) -> None:
    states = torch.randn(5, 3, 8).bfloat16()
    save_file({"token_ids": torch.arange(5), "hidden_states": states}, tmp_path / "r.safetensors")
    with pytest.raises(ExperimentError, match="does not say which layers it holds; name them in order with --layers"):
        read_raw(tmp_path / "r.safetensors")
    with pytest.raises(ExperimentError, match=r"shape \[5, 3, 8\] for 5 tokens and 2 layers"):
        read_raw(tmp_path / "r.safetensors", layers=(1, 2))
    found = contents(read_raw(tmp_path / "r.safetensors", layers=(20, 1, 7)))
    assert bits(found["residual", 20]) == states[:, 0].contiguous().view(torch.uint16).numpy().tobytes()
    assert bits(found["residual", 7]) == states[:, 2].contiguous().view(torch.uint16).numpy().tobytes()


def test_a_file_is_never_written_over_unless_asked(tmp_path: Path) -> None:
    arrays: Cells = {("residual", 0): np.zeros((2, 4), np.float32)}
    path = tmp_path / "7.pt"
    path.write_bytes(b"mine")
    with pytest.raises(ExperimentError, match="is there already and was left as it is"):
        write_raw(path, arrays, record(2, 1))
    assert path.read_bytes() == b"mine"
    write_raw(path, arrays, record(2, 1), overwrite=True)
    assert len(read_raw(path).token_ids) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["7.pt"]


class Runs:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("ran"), "it ran"))


REFUSED: list[tuple[Any, str]] = [
    (parts(2, 2, {"prompt": {}, "response": {}}), r"holds no activations \(4 tokens\)"),
    (parts(2, 2, {"response": {2: {"residual": torch.zeros(1, 8).bfloat16()}}}), r"of shape \[1, 8\] for"),
    (parts(2, 2, {"response": {}}), "has attn_out at layer 2 for the prompt and not for the response"),
    (parts(2, 2, {"response": {"2": {"residual": torch.zeros(2, 8)}}}), "at layer '2'; layers are numbers from 0"),
    (parts(2, 2, {"response": {2: {"a/b": torch.zeros(2, 8)}}}), "a component named 'a/b'; a component is"),
    (parts(2, 2, {"prompt": {2: {"residual": torch.zeros(2, 8)}}, "response": {2: {"residual": torch.zeros(2, 4)}}}),
     "other widths or dtypes for the prompt than for the response"),
    (parts(2, 2, {"response": {2: torch.zeros(2, 8)}}), "that are not layer -> component -> tensor"),
    ({**parts(2, 2), "prompt": {"token_ids": [1, 2.5]}}, "prompt token ids that are not one row of token ids"),
    ({**parts(2, 2), "prompt": {"token_ids": [1, -2]}}, "prompt token ids that are not one row of token ids"),
    ({**parts(2, 2), "prompt": {}}, "has no 'token_ids' in its prompt part"),
    ({"prompt": {}}, "holds a dictionary without prompt and response"),
    (torch.zeros(3), "holds Tensor, not the prompt and response parts"),
    ({"prompt": torch.zeros(2, dtype=torch.int64)}, "refers to torch.LongStorage, which raw activations never do"),
    ({"prompt": Runs()}, "which raw activations never do; it was not opened"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_contradicts_itself_is_refused_by_name(
    value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExperimentError, match=message) as refused:
        read_raw(saved(tmp_path / "71.pt", value))
    assert "71.pt" in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_a_tensor_that_repeats_a_few_numbers_without_end_is_refused(tmp_path: Path) -> None:
    absurd = torch.zeros(1).bfloat16().expand(2, 10**12)
    path = saved(tmp_path / "7.pt", parts(2, 0, {"prompt": {2: {"residual": absurd}}, "response": {}}))
    with pytest.raises(ExperimentError, match=r"declares 4,000,000,000,000 bytes for 'residual' at layer 2"):
        read_raw(path)


@pytest.mark.parametrize("what", ["builtins\nbytearray", "torch\nFloatTensor", "os\nsystem"])
def test_a_pickle_that_only_asks_for_memory_is_not_opened(what: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "7.pt", b"\x80\x02c" + what.encode() + b"\n(J\x00\x00\x00\x7ftR.")
    name = what.replace("\n", "[.]")
    with pytest.raises(ExperimentError, match=rf"refers to {name}, which raw activations never do"):
        read_raw(path)


def test_archives_that_unpack_to_more_than_they_are_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "7.pt", pickle.dumps({"prompt": [0] * 10**6}, 2), zipfile.ZIP_DEFLATED)
    with pytest.raises(ExperimentError, match=r"and torch\.save packs nothing"):
        read_raw(path)
    np.savez_compressed(tmp_path / "7.npz", token_ids=np.arange(4), residual=np.zeros((4, 1, 10**6), np.float32))
    with pytest.raises(ExperimentError, match=r"would unpack to 16,\d+,\d+ bytes from \d\d,\d+; it was not opened"):
        read_raw(tmp_path / "7.npz")


def test_an_npy_header_that_lies_allocates_nothing(tmp_path: Path) -> None:
    lie = io.BytesIO()
    np.lib.format.write_array_header_1_0(lie, {"descr": "<f4", "fortran_order": False, "shape": (4, 1, 10**12)})
    with zipfile.ZipFile(tmp_path / "7.npz", "w") as file:
        file.writestr("token_ids.npy", b"")
        file.writestr("residual.npy", lie.getvalue() + b"\0" * 64)
    with pytest.raises(ExperimentError, match=r"7\.npz (can't be read|declares 16,000,000,000,000 bytes)"):
        read_raw(tmp_path / "7.npz")


@pytest.mark.parametrize("form", ["pt", "safetensors", "npz"])
def test_empty_truncated_and_foreign_files_are_named(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"71.{form}"
    write_raw(path, {("residual", 0): np.ones((4, 16), np.float32)}, record(4, 2))
    whole = path.read_bytes()
    for cut in range(0, len(whole) - 1, 37):
        path.write_bytes(whole[:cut])
        with pytest.raises(ExperimentError, match=rf"71\.{form} (is empty|is truncated|can't be read)"):
            contents(read_raw(path))
    path.write_bytes(b"not what it says\n" * 100)
    with pytest.raises(ExperimentError, match=rf"71\.{form} (is truncated|can't be read)"):
        read_raw(path)


def test_a_flipped_bit_in_the_numbers_is_found_by_the_archives_own_checksum(tmp_path: Path) -> None:
    path = saved(tmp_path / "7.pt", parts(3, 4))
    clean = check_content(path)
    data = bytearray(path.read_bytes())
    at = data.index(parts(3, 4)["prompt"]["activations"][2]["residual"].view(torch.uint16).numpy().tobytes())
    data[at + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ExperimentError, match=r"7\.pt is damaged \(the checksum of \S+/data/\d differs\)"):
        check_content(path)
    data[at + 5] ^= 1
    path.write_bytes(data)
    assert check_content(path) == clean


def test_files_are_found_below_a_directory_and_only_in_raw_of_a_tree(tmp_path: Path) -> None:
    assert raw_files(RAW.parents[2]) == [SET1 / f"{name}.pt" for name in "123"]
    assert raw_files(SET1 / "2.pt") == [SET1 / "2.pt"]
    with pytest.raises(ExperimentError, match=r"holds no raw activation files: no \.pt, \.safetensors or \.npz"):
        raw_files(tmp_path)
    with pytest.raises(ExperimentError, match="does not exist"):
        raw_files(tmp_path / "nowhere")
    with pytest.raises(ExperimentError, match="is no raw activation file; they end in"):
        read_raw(Path(__file__))
