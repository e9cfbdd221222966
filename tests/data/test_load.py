"""Specs, cache keys, and several that prepare the same log at once."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embcompress.data import ClickLog, load_click_log
from embcompress.data import load as load_module

from .criteo_file import write_criteo


def test_days_are_taken_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for day in (10, 2, 0, 1, 11):
        (tmp_path / f"day_{day}.gz").touch()
    (tmp_path / ".hidden").touch()
    files = load_module._parse(f"criteo={tmp_path}")[1]
    assert [path.name for path in files] == [f"day_{day}.gz" for day in (0, 1, 2, 10, 11)]


def test_several_files_and_options(tmp_path: Path) -> None:
    first = write_criteo(tmp_path / "b", 300, seed=1)
    second = write_criteo(tmp_path / "a", 200, seed=2)
    spec = f"criteo={first},{second},min_count=2,max_malformed=0.5"
    log = load_click_log(spec, cache=tmp_path / "cache", progress=False)
    assert len(log) == 500 and log.meta["settings"]["min_count"] == 2
    label = first.read_bytes().splitlines()[0][:1]
    assert log.labels[0] == int(label)  # in the given order
    with pytest.raises(ValueError, match="hash_ids_to must be above 2 and below"):
        load_click_log(f"criteo={first},hash_ids_to=2147483648", cache=tmp_path)


def test_a_changed_source_is_prepared_again(tmp_path: Path) -> None:
    source = write_criteo(tmp_path / "day", 100)
    one = load_click_log(f"criteo={source}", cache=tmp_path / "cache", progress=False)
    os.utime(source, ns=(1, 1))
    two = load_click_log(f"criteo={source}", cache=tmp_path / "cache", progress=False)
    assert one.directory != two.directory


def test_who_wants_the_same_log_at_once_waits_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, calls = write_criteo(tmp_path / "day", 5000), []
    original = load_module.prepare_criteo

    def slow(*arguments, **keywords):
        calls.append(arguments)
        time.sleep(0.3)  # the others come meanwhile
        return original(*arguments, **keywords)

    monkeypatch.setattr(load_module, "prepare_criteo", slow)

    def load(_: int) -> ClickLog:
        # The lock belongs to an open file, so threads stand for processes.
        return load_click_log(f"criteo={source}", cache=tmp_path / "cache", progress=False)

    with ThreadPoolExecutor(3) as pool:
        logs = list(pool.map(load, range(3)))
    assert len(calls) == 1
    assert {(log.directory, len(log)) for log in logs} == {(logs[0].directory, 5000)}
