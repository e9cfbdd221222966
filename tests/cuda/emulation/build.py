"""Builds the CUDA backend for the CPU: its kernels as they are, its launches emulated.

    python -m tests.cuda.emulation.build    # prints the path of the library

The library registers the CUDA operators for CPU tensors, so that ``EMBCOMPRESS_LIBRARY=PATH`` runs
every test of the engine through them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
#: CUB is not to be had here: emulation.cpp sorts instead of sort.cu.
SOURCES = [
    *sorted((ROOT / "csrc/cuda").glob("*.cu")),
    ROOT / "csrc/cuda/ops.cpp",
    ROOT / "csrc/library.cpp",
    HERE / "emulation.cpp",
]
SOURCES = [path for path in SOURCES if path.name != "sort.cu"]
STABLE_ABI = "0x020a000000000000"


def compiler() -> str | None:
    """A C++ compiler, or None."""
    return next((c for c in (os.environ.get("CXX"), "g++", "c++") if c and shutil.which(c)), None)


def _flags() -> list[str]:
    includes = [*include_paths(), sysconfig.get_paths()["include"], str(HERE)]
    return [
        "-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden",
        "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-DEMBCOMPRESS_EMULATION",
        f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DPy_LIMITED_API=0x030a0000",
        *(f"-I{path}" for path in includes),
    ]  # fmt: skip


def _fingerprint(flags: list[str]) -> str:
    """Of everything that the library is made of."""
    files = [p for d in (ROOT / "csrc", HERE) for p in d.rglob("*") if p.suffix != ".pyc"]
    digest = hashlib.sha256("\0".join([torch.__version__, *flags]).encode())
    for path in sorted(p for p in files if p.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


def build(folder: Path = ROOT / "build" / "emulation") -> Path:
    """The library, compiled if its sources have changed.

    Raises:
        RuntimeError: what the compiler says.
    """
    flags = _flags()
    library = folder / f"embcompress_emulated_{_fingerprint(flags)}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    cxx = compiler()
    assert cxx is not None
    # Several test processes may build at once: each in files of its own, renamed when whole.
    unique = f"{library.stem}.{os.getpid()}"
    objects = [folder / f"{unique}.{path.name}.o" for path in SOURCES]
    commands = [
        [cxx, *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        for source, target in zip(SOURCES, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    partial = folder / f"{unique}.so"
    libraries = Path(torch.__file__).parent / "lib"
    link = [cxx, "-shared", "-o", str(partial), *map(str, objects), f"-L{libraries}"]
    _run([*link, "-ltorch", "-ltorch_cpu", "-lc10"])
    partial.rename(library)
    for path in objects:
        path.unlink()
    return library


if __name__ == "__main__":
    print(build())
