"""A capture's request from an experiment tree: whose responses, over which model, into which store."""

from dataclasses import dataclass
from pathlib import Path

from capture.errors import RequestError
from experiments.transcript import Transcript
from experiments.tree import Experiment

__all__ = ["TreeSource", "read_tree"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeSource:
    """What a tree says where the command line does not.

    Attributes
    ----------
    store : Path
        `{tree}/inference/{variant}/{prompt_set}.zarr` unless another is given.
    model : str
        The variant's model.
    adapter : str or None
        The variant's LoRA adapter; None where another model is given in place of the variant's.
    transcripts : list of Transcript
        With labels, tags, turns and annotations joined.
    """

    store: Path
    model: str
    adapter: str | None
    transcripts: list[Transcript]


def read_tree(
    root: Path,
    *,
    prompt_set: str | None,
    variant: str | None = None,
    responses_from: str | None = None,
    store: Path | None = None,
    model: str | None = None,
) -> TreeSource:
    """Read what is to be captured from an experiment tree.

    Parameters
    ----------
    root : Path
        The directory with `config.json`.
    prompt_set : str
        May be nested, as `rm_syco/train_100`.
    variant : str, optional
        The model variant to run; default the config's for application.
    responses_from : str, optional
        Another variant, over whose responses the model is run.
    store, model : optional
        In place of what the tree says.

    Raises
    ------
    ExperimentError
        No such tree, variant or prompt set.
    RequestError
        No prompt set is named.
    """
    tree = Experiment(root)
    name = tree.variant_name(variant)
    if not prompt_set:
        known = ", ".join(tree.prompt_sets(responses_from or name)) or "none"
        raise RequestError(
            f"--experiment needs --prompt-set; {root} has responses of {responses_from or name} to: {known}"
        )
    transcripts = tree.transcripts(prompt_set, variant=name, responses_from=responses_from)
    chosen = tree.variants[name]
    return TreeSource(
        store=store or tree.default_store(prompt_set, name),
        model=model or tree.model(name),
        adapter=chosen.lora if model is None else None,
        transcripts=transcripts,
    )
