"""What the host decides before a launch: lanes, blocks, shared memory, workspaces, keys."""

from __future__ import annotations

import itertools
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cuda.emulation import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")

Ask = Callable[[list[str]], list[list[int]]]
SHARED = 48 << 10
MULTIPROCESSORS = 132


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """Answers of the program in shapes.cpp, a list of numbers for each line."""
    program = tmp_path_factory.mktemp("shapes") / "shapes"
    source = Path(__file__).parent / "shapes.cpp"
    compiler = build.compiler()
    assert compiler is not None
    subprocess.run([compiler, "-std=c++17", "-O1", str(source), "-o", str(program)], check=True)

    def answer(lines: list[str]) -> list[list[int]]:
        done = subprocess.run(
            [str(program)], input="\n".join(lines), capture_output=True, text=True, check=True
        )
        answers = [[int(n) for n in line.split()] for line in done.stdout.splitlines()]
        assert len(answers) == len(lines)
        return answers

    return answer


def test_lanes_cover_a_row_and_no_more_than_needed(ask: Ask) -> None:
    cases = list(itertools.product((1, 3, 4, 5, 8, 16, 31, 64, 100, 128, 129, 1000), (4, 8)))
    for (width, columns), (lanes,) in zip(
        cases, ask([f"lanes {w} {c} 8" for w, c in cases]), strict=True
    ):
        assert lanes in (1, 2, 4, 8, 16, 32)
        assert lanes * columns >= min(width, 32 * columns)
        assert lanes == 1 or lanes * columns < 2 * width
    assert ask(["lanes 1 4 9", "lanes 128 4 60"]) == [[4], [32]]


ANY, PLAIN, PLACED = range(3)
SUM, MULTIPLY, PLACE = range(3)


def test_the_plainest_features_have_kernels_of_their_own(ask: Ask) -> None:
    def probes(count: int, width: int, at_once: int, *, apart: bool, scaled: bool = False) -> str:
        return " ".join(f"{t * width * apart} {width} {at_once} {scaled:d}" for t in range(count))

    def parts(width: int, at_once: int, each: int, count: int = 4) -> str:
        columns = (part * width for part in range(count) for _ in range(each))
        return " ".join(f"{column} {width} {at_once} 0" for column in columns)

    expected = {
        **{
            f"{combine} 64 {count} {probes(count, 64, 8, apart=False)}": [PLAIN, 4, 16, count]
            for combine in (SUM, MULTIPLY)
            for count in (1, 2, 3, 4)
        },
        f"{SUM} 64 5 {probes(5, 64, 8, apart=False)}": [ANY, 4, 16, 0],
        f"{SUM} 64 2 {probes(2, 64, 8, apart=False, scaled=True)}": [ANY, 4, 16, 0],
        f"{SUM} 66 1 {probes(1, 66, 2, apart=False)}": [ANY, 4, 32, 0],
        f"{PLACE} 64 4 {parts(16, 8, 1)}": [PLACED, 4, 16, 1],
        f"{PLACE} 64 8 {parts(16, 8, 2)}": [PLACED, 4, 16, 2],
        f"{PLACE} 64 12 {parts(16, 8, 3)}": [ANY, 4, 16, 0],
        f"{PLACE} 64 32 {parts(2, 2, 1, 32)}": [PLACED, 2, 32, 1],
        f"{PLACE} 64 64 {parts(2, 2, 2, 32)}": [ANY, 4, 16, 0],
        f"{PLACE} 64 64 {parts(1, 1, 1, 64)}": [ANY, 4, 16, 0],
    }
    answers = ask([f"class {line}" for line in expected])
    assert dict(zip(expected, answers, strict=True)) == expected


def test_forward_launches(ask: Ask) -> None:
    cases = list(
        itertools.product(
            (4, 8), (1, 2, 4, 16, 32), (1, 100, 16384, 1 << 20), (1, 26), (0, 1, 20, 1000),
            (1, 2, 8, 60), (1, 64, 128, 300), (0, 1000, 20_000),
        )
    )  # fmt: skip
    cases = [case for case in cases if case[1] >= 4 or case[5] <= 8]  # as lanes are chosen
    lines = [f"pool {' '.join(map(str, case))} {MULTIPROCESSORS}" for case in cases]
    for case, answer in zip(cases, ask(lines), strict=True):
        columns, lanes, batch, features, length, _, width, staged = case
        tile, bags, threads, blocks, chunks, plan, used, group, shared = answer
        assert shared <= SHARED, case
        assert tile % 4 == 0 and tile >= lanes and group % 8 == 0, case
        assert threads in (32, 64, 128, 256) and threads % lanes == 0, case
        assert 1 <= bags <= tile, case
        assert shared >= plan + used + threads // lanes * group, case
        assert plan % 16 == 0 and used in (0, staged), case
        assert chunks * lanes * columns >= width, case
        groups, runs = threads // lanes, -(-batch // bags)
        assert 1 <= blocks <= -(-runs // groups), case
        assert blocks * features * chunks <= max(features * chunks, 8 * MULTIPROCESSORS), case
        if length >= tile:  # long bags: one group each
            assert bags == 1, case
        # Several bags a group only where the device stays full.
        assert bags == 1 or runs * features >= 4 * MULTIPROCESSORS * groups, case


def test_forward_launches_of_plain_features(ask: Ask) -> None:
    cases = list(
        itertools.product(
            (1, 2, 4, 16, 32), (0, 1, 100, 16384, 1 << 22), (1, 26), (0, 1, 20, 1000), (4, 64, 300)
        )
    )
    lines = [f"plain {' '.join(map(str, case))} {MULTIPROCESSORS}" for case in cases]
    for case, (bags, threads, blocks, chunks, shared) in zip(cases, ask(lines), strict=True):
        lanes, batch, features, _, width = case
        groups = threads // lanes
        assert shared == 0 and threads == 256, case
        assert 1 <= bags <= lanes, case  # a lane knows the end of one bag
        assert chunks * lanes * 4 >= width, case
        assert blocks * groups * bags >= batch, case  # every bag has its group
        assert (blocks - 1) * groups * bags < max(batch, 1), case
        at_once = 4 * MULTIPROCESSORS * groups
        if batch * features * chunks <= at_once:  # a group for each bag fits the device
            assert bags == 1, case

        best = min(range(1, min(8, lanes) + 1), key=lambda run: _plain_time(run, at_once, case))
        assert _plain_time(bags, at_once, case) == _plain_time(best, at_once, case), case


def _plain_time(bags: int, groups_at_once: int, case: tuple[int, ...]) -> int:
    """Rounds of groups, times rows that each reads and, four rows' time each, tiles of ids."""
    lanes, batch, features, length, width = case
    all_bags = batch * features * math.ceil(width / (4 * lanes))
    ids = bags * max(length, 1)
    rounds = math.ceil(math.ceil(all_bags / bags) / groups_at_once)
    return rounds * (ids + 4 * math.ceil(ids / lanes))


def test_partial_sums_end_in_one_chunk(ask: Ask) -> None:
    counts = [0, 1, 31, 32, 33, 64, 1000, 1_300_000, 2**32 - 1]
    for touches, levels in zip(counts, ask([f"levels {n}" for n in counts]), strict=True):
        assert levels[0] == touches and levels[-1] <= 32
        for before, after in itertools.pairwise(levels):
            assert before > 32 and after == 2 * -(-before // 32)
        assert len(levels) <= 9


def test_keys_hold_every_row_and_none(ask: Ask) -> None:
    cases = list(itertools.product((1, 2, 3, 1000, 2**31, 2**31 + 1, 2**40), (1, 2, 3, 26, 300)))
    answers = ask([f"keys {rows} {targets}" for rows, targets in cases])
    for (rows, targets), (row_bits, bits) in zip(cases, answers, strict=True):
        assert rows - 1 < 2**row_bits
        none = targets << row_bits
        assert (targets - 1) << row_bits | rows - 1 < none
        assert none < 2**bits <= 2**62


def test_arrays_of_a_workspace_do_not_overlap(ask: Ask) -> None:
    numbers = ((0, 1, 77, 1000, 70_000), (0, 1, 5), (1, 50, 10**6), (1, 7, 64))
    cases = list(itertools.product(*numbers, (0, 1), (0, 1), (0, 1)))
    cases = [case for case in cases if case[5] or not case[4]]  # compact ones are sorted
    answers = ask([f"workspace {' '.join(map(str, case))}" for case in cases])
    for case, (size, stride, segments, *pairs) in zip(cases, answers, strict=True):
        ids, uses, rows, width, *_ = case
        assert stride % 4 == 0 and stride >= width
        assert segments == min(ids * uses, 2 * rows)
        arrays = sorted(zip(pairs[::2], pairs[1::2], strict=True))
        assert all(begin % 256 == 0 for begin, _ in arrays), case
        for (begin, count), (following, _) in itertools.pairwise(arrays):
            assert begin + count <= following, case
        assert sum(arrays[-1]) <= size, case
