"""Live progress of a sweep: a bar in a terminal, a line a run elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from embcompress.bench.records import Record
from embcompress.bench.settings import Run
from embcompress.bench.training import StepObserver


class SweepDisplay:
    """Shows runs done and left, the present epoch and its speed; a context manager."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._done, self._total = 0, 0
        self._progress: Any = None
        self._task: Any = None
        self._label = ""

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

    def begin(self, run: Run) -> None:
        """A run begins."""
        self._label = f"{run.method} at {run.budget}, seed {run.seed}"
        self._describe(self._label)

    def _describe(self, text: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, description=text)

    def observer(self, learning_rate: float) -> StepObserver:
        """What a training calls after its steps."""

        def observe(epoch: int, share: float, speed: float) -> None:
            self._describe(
                f"{self._label}, learning rate {learning_rate:g}, epoch {epoch} {share:4.0%}, "
                f"{speed:,.0f} examples/s"
            )

        return observe

    def end(self, run: Run, record: Record | None) -> None:
        """A run is finished (None: its budget is impossible)."""
        self._done += 1
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done)
        if self._quiet:
            return
        outcome = (
            "cannot meet the budget"
            if record is None
            else f"AUC {record['auc']:.4f}, log-loss {record['logloss']:.4f}, "
            f"{record['bytes']:,} bytes, {record['train_seconds']:.1f} s"
        )
        text = f"[{self._done}/{self._total}] {self._label}: {outcome}"
        if self._progress is not None:
            self._progress.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)
