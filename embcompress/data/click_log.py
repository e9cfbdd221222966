"""A prepared click log: memory-mapped columns in a directory, and batches of them.

The format is described in ``docs/data.md``; :class:`ClickLogWriter` is its one writer.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FORMAT = 1
_META = "meta.json"
_SECONDS_OF_A_DAY = 86_400


@dataclass(frozen=True)
class Feature:
    """One id column of a click log.

    Attributes:
        name: the column's name.
        num_embeddings: ids are in ``[0, num_embeddings)``.
        is_bag: whether a row has several ids, possibly none.
    """

    name: str
    num_embeddings: int
    is_bag: bool = False


@dataclass(frozen=True)
class Batch:
    """Rows of a click log as tensors; ids are feature-major.

    Attributes:
        label: (B,) float32, 0 or 1.
        dense: (B, number of dense columns) float32.
        ids: (N,) int64: all bags of feature 0, then all bags of feature 1, …
        offsets: (F * B + 1,) int64; bag f * B + b is ``ids[offsets[f*B+b]:offsets[f*B+b+1]]``.
    """

    label: Tensor
    dense: Tensor
    ids: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class Split:
    """Row numbers of three disjoint parts, int64; in time order where the split is by time."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


class ClickLogError(ValueError):
    """A prepared click log that is damaged or of another format."""


def _files(meta: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every column file that the meta data promises."""
    rows = meta["rows"]
    single = [feature for feature in meta["features"] if not feature["is_bag"]]
    files = {
        "label": ("uint8", (rows,)),
        "dense": ("float32", (rows, len(meta["dense_names"]))),
        "ids": (meta["id_dtype"], (rows, len(single))),
    }
    if meta["has_time"]:
        files["time"] = ("int64", (rows,))
    for number, count in meta["bag_ids"].items():
        files[f"bag_{number}_ids"] = (meta["id_dtype"], (count,))
        files[f"bag_{number}_offsets"] = ("int64", (rows + 1,))
    return files


class ClickLog:
    """A prepared click log, opened with :meth:`open`.

    Attributes:
        name: what it was prepared from, e.g. ``"ml-100k"``.
        features: the id columns.
        dense_names: names of the numeric columns.
        labels: (rows,) uint8, memory-mapped.
        times: (rows,) int64, memory-mapped, or None: the rows are in time order then.
        meta: everything that the preparation recorded, e.g. ``"malformed"``, ``"teacher_auc"``.
    """

    def __init__(self, directory: Path, meta: dict[str, Any]) -> None:
        self.directory = directory
        self.meta = meta
        self.name: str = meta["name"]
        self.features = tuple(Feature(**feature) for feature in meta["features"])
        self.dense_names = tuple(meta["dense_names"])
        columns = {
            name: _open_column(directory / f"{name}.npy", dtype, shape)
            for name, (dtype, shape) in _files(meta).items()
        }
        self.labels: NDArray[np.uint8] = columns["label"]
        self.times: NDArray[np.int64] | None = columns.get("time")
        self._dense, self._ids = columns["dense"], columns["ids"]
        self._bags = {
            int(number): (columns[f"bag_{number}_ids"], columns[f"bag_{number}_offsets"])
            for number in meta["bag_ids"]
        }

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> ClickLog:
        """Open a prepared directory; every file is checked before it is used.

        Raises:
            FileNotFoundError: there is no prepared log in the directory.
            ClickLogError: a file is damaged, truncated, or of another format version.
        """
        path = Path(directory)
        if not (path / _META).is_file():
            raise FileNotFoundError(f"no prepared click log in {path} ({_META} is missing)")
        try:
            meta = json.loads((path / _META).read_text())
            if meta["format"] != FORMAT:
                raise ClickLogError(
                    f"{path} has format {meta['format']!r}, this version reads {FORMAT}; "
                    "delete the directory and prepare the data again"
                )
            return cls(path, meta)
        except (
            AttributeError,
            json.JSONDecodeError,
            KeyError,
            TypeError,
            UnicodeDecodeError,
        ) as error:
            raise ClickLogError(
                f"{path / _META} is damaged ({error!r}); delete {path} and prepare again"
            ) from error

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: slice | NDArray[np.int64]) -> Batch:
        """The rows as tensors.

        Args:
            rows: a slice or an int64 array of row numbers, in any order.
        """
        bags, batch = self.bags(rows), len(self.labels[rows])
        parts = [ids for ids, _ in bags]
        lengths = [np.ones(batch, np.int64) if counts is None else counts for _, counts in bags]
        offsets = np.zeros(len(self.features) * batch + 1, dtype=np.int64)
        if parts:
            np.cumsum(np.concatenate(lengths), out=offsets[1:])
        ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        return Batch(
            torch.from_numpy(self.labels[rows].astype(np.float32)),
            torch.from_numpy(np.array(self._dense[rows])),
            torch.from_numpy(ids.astype(np.int64, copy=False)),
            torch.from_numpy(offsets),
        )

    def bags(
        self, rows: slice | NDArray[np.int64]
    ) -> list[tuple[NDArray[Any], NDArray[np.int64] | None]]:
        """Ids of every feature, in the column's integer dtype, and the number of ids of each row.

        The numbers are None where every row has one id. Cheaper than :meth:`batch` where only
        ids are wanted.
        """
        single = iter(np.ascontiguousarray(self._ids[rows].T))
        return [
            _bag_rows(*self._bags[number], rows) if feature.is_bag else (next(single), None)
            for number, feature in enumerate(self.features)
        ]

    def split(
        self,
        kind: Literal["time", "day", "random"],
        *,
        seed: int = 0,
        validation: float = 0.1,
        test: float = 0.15,
    ) -> Split:
        """Split the rows into train, validation and test.

        Args:
            kind: ``"time"``: the last ``test`` share in time is test, the part before it is
                validation; ``"day"``: the same, in whole days (UTC), as near to these shares as
                may be; ``"random"``: a seeded permutation.
            seed: of the permutation.
            validation, test: shares of all rows.

        Raises:
            ValueError: shares that leave nothing to train on; by day, rows without times or of
                fewer than three days.
        """
        if kind not in ("time", "day", "random"):
            raise ValueError(f"kind of split must be 'time', 'day' or 'random', got {kind!r}")
        if not (validation > 0 and test > 0 and validation + test < 1):
            raise ValueError(f"validation {validation} and test {test} leave nothing to train on")
        if kind == "random":
            order = np.random.default_rng(seed).permutation(len(self))
        elif self.times is None:
            order = np.arange(len(self))
        else:
            order = np.argsort(self.times, kind="stable")
        order = order.astype(np.int64, copy=False)
        test_start = len(self) - round(test * len(self))
        validation_start = test_start - round(validation * len(self))
        if kind == "day":
            if self.times is None:
                raise ValueError(f"{self.name} has no times: split it by 'time', not by 'day'")
            days = self.times[order] // _SECONDS_OF_A_DAY
            validation_start, test_start = _day_starts(days, validation_start, test_start)
        return Split(
            order[:validation_start], order[validation_start:test_start], order[test_start:]
        )


def _day_starts(days: NDArray[np.int64], validation: int, test: int) -> tuple[int, int]:
    """The changes of day that are nearest to two places, with a day at least in each part.

    Args:
        days: (n,) rising numbers of days.
        validation, test: where the validation and the test part would begin otherwise.
    """
    starts = np.flatnonzero(np.diff(days)) + 1
    if len(starts) < 2:
        raise ValueError(
            f"a split by day needs rows of at least 3 days, these are of {len(starts) + 1}; "
            "split them by 'time'"
        )
    last = 1 + int(np.abs(starts[1:] - test).argmin())
    first = int(np.abs(starts[:last] - validation).argmin())
    return int(starts[first]), int(starts[last])


def _bag_rows(
    ids: NDArray[Any], offsets: NDArray[np.int64], rows: slice | NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Concatenated ids and their counts of the bags of some rows."""
    starts = np.asarray(offsets[:-1][rows])
    counts = np.asarray(offsets[1:][rows]) - starts
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    positions = np.arange(total) + np.repeat(starts - (ends - counts), counts)
    return np.asarray(ids[positions]), counts


def _open_column(path: Path, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Memory-map one column, checking its header and its size against the meta data."""
    try:
        if 0 in shape:  # an empty file cannot be mapped
            array = np.load(path, allow_pickle=False)
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ClickLogError(
            f"{path} is missing or damaged ({error}); delete {path.parent} and prepare again"
        ) from error
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise ClickLogError(
            f"{path} holds {array.dtype} {array.shape}, its meta data says {dtype} {shape}; "
            f"delete {path.parent} and prepare again"
        )
    return array


class ClickLogWriter:
    """Writes a prepared click log row range by row range, into a directory aside.

    Writing a range twice is harmless, so an interrupted preparation may go on from any earlier
    point. :meth:`finish` renames the directory into place.

    Args:
        target: the final directory.
        name, features, dense_names: see :class:`ClickLog`.
        rows: number of rows.
        bag_ids: total number of ids of each bag feature, by the feature's number.
        has_time: whether there is a time column.
    """

    def __init__(
        self,
        target: Path,
        *,
        name: str,
        features: tuple[Feature, ...],
        dense_names: tuple[str, ...],
        rows: int,
        bag_ids: dict[int, int] | None = None,
        has_time: bool = False,
    ) -> None:
        if rows < 1:
            raise ValueError(f"{name}: no rows to prepare")
        self.target, self.partial = target, partial_directory(target)
        self.partial.mkdir(parents=True, exist_ok=True)
        largest = max((feature.num_embeddings for feature in features), default=0)
        self.meta: dict[str, Any] = {
            "format": FORMAT,
            "name": name,
            "rows": rows,
            "features": [asdict(feature) for feature in features],
            "dense_names": list(dense_names),
            "id_dtype": "int32" if largest <= 2**31 else "int64",
            "has_time": has_time,
            "bag_ids": {str(number): count for number, count in (bag_ids or {}).items()},
        }
        self.columns = {
            key: self._create(key, dtype, shape)
            for key, (dtype, shape) in _files(self.meta).items()
        }

    def _create(self, key: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        path = self.partial / f"{key}.npy"
        if 0 in shape:
            np.save(path, np.empty(shape, dtype))
            return np.empty(shape, dtype)
        if path.exists():  # an earlier attempt's; its finished rows are kept
            try:
                existing = np.load(path, mmap_mode="r+", allow_pickle=False)
                if existing.dtype == np.dtype(dtype) and existing.shape == shape:
                    return existing
            except (OSError, ValueError, EOFError):
                pass
        return np.lib.format.open_memmap(path, "w+", dtype, shape)

    def write(self, start: int, **columns: NDArray[Any]) -> None:
        """Write rows from ``start`` on; keywords are column file names (see ``docs/data.md``)."""
        for key, values in columns.items():
            if key.endswith("_ids") and key != "ids":
                raise ValueError("bags are written by write_bag")
            if start + len(values) > self.meta["rows"]:
                raise ValueError(
                    f"{self.meta['name']}: rows beyond the {self.meta['rows']} that were counted; "
                    "did the source change while it was read?"
                )
            self.columns[key][start : start + len(values)] = values

    def write_bag(
        self, number: int, start: int, id_start: int, ids: NDArray[Any], counts: NDArray[Any]
    ) -> int:
        """Write the bags of rows from ``start`` on; returns where the next rows' ids begin."""
        self.columns[f"bag_{number}_ids"][id_start : id_start + len(ids)] = ids
        offsets = self.columns[f"bag_{number}_offsets"]
        offsets[start] = id_start
        offsets[start + 1 : start + 1 + len(counts)] = id_start + np.cumsum(counts)
        return id_start + len(ids)

    def flush(self) -> None:
        """Bring everything written so far to the disk."""
        for column in self.columns.values():
            if isinstance(column, np.memmap):
                column.flush()

    def finish(self, **meta: Any) -> ClickLog:
        """Complete the log with further meta data, and move it into place."""
        self.flush()
        self.columns.clear()
        text = json.dumps({**self.meta, **meta}, indent=1, sort_keys=True)
        (self.partial / _META).write_text(text)
        if self.target.exists():
            shutil.rmtree(self.target)
        os.replace(self.partial, self.target)
        return ClickLog.open(self.target)


def partial_directory(target: Path) -> Path:
    """Where a log is written before it is complete."""
    return target.with_name(target.name + ".partial")
