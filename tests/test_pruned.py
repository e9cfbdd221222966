"""Pruned vocabularies: addresses, codes, which ids are kept, and what the fallback is."""

from __future__ import annotations

import pytest
import torch

import embcompress as ec
from embcompress.hashing import derive_key, hash_bucket, mix64
from embcompress.importance import strongest, weakest
from embcompress.layouts.packing import pack_codes, unpack_codes, write_codes
from embcompress.layouts.pruned import PrunedLayout
from embcompress.methods import TableSpec
from embcompress.plan import LookupPlan
from tests.plan_cases import pack_bits, unpack_bits

ROWS, WIDTH = 1000, 12
IDS = torch.arange(ROWS)


def counts() -> torch.Tensor:
    """Few different values, so that there are ties."""
    return torch.randint(0, 30, (ROWS,), generator=torch.Generator().manual_seed(0))


def codes_of(module: ec.Embedding) -> list[int]:
    return unpack_bits(module.codes, module.plan.store("codes").bits)[:ROWS]


def kept_of(module: ec.Embedding) -> set[int]:
    absent = 2 ** module.plan.store("codes").bits - 1
    return {x for x, code in enumerate(codes_of(module)) if code != absent}


@pytest.mark.parametrize("fallback", [1, 7, 0.25])
def test_an_id_reads_its_row_or_its_fallback(fallback: float) -> None:
    module = ec.Embedding(ROWS, WIDTH, method=ec.Pruned(fallback), budget="20%", seed=3, name="t")
    rows, bits = module.plan.store("weight").rows, module.plan.store("codes").bits
    kept = len(kept_of(module))
    shared = rows - kept
    assert shared == (fallback if isinstance(fallback, int) else int(fallback * kept))
    key = derive_key(3, "t", 0)
    absent = 2**bits - 1
    expected = [
        code if code != absent else hash_bucket(x, key, shared)
        for x, code in enumerate(codes_of(module))
    ]
    assert torch.equal(module(IDS), module.weight[expected])
    assert sorted(row for row in expected if row >= shared) == list(range(shared, rows))


@pytest.mark.parametrize("kept", [1, 2, 6, 7, 8, 126, 127, 1000])
def test_codes_take_the_fewest_bits_and_all_bytes_count(kept: int) -> None:
    plan = ec.Pruned().plan(TableSpec(ROWS, WIDTH), kept)
    bits = next(b for b in range(33) if 2**b > kept + 1)  # every row, the fallback, and "absent"
    assert plan.store("codes").dtype == f"uint{bits}"
    assert plan.bytes == (kept + 1) * WIDTH * 4 + -(-ROWS * bits // 8)


def test_counts_keep_the_most_frequent_ids() -> None:
    module = ec.Embedding(ROWS, WIDTH, method="pruned", budget="20%", counts=counts())
    order = sorted(range(ROWS), key=lambda x: (-int(counts()[x]), x))
    codes, kept = codes_of(module), len(kept_of(module))
    assert [codes[x] for x in order[:kept]] == list(range(1, kept + 1))


def test_without_counts_the_smallest_hashes_are_kept() -> None:
    def kept(seed: int) -> set[int]:
        module = ec.Embedding(ROWS, WIDTH, method="pruned", budget="20%", seed=seed, name="t")
        return kept_of(module)

    def hashed(x: int) -> int:
        value = mix64(x ^ derive_key(0, "t", 1))
        return value - 2**64 if value >> 63 else value

    assert kept(0) == set(sorted(range(ROWS), key=hashed)[: len(kept(0))])
    assert kept(0) != kept(1)


@pytest.mark.parametrize("known", [False, True])
def test_the_padding_id_takes_no_row(known: bool) -> None:
    given = counts().index_fill(0, torch.tensor(7), 10**6) if known else None
    module = ec.Embedding(ROWS, WIDTH, 7, method="pruned", budget="20%", counts=given)
    assert 7 not in kept_of(module) and len(kept_of(module)) == module.weight.shape[0] - 1
    everything = ec.Embedding(10, 4, 7, method="pruned", budget=1000, counts=None)
    assert PrunedLayout.of(everything.plan).kept == 10


def test_rare_ids_get_no_row_whatever_the_budget() -> None:
    method = ec.Pruned(min_count=5)
    module = ec.Embedding(ROWS, WIDTH, method=method, budget="100%", counts=counts())
    assert kept_of(module) == {x for x in range(ROWS) if counts()[x] >= 5}
    never = ec.Embedding(ROWS, WIDTH, method=ec.Pruned(min_count=99), counts=counts())
    assert len(kept_of(never)) == 1


@pytest.mark.parametrize("fallback", [1, 5])
@pytest.mark.parametrize("known", [False, True])
def test_a_trained_table_keeps_its_rows_and_the_others_means(fallback: int, known: bool) -> None:
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    method, given = ec.Pruned(fallback), counts() if known else None
    table = TableSpec(ROWS, WIDTH, "t", 0, "float32", given)
    plan = method.plan(table, 300)
    module = ec.Embedding.from_plan(plan, method)
    module.load_state_dict({**method.fit(table, plan, weight), "plan": module.state_dict()["plan"]})
    kept = sorted(kept_of(module))
    distance = (weight - weight.mean(0)).norm(dim=1)
    score = counts().float() if known else distance
    assert sorted(score[kept]) == sorted(score)[-300:]
    assert torch.equal(module(torch.tensor(kept)), weight[kept])
    share = given.double() if known else torch.ones(ROWS).double()
    for row in range(fallback):
        readers = [
            x
            for x in range(ROWS)
            if x not in kept
            and (fallback == 1 or hash_bucket(x, derive_key(0, "t", 0), fallback) == row)
        ]
        mean = (weight[readers] * share[readers, None]).sum(0) / share[readers].sum()
        torch.testing.assert_close(module.weight[row], mean.float())


def test_the_fallback_of_nobody_is_finite() -> None:
    weight, kept = torch.randn(10, 3), torch.arange(9)
    counted = torch.tensor([1.0] * 9 + [0.0])
    layout = PrunedLayout(10, 3, 9, ec.Pruned(4).layout(TableSpec(20, 3), 5).fallback)
    assert torch.allclose(layout.mean_fallback(weight, kept, counted), weight[9:].expand(4, 3))
    assert not layout.mean_fallback(weight, torch.arange(10)).any()


def test_other_plans_are_no_pruned_tables() -> None:
    for method in ("full", "hash", "qr"):
        with pytest.raises(ValueError, match="not the plan of a pruned table"):
            PrunedLayout.of(ec.Embedding(ROWS, WIDTH, method=method).plan)
    plan = ec.Pruned(3).plan(TableSpec(ROWS, WIDTH), 100)
    assert PrunedLayout.of(LookupPlan.from_json(plan.with_pool("sum", 5).to_json())).kept == 100


@pytest.mark.parametrize(
    "wrong",
    [
        {"fallback": 0}, {"fallback": 0.0}, {"fallback": 1.5}, {"fallback": True},
        {"importance": "recency"}, {"new_rows": "kept"}, {"min_count": -1}, {"interval": 0},
        {"start": -1}, {"rate": 0.0}, {"rate": 1.1}, {"decay": -0.1}, {"decay": 1.1},
    ],
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ec.Pruned(**wrong)


# ------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 24, 31, 32])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1003])
def test_packing_is_the_plans_stream_of_bits(bits: int, count: int) -> None:
    generator = torch.Generator().manual_seed(bits * 10_000 + count)
    codes = torch.randint(0, 2**bits, (count,), generator=generator)
    packed = pack_codes(codes, bits)
    assert torch.equal(packed, pack_bits(codes.tolist(), bits))
    assert torch.equal(unpack_codes(packed, 0, count, bits), codes)
    assert torch.equal(
        unpack_codes(packed, count // 3, count // 2, bits), codes[count // 3 : count // 2]
    )
    where = torch.randperm(count, generator=generator)[: max(1, count // 5)]
    codes[where] = torch.randint(0, 2**bits, (len(where),), generator=generator)
    write_codes(packed, where, codes[where], bits)
    assert torch.equal(packed, pack_bits(codes.tolist(), bits))


def test_packing_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embcompress.layouts.packing._CHUNK", 16)
    codes = torch.randint(0, 2**11, (100,))
    assert torch.equal(pack_codes(codes, 11), pack_bits(codes.tolist(), 11))
    assert torch.equal(unpack_codes(pack_codes(codes, 11), 5, 99, 11), codes[5:99])


def test_extremes_break_ties_by_position() -> None:
    values = torch.tensor([3, 1, 3, 2, 1, 3])
    assert strongest(values, 4).tolist() == [0, 2, 5, 3]
    assert weakest(values, 3).tolist() == [1, 4, 3]
    assert strongest(values, 2).tolist() == [0, 2]
    assert strongest(values, 0).tolist() == []
    assert weakest(torch.tensor([0, -(2**63), 5]), 1).tolist() == [1]
