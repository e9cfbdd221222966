"""Lowered tables give the values and gradients of the plans, and come back."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

torchrec = pytest.importorskip("torchrec")
pytest.importorskip("fbgemm_gpu")

from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology  # noqa: E402

import embcompress as ec  # noqa: E402
import embcompress.torchrec as et  # noqa: E402
from embcompress.engine.reference import lookup_reference  # noqa: E402
from embcompress.lowering.tables import LogicalTable, lower_plans, why_not  # noqa: E402
from embcompress.torchrec.tables import LoweredTables  # noqa: E402
from tests.plan_cases import make_case  # noqa: E402
from tests.torchrec.model import Model, batch, loss, sharding_plan  # noqa: E402

PLANNED = et.Batch(world_size=2, size=64)
SETTINGS = [
    ec.QuotientRemainder("sum"),
    ec.QuotientRemainder("concat"),
    ec.MultiHash(weighted=True),
    ec.ProductQuantization(norm_bits=4),
    ec.Int8(scale="row"),
]
CHOICES = [name for name in sorted(ec.methods()) if name not in ("full", "auto")] + SETTINGS


def _compressed(method: str | ec.Method, **arguments: bool) -> Model:
    torch.manual_seed(0)
    model = Model(**arguments)
    ec.compress(model, method=method, budget="35%")
    return model


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by the name of the parameter in a model that is not lowered."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("small", [0, 40_000, 10**9], ids=["torchrec", "mixed", "engine"])
@pytest.mark.parametrize("method", CHOICES, ids=str)
def test_every_method_keeps_values_and_gradients(
    method: str | ec.Method, small: int, is_weighted: bool
) -> None:
    model = _compressed(method, is_weighted=is_weighted)
    lowered = copy.deepcopy(model)
    et.lower(lowered, PLANNED, data_parallel_bytes=small)
    features, labels = batch(3, 12, is_weighted=is_weighted)
    torch.testing.assert_close(lowered(features), model(features), rtol=0, atol=2e-6)
    for each in (model, lowered):
        loss(each, features, labels).backward()
    with torch.no_grad():  # a step of SGD, so that gradients can be compared by name
        for each in (model, lowered):
            for parameter in each.parameters():
                if parameter.grad is not None:
                    parameter -= parameter.grad
    if any(isinstance(m, LoweredTables) for m in lowered.modules()):
        et.lift(lowered)
    expected = dict(model.named_parameters())
    for name, parameter in lowered.named_parameters():
        torch.testing.assert_close(
            parameter,
            expected[name],
            rtol=0,
            atol=2e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert set(lowered.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("number", range(120))
def test_generated_plans(number: int) -> None:
    case = make_case(number, dtype="float32")
    plan, bags = case.plan, case.bags
    if why_not(plan):
        pytest.skip(why_not(plan))
    if plan.pool != "none" and bags.offsets.numel() == 1:
        pytest.skip("TorchRec takes no empty batches")
    kind = ec.Embedding if plan.pool == "none" else ec.EmbeddingBag
    module = kind.from_plan(plan)
    module.load_stores({n: t for n, t in case.stores.items()})
    weights = None if bags.weights is None else bags.weights.float()
    bags.weights = weights
    expected_stores = {n: t.detach().clone().requires_grad_(t.is_floating_point())
                       for n, t in module.stores().items()}  # fmt: skip
    expected = lookup_reference(plan, expected_stores, bags)
    table = LogicalTable("table", ("feature",), plan)
    lowering = lower_plans([table], weights is not None)
    lowered = LoweredTables(lowering, {"table": module}, {"table": 1.0})
    lengths = torch.tensor([bags.ids.numel()]) if plan.pool == "none" else bags.offsets.diff()
    jagged = torchrec.JaggedTensor(bags.ids, weights=weights, lengths=lengths)
    got = lowered({"feature": jagged}, weights is not None)["feature@table"]
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(number))
    (expected * probe).sum().backward()
    (got * probe).sum().backward()
    for name, store in expected_stores.items():
        if store.grad is None:
            continue
        for physical, holder in lowered.physical():
            if ("table", name) in physical.sources:
                own = holder.weight.grad[:, : physical.store.width]
                torch.testing.assert_close(own, store.grad, rtol=1e-3, atol=1e-3)
        if name in lowered.readers["table"].replicated():
            own = getattr(lowered.readers["table"], name).grad
            torch.testing.assert_close(own, store.grad, rtol=1e-3, atol=1e-3)


def test_the_report_says_what_is_where() -> None:
    model = _compressed("qr")
    report = et.lower(model, PLANNED)
    tables = {table.name: table for table in report.tables}
    users = tables["bags: users"]
    # The remainders' table is sharded, the quotients' is small enough to be everywhere.
    assert users.lookup == "unpooled" and [t.name for t in users.sharded] == ["users/weight_0"]
    assert users.replicated > 0 and "users/weight_1" in model.bags.lowered.small
    assert tables["bags: countries"].lookup == "engine"
    assert tables["bags: countries"].note == "small"
    text = str(report)
    for word in ("users/weight_0", "data-parallel", "sharded", "a process sends"):
        assert word in text
    assert report.traffic.sent_before > 0
    assert et.traffic(model, PLANNED) == report.traffic


def test_traffic_of_small_tables_is_that_of_their_gradients() -> None:
    torch.manual_seed(0)
    model = Model()
    ec.compress(model, method="hash", budget="1%")
    report = et.lower(model, et.Batch(world_size=4, size=4096))
    parameters = [p for c in (model.bags, model.rows) for p in c.parameters()]
    size = sum(p.numel() * p.element_size() for p in parameters)
    assert report.traffic.sent == report.traffic.replicated == round(2 * 3 / 4 * size)
    # Before: ids of 8 bytes and vectors of 64 bytes, there and back; three quarters elsewhere.
    by_name = {each.table: each for each in report.traffic.before}
    assert by_name["users"].exchanged == round(0.75 * 2 * 4096 * (8 + 2 * 16 * 4))
    assert report.traffic.sent_before > 5 * report.traffic.sent
    with pytest.raises(ValueError, match="at least 1"):
        et.Batch(0, 4)


@pytest.mark.parametrize(
    ("method", "small"), [("qr", 0), ("qr", 20_000), ("low_bit", 0), ("low_bit", 20_000), ("pq", 0)]
)
def test_memory_is_that_of_the_tables_which_are_lowered(method: str, small: int) -> None:
    model = _compressed(method)
    before = ec.memory(model)
    et.lower(model, PLANNED, data_parallel_bytes=small)
    after = ec.memory(model)
    assert (after.total, after.dense) == (before.total, before.dense)
    assert after.training >= before.training  # columns of padding

    def known(report: ec.MemoryReport) -> list[tuple[object, ...]]:
        parts = [(t.name.split(".")[-1], t.rows, t.width, t.method) for t in report.tables]
        return sorted(parts)

    assert known(after) == known(before)
    assert any("lowered" in t.name and t.method == method for t in after.tables)
    et.lift(model)
    assert ec.memory(model) == before


def test_what_cannot_be_lowered_is_run_by_the_engine() -> None:
    model = _compressed("unified")  # bags and sequences share one store
    report = et.lower(model, PLANNED, data_parallel_bytes=0)
    assert {table.note for table in report.tables} == {"another collection shares its rows"}
    half = Model().to(torch.bfloat16)
    ec.compress(half, method="hash", budget="10%")
    report = et.lower(half, PLANNED, data_parallel_bytes=0)
    assert all("bfloat16" in table.note for table in report.tables)
    packed = ec.deploy(_compressed("int8"))
    report = et.lower(packed, PLANNED, data_parallel_bytes=0)
    assert "packed" in report.tables[0].note


def test_mistakes_are_errors() -> None:
    with pytest.raises(ValueError, match="compress it first"):
        et.lower(Model(), PLANNED)
    fused = _compressed("hash")
    ec.fuse_optimizer(fused, "sgd", lr=0.1)
    with pytest.raises(ValueError, match="fused optimizer"):
        et.lower(fused, PLANNED)
    with pytest.raises(ValueError, match="lowered"):
        et.lift(_compressed("hash"))
    meta = Model(device="meta")
    ec.compress(meta, method="pq", budget="35%")
    with pytest.raises(ValueError, match="codes on the meta device"):
        et.lower(meta, PLANNED)
    weighted = _compressed("hash", is_weighted=True)
    et.lower(weighted, PLANNED, data_parallel_bytes=0)
    features, _ = batch(0, 4, is_weighted=True)
    features.weights().requires_grad_()
    with pytest.raises(ValueError, match="detach them"):
        weighted.bags(features)


# ------------------------------------------------------------------------------ one process


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_the_planner_sees_plain_tables(process_group: None) -> None:
    from torchrec.distributed.model_parallel import get_default_sharders

    model = _compressed("multihash")
    expected = copy.deepcopy(model)
    planned = et.Batch(2, 64, {"user": 2.5})
    et.lower(model, planned, data_parallel_bytes=0)
    constraints = et.planner_constraints(model, planned)
    assert constraints["users/weight"].pooling_factors == [10.0, 4.0]  # four probes an id
    assert "data_parallel" not in constraints["users/weight"].sharding_types
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=1, compute_device="cpu"), constraints=constraints
    )
    plan = planner.collective_plan(model, get_default_sharders(), dist.group.WORLD)
    assert set(plan.plan) == {"bags.lowered.pooled", "rows.lowered.unpooled.16"}
    sharded = et.distribute(model, plan=plan)
    features, _ = batch(0, 6)
    torch.testing.assert_close(sharded(features), expected(features), rtol=0, atol=1e-6)


def test_a_dense_kernel_for_sequences_is_an_error_on_a_cpu(process_group: None) -> None:
    model = _compressed("hash")
    et.lower(model, PLANNED, data_parallel_bytes=0)
    with pytest.raises(ValueError, match="dense kernel"):
        et.distribute(model, plan=sharding_plan(model, "row_wise"))


def test_tables_on_the_meta_device_are_drawn_where_they_are_sharded(process_group: None) -> None:
    torch.manual_seed(0)
    model = Model(device="meta")
    ec.compress(model, method="low_dim", budget="35%")
    et.lower(model, PLANNED, data_parallel_bytes=20_000)
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    rows = [p for c in (model.bags, model.rows) for p in c.lowered.unpooled.parameters()]
    apply_optimizer_in_backward(torch.optim.SGD, rows, {"lr": 0.1})
    sharded = et.distribute(model, plan=sharding_plan(model, "row_wise"))
    features, labels = batch(0, 64)
    vectors = sharded.module.rows(features)["clicked"].values()
    assert float(vectors.std()) == pytest.approx(2 * 5000**-0.5 / 12**0.5, rel=0.3)
    loss(sharded, features, labels).backward()
