"""Progress of a long pass over data: a bar in a terminal with rich, else a line now and then."""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from types import TracebackType
from typing import Any

_LINE_SECONDS = 5.0


class RowProgress:
    """Counts work done and shows it with rows a second; a context manager.

    Args:
        title: what is being done.
        total: amount of work, in the unit of :meth:`advance`'s ``work``, or None where it is not
            known.
        visible: False shows nothing.
    """

    def __init__(self, title: str, total: float | None, *, visible: bool = True) -> None:
        self.title, self.total = title, None if total is None else max(total, 1e-9)
        self.rows, self.done = 0, 0.0
        self._visible = visible
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> RowProgress:
        if self._visible and sys.stderr.isatty() and find_spec("rich") is not None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f}% {task.fields[speed]}")
                if self.total is not None
                else TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, speed="")
        return self

    def advance(self, work: float, rows: int = 0) -> None:
        """Note ``work`` done, ``rows`` rows of it."""
        self.done += work
        self.rows += rows
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, speed=self._speed(now))
        elif self._visible and now - self._last_line >= _LINE_SECONDS:
            self._line(now)

    def _speed(self, now: float) -> str:
        return f"{self.rows / max(now - self._started, 1e-9):,.0f} rows/s"

    def _line(self, now: float) -> None:
        self._last_line = now
        share = "" if self.total is None else f"{min(1.0, self.done / self.total):.0%}, "
        text = f"{self.title}: {share}{self.rows:,} rows, {self._speed(now)}"
        print(text, file=sys.stderr, flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._visible and kind is None:
            self._line(time.monotonic())
