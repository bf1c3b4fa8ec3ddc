"""`python -m benchmarks.capture`: capturing all layers of a model to disk against the bare forward of the same batches.

A random Llama of 138 million parameters in bfloat16 over rollouts of 100 to 500 tokens. What is timed of the capture is
all of it once the model is loaded: planning, forward, statistics, compression, writing, sync and commit.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaModel

import capture
import datastore
from benchmarks.measure import Row, alternate, show, size_of
from capture.components import ComponentTable, find_components
from datastore.schema import Plan, Rollout

ROLLOUTS, BATCH_TOKENS, ROUNDS = 64, 2048, 3
PROVENANCE = {"model": {"name": "random-llama", "hidden_size": 768}}


def make_model() -> Any:
    """Return the decoder with random weights, always the same."""
    torch.manual_seed(0)
    config: Any = LlamaConfig
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("cpu"):
        model: Any = LlamaModel(config(**sizes, num_key_value_heads=12, vocab_size=32000))
    return model.to(torch.bfloat16).eval()


def make_rollouts() -> list[Rollout]:
    """Make rollouts of many lengths."""
    random = np.random.default_rng(0)
    return [
        Rollout(rollout_id=str(i), token_ids=random.integers(3, 32000, n, np.int32), prompt_end=int(n) // 4)
        for i, n in enumerate(random.integers(100, 500, ROLLOUTS))
    ]


def plan_of(store: Path, table: ComponentTable, rollouts: list[Rollout]) -> Plan:
    """Plan all layers of the residual stream."""
    layers = range(table.n_layers)
    (plan,) = datastore.plan(
        store,
        rollouts,
        layers=layers,
        components=table.specs(("residual",), layers),
        provenance=PROVENANCE,
        batch_tokens=BATCH_TOKENS,
    )
    return plan


def padded(plan: Plan) -> list[dict[str, Any]]:
    """Return what the model is given for each batch of the plan."""
    batches = []
    for batch in plan.batches:
        tokens = [plan.tokens(batch, name) for name in batch.members]
        ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(tokens):
            ids[row, : len(one)] = torch.from_numpy(one.astype(np.int64))
            mask[row, : len(one)] = 1
        places = torch.arange(ids.shape[1]).expand_as(ids)
        batches.append({"input_ids": ids, "attention_mask": mask, "position_ids": places, "use_cache": False})
    return batches


def measure(root: Path) -> tuple[Row, list[str]]:
    """Time both, in turn, and say what was captured."""
    model, rollouts = make_model(), make_rollouts()
    table, stores = find_components(model), iter(root / f"{i}.zarr" for i in range(ROUNDS + 2))
    plan = plan_of(root / "none.zarr", table, rollouts)
    batches = padded(plan)

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(**batch)

    def captured() -> None:
        capture.run(model, None, rollouts, next(stores), provenance=PROVENANCE, batch_tokens=BATCH_TOKENS)

    bare()
    captured()  # what is loaded and compiled at first use is no part of the rate
    shutil.rmtree(root / "0.zarr")
    seconds = alternate({"bare": bare, "captured": captured}, rounds=ROUNDS)
    speed = {name: plan.n_tokens / s for name, s in seconds.items()}
    stored = size_of(root / "1.zarr")
    parameters = sum(p.numel() for p in model.parameters())
    facts = [
        f"{parameters / 1e6:.0f} M parameters, {table.n_layers} layers",
        f"{plan.n_tokens:,} tokens in {len(batches)} batches",
        f"{plan.raw_bytes / 1e6:.0f} MB raw, {stored / 1e6:.0f} MB stored with all metadata",
    ]
    row = Row(
        what="capture, all layers, to disk",
        value=speed["captured"],
        unit="tokens/s",
        rival="bare forward of the same batches",
        rival_value=speed["bare"],
        ratio=speed["captured"] / speed["bare"],
        target=0.85,
    )
    return row, facts


def main(arguments: list[str]) -> None:
    """Run the benchmark and print a table, or JSON with `--json`."""
    with tempfile.TemporaryDirectory(prefix="bench-capture-", dir=os.environ.get("BENCH_DIR")) as directory:
        row, facts = measure(Path(directory))
    show(f"capture, {torch.get_num_threads()} threads: {'; '.join(facts)}", [row], as_json="--json" in arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
