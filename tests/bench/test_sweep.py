"""The sweep: its records, that kills lose and repeat nothing, and its report."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from embcompress.bench.records import RecordFile, SweepError, only_writer
from embcompress.bench.report import write_report
from embcompress.bench.settings import SweepSettings, TrainingSettings
from embcompress.bench.summary import Statistic, load_records, summarize
from embcompress.bench.sweep import run_sweep
from embcompress.bench.tables import markdown_results, percent_at_least
from embcompress.budget import parse_budget
from embcompress.cli import main

DATA = "synthetic:rows=1500,ids=300,features=3"
SWEEP = [
    "sweep", "--data", DATA, "--methods", "full,hash,qr", "--budgets", "50%,5%", "--seeds", "0,1",
    "--epochs", "2", "--learning-rates", "0.01,0.03", "--batch-size", "128",
]  # fmt: skip
#: Its processes have everything imported, and take no seconds to begin.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["embcompress.commands", "embcompress.bench.sweep"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sweep; it, and others before it that finished too soon, were killed ten times."""
    directory, chance = tmp_path_factory.mktemp("sweep"), random.Random(0)
    kills, number = 0, 0
    while kills < 10:
        number += 1
        kills += _kill_on_its_way(directory, f"out_{number}", 10 - kills, chance)
    return directory / f"out_{number}"


def _run_in_process(arguments: list[str], stderr: Connection) -> None:
    sys.argv = ["embcompress", *arguments]
    os.dup2(stderr.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main()


def _kill_on_its_way(directory: Path, out: str, most: int, chance: random.Random) -> int:
    """Start a sweep, kill it at random moments and let it finish; returns how often it was."""
    arguments = [*SWEEP, "--out", str(directory / out), "--cache", str(directory / "cache")]
    results, kills = directory / out / "results.jsonl", 0
    kept: list[str] = []

    def check() -> None:  # no finished run is lost or written again
        nonlocal kept
        lines = results.read_text().split("\n")[:-1] if results.exists() else []
        assert lines[: len(kept)] == kept
        kept = lines

    while kills < most:
        reader, writer = FORKSERVER.Pipe(duplex=False)
        process = FORKSERVER.Process(target=_run_in_process, args=(arguments, writer))
        process.start()
        writer.close()
        assert os.read(reader.fileno(), 1)  # it has begun to work
        process.join(chance.uniform(0.0, 0.25))
        is_done = process.exitcode is not None
        process.kill()
        process.join()
        reader.close()
        if is_done:
            break
        kills += 1
        check()
    command = [sys.executable, "-m", "embcompress.cli", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    check()
    return kills


def test_no_run_is_lost_or_repeated(finished: Path) -> None:
    records = load_records(finished)
    keys = [record["key"] for record in records]
    assert len(set(keys)) == len(keys)
    settings = SweepSettings(
        (DATA,), ("full", "hash", "qr"), ("50%", "5%"), (0, 1),
        TrainingSettings(epochs=2, learning_rates=(0.01, 0.03), batch_size=128),
    )  # fmt: skip
    assert set(keys) == {run.key for run in settings.runs()}


def test_records_keep_the_contract(finished: Path) -> None:
    for line in (finished / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["bytes"] <= record["dense_bytes"]
        if record["method"] != "full":
            share = float(record["budget"].rstrip("%")) / 100
            assert record["bytes"] <= share * record["dense_bytes"]
        assert 0 < record["auc"] < 1 and record["logloss"] > 0
        assert record["train_seconds"] > 0 and record["examples_per_second"] > 0
        assert 1 <= record["best_epoch"] <= record["epochs"] == len(record["validation"])
        best = max(score["auc"] for score in record["validation"])
        assert record["validation"][record["best_epoch"] - 1]["auc"] == best
        assert set(record["single_epoch"]) == {"auc", "logloss"}
        for name in ("seed", "data", "model", "date", "versions", "hardware", "settings"):
            assert name in record


def test_every_run_tries_all_learning_rates_and_keeps_the_best(finished: Path) -> None:
    for record in load_records(finished):
        if "auc" not in record:
            continue
        trials = record["learning_rate_trials"]
        assert [trial["learning_rate"] for trial in trials] == [0.01, 0.03]
        assert record["learning_rate"] == max(trials, key=lambda t: t["auc"])["learning_rate"]


def test_impossible_budgets_are_kept_apart_and_shown(finished: Path) -> None:
    impossible = [r for r in load_records(finished) if r.get("status") == "impossible"]
    assert {(r["method"], r["budget"]) for r in impossible} == {("qr", "5%")}
    (summary,) = summarize(load_records(finished))
    smallest = impossible[0]["smallest_bytes"]
    needed = percent_at_least(smallest, summary.dense_bytes)
    assert smallest <= parse_budget(f"{needed}%", summary.dense_bytes) < 1.2 * smallest
    assert f"needs {needed}%" in markdown_results(summary)


def test_a_run_is_the_same_again(finished: Path, tmp_path: Path) -> None:
    settings = SweepSettings(
        (DATA,), ("hash",), ("50%",), (0,),
        TrainingSettings(epochs=2, learning_rates=(0.01, 0.03), batch_size=128),
    )  # fmt: skip
    sweep = run_sweep(settings, tmp_path, cache=finished.parent / "cache", quiet=True)
    (again,) = sweep.records.results
    first = RecordFile(finished / "results.jsonl").records[again["key"]]
    assert (again["auc"], again["logloss"]) == (first["auc"], first["logloss"])


def test_the_report_is_written(finished: Path) -> None:
    (summary,) = write_report(finished, "embcompress sweep …")
    page = (finished / "report.html").read_text()
    assert "embcompress sweep …" in page and page.count("data:image/png") == 2
    assert all(
        (finished / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("auc", "logloss")
    )
    table = markdown_results(summary)
    assert table.count("**") == 2 * len(summary.budgets)
    assert "full (100%)" in table and "±" in table
    with pytest.raises(FileNotFoundError, match="no results"):
        write_report(finished.parent)


def test_a_torn_last_line_is_cut_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b"}\n{"key": "c", "au')
    file = RecordFile(path)
    assert list(file.records) == ["a", "b"]
    file.append({"key": "c"})
    assert path.read_text() == '{"key": "a"}\n{"key": "b"}\n{"key": "c"}\n'
    with pytest.raises(ValueError, match="already"):
        file.append({"key": "a"})
    path.write_text('{"key": "a"}\nnonsense\n{"key": "b"}\n')
    with pytest.raises(ValueError, match=r"results\.jsonl:2 is not a record"):
        RecordFile(path)


def test_two_sweeps_do_not_write_to_one_directory(tmp_path: Path) -> None:
    with (
        only_writer(tmp_path),
        pytest.raises(SweepError, match="another sweep"),
        only_writer(tmp_path),
    ):
        raise AssertionError


def test_statistics() -> None:
    assert Statistic.of([0.5, 0.7]).text(2) == "0.60 ± 0.14"
    assert Statistic.of([0.5]).text() == "0.5000"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "--data", "nonsense"], "accepted data"),
        (["sweep", "--data", DATA, "--methods", "magic"], "unknown method 'magic'"),
        (["sweep", "--data", DATA, "--seeds", "one"], "--seeds must be numbers"),
        (["sweep", "--data", DATA, "--model", "gpt"], "unknown model"),
        (["report", "/no/such/sweep"], "no results of a sweep"),
        (["plan", "--rows", "1000", "--width", "8", "--method", "qr", "--budget", "9"], "smallest"),
        (
            ["plan", "--rows", "1000", "--width", "8", "--method", "qr", "--budget", "x"],
            "understood",
        ),
    ],
)
def test_errors_of_use_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["embcompress", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    error = capfd.readouterr().err
    assert end.value.code == 2 and message in error
    assert error.startswith("error: ") and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["methods"], "low_dim"),
        (
            ["plan", "--rows", "1000000", "--width", "16", "--method", "hash", "--budget", "1%"],
            "hash_",
        ),
        (["prepare", "--data", DATA, "--cache", "cache"], "1,500 rows"),
    ],
)
def test_small_commands(
    arguments: list[str],
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["embcompress", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0 and printed in capfd.readouterr().out
