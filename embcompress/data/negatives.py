"""Negatives for logs of clicks alone, drawn from the same slice of time.

Drawing from the whole file would leak the future: an item that has not appeared yet would be
known as a negative long before its first click.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class NegativeSampling:
    """Each event is followed by negatives: copies of label 0 whose chosen columns are replaced.

    Attributes:
        columns: id columns to replace, together, by another event's value of the same time slice.
        per_positive: negatives an event, ≥ 1.
        slice: length of a slice, such as ``"1h"``, ``"30m"`` or ``"1d"``.
        seed: of the draws.
        by_popularity: draw another value as often as it occurs in the slice, so that popularity
            tells nothing apart; else uniformly from the distinct ones.
    """

    columns: tuple[str, ...]
    per_positive: int = 1
    slice: str = "1h"
    seed: int = 0
    by_popularity: bool = False

    def __post_init__(self) -> None:
        if not self.columns or self.per_positive < 1:
            raise ValueError("negatives: columns must not be empty, per_positive must be ≥ 1")
        if self.seconds < 1:
            raise ValueError(f"negatives: slice {self.slice!r} is empty")

    @property
    def seconds(self) -> int:
        """Length of a slice in seconds."""
        match = re.fullmatch(r"(\d+)([smhd])", self.slice)
        if match is None:
            raise ValueError(f"negatives: slice must look like '1h' or '30m', got {self.slice!r}")
        return int(match[1]) * _SECONDS[match[2]]


@dataclass(frozen=True)
class EventRows:
    """Rows with ids in place of values.

    Attributes:
        label: (n,).
        time: (n,) seconds, or None.
        dense: (n, K).
        ids: (n, F).
        bags: concatenated ids and (n,) counts of each bag column.
    """

    label: NDArray[np.uint8]
    time: NDArray[np.int64] | None
    dense: NDArray[np.float32]
    ids: NDArray[np.int64]
    bags: list[tuple[NDArray[np.int64], NDArray[np.int64]]]

    def take(self, rows: NDArray[np.int64]) -> EventRows:
        """The rows of these numbers, in order, repeated where a number is."""
        return EventRows(
            self.label[rows],
            None if self.time is None else self.time[rows],
            self.dense[rows],
            self.ids[rows],
            [_take_bags(ids, counts, rows) for ids, counts in self.bags],
        )

    @staticmethod
    def concatenate(parts: list[EventRows]) -> EventRows:
        """The rows of all parts."""
        times = [part.time for part in parts if part.time is not None]
        return EventRows(
            np.concatenate([part.label for part in parts]),
            np.concatenate(times) if times else None,
            np.concatenate([part.dense for part in parts]),
            np.concatenate([part.ids for part in parts]),
            [
                (
                    np.concatenate([part.bags[bag][0] for part in parts]),
                    np.concatenate([part.bags[bag][1] for part in parts]),
                )
                for bag in range(len(parts[0].bags))
            ],
        )


def _take_bags(
    ids: NDArray[np.int64], counts: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    starts = (np.cumsum(counts) - counts)[rows]
    taken = counts[rows]
    ends = np.cumsum(taken)
    positions = np.arange(int(taken.sum())) + np.repeat(starts - (ends - taken), taken)
    return ids[positions], taken


class SliceSampler:
    """Holds events until their slice of time is complete, then draws its negatives."""

    def __init__(self, settings: NegativeSampling, columns: list[int]) -> None:
        self.settings, self.columns = settings, columns
        self._waiting: list[EventRows] = []
        self._slice: int | None = None

    def add(self, rows: EventRows) -> Iterator[EventRows]:
        """Take events in time order; gives every slice that they complete."""
        assert rows.time is not None
        slices = rows.time // self.settings.seconds
        cuts = np.flatnonzero(np.diff(slices)) + 1
        for begin, end in zip([0, *cuts], [*cuts, len(slices)], strict=True):
            if begin == end:
                continue
            number = int(slices[begin])
            if self._slice is not None and number < self._slice:
                raise ValueError(
                    f"time goes back from slice {self._slice} to {number} of "
                    f"{self.settings.slice}; sort the source by time to draw negatives"
                )
            if number != self._slice:
                yield from self.finish()
                self._slice = number
            self._waiting.append(rows.take(np.arange(begin, end)))

    def finish(self) -> Iterator[EventRows]:
        """The last slice."""
        if self._waiting and self._slice is not None:
            yield self._draw(EventRows.concatenate(self._waiting), self._slice)
        self._waiting = []

    def _draw(self, events: EventRows, number: int) -> EventRows:
        """Each event followed by its negatives."""
        settings = self.settings
        rng = np.random.default_rng([settings.seed, number % 2**63])  # seeds are not negative
        count, copies = len(events.label), 1 + settings.per_positive
        rows = events.take(np.repeat(np.arange(count), copies))
        is_negative = np.arange(count * copies) % copies != 0
        rows.label[is_negative] = 0
        values, own, occurrences = np.unique(
            events.ids[:, self.columns], axis=0, return_inverse=True, return_counts=True
        )
        own = np.repeat(own.reshape(-1), copies)[is_negative]
        weights = occurrences if settings.by_popularity else np.ones_like(occurrences)
        ends = weights.cumsum()
        # Skip the weight of the event's own value (a slice of one value has no other).
        others = np.maximum(1, ends[-1] - weights[own])
        drawn = rng.integers(0, others)
        drawn += weights[own] * (drawn >= ends[own] - weights[own])
        drawn = np.minimum(np.searchsorted(ends, drawn, side="right"), len(values) - 1)
        ids = rows.ids[is_negative]
        ids[:, self.columns] = values[drawn]
        rows.ids[is_negative] = ids
        return rows
