"""A profile in a file that goes on where it was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from embcompress.data.load import load_click_log
from embcompress.statistics.interrupts import ProfileInterrupted
from embcompress.statistics.profiles import Profile
from embcompress.statistics.run import profile


def profile_to_file(
    data: str,
    out: Path,
    *,
    split: Literal["all", "time", "random"] = "all",
    seed: int = 0,
    cache: Path | None = None,
    progress: bool = True,
) -> Profile:
    """Profile a click log into a file; an interrupted profile of the same rows is gone on with.

    Args:
        data: spec of the log.
        out: the file; one that is complete is written anew.
        split: ``"all"`` rows, or the training rows of :meth:`ClickLog.split`.
        seed: of the split.
        cache: of prepared click logs.
        progress: whether to show it.

    Raises:
        ProfileInterrupted: what was counted until then is in the file.
        ValueError: the split is unknown, or the file is of other data and unfinished.
    """
    if split not in ("all", "time", "random"):
        raise ValueError(f"split must be 'all', 'time' or 'random', got {split!r}")
    source = data if split == "all" else f"{data}, training rows, {split} split, seed {seed}"
    log = load_click_log(data, cache=cache, progress=progress)
    rows: range | NDArray[np.int64] = range(len(log))
    if split != "all":
        rows = np.sort(log.split(split, seed=seed).train)
    before = _unfinished(out, source)
    if before is not None:
        rows = rows[before.rows :]
    try:
        result = profile(log, rows=rows, into=before, progress=progress)
        result.is_partial = False
    except ProfileInterrupted as interrupted:
        interrupted.profile.source = source
        interrupted.profile.save(out)
        raise
    result.source = source
    result.save(out)
    return result


def _unfinished(out: Path, source: str) -> Profile | None:
    if not out.exists():
        return None
    before = Profile.load(out)
    if not before.is_partial:
        return None
    if before.source != source:
        raise ValueError(
            f"{out} is an unfinished profile of {before.source!r}; delete it, or choose another "
            "file (--out)"
        )
    return before
