"""What importing PiKV brings, and what it does not."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import attrs
import pytest

import pikv
import pikv.policies

PACKAGES = ["pikv", "pikv.policies", "pikv.core.ports"]
POLICIES = [getattr(pikv.policies, name) for name in pikv.policies.__all__]


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_are_exactly_all(name):
    """What can be seen in a package is what its __all__ lists, sorted; its modules aside."""
    package = importlib.import_module(name)
    seen = {each for each, value in vars(package).items() if not (each.startswith("_") or inspect.ismodule(value))}
    listed = [each for each in package.__all__ if each != "__version__"]
    assert seen == set(listed)
    assert package.__all__ == sorted(package.__all__)


def test_importing_pikv_loads_no_optional_package():
    """In a fresh interpreter; also with the policies."""
    optional = {"cupy", "numba", "mpi4py", "zarr", "transformers", "hypothesis", "prometheus_client"}
    program = "import pikv, pikv.policies, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "torch" in loaded
    assert optional.isdisjoint(loaded)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_are_frozen_and_final(policy):
    """A policy is settings: attrs.frozen, not derived from, and what a port says."""
    assert attrs.has(policy)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        policy().anything = 1
    assert policy.__final__
    assert any(base.__module__.startswith("pikv.core.ports") for base in policy.__mro__)


@pytest.mark.parametrize("name", [name for name in pikv.__all__ if name.endswith("Error")])
def test_an_error_is_a_pikv_error_and_a_builtin(name):
    """So that a caller who knows nothing of PiKV catches it as well."""
    error = getattr(pikv, name)
    builtins = [base for base in error.__mro__ if base.__module__ == "builtins" and base not in (Exception, object)]
    assert issubclass(error, pikv.PiKVError)
    assert name == "PiKVError" or set(builtins) - {BaseException}
