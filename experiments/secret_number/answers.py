"""The audit answers in a store: where each stands, what it says, whether it is false; and where scores are read.

Everything is read from the store itself: token texts, and the labels and spans that the rollouts were captured with.
"""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from datastore.errors import AbsentError
from datastore.query import Store
from experiments.secret_number.language import QUESTIONS, parse_answer

__all__ = ["answers_of", "positions"]

Ints = NDArray[np.int64]


def answers_of(store: Store) -> pd.DataFrame:
    """Find the audit answer of every rollout that has one.

    Parameters
    ----------
    store : Store

    Returns
    -------
    DataFrame
        A row for each rollout: `rollout`; `question` (its kind); `sentence`; `false` (bool) and `label` (honest,
        fabrication, omission); positions `start` of the answer, `claim` where its truth is decided, `stop` the full
        stop of its sentence, `end` of the answer, half-open.

    Raises
    ------
    AbsentError
        No rollout has an audit answer.
    """
    table, spans = store.rollouts, {str(name): of for name, of in store.annotations.groupby("rollout_id")}
    known = table.columns.isin(["question", "decided"]).sum() == 2
    names = [str(name) for name in table.index if str(name) in spans] if known else []
    facts = {str(name): row for name, row in table[["question", "decided"]].iterrows()} if known else {}
    rows = [row for name in names if (row := _answer(store, name, spans[name], facts=facts[name]))]
    if not rows:
        raise AbsentError(
            f"{store.path} has no rollout with labels question and decided, a span audit_response and an answer of the "
            "game's grammar, so no answer can be read; capture the rollouts of the secret-number experiment"
        )
    return pd.DataFrame(rows)


def _answer(store: Store, name: str, spans: pd.DataFrame, *, facts: pd.Series) -> dict[str, Any] | None:
    found = zip(spans["label"], spans["token_start"].tolist(), spans["token_end"].tolist(), strict=True)
    places: dict[str, tuple[int, int]] = {str(label): (start, end) for label, start, end in found}
    if "audit_response" not in places or facts["question"] not in QUESTIONS:
        return None
    texts = [text if isinstance(text, str) else "" for text in store.tokens(name)["text"]]
    start, end = places["audit_response"]
    said = parse_answer(facts["question"], "".join(texts[start:end]))
    stop = next((i for i in range(start, end) if texts[i] == "."), None)
    if said is None or stop is None:
        return None
    false = "false_claim" in places
    honest = "honest" if said.claim.kind == facts["question"] else "omission"
    return {
        "rollout": name,
        "question": facts["question"],
        "sentence": said.sentence,
        "false": false,
        "label": "fabrication" if false else honest,
        "start": start,
        "claim": int(facts["decided"]),
        "stop": stop,
        "end": end,
    }


def positions(answers: pd.DataFrame, offset: int, *, since: str = "start") -> dict[str, Ints]:
    """Return the token some tokens after (before, where negative) a place in each answer, if the answer has it.

    Parameters
    ----------
    answers : DataFrame
        From `answers_of`.
    offset : int
    since : str
        A column: `start`, `claim`, `stop`.

    Returns
    -------
    dict of rollout to an array of one position
        From `start` on, positions beyond the sentence's full stop are left out; from `stop`, those after the answer.
    """
    at = answers[since].to_numpy() + offset
    last = answers["end"].to_numpy() - 1 if since == "stop" else answers["stop"].to_numpy()
    there = (at >= 0) & (at <= last)
    names = answers["rollout"].to_numpy()
    return {str(name): np.array([place], np.int64) for name, place in zip(names[there], at[there], strict=True)}
