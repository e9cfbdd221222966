"""Any click log in parquet or CSV files, described by a small schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from embcompress.data import columns as column_values
from embcompress.data.click_log import ClickLog, ClickLogWriter, Feature
from embcompress.data.columns import TIME_UNITS
from embcompress.data.delimited import MalformedRows, right_rows
from embcompress.data.negatives import EventRows, NegativeSampling, SliceSampler
from embcompress.data.progress import RowProgress
from embcompress.data.vocabulary import MISSING_ID, ValueCounter, Vocabulary

_BATCH_ROWS = 1 << 18
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ClickLogSchema:
    """What the columns of a click log mean.

    Attributes:
        name: name of the log.
        sources: parquet (``.parquet``) or CSV files (any other name; with a header line, gz
            accepted), in time order; relative to the schema's file.
        delimiter: between the fields of a CSV file.
        label: column of 0 and 1 (or true and false); None: every row is a click, and
            ``negatives`` must be given.
        positive_from: instead of 0 and 1, a label of at least this value is a click.
        time: column of numbers, timestamps, dates, or text such as ``2014-10-21 07:00:00`` (UTC);
            None: rows are in time order.
        time_unit: of times that are numbers: ``"s"``, ``"ms"``, ``"us"`` or ``"ns"``.
        numbers: numeric columns; a missing number becomes 0.
        log1p: whether numbers become ``log(1 + max(x, 0))``.
        ids: columns with one id a row, integers or strings; null and "" are missing.
        bags: columns with several ids a row: name -> separator of a string column, or null for a
            list column.
        min_count: values seen less often become the "unknown" id 0.
        negatives: negatives to draw, or None.
        max_malformed: largest share of malformed rows that is tolerated.
    """

    name: str
    sources: tuple[str, ...]
    ids: tuple[str, ...]
    label: str | None = None
    positive_from: float | None = None
    time: str | None = None
    time_unit: str = "s"
    numbers: tuple[str, ...] = ()
    log1p: bool = False
    bags: dict[str, str | None] = field(default_factory=dict)
    min_count: int = 1
    negatives: NegativeSampling | None = None
    max_malformed: float = 0.001
    delimiter: str = ","

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("schema: sources must name at least one file")
        if self.label is None and self.negatives is None:
            raise ValueError("schema: without a label column, negatives must be given")
        if self.time_unit not in TIME_UNITS:
            raise ValueError(f"schema: time_unit must be one of {list(TIME_UNITS)}")
        names = [*self.ids, *self.bags]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"schema: ids and bags must name each column once, got {names}")
        if self.min_count < 1 or len(self.delimiter) != 1:
            raise ValueError("schema: min_count must be at least 1, delimiter one character")
        if not 0 <= self.max_malformed <= 1:
            raise ValueError("schema: max_malformed is a share in [0, 1]")
        if self.negatives is not None:
            if self.time is None:
                raise ValueError("schema: negatives are drawn from time slices; name a time column")
            unknown = set(self.negatives.columns) - set(self.ids)
            if unknown:
                raise ValueError(f"schema: negatives.columns {sorted(unknown)} are not in ids")

    @classmethod
    def load(cls, path: Path) -> ClickLogSchema:
        """Read a schema from YAML or JSON; unknown keys are refused.

        Raises:
            ValueError: the file is no schema; names the key and those that are known.
        """
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            import yaml

            try:
                data = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(f"{path}: not YAML: {error}") from error
        else:
            try:
                data = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: not JSON: {error}") from error
        schema: ClickLogSchema = _from_mapping(cls, data, str(path))
        return schema

    @property
    def columns(self) -> list[str]:
        """Every column that is read."""
        optional = [name for name in (self.label, self.time) if name is not None]
        return [*optional, *self.numbers, *self.ids, *self.bags]


_KINDS = {
    "str": "text",
    "str | None": "text or null",
    "int": "an integer",
    "float": "a number",
    "float | None": "a number or null",
    "bool": "true or false",
    "tuple[str, ...]": "a list of names",
    "dict[str, str | None]": "a mapping of names to separators (null for list columns)",
    "NegativeSampling | None": "a mapping or null",
}


def _has_type(value: Any, kind: str) -> bool:
    """Whether a value read from YAML or JSON fits a field's annotation, a key of ``_KINDS``."""
    if kind.endswith(" | None") and value is None:
        return True
    if kind.startswith("tuple"):
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if kind.startswith("dict"):
        return isinstance(value, dict) and all(
            isinstance(key, str) and isinstance(item, str | None) for key, item in value.items()
        )
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    numbers = {"int": int, "float": (int, float), "float | None": (int, float)}
    named = NegativeSampling if kind.startswith("NegativeSampling") else str
    return isinstance(value, numbers.get(kind, named))  # type: ignore[arg-type]


def _from_mapping(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected a mapping, got {type(data).__name__}")
    known = {item.name for item in fields(cls)}
    unknown = set(data) - known
    if unknown:
        raise ValueError(f"{where}: unknown keys {sorted(unknown)}; known keys: {sorted(known)}")
    missing = {item.name for item in fields(cls) if item.default is item.default_factory} - set(
        data
    )
    if missing:
        raise ValueError(f"{where}: {sorted(missing)} must be given")
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
    if isinstance(values.get("negatives"), dict):
        values["negatives"] = _from_mapping(
            NegativeSampling, values["negatives"], f"{where}: negatives"
        )
    for item in fields(cls):
        if item.name in values and not _has_type(values[item.name], str(item.type)):
            raise ValueError(
                f"{where}: {item.name} must be {_KINDS[str(item.type)]}, got {data[item.name]!r}"
            )
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


# ------------------------------------------------------------------------------------ reading


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file, or damaged: {error}") from error


@dataclass(frozen=True)
class _RawRows:
    """A record batch and the (n,) line (CSV) or row (parquet) number of each of its rows."""

    batch: Any
    numbers: NDArray[np.int64]


def _raw_rows(path: Path, schema: ClickLogSchema, malformed: MalformedRows) -> Iterator[_RawRows]:
    """The wanted columns of one file."""
    if path.suffix != ".parquet":
        yield from _csv_rows(path, schema, malformed)
        return
    file, row = _open_parquet(path), 1
    _check_columns(path, schema.columns, file.schema_arrow.names)
    for batch in file.iter_batches(_BATCH_ROWS, columns=schema.columns):
        yield _RawRows(batch, np.arange(row, row + batch.num_rows))
        row += batch.num_rows


def _csv_rows(path: Path, schema: ClickLogSchema, malformed: MalformedRows) -> Iterator[_RawRows]:
    """Every value as text: a type guessed from the first rows may be wrong for later ones."""
    import pyarrow as pa
    from pyarrow import csv

    skipped: list[int] = []

    def skip(row: Any) -> str:
        skipped.append(row.number)
        why = f"{row.actual_columns} fields instead of {row.expected_columns}"
        malformed.add(path, row.number, f"{why}: {row.text[:80]}")
        return "skip"

    parse = csv.ParseOptions(
        delimiter=schema.delimiter, invalid_row_handler=skip, ignore_empty_lines=False
    )
    read = csv.ReadOptions(use_threads=False)  # rows have numbers then
    text = dict.fromkeys(schema.columns, pa.string())
    convert = csv.ConvertOptions(column_types=text, strings_can_be_null=False, check_utf8=False)
    try:
        with csv.open_csv(path, read, parse, convert) as reader:
            _check_columns(path, schema.columns, reader.schema.names)
            line = 2
            for batch in reader:
                numbers = _numbers_around(skipped, line, batch.num_rows)
                line = int(numbers[-1]) + 1 if len(numbers) else line
                yield _RawRows(batch.select(schema.columns), numbers)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: {error}") from error


def _numbers_around(skipped: Sequence[int], first: int, count: int) -> NDArray[np.int64]:
    """``count`` rising numbers from ``first`` on, without the skipped ones."""
    later = [number for number in skipped if number >= first]
    candidates = np.arange(first, first + count + len(later))
    return np.setdiff1d(candidates, later)[:count]


def _check_columns(path: Path, wanted: Sequence[str], present: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in present]
    if missing:
        raise ValueError(f"{path} lacks the columns {missing}; it has {list(present)}")


@dataclass(frozen=True)
class _Block:
    """Parsed rows with keys in place of ids."""

    label: NDArray[np.uint8]
    time: NDArray[np.int64] | None
    dense: NDArray[np.float32]
    keys: list[NDArray[np.uint64]]
    missing: list[NDArray[np.bool_]]
    bags: list[tuple[NDArray[np.uint64], NDArray[np.int64]]]


class _Reader:
    """Parsed blocks of all sources, malformed rows left out."""

    def __init__(self, schema: ClickLogSchema, sources: Sequence[Path]) -> None:
        self.schema, self.sources = schema, sources
        self.malformed = MalformedRows(schema.max_malformed)

    def blocks(self) -> Iterator[tuple[int, _Block]]:
        """(rows of the file in this block, the block)."""
        self.malformed = MalformedRows(self.schema.max_malformed)
        right = 0
        for path in self.sources:
            for raw in _raw_rows(path, self.schema, self.malformed):
                try:
                    block = self._parse(path, raw)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
                yield raw.batch.num_rows, block
                right += len(block.label)
                self.malformed.check(right + self.malformed.count, final=False)
        self.malformed.check(right + self.malformed.count, final=True)

    def _parse(self, path: Path, raw: _RawRows) -> _Block:
        schema, batch, bad = self.schema, raw.batch, {}
        label, time = np.ones(batch.num_rows, np.uint8), None
        if schema.label is not None:
            label, bad[schema.label] = column_values.labels(
                schema.label, batch[schema.label], schema.positive_from
            )
        if schema.time is not None:
            time, bad[schema.time] = column_values.seconds(
                schema.time, batch[schema.time], schema.time_unit
            )
        dense = np.empty((batch.num_rows, len(schema.numbers)), np.float32)
        for position, name in enumerate(schema.numbers):
            values, bad[name] = column_values.numbers(name, batch[name])
            dense[:, position] = self._dense(np.where(bad[name], 0.0, values))
        if bad:
            columns = {name: batch[name] for name in bad}
            right = right_rows(path, raw.numbers, columns, bad, self.malformed)
            if not right.all():
                batch, label, dense = batch.filter(right), label[right], dense[right]
                time = None if time is None else time[right]
        pairs = [column_values.keys(name, batch[name]) for name in schema.ids]
        return _Block(
            label,
            time,
            dense,
            [keys for keys, _ in pairs],
            [missing for _, missing in pairs],
            [
                column_values.bag_keys(name, batch[name], separator)
                for name, separator in schema.bags.items()
            ],
        )

    def _dense(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        values = np.nan_to_num(values, nan=0.0)
        if self.schema.log1p:
            return np.log1p(np.maximum(values, 0.0))
        return np.clip(values, -_LARGEST, _LARGEST)


# -------------------------------------------------------------------------------- preparation


def prepare_schema(
    schema: ClickLogSchema, sources: Sequence[Path], target: Path, *, progress: bool = True
) -> ClickLog:
    """Prepare a click log that a schema describes, in two passes of bounded memory.

    Ids: 0 is unknown or rarer than ``min_count``, 1 is missing, then values by falling count.
    """
    reader = _Reader(schema, sources)
    names = [*schema.ids, *schema.bags]
    counters = [ValueCounter() for _ in names]
    rows, bag_ids = _count(reader, counters, progress)
    vocabularies = [
        Vocabulary.from_counts(*counter.result(), min_count=schema.min_count)
        for counter in counters
    ]
    copies = 1 if schema.negatives is None else 1 + schema.negatives.per_positive
    features = tuple(
        Feature(name, len(vocabulary), name in schema.bags)
        for name, vocabulary in zip(names, vocabularies, strict=True)
    )
    writer = ClickLogWriter(
        target, name=schema.name, features=features, dense_names=schema.numbers,
        rows=rows * copies, has_time=schema.time is not None,
        bag_ids={len(schema.ids) + i: count * copies for i, count in enumerate(bag_ids)},
    )  # fmt: skip
    _Sink(schema, writer).write_all(_encoded(reader, vocabularies, progress))
    for name, vocabulary in zip(names, vocabularies, strict=True):
        file = f"vocabulary_{quote(name, safe='')}.npy"
        np.save(writer.partial / file, vocabulary.values_by_id())
    return writer.finish(
        settings=asdict(schema),
        malformed=reader.malformed.count,
        malformed_examples=reader.malformed.examples,
    )


def _with_progress(reader: _Reader, title: str, progress: bool) -> Iterator[_Block]:
    """The reader's blocks, shown by rows where the number of rows is known."""
    total = sum(
        _open_parquet(path).metadata.num_rows if path.suffix == ".parquet" else 0
        for path in reader.sources
    )
    with RowProgress(title, total or 1, visible=progress) as bar:
        for rows, block in reader.blocks():
            yield block
            bar.advance(rows, rows)


def _count(
    reader: _Reader, counters: Sequence[ValueCounter], progress: bool
) -> tuple[int, list[int]]:
    """Pass 1: rows, and ids of each bag column."""
    rows, bag_ids = 0, [0] * len(reader.schema.bags)
    for block in _with_progress(reader, "counting values", progress):
        rows += len(block.label)
        singles = [keys[~missing] for keys, missing in zip(block.keys, block.missing, strict=True)]
        for counter, keys in zip(counters, [*singles, *(k for k, _ in block.bags)], strict=True):
            counter.add(keys)
        for number, (keys, _) in enumerate(block.bags):
            bag_ids[number] += len(keys)
    return rows, bag_ids


def _encoded(
    reader: _Reader, vocabularies: Sequence[Vocabulary], progress: bool
) -> Iterator[EventRows]:
    """Pass 2: blocks with ids."""
    count = len(reader.schema.ids)
    for block in _with_progress(reader, "writing ids", progress):
        ids = np.empty((len(block.label), count), np.int64)
        for position in range(count):
            ids[:, position] = vocabularies[position].encode(block.keys[position])
            ids[block.missing[position], position] = MISSING_ID
        bags = [
            (vocabulary.encode(keys), counts)
            for vocabulary, (keys, counts) in zip(vocabularies[count:], block.bags, strict=True)
        ]
        yield EventRows(block.label, block.time, block.dense, ids, bags)


class _Sink:
    """Writes blocks, with negatives where the schema wants them."""

    def __init__(self, schema: ClickLogSchema, writer: ClickLogWriter) -> None:
        self.writer, self.first_bag = writer, len(schema.ids)
        self.rows, self.bag_ids = 0, [0] * len(schema.bags)
        self.sampler = (
            None
            if schema.negatives is None
            else SliceSampler(
                schema.negatives, [schema.ids.index(name) for name in schema.negatives.columns]
            )
        )

    def write_all(self, blocks: Iterator[EventRows]) -> None:
        for block in blocks:
            for part in [block] if self.sampler is None else self.sampler.add(block):
                self._write(part)
        if self.sampler is not None:
            for part in self.sampler.finish():
                self._write(part)

    def _write(self, rows: EventRows) -> None:
        times = {} if rows.time is None else {"time": rows.time}
        self.writer.write(self.rows, label=rows.label, dense=rows.dense, ids=rows.ids, **times)
        for number, (ids, counts) in enumerate(rows.bags):
            self.bag_ids[number] = self.writer.write_bag(
                self.first_bag + number, self.rows, self.bag_ids[number], ids, counts
            )
        self.rows += len(rows.label)
