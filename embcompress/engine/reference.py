"""The judge: a slow, obvious, pure-torch reading of a plan.

Every kernel is tested against this file, and it runs everything where no kernel is built. It is
differentiable by autograd, works in float64, and is written without any of the kernels' code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from embcompress.engine.bags import Bags
from embcompress.engine.heads import apply_head, is_linear
from embcompress.engine.quantization import dequantize, fake_quantize, gradient_scale
from embcompress.hashing import (
    MASK64,
    MIX_MULTIPLIERS,
    MIX_SHIFTS,
    MURMUR_FINALIZER,
    MURMUR_MULTIPLIERS,
)
from embcompress.plan import (
    Address,
    Code,
    Digit,
    Hash,
    HashFeatures,
    LookupPlan,
    MurmurHash,
    Probe,
    Sign,
    Slot,
    Store,
    Weight,
)

Stores = Mapping[str, Tensor]

# ------------------------------------------------------------------------------ 64-bit integers
# torch has no unsigned 64-bit arithmetic: int64 multiplication wraps, and a logical shift is an
# arithmetic one with the copied sign bits masked off.

_LOW32 = (1 << 32) - 1


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= MASK64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(value: Tensor, count: int) -> Tensor:
    return (value >> count) & ((1 << (64 - count)) - 1)


def mix64(value: Tensor) -> Tensor:
    """Elementwise :func:`embcompress.hashing.mix64` on the bits of an int64 tensor."""
    value = value ^ _shift_right(value, MIX_SHIFTS[0])
    value = value * _signed(MIX_MULTIPLIERS[0])
    value = value ^ _shift_right(value, MIX_SHIFTS[1])
    value = value * _signed(MIX_MULTIPLIERS[1])
    return value ^ _shift_right(value, MIX_SHIFTS[2])


def multiply_high(value: Tensor, factor: int) -> Tensor:
    """High 64 bits of the unsigned product of each 64-bit value with ``factor`` < 2**63."""
    high, low = _shift_right(value, 32), value & _LOW32
    factor_high, factor_low = factor >> 32, factor & _LOW32
    cross_a, cross_b = high * factor_low, low * factor_high
    carry = (cross_a & _LOW32) + (cross_b & _LOW32) + _shift_right(low * factor_low, 32)
    return (
        high * factor_high
        + _shift_right(cross_a, 32)
        + _shift_right(cross_b, 32)
        + _shift_right(carry, 32)
    )


def hash_bucket(ids: Tensor, key: int, buckets: int) -> Tensor:
    """Elementwise :func:`embcompress.hashing.hash_bucket`; int64 ids of any value."""
    return multiply_high(mix64(ids ^ _signed(key)), buckets)


def hash_features(features: HashFeatures, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, count) numbers in [-1, 1] of (N,) ids."""
    counts = torch.arange(features.count, device=ids.device)
    keys = mix64(counts + _signed(features.key))
    buckets = multiply_high(mix64(ids.long()[:, None] ^ keys), features.buckets)
    return buckets.to(dtype) * (2 / (features.buckets - 1)) - 1


def _finalize_murmur(value: Tensor) -> Tensor:
    for multiplier in MURMUR_FINALIZER:
        value = (value ^ _shift_right(value, 33)) * _signed(multiplier)
    return value ^ _shift_right(value, 33)


def murmur_words(ids: Tensor, seed: int) -> list[Tensor]:
    """Elementwise :func:`embcompress.hashing.murmur_words`; int64 ids of any value."""
    mixed = ids * _signed(MURMUR_MULTIPLIERS[0])
    mixed = (mixed << 31) | _shift_right(mixed, 33)
    mixed = mixed * _signed(MURMUR_MULTIPLIERS[1])
    first = (mixed ^ seed ^ 8) + (seed ^ 8)
    second = first + (seed ^ 8)
    first, second = _finalize_murmur(first), _finalize_murmur(second)
    first = first + second
    second = first + second
    return [first & _LOW32, _shift_right(first, 32), second & _LOW32, _shift_right(second, 32)]


# ------------------------------------------------------------------------------------ gathering


def unpack_bits(packed: Tensor, positions: Tensor, bits: int) -> Tensor:
    """Unsigned numbers of ``bits`` ≤ 32 bits at the given positions of a bit stream.

    Args:
        packed: (bytes,) uint8, numbers packed low bits first without padding.
        positions: int64, any shape.

    Returns:
        int64 of the shape of ``positions``.
    """
    first_bit = positions * bits
    first_byte, shift = first_bit // 8, first_bit % 8
    window = torch.zeros_like(positions)
    for byte in range((bits + 7 + 7) // 8):
        # The last bytes of the window may lie past the stream; they are masked off below.
        at = (first_byte + byte).clamp(max=packed.numel() - 1)
        window = window | (packed[at].long() << (8 * byte))
    return (window >> shift) & ((1 << bits) - 1)


def address_rows(
    address: Address, ids: Tensor, plan: LookupPlan, stores: Stores
) -> tuple[Tensor, Tensor | None]:
    """Rows that the ids read, and where the address is present (None: everywhere)."""
    if isinstance(address, Digit):
        return torch.div(ids, address.divisor, rounding_mode="floor") % address.radix, None
    if isinstance(address, Hash):
        return hash_bucket(ids, address.key, address.buckets), None
    if isinstance(address, MurmurHash):
        return murmur_words(ids, address.seed)[address.word] % address.buckets, None
    if isinstance(address, Slot):
        return _slot_rows(address, ids, plan, stores)
    return _code_rows(address, ids, plan, stores)


def _code_rows(
    address: Code, ids: Tensor, plan: LookupPlan, stores: Stores
) -> tuple[Tensor, Tensor | None]:
    codes = plan.store(address.store)
    code_row, _ = address_rows(address.row, ids, plan, stores)
    positions = code_row * codes.width + address.column
    codes_read = unpack_bits(stores[codes.name], positions, codes.bits)
    rows = codes_read - address.first
    absent = codes_read == (1 << codes.bits) - 1
    present = ~absent & (rows >= 0) & (rows < address.size)  # nor another probe's
    rows = torch.where(present, rows, 0)
    if address.otherwise is None:
        return rows, present
    return _or_otherwise(address.otherwise, rows, present, absent, ids, plan, stores)


def _slot_rows(
    address: Slot, ids: Tensor, plan: LookupPlan, stores: Stores
) -> tuple[Tensor, Tensor | None]:
    slots = plan.store(address.store)
    bucket, _ = address_rows(address.bucket, ids, plan, stores)
    tags, _ = address_rows(address.tag, ids, plan, stores)
    positions = bucket[:, None] * slots.width + torch.arange(slots.width, device=ids.device)
    equal = unpack_bits(stores[slots.name], positions, slots.bits) == tags[:, None]
    found = equal.any(1)
    # Slots before the first of equal ones. (Which of them argmax gives is left open.)
    before = (equal.long().cumsum(1) == 0).sum(1)
    rows = address.first + bucket * slots.width + before
    present = found & (rows < address.size)
    rows = torch.where(present, rows, 0)
    if address.otherwise is None:
        return rows, present
    return _or_otherwise(address.otherwise, rows, present, ~found, ids, plan, stores)


def _or_otherwise(
    otherwise: Address,
    rows: Tensor,
    present: Tensor,
    absent: Tensor,
    ids: Tensor,
    plan: LookupPlan,
    stores: Stores,
) -> tuple[Tensor, Tensor]:
    """The rows, and where these are; for absent ids those of another address."""
    others, there = address_rows(otherwise, ids, plan, stores)
    has_other = absent if there is None else absent & there
    return torch.where(absent, others, rows), present | has_other


def gather_rows(
    plan: LookupPlan, store: Store, stores: Stores, rows: Tensor, sparse: bool
) -> Tensor:
    """(N, width) values of the rows, in at least float32."""
    tensor = stores[store.name]
    if store.sparsity is not None:
        return _gather_sparse(plan, store, stores, rows, sparse)
    if store.stride is not None:
        return _gather_overlapping(store, tensor, rows, sparse)

    def part(name: str) -> Tensor:
        shared = plan.store(name).rows == 1
        return _gather(stores[name], rows.new_zeros(1) if shared else rows, sparse)

    if store.quantization is None:
        values = _gather(tensor, rows, sparse)
        return values if store.threshold is None else soft_threshold(values, part(store.threshold))
    names = store.quantization
    scale, bias = part(names.scale), None if names.bias is None else part(names.bias)
    if tensor.is_floating_point():  # latents, in training
        damping = gradient_scale(store, plan.store(names.scale))
        return fake_quantize(_gather(tensor, rows, sparse), scale, bias, store.bits, damping)
    columns = torch.arange(store.width, device=rows.device)
    codes = unpack_bits(tensor, rows[:, None] * store.width + columns, store.bits)
    return dequantize(codes.to(scale.dtype), scale, bias, store.bits)


def soft_threshold(values: Tensor, threshold: Tensor) -> Tensor:
    """``sign(v) * max(|v| - sigmoid(t), 0)``."""
    return values.sign() * F.relu(values.abs() - threshold.sigmoid())


def _gather_sparse(
    plan: LookupPlan, store: Store, stores: Stores, rows: Tensor, sparse: bool
) -> Tensor:
    """Rows of a sparse store: of its kept numbers, (stored,), or of latents under a mask."""
    assert store.sparsity is not None
    tensor = stores[store.name]
    if tensor.dim() == 2:  # latents, in training
        kept = unpack_bits(stores[store.sparsity.index], _places(store, rows), 1) == 1
        return torch.where(kept, _gather(tensor, rows, sparse), 0)
    numbers = kept_numbers(plan, store, stores, rows)
    values = _widen(tensor)[numbers.clamp(min=0)]
    return torch.where(numbers >= 0, values, 0)


def kept_numbers(plan: LookupPlan, store: Store, stores: Stores, rows: Tensor) -> Tensor:
    """(N, width) which of a packed sparse store's kept numbers each number of the rows is.

    -1 where it is none of them, as it is where a damaged index or start points past them.
    """
    sparsity = store.sparsity
    assert sparsity is not None
    starts = plan.store(sparsity.starts)
    block = rows // sparsity.block
    begin = unpack_bits(stores[starts.name], block, starts.bits)
    if sparsity.form == "mask":
        numbers = _ranks_in_mask(store, stores[sparsity.index], rows, begin)
    else:
        following = (block + 1).clamp(max=starts.rows - 1)
        after = unpack_bits(stores[starts.name], following, starts.bits)
        end = torch.where(block + 1 < starts.rows, after, sparsity.stored)
        index = plan.store(sparsity.index)
        numbers = _found_positions(store, stores[index.name], index.bits, rows, begin, end)
    return torch.where(numbers < sparsity.stored, numbers, -1)


def _places(store: Store, rows: Tensor) -> Tensor:
    """(N, width) numbers of the rows, counted from the store's first."""
    return rows[:, None] * store.width + torch.arange(store.width, device=rows.device)


def _ranks_in_mask(store: Store, mask: Tensor, rows: Tensor, begin: Tensor) -> Tensor:
    """How many bits are set before each number of the rows; -1 where its own is not.

    Args:
        begin: (N,) how many are set before the block of each row.
    """
    assert store.sparsity is not None
    first = rows // store.sparsity.block * store.sparsity.block
    in_block = torch.arange(store.sparsity.block * store.width, device=rows.device)
    bits = unpack_bits(mask, first[:, None] * store.width + in_block, 1)
    ranks = begin[:, None] + bits.cumsum(1) - 1
    return torch.where(bits == 1, ranks, -1).gather(1, _places(store, rows - first))


def _found_positions(
    store: Store, index: Tensor, bits: int, rows: Tensor, begin: Tensor, end: Tensor
) -> Tensor:
    """Where each number of the rows is among the rising positions of its block; -1: nowhere.

    Args:
        begin, end: (N,) the entries of each row's block.
    """
    assert store.sparsity is not None
    wanted = _places(store, rows % store.sparsity.block)
    low, end = begin[:, None].expand_as(wanted), end[:, None]
    high = end.expand_as(wanted)
    last = store.sparsity.stored - 1
    for _ in range((store.sparsity.block * store.width).bit_length()):  # halves what is left
        middle = (low + high) // 2
        is_later = unpack_bits(index, middle.clamp(max=last), bits) < wanted
        low, high = (
            torch.where((low < high) & is_later, middle + 1, low),
            torch.where((low < high) & ~is_later, middle, high),
        )
    found = (low < end) & (unpack_bits(index, low.clamp(max=last), bits) == wanted)
    return torch.where(found, low, -1)


def _gather(values: Tensor, rows: Tensor, sparse: bool) -> Tensor:
    return _widen(F.embedding(rows, values, sparse=sparse))


def _gather_overlapping(store: Store, pieces: Tensor, rows: Tensor, sparse: bool) -> Tensor:
    """Rows of several pieces each; ``pieces`` is of the store's shape."""
    columns = pieces.shape[1]
    first = rows[:, None] * (store.step // columns)
    numbers = first + torch.arange(store.width // columns, device=rows.device)
    return _gather(pieces, numbers, sparse).reshape(rows.shape[0], store.width)


def _widen(values: Tensor) -> Tensor:
    """float16 and bfloat16 are combined and pooled in float32."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _probe_vectors(
    plan: LookupPlan, stores: Stores, probe: Probe, ids: Tensor, sparse: bool
) -> Tensor:
    rows, present = address_rows(probe.address, ids, plan, stores)
    vectors = _present_rows(plan, stores, probe, probe.offset + rows, present, sparse)
    if isinstance(probe.scale, Sign):
        sign_bit = _shift_right(mix64(ids ^ _signed(probe.scale.key)), 63)
        vectors = vectors * (1 - 2 * sign_bit)[:, None].to(vectors.dtype)
    elif isinstance(probe.scale, Weight):
        weights = stores[probe.scale.store]
        weight_rows, has_weight = address_rows(probe.scale.address, ids, plan, stores)
        weight = _gather(weights, weight_rows, sparse)[:, probe.scale.column]
        if has_weight is not None:
            weight = torch.where(has_weight, weight, 0)
        vectors = vectors * weight[:, None]
    return vectors if present is None else torch.where(present[:, None], vectors, 0)


def _present_rows(
    plan: LookupPlan,
    stores: Stores,
    probe: Probe,
    rows: Tensor,
    present: Tensor | None,
    sparse: bool,
) -> Tensor:
    """(N, width) values of the rows; of any row where there is none.

    A sparse gradient has no such row: an optimizer would take it for touched.
    """
    store = plan.store(probe.store)
    if present is None or not sparse or torch.compiler.is_compiling():
        return gather_rows(plan, store, stores, rows, sparse)
    own = present.nonzero().flatten()
    values = gather_rows(plan, store, stores, rows[own], sparse)
    return values.new_zeros(rows.numel(), values.shape[1]).index_copy(0, own, values)


def combined_vectors(plan: LookupPlan, stores: Stores, ids: Tensor, sparse: bool) -> Tensor:
    """(N, plan.width): the probes of each id combined, before the head; zero for padding."""
    ids = ids.long()
    if plan.inputs is not None:
        return hash_features(plan.inputs, ids, _head_dtype(plan, stores))
    parts = [_probe_vectors(plan, stores, probe, ids, sparse) for probe in plan.probes]
    if plan.combine == "concat":
        vectors = torch.cat(parts, dim=-1)
    else:
        parts = [place(plan, t, part) for t, part in enumerate(parts)]
        vectors = parts[0]
        for part in parts[1:]:
            vectors = vectors + part if plan.combine == "sum" else vectors * part
    if plan.padding_idx is not None:
        vectors = torch.where((ids != plan.padding_idx)[:, None], vectors, 0)
    return vectors


def place(plan: LookupPlan, probe: int, part: Tensor) -> Tensor:
    """(N, plan.width): the vectors of a probe in its columns, zeros beside them."""
    begin, end = plan.columns[probe]
    return part if (begin, end) == (0, plan.width) else F.pad(part, (begin, plan.width - end))


def vectors_after_head(plan: LookupPlan, stores: Stores, ids: Tensor, vectors: Tensor) -> Tensor:
    """(N, embedding_dim): the head applied to the vectors of the ids; zero for padding."""
    vectors = apply_head(plan, stores, vectors)
    if plan.padding_idx is None or is_linear(plan.head):  # which keeps zeros
        return vectors
    return torch.where((ids != plan.padding_idx)[:, None], vectors, 0)


def _head_dtype(plan: LookupPlan, stores: Stores) -> torch.dtype:
    """The dtype in which a network without gathered rows is computed: at least float32."""
    return torch.promote_types(torch.float32, stores[plan.head_stores[0]].dtype)


# -------------------------------------------------------------------------------------- pooling


def _bag_of_position(bags: Bags) -> Tensor:
    """(N,) number of the bag that each id is in: how many bags end at or before it."""
    positions = torch.arange(bags.ids.numel(), device=bags.ids.device)
    return torch.searchsorted(bags.offsets[1:].long(), positions, right=True)


def _counted(plan: LookupPlan, bags: Bags) -> Tensor:
    """(N,) which ids count: all but padding."""
    if plan.padding_idx is None:
        return torch.ones_like(bags.ids, dtype=torch.bool)
    return bags.ids != plan.padding_idx


def _pool_sum(vectors: Tensor, bag: Tensor, batch: int) -> Tensor:
    return vectors.new_zeros(batch, vectors.shape[1]).index_add(0, bag, vectors)


def _pool_max(vectors: Tensor, counted: Tensor, bag: Tensor, batch: int) -> Tensor:
    """Columnwise maximum; among equals the first id of the bag wins (and takes the gradient).

    NaN is larger than every number, as in :func:`torch.amax`.
    """
    count, width = vectors.shape
    values = torch.where(counted[:, None], vectors.detach(), -torch.inf)
    index = bag[:, None].expand(-1, width)
    best = values.new_full((batch, width), -torch.inf).scatter_reduce(0, index, values, "amax")
    position = torch.arange(count, device=bag.device)[:, None].expand(-1, width)
    is_best = counted[:, None] & ((values == best[bag]) | values.isnan())
    winner = torch.full((batch, width), count, device=bag.device)
    winner = winner.scatter_reduce(0, index, torch.where(is_best, position, count), "amin")
    # An extra row of zeros answers for bags without a counted id.
    padded = torch.cat([vectors, vectors.new_zeros(1, width)])
    return padded.gather(0, winner)


def pool_bags(plan: LookupPlan, vectors: Tensor, bags: Bags) -> Tensor:
    """(B, width) from the (N, width) vectors of the bags' ids; empty bags are zero."""
    batch = bags.offsets.numel() - 1
    bag, counted = _bag_of_position(bags), _counted(plan, bags)
    if plan.pool == "max":
        return _pool_max(vectors, counted, bag, batch)
    if bags.weights is not None:
        weighted = vectors * bags.weights.to(vectors.dtype)[:, None]
        vectors = torch.where(counted[:, None], weighted, 0)
    total = _pool_sum(vectors, bag, batch)
    if plan.pool == "sum":
        return total
    counts = torch.zeros(batch, dtype=total.dtype, device=total.device)
    counts = counts.index_add(0, bag, counted.to(total.dtype))
    return total / counts.clamp(min=1)[:, None]


def output_dtype(plan: LookupPlan, stores: Stores) -> torch.dtype:
    """The dtype that the probes' values promote to."""
    dtypes = [stores[name].dtype for name in plan.head_stores] if plan.inputs is not None else []
    for probe in plan.probes:
        store = plan.store(probe.store)
        name = store.name if store.quantization is None else store.quantization.scale
        dtypes.append(stores[name].dtype)
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def lookup_reference(
    plan: LookupPlan, stores: Stores, bags: Bags, *, sparse: bool = False
) -> Tensor:
    """Run ``plan`` on checked bags.

    Args:
        plan: what to do; ``plan.pool == "none"`` reads ``bags.ids`` alone.
        stores: a tensor for each store: float ones of the store's shape, (rows, width) unless
            rows overlap, packed ones (bytes,) uint8, or quantized ones in training their latents,
            (rows, width) float; sparse ones (stored,), or in training their latents, with a mask
            of them in the place of the index.
        bags: canonical, checked input.
        sparse: gather with sparse gradients, as ``torch.nn.Embedding(sparse=True)``.

    Returns:
        (N, embedding_dim) vectors, or (B, embedding_dim) pooled bags.
    """
    dtype = output_dtype(plan, stores)
    if not sparse:
        # Widened whole where a gradient is wanted, so that it adds up in float32 and is rounded
        # once. (Sparse gradients are in the dtype of their store, as torch's are.)
        stores = {name: _widen(t) if t.requires_grad else t for name, t in stores.items()}
    vectors = combined_vectors(plan, stores, bags.ids, sparse)
    if plan.pool in ("none", "max") or not is_linear(plan.head):  # the head comes first
        vectors = vectors_after_head(plan, stores, bags.ids, vectors)
        vectors = vectors if plan.pool == "none" else pool_bags(plan, vectors, bags)
    else:
        vectors = apply_head(plan, stores, pool_bags(plan, vectors, bags))
    return vectors.to(dtype)
