"""Each method's lookup equals its formula, written here in a few lines of torch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import embcompress as ec
from embcompress.engine.reference import address_rows
from embcompress.hashing import derive_key, hash_bucket
from embcompress.methods import TableSpec, register
from embcompress.methods.qr import root_ceiling

ROWS, WIDTH = 1000, 12
IDS = torch.arange(ROWS)


def test_full() -> None:
    module = ec.Embedding(ROWS, WIDTH)
    assert torch.equal(module(IDS), module.weight[IDS])


def test_hash() -> None:
    module = ec.Embedding(ROWS, WIDTH, method="hash", budget="10%", seed=7, name="item")
    key = derive_key(7, "item", 0)
    rows = torch.tensor([hash_bucket(int(x), key, 100) for x in IDS])
    assert module.weight.shape == (100, WIDTH)
    assert torch.equal(module(IDS), module.weight[rows])


@pytest.mark.parametrize("combine", ["mul", "sum", "concat"])
def test_quotient_remainder(combine: str) -> None:
    method = ec.QuotientRemainder(combine=combine)
    module = ec.Embedding(ROWS, WIDTH, method=method, budget="20%")
    m = module.weight_0.shape[0]
    remainder, quotient = module.weight_0[IDS % m], module.weight_1[IDS // m]
    expected = {
        "mul": lambda: remainder * quotient,
        "sum": lambda: remainder + quotient,
        "concat": lambda: torch.cat([remainder, quotient], dim=1),
    }[combine]()
    assert torch.equal(module(IDS), expected)


@pytest.mark.parametrize("partitions", [2, 3, 4, 7])
def test_k_ary_digits_are_unique_over_the_vocabulary(partitions: int) -> None:
    module = ec.Embedding(ROWS, WIDTH, method=ec.QuotientRemainder("sum", partitions))
    digits, rest = [], IDS
    for store in module.plan.stores:
        digits.append(rest % store.rows)
        rest = rest // store.rows
    assert not rest.any()
    assert len(set(zip(*(d.tolist() for d in digits), strict=True))) == ROWS
    tables = [getattr(module, store.name) for store in module.plan.stores]
    expected = sum(table[digit] for table, digit in zip(tables, digits, strict=True))
    torch.testing.assert_close(module(IDS), expected)


@pytest.mark.parametrize("rows", [2**24 + 3, 2**31 + 5, 2**53 + 11, 2**62 + 7])
def test_digits_are_exact_however_large_the_ids(rows: int) -> None:
    plan = ec.QuotientRemainder(partitions=4).plan(TableSpec(rows, 4), root_ceiling(rows, 4))
    ids = [rows - 1, rows - 2, rows // 2]
    for probe in plan.probes:
        digits, _ = address_rows(probe.address, torch.tensor(ids), plan, {})
        assert digits.tolist() == [x // probe.address.divisor % probe.address.radix for x in ids]


def test_low_dim() -> None:
    module = ec.Embedding(ROWS, WIDTH, method="low_dim", budget="30%")
    assert module.weight.shape == (ROWS, 3)
    torch.testing.assert_close(module(IDS), module.weight[IDS] @ module.projection.T)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="combine must be 'mul', 'sum' or 'concat'"):
        ec.QuotientRemainder(combine="product")
    with pytest.raises(ValueError, match="partitions must be"):
        ec.QuotientRemainder(partitions=1)
    with pytest.raises(ValueError, match="embedding_dim >= partitions"):
        ec.Embedding(10, 1, method=ec.QuotientRemainder("concat"))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 9, 10**6, 10**18 - 1, 10**18, 10**18 + 1, 2**62])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_root_ceiling(n: int, k: int) -> None:
    root = root_ceiling(n, k)
    assert root**k >= n and (root == 1 or (root - 1) ** k < n)


def test_every_method_is_described_and_public() -> None:
    for name, description in ec.methods().items():
        cls = type(ec.resolve_method(name))
        assert cls.name == name and getattr(ec, cls.__name__) is cls
        assert 10 < len(description) <= 100 and description.endswith(".")
        assert "Memory:" in (cls.__doc__ or "")
        assert cls() == cls() and hash(cls()) == hash(cls())


def test_a_name_is_registered_once() -> None:
    @dataclass(frozen=True)
    class Impostor(ec.Method):
        name = "hash"

        def sizes(self, table: object) -> range:
            return range(1, 2)

        def plan(self, table: object, size: int) -> ec.LookupPlan:
            raise AssertionError

    with pytest.raises(ValueError, match="'hash' is taken by Hashing"):
        register(Impostor)
    with pytest.raises(TypeError, match="must be decorated with @dataclass"):
        register(type("Plain", (ec.Method,), {"name": "plain"}))
