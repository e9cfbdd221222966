"""Delimited text in blocks of whole lines: gz accepted, bad lines found by number.

For files without quoting, such as Criteo's and MovieLens's: a line is right when it has the
right number of delimiters. What the fields hold is for the caller to judge.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 8 << 20
_SHOWN = 10
_SHOWN_CHARACTERS = 80


class MalformedRowsError(ValueError):
    """More malformed rows than the threshold allows."""


@dataclass
class MalformedRows:
    """Counts malformed rows, remembers the first ones, and stops a hopeless file early.

    Attributes:
        limit: largest share of malformed rows that is tolerated.
        count: malformed rows so far.
        examples: ``"file:line: why"`` of the first ones.
    """

    limit: float
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.limit <= 1:
            raise ValueError(f"max_malformed is a share in [0, 1], got {self.limit}")

    def add(self, path: Path, line: int, why: str) -> None:
        self.count += 1
        if len(self.examples) < _SHOWN:
            self.examples.append(f"{path.name}:{line}: {why}")

    def check(self, rows: int, *, final: bool) -> None:
        """Raise if too many of ``rows`` rows were malformed; early only on a clear case."""
        if self.count > self.limit * max(rows, 1) and (final or self.count >= 1000):
            shown = "\n  ".join(self.examples)
            raise MalformedRowsError(
                f"{self.count} of {rows} rows are malformed, more than max_malformed="
                f"{self.limit:g} allows; the first ones:\n  {shown}"
            )


@dataclass(frozen=True)
class Block:
    """Whole lines of one file.

    Attributes:
        data: the bytes, ending with a newline.
        first_line: number of the first line, from 1.
        end: byte offset after the block in the uncompressed file.
    """

    path: Path
    data: bytes
    first_line: int
    end: int


def open_text(path: Path) -> IO[bytes]:
    """The file's bytes; decompressed when its name ends in ``.gz``."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def blocks(
    path: Path, *, start: int = 0, first_line: int = 1, size: int = BLOCK_BYTES
) -> Iterator[Block]:
    """Blocks of whole lines from byte ``start`` on, of at most ``size`` bytes.

    Begun again where a block ended, the blocks that follow are the same.

    Raises:
        ValueError: the file is damaged, or no text: a line is longer than ``size``.
    """
    with open_text(path) as stream:
        rest, position, line = b"", start, first_line
        while True:
            try:
                if not rest:  # at the start; later the stream stands there already
                    stream.seek(position)
                data = stream.read(size - len(rest))
            except (EOFError, OSError, zlib.error) as error:
                raise ValueError(f"{path} is truncated or damaged: {error}") from error
            text = rest + data
            if not data:
                if text:  # the last line has no newline
                    yield Block(path, text + b"\n", line, position + len(text))
                return
            cut = text.rfind(b"\n") + 1
            if cut == 0:
                if len(text) >= size:
                    raise ValueError(f"{path}:{line} is longer than {size} bytes; is it text?")
                rest = text
                continue
            position += cut
            yield Block(path, text[:cut], line, position)
            line += text.count(b"\n", 0, cut)
            rest = text[cut:]


def read_columns(
    block: Block, delimiter: bytes, names: Sequence[str], malformed: MalformedRows
) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """The fields of a block as pyarrow string arrays, and the line number of each row.

    Lines with another number of fields are counted as malformed and left out.
    """
    import pyarrow as pa
    from pyarrow import csv

    text = block.data
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n")
    data = np.frombuffer(text, dtype=np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    found = np.searchsorted(np.flatnonzero(data == ord(delimiter)), ends)
    fields = np.diff(found, prepend=0) + 1
    # A carriage return inside a line would end it for the parser below.
    broken = np.zeros(len(ends), bool)
    broken[np.searchsorted(ends, np.flatnonzero(data == ord("\r")))] = True
    right = (fields == len(names)) & ~broken
    lines = block.first_line + np.flatnonzero(right)
    if not right.all():
        starts = np.concatenate([[0], ends[:-1] + 1])
        for bad in np.flatnonzero(~right):
            why = f"{fields[bad]} fields instead of {len(names)}"
            if broken[bad]:
                why = "a carriage return inside the line"
            malformed.add(block.path, block.first_line + int(bad), why)
        keep = np.flatnonzero(right)
        text = b"".join(text[starts[i] : ends[i] + 1] for i in keep)
    if not len(lines):
        return {name: pa.array([], pa.string()) for name in names}, lines
    table = csv.read_csv(
        pa.BufferReader(text),
        read_options=csv.ReadOptions(column_names=list(names), block_size=len(text) + 1),
        parse_options=csv.ParseOptions(
            delimiter=delimiter.decode(), quote_char=False, ignore_empty_lines=False
        ),
        convert_options=csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            strings_can_be_null=False,
            check_utf8=False,
        ),
    )
    return {name: table[name].combine_chunks() for name in names}, lines


def right_rows(
    path: Path,
    lines: NDArray[np.int64],
    columns: Mapping[str, Any],
    bad: Mapping[str, NDArray[np.bool_]],
    malformed: MalformedRows,
) -> NDArray[np.bool_]:
    """Mask of the rows that are bad in no column; the others are counted, shown by value.

    Args:
        lines: (n,) line number of each row.
        columns: name -> pyarrow array of n values.
        bad: name -> (n,) mask of the bad values.
    """
    wrong = np.logical_or.reduce(list(bad.values()))
    for row in np.flatnonzero(wrong):
        name = next(name for name, mask in bad.items() if mask[row])
        malformed.add(path, int(lines[row]), f"{name} = {_shown(columns[name][int(row)])}")
    return ~wrong


def _shown(value: Any) -> str:
    """A pyarrow value for a message, even if it is not UTF-8."""
    try:
        text = repr(value.as_py())
    except UnicodeDecodeError:
        text = repr(value.as_buffer().to_pybytes())
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
