"""The hash against its golden values, in every form, and as a random function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embcompress.engine import Bags, hashing, lookup
from embcompress.hashing import MASK64, derive_key, hash_bucket, hash_sign, mix64
from embcompress.plan import Digit, Hash, LookupPlan, Probe, Sign, Store

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "golden" / "hashing.json").read_text()
)
BUCKETS = (1, 2, 1000, 2**31, 2**40, 2**62)


def signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return value - 2**64 if value >> 63 else value


def test_golden_mix() -> None:
    for row in GOLDEN["mix64"]:
        value, mixed = int(row["value"]), int(row["mixed"])
        assert mix64(value) == mixed
        assert hashing.mix64(torch.tensor([signed(value)])).tolist() == [signed(mixed)]


@pytest.mark.parametrize("buckets", BUCKETS)
def test_golden_buckets(buckets: int) -> None:
    for key in {row["key"] for row in GOLDEN["hash"]}:
        rows = [row for row in GOLDEN["hash"] if row["key"] == key]
        ids = [int(row["id"]) for row in rows]
        expected = [int(row["buckets"][str(buckets)]) for row in rows]
        assert all(0 <= bucket < buckets for bucket in expected)
        assert [hash_bucket(id, int(key), buckets) for id in ids] == expected
        assert hashing.hash_bucket(torch.tensor(ids), int(key), buckets).tolist() == expected


def test_golden_signs() -> None:
    for row in GOLDEN["hash"]:
        assert hash_sign(int(row["id"]), int(row["key"])) == row["sign"]


def golden_ids(key: str) -> list[int]:
    """Golden ids that a vocabulary can hold."""
    ids = [int(row["id"]) for row in GOLDEN["hash"] if row["key"] == key]
    return [id for id in ids if 0 <= id < 2**63 - 1]


@pytest.mark.parametrize("key", sorted({row["key"] for row in GOLDEN["hash"]}))
@pytest.mark.parametrize("buckets", [1, 2, 1000, 2**20 + 7])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_plan_reads_the_hashed_row(key: str, buckets: int, dtype: torch.dtype) -> None:
    """Whatever engine runs the plan: row numbers come back as float32 values."""
    plan = LookupPlan(
        2**63 - 1,
        2,
        stores=(Store("rows", buckets, 1), Store("ones", 1, 1)),
        probes=(Probe("rows", Hash(int(key), buckets)), Probe("ones", Digit(1, 1), Sign(int(key)))),
        combine="concat",
    )
    stores = {"rows": torch.arange(buckets).float()[:, None], "ones": torch.ones(1, 1)}
    ids = [id for id in golden_ids(key) if id <= torch.iinfo(dtype).max]
    tensor = torch.tensor(ids, dtype=dtype)
    expected = [
        [float(hash_bucket(id, int(key), buckets)), float(hash_sign(id, int(key)))] for id in ids
    ]
    assert lookup(plan, stores, Bags(tensor, tensor)).tolist() == expected


def test_the_tensor_form_equals_the_integers_on_random_bits() -> None:
    random = np.random.default_rng(0)
    values = random.integers(-(2**63), 2**63, 500, endpoint=False, dtype=np.int64)
    keys, buckets_of = values[:50].tolist(), (values[50:100] & (2**63 - 1)).tolist()
    for key, buckets in zip(keys, buckets_of, strict=True):
        expected = [hash_bucket(id, key & MASK64, buckets) for id in values.tolist()]
        actual = hashing.hash_bucket(torch.from_numpy(values), key & MASK64, buckets)
        assert actual.tolist() == expected


# ----------------------------------------------------------------------------------- randomness

COUNT = 20_000
PATTERNS = {
    "consecutive": torch.arange(COUNT),
    "multiples of 1000": torch.arange(COUNT) * 1000,
    "shifted by 20 bits": torch.arange(COUNT) << 20,
    "high bits alone": torch.arange(COUNT) << 48,
    "behind 2**40": torch.arange(COUNT) + 2**40,
}


def normal_deviate(chi_square: float, freedom: int) -> float:
    """The chi-square as a standard normal number (Wilson and Hilferty's approximation)."""
    variance = 2 / (9 * freedom)
    return ((chi_square / freedom) ** (1 / 3) - (1 - variance)) / variance**0.5


@pytest.mark.parametrize("buckets", [2, 64, 997])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_buckets_are_uniform(pattern: str, buckets: int) -> None:
    """Chi-square within five deviations, for the structured ids of real vocabularies."""
    for probe in range(8):
        rows = hashing.hash_bucket(PATTERNS[pattern], derive_key(0, "uniform", probe), buckets)
        counts = torch.bincount(rows, minlength=buckets).double()
        expected = COUNT / buckets
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(normal_deviate(chi_square, buckets - 1)) < 5, probe


@pytest.mark.parametrize("pattern", PATTERNS)
def test_two_keys_are_independent(pattern: str) -> None:
    """Pairs of ids that collide under both keys are as many as chance gives."""
    buckets, ids = 200, PATTERNS[pattern]
    expected = COUNT * (COUNT - 1) / 2 / buckets**2
    for probe in range(8):
        first = hashing.hash_bucket(ids, derive_key(0, "a", probe), buckets)
        second = hashing.hash_bucket(ids, derive_key(0, "b", probe), buckets)
        together = torch.bincount(first * buckets + second, minlength=buckets**2).double()
        pairs = float((together * (together - 1) / 2).sum())
        assert abs(pairs - expected) < 5 * expected**0.5, (pattern, probe)


def test_the_sign_is_independent_of_the_bucket_of_another_key() -> None:
    ids = PATTERNS["consecutive"]
    rows = hashing.hash_bucket(ids, derive_key(0, "row", 0), 100)
    sign_bit = hashing.mix64(ids ^ signed(derive_key(0, "row", 1))) < 0
    negative = torch.bincount(rows, weights=sign_bit.double(), minlength=100)
    size = torch.bincount(rows, minlength=100).double()
    deviations = (negative - size / 2) / (size / 4).sqrt()
    assert float(deviations.abs().max()) < 5


# ----------------------------------------------------------------------------------------- keys


def test_golden_keys() -> None:
    for row in GOLDEN["derive_key"]:
        assert derive_key(int(row["seed"]), row["name"], row["probe"]) == int(row["key"]), row


def test_keys_depend_on_everything_they_are_derived_from() -> None:
    arguments = [
        (seed, name, probe)
        for seed in (0, 1, -1, 256)
        for name in ("", "a", "b", "ab", "\x00")
        for probe in (0, 1, 2, 256)
    ]
    assert len({derive_key(*each) for each in arguments}) == len(arguments)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_a_seed_of_more_than_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed must fit in a signed 64-bit integer"):
        derive_key(seed, "", 0)


@pytest.mark.parametrize("probe", [-1, 2**32])
def test_a_probe_number_beyond_32_bits_is_refused(probe: int) -> None:
    with pytest.raises(ValueError, match="probe must be"):
        derive_key(0, "", probe)
