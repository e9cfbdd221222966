"""Profiles that are interrupted keep what was counted, and go on; the command."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import embcompress as ec
from embcompress import Profile, ProfileInterrupted
from embcompress.data import ClickLog
from embcompress.statistics import feature as feature_module
from embcompress.statistics.resume import profile_to_file
from tests.statistics.logs import SMALL, SPEC, assert_equal_states, make_batches, run


def test_control_c_gives_what_was_counted() -> None:
    batches = make_batches(4, rows=100, batches=5)

    def stream() -> Iterator[Mapping[str, object]]:
        yield from batches[:3]
        raise KeyboardInterrupt

    sizes = {"exact": 300, "sketched": 5000, "bag": 40}
    with pytest.raises(ProfileInterrupted) as caught:
        ec.profile(stream(), num_embeddings=sizes, settings=SMALL, progress=False)
    assert isinstance(caught.value, KeyboardInterrupt)
    partial = caught.value.profile
    assert partial.is_partial and partial.rows == 300
    rest = ec.profile(batches[3:], into=partial, progress=False)
    assert_equal_states(rest, run(batches), heavy=False)


def test_control_c_does_not_cut_an_update_in_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real signal while the second of four features is counted: the others are counted too."""
    original = feature_module.FeatureProfile.add

    def interrupted(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        if self.name == "sketched":
            signal.raise_signal(signal.SIGINT)

    batches = make_batches(5, rows=300, batches=1)
    expected = run(batches)
    expected.flush()
    monkeypatch.setattr(feature_module.FeatureProfile, "add", interrupted)
    # A shell's background jobs ignore Ctrl-C; this test must not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            ec.profile(batches, num_embeddings={"exact": 300}, settings=SMALL, progress=False)
        profile = run(batches)
        with pytest.raises(KeyboardInterrupt):
            profile.flush()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert_equal_states(profile, expected, heavy=True)


def test_a_file_goes_on_where_it_was_interrupted(
    log: ClickLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embcompress.statistics import run as run_module

    monkeypatch.setattr(run_module, "_ROWS", 500)
    out, cache = tmp_path / "x.profile", log.directory.parent
    original, calls = ClickLog.bags, iter(range(100))

    def interrupted(self: ClickLog, rows: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(self, rows)

    monkeypatch.setattr(ClickLog, "bags", interrupted)
    with pytest.raises(ProfileInterrupted):
        profile_to_file(SPEC, out, split="random", cache=cache, progress=False)
    assert Profile.load(out).is_partial and Profile.load(out).rows == 1000
    with pytest.raises(ValueError, match="unfinished profile of"):
        profile_to_file(SPEC, out, cache=cache, progress=False)
    done = profile_to_file(SPEC, out, split="random", cache=cache, progress=False)
    train = log.split("random").train
    assert_equal_states(done, ec.profile(log, rows=train, progress=False), heavy=True)
    assert not Profile.load(out).is_partial
    profile_to_file(SPEC, out, cache=cache, progress=False)  # a finished one is written anew
    assert Profile.load(out).rows == 3000


def test_the_command_writes_a_profile_and_its_plot(log: ClickLog, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from embcompress.commands import app

    out = tmp_path / "log.profile"
    command = ["profile", "--data", SPEC, "--out", str(out), "--cache", str(log.directory.parent)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert str(Profile.load(out)) in result.output
    assert (tmp_path / "log.profile.png").read_bytes().startswith(b"\x89PNG")
