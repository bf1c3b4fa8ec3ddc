"""What an experiment tree knows of a raw activation file in it: a rollout with labels, turns, annotations and text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from capture.tokens import Rendered, render
from experiments.annotations import Span, TokenSpan
from experiments.errors import ExperimentError
from experiments.formats import transcript_of
from experiments.rawfile import RawFile
from experiments.transcript import Transcript, Turn
from experiments.tree import Experiment

__all__ = ["LEFT_OUT", "Place", "Responses", "SpokenTokens", "place_of", "rollout_of"]

LEFT_OUT = "prompt_tokens_left_out"
"""Label of rollouts whose file holds rows of the response only: how many prompt tokens stand before them."""
_MOST_TOKEN_ID = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in an experiment tree a raw activation file lies."""

    root: Path
    variant: str
    prompt_set: str


def place_of(file: Path) -> Place | None:
    """Return a file's place if it is `{root}/inference/{variant}/raw/{any}/{prompt_set}/{id}.pt` of a tree."""
    parts = file.absolute().parts
    for i in range(len(parts) - 5, 0, -1):
        root = Path(*parts[:i])
        if parts[i] == "inference" and parts[i + 2] == "raw" and (root / "config.json").is_file():
            return Place(root=root, variant=parts[i + 1], prompt_set="/".join(parts[i + 4 : -1]))
    return None


@dataclass(slots=True, kw_only=True)
class Responses:
    """The response files of trees, each prompt set read once.

    Attributes
    ----------
    variant : str, optional
        Whose responses belong to the activations; default those of the variant that the activations are of.
    lenient : bool
        A prompt set that can't be read is said and left out instead of ending everything.
    notes : list of str
        What a user should know.
    """

    variant: str | None = None
    lenient: bool = False
    notes: list[str] = field(default_factory=list)
    _read: dict[Place, Mapping[str, Transcript]] = field(default_factory=dict)
    _trees: dict[Path, Experiment] = field(default_factory=dict)

    def model(self, place: Place) -> dict[str, Any]:
        """Return the name and adapter of the model of a variant, as far as the tree's config.json says."""
        known = self._tree(place).variants.get(place.variant)
        if known is None:
            return {}
        return {"name": known.model, **({"adapter": known.lora} if known.lora else {})}

    def of(self, raw: RawFile, place: Place) -> Transcript | None:
        """Return the response that a file's activations are of, if the tree has it."""
        if place not in self._read:
            self._read[place] = self._prompt_set(place)
        return self._read[place].get(raw.path.stem)

    def _tree(self, place: Place) -> Experiment:
        if place.root not in self._trees:
            self._trees[place.root] = Experiment(place.root)
        return self._trees[place.root]

    def _prompt_set(self, place: Place) -> Mapping[str, Transcript]:
        tree, owner = self._tree(place), self.variant or place.variant
        if not self.variant and not (place.prompt_set and tree.responses_dir(place.prompt_set, owner).is_dir()):
            self.notes.append(f"{place.root} has no responses of {owner} to {place.prompt_set!r}: no labels are joined")
            return {}
        try:
            found = tree.transcripts(place.prompt_set, responses_from=owner)
        except ExperimentError as error:
            if not self.lenient:
                raise
            self.notes.append(f"no labels are joined from {place.prompt_set!r}: {error}")
            return {}
        return {one.id: one for one in found} | {Path(one.source).stem: one for one in found}


class SpokenTokens:
    """Stands for a tokenizer where only the decoded text of each token is known; characters split over tokens are lost.

    It has what `capture.tokens.render` asks of a tokenizer for token ids that are there already.
    """

    chat_template = None
    is_fast = False
    added_tokens_decoder: Mapping[int, Any] = {}

    def __init__(self) -> None:
        self.text: dict[int, str] = {}

    def hear(self, raw: RawFile) -> None:
        """Learn the tokens of a file."""
        for ids, texts in ((raw.before, raw.before_strings), (raw.token_ids, raw.strings or ())):
            for token, text in zip(ids.tolist(), texts, strict=False):
                self.text.setdefault(token, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens; what is not known is empty."""
        return "".join(self.text.get(one, "") for one in ids).encode("utf-8", "replace").decode()

    def __len__(self) -> int:
        return max(self.text, default=0) + 1


def rollout_of(raw: RawFile, known: Transcript | None, tokenizer: Any) -> tuple[Rendered, list[str]]:
    """Return the rollout of a file, with all that is known of it, and what did not fit.

    Parameters
    ----------
    raw : RawFile
    known : Transcript, optional
        Its response in the tree; else what the file itself says.
    tokenizer : tokenizer of transformers, or SpokenTokens
    """
    if known is None and raw.record is not None:
        known = transcript_of(raw.record, source=str(raw.path), default_id=raw.path.stem)
    facts: dict[str, Any] = {"id": raw.path.stem, "labels": {}}
    notes: list[str] = []
    if known is not None:
        aligned = _aligned(raw, known)
        spans = [_moved(one, raw) for one in known.annotations if aligned or not isinstance(one, TokenSpan)]
        kept = [one for one in spans if one is not None]
        facts = {
            "id": known.id,
            "labels": dict(known.labels),
            "tags": known.tags,
            "prompt_set": known.prompt_set,
            "turns": [_moved_turn(one, raw) for one in known.turns] if aligned else (),
            "annotations": kept,
        }
        if not aligned and (known.turns or len(spans) < len(known.annotations)):
            notes.append(
                f"{raw.path}: its tokens are not those of {known.source}, so turns and token ranges are not joined"
            )
    if raw.left_out:
        facts["labels"][LEFT_OUT] = raw.left_out
    ids = {"token_ids": raw.token_ids.tolist(), "prompt_end": raw.prompt_end}
    transcript = Transcript.of({**facts, **ids}, source=str(raw.path))
    rendered = render(transcript, tokenizer, context=None, vocab_size=_MOST_TOKEN_ID)
    if rendered.notes.unmatched:
        listed = ", ".join(repr(one[:40]) for one in rendered.notes.unmatched[:3])
        notes.append(f"{raw.path}: {len(rendered.notes.unmatched)} annotated texts are not in it: {listed}")
    return replace(rendered, rollout=replace(rendered.rollout, prefix=raw.before)), notes


def _aligned(raw: RawFile, known: Transcript) -> bool:
    """Whether the file's tokens stand in the response file at the same places; it may lack an end token or so."""
    if known.token_ids is None:
        return False
    there = np.asarray(known.token_ids, dtype=np.int64)[raw.left_out : raw.left_out + len(raw.token_ids)]
    return bool(np.array_equal(there, raw.token_ids))


def _moved(one: Span, raw: RawFile) -> Span | None:
    """Return a span as it counts from the first token with rows; None where none of it is there any more."""
    if not isinstance(one, TokenSpan):
        return one
    start, end = _clipped(one.token_start, raw), _clipped(one.token_end, raw)
    if start == end and one.token_start < one.token_end:
        return None
    return TokenSpan(token_start=start, token_end=end, label=one.label)


def _moved_turn(one: Turn, raw: RawFile) -> dict[str, Any]:
    moved = one.model_dump()
    for name in ("token_start", "token_end", "thinking_start", "thinking_end"):
        if moved[name] is not None:
            moved[name] = _clipped(moved[name], raw)
    moved["thinking_ranges"] = [(_clipped(a, raw), _clipped(b, raw)) for a, b in one.thinking_ranges]
    return moved


def _clipped(token: int, raw: RawFile) -> int:
    return min(max(token - raw.left_out, 0), len(raw.token_ids))
