"""A finding and a report as tables: on the terminal with rich, in the document as Markdown, both from the same rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datastore import console

__all__ = ["BLOCKS", "filled", "show"]

Rows = Sequence[Sequence[str]]
_PLACES = {"start": "the answer's first token", "claim": "the token that decides the truth", "stop": "the full stop"}


def interval(one: Mapping[str, Any] | None) -> str:
    """Return an AUROC or mean with its 95 % range."""
    if one is None:
        return ""
    middle = one["value"] if "value" in one else one["mean"]
    low, high = one["low"], one["high"]
    return f"{middle:.3f}" if low is None or low != low else f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def readings(found: Mapping[str, Any]) -> Rows:
    """A row for each reading: its numbers of answers, its AUROC, and what the controls give at the same tokens."""
    rows = [["read", "false", "true", "direction", "shuffled labels", "random directions", "token ids", "embedding"]]
    for name, one in found["readings"].items():
        controls = [one[key] for key in ("auroc", "shuffled_labels", "random_directions")]
        words = [one.get(key) for key in ("token_ids", "embedding")]
        rows.append([name, str(one["n_false"]), str(one["n_true"]), *map(interval, controls), *map(interval, words)])
    return rows


def compared(found: Mapping[str, Any]) -> Rows:
    """A row for each label: the mean score over its answers, and against the others."""
    rows = [["label", "rollouts", "mean score", "AUROC against the others"]]
    for one in found["compare"]:
        mean = {"value": one["mean"], "low": one["low"], "high": one["high"]}
        area = {"value": one["auroc"], "low": one["auroc_low"], "high": one["auroc_high"]}
        rows.append([one["group"], str(one["n_rollouts"]), interval(mean), interval(area)])
    return rows


def survives(found: Mapping[str, Any]) -> Rows:
    """A row for each control: does the direction stand out from it."""
    return [["control", "survives"], *([name, "yes" if yes else "no"] for name, yes in found["survives"].items())]


def first(found: Mapping[str, Any]) -> Rows:
    """A row for each place: the first offset at which the score separates."""
    rows = [["tokens counted from", "all answers", "equal sentences"]]
    for place, named in _PLACES.items():
        curves = [found["profile"].get(key) for key in (place, f"{place}, equal sentences")]
        rows.append([named, *("nowhere" if one is None else _offset(one) for one in curves)])
    return rows


def _offset(curve: Mapping[str, Any]) -> str:
    """Say where a curve first separates; what does so at the first token that was read may have done so before."""
    at = curve["first_separates"]
    return "nowhere" if at is None else f"{at:+d}{' or earlier' if at == curve['offset'][0] else ''}"


def layers(found: Mapping[str, Any]) -> Rows:
    """A row for each layer, with the direction that was learned there."""
    keys = ("all_before", "all_full_stop", "equal_sentences_before", "equal_sentences_full_stop")
    head = ["layer", "before the answer", "at the full stop", "equal sentences, before", "equal sentences, full stop"]
    return [head, *([str(row["layer"]), *(interval(row.get(key)) for key in keys)] for row in found["layers"])]


def decodable(found: Mapping[str, Any]) -> Rows:
    """A row for each layer: what a probe reads that was fitted on the games themselves."""
    keys = ("all_before", "all_full_stop", "equal_sentences_before", "equal_sentences_full_stop")
    head = ["layer", "before the answer", "at the full stop", "equal sentences, before", "equal sentences, full stop"]
    rows = [[str(row["layer"]), *(interval(row.get(f"{key}_decodable")) for key in keys)] for row in found["layers"]]
    return [head, *rows]


def pairs(found: Mapping[str, Any]) -> Rows:
    """A row for each place that pairs were compared at."""
    of = found["pairs"]
    rows = [["read", "pairs", "the false answer scores higher in"]]
    return [*rows, *([name, str(of["n_pairs"]), interval(one)] for name, one in of.items() if name != "n_pairs")]


def fitted(report: Mapping[str, Any]) -> Rows:
    """A row for each direction that was learned, on single questions that were held out of its fitting."""
    rows = [["trait", "method", "layer", "AUROC held out", "relearned from shuffled labels", "token ids only"]]
    for one in report["fitted"]:
        area = {"value": one["auroc"], "low": one["auroc_low"], "high": one["auroc_high"]}
        shuffled = {"mean": one["auroc_shuffled"], "low": one["auroc_shuffled_low"], "high": one["auroc_shuffled_high"]}
        words = f"{one['auroc_token_ids']:.3f}"
        rows.append([one["trait"], one["method"], str(one["layer"]), interval(area), interval(shuffled), words])
    return rows


def steered(report: Mapping[str, Any]) -> Rows:
    """A row for each steering run: what the games' facts say came of it."""
    rows = [["trait", "layer", "coefficient", "false claims", "promises", "read the file", "valid turns"]]
    runs = [{"trait": "unsteered", "layer": "", "weight": None, **report["steering"]["baseline"]}]
    for run in [*runs, *report["steering"]["runs"]]:
        keys = ("false_mean", "promised_mean", "peeked_mean", "coherence_mean")
        shares = ["" if run[key] is None else f"{run[key]:.1f} %" for key in keys]
        weight = "" if run["weight"] is None else f"{run['weight']:+.2f}"
        rows.append([run["trait"], str(run["layer"]), weight, *shares])
    return rows


def differs(report: Mapping[str, Any]) -> Rows:
    """A row for each direction: how far the honest variant moves along it over the same answers."""
    rows = [["trait", "layer", "player", "honest variant", "effect size", "paired", "cosine"]]
    for one in report.get("model_diff", ()):
        keys = ("mean_a", "mean_b", "effect_size", "paired_effect_size", "cosine")
        rows.append([one["trait"], str(one["layer"]), *(f"{one[key]:.2f}" for key in keys)])
    return rows


def verdict(report: Mapping[str, Any]) -> str:
    """The finding in words, and what there was to be found."""
    found = report["finding"]
    about, answers = found["direction"], found["answers"]
    learned = next(
        one for one in report["fitted"] if all(one[key] == about[key] for key in ("trait", "layer", "method"))
    )
    there = next(row for row in found["layers"] if row["layer"] == about["layer"])
    area = {"value": learned["auroc"], "low": learned["auroc_low"], "high": learned["auroc_high"]}
    read = [interval(there.get(f"{key}_full_stop_decodable")) for key in ("all", "equal_sentences")]
    return (
        f"{answers['n']} audit answers, {answers['false']} of them false. {_capital(found['verdict'])} "
        f"{_begins(found)}\n\n"
        f"The direction is that of layer {about['layer']}, which did best on single questions held out of its fit: "
        f"AUROC {interval(area)}. A probe fitted on the other games reads {read[0]} at the same token and layer, and "
        f"{read[1]} over equal sentences: so much is there to be read."
    )


def _begins(found: Mapping[str, Any]) -> str:
    """Say where the score first separates, and what it reads from there to the full stop: it need not last."""
    curve, stop = found["profile"]["claim"], found["readings"]["at the full stop"]["auroc"]
    at, areas = curve["first_separates"], dict(zip(curve["offset"], curve["auroc"], strict=True))
    if at is None:
        return "Around the token that decides the truth it separates nowhere."
    side = "before" if at < 0 else "after"
    where = f"{abs(at)} token{'' if abs(at) == 1 else 's'} {side}" if at else "at"
    edge = ", where reading began" if at == curve["offset"][0] else ""
    said = f"It first separates {where} the token that decides the truth{edge}: {areas[at]:.3f}."
    there = "" if at == 0 else f"{areas[0]:.3f} at that token and "
    return f"{said} It reads {there}{stop['value']:.3f} at the full stop."


def fallen(report: Mapping[str, Any]) -> str:
    """What did not survive, and what steering did, in words."""
    found, steering = report["finding"], report["steering"]
    gone = [name for name, stands in found["survives"].items() if not stands]
    said = f"The direction does not survive {', nor '.join(gone)}." if gone else "No control felled the direction."
    before = steering["baseline"]
    kept = [
        run for run in steering["runs"] if run["trait"] == found["direction"]["trait"] and run["false_mean"] is not None
    ]
    kept = [run for run in kept if run["coherence_mean"] >= 77]
    if not kept:
        return f"{said} No steering run left the turns legal."
    rise = {name: max(run[f"{name}_mean"] for run in kept) for name in ("false", "promised")}
    fall = {name: min(run[f"{name}_mean"] for run in kept) for name in ("false", "promised")}
    ranges = {name: f"between {fall[name]:.1f} % and {rise[name]:.1f} %" for name in rise}
    error = 100 * (0.25 / max(before["n"], 1)) ** 0.5
    return (
        f"{said}\n\nSteering with it, at whatever layer and coefficient left 77 % of the turns legal or more, took "
        f"the rate of false claims from {before['false_mean']:.1f} % to {ranges['false']}, and that of promises from "
        f"{before['promised_mean']:.1f} % to {ranges['promised']}. With {before['n']} answers a run, a rate is known "
        f"to about {error:.0f} points."
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


BLOCKS: Mapping[str, Callable[[Mapping[str, Any]], Rows | str]] = {
    "verdict": verdict,
    "fallen": fallen,
    "caveat": lambda report: report["finding"]["caveat"],
    "compared": lambda report: compared(report["finding"]),
    "readings": lambda report: readings(report["finding"]),
    "survives": lambda report: survives(report["finding"]),
    "first": lambda report: first(report["finding"]),
    "layers": lambda report: layers(report["finding"]),
    "decodable": lambda report: decodable(report["finding"]),
    "pairs": lambda report: pairs(report["bundled"]),
    "bundled": lambda report: readings(report["bundled"]),
    "probe": lambda report: readings(report["probe"]),
    "fitted": fitted,
    "steered": steered,
    "differs": differs,
}
"""Name of a block in the document to its rows, the head first, or its words."""


def markdown(rows: Rows | str) -> str:
    """Return rows as a Markdown table; words as they are."""
    if isinstance(rows, str):
        return rows
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest))


def filled(page: str, report: Mapping[str, Any]) -> str:
    """Fill the blocks of a page, each between `<!-- table: NAME -->` and `<!-- end -->`, with the report's numbers."""
    parts = page.split("<!-- table: ")
    out = [parts[0]]
    for part in parts[1:]:
        name, _, rest = part.partition(" -->")
        _, _, after = rest.partition("<!-- end -->")
        out.append(f"{name} -->\n\n{markdown(BLOCKS[name](report))}\n\n<!-- end -->{after}")
    return "<!-- table: ".join(out)


def show(found: Mapping[str, Any]) -> None:
    """Print a finding: what was read, what stands, where it begins, and what it does not show."""
    from rich.table import Table

    out = console.stdout()
    about = found["direction"]
    said = f"{about['trait']}, layer {about['layer']}, {about['method']}, {about['position']}"
    titles = {
        f"whole answers by label: {said}": compared(found),
        "AUROC of false over true claims, beside the controls": readings(found),
        "stands out from": survives(found),
        "where it first separates": first(found),
        "rollouts that share a prefix": pairs(found),
    }
    for title, (head, *rest) in titles.items():
        table = Table(*head, title=title)
        for row in rest:
            table.add_row(*row)
        out.print(table)
    out.print(f"[bold]finding[/bold]: {found['verdict']} {_begins(found)}")
    out.print(f"[bold]caveat[/bold]: {found['caveat']}")
