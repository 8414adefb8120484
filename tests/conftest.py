"""How the whole suite runs: one thread a process, and hypothesis by named profiles."""

from __future__ import annotations

import os

# Tests are small and some start four ranks on two cores: one thread each, inherited by what a test starts.
# It has to be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Kernels that numba compiles for a GPU run in its simulator, which has to be chosen before numba is imported.
# `nox -s gpu` sets it to 0. Kernels for the CPU are compiled either way.
os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Neither profile judges by the clock: a busy machine must not turn a test red.
UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=30, derandomize=True, **UNTIMED)
settings.register_profile("long", max_examples=500, derandomize=False, print_blob=True, **UNTIMED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
