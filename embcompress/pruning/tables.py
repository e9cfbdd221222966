"""``prune_()`` and ``restore_()``: cut the vocabulary of a trained table, and put it back."""

from __future__ import annotations

import torch
from torch import Tensor

from embcompress.importance import strongest
from embcompress.layouts.pruned import CODES, WEIGHT, PrunedLayout
from embcompress.methods import TableSpec
from embcompress.methods.full import Full
from embcompress.methods.pruned import Pruned
from embcompress.plan import LookupPlan
from embcompress.pruning.ids import check_unique_ids
from embcompress.tables.compressed_table import CompressedTable
from embcompress.training.optimizer_state import Optimizers, as_optimizers, replace_rows

_CHUNK = 1 << 16


def prune_(
    table: CompressedTable,
    keep: int | Tensor,
    *,
    counts: Tensor | None = None,
    method: Pruned | None = None,
    fallback: Tensor | None = None,
    optimizer: Optimizers = None,
    seed: int = 0,
    name: str = "",
) -> Tensor:
    """Prune the vocabulary of a table, in place.

    The kept ids' vectors and optimizer state stay what they are, bit for bit. A table that is
    pruned already can be pruned further: its fallback rows stay, and the ids that are pruned now
    come to read them. The parameter is a new one: it takes the place of the old one in the
    optimizers that are given. Tables that were tied to this one keep the old parameter.

    Args:
        table: an ``Embedding`` or ``EmbeddingBag`` of method ``"full"`` or ``"pruned"``.
        keep: the ids to keep, (K,) distinct, integers; or how many: the ids with the largest
            counts (ties by id), or without counts those whose vectors are farthest from the
            table's mean vector.
        counts: (num_embeddings,) how often each id occurs, or how important it is.
        method: settings of the table from now on (default: ``Pruned()``); its ``fallback`` says
            how many rows the pruned ids share (a table that is pruned already keeps its own).
        fallback: (fallback rows, embedding_dim) their start values; default: the means of the
            vectors that will read them, weighted by counts.
        optimizer: the torch optimizers that train the table; fused ones are found.
        seed, name: the hash keys of several fallback rows are derived from them.

    Returns:
        (K,) int64 the ids that are kept, in the order of their rows.

    Raises:
        ValueError: a table of another method; ids that are not distinct or not kept before; a
            number outside [1, ids]; a wrong shape.
        IndexError: an id outside the vocabulary.

    Example::

        >>> import torch, embcompress as ec
        >>> table = ec.Embedding(1000, 8)
        >>> before = table.to_dense()
        >>> kept = ec.prune_(table, 100, counts=torch.arange(1000))
        >>> torch.equal(table(kept), before[kept]), ec.memory(table).total
        (True, 4107)
        >>> ec.restore_(table, before)
        >>> torch.equal(table.weight, before)
        True
    """
    weight, plan = _weight(table), table.plan
    method = Pruned() if method is None else method
    spec = TableSpec(
        table.num_embeddings, table.embedding_dim, name, seed, plan.stores[0].dtype, counts
    )
    layout = None if plan.is_dense else _layout(plan)
    kept = _choose(keep, spec, table, layout)
    if layout is None:
        new = method.layout(spec, kept.numel())
        rows = kept
        if fallback is None:
            fallback = new.mean_fallback(weight, kept, counts)
        sources = torch.cat([rows.new_full((new.shared,), -1), rows])
    else:
        shared = layout.shared
        new = PrunedLayout(spec.num_embeddings, spec.embedding_dim, kept.numel(), layout.fallback)
        rows = layout.owned_rows(table.get_buffer(CODES))[kept]
        if fallback is None:
            fallback = weight[:shared]
        sources = torch.cat([torch.arange(shared, device=rows.device), rows])
    shape = (new.shared, spec.embedding_dim)
    if tuple(fallback.shape) != shape:
        raise ValueError(f"fallback must have shape {shape}, got {tuple(fallback.shape)}")
    stores = {WEIGHT: torch.cat([fallback.to(weight), weight[rows]]), CODES: new.codes(kept)}
    new_plan = new.plan(spec.dtype).with_pool(plan.pool, plan.padding_idx)
    replace_rows(table, new_plan, stores, {WEIGHT: sources}, as_optimizers(optimizer))
    table.set_method(method)
    return kept


@torch.no_grad()
def restore_(
    table: CompressedTable, values: Tensor | None = None, *, optimizer: Optimizers = None
) -> None:
    """Give every id of a pruned table a row of its own again, in place.

    Kept ids keep their vectors and optimizer state, bit for bit. The parameter is a new one, as
    in :func:`prune_`, and the table's method is ``"full"``.

    Args:
        table: of method ``"pruned"``.
        values: (num_embeddings, embedding_dim) the vectors of the pruned ids (those of kept ids
            are not read; a memory-mapped tensor is read in chunks); default: their fallback rows.
        optimizer: the torch optimizers that train the table; pruned ids' state starts fresh.

    Raises:
        ValueError: a table of another method, or values of a wrong shape.
    """
    weight, layout = _weight(table), _layout(table.plan)
    shape = (layout.num_embeddings, layout.embedding_dim)
    if values is not None and tuple(values.shape) != shape:
        raise ValueError(f"values must have shape {shape}, got {tuple(values.shape)}")
    restored = weight.new_empty(shape)
    sources = layout.owned_rows(table.get_buffer(CODES))
    for start in range(0, layout.num_embeddings, _CHUNK):
        rows = sources[start : start + _CHUNK]
        ids = torch.arange(start, start + rows.numel(), device=rows.device)
        chunk = weight[torch.where(rows < 0, layout.fallback_rows(ids), rows)]
        if values is not None:
            given = values[start : start + _CHUNK].to(weight)
            chunk = torch.where((rows < 0)[:, None], given, chunk)
        restored[start : start + _CHUNK] = chunk
    spec = TableSpec(*shape, dtype=table.plan.stores[0].dtype)
    plan = Full().plan(spec, shape[0]).with_pool(table.plan.pool, table.padding_idx)
    replace_rows(table, plan, {WEIGHT: restored}, {WEIGHT: sources}, as_optimizers(optimizer))
    table.set_method(Full())


def _weight(table: CompressedTable) -> Tensor:
    if not isinstance(table, CompressedTable):
        raise TypeError(
            f"table must be an ec.Embedding or ec.EmbeddingBag, got {type(table).__name__}; see "
            "ec.prune_vocabulary for models with nn.Embedding"
        )
    if table.options.max_norm is not None or table.options.scale_grad_by_freq:
        raise ValueError("tables with max_norm or scale_grad_by_freq cannot be pruned")
    if not table.plan.is_dense:
        _layout(table.plan)
    elif table.plan.stores[0].name != WEIGHT:
        raise ValueError(f"the store of rows must be named {WEIGHT!r}: {table.plan}")
    return table.get_parameter(WEIGHT).detach()


def _layout(plan: LookupPlan) -> PrunedLayout:
    message = f"only tables of method 'full' can be pruned and those of 'pruned' restored: {plan}"
    try:
        layout = PrunedLayout.of(plan)
    except ValueError:
        raise ValueError(message) from None
    if layout.fallback is None:
        raise ValueError(message)
    return layout


def _choose(
    keep: int | Tensor, spec: TableSpec, table: CompressedTable, layout: PrunedLayout | None
) -> Tensor:
    """The ids to keep, on the table's device."""
    device = _weight(table).device
    before = None
    if layout is not None:
        before = layout.owned_rows(table.get_buffer(CODES)) >= 0
    if isinstance(keep, Tensor):
        ids = check_unique_ids(keep, spec.num_embeddings, "keep").to(device)
        if before is not None and not bool(before[ids].all()):
            lost = int(ids[~before[ids]][0])
            raise ValueError(f"keep has id {lost}, which was pruned before; restore_ the table")
        return ids
    most = spec.num_embeddings if layout is None else layout.kept
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= most:
        raise ValueError(f"keep must be ids, or a number of them in [1, {most}], got {keep!r}")
    values = spec.counts
    if values is None:
        values = _distances(table)
    values = torch.nan_to_num(values.to(device).double(), nan=torch.inf)
    if table.padding_idx is not None:
        values[table.padding_idx] = -1
    if before is not None:
        values = values.masked_fill(~before, -torch.inf)
    return strongest(values, keep)


def _distances(table: CompressedTable) -> Tensor:
    """(num_embeddings,) squared distance of each id's vector to the mean vector."""
    dense = table.to_dense()
    return (dense.float() - dense.float().mean(0)).square().sum(1)
