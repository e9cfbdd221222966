"""Sharded models of two processes under torchrun go the way of one that is not sharded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchrec")
pytest.importorskip("fbgemm_gpu")

ROOT = Path(__file__).parents[2]
TIMEOUT = 400


def launch(folder: Path) -> dict[str, Any]:
    """What both processes saw."""
    file = folder / "results.json"
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
        "--nproc_per_node", "2", "-m", "tests.torchrec.two_processes", str(file),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


def check_every_method_was_seen_in_every_placement(results: dict[str, Any]) -> None:
    seen = {(each["method"], each["placement"]) for each in results["training"]}
    methods = ("hash", "multihash", "qr", "unified", "pq", "low_dim")
    assert {(m, p) for m in methods for p in ("row_wise", "engine")} <= seen
    # FBGEMM's dense kernel cannot hand out single rows on a CPU, which products need.
    assert {(m, "data_parallel") for m in methods if m != "qr"} <= seen
    assert len(results["training"]) % 2 == 0  # both processes


def check_values_gradients_and_weights_are_those_of_one_process(results: dict[str, Any]) -> None:
    for each in results["training"]:
        assert each["values"] < 1e-6, each
        if each["optimizer"] == "sgd":
            assert each["gradients"] < 1e-6, each
        assert each["weights"] < 5e-7, each
        # The weights have moved much further than they are apart.
        assert each["moved"] > 3e-4, each


def check_checkpoints_load_into_another_number_of_processes(results: dict[str, Any]) -> None:
    for each in results["checkpoints"]:
        assert each["from_two_to_one"] < 1e-6 and each["from_one_to_two"] == 0.0, each
        assert each["lifted"] < 1e-6, each


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    """One test, so that there is one launch, however the tests are dealt to workers."""
    results = launch(tmp_path)
    check_every_method_was_seen_in_every_placement(results)
    check_values_gradients_and_weights_are_those_of_one_process(results)
    check_checkpoints_load_into_another_number_of_processes(results)
