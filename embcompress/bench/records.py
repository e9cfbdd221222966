"""Results on disk: one JSON object a line, appended whole, safe to kill at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embcompress.bench.settings import Run

Record = dict[str, Any]
#: The ``"status"`` of records that are not those of finished runs.
IMPOSSIBLE, FAILED = "impossible", "failed"


class SweepError(ValueError):
    """A sweep cannot be run as it was asked for."""


class RecordFile:
    """An append-only file of JSON objects, each with a unique ``"key"``.

    A line that a kill tore is cut off when the file is opened; its run is then done again.

    Args:
        path: the file; it need not exist.
        repeatable: whether a later record of a key may take the place of an earlier one.
        read_only: leave the file as it is, a torn last line included: a sweep may be in the
            middle of writing it.

    Raises:
        ValueError: a damaged line that is not the last; the message names it.
    """

    def __init__(self, path: Path, *, read_only: bool = False, repeatable: bool = False) -> None:
        self.path, self.read_only, self.repeatable = path, read_only, repeatable
        self.records: dict[str, Record] = {}
        if not read_only:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._load()

    def _load(self) -> None:
        data = self.path.read_bytes()
        complete = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:complete].splitlines(), 1):
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}:{number} is not a record of a sweep ({error}); "
                    "mend or remove that line, or choose another --out"
                ) from error
        if complete < len(data) and not self.read_only:
            os.truncate(self.path, complete)

    def append(self, record: Record) -> None:
        """Write one record whole, to the disk.

        Raises:
            ValueError: there is a record of this key, or a number that is not finite.
            OSError: the disk took only a part, which is cut off again.
        """
        if self.read_only:
            raise ValueError(f"{self.path} was opened for reading")
        if record["key"] in self.records and not self.repeatable:
            raise ValueError(f"there is already a record of {record['key']}")
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            written = os.write(descriptor, line)
            if written < len(line):  # a full disk; the next line must not join this piece
                os.ftruncate(descriptor, size)
                raise OSError(f"{self.path} took {written} of {len(line)} bytes; is the disk full?")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.records[record["key"]] = record

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records.values())


class RecordDirectory:
    """All records of a sweep.

    ``results.jsonl`` has a line for every finished run, ``impossible.jsonl`` one for every run
    whose method cannot meet the budget, with the smallest that it can, and ``failed.jsonl`` one
    for every attempt that ended in an error.

    Args:
        directory: of the sweep.
        read_only: see :class:`RecordFile`.
    """

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        self.results = RecordFile(directory / "results.jsonl", read_only=read_only)
        self.impossible = RecordFile(directory / "impossible.jsonl", read_only=read_only)
        self.attempts = RecordFile(directory / "failed.jsonl", read_only=read_only, repeatable=True)

    def is_done(self, run: Run) -> bool:
        """Whether there is nothing left to do: a failed run is tried again."""
        return run.key in self.results or run.key in self.impossible

    def append(self, record: Record) -> None:
        """Keep a record where it belongs."""
        files = {IMPOSSIBLE: self.impossible, FAILED: self.attempts, None: self.results}
        files[record.get("status")].append(record)

    @property
    def failed(self) -> list[Record]:
        """Runs whose last attempt failed."""
        done = self.results.records.keys() | self.impossible.records.keys()
        return [record for record in self.attempts if record["key"] not in done]

    def all(self) -> list[Record]:
        """Every run's last record."""
        return [*self.results, *self.impossible, *self.failed]


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Hold a directory against a second sweep.

    Raises:
        SweepError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as stream:
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            yield
            return
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SweepError(f"another sweep is writing to {directory}") from None
        yield
