"""Avazu: comma-separated impressions of mobile advertisements to a prepared click log."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcompress.data import columns as column_values
from embcompress.data.click_log import ClickLog
from embcompress.data.delimited import Block, MalformedRows, open_text, read_columns, right_rows
from embcompress.data.preparation import Preparation, TextFormat, TextRows, TextSettings

LABEL, HOUR = "click", "hour"
#: Fields whose texts are ids; ``id`` is none of them: every row has another.
TEXTS = (
    "C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain",
    "app_category", "device_id", "device_ip", "device_model", "device_type", "device_conn_type",
    *(f"C{number}" for number in range(14, 22)),
)  # fmt: skip
#: What is made of ``hour``.
TIMES = ("hour_of_day", "weekday")
_LONGEST_HEADER = 1 << 16


@dataclass(frozen=True)
class AvazuSettings(TextSettings):
    """How Avazu text is prepared; see :class:`~embcompress.data.preparation.TextSettings`."""


def _seconds(column: Any) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Seconds of hours written ``YYMMDDHH``, and a mask of those that are none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    right = pc.match_substring_regex(column, r"^[0-9]{8}$")
    text = pc.if_else(right, column, pa.scalar(None, column.type))
    moments = pc.strptime(text, format="%y%m%d%H", unit="s", error_is_null=True)
    seconds = pc.fill_null(pc.cast(moments, pa.int64()), 0).to_numpy(zero_copy_only=False)
    return seconds, np.asarray(moments.is_null())


class AvazuFormat(TextFormat):
    """Comma-separated, with a header: an id, ``click``, ``hour`` (YYMMDDHH) and fields of ids.

    Columns are found by their names, in any order; others are not read. Fields are told apart as
    they are written, by the XXH64 of their text; an empty one is missing. Two more are made of the
    hour: the hour of the day (0 to 23) and the weekday (0 is Monday).
    """

    name = "avazu"
    dense_names = ()
    fields = (*TIMES, *TEXTS)
    value_type = np.uint64
    has_time = True

    def __init__(self) -> None:
        self._headers: dict[Path, list[str]] = {}

    def start(self, path: Path) -> tuple[int, int]:
        try:
            with open_text(path) as stream:
                line = stream.readline(_LONGEST_HEADER)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from error
        names = line.decode("utf-8-sig", "replace").strip().split(",")
        missing = [name for name in (LABEL, HOUR, *TEXTS) if name not in names]
        if missing:
            hint = "; Avazu's test file has no labels: use the train file" * (missing == [LABEL])
            raise ValueError(f"{path} lacks the columns {missing}; it has {names}{hint}")
        if len(set(names)) < len(names):
            raise ValueError(f"{path} has a column twice: {names}")
        self._headers[path] = names
        return len(line), 2

    def parse(self, block: Block, malformed: MalformedRows) -> TextRows:
        columns, lines = read_columns(block, b",", self._headers[block.path], malformed)
        label, label_bad = column_values.labels(LABEL, columns[LABEL], None)
        seconds, hour_bad = _seconds(columns[HOUR])
        bad = {LABEL: label_bad, HOUR: hour_bad}
        right = right_rows(block.path, lines, columns, bad, malformed)
        values = np.empty((len(lines), len(self.fields)), np.uint64)
        missing = np.zeros(values.shape, bool)
        values[:, 0] = seconds // 3600 % 24
        values[:, 1] = (seconds // 86400 + 3) % 7  # the first day of 1970 was a Thursday
        for position, name in enumerate(TEXTS, len(TIMES)):
            values[:, position], missing[:, position] = column_values.keys(name, columns[name])
        dense = np.empty((int(right.sum()), 0), np.float32)
        return TextRows(label[right], dense, values[right], missing[right], seconds[right])


def prepare_avazu(
    files: Sequence[Path],
    target: Path,
    settings: AvazuSettings = AvazuSettings(),
    *,
    progress: bool = True,
) -> ClickLog:
    """Prepare Avazu text files, in the given (time) order.

    Ids: 0 is unknown or rarer than ``min_count``, 1 is missing, then the values of each field by
    falling count (ties by value). Interrupted at any moment, the next call goes on.

    Args:
        files: comma-separated with a header line, as Kaggle's ``train.csv``; ``.gz`` accepted.
        target: directory of the prepared log.

    Raises:
        ValueError: a file lacks a column; names it.
        MalformedRowsError: more malformed rows than ``settings.max_malformed`` allows.
    """
    preparation = Preparation(AvazuFormat(), files, target, settings, progress)
    preparation.count()
    return preparation.write()
