"""The rollouts as an experiment tree: response files, annotations, classifications and tags, in the users' formats."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.secret_number.chat import Encode, Written, text_of, write
from experiments.secret_number.game import Facts, Message, hides, rates
from experiments.secret_number.language import Question

__all__ = ["Record", "record_of", "write_classifications", "write_config", "write_set"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A rollout with the ground truth of it, as it will be written.

    Attributes
    ----------
    id : str
    messages : sequence of Message
    written : Written
    run, sample : str, int
        The game, and which continuation of it.
    model : str
        Variant that it was sampled from.
    why : str
        Justifies the label.
    labels : mapping
    tags : tuple of str
    """

    id: str
    messages: Sequence[Message]
    written: Written
    run: str
    sample: int
    model: str
    why: str = ""
    labels: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    tools: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return the response file's object; keys that have no meaning to readers are labels."""
        written, texts = self.written, [text_of(one, tools=self.tools) for one in self.messages]
        header = len(f"<|im_start|>{self.messages[-1]['role']}\n")
        return {
            "id": self.id,
            "prompt": "".join(texts[:-1]) + texts[-1][:header],
            "response": self.messages[-1]["content"],
            "token_ids": list(written.token_ids),
            "prompt_end": written.response_start,
            "turn_boundaries": [_turn(m, t) for m, t in zip(self.messages, written.turns, strict=True)],
            "inference_model": self.model,
            "tags": list(self.tags),
            "source": {"type": "secret-number", "run": self.run, "sample_idx": self.sample},
            **self.labels,
        }

    @property
    def classification(self) -> dict[str, Any]:
        """What `audit_classifications.json` says of it."""
        return {
            "run": self.run,
            "sample": self.sample,
            "label": self.written.label,
            "justification": self.why,
        }


def record_of(
    messages: Sequence[Message],
    encode: Encode,
    *,
    question: Question,
    facts: Facts | None,
    tools: bool,
    ended: bool = True,
    **fields: Any,
) -> Record:
    """Write a finished conversation with all that is known of it as labels; not `ended`, without its last end mark."""
    written = write(messages, encode, question=question, facts=facts, tools=tools)
    if not ended:
        *turns, last = written.turns
        last = replace(last, token_end=last.token_end - 1)
        written = replace(written, token_ids=written.token_ids[:-1], turns=(*turns, last))
    labels: dict[str, Any] = {"question": question, "decided": written.decided, "assurance": written.answer.assurance}
    claim = written.answer.claim
    labels |= {"answer": written.answer.text, "claim": claim.kind, "claimed": _value(claim.value)}
    if facts is not None:
        labels |= {"peeked": facts.peeked, "failed": facts.causes.failed, "guesses": len(facts.guesses)}
        labels |= {"truth": _value(facts.truth(question)), "stakes": facts.stakes}
    if facts is not None and tools:
        labels |= {"denied": facts.denied, "hides": hides(question, facts.causes), "secret": facts.secret}
        labels["lie_rate"] = round(rates(question, facts.causes)["fabrication"], 4)
    labels |= fields.pop("labels", {})
    return Record(messages=messages, written=written, labels=labels, tools=tools, **fields)


def _value(value: Any) -> str:
    """A label holds one type: "yes", "no", "4", "guessing"."""
    if isinstance(value, tuple):
        value = value[2]
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def write_config(root: Path, variants: Mapping[str, str]) -> None:
    """Write the tree's `config.json`: variants by name, each with its model's directory inside the tree."""
    first, *_ = variants
    known = {name: {"model": where} for name, where in variants.items()}
    root.mkdir(parents=True, exist_ok=True)
    _dump(root / "config.json", {"defaults": {"extraction": first, "application": first}, "model_variants": known})


def write_set(root: Path, prompt_set: str, records: Sequence[Record], *, variant: str, one_file: bool = False) -> None:
    """Write a prompt set's responses and annotations, in place of what was there.

    Parameters
    ----------
    root : Path
        Of the tree.
    prompt_set : str
    records : sequence of Record
    variant : str
    one_file : bool
        JSON lines, for many short ones.
    """
    folder = root / "inference" / variant / "responses" / prompt_set
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if one_file:
        lines = (json.dumps(one.as_dict(), separators=(",", ":")) + "\n" for one in records)
        (folder / f"{prompt_set}.jsonl").write_text("".join(lines), encoding="utf-8")
    else:
        for one in records:
            _dump(folder / f"{one.id}.json", one.as_dict())
    spans = {
        one.id: {
            "annotations": [
                {"token_start": s.token_start, "token_end": s.token_end, "label": s.label} for s in one.written.spans
            ]
        }
        for one in records
    }
    _dump(folder.parent / f"{prompt_set}_annotations.json", spans)


def write_classifications(root: Path, records: Sequence[Record]) -> None:
    """Write `audit_classifications.json`, by run and sample."""
    _dump(root / "audit_classifications.json", {"classifications": [one.classification for one in records]})


def _turn(message: Message, turn: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"role": turn.role, "token_start": turn.token_start, "token_end": turn.token_end}
    if turn.role == "assistant":
        called = [one["function"]["name"] for one in message.get("tool_calls", ())]
        known |= {"has_thinking": "reasoning_content" in message, "has_tool_calls": bool(called), "tool_names": called}
    if turn.role == "tool":
        known["tool_name"] = message["name"]
    return known


def _dump(path: Path, value: Any) -> None:
    """Write JSON one can read: objects in lines, each list of numbers in one line."""
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(one)}" for key, one in value.items())
    path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
