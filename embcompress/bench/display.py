"""Live progress of a sweep: a bar in a terminal, a line a run elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from embcompress.bench.records import FAILED, IMPOSSIBLE, Record
from embcompress.bench.settings import Run
from embcompress.bench.training import StepObserver


class SweepDisplay:
    """Shows runs done and left, the present epoch and its speed; a context manager."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._done, self._total = 0, 0
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> SweepDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def start(self, total: int, done: int) -> None:
        """Say how many runs there are and how many are finished already."""
        self._total, self._done = total, done
        if self._quiet:
            return
        if done:
            print(f"{done} of {total} runs are finished already", file=sys.stderr)
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

            self._progress = Progress(
                "{task.description}",
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._progress.start()
            self._task = self._progress.add_task("sweep", total=total, completed=done)

    def observer(self, run: Run, learning_rate: float) -> StepObserver | None:
        """What a run's training calls after its steps."""
        if self._progress is None:
            return None
        label = f"{run.method} at {run.budget}, seed {run.seed}, learning rate {learning_rate:g}"

        def observe(epoch: int, share: float, speed: float) -> None:
            text = f"{label}, epoch {epoch} {share:4.0%}, {speed:,.0f} examples/s"
            self._progress.update(self._task, description=text)

        return observe

    def end(self, record: Record) -> None:
        """A run has got its record."""
        self._done += 1
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done)
        if self._quiet:
            return
        label = f"{record['method']} at {record['budget']}, seed {record['seed']}"
        text = f"[{self._done}/{self._total}] {label}: {_outcome(record)}"
        if self._progress is not None:
            self._progress.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _outcome(record: Record) -> str:
    """What became of a run, on one line."""
    status = record.get("status")
    if status == IMPOSSIBLE:
        return f"cannot meet the budget, needs {record['smallest_bytes']:,} bytes"
    if status == FAILED:
        return f"failed: {record['error'].splitlines()[0]}"
    logloss = "diverged" if record["logloss"] is None else f"{record['logloss']:.4f}"
    return (
        f"AUC {record['auc']:.4f}, log-loss {logloss}, {record['bytes']:,} bytes, "
        f"{record['train_seconds']:.1f} s"
    )
