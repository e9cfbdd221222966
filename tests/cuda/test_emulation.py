"""The CUDA kernels and their binding equal the reference, launched by an emulation on the CPU.

The library of ``tests/cuda/emulation`` runs the engine's own tests: generated cases, features in
one call, fused optimizers, hostile input. `make emulate` runs all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from embcompress.engine import lookup, ops
from tests.cuda.emulation import build
from tests.engine.devices import runs_in_kernels
from tests.plan_cases import make_case

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(
        not ops.is_available() or "EMBCOMPRESS_LIBRARY" in os.environ,
        reason="the C++ extension is not built, or another build of it is loaded",
    ),
]

CASES = "tests/engine/test_generated.py::test_generated_cases"
SELECTIONS = {
    "generated cases": [
        *(f"{CASES}[{number}-cpu]" for number in range(0, 600, 100)),
        "tests/engine/test_generated.py::test_sparse_gradients[2000-cpu]",
        "tests/engine/test_generated.py::test_features_in_one_call[0-cpu]",
        "tests/engine/test_generated.py::test_hot_ids_give_the_same_bits_every_time",
        "tests/engine/test_generated.py::test_damaged_codes_read_nothing",
    ],
    "layouts, optimizers, hostile input": [
        "tests/engine/test_layouts.py",
        "tests/engine/test_latents.py",
        "tests/engine/test_hostile.py",
        "tests/engine/test_hostile_encodings.py",
        "tests/engine/test_hashing.py",
        "tests/test_optimizers.py",
    ],
}

#: Of the cases whose bits are compared, those of a GPU's test and as many again.
NUMBERS = range(800)


@pytest.fixture(scope="module")
def library() -> Path:
    return build.build()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_engine_s_own_tests(library: Path, selection: str) -> None:
    command = [
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow",
        *SELECTIONS[selection],
    ]  # fmt: skip
    environment = {**os.environ, "EMBCOMPRESS_LIBRARY": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


REFUSAL = """
import torch
from embcompress.engine import Program
from tests.plan_cases import make_case
cases = map(make_case, range(300))
case = next(c for c in cases if c.plan.head is not None and c.plan.pool == "sum")
program = Program([case.plan])
program([case.stores], case.bags)  # by the reference
assert not program.runs_on(torch.device("cpu"))
program.runs_on = lambda device: True
program([case.stores], case.bags)
"""


def test_a_head_is_refused_and_goes_through_the_reference(library: Path) -> None:
    environment = {**os.environ, "EMBCOMPRESS_LIBRARY": str(library)}
    command = [sys.executable, "-c", REFUSAL]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "the CUDA kernels run no heads" in done.stderr, done.stderr


def values(numbers: range) -> dict[int, Tensor]:
    """Of the generated cases of those numbers that the kernels run from end to end."""
    cases = filter(runs_in_kernels, map(make_case, numbers))
    return {case.number: lookup(case.plan, case.stores, case.bags) for case in cases}


def test_values_are_the_cpu_s_to_the_bit(library: Path, tmp_path: Path) -> None:
    """The same test as on a GPU; and the operators are those of csrc/cuda, not the CPU's."""
    program = (
        "import sys, torch; from tests.cuda.test_emulation import NUMBERS, values;"
        "torch.save(values(NUMBERS), sys.argv[1]);"
        "print(torch._C._dispatch_dump('embcompress::lookup_forward'))"
    )
    environment = {**os.environ, "EMBCOMPRESS_LIBRARY": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(tmp_path / "values.pt")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "csrc/cuda/ops.cpp" in done.stdout
    emulated = torch.load(tmp_path / "values.pt", weights_only=True)
    expected = values(NUMBERS)
    assert emulated.keys() == expected.keys() and len(expected) > 150
    for number, value in expected.items():
        same = (value == emulated[number]) | (value.isnan() & emulated[number].isnan())
        assert bool(same.all()), make_case(number)
