"""Criteo Kaggle and Terabyte: tab-separated text to a prepared click log, in two passes.

Pass 1 counts the values of every field, pass 2 writes ids. Both go block by block, keep their
place in a checkpoint, and give the same bytes however often they were interrupted.
"""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcompress.data.click_log import ClickLog, ClickLogWriter, Feature, partial_directory
from embcompress.data.delimited import (
    BLOCK_BYTES,
    Block,
    MalformedRows,
    blocks,
    read_columns,
    right_rows,
)
from embcompress.data.progress import RowProgress
from embcompress.data.vocabulary import (
    FIRST_ID,
    MISSING_ID,
    UNKNOWN_ID,
    ValueCounter,
    Vocabulary,
    hashed_ids,
)

INTEGERS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
COLUMNS = ("label", *INTEGERS, *CATEGORIES)
#: A checkpoint is written when this many seconds, and 20 times its own cost, have passed.
_CHECKPOINT_SECONDS = 10.0


@dataclass(frozen=True)
class CriteoSettings:
    """How Criteo text is prepared.

    Attributes:
        min_count: values seen less often become the "unknown" id 0.
        hash_ids_to: instead of vocabularies, hash every field's values to this many ids.
        max_malformed: largest share of malformed rows that is tolerated.
    """

    min_count: int = 1
    hash_ids_to: int | None = None
    max_malformed: float = 0.001

    def __post_init__(self) -> None:
        if self.min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {self.min_count}")
        if self.hash_ids_to is not None and not FIRST_ID < self.hash_ids_to < 2**31:
            raise ValueError(
                f"hash_ids_to must be above {FIRST_ID} and below 2**31, got {self.hash_ids_to}"
            )


@dataclass(frozen=True)
class CriteoRows:
    """Parsed rows: labels (n,) uint8, integers (n, 13) float32, values (n, 26) and a mask."""

    label: NDArray[np.uint8]
    dense: NDArray[np.float32]
    values: NDArray[np.uint32]
    missing: NDArray[np.bool_]


# ---------------------------------------------------------------------------------- parsing


def _hex_values(column: Any) -> tuple[NDArray[np.uint32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Values, missing mask and bad mask of a string column of 8-digit hex numbers."""
    lengths = np.diff(np.frombuffer(column.buffers()[1], np.int32)[: len(column) + 1])
    missing, bad = lengths == 0, (lengths != 0) & (lengths != 8)
    values = np.zeros(len(column), np.uint32)
    usable = ~(missing | bad)
    if usable.any():
        starts = np.frombuffer(column.buffers()[1], np.int32)[: len(column)][usable]
        text = np.frombuffer(column.buffers()[2], np.uint8)
        nibbles = _NIBBLES[np.lib.stride_tricks.sliding_window_view(text, 8)[starts]]
        bad[usable] = nibbles.max(axis=1) > 15
        packed = (nibbles[:, 0::2] << 4) | nibbles[:, 1::2]
        values[usable] = packed.view(">u4")[:, 0]
    return values, missing, bad


_NIBBLES = np.full(256, 255, np.uint8)
for _digit, _character in enumerate("0123456789abcdef"):
    _NIBBLES[ord(_character)] = _NIBBLES[ord(_character.upper())] = _digit


def _integers(column: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Values of a string column of integers (NaN where missing), and a mask of bad ones."""
    import pyarrow as pa
    import pyarrow.compute as pc

    right = pc.match_substring_regex(column, r"^-?[0-9]{0,18}$")
    bad = ~np.asarray(right) | np.asarray(pc.equal(column, "-"))
    usable = pc.if_else(pa.array(~bad & np.asarray(pc.not_equal(column, ""))), column, None)
    values = pc.cast(usable, pa.int64()).to_numpy(zero_copy_only=False)
    return values.astype(np.float64), bad


def parse_block(block: Block, malformed: MalformedRows) -> CriteoRows:
    """Parse a block, leaving out and counting malformed rows.

    Integers become ``log(1 + max(x, 0))``; a missing one becomes 0.
    """
    columns, lines = read_columns(block, b"\t", COLUMNS, malformed)
    label, label_bad = _integers(columns["label"])
    bad = {"label": label_bad | ~np.isin(label, (0, 1))}
    dense = np.empty((len(lines), len(INTEGERS)), np.float32)
    for position, name in enumerate(INTEGERS):
        numbers, bad[name] = _integers(columns[name])
        dense[:, position] = np.log1p(np.maximum(np.nan_to_num(numbers, nan=0.0), 0.0))
    values = np.empty((len(lines), len(CATEGORIES)), np.uint32)
    missing = np.empty(values.shape, bool)
    for position, name in enumerate(CATEGORIES):
        values[:, position], missing[:, position], bad[name] = _hex_values(columns[name])
    right = right_rows(block.path, lines, columns, bad, malformed)
    return CriteoRows(label[right].astype(np.uint8), dense[right], values[right], missing[right])


# ------------------------------------------------------------------------------- checkpoints


@dataclass
class _Place:
    """Where a pass stands: everything before it is done.

    Attributes:
        file, offset, line: the next block: number of the file, byte and line in it.
        rows: rows handled in this pass.
        total_rows: None in pass 1; what it counted in pass 2.
    """

    file: int = 0
    offset: int = 0
    line: int = 1
    rows: int = 0
    total_rows: int | None = None


class _Checkpoint:
    """The place and the counts of an interrupted preparation, in its partial directory."""

    def __init__(self, directory: Path, source: dict[str, Any]) -> None:
        self.directory, self.source = directory, source
        directory.mkdir(parents=True, exist_ok=True)
        self._last, self._cost = time.monotonic(), 0.0

    def load(self, malformed: MalformedRows, counters: Sequence[ValueCounter]) -> _Place:
        try:
            saved = json.loads((self.directory / "checkpoint.json").read_text())
            if saved["source"] != self.source:
                return self._begin()
            # The counts belong to the checkpoint that names them, never to another.
            with np.load(self.directory / saved["counts"], allow_pickle=False) as counts:
                for number, counter in enumerate(counters):
                    counter.restore(counts[f"values_{number}"], counts[f"counts_{number}"])
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            return self._begin()
        malformed.count, malformed.examples = saved["malformed"], saved["examples"]
        return _Place(**saved["place"])

    def _begin(self) -> _Place:
        """Nothing of an earlier attempt, of other files or settings perhaps, is kept."""
        for path in self.directory.iterdir():
            path.unlink()
        return _Place()

    def save(
        self,
        place: _Place,
        malformed: MalformedRows,
        counters: Sequence[ValueCounter],
    ) -> None:
        started = time.monotonic()
        counting = place.total_rows is None
        name = f"counts_{place.file}_{place.offset}.npz" if counting else "counts_complete.npz"
        if not (self.directory / name).exists():
            arrays: dict[str, Any] = {}
            for number, counter in enumerate(counters):
                values, counts = counter.result()
                arrays[f"values_{number}"], arrays[f"counts_{number}"] = values, counts
            with _aside(self.directory / name) as path, path.open("wb") as stream:
                np.savez(stream, **arrays)
        text = json.dumps(
            {
                "source": self.source,
                "place": asdict(place),
                "counts": name,
                "malformed": malformed.count,
                "examples": malformed.examples,
            }
        )
        with _aside(self.directory / "checkpoint.json") as path:
            path.write_text(text)
        for old in self.directory.glob("counts_*.npz"):
            if old.name != name:
                old.unlink()
        self._last = time.monotonic()
        self._cost = self._last - started

    @property
    def due(self) -> bool:
        """Whether enough time has passed since the last."""
        waited = time.monotonic() - self._last
        return waited >= max(_CHECKPOINT_SECONDS, 20 * self._cost)

    def remove(self) -> None:
        # Also what a kill left half-written.
        for path in (*self.directory.glob("counts_*"), *self.directory.glob("checkpoint.json*")):
            path.unlink(missing_ok=True)


class _aside:
    """Write a file under another name and rename it when it is complete."""

    def __init__(self, target: Path) -> None:
        self.target, self.path = target, target.with_name(target.name + ".tmp")

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            os.replace(self.path, self.target)
        else:
            self.path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------- preparation


class _Preparation:
    """One preparation: its files, its place and what it has counted."""

    def __init__(
        self, files: Sequence[Path], target: Path, settings: CriteoSettings, progress: bool
    ) -> None:
        self.files, self.target, self.settings = files, target, settings
        self.visible = progress
        self.malformed = MalformedRows(settings.max_malformed)
        self.counters = [ValueCounter(np.uint32) for _ in CATEGORIES]
        source = {
            "files": [[path.name, path.stat().st_size] for path in files],
            "settings": asdict(settings),
        }
        self.checkpoint = _Checkpoint(partial_directory(target), source)
        self.place = self.checkpoint.load(self.malformed, self.counters)

    def _remaining(self) -> Iterator[Block]:
        """The blocks from the place on; the place moves after each was handled."""
        for number in range(self.place.file, len(self.files)):
            start, line = (
                (self.place.offset, self.place.line) if number == self.place.file else (0, 1)
            )
            for block in blocks(self.files[number], start=start, first_line=line, size=BLOCK_BYTES):
                yield block
                lines = block.data.count(b"\n")
                self.place.file, self.place.offset = number, block.end
                self.place.line = block.first_line + lines

    def _progress(self, title: str) -> RowProgress:
        """Progress in bytes on disk, from the place on."""
        sizes = [float(path.stat().st_size) for path in self.files]
        bar = RowProgress(title, sum(sizes), visible=self.visible)
        current = _disk_bytes(self.files[self.place.file], self.place.offset)
        bar.done = sum(sizes[: self.place.file]) + current
        return bar

    def _save(self) -> None:
        self.checkpoint.save(self.place, self.malformed, self.counters)

    def count(self) -> None:
        """Pass 1: rows, and the values of every field."""
        if self.place.total_rows is not None:
            return
        with self._progress("counting values") as bar:
            for block in self._remaining():
                if self.checkpoint.due:
                    self._save()
                rows = parse_block(block, self.malformed)
                if self.settings.hash_ids_to is None:
                    for field, counter in enumerate(self.counters):
                        counter.add(rows.values[~rows.missing[:, field], field])
                self.place.rows += len(rows.label)
                self.malformed.check(self.place.rows + self.malformed.count, final=False)
                bar.advance(_disk_bytes(block.path, len(block.data)), len(rows.label))
        self.malformed.check(self.place.rows + self.malformed.count, final=True)
        self.place = _Place(total_rows=self.place.rows)
        self._save()

    def write(self) -> ClickLog:
        """Pass 2: the ids."""
        assert self.place.total_rows is not None
        vocabularies = self._vocabularies()
        sizes = [self.settings.hash_ids_to or len(v) for v in vocabularies]
        features = tuple(Feature(name, size) for name, size in zip(CATEGORIES, sizes, strict=True))
        writer = ClickLogWriter(
            self.target,
            name="criteo",
            features=features,
            dense_names=INTEGERS,
            rows=self.place.total_rows,
        )
        ignored = MalformedRows(limit=1.0)  # counted in pass 1
        with self._progress("writing ids") as bar:
            for block in self._remaining():
                if self.checkpoint.due:
                    writer.flush()
                    self._save()
                rows = parse_block(block, ignored)
                ids = self._encode(rows, vocabularies)
                writer.write(self.place.rows, label=rows.label, dense=rows.dense, ids=ids)
                self.place.rows += len(rows.label)
                bar.advance(_disk_bytes(block.path, len(block.data)), len(rows.label))
        if self.place.rows != self.place.total_rows:
            raise RuntimeError(f"{self.files} changed while they were read; prepare them again")
        return self._finish(writer)

    def _vocabularies(self) -> list[Vocabulary]:
        """The vocabularies, saved; each takes the place of its counts in memory."""
        vocabularies = []
        for name in CATEGORIES:
            counts = self.counters.pop(0).result()
            vocabulary = Vocabulary.from_counts(*counts, min_count=self.settings.min_count)
            if self.settings.hash_ids_to is None:
                path = partial_directory(self.target) / f"vocabulary_{name}.npy"
                np.save(path, vocabulary.values_by_id())
            vocabularies.append(vocabulary)
        return vocabularies

    def _encode(self, rows: CriteoRows, vocabularies: Sequence[Vocabulary]) -> NDArray[np.int64]:
        ids = np.empty(rows.values.shape, np.int64)
        for field, vocabulary in enumerate(vocabularies):
            if self.settings.hash_ids_to is None:
                ids[:, field] = vocabulary.encode(rows.values[:, field])
            else:
                size = self.settings.hash_ids_to
                ids[:, field] = hashed_ids(rows.values[:, field], CATEGORIES[field], size)
        ids[rows.missing] = MISSING_ID
        return ids

    def _finish(self, writer: ClickLogWriter) -> ClickLog:
        self.checkpoint.remove()
        return writer.finish(
            settings=asdict(self.settings),
            malformed=self.malformed.count,
            malformed_examples=self.malformed.examples,
            reserved_ids={"unknown": UNKNOWN_ID, "missing": MISSING_ID},
        )


def _disk_bytes(path: Path, size: int) -> float:
    """Bytes on disk of ``size`` bytes of a file; roughly, if they are compressed."""
    return size * (0.4 if path.suffix == ".gz" else 1.0)


def prepare_criteo(
    files: Sequence[Path],
    target: Path,
    settings: CriteoSettings = CriteoSettings(),
    *,
    progress: bool = True,
) -> ClickLog:
    """Prepare Criteo text files, in the given (time) order.

    Ids: 0 is unknown or rarer than ``min_count``, 1 is missing, then the values of each field by
    falling count (ties by value). Interrupted at any moment, the next call goes on.

    Args:
        files: tab-separated, no header: label, 13 integers, 26 hex categories; ``.gz`` accepted.
        target: directory of the prepared log.

    Raises:
        MalformedRowsError: more malformed rows than ``settings.max_malformed`` allows.
    """
    preparation = _Preparation(files, target, settings, progress)
    preparation.count()
    return preparation.write()
