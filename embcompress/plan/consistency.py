"""Whether the parts of a plan agree with each other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from embcompress.plan.addresses import Address, Code, Slot
from embcompress.plan.errors import require
from embcompress.plan.heads import Linear, Network, TensorTrain
from embcompress.plan.probes import Probe, Weight
from embcompress.plan.stores import INT64_END, Store

if TYPE_CHECKING:
    from embcompress.plan.lookup_plan import LookupPlan

Combine: TypeAlias = Literal["sum", "mul", "concat"]
Pool: TypeAlias = Literal["none", "sum", "mean", "max"]


def check_plan(plan: LookupPlan) -> None:
    """Raise :class:`PlanError` where a plan contradicts itself."""
    require(plan.num_embeddings >= 1 and plan.embedding_dim >= 1, "an empty table")
    require(plan.num_embeddings < INT64_END, "num_embeddings must be below 2**63")
    require(plan.combine in get_args(Combine), f"unknown combine {plan.combine!r}")
    require(plan.pool in get_args(Pool), f"unknown pool {plan.pool!r}")
    require(
        (len(plan.probes) == 0) == (plan.inputs is not None),
        "a plan needs at least one probe, or hash features instead of probes",
    )
    names = [store.name for store in plan.stores]
    require(len(set(names)) == len(names), f"store names are not unique: {names}")
    if plan.padding_idx is not None:
        require(0 <= plan.padding_idx < plan.num_embeddings, f"padding_idx {plan.padding_idx}")
    for store in plan.stores:
        _check_quantization(plan, store)
        _check_sparsity(plan, store)
        _check_threshold(plan, store)
    for probe in plan.probes:
        _check_probe(plan, probe)
    _check_widths(plan)


def _check_quantization(plan: LookupPlan, store: Store) -> None:
    if store.quantization is None:
        return
    scale = plan.store(store.quantization.scale)
    parts = [scale]
    if store.quantization.bias is not None:
        parts.append(plan.store(store.quantization.bias))
    for part in parts:
        _check_dense(plan, part, f"scale or bias of {store.name!r}")
        require(
            part.is_float
            and part.rows in (1, store.rows)
            and part.width in (1, store.width)
            and (part.rows, part.width) == (scale.rows, scale.width),
            f"store {part.name!r} does not broadcast over the rows of {store.name!r}",
        )


def _check_sparsity(plan: LookupPlan, store: Store) -> None:
    sparsity = store.sparsity
    if sparsity is None:
        return
    index, starts = plan.store(sparsity.index), plan.store(sparsity.starts)
    blocks = -(-store.rows // sparsity.block)
    for part in (index, starts):
        require(
            not part.is_float and part.quantization is None,
            f"store {part.name!r} tells of the numbers of {store.name!r} and is not unsigned",
        )
    if sparsity.form == "mask":
        fits = (index.rows, index.width, index.bits) == (store.rows, store.width, 1)
    else:
        last = min(sparsity.block, store.rows) * store.width - 1
        fits = (index.rows, index.width) == (sparsity.stored, 1) and last < 2**index.bits
    require(fits, f"store {index.name!r} is no {sparsity.form} of the rows of {store.name!r}")
    require(
        (starts.rows, starts.width) == (blocks, 1) and sparsity.stored < 2**starts.bits,
        f"store {starts.name!r} does not say where {blocks} blocks of {store.name!r} begin",
    )


def _check_threshold(plan: LookupPlan, store: Store) -> None:
    if store.threshold is None:
        return
    part = plan.store(store.threshold)
    _check_dense(plan, part, f"threshold of {store.name!r}")
    require(
        part.is_float and part.rows in (1, store.rows) and part.width in (1, store.width),
        f"store {part.name!r} does not broadcast over the rows of {store.name!r}",
    )


def _check_dense(plan: LookupPlan, store: Store, what: str) -> None:
    require(
        store.sparsity is None and store.stride is None and store.threshold is None,
        f"{what} is {store.name!r}, which is sparse or of rows that overlap",
    )
    require(not store.is_in_file, f"{what} is {store.name!r}, which is in a file")


def _check_address(plan: LookupPlan, address: Address, rows: int, what: str) -> None:
    require(address.size <= rows, f"{what} reaches row {address.size - 1} of {rows}")
    if isinstance(address, Code):
        codes = plan.store(address.store)
        require(
            not codes.is_float and codes.quantization is None and address.column < codes.width,
            f"{what} reads codes from {codes.name!r}, column {address.column}",
        )
        # Where absent ids have codes in another table, these few bits may be enough here.
        require(
            address.first + address.size < 2**codes.bits
            or isinstance(address.otherwise, Code | Slot),
            f"{what}: {codes.bits} bits cannot hold {address.first + address.size} codes "
            "and 'absent'",
        )
        _check_address(plan, address.row, codes.rows, f"row of {what}")
    if isinstance(address, Slot):
        slots = plan.store(address.store)
        require(
            not slots.is_float and slots.quantization is None,
            f"{what} reads slots from {slots.name!r}",
        )
        require(
            address.tag.size < 2**slots.bits,
            f"{what}: {slots.bits} bits cannot hold {address.tag.size} tags and 'empty'",
        )
        _check_address(plan, address.bucket, slots.rows, f"bucket of {what}")
    if isinstance(address, Code | Slot) and address.otherwise is not None:
        _check_address(plan, address.otherwise, rows, f"otherwise of {what}")


def _check_probe(plan: LookupPlan, probe: Probe) -> None:
    store = plan.store(probe.store)
    what = f"probe of {store.name!r}"
    require(store.is_float or store.quantization is not None, f"{what} reads codes as if values")
    require(probe.offset >= 0, f"{what}: negative offset")
    require(
        probe.column is None or (plan.combine == "sum" and probe.column >= 0),
        f"{what} begins at column {probe.column}; only those of a sum may, at 0 or later",
    )
    _check_address(plan, probe.address, store.rows - probe.offset, what)
    if isinstance(probe.scale, Weight):
        weights = plan.store(probe.scale.store)
        _check_dense(plan, weights, f"scale of {what}")
        require(
            weights.is_float and probe.scale.column < weights.width,
            f"{what} takes its scale from column {probe.scale.column} of {weights.name!r}",
        )
        _check_address(plan, probe.scale.address, weights.rows, f"scale of {what}")


def _check_widths(plan: LookupPlan) -> None:
    widths = {plan.store(probe.store).width for probe in plan.probes}
    are_placed = any(probe.column is not None for probe in plan.probes)
    require(
        plan.combine == "concat" or are_placed or len(widths) <= 1,
        f"combine={plan.combine!r} needs rows of one width, got {sorted(widths)}",
    )
    filled = 0
    for probe, (begin, end) in zip(plan.probes, plan.columns, strict=True):
        require(
            begin <= filled,
            f"probe of {probe.store!r} begins at column {begin}, those before it end at "
            f"{filled}: no column may be left out",
        )
        filled = max(filled, end)
    if plan.head is None:
        require(
            plan.width == plan.embedding_dim,
            f"the probes give width {plan.width}, not embedding_dim {plan.embedding_dim}",
        )
    elif isinstance(plan.head, Linear):
        _check_weights(plan, plan.head.weight, plan.embedding_dim, plan.width)
    elif isinstance(plan.head, TensorTrain):
        require(
            (sum(plan.head.sizes), math.prod(plan.head.widths)) == (plan.width, plan.embedding_dim),
            f"the head maps width {sum(plan.head.sizes)} to {math.prod(plan.head.widths)}, "
            f"not {plan.width} to {plan.embedding_dim}",
        )
    else:
        _check_network(plan, plan.head)


def _check_network(plan: LookupPlan, network: Network) -> None:
    gathered = {probe.store for probe in plan.probes}
    gathered |= {p.scale.store for p in plan.probes if isinstance(p.scale, Weight)}
    require(
        len({*network.stores}) == len(network.stores) and not gathered & {*network.stores},
        "a store of the network is used twice, or gathered too",
    )
    width = plan.width
    for number, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True), 1):
        is_last = number == len(network.weights)
        outputs = plan.embedding_dim if is_last else plan.store(weight).rows
        _check_weights(plan, weight, outputs, width)
        _check_weights(plan, bias, 1, outputs)
        width = outputs


def _check_weights(plan: LookupPlan, name: str, rows: int, width: int) -> None:
    """A store of the head's weights."""
    store = plan.store(name)
    _check_dense(plan, store, "the head's weight")
    require(
        store.is_float and (store.rows, store.width) == (rows, width),
        f"the head's weight {name!r} is {store.rows} × {store.width}, not {rows} × {width}",
    )
