"""Start values: the assembled vectors get the variance that a full table would have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from embcompress.head_initialization import draw_core, draw_layer
from embcompress.layouts.sparse import clear_pruned
from embcompress.plan import Linear, LookupPlan, Network, Probe, Slot, Store, TensorTrain, Weight


def store_deviation(plan: LookupPlan, std: float) -> float:
    """Standard deviation of a probe's rows that gives the combined vector deviation ``std``.

    For independent rows of mean 0 the variances of T probes of a column add up in a sum and
    multiply in a product; a linear head of w columns with entries of variance 1/w keeps the
    variance.
    """
    if plan.combine == "mul":
        return std ** (1 / len(plan.probes))
    return std / _most_terms(plan) ** 0.5


def _most_terms(plan: LookupPlan) -> int:
    """How many probes add to one column of an id's vector, at most."""
    columns = [
        columns
        for probe, columns in zip(plan.probes, plan.columns, strict=True)
        if not any(_excludes(other, probe) for other in plan.probes)
    ]
    begins = {begin for begin, _ in columns}
    return max(sum(begin <= at < end for begin, end in columns) for at in begins)


def _excludes(one: Probe, other: Probe) -> bool:
    """Whether the second adds nothing but to vectors to which the first, by slots, adds nothing."""
    if not (isinstance(one.address, Slot) and isinstance(other.address, Slot)):
        return False
    first, second = one.address, other.address
    same_slots = (first.store, first.bucket, first.tag) == (
        second.store,
        second.bucket,
        second.tag,
    )
    is_for_present = first.otherwise is None and first.first < first.size
    return same_slots and is_for_present and second.first >= second.size


#: Step of the uniform quantizer that reads normal numbers of deviation 1 with the least squared
#: error, by bits (Max, "Quantizing for minimum distortion", 1960, table II). Steps of 16 bits
#: are not trained: they leave room up to 64 deviations, and are still fine.
_NORMAL_STEPS = {1: 1.5956, 2: 0.9957, 4: 0.3352, 8: 0.03076, 16: 128 / 2**16}


#: A threshold whose sigmoid is nothing beside the numbers of a table.
_NO_THRESHOLD = -15.0


@torch.no_grad()
def initialize_stores(plan: LookupPlan, stores: Mapping[str, Tensor], std: float = 1.0) -> None:
    """Fill the value stores from torch's global generator; tables of codes stay as they are.

    A quantized store gets steps whose codes cover its latents, or, where it is packed, codes
    drawn evenly. The numbers that a sparse store keeps vary the more, the fewer they are, so that
    all its numbers have the deviation.
    """
    if not std > 0:
        raise ValueError(f"std must be positive, got {std}")
    thresholds = {store.threshold for store in plan.stores}
    learned_scales = {p.scale.store for p in plan.probes if isinstance(p.scale, Weight)}
    for store in plan.stores:
        if not store.is_float:
            continue
        if store.name in learned_scales:
            stores[store.name].fill_(1.0)
        elif store.name in thresholds:
            stores[store.name].fill_(_NO_THRESHOLD)
        else:
            _draw(plan, store, stores[store.name], std)
        if store.sparsity is not None and stores[store.name].dim() == 2:
            clear_pruned(stores[store.name], stores[store.sparsity.index], store)
    for store in plan.stores:
        if store.quantization is not None:
            _initialize_quantized(store, stores, store_deviation(plan, std))


def _initialize_quantized(store: Store, stores: Mapping[str, Tensor], std: float) -> None:
    assert store.quantization is not None
    tensor, last = stores[store.name], 2**store.bits - 1
    if tensor.is_floating_point():
        tensor.normal_(0.0, std)
        step = std * _NORMAL_STEPS[store.bits]
    else:
        tensor.random_(0, 256)
        step = std / ((4**store.bits - 1) / 12) ** 0.5  # even codes have this variance
    stores[store.quantization.scale].fill_(step)
    if store.quantization.bias is not None:
        stores[store.quantization.bias].fill_(-step * last / 2)


def _draw(plan: LookupPlan, store: Store, tensor: Tensor, std: float) -> None:
    """Start values of a float store that is no learned scale."""
    head = plan.head
    if isinstance(head, TensorTrain):
        draw_core(head, tensor, std)
    elif isinstance(head, Network) and store.name in head.stores:
        draw_layer(head, store, tensor, std)
    elif isinstance(head, Linear) and store.name == head.weight:
        tensor.normal_(0.0, plan.width**-0.5)
    else:
        kept = 1.0
        if store.sparsity is not None:
            kept = store.sparsity.stored / (store.rows * store.width)
        # A network makes vectors of this deviation from numbers of deviation 1.
        deviation = store_deviation(plan, 1.0 if isinstance(head, Network) else std)
        tensor.normal_(0.0, deviation / kept**0.5)
