"""Quantized stores: from the float latents that are trained to packed codes, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from embcompress.engine.quantization import code_positions
from embcompress.engine.rows import gather_rows
from embcompress.layouts.packing import pack_codes
from embcompress.plan import LookupPlan, Store

_CHUNK_NUMBERS = 1 << 22


def pack_latents(plan: LookupPlan, store: Store, stores: Mapping[str, Tensor]) -> Tensor:
    """The packed form of a store's latents, exactly as a lookup reads them.

    Args:
        stores: tensors of the plan; that of ``store`` is (rows, width) float.

    Returns:
        (store.bytes,) uint8.

    Raises:
        ValueError: a latent is NaN: no code stands for it.
    """
    latents = stores[store.name].detach()
    packed = torch.empty(store.bytes, dtype=torch.uint8, device=latents.device)
    for first, last in _chunks(store):
        scale, bias = quantization_parts(plan, store, stores, slice(first, last))
        rows = _widen(latents[first:last])
        positions = code_positions(rows, scale, bias, store.bits)
        if positions.isnan().any():
            raise ValueError(
                f"store {store.name!r} holds NaN between rows {first} and {last}, which no code "
                "stands for; the training diverged: take a smaller learning rate"
            )
        part = pack_codes(positions.round().reshape(-1), store.bits)
        begin = first * store.width * store.bits // 8
        packed[begin : begin + part.numel()] = part
    return packed


def unpack_latents(plan: LookupPlan, store: Store, stores: Mapping[str, Tensor]) -> Tensor:
    """Latents that read as the codes of a packed store: their values.

    Args:
        stores: tensors of the plan; that of ``store`` is (store.bytes,) uint8.

    Returns:
        (rows, width), in at least float32.
    """
    device = stores[store.name].device
    parts = [
        gather_rows(plan, store, stores, torch.arange(first, last, device=device), sparse=False)
        for first, last in _chunks(store)
    ]
    return torch.cat(parts).detach()


def fixed_steps(plan: LookupPlan) -> frozenset[str]:
    """Names of the scales and biases that optimizers leave alone."""
    fixed = [s.quantization for s in plan.stores if s.quantization and not s.quantization.trained]
    names = [name for each in fixed for name in (each.scale, each.bias) if name is not None]
    return frozenset(names)


def quantization_parts(
    plan: LookupPlan, store: Store, stores: Mapping[str, Tensor], rows: slice | Tensor
) -> tuple[Tensor, Tensor | None]:
    """Scale and bias of some rows of a quantized store (a slice or their numbers), at least
    float32."""
    assert store.quantization is not None

    def part(name: str) -> Tensor:
        values = stores[name].detach()
        return _widen(values if plan.store(name).rows == 1 else values[rows])

    bias = store.quantization.bias
    return part(store.quantization.scale), None if bias is None else part(bias)


def _chunks(store: Store) -> Iterator[tuple[int, int]]:
    """Ranges of rows of moderate size, each of whole bytes but for the last."""
    step = max(8, _CHUNK_NUMBERS // store.width // 8 * 8)
    for first in range(0, store.rows, step):
        yield first, min(first + step, store.rows)


def _widen(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
