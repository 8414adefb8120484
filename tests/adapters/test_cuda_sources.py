"""What nvcc says of the CUDA kernels: nothing spills, and a GPU has room for as many blocks as they are written for."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

from pikv.adapters.compressors import Int2, Int4, Int8
from pikv.adapters.cupy_gpu.attend import attend_program
from pikv.adapters.cupy_gpu.choose import choose_program
from pikv.adapters.cupy_gpu.program import SOURCES
from pikv.adapters.cupy_gpu.seal import seal_program
from pikv.core.exact import Exact
from pikv.policies import Quest
from pikv.testing.backend import codec

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is missing")
REGISTERS, SHARED_BYTES = 65_536, 100_000  # of one multiprocessor of an A100, an RTX 4090 or better
BFLOAT, HALF = torch.bfloat16, torch.float16


def compile_for(program, architecture, folder):
    """The registers a thread, the spilled bytes and the shared bytes of each kernel, as ptxas reports them."""
    command = ["nvcc", f"-arch={architecture}", "-std=c++17", "-cubin", "-Xptxas", "-v", f"-I{SOURCES}"]
    out = ["-o", str(folder / "out.cubin"), str(SOURCES / program.file)]
    done = subprocess.run([*command, *program.definitions, *out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers([^\n]*)",
        done.stderr,
        re.DOTALL,
    )
    shared = [re.search(r"(\d+) bytes smem", rest) for *_, rest in found]
    return {
        name: (int(registers), int(stack) + int(spilled), int(bytes_.group(1)) if bytes_ else 0)
        for (name, stack, spilled, registers, _), bytes_ in zip(found, shared, strict=True)
    }


def check(program, threads, blocks, folder, architectures=("sm_80", "sm_90"), most_spilled=0):
    """No kernel spills more bytes, and so many blocks of threads fit on a multiprocessor at a time."""
    for architecture in architectures:
        for name, (registers, spilled, shared) in compile_for(program, architecture, folder).items():
            assert spilled <= most_spilled, f"{name} on {architecture}: {spilled} bytes spilled"
            assert registers * threads * blocks <= REGISTERS, f"{name} on {architecture}: {registers} registers"
            assert shared * blocks <= SHARED_BYTES, f"{name} on {architecture}: {shared} bytes of shared memory"


@pytest.mark.parametrize("compressor", [Exact(), Int4()], ids=lambda each: type(each).__name__)
def test_attention_of_usual_shapes_fits(compressor, tmp_path):
    """head_dim 128, pages of 64: two blocks of four warps a multiprocessor."""
    each = codec(compressor, page_size=64, group=4, key_dim=128, value_dim=128, dtype=BFLOAT)
    check(attend_program(each), 128, 2, tmp_path, ("sm_90",))


def test_choosing_and_sealing_fit(tmp_path):
    """Four blocks of 256 threads, so that one hides the waiting of another; sealing has three."""
    each = codec(Int4(), page_size=64, key_dim=128, value_dim=128, dtype=BFLOAT)
    check(choose_program(Quest(), each), 256, 4, tmp_path, ("sm_90",))
    check(seal_program(each, Quest()), 256, 3, tmp_path, ("sm_90",))


@pytest.mark.slow
@pytest.mark.parametrize("group", [4, 16])
@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (128, 128), (256, 256), (192, 128)], ids=str)
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("compressor", [Exact(), Int8(), Int4(), Int2()], ids=lambda each: type(each).__name__)
def test_attention_fits(compressor, page_size, dims, group, tmp_path):
    """Every form there is a kernel for; 96 bytes of stack and spills where sums alone take 64 registers or more."""
    for dtype in (BFLOAT, HALF) if compressor == Exact() else (HALF,):
        each = codec(compressor, page_size=page_size, group=group, key_dim=dims[0], value_dim=dims[1], dtype=dtype)
        large = dims[1] * (2 if group > 8 and dims[1] <= 128 else 1) >= 256
        check(attend_program(each), 128, 2, tmp_path, most_spilled=96 if large else 0)
