"""The kernels' vectors: processors hold 4, 8 or 16 floats in a register, and no bit depends on it.

One machine runs one of the widths. Compiled for it, all of them run, if slowly.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cuda.emulation.build import compiler

HERE = Path(__file__).parent


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["vector_widths", "address_widths"])
def test_vectors_of_any_width_give_the_same_bits(name: str, tmp_path: Path) -> None:
    program = tmp_path / name
    command = [compiler(), "-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wno-psabi"]
    command += ["-DEMBCOMPRESS_PORTABLE", str(HERE / f"{name}.cpp")]
    subprocess.run([*command, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.stdout == "0 comparisons differ\n"
