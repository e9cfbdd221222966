"""A sweep that nobody watches: what fails is recorded, ends nothing, and is tried again."""

from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import embcompress as ec
from embcompress.bench.execution import Executor
from embcompress.bench.records import RecordDirectory
from embcompress.bench.report import write_report
from embcompress.bench.settings import Run, SweepSettings, TrainingSettings
from embcompress.bench.summary import load_records, summarize
from embcompress.bench.sweep import run_sweep
from embcompress.bench.tables import failure_table, table_rows
from embcompress.bench.workers import Task, WorkerSettings, execute_in_processes
from embcompress.commands import app
from embcompress.methods import _REGISTRY, register
from embcompress.methods.hash import Hashing

DATA = "synthetic:rows=1500,ids=300,features=3"
TRAINING = TrainingSettings(epochs=2, batch_size=128, learning_rates=(0.03,))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def broken() -> Iterator[dict[str, bool]]:
    """A registered method that fails while ``broken["now"]``."""
    state = {"now": True}

    @dataclass(frozen=True)
    class Broken(Hashing):
        """Hashing that fails."""

        name: ClassVar[str] = "broken"

        def fill(
            self, table: ec.TableSpec, plan: ec.LookupPlan, stores: Mapping[str, Tensor]
        ) -> None:
            if state["now"]:
                raise RuntimeError("the codes are\nno good")

    register(Broken)
    yield state
    del _REGISTRY["broken"]


def test_a_failed_run_ends_nothing_and_is_tried_again(
    cache: Path, tmp_path: Path, broken: dict[str, bool]
) -> None:
    settings = SweepSettings((DATA,), ("broken", "full", "hash"), ("20%",), (0, 1), TRAINING)
    sweep = run_sweep(settings, tmp_path, cache=cache, quiet=True)
    assert [(r["method"], r["seed"]) for r in sweep.failed] == [("broken", 0), ("broken", 1)]
    assert sweep.failed[0]["error"] == "RuntimeError: the codes are\nno good"
    assert "in fill" in sweep.failed[0]["traceback"]
    assert {r["method"] for r in sweep.records.results} == {"full", "hash"}
    (summary,) = summarize(load_records(tmp_path))
    assert ("failed", False) in table_rows(summary)[1][-1]
    write_report(tmp_path)
    assert "RuntimeError: the codes are" in (tmp_path / "report.html").read_text()

    finished = (tmp_path / "results.jsonl").read_text()
    broken["now"] = False
    assert not run_sweep(settings, tmp_path, cache=cache, quiet=True).failed
    assert (tmp_path / "results.jsonl").read_text().startswith(finished)
    records = load_records(tmp_path)
    assert len(records) == 6 and not failure_table(records)[1]


def test_the_exit_code_says_that_runs_failed(
    cache: Path, tmp_path: Path, broken: dict[str, bool]
) -> None:
    command = [
        "sweep", "--data", DATA, "--methods", "broken,hash", "--budgets", "20%", "--epochs", "1",
        "--learning-rates", "0.03", "--out", str(tmp_path / "out"), "--cache", str(cache),
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "failed: broken at 20%, seed 0" in result.stderr
    assert "1 runs failed; the same command tries them again" in result.stderr
    broken["now"] = False
    assert CliRunner().invoke(app, command).exit_code == 0


def test_data_that_cannot_be_split_is_no_failure_of_a_method(cache: Path, tmp_path: Path) -> None:
    command = ["sweep", "--data", DATA, "--methods", "hash", "--split", "day",
               "--out", str(tmp_path / "out"), "--cache", str(cache)]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "has no times: split it by 'time'" in result.stderr
    assert not (tmp_path / "out" / "failed.jsonl").exists()


def test_a_sweep_of_failures_alone_has_a_report(
    cache: Path, tmp_path: Path, broken: dict[str, bool]
) -> None:
    settings = SweepSettings((DATA,), ("broken",), ("20%",), (0,), TRAINING)
    run_sweep(settings, tmp_path, cache=cache, quiet=True)
    assert write_report(tmp_path) == []
    assert "the codes are" in (tmp_path / "report.html").read_text()


def test_a_training_that_diverges_is_a_failure_unless_another_rate_does_not(cache: Path) -> None:
    """Steps of 1e38 make every number infinite."""
    run = Run(DATA, "hash", "20%", 0, replace(TRAINING, learning_rates=(1e38, 0.03)))
    executor = Executor(cache, plan_seconds=1)
    record = executor.execute(run)
    assert record["learning_rate"] == 0.03 and record["auc"] > 0.5
    assert [trial["auc"] > 0 for trial in record["learning_rate_trials"]] == [False, True]
    failed = executor.execute(replace(run, training=replace(TRAINING, learning_rates=(1e38,))))
    assert failed["status"] == "failed"
    assert failed["error"] == "DivergedError: training diverged at every learning rate: (1e+38,)"


def test_records_of_failures_take_each_others_place(tmp_path: Path) -> None:
    directory = RecordDirectory(tmp_path)
    for error in ("first", "second"):
        directory.append({"key": "a", "status": "failed", "error": error})
    assert [record["error"] for record in RecordDirectory(tmp_path).failed] == ["second"]
    directory.append({"key": "a", "auc": 0.7})
    assert directory.failed == [] and len(directory.all()) == 1


def test_processes_find_what_one_finds(cache: Path, tmp_path: Path) -> None:
    training = replace(TRAINING, learning_rates=(0.01, 0.03))
    settings = SweepSettings((DATA,), ("hash", "qr"), ("20%", "5%"), (0, 1, 2), training)
    found = []
    for workers in (1, 2):
        directory = tmp_path / str(workers)
        run_sweep(replace(settings, workers=workers), directory, cache=cache, quiet=True)
        found.append({record["key"]: record for record in load_records(directory)})
    one, two = found
    assert one.keys() == two.keys() == {run.key for run in settings.runs()}
    for key, record in one.items():
        for name in ("auc", "logloss", "learning_rate", "bytes", "smallest_bytes"):
            assert record.get(name) == two[key].get(name)


def test_a_killed_process_costs_the_run_that_it_was_at(cache: Path) -> None:
    training = replace(TRAINING, epochs=6)
    runs = tuple(Run(DATA, "hash", "20%", seed, training) for seed in range(4))
    settings = WorkerSettings(cache, threads=torch.get_num_threads(), plan_seconds=1)
    records = execute_in_processes([Task(runs)], settings, 1)
    found = [next(records)]
    (process,) = multiprocessing.active_children()
    process.kill()
    found += records
    assert [json.loads(record["key"])["seed"] for record in found] == [0, 1, 2, 3]
    failed = [record for record in found if "error" in record]
    assert [record["error"] for record in failed] == [
        "the process was ended by SIGKILL; was there too little memory?"
    ]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_processes_end_with_the_sweep(cache: Path, tmp_path: Path, name: str) -> None:
    """They hold the sweep's output open, so it ends when the last of them does."""
    if not hasattr(signal, name):
        pytest.skip(f"no {name} on this system")
    data = "synthetic:rows=200000,ids=300,features=3"  # a run that takes minutes
    command = [
        "sweep", "--data", data, "--methods", "qr,hash", "--budgets", "2%", "--workers", "2",
        "--learning-rates", "0.03", "--out", str(tmp_path), "--cache", str(cache),
    ]  # fmt: skip
    sweep = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from embcompress.cli import main; main()",
            *command,
            "--batch-size",
            "8",
            "--epochs",
            "100",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    impossible = tmp_path / "impossible.jsonl"
    while not (impossible.exists() and impossible.read_text()):  # one is done, the other trains
        assert sweep.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    sweep.send_signal(getattr(signal, name))
    sweep.communicate(timeout=20)
    assert not (tmp_path / "results.jsonl").exists()
    training = replace(TrainingSettings(learning_rates=(0.03,)), batch_size=8, epochs=100)
    settings = SweepSettings((data,), ("qr",), ("2%",), (0,), training)
    again = run_sweep(settings, tmp_path, cache=cache, quiet=True)
    assert not again.failed and len(again.records.impossible.records) == 1
