"""Records and what is averaged over them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from embcompress.bench.environment import environment, torch_threads
from embcompress.bench.records import Record, RecordFile
from embcompress.bench.report import _OPTIONS, _environment_lines, sweep_command
from embcompress.bench.settings import FULL_BUDGET, Run, SweepSettings, TrainingSettings
from embcompress.bench.summary import Statistic, summarize
from embcompress.bench.tables import percent_at_least, table_rows
from embcompress.budget import parse_budget

TRAINING = TrainingSettings()


def record(
    method: str, budget: str, seed: int, auc: float, training: TrainingSettings = TRAINING
) -> Record:
    dense = 10_000
    return {
        "key": Run("synthetic", method, budget, seed, training).key,
        "data": "synthetic", "method": method, "budget": budget, "seed": seed,
        "bytes": parse_budget(budget, dense), "dense_bytes": dense,
        "auc": auc, "logloss": 1 - auc, "single_epoch": {"auc": auc - 0.01, "logloss": 0.5},
        "examples_per_second": 1.0,
    }  # fmt: skip


def test_runs_of_other_settings_are_not_averaged() -> None:
    short = TrainingSettings(epochs=1)
    records = [record("hash", "10%", 0, 0.7), record("hash", "10%", 0, 0.5, short)]
    summaries = summarize(records)
    assert [s.find("hash", "10%").auc.mean for s in summaries] == [0.7, 0.5]  # type: ignore[union-attr]
    assert [s.title for s in summaries] == ["synthetic, epochs 8", "synthetic, epochs 1"]
    assert summarize(records[:1])[0].title == "synthetic"


def test_seeds_are_averaged_and_budgets_come_in_order() -> None:
    records = [record("hash", budget, seed, 0.6 + seed / 10) for budget in ("1%", "50%", "10%")
               for seed in (0, 2)]  # fmt: skip
    (summary,) = summarize(records)
    assert summary.budgets == ["50%", "10%", "1%"]
    cell = summary.find("hash", "1%")
    assert cell is not None and cell.auc is not None
    assert cell.auc.mean == pytest.approx(0.7) and cell.auc.count == 2


def test_best_is_the_highest_auc_and_the_lowest_log_loss() -> None:
    records = [record("full", FULL_BUDGET, 0, 0.9), record("hash", "10%", 0, 0.6),
               record("qr", "10%", 0, 0.7)]  # fmt: skip
    (summary,) = summarize(records)
    assert summary.best("10%", "auc") == summary.best("10%", "logloss") == "qr"
    bold = {row[0][0] for row in table_rows(summary, "logloss")[1] if row[1][1]}
    assert bold == {"qr"}


def test_a_diverged_run_is_said_so() -> None:
    diverged = {**record("hash", "10%", 0, 0.0), "logloss": None}
    (summary,) = summarize([diverged, record("hash", "10%", 1, 0.6)])
    assert table_rows(summary, "logloss")[1][0][1][0] == "diverged"
    assert math.isinf(Statistic.of([0.5, None]).mean)


@pytest.mark.parametrize("smallest", [1, 9, 653, 738, 9_999, 10_000])
def test_a_budget_written_as_it_is_shown_can_be_met(smallest: int) -> None:
    text = percent_at_least(smallest, 10_000)
    assert smallest <= parse_budget(f"{text}%", 10_000) <= 1.1 * smallest + 1
    assert percent_at_least(14_956, 229_056) == "6.6"
    assert percent_at_least(1, 10**9) == "0.0000001"


def test_the_command_is_read_off_the_records() -> None:
    training = TrainingSettings(epochs=3, learning_rates=(0.1, 0.2))
    records = [record("full", FULL_BUDGET, seed, 0.8, training) for seed in (1, 0)]
    records.append(record("qr", "50%", 0, 0.7, training))
    assert sweep_command(records, Path("out")) == (
        "embcompress sweep --data synthetic --methods full,qr --budgets 50% --seeds 0,1 "
        "--epochs 3 --learning-rates 0.1,0.2 --out out"
    )


def test_reading_leaves_a_line_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    text = '{"key": "a"}\n{"key": "b", "au'
    path.write_text(text)
    reader = RecordFile(path, read_only=True)
    assert list(reader.records) == ["a"] and path.read_text() == text
    with pytest.raises(ValueError, match="opened for reading"):
        reader.append({"key": "c"})


def test_a_full_disk_leaves_no_piece_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, write = RecordFile(tmp_path / "results.jsonl"), os.write
    file.append({"key": "a"})
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(OSError, match="took 5 of 13 bytes"):
        file.append({"key": "b"})
    monkeypatch.undo()
    assert "b" not in file
    file.append({"key": "b"})
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a", "b"]


def test_numbers_that_json_lacks_are_refused(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "results.jsonl")
    with pytest.raises(ValueError, match="JSON compliant"):
        file.append({"key": "a", "logloss": math.inf})
    assert not file.path.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": ("10%", "tiny")}, "'tiny' is not understood"),
        ({"budgets": ("0%",)}, "must be positive"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"seeds": (0, 0)}, "seeds must be distinct"),
        ({"methods": ()}, "methods must be distinct and not empty"),
    ],
)
def test_a_sweep_is_refused_before_anything_is_trained(
    options: dict[str, Any], message: str
) -> None:
    good: dict[str, Any] = {"data": ("synthetic",), "methods": ("hash",), "budgets": ("10%",)}
    with pytest.raises(ValueError, match=message):
        SweepSettings(**{**good, **options})
    with pytest.raises(ValueError, match="split must be"):
        TrainingSettings(split="odd")


def test_threads_are_as_before_afterwards() -> None:
    before = environment()["hardware"]["threads"]
    with torch_threads(before + 1):
        assert environment()["hardware"]["threads"] == before + 1
    assert environment()["hardware"]["threads"] == before


def test_a_report_names_every_machine() -> None:
    one = {
        "hardware": {"processor": "A", "threads": 1, "cores": 2},
        "versions": {"torch": "2.13.0"},
        "engine": "compiled",
        "date": "2026-01-02",
    }
    other = {**one, "hardware": {**one["hardware"], "processor": "B"}, "date": "2026-01-03"}
    assert _environment_lines([one, other, {**one, "date": "2026-01-01"}]) == [
        "2 runs on A, 1 threads of 2 cores; compiled engine; torch 2.13.0; last run 2026-01-02",
        "1 run on B, 1 threads of 2 cores; compiled engine; torch 2.13.0; last run 2026-01-03",
    ]


def test_the_command_of_a_report_names_every_setting_that_can_be_given() -> None:
    """All but the two that have no option."""
    settings = {field.name for field in fields(TrainingSettings)}
    assert set(_OPTIONS) == settings - {"patience", "table_std"}
