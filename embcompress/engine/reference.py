"""The judge: a slow, obvious, pure-torch reading of a plan.

Every kernel is tested against this file, and it runs everything where no kernel is built. It is
differentiable by autograd, works in float64, and is written without any of the kernels' code; as
are ``hashing.py`` and ``rows.py``, by which it finds and reads rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from embcompress.engine.bags import Bags
from embcompress.engine.hashing import hash_features, mix64, shift_right, signed
from embcompress.engine.heads import apply_head, is_linear
from embcompress.engine.rows import Stores, address_rows, gather, gather_rows, widen
from embcompress.plan import LookupPlan, Probe, Sign, Weight


def _probe_vectors(
    plan: LookupPlan, stores: Stores, probe: Probe, ids: Tensor, sparse: bool
) -> Tensor:
    rows, present = address_rows(probe.address, ids, plan, stores)
    vectors = _present_rows(plan, stores, probe, probe.offset + rows, present, sparse)
    if isinstance(probe.scale, Sign):
        sign_bit = shift_right(mix64(ids ^ signed(probe.scale.key)), 63)
        vectors = vectors * (1 - 2 * sign_bit)[:, None].to(vectors.dtype)
    elif isinstance(probe.scale, Weight):
        weights = stores[probe.scale.store]
        weight_rows, has_weight = address_rows(probe.scale.address, ids, plan, stores)
        weight = gather(weights, weight_rows, sparse)[:, probe.scale.column]
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
        stores = {name: widen(t) if t.requires_grad else t for name, t in stores.items()}
    vectors = combined_vectors(plan, stores, bags.ids, sparse)
    if plan.pool in ("none", "max") or not is_linear(plan.head):  # the head comes first
        vectors = vectors_after_head(plan, stores, bags.ids, vectors)
        vectors = vectors if plan.pool == "none" else pool_bags(plan, vectors, bags)
    else:
        vectors = apply_head(plan, stores, pool_bags(plan, vectors, bags))
    return vectors.to(dtype)
