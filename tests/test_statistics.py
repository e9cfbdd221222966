"""Profiles: exact against numpy, sketches within their bounds, merging, drift, interruption."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils.data import DataLoader

import embcompress as ec
from embcompress import Profile, ProfileInterrupted, ProfileSettings
from embcompress.data import ClickLog, load_click_log
from embcompress.hashing import hash_bucket, mix64
from embcompress.methods import TableSpec
from embcompress.statistics import feature as feature_module
from embcompress.statistics.count_min import CountMin
from embcompress.statistics.distribution import CountDistribution
from embcompress.statistics.drift import TimeSlices, divergence, jensen_shannon
from embcompress.statistics.files import _arrays
from embcompress.statistics.hashes import hash_buckets, mixed_words
from embcompress.statistics.heavy_hitters import HeavyHitters
from embcompress.statistics.hyperloglog import HyperLogLog
from embcompress.statistics.id_sample import IdSample
from embcompress.statistics.power_law import harmonic
from embcompress.statistics.resume import profile_to_file
from tests.peak_memory import measure_peak

Ids = NDArray[np.int64]
SMALL = ProfileSettings(
    exact_ids=500, sketch_columns=2**10, heavy_hitters=64, sampled_ids=128, register_bits=10,
    slices=8, drift_buckets=2**8, sampled_rows=500,
)  # fmt: skip
SIZES = {"exact": 300, "sketched": 5000, "open": None, "bag": 40}


def zipf(rng: np.random.Generator, size: int, count: int, exponent: float = 1.1) -> Ids:
    shares = np.arange(1, size + 1) ** -exponent
    return rng.choice(size, count, p=shares / shares.sum()).astype(np.int64)


def make_batches(seed: int, rows: int, batches: int) -> list[dict[str, Any]]:
    """Batches of all kinds of features; those of "open" outgrow exact counting half way."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(batches):
        lengths = rng.integers(0, 4, rows)
        made.append(
            {
                "exact": zipf(rng, 300, rows).astype(np.int32),
                "sketched": torch.from_numpy(zipf(rng, 5000, rows)),
                "open": zipf(rng, 400, rows) - (1 << 40 if number >= batches / 2 else 0),
                "bag": (
                    torch.from_numpy(rng.integers(0, 40, lengths.sum())),
                    torch.from_numpy(np.cumsum(lengths) - lengths),
                ),
            }
        )
    return made


def run(batches: list[dict[str, Any]], first_row: int = 0, times: Ids | None = None) -> Profile:
    profile = Profile(SIZES, SMALL, has_times=times is not None)
    for batch in batches:
        rows = np.arange(first_row, first_row + len(batch["exact"]))
        part = None if times is None else times[rows]
        profile.update(batch, row_numbers=rows, times=part)
        first_row += len(rows)
    return profile


def assert_equal_states(first: Profile, second: Profile, *, heavy: bool) -> None:
    """Everything that is kept is equal; ``heavy``: the lists of heavy hitters too."""
    first.flush()
    second.flush()
    mine, its = _arrays(first), _arrays(second)
    assert set(mine) == set(its) and len(mine) > 10
    for name in mine:
        if heavy or ".heavy." not in name:
            np.testing.assert_array_equal(mine[name], its[name], err_msg=name)
    assert (first.rows, first.slices.level) == (second.rows, second.slices.level)
    for name in first.features:
        for attribute in ("queries", "largest_bag"):
            assert getattr(first[name], attribute) == getattr(second[name], attribute)


# ------------------------------------------------------------------------------------ the parts


def test_hashes_are_the_librarys() -> None:
    golden = json.loads((Path(__file__).parent / "golden" / "hashing.json").read_text())["hash"]
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


# ------------------------------------------------------------------------------ the whole, exact


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


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> ClickLog:
    return load_click_log(
        SPEC, cache=tmp_path_factory.mktemp("cache"), progress=False
    )  # fmt: skip


SPEC = "synthetic:rows=3000,ids=600,features=3,drift=0"


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


# ------------------------------------------------------------------------------------- sketched


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


# ------------------------------------------------------------------------------------- merging


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


# --------------------------------------------------------------------------------------- drift


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


# --------------------------------------------------------------------------------------- pairs


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


# ---------------------------------------------------------------------------------- interruption


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


# ---------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"x": np.array([0, 10])}, IndexError, r"'x': id 10 is outside \[0, 10\)"),
        ({"x": np.array([-1, 0])}, IndexError, "id -1"),
        ({"x": np.array([0.5])}, TypeError, "int32 or int64, got float64"),
        ({"x": [1, 2]}, TypeError, "tensor or an array, got list"),
        ({"y": np.array([1])}, ValueError, "features"),
        ({"x": (torch.arange(3), torch.tensor([0, 5]))}, ValueError, "'x': .*offset"),
        ((np.arange(3), np.arange(3)), TypeError, "a tuple with one such mapping"),
        (3, TypeError, "got int"),
    ],
)
def test_wrong_batches_are_refused_whole(
    batch: object, error: type[Exception], message: str
) -> None:
    profile = Profile({"x": 10})
    with pytest.raises(error, match=message):
        profile.update(batch)
    assert profile.rows == 0 and profile.counts("x").sum() == 0


def test_wrong_arguments_are_refused(log: ClickLog) -> None:
    one = {"x": np.arange(3)}
    with pytest.raises(ValueError, match="different numbers of rows"):
        ec.profile({**one, "y": np.arange(4)}, progress=False)
    with pytest.raises(ValueError, match="no batches"):
        ec.profile([], progress=False)
    with pytest.raises(ValueError, match="num_embeddings names"):
        ec.profile(one, num_embeddings={"z": 3}, progress=False)
    with pytest.raises(ValueError, match="click log only"):
        ec.profile(one, rows=range(2), progress=False)
    with pytest.raises(ValueError, match="knows its own"):
        ec.profile(log, num_embeddings={"id_0": 3}, progress=False)
    with pytest.raises(TypeError, match="got int"):
        ec.profile(7, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="times must be given"):
        Profile({"x": None}, has_times=True).update(one)
    with pytest.raises(ValueError, match="pass it"):
        ec.profile(one, progress=False).counts("x")
    with pytest.raises(ValueError, match="has ids of 2 and above"):
        ec.profile(one, progress=False).counts("x", 2)
    with pytest.raises(KeyError, match="no feature 'z'"):
        ec.profile(one, progress=False).counts("z")
    for wrong in ({"sketch_columns": 1000}, {"slices": 1}, {"seed": 2**63}, {"exact_ids": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ProfileSettings(**wrong)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- memory

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
