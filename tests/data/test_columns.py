"""Columns of parquet and CSV files, and logs that read the same from both."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from embcompress.data import ClickLog, ClickLogSchema, NegativeSampling, prepare_schema
from embcompress.data.columns import bag_keys, keys, labels, numbers, seconds


def test_numbers_of_every_type() -> None:
    values, bad = numbers("x", pa.array(["1", "-2.5e1", "", "NA", "x", "1 2", "1e999", None, ".5"]))
    assert bad.tolist() == [False, False, False, False, True, True, True, False, False]
    np.testing.assert_array_equal(values[~bad], [1, -25, np.nan, np.nan, np.nan, 0.5])
    assert numbers("x", pa.array([2**60, None]))[0].tolist()[0] == 2.0**60
    assert numbers("x", pa.array([np.inf, -np.inf, np.nan]))[1].tolist() == [True, True, False]
    with pytest.raises(ValueError, match=r"'x' is of type date32.*holds no numbers"):
        numbers("x", pa.array([datetime.date(2020, 1, 1)]))


def test_labels() -> None:
    values, bad = labels("y", pa.array(["1", "0", "True", "false", "2", "", None]), None)
    assert values[:4].tolist() == [1, 0, 1, 0] and bad.tolist() == [False] * 4 + [True] * 3
    values, bad = labels("y", pa.array([5.0, 3.5, None]), 4.0)
    assert values[:2].tolist() == [1, 0] and bad.tolist() == [False, False, True]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["2020-01-02T03:04:05.75Z", "2020-01-02 00:00:00", "1969-12-31 23:59:59"]),
        pa.array(["1577934245999", "1577923200000", "-1"]),
        pa.array([1577934245999, 1577923200000, -1]),
        pa.array([1577934245999.5, 1577923200000.0, -0.5]),
        pa.array([1577934245999, 1577923200000, -1], pa.timestamp("ms", "UTC")),
        pa.array(["1577934245999", "2020-01-02", "-1"]).dictionary_encode(),
    ],
)
def test_times_are_whole_seconds_rounded_down(column: pa.Array) -> None:
    values, bad = seconds("t", column, "ms")
    assert values.tolist() == [1577934245, 1577923200, -1] and not bad.any()


def test_wrong_times_are_found() -> None:
    text = pa.array(["junk", "2020-13-01", "2020-01-01 25:00:00", "", None, "2020-01-01"])
    assert seconds("t", text, "s")[1].tolist() == [True] * 5 + [False]
    assert seconds("t", pa.array([None, 1.0, np.nan, 1e300]), "s")[1].tolist() == [
        True,
        False,
        True,
        True,
    ]
    days = pa.array([datetime.date(1970, 1, 2), None])
    assert seconds("t", days, "ms")[0][0] == 86400


def test_keys_of_integers_and_text() -> None:
    large, missing = keys("u", pa.array([2**64 - 1, 5, None], pa.uint64()))
    assert large[:2].tolist() == [2**64 - 1, 5] and missing.tolist() == [False, False, True]
    assert keys("u", pa.array([-1], pa.int8()))[0][0] == 2**64 - 1
    text = pa.array(["a", "", "b", None, "a"])
    found, missing = keys("u", text)
    assert missing.tolist() == [False, True, False, True, False]
    assert found[0] == found[4] == 0xD24EC4F1A98C6E5B  # XXH64 of "a", as xxhsum prints it
    for other in (text.dictionary_encode(), text.cast(pa.large_string()), text.cast(pa.binary())):
        assert (keys("u", other)[0][~missing] == found[~missing]).all()
    with pytest.raises(ValueError, match="name it under bags"):
        keys("u", pa.array([[1]]))
    with pytest.raises(ValueError, match="give its separator"):
        bag_keys("u", pa.array(["a b"]), None)


def write_both(directory: Path, rows: int, spoiled: list[int]) -> tuple[Path, Path]:
    """The same rows as parquet (without the spoiled ones) and as CSV."""
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "y": rng.integers(0, 2, rows),
            "at": 1_500_000_000 + np.arange(rows),
            "price": rng.normal(size=rows),
            "user": pa.array([f"user {n}" for n in rng.zipf(1.5, rows) % 1000]),
            "tags": pa.array([" ".join(f"t{n}" for n in range(n % 4)) for n in range(rows)]),
        }
    )
    pa_csv.write_csv(table, directory / "log.csv")
    lines = (directory / "log.csv").read_text().splitlines()
    for kind, line in enumerate(spoiled):
        text = ("1", "maybe" + lines[line - 1][1:], lines[line - 1].replace(",15", ",x15"))
        lines[line - 1] = text[kind % 3]
    (directory / "log.csv").write_text("\n".join(lines) + "\n")
    keep = np.ones(rows, bool)
    keep[np.array(spoiled) - 2] = False
    pq.write_table(table.filter(keep), directory / "log.parquet")
    return directory / "log.parquet", directory / "log.csv"


def columns_of(log: ClickLog) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in log.directory.glob("*.npy")}


def test_csv_and_parquet_give_the_same_and_bad_lines_are_named(tmp_path: Path) -> None:
    spoiled = [2, 3, 17, 20_000, 35_000, 35_001, 35_002]  # in several blocks of the reader
    parquet, text = write_both(tmp_path, 40_000, spoiled)
    schema = ClickLogSchema(
        name="log",
        sources=("log",),
        label="y",
        time="at",
        numbers=("price",),
        ids=("user",),
        bags={"tags": " "},
    )
    one = prepare_schema(schema, [parquet], tmp_path / "one", progress=False)
    two = prepare_schema(schema, [text], tmp_path / "two", progress=False)
    assert columns_of(one) == columns_of(two)
    named = [int(example.split(":")[1]) for example in two.meta["malformed_examples"]]
    assert sorted(named) == spoiled and two.meta["malformed"] == len(spoiled)


def test_a_type_that_changes_late_is_no_error(tmp_path: Path) -> None:
    lines = ["1\t5"] * 300_000 + ["0\tabc", "1\t5"]
    (tmp_path / "log.tsv").write_text("y\tu\n" + "\n".join(lines) + "\n")
    schema = ClickLogSchema(name="log", sources=("x",), label="y", ids=("u",), delimiter="\t")
    log = prepare_schema(schema, [tmp_path / "log.tsv"], tmp_path / "out", progress=False)
    assert log.batch(slice(300_000, 300_002)).ids.tolist() == [3, 2]


def test_labels_stay_when_negatives_are_drawn(tmp_path: Path) -> None:
    table = pa.table({"y": [0, 1, 0, 1], "t": [-5, -4, -3, -2], "u": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "log.parquet")
    negatives = NegativeSampling(("u",), per_positive=2)
    schema = ClickLogSchema(
        name="log", sources=("x",), label="y", time="t", ids=("u",), negatives=negatives
    )
    log = prepare_schema(schema, [tmp_path / "log.parquet"], tmp_path / "out", progress=False)
    assert log.labels.reshape(4, 3).tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sources: x.parquet", "sources must be a list of names, got 'x.parquet'"),
        ("min_count: many", "min_count must be an integer"),
        ("log1p: 1", "log1p must be true or false"),
        ("bags: [x]", "bags must be a mapping of names to separators"),
        ("negatives: {columns: u}", "negatives: columns must be a list of names"),
        ("negatives: {slice: 1h}", r"negatives: \['columns'\] must be given"),
        ("ids: [u, u]", "must name each column once"),
        ("time_unit: weeks", "time_unit must be one of"),
        ("max_malformed: 7", "max_malformed is a share"),
    ],
)
def test_schema_values_of_the_wrong_kind(line: str, message: str, tmp_path: Path) -> None:
    lines = {"name": "name: x", "sources": "sources: [x]", "label": "label: y", "ids": "ids: [u]"}
    lines[line.partition(":")[0]] = line
    (tmp_path / "schema.yaml").write_text("\n".join(lines.values()))
    with pytest.raises(ValueError, match=message):
        ClickLogSchema.load(tmp_path / "schema.yaml")
