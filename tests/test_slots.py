"""Tables whose hot ids are found in slots: the layout, ``adaptive`` and ``double_hash``."""

from __future__ import annotations

import pytest
import torch

import embcompress as ec
from embcompress.hashing import derive_key, hash_bucket
from embcompress.layouts.packing import absent_code, unpack_codes
from embcompress.layouts.slots import SlotLayout
from embcompress.methods import TableSpec
from tests.plan_cases import unpack_bits

ROWS, WIDTH = 1000, 12
IDS = torch.arange(ROWS)


def counts() -> torch.Tensor:
    """Few different values, so that there are ties; some ids never occur."""
    return torch.randint(0, 30, (ROWS,), generator=torch.Generator().manual_seed(0))


def keys_of(module: ec.Embedding) -> list[int]:
    store = module.plan.store("keys")
    return unpack_bits(module.keys, store.bits)[: store.rows * store.width]


def rows_by_hand(module: ec.Embedding, probe: int) -> list[tuple[int, bool]]:
    """Row of every id, and whether it is its own, by a search through the list of keys."""
    keys, ways = keys_of(module), module.plan.store("keys").width
    buckets, shared = module.plan.store("keys").rows, module.plan.stores[0].rows - len(keys)
    rows = []
    for x in range(ROWS):
        first = hash_bucket(x, derive_key(3, "t", 100), buckets) * ways
        mine = [s for s in range(first, first + ways) if keys[s] == x]
        row = shared + mine[0] if mine else hash_bucket(x, derive_key(3, "t", probe), shared)
        rows.append((row, bool(mine)))
    return rows


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("settings", [{}, {"hot": 0.8, "ways": 2}, {"hot": 0.01, "ways": 16}])
def test_adaptive(settings: dict[str, float], known: bool) -> None:
    module = ec.Embedding(
        ROWS, WIDTH, method=ec.Adaptive(**settings), budget="20%", seed=3, name="t",
        counts=counts() if known else None,
    )  # fmt: skip
    found = rows_by_hand(module, 0)
    assert torch.equal(module(IDS), module.weight[[row for row, _ in found]])
    owned = [row for row, own in found if own]
    assert len(set(owned)) == len(owned) > 0
    full = len(owned) / len(keys_of(module))
    assert full > 0.85 or settings.get("hot") == 0.01
    assert module.plan.bytes == module.weight.numel() * 4 + module.keys.numel()


def test_frequent_ids_own_rows_as_their_buckets_have_room() -> None:
    module = ec.Embedding(ROWS, WIDTH, method="adaptive", budget="20%", counts=counts(), name="t")
    layout = SlotLayout.of(module.plan)
    order = sorted(range(ROWS), key=lambda x: (-int(counts()[x]), x))[: 2 * layout.hot]
    expected: dict[int, list[int]] = {bucket: [] for bucket in range(layout.bucket.buckets)}
    for x in order:
        bucket = expected[hash_bucket(x, derive_key(0, "t", 100), layout.bucket.buckets)]
        if len(bucket) < layout.ways and counts()[x] > 0:
            bucket.append(x)
    keys = torch.tensor(keys_of(module)).view(-1, layout.ways)
    empty = absent_code(layout.bits)
    assert [[x for x in row if x != empty] for row in keys.tolist()] == list(expected.values())


def test_the_padding_id_owns_no_row() -> None:
    often = counts().index_fill(0, torch.tensor(7), 10**6)
    module = ec.Embedding(ROWS, WIDTH, 7, method="adaptive", budget="20%", counts=often)
    assert 7 not in keys_of(module)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("combine", ["sum", "concat"])
def test_double_hash(combine: str, known: bool) -> None:
    module = ec.Embedding(
        ROWS, WIDTH, method=ec.DoubleHash(combine), budget="20%", seed=3, name="t",
        counts=counts() if known else None,
    )  # fmt: skip
    tables = [module.weight_0, module.weight_0 if combine == "sum" else module.weight_1]
    if known:
        both = [rows_by_hand(module, t) for t in range(2)]
    else:
        m = len(module.weight_0)
        keys = [derive_key(3, "t", t) for t in range(2)]
        both = [[(hash_bucket(x, key, m), False) for x in range(ROWS)] for key in keys]
    parts = [table[[row for row, _ in rows]] for table, rows in zip(tables, both, strict=True)]
    if combine == "sum":
        own = torch.tensor([own for _, own in both[0]])
        assert bool(own.any()) == known
        expected = parts[0] + parts[1] * ~own[:, None]
    else:
        expected = torch.cat(parts, dim=1)
    torch.testing.assert_close(module(IDS), expected)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("method", ["adaptive", "double_hash", "cafe"])
@pytest.mark.parametrize("budget", ["100%", "10%", "1%", "0.1%"])
def test_budgets_of_large_tables(method: str, budget: str, known: bool) -> None:
    n = 50_000
    given = torch.arange(n) if known else None
    module = ec.Embedding(n, 16, method=method, budget=budget, counts=given)
    share = float(budget[:-1]) / 100
    assert 0.9 * share < ec.memory(module).ratio <= share


@pytest.mark.parametrize("method", ["adaptive", "cafe"])
def test_tables_of_very_many_ids(method: str) -> None:
    module = ec.Embedding(2**50, 8, method=method, budget=100_000)
    assert 90_000 < module.plan.bytes <= 100_000
    assert module.plan.store("keys").dtype == "uint32"
    ids = torch.tensor([0, 1, 2**31, 2**32, 2**50 - 1])
    assert module(ids).shape == (5, 8)
    layout = SlotLayout.of(module.plan)
    module.keys.copy_(layout.pack(ids))
    rows = [layout.shared + int(b) * layout.ways for b in layout.buckets(ids)]
    assert len(set(rows)) == len(rows) and torch.equal(module(ids), module.weight[rows])


def test_packing_fills_buckets_in_order_and_writes_single_slots() -> None:
    layout = SlotLayout.of_size(TableSpec(500, 4), 40, 0.5, 4)
    packed = layout.pack(torch.arange(500))
    keys = unpack_codes(packed, 0, layout.hot, layout.bits).view(-1, layout.ways)
    for bucket, row in enumerate(keys):
        own = torch.arange(500)[layout.buckets(torch.arange(500)) == bucket]
        assert row.tolist() == own[: layout.ways].tolist()
    layout.write(packed, torch.tensor([3, 9]), torch.tensor([499, 0]))
    keys.view(-1)[[3, 9]] = torch.tensor([499, 0])
    assert torch.equal(unpack_codes(packed, 0, layout.hot, layout.bits), keys.view(-1))
    assert set(unpack_codes(layout.empty(), 0, layout.hot, layout.bits).tolist()) == {511}


def test_other_plans_have_no_slots() -> None:
    with pytest.raises(ValueError, match="not the plan of a table with slots"):
        SlotLayout.of(ec.Embedding(ROWS, WIDTH, method="hash").plan)


def test_settings_are_checked() -> None:
    for method in (ec.Adaptive, ec.DoubleHash, ec.Cafe):
        with pytest.raises(ValueError, match="hot must be a share"):
            method(hot=1.0)
        with pytest.raises(ValueError, match="ways must be an integer"):
            method(ways=0)
    with pytest.raises(ValueError, match="combine must be 'sum' or 'concat', got 'mul'"):
        ec.DoubleHash("mul")
    with pytest.raises(ValueError, match="needs embedding_dim >= 2"):
        ec.Embedding(10, 1, method=ec.DoubleHash("concat"))
