"""Stores and inputs of more than 2**31 numbers: the last row is right, forward and backward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from embcompress.engine import Bags, GradientOptions, lookup
from embcompress.plan import Code, Digit, LookupPlan, Probe, Quantization, Store
from tests.plan_cases import pack_bits

pytestmark = pytest.mark.slow


def available_bytes() -> int:
    """Memory that is free, or could be."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 0
    return int(meminfo.read_text().split("MemAvailable:")[1].split()[0]) * 1024


def with_last(bytes_: int, last: Tensor) -> Tensor:
    """A packed store of zeros that ends in these bytes."""
    packed = torch.zeros(bytes_, dtype=torch.uint8)
    packed[-len(last) :] = last
    return packed


@pytest.mark.parametrize("pool", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize(("bits", "rows", "width"), [(1, 2**26, 64), (4, 2**27 + 2, 17)])
def test_packed_values(bits: int, rows: int, width: int, pool: str) -> None:
    """2**32 numbers of one bit; 2.3 * 10**9 of four."""
    plan = LookupPlan(
        rows,
        width,
        (
            Store("rows", rows, width, f"uint{bits}", Quantization("steps", "lows")),
            Store("steps", 1, width),
            Store("lows", 1, width),
        ),
        (Probe("rows", Digit(1, rows)),),
        pool=pool,
    )
    generator = torch.Generator().manual_seed(0)
    # Whole bytes: the last two rows.
    codes = torch.randint(0, 2**bits, (2, width), generator=generator)
    steps = torch.randint(1, 9, (1, width), generator=generator).float().requires_grad_()
    lows = torch.randint(-9, 9, (1, width), generator=generator).float().requires_grad_()
    packed = with_last(plan.store("rows").bytes, pack_bits(codes.flatten().tolist(), bits))
    ids = torch.tensor([rows - 1, 0, rows - 2, rows // 2 + 5])
    stores = {"rows": packed, "steps": steps, "lows": lows}
    output = lookup(plan, stores, Bags(ids, torch.arange(5)))
    read = torch.stack([codes[1], torch.zeros_like(codes[0]), codes[0], torch.zeros_like(codes[0])])
    assert torch.equal(output, steps * read + lows)
    gradient = torch.randint(-5, 5, output.shape, generator=generator).float()
    output.backward(gradient)
    assert steps.grad is not None and lows.grad is not None
    assert torch.equal(steps.grad[0], (gradient * read).sum(0))
    assert torch.equal(lows.grad[0], gradient.sum(0))


def test_codes() -> None:
    """A table of 2.3 * 10**9 bits of codes."""
    vocabulary, rows = 2**26, 2**17 - 1
    plan = LookupPlan(
        vocabulary,
        4,
        (Store("rows", rows, 4), Store("codes", vocabulary, 2, "uint17")),
        (Probe("rows", Code("codes", rows, Digit(1, vocabulary), column=1)),),
        pool="sum",
    )
    codes = [5, 70_000, 9, rows - 1, 3, 2**17 - 1, 11, 99_999]  # 136 bits: the last four rows
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(rows, 4, generator=generator).requires_grad_()
    stores = {
        "rows": table,
        "codes": with_last(plan.store("codes").bytes, pack_bits(codes, 17)),
    }
    ids = torch.arange(vocabulary - 4, vocabulary)
    output = lookup(plan, stores, Bags(ids, torch.arange(5)), GradientOptions(sparse=True))
    expected = torch.stack([table[70_000], table[rows - 1], torch.zeros(4), table[99_999]])
    assert torch.equal(output, expected)
    output.backward(torch.arange(16.0).reshape(4, 4))
    assert table.grad is not None
    gradient = table.grad.to_dense()
    assert gradient[70_000].tolist() == [0, 1, 2, 3]
    assert gradient[rows - 1].tolist() == [4, 5, 6, 7]
    assert gradient[99_999].tolist() == [12, 13, 14, 15]
    assert int(gradient.any(1).sum()) == 3


@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_more_ids_times_width_than_an_int32_holds(pool: str) -> None:
    """2**24 + 8 ids of 128 numbers, in one bag and then one id in another."""
    count, width = 2**24 + 8, 128
    plan = LookupPlan(
        100, width, (Store("rows", 10, width),), (Probe("rows", Digit(10, 10)),), pool=pool
    )
    ids = torch.arange(count, dtype=torch.int32) % 10 * 10  # row 0 to 9, over and over
    offsets = torch.tensor([0, count - 1, count], dtype=torch.int32)
    table = torch.arange(10.0).repeat_interleave(width).reshape(10, width).requires_grad_()
    output = lookup(plan, {"rows": table}, Bags(ids, offsets))
    last = (count - 1) % 10
    total = sum(range(10)) * ((count - 1) // 10) + sum(range(last))
    expected = total / (count - 1 if pool == "mean" else 1)
    torch.testing.assert_close(output[0], torch.full((width,), expected), rtol=1e-5, atol=0)
    assert torch.equal(output[1], torch.full((width,), float(last)))
    output.backward(torch.tensor([[0.0], [1.0]]).expand(2, width))
    assert table.grad is not None
    assert table.grad.any(1).nonzero().flatten().tolist() == [last]
    assert torch.equal(table.grad[last], torch.ones(width))


def test_more_outputs_than_an_int32_holds() -> None:
    """2**20 + 1 vectors of 2049 numbers."""
    if available_bytes() < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    count, width = 2**20 + 1, 2049
    plan = LookupPlan(2, width, (Store("rows", 3, width),), (Probe("rows", Digit(1, 2)),))
    table = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(count, dtype=torch.int64)
    ids[-1] = 1
    assert count * width > 2**31
    with torch.no_grad():
        output = lookup(plan, {"rows": table}, Bags(ids, ids))
    assert torch.equal(output[-1], table[1]) and torch.equal(output[-2], table[0])
