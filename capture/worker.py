"""The process of a server that holds the model: `python -m capture.worker`, started and ended by `capture.service`.

It reads one JSON object a line on standard input, carries them out one after another, and answers on standard output;
the log goes to standard error. What comes in: `{"id", "do", ...}`, where `do` is describe, load, capture, generate,
save or cancel. What goes out: any number of `{"id", "event"}`, then `{"id", "ok"}` or `{"id", "error", "why"}`.
It ends when standard input does, so that it never outlives the server, however that came to its end.
"""

import contextlib
import gc
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import nn

from capture import cache, loading
from capture.budgeting import with_budget
from capture.components import ComponentTable, describe_components, find_components
from capture.errors import CacheError, ModelError, RequestError
from capture.experiment_source import read_tree
from capture.experts import set_workspace
from capture.layerspec import parse_layers
from capture.loaders import build_cache, wanted_cache
from capture.loading import Loaded
from capture.modelinfo import ModelInfo
from capture.request import Choice, Request, Settings, plans_of, provenance_of, read_request
from capture.runner import Tick, carry_out
from capture.sampling import generate, with_head

__all__ = ["main"]

LOG = logging.getLogger("capture")
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"

Answer = dict[str, Any]
Say = Callable[[Mapping[str, Any]], None]


class _Action(Protocol):
    """Something the model is asked to do; `say` tells of an event on the way."""

    def __call__(self, asked: Mapping[str, Any], say: Say) -> Answer: ...


class _Cancelled(Exception):
    """Raised between two modules of the model, or two batches, once the request is cancelled."""


class _Lines:
    """Answers, one JSON object a line; threads may write."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._lock = file, threading.Lock()

    def write(self, value: Mapping[str, Any]) -> None:
        with self._lock:
            self._file.write(json.dumps(value) + "\n")
            self._file.flush()


class _Worker:
    """The model and what is done with it, one request after another."""

    def __init__(self, lines: _Lines) -> None:
        self._lines = lines
        self._info: ModelInfo | None = None
        self._loaded: Loaded | None = None
        self._table: ComponentTable | None = None
        self._identity: dict[str, Any] = {}
        self._setup: Mapping[str, Any] = {}
        self._head: nn.Module | None = None
        self._running: int | None = None
        self._cancelled: set[int] = set()
        self._actions: dict[str, _Action] = {
            "describe": self._describe,
            "load": self._load,
            "capture": self._capture,
            "generate": self._generate,
            "save": self._save,
        }

    def cancel(self, number: int) -> None:
        """Stop a request soon; called by another thread."""
        self._cancelled.add(number)

    def answer(self, asked: Mapping[str, Any]) -> None:
        """Do what is asked, and say how it went."""
        number, self._running = asked["id"], asked["id"]
        try:
            self._check()
            ok = self._actions[asked["do"]](asked, lambda event: self._lines.write({"id": number, "event": event}))
            self._lines.write({"id": number, "ok": ok})
        except _Cancelled:
            self._lines.write({"id": number, "error": "cancelled", "why": "cancelled"})
        except Exception as error:
            sentence = _sentence(error)
            if sentence is None:
                LOG.exception("what follows is a bug")
            why = "refused" if getattr(error, "exit_code", 1) == 2 else "failed"
            text = sentence or f"{type(error).__name__}: {error} (a bug; the server's log has more)"
            self._lines.write({"id": number, "error": text, "why": why})
        self._running = None
        gc.collect()  # a forward that was cut off leaves its tensors in the frames of the exception
        torch.cuda.empty_cache()

    def _check(self, *_: object) -> None:
        if self._running in self._cancelled:
            raise _Cancelled

    # -- the model -------------------------------------------------------------------------------------------------

    def _describe(self, asked: Mapping[str, Any], say: Say) -> Answer:
        setup = self._setup = asked["setup"]
        info = loading.describe(
            setup["model"],
            revision=setup["revision"],
            trust_remote_code=setup["trust_remote_code"],
            adapter=setup["adapter"],
            quantize=setup["quantize"],
        )
        layers = parse_layers(setup["layers"] or "all", info.n_layers)
        table = describe_components(
            info.config, dtype=setup["dtype"] or info.dtype, trust_remote_code=info.trust_remote_code
        )
        self._info = info
        return {"n_layers": info.n_layers, "highest": max(layers), "components": list(table.components)}

    def _load(self, asked: Mapping[str, Any], say: Say) -> Answer:
        info, setup, began = self._known(), self._setup, time.monotonic()
        self._identity = loading.identity(info, dtype=setup["dtype"], device=setup["device"])
        loaded = loading.load(
            info,
            dtype=setup["dtype"],
            device=setup["device"],
            layers=parse_layers(setup["layers"] or "all", info.n_layers),
            attn_implementation=self._identity["attn_implementation"],
        )
        set_workspace(loaded.model, setup["expert_workspace"])
        table = find_components(loaded.model)
        # Every module inside the blocks, for one block of a large batch may take seconds.
        for module in loaded.model.get_submodule(table.blocks).modules():
            module.register_forward_pre_hook(self._check)
        self._loaded, self._table = loaded, table
        return {"seconds": time.monotonic() - began, "device": loaded.device, "n_layers": loaded.n_layers}

    def _known(self) -> ModelInfo:
        if self._info is None:
            raise ModelError("no model was named to this process")
        return self._info

    def _ready(self) -> tuple[Loaded, ComponentTable]:
        if self._loaded is None or self._table is None:
            raise ModelError("no model is loaded; load one with POST /model/load")
        return self._loaded, self._table

    # -- capture ---------------------------------------------------------------------------------------------------

    def _capture(self, asked: Mapping[str, Any], say: Say) -> Answer:
        loaded, table = self._ready()
        request = self._request(asked, loaded)
        provenance = provenance_of(request, identity=self._identity)
        plans = plans_of(with_budget(request, provenance, lambda: (loaded.model, table)), provenance)
        planned = {one.rollout_id for plan in plans for one in plan.rollouts}
        say(
            {
                "planned": {
                    "rollouts": sum(len(plan.rollouts) for plan in plans),
                    "tokens": sum(plan.n_tokens for plan in plans),
                    "raw_bytes": sum(plan.raw_bytes for plan in plans),
                    "skipped": len(request.rendered) - len(planned),
                }
            }
        )

        def tick(now: Tick) -> None:
            done = {"rollouts": now.rollouts, "raw_bytes": now.raw_bytes, "stored_bytes": now.stored_bytes}
            say({"progress": done})
            self._check()

        done = carry_out(
            plans,
            request.store,
            source=lambda: (loaded.model, table),
            memory=self._setup["memory"],
            environment=provenance["environment"],
            tick=tick,
        )
        return {
            "captures": done.captures,
            "notes": done.notes,
            "raw_bytes": done.raw_bytes,
            "stored_bytes": done.stored_bytes,
        }

    def _request(self, asked: Mapping[str, Any], loaded: Loaded) -> Request:
        setup, order = self._setup, asked["order"]
        tree = read_tree(
            Path(asked["tree"]),
            prompt_set=order["prompt_set"],
            variant=asked["variant"],
            responses_from=order["responses_from"],
            store=Path(asked["store"]),
            model=setup["model"],
        )
        request = read_request(
            tree.store,
            model=loaded.info,
            inputs=tree.transcripts,
            layers=order["layers"] or "all",
            components=[name.strip() for name in order["components"].split(",") if name.strip()],
            choice=Choice(ids=asked["ids"], limit=order["limit"]),
            settings=Settings(
                batch_tokens=setup["batch_tokens"],
                codec="zstd",
                chunk_tokens=setup["chunk_tokens"],
                replace=order["skip_existing"] is False,
                response_only=order["response_only"],
                truncate=False,
                strict=False,
                trust_remote_code=setup["trust_remote_code"],
                device=setup["device"],
                dtype=setup["dtype"],
                hook_paths={},
            ),
        )
        if max(request.layers) >= loaded.n_layers:
            raise RequestError(
                f"layer {max(request.layers)} is not loaded: this server holds layers 0 to {loaded.n_layers - 1} of "
                f"{loaded.info.n_layers}; start it with other --layers"
            )
        return request

    # -- the rest --------------------------------------------------------------------------------------------------

    def _generate(self, asked: Mapping[str, Any], say: Say) -> Answer:
        loaded, _ = self._ready()
        self._head = self._head or with_head(loaded)
        responses = [
            generate(
                self._head,
                loaded,
                prompt,
                max_new_tokens=asked["max_new_tokens"],
                temperature=asked["temperature"],
            )
            for prompt in asked["prompts"]
        ]
        return {"responses": responses}

    def _save(self, asked: Mapping[str, Any], say: Say) -> Answer:
        loaded, table = self._ready()
        info, setup = loaded.info, self._setup
        if info.adapter or info.quantize:
            raise RequestError("a cache holds a checkpoint as it is, and this model has an adapter or is quantised")
        order = loading.order_of(
            info,
            dtype=setup["dtype"],
            device=setup["device"],
            layers=range(loaded.n_layers),
            attn_implementation=loaded.attn_implementation,
        )
        wanted = wanted_cache(info, order.directory, dtype=order.dtype, n_layers=order.n_layers)
        directory = cache.default_directory(wanted)
        with contextlib.suppress(CacheError):
            cache.check(cache.read(directory), wanted, directory)
            return {"status": "already_saved", "cache_dir": str(directory)}
        versions = self._identity["versions"]
        build_cache(order, loaded.model, directory, blocks=table.blocks, versions=versions, tick=lambda _, __: None)
        LOG.info("saved the cache %s", directory)
        return {"status": "saved", "cache_dir": str(directory)}


def _sentence(error: Exception) -> str | None:
    """The text of an error that speaks to a person; None for a bug."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the system'}: {error.strerror}"
    return str(error) if hasattr(error, "exit_code") or isinstance(error, OSError) else None


def _listen(orders: TextIO, worker: _Worker, waiting: "queue.Queue[dict[str, Any]]") -> None:
    for line in orders:
        asked = json.loads(line)
        if asked["do"] == "cancel":
            worker.cancel(asked["id"])
        else:
            waiting.put(asked)
    os._exit(0)  # the server is gone; chunks are written whole, so any instant is as good


def main() -> None:
    """Answer requests until standard input ends."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # whatever a library prints belongs into the log, not between the answers
    worker, waiting = _Worker(_Lines(answers)), queue.Queue[dict[str, Any]]()
    threading.Thread(target=_listen, args=(orders, worker, waiting), daemon=True).start()
    while True:
        worker.answer(waiting.get())


if __name__ == "__main__":
    main()
