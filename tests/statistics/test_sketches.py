"""The parts of a profile: sketches keep to their bounds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embcompress.hashing import hash_bucket, mix64
from embcompress.statistics.count_min import CountMin
from embcompress.statistics.distribution import CountDistribution
from embcompress.statistics.drift import TimeSlices
from embcompress.statistics.hashes import hash_buckets, mixed_words
from embcompress.statistics.heavy_hitters import HeavyHitters
from embcompress.statistics.hyperloglog import HyperLogLog
from embcompress.statistics.id_sample import IdSample
from embcompress.statistics.power_law import harmonic
from tests.statistics.logs import zipf


def test_hashes_are_the_librarys() -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden" / "hashing.json").read_text())["hash"]
    for key in {int(row["key"]) for row in golden}:
        ids = [int(row["id"]) for row in golden if int(row["key"]) == key]
        words = mixed_words(np.array(ids, np.int64), key)
        assert words.tolist() == [mix64((id ^ key) & (2**64 - 1)) for id in ids]
        for buckets in (2, 2**20, 2**31):
            found = hash_buckets(np.array(ids, np.int64), key, buckets)
            assert found.tolist() == [hash_bucket(id, key, buckets) for id in ids]


def test_count_min_is_above_the_counts_and_rarely_beyond_its_bound() -> None:
    rng = np.random.default_rng(0)
    ids, columns, rows = zipf(rng, 20_000, 100_000), 2**9, 3
    sketch = CountMin([11, 22, 33], columns)
    for part in np.array_split(ids, 7):
        sketch.add(*np.unique(part, return_counts=True))
    counts = np.bincount(ids, minlength=20_000)
    excess = sketch.upper_bounds(np.arange(20_000)) - counts
    assert sketch.total == len(ids)
    assert excess.min() >= 0
    assert (excess > math.e / columns * len(ids)).mean() <= math.exp(-rows)
    estimates = sketch.estimates(np.arange(20_000))
    assert abs((estimates - counts).mean()) < excess.mean() / 10  # the bias is gone
    assert (estimates <= sketch.upper_bounds(np.arange(20_000))).all() and estimates.min() >= 0


@given(
    st.lists(st.lists(st.integers(-3, 30), max_size=60), max_size=8),
    st.integers(1, 12),
    st.integers(0, 8),
)
def test_heavy_hitters_keep_their_bound(parts: list[list[int]], size: int, cut: int) -> None:
    lists = [HeavyHitters(size), HeavyHitters(size)]
    for number, part in enumerate(parts):
        ids = np.array(part, np.int64)
        lists[number >= cut].add(*np.unique(ids, return_counts=True))
    lists[0].merge(lists[1])
    heavy, stream = lists[0], [id for part in parts for id in part]
    found = dict(zip(heavy.ids.tolist(), heavy.counts.tolist(), strict=True))
    assert len(found) <= size and list(found) == sorted(found)
    assert heavy.error * (size + 1) <= len(stream) - sum(found.values())
    for id in set(stream):
        assert 0 <= stream.count(id) - found.get(id, 0) <= heavy.error
        assert id in found or stream.count(id) <= len(stream) / (size + 1)


def test_hyperloglog_registers_are_leading_zeros() -> None:
    words = [0, 1, 2**64 - 1, 2**53 - 1, (1 << 54) - 1, 0x0123456789ABCDEF, 1 << 49, 1 << 32]
    bits = 10
    for word in words:
        sketch = HyperLogLog(bits)
        sketch.add(np.array([word], np.uint64))
        rest = f"{word:064b}"[bits:] + "1"
        assert sketch.registers[word >> (64 - bits)] == rest.index("1") + 1
        assert np.count_nonzero(sketch.registers) == 1


@pytest.mark.parametrize("distinct", [0, 1, 40, 1000, 30_000, 1_000_000])
def test_hyperloglog_estimates_within_four_deviations(distinct: int) -> None:
    sketch = HyperLogLog(12)
    words = mixed_words(np.arange(distinct), 99)
    sketch.add(words)
    sketch.add(words[: distinct // 2])  # repetitions change nothing
    assert abs(sketch.estimate() - distinct) <= 4 * 1.04 / 2**6 * distinct


def test_id_sample_holds_the_lowest_words_with_exact_counts() -> None:
    rng = np.random.default_rng(0)
    ids = zipf(rng, 5000, 40_000)
    sample = IdSample(100)
    for part in np.array_split(ids, 23):
        values, counts = np.unique(part, return_counts=True)
        sample.add(mixed_words(values, 5), counts)
    values, counts = np.unique(ids, return_counts=True)
    words = mixed_words(values, 5)
    lowest = np.argsort(words)[:100]
    assert sample.words.tolist() == words[lowest].tolist()
    assert sample.counts.tolist() == counts[lowest].tolist()


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=20), max_size=6),
    st.integers(2, 6),
)
def test_slices_depend_on_the_moments_alone(parts: list[list[int]], most: int) -> None:
    forth, back = TimeSlices(most, has_times=True), TimeSlices(most, has_times=True)
    for slices, order in ((forth, parts), (back, parts[::-1])):
        for part in order:
            slices.include(np.unique(np.array(part)), 0)
    moments = [moment for part in parts for moment in part]
    level = next(n for n in range(64) if len({moment >> n for moment in moments}) <= most)
    assert forth.level == back.level == level
    assert forth.keys.tolist() == back.keys.tolist() == sorted({m >> level for m in moments})


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.05, 2.0])
@pytest.mark.parametrize("last", [1, 7, 1000, 1001, 50_000])
def test_harmonic_is_the_sum(last: int, exponent: float) -> None:
    direct = (torch.arange(1, last + 1, dtype=torch.float64) ** -exponent).sum().item()
    assert harmonic(last, exponent) == pytest.approx(direct, rel=1e-7)


@pytest.mark.parametrize("exponent", [0.7, 1.05, 1.5])
def test_power_law_finds_the_exponent(exponent: float) -> None:
    counts = np.bincount(zipf(np.random.default_rng(0), 20_000, 400_000, exponent))
    law = CountDistribution.exact(counts).power_law()
    assert law is not None
    assert law.exponent == pytest.approx(exponent, abs=0.02)
    assert law.ids == (counts >= 8).sum()
    assert law.distance < 0.02
    assert CountDistribution.exact(counts[:19]).power_law() is None


def test_top_mass_counts_whole_ids() -> None:
    counts = np.array([0, 5, 1, 1, 3, 0, 1, 1, 1, 1, 6])  # 9 seen, 20 queries
    distribution = CountDistribution.exact(counts)
    assert distribution.seen == 9
    assert distribution.top_mass(0.01) == 6 / 20
    assert distribution.top_mass(0.3) == 14 / 20
    assert distribution.top_mass(4 / 9) == 15 / 20
    assert distribution.top_mass(1.0) == 1.0
    ranks, heights = distribution.curve()
    assert ranks.tolist() == list(range(1, 10))
    assert heights.tolist() == [6, 5, 3, 1, 1, 1, 1, 1, 1]
