"""Statistics of the ids of every table, in one pass and bounded memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embcompress.hashing import derive_key
from embcompress.statistics.batches import FeatureBags, read_bags
from embcompress.statistics.counter import ExactCounter
from embcompress.statistics.drift import TimeSlices, add_slices, regroup
from embcompress.statistics.feature import FeatureProfile
from embcompress.statistics.hashes import Words, mixed_words
from embcompress.statistics.interrupts import interrupts_deferred
from embcompress.statistics.pairs import Pair, RowSample, related_pairs
from embcompress.statistics.settings import ProfileSettings
from embcompress.text_table import text_table

#: Rows, and ids, that are collected before they are counted: numpy is slow on small arrays.
_ROWS, _IDS = 1 << 17, 1 << 22
#: Ids whose counts are estimated at a time.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Rows:
    """Rows that are not counted yet."""

    numbers: NDArray[np.int64]
    moments: NDArray[np.int64]
    bags: Mapping[str, FeatureBags]


class Profile:
    """Counts, bag sizes, tails, drift and co-occurrence of the ids of each feature.

    Memory does not depend on the number of rows, see :class:`ProfileSettings`. Profiles of the
    parts of a log add up (:meth:`merge`): exact counts, sketches, samples, slices and bag sizes
    are then equal, bit for bit, to those of one pass, as long as the parts number their rows
    differently. Only the lists of heavy hitters depend on the cuts, within their bound.

    Args:
        num_embeddings: for each feature, its number of ids, or None: any 64-bit ids, counted
            exactly as long as they are in ``[0, settings.exact_ids)``.
        settings: sizes of the parts.
        has_times: whether every row comes with a time; slices are of rows otherwise.

    Attributes:
        features: feature profiles by name.
        rows: number of rows counted.
        source: what was counted, for the reader of a saved profile.
        is_partial: whether the pass was interrupted.
    """

    def __init__(
        self,
        num_embeddings: Mapping[str, int | None],
        settings: ProfileSettings | None = None,
        *,
        has_times: bool = False,
    ) -> None:
        if not num_embeddings:
            raise ValueError("num_embeddings must name at least one feature")
        for name, size in num_embeddings.items():
            if size is not None and not 1 <= size < 2**63:
                raise ValueError(f"num_embeddings of {name!r} must be in [1, 2**63), got {size}")
        self.settings = settings or ProfileSettings()
        self.slices = TimeSlices(self.settings.slices, has_times)
        self.features = {
            name: FeatureProfile(name, size, self.settings) for name, size in num_embeddings.items()
        }
        self.rows, self.source, self.is_partial = 0, "", False
        self.row_sample = RowSample(self.settings.sampled_rows, len(self.features))
        self._row_key = derive_key(self.settings.seed, "", 0)
        self._pending: list[_Rows] = []

    # ------------------------------------------------------------------------------- filling

    def update(
        self,
        batch: object,
        *,
        row_numbers: NDArray[np.int64] | None = None,
        times: NDArray[np.int64] | None = None,
    ) -> None:
        """Count a batch; all of it, or where an error is raised nothing.

        Args:
            batch: a mapping from every feature to its bags: (B,) ids, one a row; (B, L) ids or a
                jagged nested tensor; or (ids, offsets) as of ``nn.EmbeddingBag``. Torch or numpy,
                int32 or int64.
            row_numbers: (B,) int64, unique over all parts that will be merged (default: on from
                the number of rows before).
            times: (B,) int64, in any unit, for a profile with times.

        Raises:
            IndexError: an id outside its table.
            TypeError: ids that are not integers.
            ValueError: features or shapes that do not match.
        """
        bags, size = read_bags(batch, tuple(self.features))
        self._add_bags(bags, size, row_numbers, times)

    def _add_bags(
        self,
        bags: Mapping[str, FeatureBags],
        size: int,
        row_numbers: NDArray[np.int64] | None,
        times: NDArray[np.int64] | None,
    ) -> None:
        if row_numbers is None:
            row_numbers = np.arange(self.rows, self.rows + size)
        if (times is not None) != self.slices.has_times:
            raise ValueError("times must be given with every batch of a profile with times only")
        moments = row_numbers if times is None else np.array(times, np.int64)
        for name, values in (("row_numbers", row_numbers), ("times", moments)):
            if values.shape != (size,):
                raise ValueError(f"{name} must have shape ({size},), got {values.shape}")
        for name, feature in self.features.items():
            feature.check(bags[name].ids)
        with interrupts_deferred():
            self._pending.append(_Rows(row_numbers, moments, bags))
            self.rows += size
            rows = sum(len(part.numbers) for part in self._pending)
            ids = sum(len(value.ids) for part in self._pending for value in part.bags.values())
            if rows >= _ROWS or ids >= _IDS:
                self._count_pending()

    def flush(self) -> None:
        """Count the rows that are still being collected; every reader does this first."""
        with interrupts_deferred():
            if self._pending:
                self._count_pending()
            self.row_sample.sort()

    def _count_pending(self) -> None:
        parts, self._pending = self._pending, []
        numbers = np.concatenate([part.numbers for part in parts])
        moments = np.concatenate([part.moments for part in parts])
        words = mixed_words(numbers, self._row_key)
        halves = self._halves(moments, words)
        sampled = self.row_sample.wanted(words)
        columns, present = [], []
        for name, feature in self.features.items():
            bags = FeatureBags.concatenate([part.bags[name] for part in parts])
            feature.add(bags.ids, bags.lengths, halves)
            first, has_first = bags.first_ids(sampled)
            columns.append(first)
            present.append(has_first)
        self.row_sample.add(words[sampled], np.stack(columns, 1), np.stack(present, 1))

    def _halves(self, moments: NDArray[np.int64], words: Words) -> NDArray[np.int64]:
        """Number of the half slice of each row; halves are drawn by the lowest hashed bit, since
        the highest ones choose the sampled rows."""
        self._make_slices(np.unique(moments >> self.slices.level), self.slices.level)
        return 2 * self.slices.places(moments) + (words & np.uint64(1)).view(np.int64)

    def _make_slices(self, keys: NDArray[np.int64], level: int) -> None:
        places = self.slices.include(keys, level)
        for feature in self.features.values():
            feature.histograms = regroup(feature.histograms, places, len(self.slices.keys))

    def merge(self, other: Profile) -> Profile:
        """Add the profile of another part of the data to this one, and return this one.

        Raises:
            ValueError: the profiles are of other features or settings; nothing was changed.
        """
        self._check_same(other)
        if other is self:
            raise ValueError("a profile cannot be merged into itself")
        self.flush()
        other.flush()
        with interrupts_deferred():
            self._make_slices(other.slices.keys, other.slices.level)
            shift = self.slices.level - other.slices.level
            places = np.searchsorted(self.slices.keys, other.slices.keys >> shift)
            for name, feature in self.features.items():
                theirs = other.features[name]
                feature.merge(theirs)
                add_slices(feature.histograms, theirs.histograms, places)
            self.row_sample.merge(other.row_sample)
            self.row_sample.sort()
            self.rows += other.rows
            self.is_partial |= other.is_partial
            if other.source and other.source not in self.source.split(" + "):
                self.source = " + ".join(filter(None, (self.source, other.source)))
        return self

    def _check_same(self, other: Profile) -> None:
        sizes, theirs = (
            {name: feature.num_embeddings for name, feature in profile.features.items()}
            for profile in (self, other)
        )
        for what, mine, its in (
            ("features", list(sizes), list(theirs)),
            ("num_embeddings", sizes, theirs),
            ("settings", self.settings, other.settings),
            ("has_times", self.slices.has_times, other.slices.has_times),
        ):
            if mine != its:
                raise ValueError(
                    f"profiles with different {what} cannot be merged: {mine} and {its}"
                )

    # ------------------------------------------------------------------------------- reading

    def __getitem__(self, name: str) -> FeatureProfile:
        """The profile of one feature.

        Raises:
            KeyError: there is none of that name.
        """
        if name not in self.features:
            raise KeyError(f"no feature {name!r}; features: {', '.join(self.features)}")
        self.flush()
        return self.features[name]

    def counts(self, name: str, num_embeddings: int | None = None) -> Tensor:
        """How often each id of a feature occurs, for ``TableSpec.counts``.

        Args:
            name: of the feature.
            num_embeddings: number of ids; needed only where the profile does not know it.

        Returns:
            (num_embeddings,) int64 where the feature was counted exactly. Otherwise float32
            estimates: the counts of frequent ids are off by at most the error of the list of
            heavy hitters, below ``queries / heavy_hitters``; the others carry noise of about
            ``sqrt(sum of squared counts / sketch_columns)``, in which ids that occur a few times
            cannot be told from ids that never do.

        Raises:
            KeyError: there is no such feature.
            ValueError: num_embeddings is missing, or is not that of the feature.
        """
        feature = self[name]
        size = feature.num_embeddings
        if size is None:
            if num_embeddings is None:
                raise ValueError(f"feature {name!r} has no known num_embeddings; pass it")
            size = num_embeddings
        elif num_embeddings not in (None, size):
            raise ValueError(
                f"feature {name!r} has {size} ids, not num_embeddings={num_embeddings}"
            )
        if isinstance(feature.counter, ExactCounter):
            used = len(feature.counter.table)
            if used > size and feature.counter.table[size:].any():
                raise ValueError(f"feature {name!r} has ids of {size} and above")
            counts = torch.zeros(size, dtype=torch.int64)
            counts[:used] = torch.from_numpy(feature.counter.table[:size])
            return counts
        estimates = torch.empty(size, dtype=torch.float32)
        for start in range(0, size, _CHUNK):
            stop = min(size, start + _CHUNK)
            estimates[start:stop] = torch.from_numpy(feature.counter.counts(start, stop))
        return estimates

    def pairs(self) -> list[Pair]:
        """Mutual information of every pair of features on the sampled rows, the closest first."""
        self.flush()
        return related_pairs(list(self.features), self.row_sample, self._row_key)

    def __str__(self) -> str:
        self.flush()
        header = ("feature", "ids", "rows", "queries", "seen", "top-1% mass", "exponent", "drift")
        return text_table(header, [self._line(feature) for feature in self.features.values()])

    def _line(self, feature: FeatureProfile) -> tuple[object, ...]:
        distribution = feature.distribution()
        law, drift = distribution.power_law(), feature.drift()
        seen = round(feature.seen())
        return (
            feature.name,
            "" if feature.num_embeddings is None else feature.num_embeddings,
            self.rows,
            feature.queries,
            seen,
            _number(distribution.top_mass(0.01), 3),
            "" if law is None else _number(law.exponent, 2),
            _number(drift, 3),
        )

    def __repr__(self) -> str:
        return f"<Profile of {len(self.features)} features, {self.rows:,} rows>"

    # --------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to one file; see :func:`embcompress.statistics.files.save_profile`."""
        from embcompress.statistics.files import save_profile

        save_profile(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile; see :func:`embcompress.statistics.files.load_profile`."""
        from embcompress.statistics.files import load_profile

        return load_profile(path)


def _number(value: float, digits: int) -> float | str:
    return "" if value != value else round(value, digits) + 0.0  # no -0.0
