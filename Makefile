# Everything a person types: `make demo`, `make test`. Each sets up .venv by itself; PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ZARRITA := tests/view/js/node_modules/.package-lock.json
PACKAGES := $(wildcard benchmarks calibrate capture datastore experiments project view)
DEMO := build/demo
GAME := experiments/secret_number/data

# The same numbers on every machine, nothing fetched, no thread pool inside each of the test processes.
QUIET_ENV := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false PYTHONHASHSEED=0
TEST_ENV := $(QUIET_ENV) HYPOTHESIS_PROFILE=ci OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 COLUMNS=120 NO_COLOR=1
DEMO_RUN = $(QUIET_ENV) $(BIN)/python -m
JOBS ?= 2

.PHONY: setup demo report test chromium screenshots check lint types imports bench bench-calibrate bench-store bench-capture bench-import bench-project bench-scale bench-gpu bench-serve bench-api bench-faults bench-many bench-view clean
.DEFAULT_GOAL := test

setup: $(STAMP)

# torch is asked for by its exact version, so that a machine that has that build at hand takes it and no other.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

# Capture, verify, calibrate, score along directions, and the finding with its figure: the whole of it on the bundled model.
# Its last step writes a page of a lying rollout beside its honest twin, one file that opens without a server.
demo: setup
	rm -rf $(DEMO)
	@mkdir -p $(DEMO)
	$(DEMO_RUN) capture --store $(DEMO)/run.zarr
	$(DEMO_RUN) capture --store $(DEMO)/run.zarr --experiment $(GAME) --prompt-set secret_number
	$(DEMO_RUN) capture --store $(DEMO)/run.zarr --experiment $(GAME) --prompt-set secret_number --components resid_pre --layers 0
	$(DEMO_RUN) capture --store $(DEMO)/questions.zarr --experiment $(GAME) --prompt-set questions
	$(DEMO_RUN) capture --store $(DEMO)/questions.zarr --experiment $(GAME) --prompt-set questions --components resid_pre --layers 0
	$(DEMO_RUN) datastore info $(DEMO)/run.zarr
	$(DEMO_RUN) datastore verify $(DEMO)/run.zarr --full
	$(DEMO_RUN) calibrate $(DEMO)/run.zarr
	$(DEMO_RUN) project $(DEMO)/run.zarr --vectors $(GAME)/extraction --steering $(GAME)/steering --layers best,best+1,4,5
	$(DEMO_RUN) experiments.secret_number finding $(DEMO)/run.zarr --learned-on $(DEMO)/questions.zarr --plot $(DEMO)/finding.png
	$(DEMO_RUN) view export $(DEMO)/run.zarr --ids 17,18 --out $(DEMO)/page.html
	@echo "the figure: $(DEMO)/finding.png   the page: $(DEMO)/page.html, or all of it: $(BIN)/python -m view $(DEMO)/run.zarr --open"

# Every number of docs/secret_number.md again, from the model on, into build/report; REPORT_ARGS=--write puts them into the checkout.
report: setup
	$(QUIET_ENV) $(BIN)/python -m experiments.secret_number report --out build/report $(REPORT_ARGS)

# The page is tested in a real browser. Where this machine lets us, it is installed before any test starts.
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium; } >/dev/null 2>&1 || \
	  echo "warning: there is no chromium and it can't be installed here: the page is not tested" >&2

screenshots: setup
	$(QUIET_ENV) $(BIN)/python -m benchmarks.screenshots docs/images

test: check chromium $(ZARRITA)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# What a browser reads stores with. Without npm or a network its tests say that they were not run, and fail where CI is set.
$(ZARRITA): tests/view/js/package-lock.json
	@cd $(dir $<) && npm ci --silent --no-audit --no-fund --fetch-retries=0 --fetch-timeout=30000 && touch ../../../$@ || \
	  echo "warning: zarrita could not be installed, so what a browser reads of a store is not tested" >&2

check: lint types imports

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy $(PACKAGES) tests

imports: setup
	$(BIN)/lint-imports

# Rates are ratios to references measured in the same run; the thread pools are the machine's own.
bench: bench-store bench-capture bench-project bench-calibrate

bench-store: setup
	$(QUIET_ENV) $(BIN)/python -m benchmarks.store $(BENCH_ARGS)

bench-capture: setup
	$(QUIET_ENV) $(BIN)/python -m benchmarks.capture $(BENCH_ARGS)

bench-project: setup
	$(QUIET_ENV) $(BIN)/python -m benchmarks.project $(BENCH_ARGS)

bench-calibrate: setup
	$(QUIET_ENV) $(BIN)/python -m benchmarks.calibrate $(BENCH_ARGS)

# 88 GB, most of it hard links to 31 GB on the disk: it takes minutes, and is no part of `make bench`.
bench-scale: setup
	$(QUIET_ENV) $(BIN)/python -m benchmarks.scale $(BENCH_ARGS)

# Kills, power cuts, errors of the disk, full disks: some minutes; fails where anything was lost.
bench-faults: setup
	$(QUIET_ENV) $(BIN)/python -m benchmarks.faults $(BENCH_ARGS)

# A thousand captures of one rollout each.
bench-many: setup
	$(QUIET_ENV) $(BIN)/python -m benchmarks.many $(BENCH_ARGS)

bench-api: setup
	$(QUIET_ENV) $(BIN)/python -m benchmarks.api $(BENCH_ARGS)

# How soon a server answers while it captures, and how soon it ends.
bench-serve: setup
	$(QUIET_ENV) $(BIN)/python -m benchmarks.serve $(BENCH_ARGS)

# Needs a GPU; `BENCH_ARGS=--tiny` runs it small on a CPU.
bench-gpu: setup
	$(QUIET_ENV) $(BIN)/python -m benchmarks.gpu $(BENCH_ARGS)

bench-import: setup
	$(QUIET_ENV) $(BIN)/python -m benchmarks.exchange $(BENCH_ARGS)

bench-view: setup
	$(QUIET_ENV) $(BIN)/python -m benchmarks.view $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(dir $(ZARRITA)) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
