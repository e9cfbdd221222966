"""Samples of what ids occur with, and the methods that address by them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.approximation.anchors import nearest_anchors
from embcompress.approximation.co_occurrence import NOTHING, CoOccurrence, minhash, tokens
from embcompress.bench.training import sample_co_occurrence
from embcompress.data import ClickLog, load_click_log
from embcompress.engine.rows import unpack_bits
from embcompress.hashing import MASK64, derive_key, hash_bucket, mix64
from embcompress.methods import TableSpec

ROWS, WIDTH, SIZE = 120, 8, 6


def pairs(count: int = 3000) -> tuple[Tensor, Tensor]:
    """Ids of the same twelfth occur with the same eight others."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, ROWS - 5, (count,), generator=generator)  # the last five never
    others = ids % 12 * 8 + torch.randint(0, 8, (count,), generator=generator)
    return ids, others


def samples() -> Tensor:
    found = CoOccurrence(ROWS, SIZE)
    ids, others = pairs()
    found.add(ids, tokens("other", others))
    return found.samples()


def test_tokens_are_the_specified_hash() -> None:
    key = derive_key(0, "f", 0)
    expected = [mix64((id ^ key) & MASK64) & (2**63 - 1) for id in (0, 7, 2**40)]
    assert tokens("f", torch.tensor([0, 7, 2**40])).tolist() == expected
    assert not torch.equal(tokens("g", torch.arange(9)), tokens("f", torch.arange(9)))


def test_the_smallest_distinct_tokens_are_kept_whatever_the_order() -> None:
    ids, others = pairs()
    company = tokens("other", others)
    expected = torch.full((ROWS, SIZE), NOTHING)
    for id in range(ROWS):
        own = sorted(set(company[ids == id].tolist()))[:SIZE]
        expected[id, : len(own)] = torch.tensor(own, dtype=torch.int64)
    assert torch.equal(samples(), expected)
    assert (expected[-5:] == NOTHING).all() and (expected[0] != NOTHING).all()
    parts = CoOccurrence(ROWS, SIZE)
    for chunk in torch.randperm(len(ids), generator=torch.Generator().manual_seed(1)).split(701):
        parts.add(ids[chunk], company[chunk])
    assert torch.equal(parts.samples(), expected)


def test_minhashes_agree_as_often_as_samples_do() -> None:
    shared = torch.arange(4)
    own = torch.arange(100, 104), torch.arange(200, 204)
    two = torch.stack([tokens("f", torch.cat([shared, each])) for each in own])
    equal = [len(set(minhash(two, derive_key(0, "", k)).tolist())) == 1 for k in range(2000)]
    assert sum(equal) / 2000 == pytest.approx(4 / 12, abs=0.04)  # Jaccard similarity
    key = derive_key(0, "", 0)
    signed = [mix64((int(t) ^ key) & MASK64) & (2**63 - 1) for t in two[0]]
    assert int(minhash(two, key)[0]) == min(signed)


def table(method: ec.Method, budget: str = "20%", known: bool = True) -> ec.EmbeddingBag:
    company = samples() if known else None
    counts = torch.bincount(pairs()[0], minlength=ROWS)
    config = ec.TableConfig("t", ROWS, WIDTH, counts=counts, co_occurrence=company)
    torch.manual_seed(0)
    collection = ec.EmbeddingBagCollection([config], method=method, budget=budget, seed=3)
    bag = collection.embedding_bags["t"]
    assert isinstance(bag, ec.EmbeddingBag)
    return bag


def codes_of(module: ec.EmbeddingBag) -> Tensor:
    store = module.plan.store("codes")
    positions = torch.arange(store.rows * store.width)
    return unpack_bits(module.codes, positions, store.bits).view(store.rows, store.width)


@pytest.mark.parametrize("budget", ["12%", "40%"])
def test_lma_reads_rows_by_minhashes(budget: str) -> None:
    module = table(ec.Lma(parts=2), budget)
    rows, company = module.weight.shape[0], samples()
    columns = []
    for t in range(2):
        least = minhash(company, derive_key(3, "t", t)).tolist()
        key = derive_key(3, "t", 2 + t)
        columns.append(torch.tensor([hash_bucket(value, key, rows) for value in least]))
    codes = torch.stack(columns, 1)
    assert torch.equal(codes_of(module), codes)
    expected = torch.cat([module.weight[codes[:, t]] for t in range(2)], 1)
    assert torch.equal(module.vectors(torch.arange(ROWS)), expected.detach())
    bits = module.plan.store("codes").bits
    assert module.plan.bytes == rows * WIDTH // 2 * 4 + -(-ROWS * 2 * bits // 8)


def test_ids_that_are_alike_share_more() -> None:
    codes = codes_of(table(ec.Lma(parts=8), "60%"))
    same = codes[:, None] == codes[None]
    alike = torch.arange(ROWS)[:, None] % 12 == torch.arange(ROWS)[None] % 12
    alike[-5:], alike[:, -5:] = False, False
    other = ~(torch.arange(ROWS)[:, None] % 12 == torch.arange(ROWS)[None] % 12)
    alike.fill_diagonal_(False)
    assert same[alike].float().mean() > 0.5 > 5 * same[other].float().mean()


def test_lma_without_co_occurrence_is_plain_hashing() -> None:
    module = table(ec.Lma(parts=2), known=False)
    assert [store.name for store in module.plan.stores] == ["weight"]
    rows = module.weight.shape[0]
    parts = []
    for t in range(2):
        key = derive_key(3, "t", t)
        parts.append(module.weight[[hash_bucket(id, key, rows) for id in range(ROWS)]])
    assert torch.equal(module.vectors(torch.arange(ROWS)), torch.cat(parts, 1).detach())


@pytest.mark.parametrize("method", [ec.Lma(), ec.Anchors()], ids=str)
def test_codes_are_saved_and_training_goes_on(method: ec.Method) -> None:
    whole, half = table(method), table(method)

    def step(module: ec.EmbeddingBag, optimizer: torch.optim.Optimizer, number: int) -> None:
        ids = torch.randint(0, ROWS, (10, 3), generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        (module(ids) - 1).square().sum().backward()
        optimizer.step()

    optimizers = [torch.optim.Adagrad(m.parameters(), lr=0.1) for m in (whole, half)]
    for number in range(6):
        step(whole, optimizers[0], number)
    for number in range(3):
        step(half, optimizers[1], number)
    resumed = table(method)
    resumed.codes.zero_()
    optimizer = torch.optim.Adagrad(resumed.parameters(), lr=0.1)
    resumed.load_state_dict(half.state_dict())
    optimizer.load_state_dict(optimizers[1].state_dict())
    for number in range(3, 6):
        step(resumed, optimizer, number)
    assert torch.equal(resumed.to_dense(), whole.to_dense())


@pytest.mark.parametrize("shape", [(ROWS - 1, 3), (ROWS,), (ROWS, 0)])
def test_samples_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="co_occurrence of table 't' must be int64 of shape"):
        TableSpec(ROWS, WIDTH, "t", co_occurrence=torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be int64"):
        TableSpec(ROWS, WIDTH, "t", co_occurrence=torch.zeros(ROWS, 3))
    with pytest.raises(ValueError, match="size must be at least 1"):
        CoOccurrence(ROWS, 0)


def test_the_sample_of_a_click_log(click_log: ClickLog) -> None:
    """Every pair of ids in a row of bags, against loops."""
    log, rows = click_log, range(40)
    found = sample_co_occurrence(log, np.arange(40))
    batch = log.batch(np.arange(40))
    company: dict[tuple[str, int], set[int]] = {}
    for row in rows:
        bags = {}
        for number, feature in enumerate(log.features):
            at = number * len(rows) + row
            bags[feature.name] = batch.ids[batch.offsets[at] : batch.offsets[at + 1]]
        for name, ids in bags.items():
            for other, others in bags.items():
                if other != name:
                    for id in ids.tolist():
                        company.setdefault((name, id), set()).update(tokens(other, others).tolist())
    for feature in log.features:
        for id in range(feature.num_embeddings):
            expected = sorted(company.get((feature.name, id), set()))[:16]
            own = found[feature.name][id]
            assert own[own != NOTHING].tolist() == expected
    assert company


@pytest.fixture
def click_log(tmp_path: Path) -> ClickLog:
    return load_click_log("synthetic:rows=64", cache=tmp_path, progress=False)


# ------------------------------------------------------------------------------------- anchors


def breadth_first(company: Tensor, anchors: list[int]) -> list[dict[int, int]]:
    """Distances from each id to the anchors within three tokens, by plain sets."""
    sets = [set(row[row != NOTHING].tolist()) for row in company]
    neighbours = [
        {other for other in range(len(sets)) if sets[id] & sets[other]} for id in range(len(sets))
    ]
    distances: list[dict[int, int]] = [{} for _ in sets]
    for number, anchor in enumerate(anchors):
        reached = {anchor}
        distances[anchor][number] = 0
        for hop in (1, 2, 3):
            reached |= {other for id in reached for other in neighbours[id]}
            for id in reached:
                distances[id].setdefault(number, hop)
    return distances


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_nearest_anchors_are_those_of_breadth_first_search(count: int) -> None:
    company, anchors = samples(), [0, 1, 2, 14, 26, 38, 50]  # five of one kind, one of two others
    company[3] = torch.cat([company[0][:3], company[4][:3]])  # joins kind 0 to kind 4
    found = nearest_anchors(company, torch.tensor(anchors), count, 99)
    distances = breadth_first(company, anchors)
    reached = 0
    for id in range(ROWS):
        own = [distances[id].get(int(anchor), 99) for anchor in found[id]]
        expected = sorted(distances[id].values())[:count]
        assert own[: len(expected)] == expected
        reached += len(expected)
    assert reached > 40  # the test looks at something
    assert found.min() >= 0 and found.max() < len(anchors)
    assert torch.equal(found, nearest_anchors(company, torch.tensor(anchors), count, 99))


def test_ids_without_company_get_hashed_anchors() -> None:
    nothing = torch.full((500, 1), NOTHING)
    found = nearest_anchors(nothing, torch.arange(10), 2, 7)
    assert found[:10, 0].tolist() == list(range(10))  # their own
    assert found[10:, 0].tolist() == [hash_bucket(id, 8, 10) for id in range(10, 500)]
    assert found[:, 1].tolist() == [hash_bucket(id, 9, 10) for id in range(500)]


def test_anchors_are_read_through_the_encoder() -> None:
    module = table(ec.Anchors(nearest=2), "45%")
    count = module.weight.shape[0]
    counts = torch.bincount(pairs()[0], minlength=ROWS)
    order = counts.argsort(descending=True, stable=True)[:count]
    codes = codes_of(module)
    assert torch.equal(codes, nearest_anchors(samples(), order, 2, derive_key(3, "t", 1)))
    assert torch.equal(codes[order, 0], torch.arange(count))  # an anchor is nearest to itself
    rows = torch.cat([module.weight[codes[:, t]] for t in range(2)], 1)
    torch.testing.assert_close(module.vectors(torch.arange(ROWS)), rows @ module.projection.T)
    bits = module.plan.store("codes").bits
    expected = 4 * (count * WIDTH // 2 + WIDTH * WIDTH) + -(-ROWS * 2 * bits // 8)
    assert module.plan.bytes == expected


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="nearest must be at least 1, got 0"):
        ec.Anchors(nearest=0)
    with pytest.raises(ValueError, match="parts must be at least 1, got 0"):
        ec.Lma(parts=0)


@pytest.mark.parametrize("method", ["lma", "anchors"])
def test_compress_takes_co_occurrence_and_says_where_it_is_missing(method: str) -> None:
    def compressed(**known: object) -> tuple[torch.nn.ModuleDict, str]:
        bag = torch.nn.EmbeddingBag(ROWS, WIDTH, mode="sum")
        model = torch.nn.ModuleDict({"item": bag})
        report = ec.compress(model, method=method, budget="60%", seed=3, **known)
        return model, str(report)

    model, text = compressed(co_occurrence={"item": samples()})
    spec = ec.TableConfig("item", ROWS, WIDTH, co_occurrence=samples())
    expected = ec.EmbeddingBagCollection([spec], method=method, budget="60%", seed=3)
    assert torch.equal(model["item"].codes, expected.embedding_bags["item"].codes)
    assert "co_occurrence" not in text
    plain, text = compressed()
    assert "no likeness is known: give data= or co_occurrence=" in text
    assert plain["item"].plan != model["item"].plan or not torch.equal(
        plain["item"].codes, model["item"].codes
    )
    with pytest.raises(ValueError, match=r"co_occurrence name \['other'\], which are no tables"):
        compressed(co_occurrence={"other": samples()})
    with pytest.raises(ValueError, match="co_occurrence of table 'item' must be int64 of shape"):
        compressed(co_occurrence={"item": samples()[:5]})
