"""Random valid plans with their stores and inputs, each fixed by the number of the case.

The cases walk over the whole vocabulary of :mod:`embcompress.plan`. Half of them hold small
whole numbers only: their sums are exact in float32 in any order, so that engines can be compared
bit for bit, and equal vectors (ties of a maximum) are frequent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from embcompress.engine import Bags
from embcompress.plan import (
    PACKED_VALUE_BITS,
    Address,
    Code,
    Combine,
    Digit,
    DirectAddress,
    Hash,
    Linear,
    LookupPlan,
    MurmurHash,
    Pool,
    Probe,
    Quantization,
    Scale,
    Sign,
    Slot,
    Sparsity,
    Store,
    Weight,
)

WIDTHS = (1, 1, 2, 3, 4, 5, 7, 8, 8, 12, 16, 16, 17, 24, 31, 32, 33, 64, 100, 128)
CONCAT_WIDTHS = (1, 2, 3, 4, 5, 8, 16, 17, 32)
VOCABULARIES = (1, 2, 7, 50, 50, 300, 1000, 2**24 + 3, 2**31, 2**31 + 5, 2**40, 2**62, 2**63 - 1)
FLOATS = ("float32", "float32", "float32", "float16", "bfloat16", "float64")
MAX_PROBES = 4


@dataclass(frozen=True)
class Case:
    """One plan with tensors for its stores and an input.

    Attributes:
        number: the case's number; equal numbers give equal cases.
        plan, stores, bags: arguments of :func:`embcompress.engine.lookup`.
        whole: every float of the stores and weights is a small whole number.
    """

    number: int
    plan: LookupPlan
    stores: dict[str, Tensor]
    bags: Bags
    whole: bool

    def __str__(self) -> str:
        ids, weights = self.bags.ids, self.bags.weights
        return (
            f"case {self.number}: {self.plan}, {ids.numel()} {ids.dtype} ids in "
            f"{self.bags.offsets.numel() - 1} bags, "
            f"{'no' if weights is None else weights.dtype} weights"
        )


def make_case(
    number: int, *, pool: Pool | None = None, dtype: str | None = None, small: bool = False
) -> Case:
    """The case of that number.

    Args:
        number: ≥ 0.
        pool: fixes the pooling.
        dtype: fixes the dtype of every float store.
        small: few ids, for loops in Python.
    """
    choice = random.Random(f"embcompress case {number}")
    generator = torch.Generator().manual_seed(number)
    plan = PlanMaker(choice, pool, dtype).make()
    whole = choice.random() < 0.5
    stores = make_stores(plan, generator, whole=whole)
    bags = make_bags_of(plan, choice, generator, whole=whole, small=small)
    return Case(number, plan, stores, bags, whole)


# -------------------------------------------------------------------------------------- plans


class PlanMaker:
    """Draws one plan, store by store."""

    def __init__(self, choice: random.Random, pool: Pool | None, dtype: str | None) -> None:
        self.choice = choice
        self.pool: Pool = pool or choice.choice(("none", "sum", "sum", "mean", "max"))
        self.main_dtype = dtype or choice.choice(FLOATS)
        self.mixed_dtypes = dtype is None and choice.random() < 0.15
        self.num_embeddings = choice.choice(VOCABULARIES)
        self.stores: list[Store] = []

    def make(self) -> LookupPlan:
        choice = self.choice
        if choice.random() < 0.04:
            return self.dense()
        combine: Combine = choice.choice(("sum", "mul", "concat"))
        count = choice.randint(1, MAX_PROBES)
        if combine == "sum" and choice.random() < 0.4:
            probes, width = self.placed_probes(count)
        else:
            widths = [choice.choice(WIDTHS)] * count
            if combine == "concat":
                widths = [choice.choice(CONCAT_WIDTHS) for _ in range(count)]
            probes = tuple(self.probe(width) for width in widths)
            width = sum(widths) if combine == "concat" else widths[0]
        embedding_dim, head = width, None
        if choice.random() < 0.3:
            embedding_dim = choice.choice(WIDTHS)
            head = Linear(self.float_store(embedding_dim, width).name)
        if choice.random() < 0.03:
            self.float_store(3, 2)  # resident, but read by nobody
        choice.shuffle(self.stores)
        return LookupPlan(
            self.num_embeddings,
            embedding_dim,
            stores=tuple(self.stores),
            probes=probes,
            combine=combine,
            head=head,
            pool=self.pool,
            padding_idx=self.padding(),
        )

    def dense(self) -> LookupPlan:
        self.num_embeddings = self.choice.choice((1, 7, 50, 300))
        store = self.float_store(self.num_embeddings, self.choice.choice(WIDTHS))
        return LookupPlan(
            self.num_embeddings,
            store.width,
            stores=(store,),
            probes=(Probe(store.name, Digit(1, store.rows)),),
            pool=self.pool,
            padding_idx=self.padding(),
        )

    def padding(self) -> int | None:
        if self.choice.random() < 0.6:
            return None
        return self.choice.choice((0, self.num_embeddings // 2, self.num_embeddings - 1))

    def placed_probes(self, count: int) -> tuple[tuple[Probe, ...], int]:
        """Probes of a sum in columns of their own, beside and over each other; all columns."""
        probes: list[Probe] = []
        filled = before = 0
        for _ in range(count):
            width = self.choice.choice(CONCAT_WIDTHS)
            column = self.choice.choice((before, filled, filled, self.choice.randint(0, filled)))
            probe = self.probe(width)
            if column > 0 or self.choice.random() < 0.5:
                probe = replace(probe, column=column)
            probes.append(probe)
            filled, before = max(filled, column + width), column
        if all(probe.column is None for probe in probes):  # without columns all have one width
            probes[0] = replace(probes[0], column=0)
        return tuple(probes), filled

    # -- stores

    def add(self, store: Store) -> Store:
        self.stores.append(store)
        return store

    def name(self) -> str:
        return f"store_{len(self.stores)}"

    def float_store(self, rows: int, width: int, stride: int | None = None) -> Store:
        dtype = self.choice.choice(FLOATS) if self.mixed_dtypes else self.main_dtype
        return self.add(Store(self.name(), rows, width, dtype, stride=stride))

    def value_store(self, width: int) -> Store:
        """A store of values, new or shared with an earlier probe."""
        fitting = [
            store
            for store in self.stores
            if store.width == width and (store.is_float or store.quantization is not None)
        ]
        if fitting and self.choice.random() < 0.4:
            return self.choice.choice(fitting)
        rows = self.choice.randint(1, 60)
        if self.choice.random() < 0.15:
            return self.sparse(rows, width)
        if self.choice.random() < 0.3:
            return self.quantized(rows, width)
        overlaps = width > 1 and self.choice.random() < 0.2
        return self.float_store(rows, width, self.stride(width) if overlaps else None)

    def stride(self, width: int) -> int:
        """Of rows that overlap; often one that divides the width."""
        divisors = [stride for stride in range(1, width) if width % stride == 0]
        return self.choice.choice(
            (1, self.choice.choice(divisors), self.choice.randint(1, width - 1))
        )

    def quantized(self, rows: int, width: int) -> Store:
        shape = (self.choice.choice((1, rows)), self.choice.choice((1, width)))
        scale = self.float_store(*shape).name
        bias = self.float_store(*shape).name if self.choice.random() < 0.5 else None
        bits = self.choice.choice(PACKED_VALUE_BITS)
        quantization = Quantization(scale, bias)
        return self.add(Store(self.name(), rows, width, f"uint{bits}", quantization))

    def sparse(self, rows: int, width: int) -> Store:
        dense = self.float_store(rows, width)
        stored = self.choice.choice((1, rows * width, self.choice.randint(1, rows * width)))
        block, name = self.choice.choice((1, 2, 7, rows, rows + 3)), dense.name
        if self.choice.random() < 0.5:
            form, index = "mask", Store(f"{name}_index", rows, width, "uint1")
        else:
            last = min(block, rows) * width - 1
            bits = max(1, last.bit_length() + self.choice.choice((0, 0, 3)))
            form, index = "positions", Store(f"{name}_index", stored, 1, f"uint{bits}")
        bits = stored.bit_length() + self.choice.choice((0, 0, 2))
        starts = self.add(Store(f"{name}_starts", -(-rows // block), 1, f"uint{bits}"))
        self.add(index)
        sparsity = Sparsity(stored, index.name, starts.name, block, form)
        self.stores[self.stores.index(dense)] = store = replace(dense, sparsity=sparsity)
        return store

    def code_store(self, size: int) -> Store:
        """A store whose codes can count to ``size``, new or shared."""
        fitting = [
            store
            for store in self.stores
            if not store.is_float
            and store.quantization is None
            and size < 2**store.bits
            and not store.name.endswith(("_index", "_starts"))
        ]
        if fitting and self.choice.random() < 0.3:
            return self.choice.choice(fitting)
        bits = self.choice.randint(size.bit_length(), 32)
        shape = (self.choice.randint(1, 40), self.choice.randint(1, 3))
        return self.add(Store(self.name(), *shape, f"uint{bits}"))

    # -- probes

    def key(self) -> int:
        return self.choice.getrandbits(64)

    def simple_address(self, reach: int) -> DirectAddress:
        """A digit or a hash below ``reach``."""
        size = self.choice.choice((reach, self.choice.randint(1, reach)))
        drawn = self.choice.random()
        if drawn < 0.45:
            return Hash(self.key(), size)
        if drawn < 0.55:
            return MurmurHash(self.choice.getrandbits(32), self.choice.randrange(4), size)
        divisors = (1, 1, 2, 3, 17, size, 2**33, self.choice.randint(1, 2**63 - 1))
        return Digit(self.choice.choice(divisors), size)

    def address(self, reach: int) -> Address:
        if self.choice.random() < 0.65:
            return self.simple_address(reach)
        return self.table_address(reach, goes_on=True)

    def table_address(self, reach: int, *, goes_on: bool) -> Address:
        """A code or a slot, which may go on to another address."""
        if self.choice.random() < 0.3:
            return self.slot(reach, goes_on)
        size = self.choice.choice((1, reach, self.choice.randint(1, reach)))
        first = self.choice.choice((0, 0, self.choice.randint(0, 20)))
        otherwise = self.otherwise(size) if goes_on else None
        fewer = isinstance(otherwise, Code | Slot) and self.choice.random() < 0.5
        store = self.code_store(first + (self.choice.randint(1, size) if fewer else size))
        column = self.choice.randrange(store.width)
        return Code(store.name, size, self.simple_address(store.rows), column, otherwise, first)

    def otherwise(self, size: int) -> Address | None:
        """Where ids go that a table has no row for."""
        drawn = self.choice.random()
        if drawn < 0.4:
            return None
        return self.simple_address(size) if drawn < 0.7 else self.table_address(size, goes_on=False)

    def slot(self, reach: int, goes_on: bool) -> Slot:
        """Few tags, so that they are found as often as not, some of them past the size."""
        size = self.choice.randint(1, reach)
        otherwise = self.otherwise(size) if goes_on else None
        tag = self.simple_address(self.choice.choice((1, 4, 9)))
        store = self.code_store(tag.size)
        first = self.choice.choice((0, self.choice.randint(0, size)))
        return Slot(store.name, size, self.simple_address(store.rows), tag, otherwise, first)

    def scale(self) -> Scale | None:
        drawn = self.choice.random()
        if drawn < 0.55:
            return None
        if drawn < 0.75:
            return Sign(self.key())
        floats = [s for s in self.stores if s.is_float and s.sparsity is None and s.stride is None]
        if floats and self.choice.random() < 0.3:  # learned numbers beside the values themselves
            store = self.choice.choice(floats)
        else:
            store = self.float_store(self.choice.randint(1, 40), self.choice.randint(1, 4))
        column = self.choice.randrange(store.width)
        return Weight(store.name, self.address(store.rows), column)

    def probe(self, width: int) -> Probe:
        store = self.value_store(width)
        offset = 0
        if store.rows > 1 and self.choice.random() < 0.3:
            offset = self.choice.randint(1, store.rows - 1)
        return Probe(store.name, self.address(store.rows - offset), self.scale(), offset)


# ------------------------------------------------------------------------------------- stores


def pack_bits(numbers: Sequence[int], bits: int) -> Tensor:
    """(bytes,) uint8: the numbers packed low bits first, without padding."""
    values = np.asarray(numbers, dtype=np.int64)
    stream = (values[:, None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(stream.astype(np.uint8).ravel(), bitorder="little"))


def unpack_bits(packed: Tensor, bits: int) -> list[int]:
    """All numbers of a packed store, and those that its last byte has room for."""
    stream = np.unpackbits(packed.numpy(), bitorder="little").astype(np.int64)
    stream = stream[: len(stream) // bits * bits].reshape(-1, bits)
    return (stream << np.arange(bits)).sum(1).tolist()


def make_stores(plan: LookupPlan, generator: torch.Generator, *, whole: bool) -> dict[str, Tensor]:
    """Tensors for every store of a plan, codes within bounds, absent, now and then damaged."""
    bounds: dict[str, int] = {}
    tables = [p.address for p in plan.probes if isinstance(p.address, Code | Slot)]
    for address in (*tables, *(table.otherwise for table in tables)):
        if isinstance(address, Code | Slot):
            size = address.tag.size if isinstance(address, Slot) else address.size
            size = min(size, 2 ** plan.store(address.store).bits)
            bounds[address.store] = min(size, bounds.get(address.store, size))
    scales = {s.quantization.scale for s in plan.stores if s.quantization is not None}
    tensors = {}
    for store in plan.stores:
        if store.is_float:
            values = _floats(store.shape, generator, whole)
            if whole and store.name in scales:
                values *= 2  # a symmetric code is a half, its value shall be a whole number
            tensors[store.name] = values.to(getattr(torch, store.dtype))
        else:
            count = store.rows * store.width
            whole_range = 1 << store.bits
            damaged = bool(torch.rand((), generator=generator) < 0.1)
            bound = whole_range if damaged else bounds.get(store.name, whole_range)
            codes = torch.randint(0, bound, (count,), generator=generator)
            if store.quantization is None:
                share = float(torch.randint(0, 3, (), generator=generator)) / 2
                absent = torch.rand(count, generator=generator) < share**2
                codes[absent] = (1 << store.bits) - 1
            tensors[store.name] = pack_bits(codes.tolist(), store.bits)
    for store in plan.stores:
        if store.sparsity is not None:
            tensors |= _sparse_tensors(plan, store, tensors[store.name], generator)
    return tensors


def _sparse_tensors(
    plan: LookupPlan, store: Store, latents: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Latents and a mask of them, or what it keeps, packed."""
    sparsity = store.sparsity
    assert sparsity is not None
    places = torch.randperm(latents.numel(), generator=generator)[: sparsity.stored].sort().values
    kept = torch.zeros(latents.numel(), dtype=torch.bool).index_fill(0, places, True)
    mask, starts = pack_bits(kept.long().tolist(), 1), plan.store(sparsity.starts)
    if torch.rand((), generator=generator) < 0.5:
        nothing = torch.zeros(starts.bytes, dtype=torch.uint8)
        return {store.name: latents, sparsity.index: mask, starts.name: nothing}
    block = sparsity.block * store.width
    begins = [int((places < first).sum()) for first in range(0, store.rows * store.width, block)]
    index = pack_bits((places % block).tolist(), plan.store(sparsity.index).bits)
    return {
        store.name: latents.reshape(-1)[places],
        sparsity.index: mask if sparsity.form == "mask" else index,
        starts.name: pack_bits(begins, starts.bits),
    }


def packed_sparse(case: Case) -> set[str]:
    """Names of the sparse stores that are not held as latents."""
    stores = {s.name for s in case.plan.stores if s.sparsity is not None}
    return {name for name in stores if case.stores[name].dim() == 1}


def _floats(shape: tuple[int, ...], generator: torch.Generator, whole: bool) -> Tensor:
    """Float64 numbers: normal ones, or -2, -1, 0, 1, 2."""
    if whole:
        return torch.randint(-2, 3, shape, generator=generator).double()
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------------- inputs


def _lengths(choice: random.Random, small: bool) -> list[int]:
    """Lengths of the bags of one batch."""
    many = 12 if small else 120
    kinds: tuple[Callable[[], list[int]], ...] = (
        lambda: [],
        lambda: [0] * choice.randint(1, 5),
        lambda: [choice.randint(0, many)],
        lambda: [1] * choice.randint(1, 2 * many),
        lambda: [choice.randint(1, 4)] * choice.randint(1, many // 4),
        lambda: [choice.randint(0, 5) for _ in range(choice.randint(1, many // 2))],
        lambda: [choice.choice((0, 0, 0, many // 4)) for _ in range(choice.randint(1, 12))],
        lambda: [choice.randint(0, 3) for _ in range(6)] + [4 * many] + [1, 0],
    )
    return choice.choice(kinds)()


def _draw_ids(
    plan: LookupPlan, count: int, choice: random.Random, generator: torch.Generator
) -> Tensor:
    n = plan.num_embeddings
    kind = choice.choice(("uniform", "uniform", "few", "hot", "one", "ends"))
    ids = torch.randint(0, n, (count,), generator=generator)
    if kind == "few":
        few = torch.randint(0, n, (4,), generator=generator)
        ids = few[torch.randint(0, 4, (count,), generator=generator)]
    elif kind == "hot":
        ids[torch.rand(count, generator=generator) < 0.8] = choice.randrange(n)
    elif kind == "one":
        ids[:] = choice.randrange(n)
    elif kind == "ends":
        ends = torch.tensor([0, min(1, n - 1), max(0, n - 2), n - 1])
        ids = ends[torch.randint(0, 4, (count,), generator=generator)]
    if plan.padding_idx is not None:
        ids[torch.rand(count, generator=generator) < choice.choice((0.0, 0.3, 0.3, 1.0))] = (
            plan.padding_idx
        )
    return ids


def make_bags_of(
    plan: LookupPlan,
    choice: random.Random,
    generator: torch.Generator,
    *,
    whole: bool,
    small: bool = False,
) -> Bags:
    """Canonical bags for a plan: empty, single, equal, ragged or with one huge bag."""
    lengths = _lengths(choice, small)
    count = sum(lengths)
    ids = _draw_ids(plan, count, choice, generator)
    if plan.num_embeddings <= 2**31 and choice.random() < 0.4:
        ids = ids.int()
    if plan.pool == "none":
        return Bags(ids, ids)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    weights = None
    if plan.pool == "sum" and choice.random() < 0.4:
        dtype = getattr(torch, choice.choice(FLOATS))
        weights = _floats((count,), generator, whole).to(dtype)
    return Bags(ids, ends.to(ids.dtype), weights)


def make_feature_cases(number: int) -> list[Case]:
    """Cases of one batch size, one dtype and int64 ids: the features of one collection."""
    choice = random.Random(f"embcompress features {number}")
    generator = torch.Generator().manual_seed(number)
    dtype, whole = choice.choice(FLOATS), choice.random() < 0.5
    weight_dtype = choice.choice((None, None, dtype))
    batch = choice.choice((0, 1, 5, 33))
    cases = []
    for _ in range(choice.randint(1, 6)):
        pool = "sum" if weight_dtype else choice.choice(("sum", "mean", "max"))
        plan = PlanMaker(choice, pool, dtype).make()
        lengths = [choice.choice((0, 1, 1, 1, 2, 5, 20)) for _ in range(batch)]
        ids = _draw_ids(plan, sum(lengths), choice, generator)
        ends = torch.tensor([0, *lengths]).cumsum(0)
        weights = None
        if weight_dtype:
            weights = _floats((ids.numel(),), generator, whole).to(getattr(torch, weight_dtype))
        stores = make_stores(plan, generator, whole=whole)
        cases.append(Case(number, plan, stores, Bags(ids, ends, weights), whole))
    return cases


def with_leaves(case: Case, frozen: Collection[str] = ()) -> Case:
    """A copy of the case whose floats, but for the frozen stores, are leaves with gradients.

    So are not the kept numbers of packed sparse stores, which only the reference trains.
    """
    frozen = {*frozen, *packed_sparse(case)}

    def leaf(tensor: Tensor, learned: bool = True) -> Tensor:
        copy = tensor.detach().clone()
        return copy.requires_grad_(learned and copy.is_floating_point())

    stores = {name: leaf(tensor, name not in frozen) for name, tensor in case.stores.items()}
    weights = None if case.bags.weights is None else leaf(case.bags.weights)
    return replace(case, stores=stores, bags=replace(case.bags, weights=weights))
