"""Progress of a planner: a line of what it does, now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

_LINE_SECONDS = 2.0
#: Is told what is done at present.
Show = Callable[[str], None]


class PlanProgress:
    """Prints what it is told to standard error, the last of it every two seconds at most.

    Args:
        seconds: the planner's trainings end after so long; None without trainings.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds, self._started, self._last_line = seconds, time.monotonic(), 0.0

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last_line < _LINE_SECONDS:
            return
        self._last_line = now
        after = f"{now - self._started:.0f} s"
        if self._seconds is not None:
            after = f"{now - self._started:.0f} of at most {self._seconds:.0f} s"
        print(f"planning, {after}: {text}", file=sys.stderr, flush=True)


def silent(_: str) -> None:
    """Shows no progress."""
