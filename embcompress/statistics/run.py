"""One pass over data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcompress.data.click_log import ClickLog
from embcompress.data.load import load_click_log
from embcompress.data.progress import RowProgress
from embcompress.statistics.batches import click_log_bags, find_features
from embcompress.statistics.interrupts import ProfileInterrupted
from embcompress.statistics.profiles import Profile
from embcompress.statistics.settings import ProfileSettings

_ROWS = 1 << 16

RowNumbers = slice | range | NDArray[np.int64]


def profile(
    data: str | ClickLog | Mapping[str, object] | Iterable[object],
    *,
    rows: RowNumbers | None = None,
    num_embeddings: Mapping[str, int] | None = None,
    settings: ProfileSettings | None = None,
    into: Profile | None = None,
    cache: Path | str | None = None,
    progress: bool = True,
) -> Profile:
    """Count the ids of every feature in one pass and bounded memory.

    Args:
        data: a click log, or its spec as for ``embcompress sweep --data``; or batches, such as a
            ``DataLoader`` yields: mappings as of :meth:`Profile.update`, or tuples with one such
            mapping; or a single mapping. The order of batches is taken for that of time.
        rows: of a click log, the only ones to count, e.g. ``log.split("time").train``; they are
            read in the log's order.
        num_embeddings: of batches, number of ids by feature; ids of the other features are any
            64-bit integers.
        settings: sizes of the parts of a new profile.
        into: count into this profile, which keeps what it has, instead of a new one.
        cache: of prepared click logs.
        progress: whether to show it on standard error.

    Raises:
        ProfileInterrupted: a KeyboardInterrupt that carries the profile of what was counted.
        IndexError: an id outside its table.
        TypeError, ValueError: data that is none of the above, or arguments that do not fit it.
    """
    if into is not None and settings not in (None, into.settings):
        raise ValueError("settings must be left out where the counts go into another profile")
    if isinstance(data, str):
        data = load_click_log(data, cache=cache, progress=progress)
    if isinstance(data, ClickLog):
        if num_embeddings is not None:
            raise ValueError("num_embeddings must be left out: the click log knows its own")
        return _profile_click_log(data, rows, settings, into, progress)
    if rows is not None:
        raise ValueError("rows can be chosen of a click log only; leave out batches instead")
    return _profile_batches(data, num_embeddings or {}, settings, into, progress)


def _profile_click_log(
    log: ClickLog,
    rows: RowNumbers | None,
    settings: ProfileSettings | None,
    into: Profile | None,
    progress: bool,
) -> Profile:
    sizes: dict[str, int | None] = {f.name: f.num_embeddings for f in log.features}
    result = into or Profile(sizes, settings, has_times=log.times is not None)
    chosen = _row_numbers(rows, len(log))
    try:
        with RowProgress(f"profiling {log.name}", len(chosen), visible=progress) as bar:
            for start in range(0, len(chosen), _ROWS):
                part = chosen[start : start + _ROWS]
                if isinstance(part, range):  # slices of memory-mapped columns are cheap
                    where: slice | NDArray[np.int64] = slice(part.start, part.stop)
                    numbers = np.arange(part.start, part.stop)
                else:
                    where = numbers = part
                times = None if log.times is None else log.times[where]
                result._add_bags(click_log_bags(log, where), len(part), numbers, times)
                bar.advance(len(part), len(part))
            result.flush()
    except KeyboardInterrupt as error:
        raise _interrupted(result) from error
    return result


def _row_numbers(rows: RowNumbers | None, size: int) -> range | NDArray[np.int64]:
    """Ascending row numbers."""
    if rows is None:
        return range(size)
    if isinstance(rows, slice):
        rows = range(size)[rows]
    if isinstance(rows, range) and rows.step == 1:
        numbers: range | NDArray[np.int64] = rows
    else:
        numbers = np.sort(np.asarray(rows))
        if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iu"):
            raise ValueError(f"rows must be row numbers, got {rows!r}")
        numbers = numbers.astype(np.int64, copy=False)
    if len(numbers) and not (numbers[0] >= 0 and numbers[-1] < size):
        raise ValueError(f"rows must be in [0, {size}), got {numbers[0]} to {numbers[-1]}")
    return numbers


def _profile_batches(
    data: Mapping[str, object] | Iterable[object],
    num_embeddings: Mapping[str, int],
    settings: ProfileSettings | None,
    into: Profile | None,
    progress: bool,
) -> Profile:
    batches: Any = [data] if isinstance(data, Mapping) else data
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"data must be a click log, its spec, or batches, got {type(data).__name__}"
        )
    result = into
    total = len(data) if isinstance(data, Sized) else None
    try:
        with RowProgress("profiling", total, visible=progress) as bar:
            for batch in batches:
                if result is None:
                    result = _new_profile(find_features(batch), num_embeddings, settings)
                before = result.rows
                result.update(batch)
                bar.advance(1, result.rows - before)
            if result is not None:
                result.flush()
    except KeyboardInterrupt as error:
        if result is None:
            raise
        raise _interrupted(result) from error
    if result is None:
        raise ValueError("data has no batches")
    return result


def _new_profile(
    features: Mapping[str, object],
    num_embeddings: Mapping[str, int],
    settings: ProfileSettings | None,
) -> Profile:
    unknown = sorted(set(num_embeddings) - set(features))
    if unknown:
        raise ValueError(f"num_embeddings names {unknown}; batches have {sorted(features)}")
    return Profile({name: num_embeddings.get(name) for name in features}, settings)


def _interrupted(partial: Profile) -> ProfileInterrupted:
    partial.is_partial = True
    partial.flush()
    return ProfileInterrupted(partial)
