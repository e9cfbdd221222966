"""Preparations that are killed, at every kind of moment, and go on to the same bytes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from embcompress.data import CriteoSettings, preparation, prepare_criteo
from embcompress.data import criteo as criteo_module

from .criteo_file import write_criteo

# Forks a preparation again and again. Each one kills itself at a random event: a block that was
# read, a write, a flush, a file half-written, a rename. Prints where each was killed.
KILLER = """
import os, random, signal, sys
from pathlib import Path
import numpy as np
from embcompress.data import criteo, click_log, preparation

source, target, chance = Path(sys.argv[1]), Path(sys.argv[2]), random.Random(int(sys.argv[3]))
preparation.BLOCK_BYTES = 1 << 18
preparation.Checkpoint.due = property(lambda self: True)
left = 0

def event(name, half=None):
    global left
    left -= 1
    if left == 0:
        if half is not None:
            half()
        print(name, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, half=None):
    original = getattr(owner, name)
    def wrapped(*arguments, **keywords):
        event(name, half and (lambda: half(*arguments)))
        return original(*arguments, **keywords)
    setattr(owner, name, wrapped)

def half_a_file(stream, *rest):
    stream.write(b"half")
    stream.flush()

before(criteo, "parse_block")
before(click_log.ClickLogWriter, "write")
before(click_log.ClickLogWriter, "flush")
before(os, "replace")
before(np, "savez", half_a_file)
before(np, "save")
before(Path, "unlink")

for attempt in range(200):
    left = chance.randint(1, 60)
    child = os.fork()
    if child == 0:
        criteo.prepare_criteo([source], target, progress=False)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print("finished", flush=True)
"""


def contents(directory: Path) -> dict[str, str]:
    """Name -> hash of every file of a prepared log."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with some malformed rows, whose first ten the log must remember."""
    path = write_criteo(tmp_path_factory.mktemp("criteo") / "day_0", 15_000)
    lines = path.read_bytes().splitlines(keepends=True)
    for number in range(500, 15_000, 1100):
        lines[number] = (
            b"x" + lines[number] if number % 2200 else lines[number].replace(b"\t", b" ")
        )
    path.write_bytes(b"".join(lines))
    return path


@pytest.mark.parametrize("seed", [0])
def test_killed_again_and_again_it_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, seed: int
) -> None:
    whole = prepare_criteo([source], tmp_path / "whole", progress=False)
    assert whole.meta["malformed"] == 14
    command = [sys.executable, "-c", KILLER, str(source), str(tmp_path / "killed"), str(seed)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    *killed, last = done.stdout.split()
    assert last == "finished"
    assert len(killed) >= 5 and len(set(killed)) >= 3, killed
    assert contents(tmp_path / "killed") == contents(whole.directory)
    assert not (tmp_path / "killed.partial").exists()


def test_what_is_done_is_not_done_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr(preparation.Checkpoint, "due", True)
    original, handled = criteo_module.parse_block, []

    def stop_at(limit: int | None) -> None:
        def parse(block, malformed):
            if limit is not None and len(handled) == limit:
                raise KeyboardInterrupt
            handled.append(block.first_line)
            return original(block, malformed)

        monkeypatch.setattr(criteo_module, "parse_block", parse)

    for limit in (4, 30):  # in the first pass, in the second
        stop_at(limit)
        with pytest.raises(KeyboardInterrupt):
            prepare_criteo([source], tmp_path / "log", progress=False)
    stop_at(None)
    prepare_criteo([source], tmp_path / "log", progress=False)
    stopped = list(handled)
    handled.clear()
    prepare_criteo([source], tmp_path / "whole", progress=False)
    # A checkpoint is due before every block, so at most the block before each stop is repeated.
    assert len(stopped) <= len(handled) + 2
    assert sorted(set(stopped)) == sorted(set(handled))


def test_counts_of_other_settings_are_never_used(source: Path, tmp_path: Path) -> None:
    target, other = tmp_path / "log", CriteoSettings(max_malformed=0.5)
    form = criteo_module.CriteoFormat()
    hashed = CriteoSettings(hash_ids_to=9)
    preparation.Preparation(form, [source], target, hashed, False).count()
    # The first pass of other settings is complete too, and its writing interrupted.
    preparation.Preparation(form, [source], target, other, False).count()
    log = prepare_criteo([source], target, other, progress=False)
    fresh = prepare_criteo([source], tmp_path / "fresh", other, progress=False)
    assert contents(log.directory) == contents(fresh.directory)
