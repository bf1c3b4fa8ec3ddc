"""Settings of every test: Hypothesis' profiles, and one thread for each library that would take them all."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Before anything imports them: the tests run in several processes on few cores.
for _pool in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_pool, "1")
# A test that would fetch something is a broken test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# `ci`: the same examples on every run, nothing kept between runs. `dev`: new examples each time, failures remembered.
# No deadline in either: a slow machine is not a wrong answer.
settings.register_profile(
    "ci", derandomize=True, database=None, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
