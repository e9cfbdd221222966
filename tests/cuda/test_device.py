"""What only a GPU can show: streams, graphs, errors that come late, the same bits as on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.engine import Bags, lookup, ops
from embcompress.plan import Digit, Hash, LookupPlan, Pool, Probe, Store
from tests.engine.devices import DEVICES, needs_gpu, runs_in_kernels, to_device
from tests.engine.judging import output_gradient, run
from tests.plan_cases import Case, make_case

PLAN = LookupPlan(100, 16, (Store("rows", 50, 16),), (Probe("rows", Hash(1, 50)),), pool="sum")

gpu = [pytest.mark.cuda, needs_gpu]


def on_gpu(case: Case) -> Tensor:
    moved = to_device(case, "cuda")
    return lookup(moved.plan, moved.stores, moved.bags).cpu()


def on_cpu(case: Case) -> Tensor:
    return lookup(case.plan, case.stores, case.bags)


@pytest.mark.skipif(
    not ops.is_available() or ops.has_cuda_kernels(), reason="for builds without CUDA kernels"
)
def test_a_build_without_kernels_says_so() -> None:
    with pytest.raises(RuntimeError, match="built without its CUDA kernels"):
        ops.runs_on(torch.device("cuda"))
    assert ops.runs_on(torch.device("cpu")) and not ops.runs_on(torch.device("meta"))


@pytest.mark.parametrize("first", [pytest.param(n, marks=gpu) for n in range(0, 400, 100)])
def test_values_are_the_cpu_s_to_the_bit(first: int) -> None:
    """No multiply-add, and sums in the order of the ids, on both."""
    for number in range(first, first + 100):
        case = make_case(number)
        if not runs_in_kernels(case):
            continue
        with torch.no_grad():
            ours, theirs = on_gpu(case), on_cpu(case)
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        assert bool(same.all()), case


@pytest.mark.parametrize("first", [pytest.param(n, marks=gpu) for n in range(0, 100, 50)])
def test_gradients_are_the_same_every_time(first: int) -> None:
    for number in range(first, first + 50):
        case = make_case(number)
        if not runs_in_kernels(case):
            continue
        results = [run(case, output_gradient(case), on_gpu) for _ in range(5)]
        for other in results[1:]:
            for name, gradient in results[0].gradients.items():
                again = other.gradients[name]
                assert gradient is None or torch.equal(gradient, again), (name, case)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("num_tables", [1, 30])
@pytest.mark.parametrize(("method", "budget"), [("qr", "20%"), ("low_dim", "20%"), ("full", None)])
def test_a_graph_replays_the_forward_pass(num_tables: int, method: str, budget: str | None) -> None:
    """New ids in the same memory; with many tables the plan is in device memory.

    Where a plan has a head, or is a full table by itself, nothing waits for a check of ids either.
    """
    configs = [ec.TableConfig(f"t{i}", 1000, 16) for i in range(num_tables)]
    tables = ec.EmbeddingBagCollection(configs, method=method, budget=budget).cuda()
    ids = torch.randint(0, 1000, (64 * num_tables,), device="cuda")
    offsets = torch.arange(64 * num_tables + 1, device="cuda")
    with torch.no_grad():
        tables(ids, offsets)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = tables(ids, offsets)
        for _ in range(3):
            ids.copy_(torch.randint(0, 1000, ids.shape, device="cuda"))
            graph.replay()
            torch.testing.assert_close(output, tables(ids, offsets))


@pytest.mark.cuda
@needs_gpu
def test_the_current_stream_is_used() -> None:
    rows = torch.zeros(50, 16, device="cuda")
    ids, offsets = torch.arange(100, device="cuda"), torch.arange(101, device="cuda")
    stream = torch.cuda.Stream()
    for value in range(1, 20):
        with torch.cuda.stream(stream), torch.no_grad():
            torch.cuda._sleep(200_000)
            rows.fill_(value)
            output = lookup(PLAN, {"rows": rows}, Bags(ids, offsets))
        stream.synchronize()
        assert bool((output == value).all())


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("bad", [-1, 100, 2**40])
def test_a_bad_id_is_reported_once_the_device_gets_there(bad: int) -> None:
    rows = torch.ones(50, 16, device="cuda")
    ids = torch.tensor([1, bad, 2], device="cuda")
    offsets = torch.tensor([0, 1, 2, 3], device="cuda")
    # The kernel may have reported before the call returns: then the call itself raises.
    with pytest.raises((IndexError, RuntimeError), match=r"outside"):
        lookup(PLAN, {"rows": rows}, Bags(ids, offsets))
        ops.synchronize()
    ops.synchronize()  # reported once
    good = lookup(PLAN, {"rows": rows}, Bags(ids.clamp(0, 99), offsets))
    assert bool((good == 1).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pool", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_full_tables_are_torch_s(pool: Pool, dtype: Any, device: str) -> None:
    """Values and gradients; bad ids are reported, where torch's kernel would end the process."""
    store = Store("rows", 100, 16, dtype=dtype)
    plan = LookupPlan(100, 16, (store,), (Probe("rows", Digit(1, 100)),)).with_pool(pool)
    assert plan.is_dense
    generator = torch.Generator().manual_seed(0)
    # No number twice in a column: engines may differ in which of two equal maxima has the gradient.
    columns = [torch.randperm(100, generator=generator) - 50 for _ in range(16)]
    rows = torch.stack(columns, 1).to(device, getattr(torch, dtype)).requires_grad_()
    ids = torch.randperm(100, generator=generator)[:60].to(device)
    offsets = torch.arange(0, 61, 4, device=device)
    output = lookup(plan, {"rows": rows}, Bags(ids, offsets))
    assert output.dtype == rows.dtype
    output.sum().backward()
    own = rows.detach().float().requires_grad_()
    vectors = own[ids].view(15, 4, 16)
    expected = {
        "none": vectors.flatten(0, 1), "sum": vectors.sum(1), "mean": vectors.mean(1),
        "max": vectors.amax(1),
    }[pool]  # fmt: skip
    expected.sum().backward()
    tolerance = {"rtol": 0.0, "atol": 1e-5 if dtype == "float32" else 0.04}
    torch.testing.assert_close(output.float(), expected, **tolerance)
    assert rows.grad is not None and own.grad is not None
    torch.testing.assert_close(rows.grad.float(), own.grad, **tolerance)
    with pytest.raises((IndexError, RuntimeError), match="outside"):
        lookup(plan, {"rows": rows}, Bags(ids + 60, offsets))
        if device == "cuda":
            ops.synchronize()


@pytest.mark.cuda
@needs_gpu
def test_bad_offsets_are_reported() -> None:
    rows = torch.ones(50, 16, device="cuda")
    ids = torch.arange(3, device="cuda")
    for offsets in ([0, 5, 2, 3], [1, 2, 3, 3], [0, 1, 2, 2], [0, -7, 3, 3]):
        with pytest.raises((ValueError, RuntimeError), match="offset"):
            lookup(PLAN, {"rows": rows}, Bags(ids, torch.tensor(offsets, device="cuda")))
            ops.synchronize()


@pytest.mark.cuda
@needs_gpu
def test_more_numbers_than_32_bits_count() -> None:
    rows = 2**27 + 5
    if torch.cuda.mem_get_info()[0] < 5 * rows * 32:
        pytest.skip("needs 22 GB of GPU memory")
    plan = replace(
        PLAN, num_embeddings=rows, embedding_dim=32, stores=(Store("rows", rows, 32, "float16"),),
        probes=(Probe("rows", Digit(1, rows)),), padding_idx=None,
    )  # fmt: skip
    table = torch.zeros(rows, 32, dtype=torch.float16, device="cuda")
    table[-1] = 3
    ids = torch.tensor([rows - 1, 0, rows - 1], device="cuda")
    output = lookup(plan, {"rows": table}, Bags(ids, torch.tensor([0, 1, 3], device="cuda")))
    assert output.tolist() == [[3.0] * 32] * 2


@pytest.mark.cuda
@needs_gpu
def test_a_report_is_not_lost_by_a_module() -> None:
    """Modules try the cheapest call first; what it raises of an earlier one is not tried again."""
    table = ec.EmbeddingBag(100, 16, mode="sum", method="hash", budget="50%").cuda()
    offsets = torch.arange(4, device="cuda")
    bad = torch.tensor([1, 2, 3, 100], device="cuda")
    with torch.no_grad():
        table(bad[:3].contiguous() * 0, offsets[:3])
        torch.cuda.synchronize()
        try:
            table(bad, offsets)
            torch.cuda.synchronize()
        except (IndexError, RuntimeError):
            return  # the kernel was quick
        with pytest.raises(RuntimeError, match="earlier"):
            table(bad[:3].contiguous(), offsets[:3])
