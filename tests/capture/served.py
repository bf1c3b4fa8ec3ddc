"""A capture server as tests use it: a real process, an experiment tree of the users' shape, their own request.

`python -m tests.capture.served DIR` writes that tree and a tiny model for whoever wants to try the server by hand.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from capture.client import Client
from tests import kimi
from tests.house import ROOT

EXPERIMENT, PROMPT_SET = "mats-mental-state-circuits", "secret_number_audit"
IDS = [
    "71",
    "73",
    "74",
    "75",
    "76",
    "79",
    "80",
    "85",
    "86",
    "87",
    "88",
    "89",
    "90",
    "91",
    "92",
    "93",
    "94",
    "95",
    "96",
    "97",
    "99",
    "100",
]
_TYPED = ",".join(f'"{one}"' for one in IDS)

# As the users type them, the port aside.
HEALTH_LINE = "curl localhost:8765/health"
CAPTURE_LINE = f"""curl -X POST localhost:8765/capture -H 'Content-Type: application/json' -d '{{
  "experiment": "mats-mental-state-circuits",
  "prompt_set": "secret_number_audit",
  "model_variant": "kimi_k2",
  "layers": "10,15,20,25,30,35,40,45,50",
  "components": "residual",
  "skip_existing": true,
  "prompt_ids": [{_TYPED}]
}}'"""
STATUS_LINE = "curl localhost:8765/eval/status/{task_id}"


def make_tree(root: Path, model: Path, *, n_tokens: int = 120, vocab: int = 97) -> Path:
    """Write an experiment tree with 25 rollouts as token ids, 22 of which the users ask for.

    Parameters
    ----------
    root : Path
        Where experiments lie; the tree is one directory below.
    model : Path
        The variant `kimi_k2`; `other` is another model, `tuned` the same one with an adapter.
    n_tokens : int
        Of the shortest rollout.
    """
    random, tree = np.random.default_rng(0), root / EXPERIMENT
    folder = tree / "inference" / "kimi_k2" / "responses" / PROMPT_SET
    folder.mkdir(parents=True)
    variants = {
        "kimi_k2": {"model": str(model)},
        "other": {"model": "somebody/else"},
        "tuned": {"model": str(model), "lora": "somebody/adapter"},
    }
    (tree / "config.json").write_text(json.dumps({"defaults": {"application": "kimi_k2"}, "model_variants": variants}))
    for name in (*IDS, "1", "2", "3"):
        ids = random.integers(3, vocab, n_tokens + int(random.integers(60))).tolist()
        tokens = [f"w{i}" for i in ids]
        record = {
            "prompt": " ".join(tokens),
            "response": "",
            "tokens": tokens,
            "token_ids": ids,
            "prompt_end": len(ids),
        }
        (folder / f"{name}.json").write_text(json.dumps(record))
    return tree


class Server:
    """`python -m capture serve` as a process of its own, its log in a file.

    Parameters
    ----------
    model : Path
    root : Path
        Of the experiments.
    *words
        Further options.
    home : Path, optional
        Its HF_HOME, below which the model's cache is saved.
    """

    def __init__(
        self,
        model: Path,
        root: Path,
        *words: object,
        port: int = 0,
        token: str | None = None,
        home: Path | None = None,
    ) -> None:
        self.log_file = root.parent / f"serve-{time.monotonic_ns()}.log"
        options = ["--model", model, "--experiments-root", root, "--port", port, "--batch-tokens", 256, *words]
        if "--tasks" not in words:
            options += ["--tasks", root / "tasks.sqlite"]
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "capture", "serve", *map(str, options)],
                cwd=ROOT,
                env={
                    **os.environ,
                    "HF_HUB_OFFLINE": "1",
                    **({"ADS_CAPTURE_TOKEN": token} if token else {}),
                    **({"HF_HOME": str(home)} if home else {}),
                },
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.token = token
        self._url = ""

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def url(self) -> str:
        """Where it listens, once it says so."""
        if not self._url:
            self.wait(lambda: "listening on " in self.log)
            found = re.search(r"listening on (\S+)", self.log)
            assert found
            self._url = found[1]
        return self._url

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def client(self) -> Client:
        return Client(self.url, token=self.token, timeout=300)

    def wait(self, found: Callable[[], object], *, seconds: float = 300) -> None:
        """Wait until something comes true while the server lives."""
        end = time.monotonic() + seconds
        while not found():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.02)

    def loaded(self) -> "Server":
        """Wait until the model is there."""
        client = self.client
        self.wait(lambda: client.health().loaded)
        return self

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        """Leave nothing running, whatever a test has come to."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def end(self, signal: int) -> int:
        """Send a signal, and return the exit code."""
        self.process.send_signal(signal)
        return self.process.wait(timeout=300)

    def type(self, line: str) -> Any:
        """Type one of the users' lines, with this server's port: by curl where there is one."""
        line = line.replace("localhost:8765", f"localhost:{self.port}")
        if shutil.which("curl"):
            out = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, timeout=300).stdout
            return json.loads(out)
        address = re.search(r"localhost:\S+", line)
        assert address
        body = re.search(r"-d '(.*)'$", line, re.DOTALL)
        request = urllib.request.Request(
            f"http://{address[0]}",
            data=body[1].encode() if body else None,
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read())


def main() -> None:
    """Write DIR/kimi, of 61 tiny layers with INT4 experts, and DIR/experiments with 25 rollouts of it."""
    top = Path(sys.argv[1]).resolve()
    make_tree(top / "experiments", kimi.save_kimi(top / "kimi", num_hidden_layers=61), n_tokens=1000)
    print(f"{top}: a model in kimi, an experiment in experiments/{EXPERIMENT}")


if __name__ == "__main__":
    main()
