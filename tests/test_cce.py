"""Clustered compositional embeddings: the vectors, and what a clustering does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.hashing import hash_bucket, mix64
from embcompress.methods.base import TableSpec
from embcompress.plan import Hash, LookupPlan
from embcompress.procedures.reclustering import ClusteredLayout

ROWS, WIDTH = 200, 8


def target() -> Tensor:
    """Ten groups of ids that want one vector each."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(10, WIDTH, generator=generator)
    return centers[torch.randint(0, 10, (ROWS,), generator=generator)]


def table(budget: str = "30%", **settings: object) -> ec.Embedding:
    torch.manual_seed(0)
    settings = {"chunks": 2, "first": 20, **settings}
    return ec.Embedding(ROWS, WIDTH, method=ec.ClusteredCompositional(**settings), budget=budget)


def codes_of(module: ec.Embedding) -> Tensor:
    return ClusteredLayout.of(module.plan).read_codes(module.stores(), 0, ROWS)


def keys_of(plan: LookupPlan) -> list[int]:
    return [p.address.key for p in plan.probes if isinstance(p.address, Hash)]


def by_hand(module: ec.Embedding, key_of_chunk: list[int]) -> Tensor:
    """Chunk t of id x is clusters_t[codes[x, t]] + residuals_t[h_t(x)]."""
    codes, stores, vectors = codes_of(module), module.stores(), []
    for x in range(ROWS):
        chunks = [
            stores[f"clusters_{t}"][codes[x, t]]
            + stores[f"residuals_{t}"][hash_bucket(x, key, len(stores[f"residuals_{t}"]))]
            for t, key in enumerate(key_of_chunk)
        ]
        vectors.append(torch.cat(chunks))
    return torch.stack(vectors)


def train(module: ec.Embedding, procedure: ec.TrainingProcedure, steps: range) -> None:
    wanted = target()
    for step in steps:
        ids = torch.randint(0, ROWS, (64,), generator=torch.Generator().manual_seed(step))
        (module(ids) - wanted[ids]).square().sum().backward()
        procedure.step()


def error(module: ec.Embedding) -> float:
    return float((module.to_dense() - target()).square().mean().detach())


def test_a_chunk_is_a_clustered_and_a_hashed_row() -> None:
    module = table()
    torch.testing.assert_close(module.to_dense(), by_hand(module, keys_of(module.plan)))
    ids = torch.tensor([3, 3, 199])
    weights = torch.randn(3, WIDTH)
    module(ids).mul(weights).sum().backward()
    code, key = int(codes_of(module)[3, 1]), keys_of(module.plan)[1]
    shares = [int(c) == code for c in codes_of(module)[ids, 1]]
    expected = (weights[:, 4:] * torch.tensor(shares)[:, None]).sum(0)
    torch.testing.assert_close(module.clusters_1.grad[code], expected)
    rows = len(module.residuals_1)
    shares = [hash_bucket(int(x), key, rows) == hash_bucket(3, key, rows) for x in ids]
    expected = (weights[:, 4:] * torch.tensor(shares)[:, None]).sum(0)
    torch.testing.assert_close(module.residuals_1.grad[hash_bucket(3, key, rows)], expected)


def test_gradients_are_those_of_the_formula() -> None:
    module = table().double()
    names = [name for name, _ in module.named_parameters()]

    def vectors(*stores: Tensor) -> Tensor:
        own = dict(zip(names, stores, strict=True))
        return torch.func.functional_call(module, own, (torch.tensor([0, 5, 5, 130]),))

    stores = [parameter.detach().requires_grad_() for parameter in module.parameters()]
    assert torch.autograd.gradcheck(vectors, stores)


def test_a_clustering_keeps_what_clusters_can_hold() -> None:
    """Ids of four vectors: the new clusters are these, the hashes are new, the residuals zero."""
    module = table(first=1)
    optimizer = torch.optim.Adagrad(module.parameters(), lr=0.1)
    procedure = ec.TrainingProcedure(module, optimizer)
    module(torch.arange(ROWS)).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        module.residuals_0[:], module.residuals_1[:] = 0, 0
        module.clusters_0[4:], module.clusters_1[4:] = 7.0, 7.0
        codes = torch.arange(ROWS)[:, None].remainder(4).expand(-1, 2)
        ClusteredLayout.of(module.plan).write_codes(module.stores(), 0, codes)
        optimizer.state[module.clusters_0]["sum"][:4] = torch.arange(4.0)[:, None]
    before, keys = module.to_dense().detach(), keys_of(module.plan)
    procedure.step()
    torch.testing.assert_close(module.to_dense().detach(), before)
    assert keys_of(module.plan) == [mix64(key) for key in keys]
    assert not module.residuals_0.any()
    assert not optimizer.state[module.residuals_0]["sum"].any()
    # Adagrad's sums go with the clusters' ids; unused clusters have none.
    sums = optimizer.state[module.clusters_0]["sum"]
    torch.testing.assert_close(sums[codes_of(module)[:4, 0]][:, 0], torch.arange(4.0))
    assert not sums[4:].any()
    # The vectors are read through the new hashes from now on.
    with torch.no_grad():
        module.residuals_0.normal_()
    torch.testing.assert_close(module.to_dense(), by_hand(module, keys_of(module.plan)))


def test_clusterings_find_the_groups() -> None:
    errors = {}
    for times in (0, 16):
        module = table(times=times)
        ec.fuse_optimizer(module, "adagrad", lr=0.1)
        procedure = ec.TrainingProcedure(module)
        assert len(procedure.tables) == (times > 0)
        train(module, procedure, range(400))
        errors[times] = error(module)
    assert errors[16] < 0.6 * errors[0]


def test_clusterings_come_at_doubling_steps() -> None:
    procedure = ec.ClusteredCompositional(first=3, times=4).procedure()
    assert procedure is not None
    assert [number for number in range(1, 100) if procedure.is_due(number)] == [3, 6, 12, 24]


def test_ids_that_were_not_seen_do_not_count() -> None:
    """Clusters are of the seen ids alone; without any nothing is clustered."""
    module = table(first=1)
    procedure = ec.TrainingProcedure(module)
    before = {name: store.clone() for name, store in module.stores().items()}
    procedure.step()
    assert all(torch.equal(store, before[name]) for name, store in module.stores().items())
    procedure.tables[""].tensor("counts")[:3] = 1
    vectors = module.to_dense().detach()
    procedure.step_number = 0
    procedure.step()
    torch.testing.assert_close(module.to_dense()[:3].detach(), vectors[:3])
    assert not module.clusters_0[3:].any()


def test_training_goes_on_from_a_saved_state() -> None:
    straight = table()
    ec.fuse_optimizer(straight, "adagrad", lr=0.1)
    procedure = ec.TrainingProcedure(straight)
    train(straight, procedure, range(30))
    resumed = table()
    ec.fuse_optimizer(resumed, "adagrad", lr=0.1)
    assert resumed.plan != straight.plan
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    assert resumed.plan == straight.plan
    again = ec.TrainingProcedure(resumed)
    again.load_state_dict(copy.deepcopy(procedure.state_dict()))
    train(straight, procedure, range(30, 90))
    train(resumed, again, range(30, 90))
    assert torch.equal(straight.codes, resumed.codes)
    assert torch.equal(straight.to_dense(), resumed.to_dense())


def test_only_keys_are_taken_from_a_saved_state() -> None:
    with pytest.raises(RuntimeError, match="belong to another plan"):
        table().load_state_dict(table(budget="20%").state_dict())
    other = ec.Embedding(ROWS, WIDTH, method="hash", budget="30%", seed=1)
    with pytest.raises(RuntimeError, match="belong to another plan"):
        ec.Embedding(ROWS, WIDTH, method="hash", budget="30%").load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="more than other keys"):
        table().take_keys(other.plan)


def test_collections_and_tied_tables_read_through_new_hashes() -> None:
    bags = ec.EmbeddingBagCollection(
        [ec.TableConfig("t", ROWS, WIDTH, ("a",))],
        method=ec.ClusteredCompositional(chunks=2, first=1),
        budget="30%",
    )
    bag = bags.embedding_bags["t"]
    twin = copy.deepcopy(bag)
    for name, store in bag.named_parameters():
        setattr(twin, name, store)
    for name, store in bag.named_buffers():
        setattr(twin, name, store)
    model = torch.nn.ModuleList([bags, twin])
    optimizer = torch.optim.SGD(bags.parameters(), lr=0.1)
    procedure = ec.TrainingProcedure(model, optimizer)
    ids, offsets = torch.arange(ROWS), torch.arange(ROWS + 1)
    bags(ids, offsets).sum().backward()
    procedure.step()
    assert twin.plan == bag.plan
    with torch.no_grad():
        bag.residuals_0.normal_()
    torch.testing.assert_close(bags(ids, offsets), bag.to_dense())
    torch.testing.assert_close(twin(ids, ids), bag.to_dense())


def test_a_trained_table_is_approximated() -> None:
    weight = target() + 0.01 * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    module = table()
    module.fit_(weight)
    assert float((module.to_dense() - weight).square().mean()) < 0.01 * float(weight.var())


@pytest.mark.parametrize("rows", [2, 50, 943, 100_000])
def test_the_dial_rises_and_leaves_little(rows: int) -> None:
    method, spec = ec.ClusteredCompositional(), TableSpec(rows, 16)
    sizes = method.sizes(spec)
    sampled = sorted({*sizes[:300], *sizes[:: max(1, len(sizes) // 300)], sizes[-1]})
    plans = [method.plan(spec, size) for size in sampled]
    assert [plan.bytes for plan in plans] == sorted(plan.bytes for plan in plans)
    steps = [method.plan(spec, s + 1).bytes - method.plan(spec, s).bytes for s in sampled[:-1]]
    assert max(steps, default=0) <= 3 * 16 * 4 + 16  # a row more of each, and rounding


def test_wrong_settings_are_refused() -> None:
    for settings, match in (
        ({"chunks": 0}, "chunks must be at least 1"),
        ({"first": 0}, "first must be at least 1"),
        ({"times": -1}, "times must not be negative"),
    ):
        with pytest.raises(ValueError, match=match):
            ec.ClusteredCompositional(**settings)
    with pytest.raises(ValueError, match="chunks = 3 does not divide the table's width, 8"):
        table(chunks=3)
