"""What a capture is asked for, once it is read: model, rollouts, layers, components, settings; provenance and plans."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import datastore
import experiments
from capture import loading
from capture.batching import auto_batch_tokens
from capture.components import ComponentTable, describe_components
from capture.default import default_ids, default_model, default_transcripts
from capture.errors import RequestError
from capture.layerspec import parse_layers
from capture.modelinfo import ModelInfo
from capture.tokenbytes import token_bytes
from capture.tokens import Rendered, render
from datastore import console
from datastore.choose import choose
from datastore.schema import Codec, Plan, Rollout
from experiments.transcript import Transcript

__all__ = ["Choice", "Request", "Settings", "plans_of", "provenance_of", "read_request"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which of the transcripts: ids, a query on the rollout table, a number; all where None."""

    ids: Sequence[str] | None = None
    where: str | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to capture.

    Attributes
    ----------
    batch_tokens : int or None
        Padded tokens a batch; None takes a number that depends on model and device alone.
    codec : str
    chunk_tokens : int
        Most tokens a chunk.
    replace, response_only, truncate, strict, trust_remote_code : bool
    device : str
    dtype : str or None
        None takes the checkpoint's.
    hook_paths : mapping of component to module path
    """

    batch_tokens: int | None
    codec: str
    chunk_tokens: int
    replace: bool
    response_only: bool
    truncate: bool
    strict: bool
    trust_remote_code: bool
    device: str
    dtype: str | None
    hook_paths: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """A capture that could be planned; no weights are read yet."""

    store: Path
    info: ModelInfo
    table: ComponentTable
    rendered: Sequence[Rendered]
    layers: tuple[int, ...]
    components: tuple[str, ...]
    settings: Settings

    @property
    def rollouts(self) -> list[Rollout]:
        """Rollouts to capture."""
        return [one.rollout for one in self.rendered]


def read_request(
    store: Path,
    *,
    model: str | ModelInfo | None,
    revision: str | None = None,
    inputs: Sequence[str] | Sequence[Transcript] | None,
    layers: str,
    components: Sequence[str],
    choice: Choice,
    settings: Settings,
    quiet: bool = True,
) -> Request:
    """Read config, tokenizer and transcripts, and check the request against them.

    Parameters
    ----------
    store : Path
    model, inputs
        The default ones where None; a model may be described and inputs, else paths, may be read already.
    layers : str
        A layer spec.
    components : sequence of str
    quiet : bool
        Show no progress.

    Raises
    ------
    DatastoreError, ExperimentError
        As what reads each of them says.
    """
    info = (
        model
        if isinstance(model, ModelInfo)
        else loading.describe(
            model or default_model(), revision=revision, trust_remote_code=settings.trust_remote_code
        )
    )
    numbers = parse_layers(layers, info.n_layers)
    table = describe_components(
        info.config,
        dtype=settings.dtype or info.dtype,
        hook_paths=settings.hook_paths,
        trust_remote_code=settings.trust_remote_code,
    )
    table.specs(components, numbers)
    if not inputs:
        inputs, choice = _default_rollouts(model, choice)
    paths = [one for one in inputs if isinstance(one, str)]
    transcripts = experiments.read(paths) if paths else [one for one in inputs if isinstance(one, Transcript)]
    return Request(
        store=store,
        info=info,
        table=table,
        rendered=_chosen(transcripts, info, choice=choice, settings=settings, quiet=quiet),
        layers=numbers,
        components=tuple(components),
        settings=settings,
    )


def _default_rollouts(model: object, choice: Choice) -> tuple[Sequence[Transcript], Choice]:
    """All rollouts of the default tree, of which some are chosen unless others are asked for."""
    if model is not None:
        raise RequestError(
            "--model names a model and no --input names transcripts; the default rollouts are token ids of the default "
            "model's tokenizer, so give --input, or leave --model out"
        )
    narrowed = replace(choice, ids=default_ids()) if choice.ids is None and choice.where is None else choice
    return default_transcripts(), narrowed


def _chosen(
    transcripts: Sequence[Transcript], info: ModelInfo, *, choice: Choice, settings: Settings, quiet: bool
) -> list[Rendered]:
    """Tokenise what may be chosen, choose, and only then refuse what is too long: a query may leave it out."""
    by_id = {one.id: one for one in transcripts}
    names = choose(pd.DataFrame(index=list(by_id)), ids=choice.ids, limit=None if choice.where else choice.limit)
    rendered, context = {}, info.context if settings.truncate else None
    with console.progress(quiet=quiet) as bar:
        task = bar.add_task("tokenise", total=len(names), note="")
        for name in names:
            rendered[name] = _render(by_id[name], info, context=context, truncate=settings.truncate)
            bar.update(task, advance=1)
    if choice.where:
        table = pd.DataFrame.from_dict({name: _columns(one.rollout) for name, one in rendered.items()}, orient="index")
        table.index.name = "rollout_id"
        names = choose(table, where=choice.where, limit=choice.limit)
    for name in names:
        if info.context is not None and rendered[name].rollout.n_tokens > info.context:
            _render(by_id[name], info, context=info.context, truncate=False)  # raises, and says what to do
    chosen = [rendered[name] for name in names]
    return _responses(chosen) if settings.response_only else chosen


def _responses(rendered: Sequence[Rendered]) -> list[Rendered]:
    """Leave the rows of the prompts out: their tokens are computed, and stored as ids alone."""
    without = [one.rollout.rollout_id for one in rendered if one.rollout.prompt_end == one.rollout.n_tokens]
    if without:
        raise RequestError(
            f"{len(without)} of {len(rendered)} rollouts have no response tokens, {without[0]!r} the first, so "
            '--response-only would store nothing of them; leave them out with --where "prompt_end < n_tokens", or '
            "capture all tokens"
        )
    return [replace(one, rollout=_response(one.rollout)) for one in rendered]


def _response(one: Rollout) -> Rollout:
    at = one.prompt_end
    spans = (
        replace(a, token_start=max(a.token_start, at) - at, token_end=a.token_end - at)
        for a in one.annotations
        if a.token_end > at
    )
    role, turn, thinking = (np.asarray(values)[at:] for values in (one.role, one.turn, one.thinking))
    return replace(
        one,
        token_ids=one.token_ids[at:],
        prefix=one.token_ids[:at],
        prompt_end=0,
        role=role,
        turn=turn,
        thinking=thinking,
        annotations=tuple(spans),
    )


def _render(one: Transcript, info: ModelInfo, *, context: int | None, truncate: bool) -> Rendered:
    return render(one, info.tokenizer, context=context, truncate=truncate, vocab_size=info.vocab_size)


def _columns(one: Rollout) -> dict[str, Any]:
    """Row of the rollout table; what it says itself stands above a label of the same name."""
    return {**one.labels, "n_tokens": one.n_tokens, "prompt_end": one.prompt_end, "prompt_set": one.prompt_set}


def provenance_of(
    request: Request, *, hash_weights: bool = True, identity: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the captures will say of where they came from: `model` and `settings` decide the bits.

    `identity` is what `loading.identity` says of the model, where it is known already: it may read all weights.
    """
    settings = request.settings
    known = identity or loading.identity(
        request.info, dtype=settings.dtype, device=settings.device, hash_weights=hash_weights
    )
    return {
        "model": {
            "name": known["model"],
            "model_type": known["model_type"],
            "revision": known["revision"],
            "weights_sha256": known["weights_sha256"],
            "dtype": known["dtype"],
            "hidden_size": request.info.hidden,
            "n_layers": known["n_layers"],
            **{name: known[name] for name in ("adapter", "quantization") if name in known},
        },
        "tokenizer": {"sha256": known["tokenizer_sha256"], **_rendering(request.rendered)},
        "settings": {
            "attn_implementation": known["attn_implementation"],
            "padding": "right",
            "truncate": request.info.context if settings.truncate else None,
            "response_only": settings.response_only,
            "strict": settings.strict,
            "hooks": {c.name: c.hook for c in request.table.specs(request.components, request.layers)},
        },
        "environment": {name: known[name] for name in ("device", "threads", "versions")},
    }


def _rendering(rendered: Sequence[Rendered]) -> dict[str, Any]:
    """How the transcripts became tokens, and which of them not whole."""
    notes = {one.rollout.rollout_id: one.notes for one in rendered}
    return {
        "rendered": sorted({one.template for one in notes.values()}),
        "truncated": {name: n.truncated_from for name, n in notes.items() if n.truncated_from is not None},
        "cut_annotations": {name: n.cut_annotations for name, n in notes.items() if n.cut_annotations},
        "unmatched_annotations": {name: list(n.unmatched) for name, n in notes.items() if n.unmatched},
    }


def plans_of(request: Request, provenance: Mapping[str, Any]) -> tuple[Plan, ...]:
    """Plan the capture; see `datastore.plan`."""
    settings = request.settings
    used = sorted({int(i) for r in request.rollouts for i in np.unique(r.computed_ids)})
    return datastore.plan(
        request.store,
        request.rollouts,
        layers=request.layers,
        components=request.table.specs(request.components, request.layers),
        provenance=provenance,
        batch_tokens=settings.batch_tokens or auto_batch_tokens(request.info.config, _device(settings.device)),
        codec=Codec(name=settings.codec),  # type: ignore[arg-type]
        most_tokens=settings.chunk_tokens,
        vocab=token_bytes(request.info.tokenizer, used),
        replace=settings.replace,
    )


def _device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
