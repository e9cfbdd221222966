"""Any click log in parquet or CSV files, described by a small schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcompress.data.click_log import ClickLog, ClickLogWriter, Feature
from embcompress.data.delimited import MalformedRows
from embcompress.data.negatives import EventRows, NegativeSampling, SliceSampler
from embcompress.data.progress import RowProgress
from embcompress.data.vocabulary import MISSING_ID, ValueCounter, Vocabulary

_BATCH_ROWS = 1 << 18
_TIME_UNITS = {"s": 1, "ms": 1000, "us": 1_000_000, "ns": 1_000_000_000}


@dataclass(frozen=True)
class ClickLogSchema:
    """What the columns of a click log mean.

    Attributes:
        name: name of the log.
        sources: parquet (``.parquet``) or CSV files, in time order; relative to the schema's file.
        label: column of 0 and 1 (or true and false); None: every row is a click, and
            ``negatives`` must be given.
        positive_from: instead of 0 and 1, a label of at least this value is a click.
        time: column of integers or timestamps, or None: rows are in time order.
        time_unit: of integer times: ``"s"``, ``"ms"``, ``"us"`` or ``"ns"``.
        numbers: numeric columns; a missing number becomes 0.
        log1p: whether numbers become ``log(1 + max(x, 0))``.
        ids: columns with one id a row, integers or strings.
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

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("schema: sources must name at least one file")
        if self.label is None and self.negatives is None:
            raise ValueError("schema: without a label column, negatives must be given")
        if self.time_unit not in _TIME_UNITS:
            raise ValueError(f"schema: time_unit must be one of {list(_TIME_UNITS)}")
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
        text = path.read_text()
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
        schema = _from_mapping(cls, data, str(path))
        return schema

    @property
    def columns(self) -> list[str]:
        """Every column that is read."""
        optional = [name for name in (self.label, self.time) if name is not None]
        return [*optional, *self.numbers, *self.ids, *self.bags]


def _from_mapping(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected a mapping, got {type(data).__name__}")
    known = {item.name for item in fields(cls)}
    unknown = set(data) - known
    if unknown:
        raise ValueError(f"{where}: unknown keys {sorted(unknown)}; known keys: {sorted(known)}")
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
    if isinstance(values.get("negatives"), dict):
        values["negatives"] = _from_mapping(
            NegativeSampling, values["negatives"], f"{where}: negatives"
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


def _batches(path: Path, columns: Sequence[str], malformed: MalformedRows) -> Iterator[Any]:
    """Record batches with the wanted columns of one file."""
    from pyarrow import csv

    if path.suffix == ".parquet":
        file = _open_parquet(path)
        _check_columns(path, columns, file.schema_arrow.names)
        yield from file.iter_batches(_BATCH_ROWS, columns=list(columns))
        return

    def skip(row: Any) -> str:
        malformed.add(path, row.number or 0, f"{row.actual_columns} fields: {row.text[:80]}")
        return "skip"

    with csv.open_csv(
        path,
        read_options=csv.ReadOptions(use_threads=False),
        parse_options=csv.ParseOptions(invalid_row_handler=skip),
    ) as reader:
        _check_columns(path, columns, reader.schema.names)
        for batch in reader:
            yield batch.select(list(columns))


def _check_columns(path: Path, wanted: Sequence[str], present: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in present]
    if missing:
        raise ValueError(f"{path} lacks the columns {missing}; it has {list(present)}")


def _keys(column: Any) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """64-bit keys of a column of ids and a mask of missing ones.

    Integers are their own keys; anything else is the XXH64 of its text.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import xxhash

    missing = np.asarray(column.is_null())
    if pa.types.is_integer(column.type):
        values = pc.cast(pc.fill_null(column, 0), pa.int64()).to_numpy(zero_copy_only=False)
        return values.view(np.uint64), missing
    texts = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    keys = [xxhash.xxh64_intdigest(str(value).encode()) for value in texts.dictionary.to_pylist()]
    table = np.array([*keys, 0], np.uint64)
    codes = pc.fill_null(texts.indices, len(keys)).to_numpy(zero_copy_only=False)
    empty = np.array([*(value == "" for value in texts.dictionary.to_pylist()), True])
    return table[codes], missing | empty[codes]


def _bag_keys(column: Any, separator: str | None) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Concatenated keys of a bag column and the length of each bag; missing ids are left out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if separator is not None:
        column = pc.split_pattern(pc.cast(column, pa.string()), separator)
    counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    keys, missing = _keys(pc.list_flatten(column))
    rows = np.repeat(np.arange(len(counts)), counts)[~missing]
    return keys[~missing], np.bincount(rows, minlength=len(counts)).astype(np.int64)


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

    def blocks(self) -> Iterator[tuple[Path, int, _Block]]:
        """(file, its rows in this block, the block)."""
        self.malformed = MalformedRows(self.schema.max_malformed)
        seen = 0
        for path in self.sources:
            row = 0
            for batch in _batches(path, self.schema.columns, self.malformed):
                yield path, batch.num_rows, self._parse(path, row, batch)
                row += batch.num_rows
                seen += batch.num_rows
                self.malformed.check(seen, final=False)
        self.malformed.check(seen + self.malformed.count, final=True)

    def _parse(self, path: Path, first_row: int, batch: Any) -> _Block:
        schema = self.schema
        label, bad = self._labels(batch)
        time, bad_time = self._times(batch)
        bad = bad | bad_time
        for row in np.flatnonzero(bad):
            self.malformed.add(path, first_row + int(row) + 1, "label or time is missing or wrong")
        if bad.any():
            batch = batch.filter(~bad)
            label, time = label[~bad], None if time is None else time[~bad]
        pairs = [_keys(batch[name]) for name in schema.ids]
        return _Block(
            label,
            time,
            self._numbers(batch),
            [keys for keys, _ in pairs],
            [missing for _, missing in pairs],
            [_bag_keys(batch[name], separator) for name, separator in schema.bags.items()],
        )

    def _labels(self, batch: Any) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        import pyarrow.compute as pc

        if self.schema.label is None:
            return np.ones(batch.num_rows, np.uint8), np.zeros(batch.num_rows, bool)
        values = pc.cast(batch[self.schema.label], "double").to_numpy(zero_copy_only=False)
        if self.schema.positive_from is not None:
            return (values >= self.schema.positive_from).astype(np.uint8), np.isnan(values)
        return (values == 1).astype(np.uint8), ~np.isin(values, (0, 1))

    def _times(self, batch: Any) -> tuple[NDArray[np.int64] | None, NDArray[np.bool_]]:
        import pyarrow as pa
        import pyarrow.compute as pc

        if self.schema.time is None:
            return None, np.zeros(batch.num_rows, bool)
        column = batch[self.schema.time]
        if pa.types.is_timestamp(column.type):
            column = pc.cast(pc.cast(column, pa.timestamp("s"), safe=False), pa.int64())
            unit = 1
        else:
            unit = _TIME_UNITS[self.schema.time_unit]
        missing = np.asarray(column.is_null())
        values = pc.cast(pc.fill_null(column, 0), pa.int64()).to_numpy(zero_copy_only=False)
        return values // unit, missing

    def _numbers(self, batch: Any) -> NDArray[np.float32]:
        import pyarrow.compute as pc

        dense = np.empty((batch.num_rows, len(self.schema.numbers)), np.float32)
        for position, name in enumerate(self.schema.numbers):
            values = pc.cast(batch[name], "double").to_numpy(zero_copy_only=False)
            values = np.nan_to_num(values, nan=0.0)
            dense[:, position] = np.log1p(np.maximum(values, 0)) if self.schema.log1p else values
        return dense


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
        np.save(writer.partial / f"vocabulary_{name}.npy", vocabulary.values_by_id)
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
        for _, rows, block in reader.blocks():
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
