"""A Runner on the CPU."""

from __future__ import annotations

import ctypes
import functools
import getpass
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import final

import attrs
import torch

from pikv.adapters.cupy_gpu.program import SOURCES, Argument, Program, Runner, address

SHIM = Path(__file__).parent
OPTIONS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing")


def compiler() -> str | None:
    """A C++ compiler of this machine that knows float16, or None."""
    return next((found for name in ("g++", "clang++") if (found := shutil.which(name))), None)


@final
@attrs.frozen
class HostRunner(Runner):
    """Runs kernels on the CPU, thread after thread. What is compiled is kept in the system's temporary folder."""

    def serves(self, device: torch.device) -> bool:
        """Main memory."""
        return device.type == "cpu"

    def run(
        self, program: Program, kernel: str, blocks: Sequence[int], threads: int, arguments: Sequence[Argument]
    ) -> None:
        """See Runner."""
        if 0 in blocks:
            return
        slots = [
            struct.unpack("<q", struct.pack("<d", each))[0] if isinstance(each, float) else address(each)
            for each in arguments
        ]
        counts = (ctypes.c_uint * 3)(*blocks, *[1] * (3 - len(blocks)))
        getattr(_library(program), f"run_{kernel}")(counts, threads, (ctypes.c_int64 * len(slots))(*slots))


@functools.cache
def _library(program: Program) -> ctypes.CDLL:
    source = (SOURCES / program.file).read_text()
    kernels = re.findall(r"__global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(", source)
    entries = "\n".join(f"ENTRY({kernel})" for kernel in kernels)
    unit = f"#include <warp.cuh>\n#include <{program.file}>\n{entries}\n"
    folder = Path(tempfile.gettempdir()) / f"pikv_cuda_on_host_{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    files = sorted([*SOURCES.iterdir(), *SHIM.iterdir()])
    text = [unit, *program.definitions, *OPTIONS, *(file.read_text() for file in files if file.is_file())]
    built = folder / f"{hashlib.sha256(repr(text).encode()).hexdigest()[:32]}.so"
    if not built.exists():
        _compile(unit, program, built)
    return ctypes.CDLL(str(built))


def _compile(unit: str, program: Program, built: Path) -> None:
    """Compile into a file of another name first, so that nobody loads half of one."""
    found, beside = compiler(), built.with_suffix(f".{os.getpid()}")
    if found is None:
        raise RuntimeError("no C++ compiler: g++ or clang++ is needed to run CUDA sources on a CPU")
    command = [found, *OPTIONS, *program.definitions, f"-I{SHIM}", f"-I{SOURCES}", "-x", "c++", "-", "-o", str(beside)]
    done = subprocess.run(command, input=unit, text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program}: {done.stderr}")
    beside.replace(built)
