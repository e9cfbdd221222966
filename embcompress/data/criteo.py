"""Criteo Kaggle and Terabyte: tab-separated text to a prepared click log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcompress.data.click_log import ClickLog
from embcompress.data.delimited import Block, MalformedRows, read_columns, right_rows
from embcompress.data.preparation import Preparation, TextFormat, TextRows, TextSettings

INTEGERS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
COLUMNS = ("label", *INTEGERS, *CATEGORIES)


@dataclass(frozen=True)
class CriteoSettings(TextSettings):
    """How Criteo text is prepared; see :class:`~embcompress.data.preparation.TextSettings`."""


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


def parse_block(block: Block, malformed: MalformedRows) -> TextRows:
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
    return TextRows(label[right].astype(np.uint8), dense[right], values[right], missing[right])


class CriteoFormat(TextFormat):
    """Tab-separated, no header: label, 13 integers, 26 categories of 8 hex digits."""

    name = "criteo"
    dense_names = INTEGERS
    fields = CATEGORIES
    value_type = np.uint32

    def parse(self, block: Block, malformed: MalformedRows) -> TextRows:
        return parse_block(block, malformed)


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
    preparation = Preparation(CriteoFormat(), files, target, settings, progress)
    preparation.count()
    return preparation.write()
