"""Avazu text: what is written, its hours and days, malformed rows, missing columns, kills."""

from __future__ import annotations

import gzip
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
import xxhash

from embcompress.data import MalformedRowsError, load_click_log, preparation, prepare_avazu
from embcompress.data.avazu import AvazuFormat, AvazuSettings
from tests.data.avazu_file import HEADER, avazu_rows, write_avazu
from tests.data.test_criteo import digest

NAMES = HEADER.split(",")


@pytest.fixture(scope="module")
def rows() -> list[list[str]]:
    return avazu_rows(3000)


@pytest.fixture(scope="module")
def source(rows: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_avazu(tmp_path_factory.mktemp("avazu") / "train.csv", rows)


def test_ids_follow_counts(rows: list[list[str]], source: Path, tmp_path: Path) -> None:
    log = load_click_log(f"avazu={source}", cache=tmp_path, progress=False)
    assert len(log) == 3000 and log.meta["malformed"] == 0 and log.dense_names == ()
    names = [feature.name for feature in log.features]
    assert names == ["hour_of_day", "weekday", *NAMES[3:]]
    batch = log.batch(slice(0, 3000))
    assert batch.label.tolist() == [float(row[1]) for row in rows]
    assert batch.dense.shape == (3000, 0)
    for name in ("banner_pos", "device_id", "device_ip", "C21"):
        values = [row[NAMES.index(name)] for row in rows]
        counts = {value: values.count(value) for value in set(values)}
        key = {value: xxhash.xxh64_intdigest(value.encode()) for value in counts}
        order = sorted(counts, key=lambda value: (-counts[value], key[value]))
        expected = {value: 2 + number for number, value in enumerate(order)}
        field = names.index(name)
        ids = batch.ids[batch.offsets[field * 3000] : batch.offsets[(field + 1) * 3000]]
        assert ids.tolist() == [expected[value] for value in values]
        assert log.features[field].num_embeddings == 2 + len(order)
        saved = np.load(log.directory / f"vocabulary_{name}.npy")
        assert saved.tolist() == [key[value] for value in order]


def test_hours_become_times_hours_of_the_day_and_weekdays(
    rows: list[list[str]], source: Path, tmp_path: Path
) -> None:
    log = prepare_avazu([source], tmp_path / "log", progress=False)
    moments = [datetime.strptime(row[2], "%y%m%d%H").replace(tzinfo=timezone.utc) for row in rows]
    assert log.times is not None
    assert log.times.tolist() == [int(moment.timestamp()) for moment in moments]
    for field, parts in enumerate(([m.hour for m in moments], [m.weekday() for m in moments])):
        name = log.features[field].name
        values = np.load(log.directory / f"vocabulary_{name}.npy")
        assert values[log._ids[:, field] - 2].tolist() == parts


def test_a_split_by_day_has_whole_days(source: Path, tmp_path: Path) -> None:
    log = prepare_avazu([source], tmp_path / "log", progress=False)
    assert log.times is not None
    split = log.split("day", validation=0.1, test=0.1)
    days = [
        np.unique(log.times[part] // 86_400) for part in (split.train, split.validation, split.test)
    ]
    assert [len(part) for part in days] == [1, 1, 1]  # of three
    assert days[0] < days[1] < days[2]


def test_gz_several_files_and_windows_lines_give_the_same(
    rows: list[list[str]], source: Path, tmp_path: Path
) -> None:
    first = write_avazu(tmp_path / "a.csv", rows[:1000])
    packed = tmp_path / "a.csv.gz"
    packed.write_bytes(gzip.compress(first.read_bytes().replace(b"\n", b"\r\n")))
    second = write_avazu(tmp_path / "b.csv", rows[1000:])
    # Columns in another order, and one that is not known.
    order = [NAMES[3], *NAMES[:3], *NAMES[4:]]
    moved = [[*(row[NAMES.index(name)] for name in order), "x"] for row in rows[1000:]]
    third = write_avazu(tmp_path / "c.csv", moved, ",".join([*order, "other"]))
    whole = prepare_avazu([source], tmp_path / "whole", progress=False)
    for number, files in enumerate(([packed, second], [first, third])):
        log = prepare_avazu(files, tmp_path / str(number), progress=False)
        assert digest(log.directory) == digest(whole.directory)


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("click", "2", "click = '2'"),
        ("click", "", "click = ''"),
        ("hour", "14102124", "hour = '14102124'"),
        ("hour", "2014-10-21", "hour = '2014-10-21'"),
        ("hour", "14133100", "hour = '14133100'"),
        ("C21", "1,2", "25 fields instead of 24"),
    ],
)
def test_malformed_rows_are_counted_and_shown_by_line(
    rows: list[list[str]], tmp_path: Path, column: str, value: str, shown: str
) -> None:
    spoiled = [list(row) for row in rows[:1000]]
    spoiled[41][NAMES.index(column)] = value
    source = write_avazu(tmp_path / "train.csv", spoiled)
    log = prepare_avazu([source], tmp_path / "log", progress=False)
    assert len(log) == 999 and log.meta["malformed_examples"] == [f"train.csv:43: {shown}"]
    with pytest.raises(MalformedRowsError, match="max_malformed=0 "):
        settings = AvazuSettings(max_malformed=0)
        prepare_avazu([source], tmp_path / "strict", settings, progress=False)


def test_an_empty_field_is_missing_and_rare_values_unknown(
    rows: list[list[str]], tmp_path: Path
) -> None:
    holes = [list(row) for row in rows[:200]]
    field = NAMES.index("device_ip")
    for number, row in enumerate(holes):
        row[field] = "" if number < 5 else "often" if number < 100 else f"once{number}"
    source = write_avazu(tmp_path / "train.csv", holes)
    log = prepare_avazu([source], tmp_path / "log", AvazuSettings(min_count=2), progress=False)
    position = [feature.name for feature in log.features].index("device_ip")
    assert log._ids[:, position].tolist() == [1] * 5 + [2] * 95 + [0] * 100


def test_files_of_another_kind_are_refused(rows: list[list[str]], tmp_path: Path) -> None:
    def error(header: str, lines: list[list[str]]) -> str:
        source = write_avazu(tmp_path / "file.csv", lines, header)
        with pytest.raises(ValueError, match=r"file\.csv") as caught:
            load_click_log(f"avazu={source}", cache=tmp_path / "cache", progress=False)
        return str(caught.value)

    test_file = [[row[0], *row[2:]] for row in rows[:3]]
    found = error(HEADER.replace("click,", ""), test_file)
    assert "lacks the columns ['click']" in found and "use the train file" in found
    found = error(HEADER.replace("device_ip", "ip").replace("C20", "C99"), rows[:3])
    assert "lacks the columns ['device_ip', 'C20']; it has ['id', 'click'" in found
    assert "has a column twice" in error(HEADER.replace("id,", "C14,", 1), rows[:3])
    (tmp_path / "file.csv.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    with pytest.raises(ValueError, match=r"file\.csv\.gz is truncated or damaged"):
        prepare_avazu([tmp_path / "file.csv.gz"], tmp_path / "log", progress=False)


def test_the_spec_takes_options_and_a_colon(source: Path, tmp_path: Path) -> None:
    log = load_click_log(f"avazu:{source},hash_ids_to=50", cache=tmp_path, progress=False)
    assert {feature.num_embeddings for feature in log.features} == {50}
    same = load_click_log(f"avazu={source},hash_ids_to=50", cache=tmp_path, progress=False)
    assert same.directory == log.directory
    with pytest.raises(ValueError, match="option 'days=3' is not understood"):
        load_click_log(f"avazu={source},days=3", cache=tmp_path)


def test_interrupted_it_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare_avazu([source], tmp_path / "whole", progress=False)
    monkeypatch.setattr(preparation, "BLOCK_BYTES", 1 << 15)
    monkeypatch.setattr(preparation.Checkpoint, "due", True)
    parse, lines = AvazuFormat.parse, []

    def stopping(self: AvazuFormat, block, malformed):
        lines.append(block.first_line)
        if len(lines) in (4, 20):  # in the first pass, in the second
            raise KeyboardInterrupt
        return parse(self, block, malformed)

    monkeypatch.setattr(AvazuFormat, "parse", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare_avazu([source], tmp_path / "log", progress=False)
    log = prepare_avazu([source], tmp_path / "log", progress=False)
    assert lines.count(2) == 2  # a pass begins once
    assert digest(log.directory) == digest(whole.directory)
