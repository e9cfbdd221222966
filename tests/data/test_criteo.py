"""Criteo text: what is written, malformed rows, kills in the middle, memory."""

from __future__ import annotations

import gzip
import hashlib
import random
from pathlib import Path

import numpy as np
import pytest

from embcompress.data import CriteoSettings, MalformedRowsError, load_click_log, prepare_criteo
from embcompress.data.criteo import CriteoFormat
from embcompress.data.preparation import Preparation
from tests.peak_memory import measure_peak

from .criteo_file import write_criteo


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_criteo(tmp_path_factory.mktemp("criteo") / "day_0", 20_000)


def digest(directory: Path) -> str:
    """Hash of every byte of a prepared log."""
    state = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()


def test_ids_follow_counts_and_numbers_are_logarithms(source: Path, tmp_path: Path) -> None:
    log = prepare_criteo([source], tmp_path / "log", progress=False)
    rows = [line.split("\t") for line in source.read_text().splitlines()]
    assert len(log) == len(rows) and log.meta["malformed"] == 0
    batch = log.batch(slice(0, 500))
    assert batch.label.tolist() == [float(row[0]) for row in rows[:500]]
    numbers = [[max(int(x or 0), 0) for x in row[1:14]] for row in rows[:500]]
    np.testing.assert_allclose(batch.dense, np.log1p(np.array(numbers)), rtol=1e-6)
    for field in (0, 12, 25):
        values = [row[14 + field] for row in rows]
        counts = {value: values.count(value) for value in sorted(set(values)) if value}
        order = sorted(counts, key=lambda value: (-counts[value], int(value, 16)))
        expected = {value: 2 + number for number, value in enumerate(order)} | {"": 1}
        ids = batch.ids[batch.offsets[field * 500] : batch.offsets[(field + 1) * 500]]
        assert ids.tolist() == [expected[value] for value in values[:500]]
        assert log.features[field].num_embeddings == 2 + len(order)
        saved = np.load(log.directory / f"vocabulary_C{field + 1}.npy")
        assert saved.tolist() == [int(value, 16) for value in order]


def test_rare_values_become_unknown(source: Path, tmp_path: Path) -> None:
    log = prepare_criteo([source], tmp_path / "a", CriteoSettings(min_count=5), progress=False)
    every = prepare_criteo([source], tmp_path / "b", progress=False)
    last = slice(None), -1
    rare = np.bincount(every._ids[last])[every._ids[last]] < 5
    rare &= every._ids[last] != 1
    assert rare.any() and (log._ids[last][rare] == 0).all()
    assert (log._ids[last][~rare] == every._ids[last][~rare]).all()


def test_raw_hashing_needs_no_vocabulary(source: Path, tmp_path: Path) -> None:
    settings = CriteoSettings(hash_ids_to=1000)
    log = prepare_criteo([source], tmp_path / "log", settings, progress=False)
    assert {feature.num_embeddings for feature in log.features} == {1000}
    assert log._ids.min() == 1 and log._ids.max() < 1000
    assert not list(log.directory.glob("vocabulary_*"))


def test_gz_and_several_files_give_the_same(source: Path, tmp_path: Path) -> None:
    lines = source.read_bytes().splitlines(keepends=True)
    first, second = tmp_path / "day_0.gz", tmp_path / "day_1"
    first.write_bytes(gzip.compress(b"".join(lines[:7000])))
    second.write_bytes(b"".join(lines[7000:]).rstrip(b"\n"))
    split = prepare_criteo([first, second], tmp_path / "a", progress=False)
    whole = prepare_criteo([source], tmp_path / "b", progress=False)
    assert digest(split.directory) == digest(whole.directory)


def spoiled(source: Path, path: Path, share: float) -> list[int]:
    """Spoil lines in all the ways there are; returns their numbers."""
    lines = source.read_bytes().splitlines()
    bad = sorted(random.Random(0).sample(range(len(lines)), int(share * len(lines))))
    for kind, number in enumerate(bad):
        fields = lines[number].split(b"\t")
        spoil = kind % 6
        if spoil == 0:
            fields = fields[:-1]
        elif spoil == 1:
            fields = [*fields, b"x"]
        elif spoil == 2:
            fields[20] = b"nothexad"
        elif spoil == 3:
            fields[20] = b"abc"
        elif spoil == 4:
            fields[3] = b"1.5"
        else:
            fields[0] = b"2"
        lines[number] = b"\t".join(fields)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return [number + 1 for number in bad]


def test_malformed_rows_are_counted_and_shown_by_line(source: Path, tmp_path: Path) -> None:
    bad = spoiled(source, tmp_path / "few", 0.0009)
    log = prepare_criteo([tmp_path / "few"], tmp_path / "log", progress=False)
    assert log.meta["malformed"] == len(bad) and len(log) == 20_000 - len(bad)
    shown = {int(text.split(":")[1]) for text in log.meta["malformed_examples"]}
    assert shown <= set(bad) and len(shown) == min(10, len(bad))


def test_too_many_malformed_rows_are_fatal(source: Path, tmp_path: Path) -> None:
    spoiled(source, tmp_path / "many", 0.05)
    with pytest.raises(MalformedRowsError, match=r"max_malformed=0.001(.|\n)*many:\d+: "):
        prepare_criteo([tmp_path / "many"], tmp_path / "log", progress=False)
    assert not (tmp_path / "log").exists()


def test_a_truncated_gz_is_refused(source: Path, tmp_path: Path) -> None:
    data = gzip.compress(source.read_bytes())
    (tmp_path / "cut.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.gz is truncated or damaged"):
        prepare_criteo([tmp_path / "cut.gz"], tmp_path / "log", progress=False)


def test_other_settings_do_not_go_on_from_a_partial(source: Path, tmp_path: Path) -> None:
    settings = CriteoSettings(min_count=3)
    Preparation(CriteoFormat(), [source], tmp_path / "log", settings, False).count()
    log = prepare_criteo([source], tmp_path / "log", progress=False)
    fresh = prepare_criteo([source], tmp_path / "fresh", progress=False)
    assert digest(log.directory) == digest(fresh.directory)


def test_the_real_sample(real_data: Path, tmp_path: Path) -> None:
    log = load_click_log(f"criteo={real_data}/criteo/sample.txt", cache=tmp_path, progress=False)
    assert len(log) == 10_000 and log.meta["malformed"] == 0
    assert 0.1 < log.labels.mean() < 0.4
    again = load_click_log(f"criteo={real_data}/criteo/sample.txt", cache=tmp_path)
    assert again.directory == log.directory


@pytest.mark.slow
def test_two_million_rows_stay_under_a_gigabyte_and_a_half(tmp_path: Path) -> None:
    source = write_criteo(tmp_path / "day_0", 2_000_000)
    code = (
        "import sys; from pathlib import Path\n"
        "from embcompress.data import prepare_criteo\n"
        "prepare_criteo([Path(sys.argv[1])], Path(sys.argv[2]))\n"
    )
    peak, _, errors = measure_peak(code, str(source), str(tmp_path / "log"))
    print(errors, f"peak {peak:,} bytes")
    assert "rows/s" in errors
    assert peak < 1.5e9
