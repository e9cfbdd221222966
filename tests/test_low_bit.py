"""Low-precision rows: formulas, training and deployed form, memory, state, dials, fits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import embcompress as ec
from embcompress.budget import fit_plan
from embcompress.engine import ops
from embcompress.methods import Method, TableSpec
from embcompress.plan import Code, Digit, Linear, LookupPlan, Probe, Quantization, Store

ROWS, WIDTH = 1000, 16
IDS = torch.arange(ROWS)
METHODS: tuple[Method, ...] = (
    ec.Int8(),
    ec.Int4(),
    ec.Int4(scale="row"),
    ec.Int8(scale="table"),
    ec.Int16(),
    ec.Int16(scale="row"),
    *(ec.LowBit(width=width, bits=bits) for width, bits in ((5, 8), (4, 4), (3, 2), (7, 1))),
)


def trained(method: Method, **arguments: object) -> ec.Embedding:
    """A table a few steps away from its start, some latents beyond their codes."""
    torch.manual_seed(0)
    module = ec.Embedding(ROWS, WIDTH, method=method, budget="60%", **arguments)
    optimizer = torch.optim.Adagrad(module.parameters(), lr=0.3, eps=1e-3)
    target = 2 * torch.randn(ROWS, WIDTH)
    for _ in range(3):
        optimizer.zero_grad()
        vectors = module(IDS)
        vectors.backward((vectors.detach() - target) / 100)
        optimizer.step()
    return module


def mixed_plan() -> LookupPlan:
    """A hundred ids have 8 numbers in 8 bits beside the 2 numbers in 4 bits that all have."""
    return LookupPlan(
        ROWS,
        WIDTH,
        stores=(
            Store("codes", ROWS, 1, "uint7"),
            Store("hot_scale", 1, 8),
            Store("hot", 100, 8, "uint8", Quantization("hot_scale")),
            Store("cold_scale", 1, 2),
            Store("cold_bias", 1, 2),
            Store("cold", ROWS, 2, "uint4", Quantization("cold_scale", "cold_bias")),
            Store("projection", WIDTH, 10),
        ),
        probes=(Probe("hot", Code("codes", 100, Digit(1, ROWS))), Probe("cold", Digit(1, ROWS))),
        combine="concat",
        head=Linear("projection"),
    )


# ------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize("method", [ec.Int4(), ec.Int8(), ec.Int16()], ids=str)
def test_int_rows(method: ec.Int8) -> None:
    module, bits = trained(method), method.bits
    code = ((module.weight - module.bias) / module.scale).round().clamp(0, 2**bits - 1)
    assert torch.equal(module(IDS), module.scale * code + module.bias)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_low_bit(bits: int) -> None:
    torch.manual_seed(0)
    module = trained(ec.LowBit(width=3, bits=bits))
    middle = (2**bits - 1) / 2
    code = (module.weight / module.scale + middle).round().clamp(0, 2**bits - 1)
    expected = (module.scale * (code - middle)) @ module.projection.T
    torch.testing.assert_close(module(IDS), expected)
    assert len(code.unique()) > 2**bits / 4  # the codes of a normal distribution's middle


def test_gradients_are_damped_by_the_numbers_of_a_step() -> None:
    """Esser 2020, section 2.2: 1 / sqrt(N * Q)."""
    for scale, numbers in (("row", WIDTH), ("column", ROWS), ("table", ROWS * WIDTH)):
        module = trained(ec.Int4(scale=scale))
        module.zero_grad()
        module(IDS).sum().backward()
        x = (module.weight - module.bias) / module.scale
        inside = (x >= -0.5) & (x <= 15.5)
        code = x.round().clamp(0, 15)
        of_step = torch.where(inside, code - x, code)
        shape = module.scale.shape
        expected = of_step.sum_to_size(shape) / (numbers * 15) ** 0.5
        torch.testing.assert_close(module.scale.grad, expected, rtol=1e-3, atol=1e-4)
        expected = (~inside).float().sum_to_size(shape) / (numbers * 15) ** 0.5
        torch.testing.assert_close(module.bias.grad, expected, rtol=1e-3, atol=1e-4)


def test_steps_of_16_bits_stand_still_and_leave_room() -> None:
    module = trained(ec.Int16())
    assert not module.scale.requires_grad and not module.bias.requires_grad
    assert module.scale.grad is None and module.weight.grad is not None
    torch.testing.assert_close(module.bias, torch.full((1, WIDTH), -64.0), rtol=1e-4, atol=0)
    weight = torch.randn(ROWS, WIDTH)
    for freeze in (True, False):
        module = ec.Embedding.from_pretrained(weight, freeze, method="int16", budget="60%")
        assert module.weight.requires_grad != freeze and not module.scale.requires_grad
        torch.testing.assert_close(module.to_dense(), weight, rtol=0, atol=1e-4)
    packed = ec.deploy(module).state_dict()
    fresh = ec.Embedding(ROWS, WIDTH, method="int16", budget="60%")
    fresh.load_state_dict(packed)
    assert torch.equal(fresh.to_dense(), module.to_dense())


# -------------------------------------------------------------------------------------- deploy


@pytest.mark.parametrize("engine", ["compiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_deployed_lookup_is_bit_for_bit_the_trained_one(
    method: Method, dtype: torch.dtype, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "reference":
        monkeypatch.setattr(ops, "is_available", lambda: False)
    module = trained(method, dtype=dtype).eval()
    expected = module(IDS)
    assert ec.deploy(module) is module
    assert module.weight.dtype == torch.uint8 and module.latents() == ()
    assert torch.equal(module(IDS), expected)
    assert ec.deploy(module)(IDS).equal(expected)  # again: nothing to do


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_memory_counts_the_plan_and_latents_apart(method: Method) -> None:
    module = trained(method)
    before = ec.memory(module)
    assert before.total == module.plan.bytes
    assert before.total + before.training == sum(p.nbytes for p in module.parameters())
    after = ec.memory(ec.deploy(module))
    stored = {t.untyped_storage().data_ptr(): t for t in module.stores().values()}
    assert after.total == before.total == sum(t.untyped_storage().nbytes() for t in stored.values())
    assert after.training == 0


def test_tied_tables_share_their_codes() -> None:
    model = nn.ModuleList([nn.Embedding(ROWS, WIDTH), nn.Embedding(ROWS, WIDTH)])
    model[1].weight = model[0].weight
    ec.compress(model, method="int4", budget="20%")
    before = ec.memory(model).total
    ec.deploy(model)
    assert model[0].weight is model[1].weight and model[0].weight.dtype == torch.uint8
    assert ec.memory(model).total == before and torch.equal(model[0](IDS), model[1](IDS))


def test_a_collection_is_deployed() -> None:
    tables = [ec.TableConfig("a", 500, 8), ec.TableConfig("b", 300, 8), ec.TableConfig("c", 3, 8)]
    collection = ec.EmbeddingBagCollection(tables, method="low_bit", budget="10%")
    features = {name: torch.randint(0, 3, (7, 2)) for name in "abc"}
    expected = collection(features)
    assert ec.memory(ec.deploy(collection)).training == 0
    assert torch.equal(collection(features), expected)


def test_what_diverged_is_not_deployed() -> None:
    module = trained(ec.Int4())
    with torch.no_grad():
        module.weight[5, 2] = torch.nan
    with pytest.raises(ValueError, match="holds NaN"):
        ec.deploy(module)
    assert module.latents() == ("weight",)


def test_deployed_scales_and_heads_can_be_trained_on() -> None:
    module = ec.deploy(trained(ec.LowBit(width=4, bits=2)))
    codes = module.weight.clone()
    module(IDS).square().sum().backward()
    assert module.scale.grad.any() and module.projection.grad.any()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert torch.equal(module.weight, codes)


# --------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("saved_deployed", [False, True])
@pytest.mark.parametrize("own_deployed", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_module_takes_the_form_of_what_it_loads(
    method: Method, saved_deployed: bool, own_deployed: bool
) -> None:
    saved = trained(method)
    if saved_deployed:
        ec.deploy(saved)
    own = ec.Embedding(ROWS, WIDTH, method=method, budget="60%")
    if own_deployed:
        ec.deploy(own)
    own.load_state_dict(saved.state_dict())
    assert own.weight.dtype == saved.weight.dtype
    assert torch.equal(own(IDS), saved(IDS))
    assert isinstance(own.weight, nn.Parameter) != saved_deployed
    assert ec.memory(own) == ec.memory(saved)


def test_copies_of_a_deployed_table() -> None:
    module = ec.deploy(trained(ec.LowBit(width=4, bits=2)))
    assert torch.equal(copy.deepcopy(module)(IDS), module(IDS))
    served = ec.Embedding.from_plan(module.plan, deployed=True)
    assert ec.memory(served).training == 0 and served.weight.dtype == torch.uint8
    served.load_state_dict(module.state_dict())
    assert torch.equal(served(IDS), module(IDS))


def test_a_deployed_table_drawn_anew_has_the_wanted_deviation() -> None:
    for method in METHODS:
        module = ec.deploy(ec.Embedding(20_000, WIDTH, method=method, budget="60%"))
        module.reset_parameters(0.5)
        deviation = float(module.to_dense().std())
        assert deviation == pytest.approx(0.5, rel=0.1 if module.plan.head is None else 0.5)


# ------------------------------------------------------------------------------------ training


def error_of(module: ec.Embedding, target: Tensor) -> float:
    with torch.no_grad():
        return float((module(IDS) - target).square().mean())


@pytest.mark.parametrize("fused", [False, True])
def test_stores_of_different_bits_train_in_one_plan(fused: bool) -> None:
    torch.manual_seed(0)
    module = ec.Embedding.from_plan(mixed_plan())
    module.codes.copy_(ec_pack(torch.where(IDS < 100, IDS, 127), 7))
    target = torch.randn(ROWS, WIDTH)
    target[100:, 2:] = 0
    start = error_of(module, target)
    if fused:
        ec.fuse_optimizer(module, "adagrad", lr=0.1)
    optimizer = None if fused else torch.optim.Adagrad(module.parameters(), lr=0.1)
    for _ in range(60):
        (module(IDS) - target).square().sum().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    expected = module(IDS)
    assert error_of(module, target) < 0.5 * start
    assert module.latents() == ("hot", "cold")
    assert torch.equal(ec.deploy(module)(IDS), expected)
    assert ec.memory(module).total == mixed_plan().bytes and ec.memory(module).training == 0


def ec_pack(codes: Tensor, bits: int) -> Tensor:
    from embcompress.layouts.packing import pack_codes

    return pack_codes(codes, bits)


def test_deploying_ends_a_fused_optimizer() -> None:
    module = trained(ec.LowBit(width=4, bits=4))
    ec.fuse_optimizer(module, "adam", lr=0.01)
    module(IDS).square().sum().backward()
    expected = module(IDS)
    assert ec.memory(module).training > 2 * module.weight.nbytes
    ec.deploy(module)
    assert ec.memory(module).training == 0 and torch.equal(module(IDS), expected)
    module.projection.requires_grad_()
    before = module.projection.detach().clone()
    module(IDS).square().sum().backward()  # no update follows
    assert torch.equal(module.projection, before) and module.projection.grad.any()


# --------------------------------------------------------------------------------- dials, fits


@pytest.mark.parametrize("rows", [30, 1683, 10**6])
@pytest.mark.parametrize("width", [1, 3, 16, 64])
def test_the_dial_of_low_bit_rises(rows: int, width: int) -> None:
    table, method = TableSpec(rows, width), ec.LowBit()
    plans = [method.plan(table, size) for size in method.sizes(table)]
    sizes = [plan.bytes for plan in plans]
    assert sizes == sorted(sizes)
    assert len(set(plans)) == len(plans)
    row_bits = [plan.store("weight").width * plan.store("weight").bits for plan in plans]
    assert min(row_bits) == 1 and max(row_bits) == 8 * width
    if rows > 10_000:
        assert row_bits == sorted(set(row_bits))


def test_settings_fix_width_and_bits() -> None:
    table = TableSpec(ROWS, 6)
    assert ec.LowBit(width=3).shapes(table) == ((3, 1), (3, 2), (3, 4), (3, 8))
    assert ec.LowBit(bits=2).shapes(table) == tuple((width, 2) for width in range(1, 7))
    assert ec.LowBit(5, 1).shapes(table) == ((5, 1),)


@pytest.mark.parametrize("budget", ["10%", "3.5%", "1.7%", "0.9%", "0.5%", "0.3%"])
def test_low_bit_uses_its_budget(budget: str) -> None:
    table = TableSpec(100_000, 16)
    limit = int(float(budget[:-1]) / 100 * table.dense_bytes)
    assert 0.6 * limit < fit_plan(ec.LowBit(), table, limit).bytes <= limit


def test_int_rows_are_as_wide_as_the_budget_allows() -> None:
    whole = ec.Embedding(ROWS, WIDTH, method="int4").plan
    assert whole.head is None and whole.bytes == ROWS * WIDTH // 2 + 2 * WIDTH * 4
    narrower = ec.Embedding(ROWS, WIDTH, method="int4", budget=whole.bytes - 1).plan
    width = narrower.store("weight").width
    assert narrower.head is not None and narrower.bytes < whole.bytes
    assert narrower.bytes == -(-ROWS * width // 2) + 2 * width * 4 + 4 * WIDTH * width


@pytest.mark.parametrize("scale", ["column", "row", "table"])
def test_narrow_int_rows_keep_the_leading_columns(scale: str) -> None:
    """A table of rank 2 loses what 8 bits lose, and nothing to the width."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, 2, generator=generator) @ torch.randn(2, WIDTH, generator=generator)
    module = ec.Embedding.from_pretrained(weight, method=ec.Int8(scale=scale), budget="18%")
    width = module.plan.store("weight").width
    assert 1 < width < WIDTH
    assert module.latents() == ("weight",)
    before = module.to_dense()
    assert float((before - weight).norm() / weight.norm()) < 0.02
    assert torch.equal(ec.deploy(module).to_dense(), before)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="bits must be one of"):
        ec.LowBit(bits=3)
    with pytest.raises(ValueError, match="width must be an integer"):
        ec.LowBit(width=0)
    with pytest.raises(ValueError, match="width must be at most the table's, 16, got 17"):
        ec.Embedding(ROWS, WIDTH, method=ec.LowBit(width=17))
    with pytest.raises(ValueError, match="head_dtype must be one of"):
        ec.LowBit(head_dtype="uint8")
    with pytest.raises(ValueError, match="scale must be 'row', 'column' or 'table'"):
        ec.Int4(scale="channel")


def test_a_head_in_half_precision_takes_half() -> None:
    plans = [
        ec.Embedding(ROWS, WIDTH, method=ec.LowBit(2, 4, dtype)).plan for dtype in (None, "float16")
    ]
    assert plans[0].bytes - plans[1].bytes == 2 * 2 * WIDTH


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_fit_reads_alike_as_latents_and_packed(method: Method) -> None:
    table, weight = TableSpec(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    plan = fit_plan(method, table, table.dense_bytes)
    fitted = method.fit(table, plan, weight)
    latent, packed = (ec.Embedding.from_plan(plan, deployed=deployed) for deployed in (False, True))
    for module in (latent, packed):
        module.load_stores(fitted)
    assert latent.latents() == ("weight",) and packed.latents() == ()
    assert torch.equal(latent(IDS), packed(IDS))
    packed.load_stores({"weight": latent.weight})  # latents into a packed store
    assert torch.equal(packed.weight, fitted["weight"])
    with pytest.raises(ValueError, match="store 'scale' has shape"):
        latent.load_stores({"scale": torch.zeros(2, 2)})


@pytest.mark.parametrize(
    ("method", "largest"), [(ec.Int8(), 1e-4), (ec.Int4(), 0.014), (ec.Int4("row"), 0.012)]
)
def test_post_training_error_of_normal_numbers(method: Method, largest: float) -> None:
    """4 bits of normal numbers leave 0.0115 of their variance at best (Max 1960)."""
    weight = torch.randn(5000, WIDTH, generator=torch.Generator().manual_seed(0))
    assert float((fitted_table(method, weight) - weight).square().mean()) < largest


def fitted_table(method: Method, weight: Tensor, counts: Tensor | None = None) -> Tensor:
    table = TableSpec(*weight.shape, counts=counts)
    plan = fit_plan(method, table, table.dense_bytes)
    module = ec.Embedding.from_plan(plan, deployed=True)
    module.load_stores(method.fit(table, plan, weight))
    return module.to_dense()


@pytest.mark.parametrize(("bits", "loss"), [(8, 1e-3), (4, 0.03)])
def test_low_bit_fits_as_the_singular_vectors_do(bits: int, loss: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, WIDTH, generator=generator) * torch.linspace(2, 0.05, WIDTH)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    weight = weight @ rotation
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    best = (weight - u[:, :6] * s[:6] @ v[:6]).square().sum() / weight.square().sum()
    fitted = fitted_table(ec.LowBit(width=6, bits=bits), weight)
    error = (weight - fitted).square().sum() / weight.square().sum()
    assert best <= error < best + loss


def test_a_fit_serves_frequent_ids() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, WIDTH, generator=generator)
    counts = torch.where(IDS < 50, 10_000, 1)
    errors = [
        (fitted_table(ec.LowBit(width=6, bits=4), weight, known) - weight)[:50].square().mean()
        for known in (None, counts)
    ]
    assert errors[1] < 0.9 * errors[0]


def test_what_is_no_number_cannot_be_fitted() -> None:
    weight = torch.randn(ROWS, WIDTH)
    weight[3, 4] = torch.inf
    table = TableSpec(ROWS, WIDTH)
    for method in METHODS:
        with pytest.raises(ValueError, match=r"is inf|finite"):
            method.fit(table, fit_plan(method, table, table.dense_bytes), weight)
