"""A small real model from its directory: bits against transformers itself, and texts that others got from it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from capture.components import find_components
from capture.forward import run_batch
from capture.loading import Loaded, describe, load
from tests.capture.stories import MODEL

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "stories260K" / "golden.json").read_text())


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(describe(MODEL), device="cpu")


def rows_of(loaded: Loaded, batch: list[tuple[str, NDArray[np.int64]]], **options: Any) -> dict[tuple[int, str], Any]:
    rows: dict[tuple[int, str], Any] = {}

    def put(component: str, layer: int, rollout_id: str, values: NDArray[Any], *, start: int) -> None:
        rows.setdefault((layer, rollout_id), []).append(values)

    table = find_components(loaded.model)
    layers = range(table.n_layers)
    run_batch(loaded.model, table, batch, layers=layers, components=["residual"], put=put, **options)
    return {key: np.concatenate(parts) for key, parts in rows.items()}


def test_residual_of_golden_texts_is_output_hidden_states_bit_for_bit(loaded: Loaded) -> None:
    texts = [GOLDEN["text_1"], GOLDEN["text_2"]]
    encoded = loaded.tokenizer(texts)["input_ids"]
    rows = rows_of(loaded, [(str(i), np.array(ids)) for i, ids in enumerate(encoded)])
    longest = max(map(len, encoded))
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in encoded])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in encoded])
    places = torch.arange(longest).expand_as(ids)
    model: Any = loaded.model
    with torch.inference_mode():
        states = model(ids, mask, places, use_cache=False, output_hidden_states=True).hidden_states
    for layer in range(5):
        for row, real in enumerate(map(len, encoded)):
            values = torch.from_numpy(rows[layer, str(row)])
            assert torch.equal(values if layer < 4 else model.norm(values), states[layer + 1][row, :real])


@pytest.mark.parametrize("piece_tokens", [None, 64])
def test_the_last_layer_predicts_the_golden_continuations(loaded: Loaded, piece_tokens: int | None) -> None:
    model: Any = loaded.model
    for name in ("greedy_from_bos", "greedy_Zoo"):
        tokens = np.array(GOLDEN[name])
        last = rows_of(loaded, [("a", tokens)], piece_tokens=piece_tokens)[4, "a"]
        with torch.inference_mode():
            predicted = (model.norm(torch.from_numpy(last)) @ model.embed_tokens.weight.T).argmax(-1).numpy()
        given = next(i for i in range(len(tokens)) if (predicted[i:-1] == tokens[i + 1 :]).all())
        assert given < 10, "from the end of the prompt on, every token is the one that others found"
