"""Sparse stores: their cheapest layout, the masks of what they keep, and their packed form.

While it trains, a sparse store is held as dense *latents*, (rows, width) float, and in the place of
its index there is a mask of them, a bit for each: (⌈rows * width / 8⌉,) uint8. Lookups read the
latents through the mask. Packed, there are the kept numbers, (stored,), their index and the starts
of its blocks (:class:`embcompress.plan.Sparsity`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from embcompress.engine.rows import gather_rows, kept_numbers
from embcompress.importance import strongest
from embcompress.layouts.packing import pack_codes, packed_bytes, unpack_codes
from embcompress.plan import LookupPlan, Sparsity, Store

#: A lookup counts bits in half a block, or halves the positions of a whole one.
_MASK_BLOCK, _POSITIONS_BLOCK = 512, 1024
_CHUNK_NUMBERS = 1 << 22


def sparse_store(
    name: str, rows: int, width: int, stored: int, dtype: str = "float32"
) -> tuple[Store, Store, Store]:
    """A sparse store with its index and starts, in the layout that takes the fewest bytes.

    A mask takes a bit for every number, whether it is kept or not, positions some more bits than
    there are in the width for every kept one: they are cheaper below about a tenth of the numbers.

    Args:
        name: of the store; its index is ``name_index``, its starts are ``name_starts``.
        stored: how many of the ``rows`` × ``width`` numbers are kept, ≥ 1.
    """
    layouts = [_masked(name, rows, width, stored, dtype)]
    block = 1
    while block * width <= max(width, _POSITIONS_BLOCK):
        layouts.append(_positioned(name, rows, width, stored, dtype, block))
        block *= 2
    return min(layouts, key=lambda stores: sum(store.bytes for store in stores))


def _masked(
    name: str, rows: int, width: int, stored: int, dtype: str
) -> tuple[Store, Store, Store]:
    sparsity = Sparsity(
        stored, f"{name}_index", f"{name}_starts", max(1, _MASK_BLOCK // width), "mask"
    )
    index = Store(sparsity.index, rows, width, "uint1")
    return _with_starts(Store(name, rows, width, dtype, sparsity=sparsity), index)


def _positioned(
    name: str, rows: int, width: int, stored: int, dtype: str, block: int
) -> tuple[Store, Store, Store]:
    sparsity = Sparsity(stored, f"{name}_index", f"{name}_starts", block, "positions")
    bits = max(1, (min(block, rows) * width - 1).bit_length())
    index = Store(sparsity.index, stored, 1, f"uint{bits}")
    return _with_starts(Store(name, rows, width, dtype, sparsity=sparsity), index)


def _with_starts(store: Store, index: Store) -> tuple[Store, Store, Store]:
    assert store.sparsity is not None
    blocks = -(-store.rows // store.sparsity.block)
    bits = store.sparsity.stored.bit_length()
    return store, index, Store(store.sparsity.starts, blocks, 1, f"uint{bits}")


# --------------------------------------------------------------------------------------- masks


def mask_bytes(store: Store) -> int:
    """Bytes of the mask that a store has while it trains."""
    return packed_bytes(store.rows * store.width, 1)


def even_mask(store: Store, device: torch.device | str | None = None) -> Tensor:
    """A mask that keeps as many numbers in every row, give or take one, in columns that rotate."""
    assert store.sparsity is not None
    numbers, stored = store.rows * store.width, store.sparsity.stored
    mask = torch.zeros(mask_bytes(store), dtype=torch.uint8, device=device)
    if mask.device.type == "meta":
        return mask
    step, rest = divmod(numbers, stored)
    for first in range(0, stored, _CHUNK_NUMBERS):
        kept = torch.arange(first, min(first + _CHUNK_NUMBERS, stored), device=device)
        place = kept * step + kept * rest // stored  # kept * numbers // stored, below 2**63
        row = place // store.width
        place = row * store.width + (place + row) % store.width
        _set_bits(mask, place)
    return mask


def full_mask(store: Store, device: torch.device | str | None = None) -> Tensor:
    """A mask that keeps every number."""
    return torch.full((mask_bytes(store),), 255, dtype=torch.uint8, device=device)


def mask_of_largest(scores: Tensor, stored: int) -> Tensor:
    """The mask of the numbers of largest score, ties by place; NaN counts as infinite.

    Args:
        scores: (rows, width) float, such as magnitudes.
        stored: how many.
    """
    flat = torch.nan_to_num(scores.detach().reshape(-1), nan=torch.inf, posinf=torch.inf)
    mask = torch.zeros(packed_bytes(flat.numel(), 1), dtype=torch.uint8, device=flat.device)
    for kept in strongest(flat, stored).split(_CHUNK_NUMBERS):
        _set_bits(mask, kept)
    return mask


def _set_bits(mask: Tensor, places: Tensor) -> None:
    """Set distinct bits, in place, that are not set."""
    mask.index_add_(0, places // 8, (1 << places % 8).to(torch.uint8))


def read_mask(mask: Tensor, store: Store, first: int = 0, last: int | None = None) -> Tensor:
    """(last - first, width) bool: which numbers of some rows a mask keeps."""
    last = store.rows if last is None else last
    bits = unpack_codes(mask, first * store.width, last * store.width, 1)
    return bits.bool().view(-1, store.width)


def clear_pruned(latents: Tensor, mask: Tensor, store: Store) -> None:
    """Set latents to zero, in place, where the mask does not keep them.

    Lookups read them as zero whatever they are; but a weight decay would go on with them.
    """
    if latents.device.type == "meta":
        return
    for first, last in _chunks(store):
        latents[first:last].masked_fill_(~read_mask(mask, store, first, last), 0)


# -------------------------------------------------------------------------------- packed stores


def pack_sparse(plan: LookupPlan, store: Store, stores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The packed form of latents under a mask.

    Args:
        stores: tensors of the plan; that of ``store`` is (rows, width), its index a mask.

    Returns:
        By store name (stored,) of the latents' dtype, and the packed index and starts.

    Raises:
        ValueError: the mask does not keep as many numbers as the plan says.
    """
    sparsity = store.sparsity
    assert sparsity is not None
    latents, mask = stores[store.name].detach(), stores[sparsity.index]
    if mask.numel() != mask_bytes(store):
        raise ValueError(
            f"latents of store {store.name!r} need a mask of {mask_bytes(store)} bytes as "
            f"{sparsity.index!r}, got {mask.numel()}"
        )
    counts, values, positions = [], [], []
    for first, last in _chunks(store):
        kept = read_mask(mask, store, first, last)
        values.append(latents[first:last][kept])
        in_blocks = _by_block(kept, sparsity.block)
        counts.append(in_blocks.sum(1))
        if sparsity.form == "positions":
            positions.append(in_blocks.nonzero()[:, 1])
    kept_values = torch.cat(values)
    if kept_values.numel() != sparsity.stored:
        raise ValueError(
            f"the mask of store {store.name!r} keeps {kept_values.numel()} numbers, and the plan "
            f"{sparsity.stored}; finish the training of its method, or write a mask of that many"
        )
    count = torch.cat(counts)
    starts = plan.store(sparsity.starts)
    index = mask
    if sparsity.form == "positions":
        index = pack_codes(torch.cat(positions), plan.store(sparsity.index).bits)
    return {
        store.name: kept_values,
        sparsity.index: index,
        sparsity.starts: pack_codes(count.cumsum(0) - count, starts.bits),
    }


def unpack_sparse(
    plan: LookupPlan, store: Store, stores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The latents of a packed sparse store and their mask, by store name."""
    assert store.sparsity is not None
    device = stores[store.name].device
    latents, bits = [], []
    for first, last in _chunks(store):
        rows = torch.arange(first, last, device=device)
        latents.append(gather_rows(plan, store, stores, rows, sparse=False))
        bits.append(kept_numbers(plan, store, stores, rows) >= 0)
    return {
        store.name: torch.cat(latents).detach().to(stores[store.name].dtype),
        store.sparsity.index: pack_codes(torch.cat(bits).reshape(-1), 1),
    }


def _chunks(store: Store) -> Iterator[tuple[int, int]]:
    """Ranges of rows of moderate size, each of whole blocks but for the last."""
    assert store.sparsity is not None
    block = store.sparsity.block
    step = max(block, _CHUNK_NUMBERS // store.width // block * block)
    for first in range(0, store.rows, step):
        yield first, min(first + step, store.rows)


def _by_block(kept: Tensor, block: int) -> Tensor:
    """(blocks, block * width) from (rows, width) bool; rows that the last block lacks keep none."""
    missing = -len(kept) % block
    if missing:
        kept = torch.cat([kept, kept.new_zeros(missing, kept.shape[1])])
    return kept.reshape(-1, block * kept.shape[1])
