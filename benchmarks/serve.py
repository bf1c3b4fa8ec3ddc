"""`python -m benchmarks.serve`: how soon a capture server answers /health while its model captures, how soon it ends.

A random Llama of 138 million parameters is served and captures all layers of long rollouts, with as many threads as the
machine has cores, while /health is asked every 20 ms over new connections. The rival is the same server, idle. Then the
capture is cancelled, and another one is ended by SIGTERM.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.measure import Row, show
from capture.client import Client
from capture.messages import TaskStatus

ASKED, PAUSE, MOST = 500, 0.02, 0.1
ROLLOUTS, TOKENS = 64, 700


def make_model(directory: Path) -> None:
    """Write a random Llama with a tokenizer of numbers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config: Any = LlamaConfig
    model: Any = LlamaForCausalLM(config(**sizes, num_key_value_heads=12, vocab_size=32000))
    model.to(torch.bfloat16).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32000)}, unk_token="w0"))
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=words).save_pretrained(directory)


def make_tree(root: Path, model: Path) -> None:
    """Write an experiment with rollouts as token ids."""
    random, folder = np.random.default_rng(0), root / "bench/inference/it/responses/long"
    folder.mkdir(parents=True)
    (root / "bench/config.json").write_text(json.dumps({"model_variants": {"it": {"model": str(model)}}}))
    for i in range(ROLLOUTS):
        ids = random.integers(3, 32000, TOKENS).tolist()
        (folder / f"{i}.json").write_text(json.dumps({"prompt": "", "response": "", "token_ids": ids, "prompt_end": 1}))


def latencies(client: Client) -> list[float]:
    """Ask /health again and again; seconds of each answer, ascending."""
    seconds = []
    for _ in range(ASKED):
        began = time.perf_counter()
        client.health()
        seconds.append(time.perf_counter() - began)
        time.sleep(PAUSE)
    return sorted(seconds)


def running(client: Client, store: str) -> TaskStatus:
    """Submit a capture, and wait until its first rows are written."""
    task = client.capture("bench", "long", store=store).task_id
    while not (status := client.status(task)).progress.raw_bytes:
        if status.status in ("failed", "completed"):
            raise SystemExit(f"the capture {status.status}: {status.error}")
        time.sleep(0.01)
    return status


def rows_of(idle: list[float], busy: list[float]) -> list[Row]:
    """Compare the two at the median, the 99th percentile and the worst."""
    rows = []
    for name, at in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        mine, rival = (times[min(len(times) - 1, int(at * len(times)))] for times in (busy, idle))
        rows.append(
            Row(
                what=f"/health while capturing, {name}",
                value=1000 * mine,
                unit="ms",
                rival="the same server, idle",
                rival_value=1000 * rival,
                ratio=mine / rival,
            )
        )
    within = sum(one <= MOST for one in busy) / len(busy)
    rows.append(
        Row(
            what=f"/health answers within {1000 * MOST:.0f} ms",
            value=100 * within,
            unit="%",
            rival="all",
            rival_value=100.0,
            ratio=within,
            target=1.0,
        )
    )
    return rows


def ended(what: str, seconds: float, most: float) -> Row:
    """How long something took against what it may take."""
    return Row(
        what=what,
        value=seconds,
        unit="s",
        rival="allowed",
        rival_value=most,
        ratio=seconds / most,
        target=1.0,
        at_most=True,
    )


def measure(root: Path) -> tuple[list[Row], str]:
    """Serve, measure, cancel, end."""
    make_model(root / "model")
    make_tree(root / "experiments", root / "model")
    words = ["--model", root / "model", "--experiments-root", root / "experiments", "--port", "0"]
    with (root / "log").open("w") as log:
        command = [sys.executable, "-m", "capture", "serve", *map(str, words)]
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        while "listening on" not in (root / "log").read_text():
            time.sleep(0.05)
        client = Client((root / "log").read_text().partition("listening on ")[2].split()[0])
        client.wait_until_loaded()
        idle = latencies(client)
        task = running(client, "health.zarr")
        busy = latencies(client)
        status = client.status(task.task_id)
        if status.status != "running":
            raise SystemExit("the capture ended before the measurement did; make it longer")
        began = time.perf_counter()
        client.cancel(task.task_id)
        client.wait(task.task_id)
        cancelled = time.perf_counter() - began
        running(client, "ended.zarr")
        began = time.perf_counter()
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=60)
        stopped = time.perf_counter() - began
    finally:
        server.kill()
    did = f"{status.progress.tokens:,} tokens captured meanwhile; exit code {code}"
    rows = [
        *rows_of(idle, busy),
        ended("cancel, until it has stopped", cancelled, 5),
        ended("SIGTERM, until gone", stopped, 5),
    ]
    return rows, f"mean {1000 * statistics.mean(busy):.1f} ms; {did}"


def main(arguments: list[str]) -> None:
    """Run the benchmark and print a table, or JSON with `--json`."""
    with tempfile.TemporaryDirectory(prefix="bench-serve-", dir=os.environ.get("BENCH_DIR")) as directory:
        rows, facts = measure(Path(directory))
    show(f"server, {torch.get_num_threads()} threads: {facts}", rows, as_json="--json" in arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
