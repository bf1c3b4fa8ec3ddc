"""Export: rollouts of a store as files for other tools, one a rollout, each whole or not there at all.

`pt` writes an experiment tree: `inference/{variant}/raw/residual/{prompt_set}/{id}.pt` with the response files beside,
where the users' scripts look for them. `safetensors` and `npz` write `{id}.safetensors` or `{id}.npz` that carry what
is known of the rollout. Import reads all of them back.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from capture.errors import RequestError
from capture.pouring import Wanted, arrays_of, pour
from datastore import storage
from datastore.query import Store
from datastore.tables import token_texts
from datastore.writebehind import WriteBehind
from experiments.rawfile import whole
from experiments.rawfiles import write_raw
from experiments.rawfill import Filling
from experiments.responsefile import response_record

__all__ = ["Export", "carry_out", "plan_of", "record_of"]

DEFAULT_SET, DEFAULT_VARIANT = "exported", "exported"

Tick = Callable[[int, int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Where one rollout goes, and which of its cells.

    Attributes
    ----------
    rollout_id : str
    path : Path
        The activation file.
    response : Path or None
        The response file beside it, in a tree.
    cells : mapping of component to layers
    """

    rollout_id: str
    path: Path
    response: Path | None
    cells: Mapping[str, tuple[int, ...]]


def plan_of(
    store: Store,
    directory: Path,
    *,
    form: str,
    rollouts: Sequence[str],
    layers: Sequence[int] | None = None,
    components: Sequence[str] | None = None,
    variant: str = DEFAULT_VARIANT,
) -> list[Export]:
    """Say which files an export writes.

    Parameters
    ----------
    store : Store
    directory : Path
    form : str
        `pt`, `safetensors` or `npz`.
    rollouts : sequence of str
        Rollout ids.
    layers, components : sequences, optional
        Only these; a rollout's cells that are absent are left out.
    variant : str
        The model variant that the tree's files are of, for `pt`.

    Raises
    ------
    RequestError
        Nothing of what is asked for is captured, or a prompt set or variant can't name a directory.
    """
    tables = {name: store.captured(name) for name in components or store.components}
    exports = []
    for name in rollouts:
        cells = {}
        for component, table in tables.items():
            numbers, there = [int(n) for n in table.columns], table.loc[[name]].to_numpy()[0]
            have = tuple(n for n, held in zip(numbers, there, strict=True) if held and (layers is None or n in layers))
            if have:
                cells[component] = have
        if cells:
            prompt_set = str(store.rollouts.at[name, "prompt_set"])
            path, response = _paths(directory, name, form=form, prompt_set=prompt_set, variant=variant)
            exports.append(Export(rollout_id=name, path=path, response=response, cells=cells))
    if not exports:
        raise RequestError(
            f"nothing to export: none of the {len(rollouts)} rollouts has what was asked for; captured are "
            f"{', '.join(store.components)} at layers {', '.join(map(str, store.layers))}"
        )
    return exports


def _paths(directory: Path, name: str, *, form: str, prompt_set: str, variant: str) -> tuple[Path, Path | None]:
    stem = quote(name, safe=" ()+,;=@[]{}!#$&'~") if not name.startswith(".") else "%2E" + quote(name[1:], safe="")
    if form != "pt":
        return directory / f"{stem}.{form}", None
    prompt_set = prompt_set or DEFAULT_SET
    for part in (variant, *prompt_set.split("/")):
        if part in ("", ".", "..") or part.startswith("/") or "\0" in part:
            raise RequestError(f"{variant!r} or {prompt_set!r} can't name a directory; give another --variant")
    top = directory / "inference" / variant
    return top / "raw" / "residual" / prompt_set / f"{stem}.pt", top / "responses" / prompt_set / f"{stem}.json"


def carry_out(
    store: Store,
    directory: Path,
    exports: Sequence[Export],
    *,
    variant: str = DEFAULT_VARIANT,
    overwrite: bool = False,
    tick: Tick = lambda done, of: None,
) -> int:
    """Write the files; return how many response files were there already and were kept.

    Parameters
    ----------
    store : Store
    directory : Path
    exports : sequence of Export
    variant : str
        As given to `plan_of`.
    overwrite : bool
        Write activation files anew that are there. A tree's own response files and config.json are never written over.
    tick : callable

    Raises
    ------
    ExperimentError
        An activation file is there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    job = _Job(store, overwrite=overwrite)
    write = _poured if exports[0].path.suffix == ".pt" else _one_by_one
    with (
        closing(WriteBehind(depth=2)) as behind,
        ThreadPoolExecutor(1, thread_name_prefix="export-behind") as disk,  # who decodes does not wait for the disk
        closing(write(job, exports)) as files,
    ):
        taken = deque[Future[None]]()
        for number, (descriptor, path) in enumerate(files):
            taken.append(disk.submit(behind.push, descriptor, path))
            if len(taken) > 2:
                taken.popleft().result()
            tick(number + 1, len(exports))
        for one in taken:
            one.result()
        behind.drain()
    if exports[0].response is not None:
        _write_new(directory / "config.json", _config(store, variant))
    storage.sync_files(directory)
    return job.kept


class _Job:
    """What the files of one export share.

    Attributes
    ----------
    kept : int
        Response files that were there already.
    """

    def __init__(self, store: Store, *, overwrite: bool) -> None:
        self.store, self.overwrite, self.kept = store, overwrite, 0
        self._spans = {str(name): group for name, group in store.annotations.groupby("rollout_id")}

    def begin(self, one: Export) -> dict[str, Any]:
        """Make a file's directory and write the response file beside; return the rollout's record."""
        record = record_of(self.store, one.rollout_id, self._spans.get(one.rollout_id), stem=one.path.stem)
        one.path.parent.mkdir(parents=True, exist_ok=True)
        if one.response is not None:
            record, left_out = _with_prompt(self.store, one.rollout_id, record)
            self.kept += not _write_new(one.response, record)
            record["left_out"] = left_out
        return record


def _poured(job: _Job, exports: Sequence[Export]) -> Generator[tuple[int, Path], None, None]:
    """Write `.pt` files; yield each one's open descriptor and path."""
    cells = job.store.cells

    def laid_out(wanted: Wanted) -> Filling:
        one = by_id[wanted.rollout_id]
        with cells.unchanged():
            arrays, record = arrays_of(cells, wanted), job.begin(one)
        return Filling(one.path, arrays, record, overwrite=job.overwrite)

    by_id = {one.rollout_id: one for one in exports}
    asked = [Wanted(rollout_id=one.rollout_id, cells=one.cells) for one in exports]
    with closing(pour(cells, asked, laid_out=laid_out)) as files:
        for file in files:
            yield file.finish(), file.path


def _one_by_one(job: _Job, exports: Sequence[Export]) -> Generator[tuple[int, Path], None, None]:
    """Write files of the forms that are written from memory; yield each one's open descriptor and path."""
    for one in exports:
        with job.store.cells.unchanged():
            values, record = _values(job.store, one), job.begin(one)
        write_raw(one.path, values, record, overwrite=job.overwrite)
        yield os.open(one.path, os.O_RDONLY), one.path


def _with_prompt(store: Store, rollout_id: str, record: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return a record with the prompt before its tokens, where only the response has rows, and the prompt's tokens.

    Places in it count from the prompt's first token, as in the files of a whole rollout.
    """
    place = int(store.cells.newest[store.cells.index[rollout_id]])
    before = store.cells.captures[place].prefix(rollout_id)
    n = len(before)
    if not n or record["prompt_end"]:
        return dict(record), 0
    text = [one or "" for one in token_texts(store.cells, place, before)]
    moved = {"prompt": "".join(text), "tokens": [*text, *record["tokens"]], "prompt_end": n}
    moved["token_ids"] = [*before.tolist(), *record["token_ids"]]
    for name in ("turn_boundaries", "annotations"):
        if name in record:
            moved[name] = [_later(one, n) for one in record[name]]
    return {**record, **moved}, n


def _later(span: Mapping[str, Any], n: int) -> dict[str, Any]:
    places = ("token_start", "token_end", "thinking_start", "thinking_end")
    moved = {name: span[name] + n for name in places if name in span}
    if "thinking_ranges" in span:
        moved["thinking_ranges"] = [(a + n, b + n) for a, b in span["thinking_ranges"]]
    return {**span, **moved}


def _values(store: Store, one: Export) -> dict[tuple[str, int], NDArray[Any]]:
    return {
        (component, layer): np.asarray(store.select(component, rollouts=one.rollout_id, layers=layer, raw=True).values)
        for component, layers in one.cells.items()
        for layer in layers
    }


def _write_new(path: Path, value: Mapping[str, Any]) -> bool:
    """Write a JSON file unless it is there; return whether it was written."""
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path, overwrite=False) as staged:
        staged.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return True


def _config(store: Store, variant: str) -> dict[str, Any]:
    model = {"model": str(store.captures["model"].iloc[-1])}
    return {"defaults": {"application": variant, "extraction": variant}, "model_variants": {variant: model}}


def record_of(store: Store, rollout_id: str, spans: pd.DataFrame | None, *, stem: str) -> dict[str, Any]:
    """Return a rollout as a response file, with its annotations."""
    row = store.rollouts.loc[[rollout_id]].iloc[0].to_dict()
    record = response_record(rollout_id, row, store.tokens(rollout_id), stem=stem)
    if spans is not None:
        columns = ("token_start", "token_end", "label")
        values = zip(*(spans[name].tolist() for name in columns), strict=True)
        record["annotations"] = [dict(zip(columns, one, strict=True)) for one in values]
    return record
