"""Columns of parquet and CSV files as numpy arrays, with masks of the values that are wrong.

Text and typed columns are taken alike, so that a log reads the same whatever its format is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Integer times a second, by the name of their unit.
TIME_UNITS = {"s": 1, "ms": 1000, "us": 1_000_000, "ns": 1_000_000_000}
_MISSING_NUMBERS = ["", "NA", "N/A", "nan", "NaN", "null", "NULL", "None", "\\N"]
_NUMBER = r"^-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"
_INTEGER = r"^-?[0-9]{1,18}$"
_DATE_TIME = "%Y-%m-%d %H:%M:%S"


def _is_text(column: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def _plain(column: Any) -> Any:
    """The column without its dictionary."""
    import pyarrow as pa

    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def numbers(name: str, column: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Values (NaN where missing) and a mask of those that are no finite numbers.

    Raises:
        ValueError: the column is of a type that holds no numbers.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = _plain(column)
    bad = np.zeros(len(column), bool)
    if _is_text(column):
        missing = pc.is_in(column, value_set=pa.array(_MISSING_NUMBERS, column.type))
        missing = pc.or_(missing, pc.is_null(column))
        right = pc.fill_null(pc.match_substring_regex(column, _NUMBER), False)
        bad = ~np.asarray(right) & ~np.asarray(missing)
        column = pc.if_else(right, column, pa.scalar(None, column.type))
    elif not (
        pa.types.is_integer(column.type)
        or pa.types.is_floating(column.type)
        or pa.types.is_boolean(column.type)
        or pa.types.is_decimal(column.type)
        or pa.types.is_null(column.type)
    ):
        raise ValueError(f"column {name!r} is of type {column.type}, which holds no numbers")
    values = pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return values, bad | np.isinf(values)


def labels(
    name: str, column: Any, positive_from: float | None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """0 or 1, and a mask of what is neither; see :class:`ClickLogSchema` for the arguments."""
    import pyarrow.compute as pc

    column = _plain(column)
    if _is_text(column):
        lowered = pc.ascii_lower(column)
        lowered = pc.if_else(pc.equal(lowered, "true"), "1", lowered)
        column = pc.if_else(pc.equal(lowered, "false"), "0", lowered)
    values, bad = numbers(name, column)
    if positive_from is not None:
        return (values >= positive_from).astype(np.uint8), bad | np.isnan(values)
    return (values == 1).astype(np.uint8), ~np.isin(values, (0, 1))


def seconds(name: str, column: Any, unit: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Times in whole seconds, rounded down, and a mask of those that are missing or wrong.

    Args:
        column: timestamps, dates, numbers, or text of integers or of ``YYYY-MM-DD[ HH:MM:SS]``.
        unit: of numbers and integers, a key of :data:`TIME_UNITS`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = _plain(column)
    if pa.types.is_date(column.type):
        column = pc.cast(column, pa.timestamp("s"))
    if pa.types.is_timestamp(column.type):
        unit, column = column.type.unit, pc.cast(column, pa.int64())
    if _is_text(column):
        return _seconds_of_text(column, unit)
    if pa.types.is_integer(column.type):
        missing = np.asarray(column.is_null())
        values = pc.fill_null(column, 0).to_numpy(zero_copy_only=False)
        return values.astype(np.int64) // TIME_UNITS[unit], missing
    floats, bad = numbers(name, column)
    bad |= np.isnan(floats) | (np.abs(floats) >= 2.0**63)
    return np.floor(np.where(bad, 0, floats) / TIME_UNITS[unit]).astype(np.int64), bad


def _seconds_of_text(column: Any, unit: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    import pyarrow as pa
    import pyarrow.compute as pc

    nothing = pa.scalar(None, column.type)
    whole = pc.fill_null(pc.match_substring_regex(column, _INTEGER), False)
    integers = pc.cast(pc.if_else(whole, column, nothing), pa.int64())
    text = pc.replace_substring(pc.if_else(whole, nothing, column), "T", " ")
    text = pc.replace_substring_regex(text, r"(\.[0-9]+)?Z?$", "")
    day = pc.equal(pc.binary_length(text), 10)
    text = pc.if_else(day, pc.binary_join_element_wise(text, "00:00:00", " "), text)
    moments = pc.strptime(text, format=_DATE_TIME, unit="s", error_is_null=True)
    floored = pc.fill_null(integers, 0).to_numpy(zero_copy_only=False) // TIME_UNITS[unit]
    dated = pc.fill_null(pc.cast(moments, pa.int64()), 0).to_numpy(zero_copy_only=False)
    found = np.asarray(whole)
    return np.where(found, floored, dated), ~found & np.asarray(moments.is_null())


def keys(name: str, column: Any) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """64-bit keys of ids, and a mask of missing ones (null, or empty text).

    Integers of a parquet file are their own keys; anything else is the XXH64 of its text.

    Raises:
        ValueError: the column holds lists.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import xxhash

    if pa.types.is_nested(column.type):
        raise ValueError(f"column {name!r} is of type {column.type}: name it under bags, not ids")
    missing = np.asarray(column.is_null())
    if pa.types.is_integer(column.type):
        values = pc.fill_null(column, 0).to_numpy(zero_copy_only=False)
        wide = np.uint64 if values.dtype.kind == "u" else np.int64
        return values.astype(wide).view(np.uint64), missing
    if _is_text(column):
        column = column.view(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())
    texts = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    values = [_bytes(value) for value in texts.dictionary.to_pylist()]
    table = np.array([*(xxhash.xxh64_intdigest(value) for value in values), 0], np.uint64)
    codes = pc.fill_null(texts.indices, len(values)).to_numpy(zero_copy_only=False)
    empty = np.array([*(value == b"" for value in values), True])
    return table[codes], missing | empty[codes]


def _bytes(value: Any) -> bytes:
    return b"" if value is None else value if isinstance(value, bytes) else str(value).encode()


def bag_keys(
    name: str, column: Any, separator: str | None
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Concatenated keys of bags, and the length of each; missing ids are left out.

    Args:
        separator: of text; None: the column holds lists.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if separator is not None:
        column = _plain(column)
        if not _is_text(column):
            raise ValueError(f"bag {name!r} has a separator, but is of type {column.type}")
        column = pc.split_pattern(column, separator)
    elif not pa.types.is_nested(column.type):
        raise ValueError(f"bag {name!r} holds no lists but {column.type}: give its separator")
    counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    found, missing = keys(name, pc.list_flatten(column))
    rows = np.repeat(np.arange(len(counts)), counts)[~missing]
    return found[~missing], np.bincount(rows, minlength=len(counts)).astype(np.int64)
