"""Ctrl-C that does not cut an update in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embcompress.statistics.profiles import Profile


class ProfileInterrupted(KeyboardInterrupt):
    """Ctrl-C in :func:`embcompress.profile`; what was counted until then is in ``profile``."""

    def __init__(self, profile: Profile) -> None:
        super().__init__(f"interrupted after {profile.rows:,} rows")
        self.profile = profile


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Hold back Ctrl-C until the end of the block."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield  # not Python's to hold back, or never delivered to this thread
        return
    received: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received and callable(before):
            before(*received[-1])
