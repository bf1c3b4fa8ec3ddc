"""Import: rows of activation files that other tools wrote, into a store; one file at a time, in two passes.

The first pass opens every file and reads token ids, shapes and dtypes; what is wrong with a file is found here, before
anything is written. Files alike in layers and components share a plan. The second pass follows the plan's token axis,
checks each file's content and puts its rows as they are stored, never cast. The same import goes on where it stopped.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import datastore
from capture.errors import CaptureError, RequestError
from capture.joining import Place, Responses, SpokenTokens, place_of, rollout_of
from capture.tokenbytes import token_bytes
from datastore import storage
from datastore.choose import choose
from datastore.planning import plans_directory
from datastore.schema import COMPONENTS, Codec, ComponentSpec, Plan, Rollout, digest
from datastore.writer import Writer
from experiments.errors import ExperimentError
from experiments.rawfile import Array, RawFile
from experiments.rawfiles import check_content, raw_files, read_raw

__all__ = ["Found", "Imported", "Survey", "carry_out", "plans_of", "survey"]

NOTE_EVERY = 64
"""Files between two notes of what was read: each note is brought to disk."""

Tick = Callable[[int, int], object]
"""Told how many of how many are done."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """A file that can be imported, its rollout, and where in a tree it lies."""

    raw: RawFile
    rollout: Rollout
    place: Place | None


@dataclass(slots=True, kw_only=True)
class Survey:
    """What the first pass found.

    Attributes
    ----------
    found : list of Found
    skipped : mapping of file to what is wrong with it
    model : mapping
        Identity of the model, as far as anything says.
    notes : list of str
    tokenizer : object
        Gives the text of tokens.
    spoken : bool
        That text comes from decoded strings, which are lossy.
    """

    found: list[Found]
    skipped: dict[Path, str]
    model: dict[str, Any]
    notes: list[str]
    tokenizer: Any
    spoken: bool


@dataclass(slots=True, kw_only=True)
class Imported:
    """What a call imported."""

    captures: list[int] = field(default_factory=list)
    rollouts: int = 0
    tokens: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    seconds: float = 0.0


def survey(
    source: str | Path,
    *,
    layers: tuple[int, ...] | None = None,
    ids: Sequence[str] | None = None,
    where: str | None = None,
    limit: int | None = None,
    model: str | None = None,
    tokenizer: Any = None,
    responses_from: str | None = None,
    keep_going: bool = False,
    tick: Tick = lambda done, of: None,
) -> Survey:
    """Open every file at or below `source` and find out what it holds and what is known of it.

    Parameters
    ----------
    source : path
        A file, a directory of files, or an experiment tree.
    layers : tuple of int, optional
        For safetensors and npz files that do not say which layers they hold.
    ids, where, limit
        Only these rollouts, as everywhere.
    model : str, optional
        The model's name; default what the tree says.
    tokenizer : of transformers, optional
        Default the decoded tokens in the files.
    responses_from : str, optional
        The variant of the tree whose responses the activations are of.
    keep_going : bool
        Leave out what can't be read instead of stopping.
    tick : callable

    Raises
    ------
    ExperimentError
        A file can't be read (unless `keep_going`), or none can.
    RequestError
        Two files are of one rollout.
    """
    files, skipped = raw_files(source), dict[Path, str]()
    responses = Responses(variant=responses_from, lenient=keep_going)
    spoken, found, notes = SpokenTokens(), list[Found](), list[str]()
    raws = []
    for number, file in enumerate(files):
        try:
            raw = read_raw(file, layers=layers)
            spoken.hear(raw)
            raws.append(raw)
        except ExperimentError as error:
            if not keep_going:
                raise _stopped(error) from error
            skipped[file] = str(error)
        tick(number + 1, len(files))
    for raw in raws:
        try:
            place = place_of(raw.path)
            rendered, said = rollout_of(raw, responses.of(raw, place) if place else None, tokenizer or spoken)
            found.append(Found(raw=raw, rollout=rendered.rollout, place=place))
            notes.extend(said)
        except (ExperimentError, CaptureError) as error:
            if not keep_going:
                raise _stopped(error) from error
            skipped[raw.path] = str(error)
    _refuse_twice(found)
    if not found:
        raise ExperimentError(f"none of the {len(files)} files of {source} can be imported; the first: {_why(skipped)}")
    found = _chosen(found, ids=ids, where=where, limit=limit)
    return Survey(
        found=found,
        skipped=skipped,
        model={"name": model} if model else _model(found, responses),
        notes=responses.notes + notes + ([] if tokenizer else _textless(found, spoken)),
        tokenizer=tokenizer or spoken,
        spoken=tokenizer is None,
    )


def _textless(found: Sequence[Found], spoken: SpokenTokens) -> list[str]:
    """Say of how many rollouts the text will not be known."""
    without = [one.raw.path for one in found if not spoken.text.keys() >= set(one.rollout.computed_ids.tolist())]
    if not without:
        return []
    return [
        f"{len(without)} of {len(found)} files, such as {without[0]}, do not say the text of all their tokens, so "
        "these rollouts have none; give --tokenizer NAME for it"
    ]


def _stopped(error: ExperimentError | CaptureError) -> ExperimentError | CaptureError:
    """Say of a file that can't be imported how to go on without it."""
    return type(error)(f"{error}; nothing was imported, --keep-going leaves such files out")


def _why(skipped: Mapping[Path, str]) -> str:
    return next(iter(skipped.values()), "nothing was found")


def _refuse_twice(found: Sequence[Found]) -> None:
    seen: dict[str, Path] = {}
    for one in found:
        name = one.rollout.rollout_id
        if name in seen:
            raise RequestError(
                f"rollout {name!r} is in two files, {seen[name]} and {one.raw.path}, and a store holds each once; "
                "import them into two stores, such as one for each prompt set"
            )
        seen[name] = one.raw.path


def _chosen(found: Sequence[Found], **choice: Any) -> list[Found]:
    by_id = {one.rollout.rollout_id: one for one in found}
    columns = {
        name: {
            **one.rollout.labels,
            "n_tokens": one.rollout.n_tokens,
            "prompt_end": one.rollout.prompt_end,
            "prompt_set": one.rollout.prompt_set,
        }
        for name, one in by_id.items()
    }
    table = pd.DataFrame.from_dict(columns, orient="index")
    return [by_id[name] for name in choose(table.rename_axis("rollout_id"), **choice)]


def _model(found: Sequence[Found], responses: Responses) -> dict[str, Any]:
    """Return the one model that the trees, or the responses themselves, name; else it is unknown."""
    known = [responses.model(one.place) if one.place else {} for one in found]
    known = [model or _as_labelled(one.rollout) for model, one in zip(known, found, strict=True)]
    unlike = [model for model in known if model != known[0]]
    if unlike:
        raise RequestError(
            f"the files are of several models, {known[0].get('name', 'unknown')} and "
            f"{unlike[0].get('name', 'unknown')}; import each model's files into a store of their own, or name the one "
            "model with --model"
        )
    return known[0] or {"name": "unknown"}


def _as_labelled(rollout: Rollout) -> dict[str, Any]:
    return {"name": str(rollout.labels["inference_model"])} if "inference_model" in rollout.labels else {}


def plans_of(
    asked: Survey,
    store: Path,
    *,
    replace: bool = False,
    codec: str = "zstd",
    most_tokens: int = 1024,
) -> list[Plan]:
    """Plan an import: one plan for each group of files alike; what the store has is left out. See `datastore.plan`."""
    plans: list[Plan] = []
    for cells, members in _groups(asked.found).items():
        layers_of: dict[tuple[int, ...], list[ComponentSpec]] = {}
        for component, array in sorted({(name, array) for name, _, array in cells}, key=_in_vocabulary_order):
            numbers = tuple(sorted(layer for name, layer, _ in cells if name == component))
            layers_of.setdefault(numbers, []).append(_spec(component, array))
        for numbers, specs in layers_of.items():
            plans += datastore.plan(
                store,
                [one.rollout for one in members],
                layers=numbers,
                components=specs,
                provenance=_provenance(asked, members, specs),
                batch_tokens=1,  # nobody knows which of them were computed together
                codec=Codec(name=codec),  # type: ignore[arg-type]
                most_tokens=most_tokens,
                vocab=_vocab(asked, members),
                replace=replace,
            )
    return plans


def _groups(found: Sequence[Found]) -> dict[frozenset[tuple[str, int, Array]], list[Found]]:
    groups: dict[frozenset[tuple[str, int, Array]], list[Found]] = {}
    for one in found:
        groups.setdefault(frozenset((*cell, array) for cell, array in one.raw.arrays.items()), []).append(one)
    for cells, members in groups.items():
        if len({(name, array) for name, _, array in cells}) > len({name for name, _, _ in cells}):
            raise RequestError(
                f"{members[0].raw.path} holds a component in several widths or dtypes at different layers, which is no "
                "one array; leave it out"
            )
    return groups


def _in_vocabulary_order(one: tuple[str, Array]) -> tuple[int, str]:
    return (COMPONENTS.index(one[0]) if one[0] in COMPONENTS else len(COMPONENTS), one[0])


def _spec(component: str, array: Array) -> ComponentSpec:
    return ComponentSpec(name=component, width=array.width, dtype=array.dtype)


def _provenance(asked: Survey, members: Sequence[Found], specs: Sequence[ComponentSpec]) -> dict[str, Any]:
    formats = sorted({one.raw.format for one in members})
    text = "decoded strings of the files: characters split over tokens are lost" if asked.spoken else "tokenizer"
    return {
        "model": {**asked.model, "dtype": "+".join(sorted({one.dtype for one in specs}))},
        "tokenizer": {"text": text},
        "settings": {
            "imported_from": "+".join(formats),
            "files": digest(sorted([one.rollout.rollout_id, one.raw.fingerprint] for one in members)),
        },
    }


def _vocab(asked: Survey, members: Sequence[Found]) -> dict[int, bytes]:
    used = sorted({int(i) for one in members for i in np.unique(one.rollout.computed_ids)})
    if asked.spoken:
        text = asked.tokenizer.text
        return {i: text[i].encode("utf-8", "replace") for i in used if i in text}
    return token_bytes(asked.tokenizer, used)


def carry_out(
    asked: Survey,
    store: Path,
    *,
    plan: Callable[[], Sequence[Plan]],
    memory: int = 1 << 30,
    keep_going: bool = False,
    tick: Tick = lambda done, of: None,
) -> Imported:
    """Fill and commit the plans of an import.

    Parameters
    ----------
    asked : Survey
        What turns out to be damaged, with `keep_going`, goes from `found` to `skipped`.
    store : Path
    plan : callable
        Plans what `asked` holds; called again when a file is left out.
    memory : int
        Bytes the writer may hold.
    keep_going : bool
        Begin anew without a file whose content is damaged, instead of stopping.
    tick : callable

    Raises
    ------
    ExperimentError
        The content of a file is damaged.
    CaptureError
        The disk has not the room.
    DatastoreError
        As `datastore.create` and `Writer.commit`.
    """
    done, began = Imported(), time.monotonic()
    while True:
        try:
            _carry_out(asked, store, plans=plan(), memory=memory, done=done, tick=tick)
            break
        except _Damaged as error:
            if not keep_going or len(asked.found) == 1:
                raise ExperimentError(str(error)) from error
            asked.skipped[error.found.raw.path] = str(error)
            asked.found.remove(error.found)
            storage.discard(error.plan)
    done.seconds = time.monotonic() - began
    return done


class _Damaged(Exception):
    def __init__(self, found: Found, plan: Path, why: ExperimentError) -> None:
        super().__init__(str(why))
        self.found, self.plan = found, plan


def _carry_out(asked: Survey, store: Path, *, plans: Sequence[Plan], memory: int, done: Imported, tick: Tick) -> None:
    _refuse_full_disk(store, plans)
    files, of = {one.rollout.rollout_id: one for one in asked.found}, sum(len(p.rollouts) for p in plans)
    before = 0
    for plan in plans:
        with datastore.create(store, plan, memory=memory) as writer:
            own = [files[one.rollout_id] for one in plan.rollouts]
            for count, one in enumerate(_fill(writer, own, plans_directory(store.resolve()) / plan.key)):
                done.rollouts += 1
                done.tokens += one.rollout.n_tokens
                tick(before + count + 1, of)
            number = writer.commit()
        if number is not None:
            done.captures.append(number)
        state = writer.progress()
        done.raw_bytes += state.raw_bytes
        done.stored_bytes += state.stored_bytes
        before += len(plan.rollouts)
        tick(before, of)


def _fill(writer: Writer, files: Sequence[Found], directory: Path) -> Iterator[Found]:
    """Put the rows of every file that is wanted, in the order of the token axis; yield each that was read.

    The content of the next file is checked, and so read ahead, while this one is put.
    """
    noted = {one["rollout_id"] for many in writer.notes().get("files", []) for one in many}
    todo = [one for one in files if writer.wants(one.rollout.rollout_id) or one.rollout.rollout_id not in noted]
    unsaid: list[dict[str, Any]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="import-check") as ahead:
        checks: list[Future[str]] = [ahead.submit(check_content, one.raw.path) for one in todo[:1]]
        for index, one in enumerate(todo):
            checks += [ahead.submit(check_content, later.raw.path) for later in todo[index + 1 : index + 2]]
            name = one.rollout.rollout_id
            try:
                content = checks[index].result()
                _put(writer, one)
            except ExperimentError as error:
                raise _Damaged(one, directory, error) from error
            unsaid.append({"rollout_id": name, "file": one.raw.path.name, "content": content})
            if len(unsaid) == NOTE_EVERY or index + 1 == len(todo):
                writer.note("files", unsaid)
                unsaid = []
            yield one


def _put(writer: Writer, one: Found) -> None:
    if not writer.wants(one.rollout.rollout_id):
        return
    layers, names = set(writer.plan.layers), {c.name for c in writer.plan.components}
    for rows in one.raw.rows():
        if rows.layer in layers and rows.component in names:
            writer.put(rows.component, rows.layer, one.rollout.rollout_id, rows.values, start=rows.start, copy=False)


def _refuse_full_disk(store: Path, plans: Sequence[Plan]) -> None:
    there = sum(
        file.stat().st_size
        for plan in plans
        for file in (plans_directory(store) / plan.key).rglob("*")
        if file.is_file()
    )
    need, free = int(sum(plan.raw_bytes for plan in plans) / 1.3) - there, storage.free_bytes(store)
    if need > free:
        raise CaptureError(
            f"about {need:,} bytes are still to be written to {store} and {free:,} bytes are free, so they would not "
            "fit; nothing was imported, make room, or choose fewer rollouts or another disk"
        )
