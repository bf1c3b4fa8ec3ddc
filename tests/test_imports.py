"""Who imports whom, proved on the modules that a fresh interpreter really loads, and on the graph of the sources."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib

import grimp
import pytest

from tests import house

MODELS = {"accelerate", "torch", "transformers"}
# Distribution name -> module name, where they differ.
MODULES = {"google-crc32c": "google_crc32c"}
OPTIONAL = {("compiled.py", "numba")}
"""A file that is imported only where the extra that brings this module is installed."""
PYPROJECT = tomllib.loads((house.ROOT / "pyproject.toml").read_text(encoding="utf-8"))

ALL_MODULES = """
import importlib, json, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__") and not module.name.startswith(sys.argv[2]):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name != "triton":  # it comes with torch's builds for GPUs
                raise
json.dump(sorted(sys.modules), sys.stdout)
"""
ONE_PACKAGE = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
json.dump(sorted(sys.modules), sys.stdout)
"""
HELP = """
import atexit, json, runpy, sys
sys.argv = [sys.argv[1], "--help"]
atexit.register(lambda: print("\\n" + json.dumps(sorted(sys.modules))))
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@functools.cache
def loaded(script: str, package: str) -> frozenset[str]:
    """Run a script about a package in a fresh interpreter; return the names of the modules it ended up with."""
    words = [sys.executable, "-c", script, package, house.LEAF]
    done = subprocess.run(words, cwd=house.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = json.loads(done.stdout.splitlines()[-1])
    return frozenset(names)


def tops(names: frozenset[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", house.PACKAGES)
def test_a_package_loads_only_what_is_below_it(package: str) -> None:
    ours = tops(loaded(ALL_MODULES, package)) & set(house.MAY_IMPORT)
    assert ours - {package} <= house.MAY_IMPORT[package]


@pytest.mark.parametrize("package", [name for name in house.PACKAGES if name != "capture"])
def test_no_module_outside_capture_loads_a_model_library(package: str) -> None:
    models = tops(loaded(ALL_MODULES, package)) & MODELS
    assert models == set()


def test_importing_the_store_loads_no_model_and_no_cluster() -> None:
    forbidden = tops(loaded(ONE_PACKAGE, "datastore")) & {*MODELS, "distributed"}
    assert forbidden == set()


MAINS = [name for name in house.PACKAGES if (house.ROOT / name / "__main__.py").is_file()]


@pytest.mark.parametrize("package", [*MAINS, house.LEAF])
def test_help_loads_nothing_that_computes(package: str) -> None:
    slow = tops(loaded(HELP, package)) & {*MODELS, "dask", "pandas", "xarray", "zarr"}
    assert slow == set()


def test_there_are_no_import_cycles() -> None:
    graph = grimp.build_graph(*house.PACKAGES, cache_dir=None)
    below = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(below).prepare()  # raises CycleError, which names the cycle


def test_nothing_imports_the_leaf() -> None:
    """Its model and rollouts are read as files."""
    graph = grimp.build_graph(*house.PACKAGES, cache_dir=None)
    inside = {house.LEAF, *graph.find_descendants(house.LEAF)}
    knowing = {who for one in inside for who in graph.find_modules_that_directly_import(one)}
    assert len(inside) > 5
    assert knowing <= inside


def test_the_contracts_know_every_package() -> None:
    assert set(PYPROJECT["tool"]["importlinter"]["root_packages"]) == set(house.PACKAGES)


def test_every_command_line_is_a_script() -> None:
    """`python -m datastore` is `ads-store`; every other package's script is called after it."""
    scripts = {f"ads-{name.removeprefix('data')}": f"{name}.__main__:main" for name in MAINS}
    assert PYPROJECT["project"]["scripts"] == scripts


@pytest.mark.parametrize("package", [name for name in house.PACKAGES if name in ("datastore", "experiments")])
def test_what_is_loaded_at_import_is_a_plain_dependency(package: str) -> None:
    declared = {re.split(r"[^\w-]", wanted)[0] for wanted in PYPROJECT["project"]["dependencies"]}
    allowed = {MODULES.get(name, name) for name in declared} | set(sys.stdlib_module_names) | {package}
    leaf = house.ROOT.joinpath(*house.LEAF.split("."))
    for path in house.sources(package):
        if path.is_relative_to(leaf):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, name in house.imported(tree, anywhere=False):
            known = name.partition(".")[0] in allowed or (path.name, name) in OPTIONAL
            assert known, f"{path}:{line} imports {name}, which pyproject does not ask for"


def test_only_these_files_touch_zarr() -> None:
    """The format is one file's business; the data type, its registration and the codecs are Zarr's extension points."""
    touching = {
        path.name
        for path in house.sources("datastore")
        for _, name in house.imported(ast.parse(path.read_text(encoding="utf-8")), anywhere=True)
        if name.partition(".")[0] == "zarr"
    }
    assert touching <= {"codec.py", "dtype.py", "storage.py", "zarr_plugin.py"}


@pytest.mark.parametrize(
    ("group", "name", "target"),
    [
        ("zarr.data_type", "bfloat16", "datastore.dtype:BFloat16"),
        ("xarray.backends", "activations", "datastore.backend:ActivationsBackend"),
        ("console_scripts", "ads-store", "datastore.__main__:main"),
        ("console_scripts", "ads-capture", "capture.__main__:main"),
    ],
)
def test_installation_alone_registers_what_it_should(group: str, name: str, target: str) -> None:
    try:
        importlib.metadata.distribution("activation-datastore")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the distribution is not installed here; `make test` installs it")
    points = importlib.metadata.entry_points(group=group, name=name)
    assert [point.value for point in points] == [target]
    assert all(callable(point.load()) for point in points)
