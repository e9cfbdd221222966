"""Sparse rows in the compiled engine: the bits of the reference, damage, wrong arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from embcompress.engine import Bags, GradientOptions, lookup, ops
from embcompress.engine.encoding import encode_plans
from embcompress.engine.reference import lookup_reference
from embcompress.layouts.sparse import mask_of_largest, pack_sparse
from embcompress.plan import Digit, Hash, LookupPlan, Probe, Sign, Sparsity, Store

pytestmark = pytest.mark.skipif(not ops.is_available(), reason="the C++ extension is not built")

ROWS, STORED, IDS = 37, 150, 200
FORMS = ("mask", "positions")


def plan_of(
    form: str, width: int, block: int, pool: str = "sum", combine: str = "mul"
) -> LookupPlan:
    sparsity = Sparsity(STORED, "index", "starts", block, form)  # type: ignore[arg-type]
    mask, positions = Store("index", ROWS, width, "uint1"), Store("index", STORED, 1, "uint16")
    return LookupPlan(
        IDS,
        width,
        stores=(
            Store("rows", ROWS, width, sparsity=sparsity),
            mask if form == "mask" else positions,
            Store("starts", -(-ROWS // block), 1, "uint9"),
            Store("other", 20, width),
        ),
        probes=(
            Probe("rows", Hash(1, ROWS - 2), Sign(5), offset=2),
            Probe("other", Digit(3, 20)),
        ),
        combine=combine,  # type: ignore[arg-type]
        pool=pool,  # type: ignore[arg-type]
        padding_idx=4,
    )


def latents_of(plan: LookupPlan, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = plan.embedding_dim
    values = torch.randn(ROWS, width, generator=generator)
    return {
        "rows": values,
        "index": mask_of_largest(torch.rand(ROWS, width, generator=generator), STORED),
        "starts": torch.zeros(plan.store("starts").bytes, dtype=torch.uint8),
        "other": torch.randn(20, width, generator=generator),
    }


def packed_of(plan: LookupPlan) -> dict[str, Tensor]:
    stores = latents_of(plan)
    return {**stores, **pack_sparse(plan, plan.store("rows"), stores)}


BAGS = Bags(torch.randint(0, IDS, (300,), generator=torch.Generator().manual_seed(9)),
            torch.arange(0, 301, 5))  # fmt: skip


@pytest.mark.parametrize("combine", ["sum", "mul"])
@pytest.mark.parametrize("block", [1, 3, 40])
@pytest.mark.parametrize("width", [5, 64, 65, 200])
@pytest.mark.parametrize("form", FORMS)
def test_both_forms_read_the_same_in_both_engines(
    form: str, width: int, block: int, combine: str
) -> None:
    plan = plan_of(form, width, block, combine=combine)
    latents, packed = latents_of(plan), packed_of(plan)
    expected = lookup_reference(plan, latents, BAGS)
    torch.testing.assert_close(lookup_reference(plan, packed, BAGS), expected, rtol=0, atol=0)
    ours = lookup(plan, latents, BAGS)
    torch.testing.assert_close(ours, expected)
    assert torch.equal(lookup(plan, packed, BAGS), ours)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("pool", ["none", "mean", "max"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_what_the_mask_keeps(form: str, pool: str, sparse: bool) -> None:
    plan = plan_of(form, 24, 3, pool)
    bags = Bags(BAGS.ids, BAGS.ids) if pool == "none" else BAGS
    results = []
    for run in (lookup_reference, lookup):
        leaves = latents_of(plan)
        for name in ("rows", "other"):
            leaves[name].requires_grad_()
        options = (GradientOptions(sparse=sparse),) if run is lookup else ()
        output = run(plan, leaves, bags, *options)
        output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
        results.append([leaves[name].grad.to_dense() for name in ("rows", "other")])
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_kept_numbers_that_take_gradients_are_the_references(form: str) -> None:
    plan = plan_of(form, 24, 3)
    packed = packed_of(plan)
    packed["rows"].requires_grad_()
    lookup(plan, packed, BAGS).square().sum().backward()
    ours, packed["rows"].grad = packed["rows"].grad, None
    lookup_reference(plan, packed, BAGS).square().sum().backward()
    torch.testing.assert_close(ours, packed["rows"].grad)


@pytest.mark.parametrize("form", FORMS)
def test_damaged_indices_read_nothing_else(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    plan = replace(
        plan_of(form, 65, 3),
        probes=(Probe("rows", Digit(1, ROWS)),),
        num_embeddings=ROWS,
        pool="none",
    )
    ids = torch.arange(ROWS)
    packed = packed_of(plan)
    allowed = {*packed["rows"].tolist(), 0.0}
    for _ in range(50):
        for name in ("index", "starts"):
            packed[name].random_(0, 256, generator=generator)
        assert set(lookup(plan, packed, Bags(ids, ids)).flatten().tolist()) <= allowed


# ------------------------------------------------------------------------- hostile arguments


@dataclass
class Call:
    """A lookup of packed or latent sparse rows by the operator itself."""

    stores: list[Tensor]
    encoding: Tensor

    def refused(self, match: str = "encoding") -> None:
        arguments = (self.stores, BAGS.ids, BAGS.offsets, None, self.encoding, True)
        with pytest.raises(RuntimeError, match=match):
            torch.ops.embcompress.lookup_forward(*arguments, 1, 24, False)
        gradient = torch.ones(60, 24)
        with pytest.raises(RuntimeError, match=match):
            torch.ops.embcompress.lookup_backward(gradient, *arguments, [3])


def make_call(form: str, packed: bool) -> Call:
    plan = plan_of(form, 24, 3)
    numbers = {store.name: number for number, store in enumerate(plan.stores)}
    tensors = packed_of(plan) if packed else latents_of(plan)
    encoding = encode_plans([plan], [numbers]).tensor
    return Call([tensors[store.name] for store in plan.stores], encoding)


#: Fields from the first probe's last: form, stored, rows, block, and index, starts with their bits.
FIELDS = {"form": 0, "stored": 1, "rows": 2, "block": 3, "index": 4, "index_bits": 5, "starts": 6,
          "starts_bits": 7}  # fmt: skip
DAMAGE = [
    ("form", 3), ("form", -1), ("form", 0), ("stored", 0), ("stored", STORED + 1),
    ("stored", 2**63 - 1), ("rows", 36), ("rows", 2**62), ("rows", -1), ("block", 0), ("block", -1),
    ("block", 2), ("index", 0), ("index", 9), ("starts", -1), ("starts", 3), ("starts_bits", 33),
    ("starts_bits", 0),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), DAMAGE)
@pytest.mark.parametrize("form", FORMS)
def test_wrong_records_are_refused(form: str, field: str, value: int) -> None:
    call = make_call(form, packed=True)
    probe = (len(call.encoding) - 4 - 10) // 2
    first = 4 + 10 + probe - len(FIELDS)
    assert call.encoding[first : first + 4].tolist() == [1 + FORMS.index(form), STORED, ROWS, 3]
    call.encoding[first + FIELDS[field]] = value
    call.refused()


@pytest.mark.parametrize("form", FORMS)
def test_wrong_tensors_are_refused(form: str) -> None:
    for number in range(3):  # kept numbers, index, starts
        call = make_call(form, packed=True)
        call.stores[number] = call.stores[number][:-1].clone()
        call.refused()
    call = make_call(form, packed=False)
    call.stores[0] = call.stores[0][:-1].clone()
    call.refused()
    call = make_call(form, packed=False)
    call.stores[1] = call.stores[1][:100].clone()  # the mask
    call.refused()
    call = make_call(form, packed=True)
    arguments = (call.stores, BAGS.ids, BAGS.offsets, None, call.encoding, True)
    refusal = r"packed stores have no gradient|read no sparse rows"
    with pytest.raises(RuntimeError, match=refusal):
        torch.ops.embcompress.lookup_backward(torch.ones(60, 24), *arguments, [0])
    call = make_call(form, packed=True)
    call.stores[3] = call.stores[3].flatten()  # rows that are not sparse
    call.refused()
