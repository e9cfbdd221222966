"""Profiles: exact counts are numpy's, sketched ones within their bounds, parts merge."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import embcompress as ec
from embcompress import Profile, ProfileSettings
from embcompress.data import ClickLog
from embcompress.methods import TableSpec
from embcompress.statistics.distribution import CountDistribution
from tests.peak_memory import measure_peak
from tests.statistics.logs import SMALL, SPEC, assert_equal_states, make_batches, run, zipf


def test_exact_counts_are_numpys() -> None:
    batches = make_batches(0, rows=700, batches=3)
    profile = run(batches)
    ids = np.concatenate([batch["exact"] for batch in batches])
    counts = np.bincount(ids, minlength=300)
    exact = profile["exact"]
    assert profile.rows == exact.queries == 2100
    assert exact.is_exact and profile.counts("exact").dtype == torch.int64
    assert profile.counts("exact").tolist() == counts.tolist()
    assert exact.seen() == np.count_nonzero(counts)
    share = np.sort(counts)[::-1][: math.ceil(0.1 * exact.seen())].sum() / 2100
    assert exact.distribution().top_mass(0.1) == pytest.approx(share)
    assert TableSpec(300, 8, counts=profile.counts("exact")).counts is not None
    assert exact.bag_sizes[1] == 2100 and exact.bag_sizes.sum() == 2100

    bag_ids = torch.cat([batch["bag"][0] for batch in batches])
    assert profile.counts("bag").tolist() == torch.bincount(bag_ids, minlength=40).tolist()
    lengths = [
        length
        for batch in batches
        for length in np.diff([*batch["bag"][1].tolist(), len(batch["bag"][0])]).tolist()
    ]
    sizes = [lengths.count(0), lengths.count(1), lengths.count(2) + lengths.count(3)]
    assert profile["bag"].bag_sizes[:4].tolist() == [*sizes, 0]
    assert (profile["bag"].largest_bag, profile["bag"].queries) == (3, len(bag_ids))


def test_a_click_log_counts_the_given_rows_only(log: ClickLog) -> None:
    rows = log.split("random", seed=3).train
    profile = ec.profile(log, rows=rows, progress=False)
    assert profile.rows == len(rows) < len(log)
    for feature, (ids, lengths) in zip(log.features, log.bags(rows), strict=True):
        expected = np.bincount(ids, minlength=feature.num_embeddings)
        assert profile.counts(feature.name).tolist() == expected.tolist()
        assert profile[feature.name].queries == (len(rows) if lengths is None else lengths.sum())
    some = ec.profile(log, rows=slice(10, 1500), progress=False)
    rest = ec.profile(log, rows=[*range(10), *range(1500, 3000)], progress=False)  # type: ignore
    assert_equal_states(some.merge(rest), ec.profile(log, progress=False), heavy=True)
    for rows in (np.array([3000]), np.array([-1]), np.array([0.5])):
        with pytest.raises(ValueError, match="rows must be"):
            ec.profile(log, rows=rows, progress=False)


def test_a_spec_is_prepared_and_profiled(log: ClickLog) -> None:
    profile = ec.profile(SPEC, cache=log.directory.parent, progress=False)
    assert_equal_states(profile, ec.profile(log, progress=False), heavy=True)


@pytest.mark.parametrize("batch_size", [64, 1000])
def test_a_data_loader_counts_like_its_rows(batch_size: int) -> None:
    user, item = torch.arange(1000) % 7, torch.arange(2000).reshape(1000, 2) % 11
    data = [({"user": u, "item": i}, 1.0) for u, i in zip(user, item, strict=True)]
    loader: Any = DataLoader(data, batch_size=batch_size)  # type: ignore[arg-type]
    profile = ec.profile(loader, num_embeddings={"item": 11}, progress=False)
    assert profile.counts("user", 7).tolist() == torch.bincount(user).tolist()
    assert profile.counts("item").tolist() == torch.bincount(item.flatten()).tolist()
    assert profile["item"].num_embeddings == 11 and profile["user"].num_embeddings is None
    assert profile["item"].largest_bag == 2 and profile.rows == 1000


def test_buffers_may_be_filled_again() -> None:
    profile = Profile({"array": 5, "tensor": 5, "bags": 5})
    array, tensor = np.zeros(4, np.int64), torch.zeros(4, dtype=torch.int64)
    for id in (1, 3):
        array[:], tensor[:] = id, id
        profile.update({"array": array, "tensor": tensor, "bags": tensor[:, None]})
    for name in profile.features:
        assert profile.counts(name).tolist() == [0, 4, 0, 4, 0]


def test_a_profile_prints_as_a_table(log: ClickLog) -> None:
    lines = str(ec.profile(log, progress=False)).splitlines()
    assert lines[0].split("  ")[0] == "feature" and len(lines) == 2 + len(log.features)
    for word in ("ids", "rows", "queries", "seen", "top-1% mass", "exponent", "drift"):
        assert word in lines[0]
    assert lines[2].split()[:3] == ["id_0", f"{log.features[0].num_embeddings:,}", "3,000"]


def test_sketched_counts_keep_to_their_bounds() -> None:
    ids = zipf(np.random.default_rng(1), 30_000, 200_000)
    counts = np.bincount(ids, minlength=30_000)
    settings = ProfileSettings(
        exact_ids=10, sketch_columns=2**12, heavy_hitters=500, sampled_ids=4000, register_bits=12
    )
    profile = Profile({"x": 30_000}, settings)
    for part in np.array_split(ids, 9):
        profile.update({"x": part})
    estimates, feature = profile.counts("x"), profile["x"]
    assert estimates.shape == (30_000,) and estimates.dtype == torch.float32
    assert not feature.is_exact
    off = np.abs(estimates.numpy() - counts)
    assert off.max() <= 200_000 / 500  # the list of heavy hitters bounds every id
    hot = np.argsort(-counts)[:100]
    assert (off[hot] <= 6 * np.sqrt((counts.astype(float) ** 2).sum() / 2**12)).all()
    assert feature.seen() == pytest.approx(np.count_nonzero(counts), rel=4 * 1.04 / 2**6)

    exact, estimated = CountDistribution.exact(counts), feature.distribution()
    assert estimated.queries == 200_000
    assert estimated.seen == pytest.approx(exact.seen, rel=0.07)
    for share in (0.01, 0.1, 0.5):
        assert estimated.top_mass(share) == pytest.approx(exact.top_mass(share), abs=0.03)
    laws = exact.power_law(), estimated.power_law()
    assert laws[0] is not None and laws[1] is not None
    assert laws[1].exponent == pytest.approx(laws[0].exponent, abs=0.05)


def test_few_ids_of_any_size_are_exact_in_a_sketch() -> None:
    ids = np.array([-5, 2**62, -5, 0, -(2**63), -5, 2**62])
    feature = ec.profile({"x": ids}, progress=False)["x"]
    assert not feature.is_exact and feature.seen() == 4
    assert feature.distribution().counts.tolist() == [3, 2, 1, 1]
    assert feature.distribution().ids.tolist() == [1, 1, 1, 1]


def test_outgrowing_exact_counts_loses_nothing() -> None:
    rng = np.random.default_rng(2)
    parts = [zipf(rng, 400, 1000), zipf(rng, 5000, 1000)]
    grown = Profile({"x": None}, SMALL)
    for part in parts:
        grown.update({"x": part})
        grown.flush()
    assert not grown["x"].is_exact
    sketched = Profile({"x": None}, SMALL)
    sketched.features["x"].use_sketch()
    sketched.update({"x": np.concatenate(parts)})
    assert_equal_states(grown, sketched, heavy=False)


@pytest.mark.parametrize("timed", [False, True])
def test_merged_parts_equal_one_pass(timed: bool) -> None:
    batches = make_batches(3, rows=400, batches=9)
    times = np.random.default_rng(0).integers(0, 2**40, 3600) if timed else None

    def part(first: int, last: int) -> Profile:
        return run(batches[first:last], 400 * first, times)

    whole = part(0, 9)
    whole.flush()
    assert len(whole.slices.keys) > 2 and not whole["open"].is_exact
    left = part(0, 2).merge(part(2, 5)).merge(part(5, 9))
    right = part(0, 2).merge(part(2, 5).merge(part(5, 9)))
    turned = part(5, 9).merge(part(0, 2)).merge(part(2, 5))
    for merged in (left, right, turned):
        assert_equal_states(merged, whole, heavy=False)
        counts = np.bincount(np.concatenate([np.asarray(b["sketched"]) for b in batches]))
        heavy = merged["sketched"].counter.heavy  # type: ignore[union-attr]
        below = counts[heavy.ids] - heavy.counts
        assert (below >= 0).all() and below.max() <= heavy.error <= 3600 / 65
    assert left["exact"].drift() == whole["exact"].drift()


def test_profiles_of_different_things_do_not_merge() -> None:
    mine = Profile({"x": 10})
    mine.update({"x": np.arange(10)})
    for other, message in (
        (Profile({"y": 10}), "features"),
        (Profile({"x": 11}), "num_embeddings"),
        (Profile({"x": 10}, ProfileSettings(seed=1)), "settings"),
        (Profile({"x": 10}, has_times=True), "has_times"),
        (mine, "itself"),
    ):
        with pytest.raises(ValueError, match=message):
            mine.merge(other)
    assert mine.counts("x").tolist() == [1] * 10


_STREAM = """
import sys
import numpy as np
from embcompress import Profile
profile = Profile({"x": 100_000_000, "y": None})
rng = np.random.default_rng(0)
for _ in range(int(sys.argv[1])):
    ids = {"x": rng.integers(0, 100_000_000, 100_000), "y": rng.integers(0, 2**62, 100_000)}
    profile.update(ids)
print(round(profile["x"].seen()), round(profile["y"].seen()))
"""


def test_memory_does_not_grow_with_the_number_of_distinct_ids() -> None:
    few, _, _ = measure_peak(_STREAM, "5")
    many, (seen,), _ = measure_peak(_STREAM, "30")
    rows = 3_000_000
    expected = 1e8 * (1 - math.exp(-rows / 1e8))
    assert [int(n) for n in seen.split()] == pytest.approx([expected, rows], rel=0.04)
    assert many - few < 16e6, f"{few:,} bytes for 500,000 rows, {many:,} for {rows:,}"
