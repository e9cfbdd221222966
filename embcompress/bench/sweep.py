"""The memory-budget sweep: which method loses least at which budget."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path

from embcompress.bench.display import SweepDisplay
from embcompress.bench.environment import torch_threads
from embcompress.bench.execution import Executor, split_of
from embcompress.bench.records import Record, RecordDirectory, only_writer
from embcompress.bench.settings import Run, SweepSettings
from embcompress.bench.workers import Task, WorkerSettings, execute_in_processes
from embcompress.data.load import load_click_log


class Sweep:
    """Runs what is missing of a sweep and keeps its records in a directory."""

    def __init__(self, settings: SweepSettings, directory: Path, cache: Path | None) -> None:
        self.settings, self.directory, self.cache = settings, directory, cache
        self.records = RecordDirectory(directory)

    def run(self, display: SweepDisplay) -> None:
        """Do every missing run."""
        runs = list(self.settings.runs())
        display.start(len(runs), sum(map(self.records.is_done, runs)))
        tasks = [task for task in self.tasks() if task.runs]
        with closing(self._executed(tasks, display)) as records:
            for record in records:
                self.records.append(record)
                display.end(record)

    def tasks(self) -> Iterator[Task]:
        """What is left to do of every cell."""
        cells: dict[tuple[str, str, str], list[Run]] = {}
        for run in self.settings.runs():
            cells.setdefault(run.cell, []).append(run)
        for runs in cells.values():
            yield Task(tuple(run for run in runs if not self.records.is_done(run)))

    def _executed(self, tasks: list[Task], display: SweepDisplay) -> Generator[Record, None, None]:
        settings = self.settings
        for run in {task.runs[0].data: task.runs[0] for task in tasks}.values():
            # Prepared before anything is trained, and split: neither is a method's fault.
            split_of(run, load_click_log(run.data, cache=self.cache))
        if settings.workers > 1:
            details = WorkerSettings(self.cache, settings.threads, settings.plan_seconds)
            yield from execute_in_processes(tasks, details, settings.workers)
            return
        executor = Executor(self.cache, settings.plan_seconds)
        for task in tasks:
            yield from task.execute(executor, display.observer)

    @property
    def failed(self) -> list[Record]:
        """What failed of the runs that were asked for."""
        asked = {run.key for run in self.settings.runs()}
        return [record for record in self.records.failed if record["key"] in asked]


def run_sweep(
    settings: SweepSettings, directory: Path, *, cache: Path | None = None, quiet: bool = False
) -> Sweep:
    """Run a sweep, or what is missing of it.

    Args:
        settings: what to run.
        directory: where the records are; finished runs there are skipped.
        cache: prepared click logs (see :func:`embcompress.data.load_click_log`).
        quiet: show no progress.

    Returns:
        The sweep; look at its ``failed``.
    """
    with only_writer(directory), torch_threads(settings.threads):
        sweep = Sweep(settings, directory, cache)
        with SweepDisplay(quiet=quiet) as display:
            sweep.run(display)
    return sweep
