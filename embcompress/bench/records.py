"""Results on disk: one JSON object a line, appended whole, safe to kill at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class SweepError(ValueError):
    """A sweep cannot be run as it was asked for."""


class RecordFile:
    """An append-only file of JSON objects, each with a unique ``"key"``.

    A line that a kill tore is cut off when the file is opened; its run is then done again.

    Args:
        path: the file; it need not exist.
        read_only: leave the file as it is, a torn last line included: a sweep may be in the
            middle of writing it.

    Raises:
        ValueError: a damaged line that is not the last; the message names it.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path, self.read_only = path, read_only
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
        if record["key"] in self.records:
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
