"""Delimited text to a prepared click log, in two passes: what text formats have in common.

Pass 1 counts the values of every field, pass 2 writes ids. Both go block by block, keep their
place in a checkpoint, and give the same bytes however often they were interrupted.
"""

from __future__ import annotations

import json
import os
import time
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embcompress.data.click_log import ClickLog, ClickLogWriter, Feature, partial_directory
from embcompress.data.delimited import BLOCK_BYTES, Block, MalformedRows, blocks
from embcompress.data.progress import RowProgress
from embcompress.data.vocabulary import (
    FIRST_ID,
    MISSING_ID,
    UNKNOWN_ID,
    ValueCounter,
    Vocabulary,
    hashed_ids,
)

#: A checkpoint is written when this many seconds, and 20 times its own cost, have passed.
_CHECKPOINT_SECONDS = 10.0


@dataclass(frozen=True)
class TextSettings:
    """How the fields of a text become ids.

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
class TextRows:
    """Parsed rows of a text with K numbers and F fields of ids.

    Attributes:
        label: (n,) uint8, 0 or 1.
        dense: (n, K) float32.
        values: (n, F) unsigned integers that stand for the fields' texts.
        missing: (n, F) mask of the fields without a value.
        time: (n,) int64 seconds; None where the text has no times.
    """

    label: NDArray[np.uint8]
    dense: NDArray[np.float32]
    values: NDArray[Any]
    missing: NDArray[np.bool_]
    time: NDArray[np.int64] | None = None


class TextFormat(ABC):
    """What is particular to one kind of text."""

    name: ClassVar[str]
    dense_names: ClassVar[tuple[str, ...]]
    #: Names of the fields of ids.
    fields: ClassVar[tuple[str, ...]]
    #: dtype of the values.
    value_type: ClassVar[Any]
    has_time: ClassVar[bool] = False

    def start(self, path: Path) -> tuple[int, int]:
        """Byte and line number of the first row of a file.

        Raises:
            ValueError: the file is not of this format.
        """
        return 0, 1

    @abstractmethod
    def parse(self, block: Block, malformed: MalformedRows) -> TextRows:
        """Parse a block, leaving out and counting malformed rows."""


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


class Checkpoint:
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


class Preparation:
    """One preparation: its files, its place and what it has counted.

    Ids: 0 is unknown or rarer than ``min_count``, 1 is missing, then the values of each field by
    falling count (ties by value). Interrupted at any moment, the next one goes on.

    Args:
        form: of the files.
        files: in time order; ``.gz`` accepted.
        target: directory of the prepared log.
        settings: how fields become ids.
        progress: whether to show it.
    """

    def __init__(
        self,
        form: TextFormat,
        files: Sequence[Path],
        target: Path,
        settings: TextSettings,
        progress: bool,
    ) -> None:
        self.form, self.files, self.target, self.settings = form, files, target, settings
        self.visible = progress
        self.malformed = MalformedRows(settings.max_malformed)
        self.counters = [ValueCounter(form.value_type) for _ in form.fields]
        self.starts = [form.start(path) for path in files]
        source = {
            "files": [[path.name, path.stat().st_size] for path in files],
            "settings": asdict(settings),
        }
        self.checkpoint = Checkpoint(partial_directory(target), source)
        self.place = self.checkpoint.load(self.malformed, self.counters)

    def _remaining(self) -> Iterator[Block]:
        """The blocks from the place on; the place moves after each was handled."""
        for number in range(self.place.file, len(self.files)):
            start, line = self.starts[number]
            if number == self.place.file and self.place.offset:
                start, line = self.place.offset, self.place.line
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
                rows = self.form.parse(block, self.malformed)
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
        pairs = zip(self.form.fields, sizes, strict=True)
        features = tuple(Feature(name, size) for name, size in pairs)
        writer = ClickLogWriter(
            self.target,
            name=self.form.name,
            features=features,
            dense_names=self.form.dense_names,
            rows=self.place.total_rows,
            has_time=self.form.has_time,
        )
        ignored = MalformedRows(limit=1.0)  # counted in pass 1
        with self._progress("writing ids") as bar:
            for block in self._remaining():
                if self.checkpoint.due:
                    writer.flush()
                    self._save()
                rows = self.form.parse(block, ignored)
                ids = self._encode(rows, vocabularies)
                times = {} if rows.time is None else {"time": rows.time}
                writer.write(self.place.rows, label=rows.label, dense=rows.dense, ids=ids, **times)
                self.place.rows += len(rows.label)
                bar.advance(_disk_bytes(block.path, len(block.data)), len(rows.label))
        if self.place.rows != self.place.total_rows:
            raise RuntimeError(f"{self.files} changed while they were read; prepare them again")
        return self._finish(writer)

    def _vocabularies(self) -> list[Vocabulary]:
        """The vocabularies, saved; each takes the place of its counts in memory."""
        vocabularies = []
        for name in self.form.fields:
            counts = self.counters.pop(0).result()
            vocabulary = Vocabulary.from_counts(*counts, min_count=self.settings.min_count)
            if self.settings.hash_ids_to is None:
                path = partial_directory(self.target) / f"vocabulary_{name}.npy"
                np.save(path, vocabulary.values_by_id())
            vocabularies.append(vocabulary)
        return vocabularies

    def _encode(self, rows: TextRows, vocabularies: Sequence[Vocabulary]) -> NDArray[np.int64]:
        ids = np.empty(rows.values.shape, np.int64)
        for field, vocabulary in enumerate(vocabularies):
            if self.settings.hash_ids_to is None:
                ids[:, field] = vocabulary.encode(rows.values[:, field])
            else:
                size = self.settings.hash_ids_to
                ids[:, field] = hashed_ids(rows.values[:, field], self.form.fields[field], size)
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
