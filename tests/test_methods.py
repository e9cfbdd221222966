"""Each method's lookup equals its formula, written here in a few lines of torch."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy
import pytest
import torch
from torch import nn

import embcompress as ec
from embcompress.engine.rows import address_rows
from embcompress.hashing import derive_key, hash_bucket
from embcompress.layouts.factors import root_ceiling
from embcompress.methods import TableSpec, register

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


@pytest.mark.parametrize("rows", [1, 2, 17, 1000, 4096])
@pytest.mark.parametrize("partitions", [2, 3, 4])
@pytest.mark.parametrize("kind", ["radix", "coprime"])
def test_complementary_partitions_are_unique(kind: str, partitions: int, rows: int) -> None:
    method = ec.QuotientRemainder("sum", partitions, kind)
    table = TableSpec(rows, 4)
    for size in {method.sizes(table)[0], rows // 3 + 2, rows}:
        if size not in method.sizes(table):
            continue
        plan = method.plan(table, size)
        read = [address_rows(p.address, torch.arange(rows), plan, {})[0] for p in plan.probes]
        assert len(set(zip(*(r.tolist() for r in read), strict=True))) == rows


def test_hashed_partitions() -> None:
    module = ec.Embedding(
        ROWS, WIDTH, method=ec.QuotientRemainder("sum", 2, "hash"), budget="20%", seed=2, name="a"
    )
    rows = [
        torch.tensor([hash_bucket(int(x), derive_key(2, "a", t), store.rows) for x in IDS])
        for t, store in enumerate(module.plan.stores)
    ]
    assert torch.equal(module(IDS), module.weight_0[rows[0]] + module.weight_1[rows[1]])


def hashed_rows(seed: int, name: str, probe: int, buckets: int) -> torch.Tensor:
    return torch.tensor([hash_bucket(int(x), derive_key(seed, name, probe), buckets) for x in IDS])


def test_multihash() -> None:
    module = ec.Embedding(ROWS, WIDTH, method="multihash", budget="10%", seed=3, name="item")
    rows = [hashed_rows(3, "item", t, 100) for t in range(4)]
    torch.testing.assert_close(module(IDS), sum(module.weight[r] for r in rows))


def test_hash_embeddings() -> None:
    method = ec.MultiHash(hashes=2, weighted=True, weight_ratio=3)
    module = ec.Embedding(ROWS, WIDTH, method=method, budget="15%", seed=3, name="item")
    m, w = module.weight.shape[0], module.importance.shape[0]
    assert w == 3 * m and m * WIDTH + 2 * w <= 0.15 * ROWS * WIDTH < (m + 1) * WIDTH + 2 * (w + 3)
    with torch.no_grad():
        module.importance.normal_()
    p = module.importance[hashed_rows(3, "item", 2, w)]
    expected = sum(p[:, t, None] * module.weight[hashed_rows(3, "item", t, m)] for t in range(2))
    torch.testing.assert_close(module(IDS), expected)


def test_the_vectors_of_thinc() -> None:
    hash_embed = pytest.importorskip("thinc.api").HashEmbed
    layer = hash_embed(nO=WIDTH, nV=50, seed=11)
    layer.initialize()
    ids = [0, 1, 7, 2**31, 2**40 + 3, 2**63 - 2]
    theirs = torch.from_numpy(layer.predict(numpy.array(ids, numpy.uint64)))
    module = ec.MultiHash.from_thinc(torch.from_numpy(layer.get_param("E")), seed=11)
    torch.testing.assert_close(module(torch.tensor(ids)), theirs)
    with pytest.raises(ValueError, match="unsigned 32-bit"):
        ec.MultiHash.from_thinc(torch.zeros(5, 2), seed=-1)


def test_unified() -> None:
    tables = [ec.TableConfig("user", ROWS, WIDTH), ec.TableConfig("item", 300, WIDTH)]
    collection = ec.EmbeddingBagCollection(tables, method="unified", budget="10%", seed=5)
    weight = collection.embedding_bags["user"].weight
    assert weight is collection.embedding_bags["item"].weight
    assert ec.memory(collection).total == weight.numel() * 4 <= 0.1 * 1300 * WIDTH * 4
    ids = torch.arange(300)
    output = collection({"user": ids, "item": ids})
    for name, part in zip(("user", "item"), output.split(WIDTH, dim=1), strict=True):
        chunks = [weight[hashed_rows(5, name, t, len(weight))[:300]] for t in range(4)]
        assert torch.equal(part, torch.cat(chunks, dim=1))


def test_unified_vectors_depend_on_names_alone() -> None:
    def vectors(*names: str) -> dict[str, torch.Tensor]:
        tables = [ec.TableConfig(name, ROWS, 8) for name in names]
        budget = 1600  # the same store for any number of tables
        collection = ec.EmbeddingBagCollection(tables, method="unified", budget=budget, seed=1)
        with torch.no_grad():
            weight = collection.embedding_bags[names[0]].weight
            weight.copy_(torch.arange(weight.numel()).reshape(weight.shape))
        output = collection({name: IDS for name in names}).split(8, dim=1)
        return dict(zip(names, output, strict=True))

    before, after = vectors("a", "b"), vectors("c", "b", "a")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_unified_narrow_tables_have_a_projection() -> None:
    method = ec.Unified(chunk=2, probes="vocabulary")
    tables = [ec.TableConfig("large", 100_000, 8), ec.TableConfig("small", 9, 8)]
    collection = ec.EmbeddingBagCollection(tables, method=method, budget="1%")
    large, small = (collection.embedding_bags[name] for name in ("large", "small"))
    assert len(large.plan.probes) == 4 and large.plan.head is None
    assert len(small.plan.probes) == 1 and small.projection.shape == (8, 2)


def test_unified_through_compress() -> None:
    model = nn.ModuleDict(
        {"a": nn.EmbeddingBag(1000, 16, mode="sum"), "b": nn.ModuleList([nn.Embedding(500, 8)])}
    )
    report = ec.compress(model, method="unified", budget="10%")
    assert model["a"].weight is model["b"][0].weight
    assert ec.memory(model).total <= report.budget == 8000
    vectors = model["a"].to_dense()[7], model["b"][0].to_dense()[7]
    copied = copy.deepcopy(model)
    assert copied["a"].weight is copied["b"][0].weight
    assert torch.equal(copied["a"].to_dense()[7], vectors[0])
    assert torch.equal(copied["b"][0].to_dense()[7], vectors[1])


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_a_shared_store_is_updated_once_a_step(optimizer: str) -> None:
    tables = [ec.TableConfig(name, ROWS, 8) for name in ("a", "b")]
    fused, plain = (
        ec.EmbeddingBagCollection(tables, method="unified", budget="2%") for _ in range(2)
    )
    plain.load_state_dict(fused.state_dict())
    ec.fuse_optimizer(fused, optimizer, lr=0.1)
    kinds = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}
    step = kinds[optimizer](plain.parameters(), lr=0.1)
    for k in range(3):
        batch = {"a": IDS[k::7], "b": IDS[k::7].flip(0)}
        for collection in (fused, plain):
            (collection(batch) ** 2).sum().backward()
        step.step()
        step.zero_grad()
    a, b = (c.embedding_bags["a"].weight for c in (fused, plain))
    torch.testing.assert_close(a, b)


def test_mixed_dim_by_table() -> None:
    sizes = {"small": 10, "middle": 1000, "large": 100_000}
    tables = [ec.TableConfig(name, n, 16) for name, n in sizes.items()]
    collection = ec.EmbeddingBagCollection(tables, method=ec.MixedDim(alpha=0.2), budget="26%")
    widths = {name: bag.plan.stores[0].width for name, bag in collection.embedding_bags.items()}
    assert widths["small"] == 16 > widths["middle"] > widths["large"] == 4
    # The rule, up to rounding: d_middle / d_large = (n_large / n_middle)^0.2.
    assert 3.5 * 100**0.2 - 0.5 <= widths["middle"] <= 4.5 * 100**0.2 + 0.5
    bag = collection.embedding_bags["large"]
    vectors = bag.weight[:5] @ bag.projection.T
    torch.testing.assert_close(bag.to_dense()[:5], vectors)


def test_mixed_dim_below_one_column_shares_rows() -> None:
    """1 % of a table of width 64 is less than a float an id."""
    module = ec.Embedding(10_000, 64, method="mixed_dim", budget="1%")
    assert 0.99 * 0.01 < module.plan.bytes / module.plan.dense_bytes <= 0.01
    rows, width = module.weight.shape
    assert width == 1 and rows < 10_000
    key = TableSpec(10_000, 64).key(0)
    row = torch.tensor([hash_bucket(i, key, rows) for i in range(10_000)])
    torch.testing.assert_close(module.to_dense(), module.weight[row] @ module.projection.T)
    weight = torch.randn(rows, 1)[row] @ torch.randn(1, 64)
    fitted = ec.Embedding.from_pretrained(weight, method="mixed_dim", budget="1%")
    torch.testing.assert_close(fitted.to_dense(), weight, atol=1e-3, rtol=1e-3)


def test_mixed_dim_by_frequency() -> None:
    counts = torch.arange(ROWS).flip(0) ** 3
    counts = counts[torch.randperm(ROWS)]
    module = ec.EmbeddingBag(
        ROWS,
        WIDTH,
        mode="sum",
        method=ec.MixedDim(alpha=0.6, blocks=3),
        budget="40%",
        counts=counts,
    )
    order = counts.sort(descending=True, stable=True).indices
    blocks = [module.weight_0, module.weight_1, module.weight_2]
    widths = [block.shape[1] for block in blocks]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[2]
    masses = [c.sum() / counts.sum() for c in counts[order].split([len(b) for b in blocks])]
    assert all(abs(mass - 1 / 3) < 0.01 for mass in masses)
    dense, begin = torch.zeros(ROWS, WIDTH), 0
    for block, projection in zip(blocks, module.projection.split(widths, dim=1), strict=True):
        dense[order[begin : begin + len(block)]] = (block @ projection.T).detach()
        begin += len(block)
    ids = torch.tensor([[1, 5, 5, 999], [0, 3, 2, 4]])
    torch.testing.assert_close(module(ids), dense[ids].sum(1), atol=1e-5, rtol=1e-5)


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
