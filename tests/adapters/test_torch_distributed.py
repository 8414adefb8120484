from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

from pikv.adapters.torch_distributed import TorchTransport
from pikv.core.errors import TransportError
from pikv.testing.transport_checks import TRANSPORT_CHECKS

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo; install one that has"
)


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("ranks", [1, 2])
def test_torch_transport_passes_the_checks(ranks):
    """Processes that torchrun starts do what every transport must."""
    done = torchrun(ranks, str(Path(__file__).with_name("torch_checks.py")))
    assert done.returncode == 0, done.stderr
    assert f"{len(TRANSPORT_CHECKS)} checks passed on {ranks} ranks" in done.stdout


def test_a_process_without_a_launcher_is_told_so(monkeypatch):
    """TransportError, and what to do."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TransportError, match="start them by torchrun"):
        TorchTransport.from_environment()
