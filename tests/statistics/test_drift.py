"""Drift and pairs of features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import embcompress as ec
from embcompress import Profile, ProfileSettings
from embcompress.statistics.drift import divergence, jensen_shannon
from tests.statistics.logs import zipf


def test_jensen_shannon_is_the_mean_divergence_from_the_middle() -> None:
    p, q = torch.tensor([4.0, 0.0, 6.0]) / 10, torch.tensor([1.0, 5.0, 14.0]) / 20
    middle = (p + q) / 2
    expected = sum(torch.xlogy(s, s / middle).sum() for s in (p, q)) / 2 / math.log(2)
    found = jensen_shannon(np.array([4, 0, 6]), np.array([1, 5, 14]))
    assert found == pytest.approx(float(expected))
    assert jensen_shannon(np.array([1, 0]), np.array([0, 7])) == 1.0
    assert math.isnan(jensen_shannon(np.array([1, 0]), np.array([0, 0])))


@pytest.mark.parametrize("size", [50, 20_000])
def test_drift_is_zero_without_a_shift_and_finds_a_planted_one(size: int) -> None:
    rng = np.random.default_rng(0)
    early, late = zipf(rng, size, 40_000), zipf(rng, size, 40_000)
    shift = rng.permutation(size)
    steady = ec.profile([{"x": early}, {"x": late}], progress=False)
    shifted = ec.profile([{"x": early}, {"x": shift[late]}], progress=False)
    assert abs(steady["x"].drift()) < 0.01
    assert np.abs(steady["x"].slice_drift()).max() < 0.05
    shares = np.arange(1, size + 1) ** -1.1
    moved = np.empty(size)
    moved[shift] = shares
    expected = jensen_shannon((shares * 1e9).astype(int), (moved * 1e9).astype(int))
    assert shifted["x"].drift() == pytest.approx(expected, abs=0.1)
    steps = shifted["x"].slice_drift()
    starts = shifted.slices.keys << shifted.slices.level
    place = int(np.searchsorted(starts, 40_000, "right")) - 1  # the slice it was planted in
    inside = {place - 1, place} if starts[place] < 40_000 else {place - 1}
    for number, step in enumerate(steps.tolist()):
        assert abs(step) < 0.05 or number in inside
    assert steps[list(inside)].max() > 0.3 * expected


@pytest.mark.parametrize("rows", [2000, 30_000])
def test_drift_is_one_where_nothing_remains(rows: int) -> None:
    """However few queries an id has: all of it is drift, none of it is chance."""
    early = np.random.default_rng(0).integers(0, 3000, rows)
    settings = ProfileSettings(drift_buckets=2**20)
    parts = [{"x": early[: rows // 2]}, {"x": early[rows // 2 :] + 3000}]
    profile = Profile({"x": None}, settings)
    for number, part in enumerate(parts):  # rows 0 and 2**20 begin slices of their own
        profile.update(part, row_numbers=number * 2**20 + np.arange(rows // 2))
    assert profile["x"].drift() > 0.97


def test_divergence_of_slices_of_other_sizes_is_about_zero() -> None:
    rng = np.random.default_rng(0)
    shares = np.full(1000, 1e-3)
    found = []
    for _ in range(20):
        slices = [rng.multinomial(n, shares, 2) for n in (1500, 30_000)]
        assert jensen_shannon(slices[0][0], slices[1][1]) > 0.1  # by chance alone
        found.append(divergence(*slices))
    assert abs(float(np.mean(found))) < 0.01 and np.abs(found).max() < 0.05


def test_pairs_tell_determined_features_from_independent_ones() -> None:
    rng = np.random.default_rng(0)
    user, other = zipf(rng, 3000, 20_000), zipf(rng, 3000, 20_000)
    batch = {"user": user, "country": user % 9, "other": other, "constant": np.zeros_like(user)}
    pairs = {(pair.first, pair.second): pair for pair in ec.profile(batch, progress=False).pairs()}
    assert len(pairs) == 6
    assert pairs["user", "country"].share > 0.6  # a lower bound: rare users share buckets
    assert pairs["user", "other"].bits < 0.02
    assert pairs["country", "other"].bits < 0.01
    assert pairs["user", "constant"].bits == pairs["user", "constant"].share == 0
    assert next(iter(pairs)) == ("user", "country")
    same = ec.profile({"a": user % 30, "b": (user % 30) * 7}, progress=False).pairs()[0]
    shares = np.bincount(user % 30) / len(user)
    assert same.bits == pytest.approx(-(shares * np.log2(shares)).sum(), abs=0.05)
