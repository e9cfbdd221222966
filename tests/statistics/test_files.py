"""Saved profiles: round trips, and files that are damaged or hostile."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from embcompress import Profile, ProfileSettings
from embcompress.statistics import profiles
from embcompress.statistics.files import ProfileFileError, _digest
from tests.statistics.logs import assert_equal_states, make_batches, run

TINY = ProfileSettings(
    exact_ids=20, sketch_columns=256, sketch_rows=2, heavy_hitters=16, sampled_ids=64,
    register_bits=4, slices=4, drift_buckets=16, sampled_rows=64,
)  # fmt: skip


def make_tiny() -> Profile:
    profile = Profile({"few": 20, "many": 3000, "any": None}, TINY)
    rng = np.random.default_rng(0)
    columns = {"few": 20, "many": 3000, "any": 10}
    profile.update({name: rng.integers(0, size, 2000) for name, size in columns.items()})
    profile.source = "a test"
    return profile


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.profile"
    make_tiny().save(path)
    return path


@pytest.mark.parametrize("timed", [False, True])
def test_a_loaded_profile_is_the_same_and_goes_on(tmp_path: Path, timed: bool) -> None:
    batches = make_batches(7, rows=300, batches=6)
    times = np.random.default_rng(0).integers(0, 2**35, 1800) if timed else None
    path = tmp_path / "x.profile"
    first = run(batches[:3], 0, times)
    first.is_partial, first.source = True, "naïve log"
    first.save(path)
    first.save(path)  # over itself
    loaded = Profile.load(path)
    assert (loaded.source, loaded.is_partial) == ("naïve log", True)
    assert loaded.settings == first.settings
    assert_equal_states(loaded, first, heavy=True)
    assert str(loaded) == str(first)
    assert os.listdir(tmp_path) == ["x.profile"]  # nothing is left aside
    for number, batch in enumerate(batches[3:], 3):
        rows = np.arange(300 * number, 300 * (number + 1))
        part = None if times is None else times[rows]
        loaded.update(batch, row_numbers=rows, times=part)
    assert_equal_states(loaded, run(batches, 0, times), heavy=False)


def test_a_profile_without_collected_rows_is_saved_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every update is counted at once here, so that saving finds nothing left to count."""
    monkeypatch.setattr(profiles, "_ROWS", 300)
    batches = make_batches(8, rows=300, batches=4)
    profile = run(batches)
    profile.save(tmp_path / "x")
    assert_equal_states(Profile.load(tmp_path / "x"), profile, heavy=True)
    monkeypatch.undo()
    assert_equal_states(Profile.load(tmp_path / "x"), run(batches), heavy=False)


def test_an_empty_profile_is_saved_too(tmp_path: Path) -> None:
    empty = Profile({"x": None}, TINY)
    empty.save(tmp_path / "x")
    assert_equal_states_of_one(Profile.load(tmp_path / "x"), empty)
    assert "nan" not in str(empty)


def assert_equal_states_of_one(first: Profile, second: Profile) -> None:
    assert (first.rows, first["x"].queries, str(first)) == (second.rows, 0, str(second))


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        make_tiny().save(saved)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_every_truncation_is_noticed(saved: Path) -> None:
    data = saved.read_bytes()
    for length in [*range(0, 64), *range(64, len(data), 499), len(data) - 1]:
        saved.write_bytes(data[:length])
        with pytest.raises(ProfileFileError, match=r"tiny\.profile is no profile, or is damaged"):
            Profile.load(saved)
    saved.write_bytes(data + b"\0")
    with pytest.raises(ProfileFileError):
        Profile.load(saved)


def test_flipped_bits_are_noticed(saved: Path) -> None:
    data, rng = saved.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(data[:8], "little")
    places = [*range(0, 8), *rng.integers(8, header, 300), *rng.integers(header, len(data), 150)]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        saved.write_bytes(bytes(flipped))
        try:
            loaded = Profile.load(saved)
        except ProfileFileError:
            continue
        # Only the padding after the header, and the order of its keys, carry nothing.
        assert place < header
        assert_equal_states(loaded, make_tiny(), heavy=True)


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 2**32, 2**63, 2**64 - 1])
def test_headers_of_any_length_are_refused(saved: Path, length: int) -> None:
    saved.write_bytes(length.to_bytes(8, "little") + saved.read_bytes()[8:])
    with pytest.raises(ProfileFileError):
        Profile.load(saved)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(FileNotFoundError, match="no profile at"):
        Profile.load(path)
    with pytest.raises(FileNotFoundError):
        Profile.load(tmp_path)
    for content in (b"", b"PK\3\4", pickle.dumps({"x": 1}), b"\x08" + bytes(7) + b"{}      "):
        path.write_bytes(content)
        with pytest.raises(ProfileFileError):
            Profile.load(path)
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(ProfileFileError, match="format"):
        Profile.load(path)


Edit = Callable[[dict[str, Any], dict[str, Any]], None]


def forge(path: Path, edit: Edit, **metadata: str) -> None:
    """Change a saved profile and give it the digest of what it then holds."""
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        old = file.metadata()
    description = json.loads(old["profile"])
    edit(description, arrays)
    text = json.dumps(description)
    digest = _digest(text, arrays)
    save_file(arrays, path, {**old, "profile": text, "digest": digest, **metadata})


def put(name: str, value: Any) -> Edit:
    """Replace a value of the JSON, by its path, or of a tensor, by ``tensor[place]``."""

    def edit(description: dict[str, Any], arrays: dict[str, Any]) -> None:
        if name.endswith("]"):
            tensor, _, place = name[:-1].partition("[")
            arrays[tensor].reshape(-1)[int(place)] = value
            return
        *path, last = [int(part) if part.isdigit() else part for part in name.split("/")]
        inner: Any = description
        for part in path:
            inner = inner[part]
        inner[last] = value

    return edit


def replace(name: str, array: Any) -> Edit:
    def edit(description: dict[str, Any], arrays: dict[str, Any]) -> None:
        arrays[name] = array(arrays[name])

    return edit


HOSTILE: dict[str, Edit] = {
    "settings missing": lambda description, arrays: description.pop("settings"),
    "unknown setting": put("settings/pickle", 1),
    "columns too many": put("settings/sketch_columns", 2**40),
    "columns not in the file": put("settings/sketch_columns", 2**28),
    "slices too many": put("settings/slices", 10**9),
    "buckets not in the file": put("settings/drift_buckets", 2**20),
    "exact table not in the file": put("features/0/num_embeddings", 10),
    "a table too large to be exact": put("features/0/num_embeddings", 2**40),
    "sketch said to be exact": put("features/1/is_exact", True),
    "feature negative": put("features/1/num_embeddings", -1),
    "features none": put("features", []),
    "features an object": put("features", {"a": 1}),
    "feature a number": put("features/0", 5),
    "feature twice": put("features/0/name", "many"),
    "queries negative": put("features/0/queries", -1),
    "queries other than the counts": put("features/0/queries", 3),
    "queries infinite": put("features/0/queries", float("inf")),
    "rows a text": put("rows", "2000"),
    "rows other than the bags": put("rows", 1999),
    "rows beyond 64 bits": put("rows", 10**4000),
    "level beyond 64 bits": put("level", 64),
    "source a number": put("source", 1),
    "flag a number": put("is_partial", 1),
    "counts negative": put("0.counts[3]", -1),
    "counts that overflow": put("0.counts[3]", 2**63 - 1),
    "heavy hitters unsorted": put("1.heavy.ids[2]", -7),
    "sampled words unsorted": put("1.sample.words[2]", 0),
    "registers too large": put("1.registers[0]", 255),
    "slices unsorted": replace("slices", lambda array: array[::-1].copy()),
    "sampled rows unsorted": replace("rows.words", lambda array: array[::-1].copy()),
    "sampled rows cut": replace("rows.words", lambda array: array[1:].copy()),
    "heavy counts cut": replace("1.heavy.counts", lambda array: array[1:].copy()),
    "dtype": replace("1.count_min", lambda array: array.astype(np.int32)),
    "shape": replace("1.count_min", lambda array: array.reshape(-1)),
    "tensor missing": lambda description, arrays: arrays.pop("slices"),
    "tensor added": lambda description, arrays: arrays.update(more=np.zeros(3)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_forged_contents_are_refused(saved: Path, name: str) -> None:
    forge(saved, HOSTILE[name])
    with pytest.raises(ProfileFileError, match=r"tiny\.profile is no profile, or is damaged: ."):
        Profile.load(saved)


def test_forging_alone_changes_nothing(saved: Path) -> None:
    forge(saved, lambda description, arrays: None)
    assert_equal_states(Profile.load(saved), make_tiny(), heavy=True)


def test_versions_and_digests_are_compared(saved: Path) -> None:
    data = saved.read_bytes()
    for metadata, message in (({"version": "2"}, "version is '2'"), ({"digest": "0"}, "digest")):
        saved.write_bytes(data)
        forge(saved, lambda description, arrays: None, **metadata)
        with pytest.raises(ProfileFileError, match=message):
            Profile.load(saved)
    deep = saved.with_name("deep")
    save_file({}, deep, {"format": "embcompress.profile", "version": "1", "profile": "[" * 10**6})
    with pytest.raises(ProfileFileError):
        Profile.load(deep)
