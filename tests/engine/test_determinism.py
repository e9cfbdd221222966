"""The same bits from 1, 2 and 16 threads, and from every run: forward, gradients, fused updates."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.engine import Bags, GradientOptions, lookup, ops
from embcompress.plan import Code, Digit, Hash, LookupPlan, Probe, Quantization, Store, Weight

pytestmark = pytest.mark.skipif(
    not ops.is_available(),
    reason="the C++ extension is not built, or EMBCOMPRESS_ENGINE=reference is set",
)

ROOT = Path(__file__).parent.parent.parent
THREADS = (1, 2, 16)
NUM_IDS = 21_000  # enough for a bag that is cut into pieces, and for work for 16 threads
OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam")


def plan(kind: str, pool: str) -> LookupPlan:
    """A hashed table; a product with learned scales; packed rows behind codes."""
    if kind == "hash":
        return LookupPlan(
            5000, 16, (Store("rows", 700, 16),), (Probe("rows", Hash(1, 700)),), pool=pool
        )
    if kind == "product":
        return LookupPlan(
            5000, 20,
            stores=(Store("a", 100, 20), Store("b", 50, 20), Store("scales", 9, 1)),
            probes=(
                Probe("a", Digit(50, 100), Weight("scales", Hash(3, 9))),
                Probe("b", Digit(1, 50)),
            ),
            combine="mul", pool=pool, padding_idx=3,
        )  # fmt: skip
    return LookupPlan(
        5000, 12,
        stores=(
            Store("rows", 60, 12, "uint4", Quantization("steps", "lows")),
            Store("steps", 60, 1), Store("lows", 60, 1), Store("codes", 5000, 1, "uint6"),
        ),
        probes=(Probe("rows", Code("codes", 60, Digit(1, 5000), otherwise=Hash(4, 60))),),
        pool=pool,
    )  # fmt: skip


def stores_of(plan: LookupPlan) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        store.name: torch.randn(store.rows, store.width, generator=generator).requires_grad_()
        if store.is_float
        else torch.randint(0, 256, (store.bytes,), generator=generator).byte()
        for store in plan.stores
    }


@functools.cache
def ids() -> Tensor:
    """A tenth are anything, the others one hot id and two warm ones."""
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(0, 5000, (NUM_IDS,), generator=generator)
    hot = torch.rand(NUM_IDS, generator=generator)
    drawn[hot < 0.9] = 41
    drawn[hot < 0.2] = 7
    drawn[hot < 0.1] = 3
    return drawn


def bags(kind: str) -> Tensor:
    """Offsets of equal bags, or of a few in which one holds most ids."""
    if kind == "equal":
        return torch.arange(0, NUM_IDS + 1, 20)
    return torch.tensor([0, 0, 11, 12, NUM_IDS - 500, NUM_IDS - 500, NUM_IDS - 3, NUM_IDS])


def lookups() -> Iterator[tuple[str, list[Tensor]]]:
    """Outputs and gradients of every kind of lookup, dense and sparse."""
    weights = torch.rand(NUM_IDS, generator=torch.Generator().manual_seed(3))
    for kind, pool, shape, weighted, sparse in itertools.product(
        ("hash", "product", "packed"),
        ("none", "sum", "mean", "max"),
        ("equal", "one bag"),
        (False, True),
        (False, True),
    ):
        if (weighted and pool != "sum") or (pool == "none" and shape != "equal"):
            continue
        each = plan(kind, pool)
        stores = stores_of(each)
        own = weights.clone().requires_grad_() if weighted else None
        options = GradientOptions(sparse=sparse)
        output = lookup(each, stores, Bags(ids(), bags(shape), own), options)
        generator = torch.Generator().manual_seed(4)
        output.backward(torch.randn(output.shape, generator=generator))
        leaves = [*stores.values(), *([] if own is None else [own])]
        found = [leaf.grad for leaf in leaves if leaf.grad is not None]
        assert len(found) >= 1 + weighted
        name = f"{kind} {pool} {shape} {'weighted ' * weighted}{'sparse' * sparse}"
        yield name, [output, *found]


def fused_updates() -> Iterator[tuple[str, list[Tensor]]]:
    """Stores and optimizer state after three steps."""
    for name, kind, shape in itertools.product(
        OPTIMIZERS, ("hash", "product", "packed"), ("equal", "one bag")
    ):
        table = ec.EmbeddingBag.from_plan(plan(kind, "sum"))
        table.load_state_dict(
            {**table.state_dict(), **{n: t.detach() for n, t in stores_of(table.plan).items()}}
        )
        ec.fuse_optimizer(table, name, lr=0.1, weight_decay=0.01)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            output = table(ids(), bags(shape)[:-1])
            output.backward(torch.randn(output.shape, generator=generator))
        yield f"fused {name} {kind} {shape}", [*table.parameters(), *table.buffers()]


def collections() -> Iterator[tuple[str, list[Tensor]]]:
    """Three features in one call, of which two share a table."""
    torch.manual_seed(5)
    tables = [
        ec.TableConfig("a", 5000, 16, ("x", "y")),
        ec.TableConfig("b", 5000, 16, mode="mean"),
    ]
    collection = ec.EmbeddingBagCollection(tables, method="qr", budget="20%")
    output = collection(ids(), torch.arange(0, NUM_IDS + 1, 10))
    output.backward(torch.randn(output.shape))
    yield "collection", [output, *(p.grad for p in collection.parameters())]


def digest(tensors: list[Tensor]) -> str:
    """A hash of all bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        parts = [tensor.detach()]
        if tensor.is_sparse:
            whole = tensor.detach().coalesce()
            parts = [whole.indices(), whole.values()]
        for part in parts:
            assert part.numel() == 0 or not part.isnan().any()
            found.update(part.contiguous().numpy().tobytes())
    return found.hexdigest()


def digests() -> dict[str, str]:
    return {
        name: digest(tensors)
        for name, tensors in itertools.chain(lookups(), fused_updates(), collections())
    }


SCRIPT = """
import json, sys, torch
torch.set_num_threads(int(sys.argv[1]))
from tests.engine.test_determinism import digests
assert torch.get_num_threads() == int(sys.argv[1])
print(json.dumps(digests()))
"""


def test_the_number_of_threads_changes_no_bit() -> None:
    results = []
    for threads in THREADS:
        command = [sys.executable, "-c", SCRIPT, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    assert len(results[0]) > 60 and len(set(results[0].values())) > 50
    for threads, other in zip(THREADS[1:], results[1:], strict=True):
        different = [name for name, bits in results[0].items() if other[name] != bits]
        assert not different, f"{threads} threads change the bits of {different}"


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", ["hash", "product", "packed"])
def test_ten_backward_passes_give_the_same_bits(kind: str, sparse: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(16)
    try:
        found = set()
        for _ in range(10):
            each = plan(kind, "sum")
            stores = stores_of(each)
            output = lookup(
                each, stores, Bags(ids(), bags("equal")), GradientOptions(sparse=sparse)
            )
            output.backward(torch.ones_like(output))
            grads = [store.grad for store in stores.values() if store.grad is not None]
            found.add(digest([output, *grads]))
        assert len(found) == 1
    finally:
        torch.set_num_threads(before)
