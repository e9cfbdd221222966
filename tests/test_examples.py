"""The examples run, on little data."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.criteo_file import write_criteo

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: str) -> str:
    """What an example prints."""
    command = [sys.executable, f"examples/{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_swap() -> None:
    assert "total" in run("swap.py")


@pytest.mark.parametrize("method", ["pq", "int4"])
def test_post_training(method: str) -> None:
    printed = run("post_training.py", "--data", "synthetic:rows=4000,ids=500", "--methods", method)
    assert f"{method:8}" in printed and "after one more epoch" in printed


@pytest.mark.parametrize(
    ("method", "phases"), [("qr", ["train"]), ("autodim", ["search", "retrain"])]
)
def test_dlrm_criteo(tmp_path: Path, method: str, phases: list[str]) -> None:
    """Also by a method that searches, which takes a loop of several phases."""
    data = write_criteo(tmp_path / "day.txt", 2000)
    options = ("--cache", str(tmp_path), "--epochs", "1", "--budget", "50%", "--method", method)
    printed = run("dlrm_criteo.py", "--data", str(data), *options)
    assert "bytes of the tables" in printed and "test: AUC" in printed
    assert re.findall(r"^(\w+): epoch 1", printed, re.M) == phases


def test_prune_vocabulary() -> None:
    printed = run("prune_vocabulary.py")
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step")]
    assert len(losses) == 4 and losses[-1] < losses[0] - 1
    assert "restored to 50000 tokens, the trained ones exactly: True" in printed


def test_torchrec_dlrm(tmp_path: Path) -> None:
    """A checkpoint goes on where it was."""
    pytest.importorskip("torchrec")
    state = str(tmp_path / "state")
    options = ("--data", "synthetic:rows=6000,ids=500", "--epochs", "1")
    trained = run("torchrec_dlrm.py", *options, "--save", state)
    (tested,) = [line for line in trained.splitlines() if line.startswith("test: AUC")]
    loaded = run("torchrec_dlrm.py", *options, "--load", state)
    assert f"loaded {state}: {tested.removeprefix('test: ')}" in loaded
