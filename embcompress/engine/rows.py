"""The rows that ids find, and what is in them, in pure torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from embcompress.engine.hashing import hash_bucket, murmur_words
from embcompress.engine.quantization import dequantize, fake_quantize, gradient_scale
from embcompress.plan import (
    Address,
    Code,
    Digit,
    Hash,
    LookupPlan,
    MurmurHash,
    Slot,
    Store,
)

Stores = Mapping[str, Tensor]


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
        return gather(stores[name], rows.new_zeros(1) if shared else rows, sparse)

    if store.quantization is None:
        values = gather(tensor, rows, sparse)
        return values if store.threshold is None else soft_threshold(values, part(store.threshold))
    names = store.quantization
    scale, bias = part(names.scale), None if names.bias is None else part(names.bias)
    if tensor.is_floating_point():  # latents, in training
        damping = gradient_scale(store, plan.store(names.scale))
        return fake_quantize(gather(tensor, rows, sparse), scale, bias, store.bits, damping)
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
        return torch.where(kept, gather(tensor, rows, sparse), 0)
    numbers = kept_numbers(plan, store, stores, rows)
    values = widen(tensor)[numbers.clamp(min=0)]
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


def gather(values: Tensor, rows: Tensor, sparse: bool) -> Tensor:
    return widen(F.embedding(rows, values, sparse=sparse))


def _gather_overlapping(store: Store, pieces: Tensor, rows: Tensor, sparse: bool) -> Tensor:
    """Rows of several pieces each; ``pieces`` is of the store's shape."""
    columns = pieces.shape[1]
    first = rows[:, None] * (store.step // columns)
    numbers = first + torch.arange(store.width // columns, device=rows.device)
    return gather(pieces, numbers, sparse).reshape(rows.shape[0], store.width)


def widen(values: Tensor) -> Tensor:
    """float16 and bfloat16 are combined and pooled in float32."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
