"""Steps 3 and 4 on an imported tree, as a user types them: the old tool's own files go in, and the same come out."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from experiments.projections import read_massive, read_projection
from tests.project.stores import GOLDEN

ROOT = Path(__file__).parents[2]


def python(*words: str | Path) -> dict[str, Any]:
    """Run a command of the house; return the JSON it prints."""
    ran = subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    document: dict[str, Any] = json.loads(ran.stdout)
    return document


def test_an_imported_tree_gives_the_old_tools_files(tmp_path: Path) -> None:
    tree = tmp_path / "toy"
    made = shutil.ignore_patterns("massive_activations", "projections")
    shutil.copytree(GOLDEN, tree, ignore=made)
    python("capture", "import", tree, "--store", tree / "inference/instruct/set1.zarr", "--json")
    about = ("--experiment", tree, "--model-variant", "instruct", "--prompt-set", "set1", "--json")
    python("calibrate", *about, "--per-token")
    python("project", *about, "--layers", "best", "--force-model", "--export", "json")
    theirs, ours = (read_massive(one / "inference/instruct/massive_activations/set1.json") for one in (GOLDEN, tree))
    assert ours.aggregate.model_copy(update={"consecutive_cosine": None}) == theirs.aggregate
    assert ours.per_prompt is not None
    assert [len(one.prompt_tokens) > 0 for one in ours.per_prompt.values()] == [True] * 3
    for name in ("1", "2", "3"):
        file = f"inference/instruct/projections/alignment/deception/set1/{name}.json"
        mine, old = read_projection(tree / file), read_projection(GOLDEN / file)
        assert mine.metadata.n_prompt_tokens == old.metadata.n_prompt_tokens
        for entry in old.projections:
            for half in ("prompt", "response"):
                got, want = getattr(mine.entry(entry.layer), half), getattr(entry, half)
                np.testing.assert_allclose(np.array(got), np.array(want), rtol=0, atol=1e-5)
