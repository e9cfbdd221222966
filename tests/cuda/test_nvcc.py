"""Every CUDA file compiles for every architecture, without warnings, and keeps to registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from tests.cuda.emulation import build

ROOT = Path(__file__).parents[2]
HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
NVCC = shutil.which("nvcc") or shutil.which(f"{HOME}/bin/nvcc")
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler=-Wall,-Wextra", "-Werror=all-warnings"]
OURS = sorted(path.name for path in (ROOT / "csrc/cuda").glob("*.cu") if path.name != "sort.cu")
#: What a kernel may hold: two blocks of 256 threads at once on a multiprocessor's 65,536 registers.
MOST_REGISTERS = 128
KERNELS = {
    "forward.cu": ["pool_kernel"] * 2,
    "plain.cu": ["plain_kernel"] * 7,
    "touches.cu": ["touch_kernel", "dot_kernel"],
    "reduce.cu": ["reduce_kernel"] * 2,
    "segments.cu": [
        "bounds_kernel",
        "copy_kernel",
        "heads_kernel",
        "segments_kernel",
        "update_kernel",
    ],
    "device.cu": ["upload_kernel"],
}

needs_nvcc = pytest.mark.skipif(
    NVCC is None or build.compiler() is None, reason="no nvcc, or no C++ compiler for it"
)


def compile_file(name: str, architecture: int, folder: Path, *flags: str) -> str:
    """What the compiler says; an error or a warning is a failure."""
    assert NVCC is not None
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [
        NVCC, *FLAGS, *flags, "-gencode", code, "-c", str(ROOT / "csrc/cuda" / name),
        "-o", str(folder / "file.o"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_nvcc
@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OURS)
def test_kernels_keep_to_registers(name: str, architecture: int, tmp_path: Path) -> None:
    report = compile_file(name, architecture, tmp_path, "-Xptxas=-v,-warn-spills,-warn-lmem-usage")
    assert "warning" not in report, report
    entries = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        flags=re.DOTALL,
    )
    found = sorted(re.findall(r"\d+([a-z]+_kernel)", entry[0])[-1] for entry in entries)
    assert found == sorted(KERNELS[name]), report
    for kernel, *numbers in entries:
        stack, stores, loads, registers = map(int, numbers)
        assert stack == stores == loads == 0, f"{kernel} spills: {report}"
        assert registers <= MOST_REGISTERS, f"{kernel} takes {registers} registers"


@needs_nvcc
@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_sorting_compiles(architecture: int, tmp_path: Path) -> None:
    """CUB's kernels are its own affair."""
    assert "warning" not in compile_file("sort.cu", architecture, tmp_path)


@needs_nvcc
@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_the_binding_compiles_for_cuda() -> None:
    """Against torch's stable ABI and the toolkit's headers; linking takes a CUDA build of torch."""
    runtime = Path(str(NVCC)).resolve().parent
    candidates = [Path(HOME) / "include", runtime.parent / "include"]
    include = next((path for path in candidates if (path / "cuda_runtime.h").exists()), None)
    if include is None:
        pytest.skip("no cuda_runtime.h beside nvcc")
    includes = [*include_paths(), sysconfig.get_paths()["include"], str(include)]
    command = [
        str(build.compiler()), "-std=c++17", "-fsyntax-only", "-Wall", "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={build.STABLE_ABI}", *(f"-isystem{path}" for path in includes),
        str(ROOT / "csrc/cuda/ops.cpp"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
