"""``deploy``: from what is trained to what is served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from embcompress.layouts.latents import pack_latents
from embcompress.layouts.sparse import pack_sparse
from embcompress.plan import LookupPlan, Store
from embcompress.tables.compressed_table import CompressedTable

ModuleType = TypeVar("ModuleType", bound=nn.Module)


@torch.no_grad()
def deploy(module: ModuleType) -> ModuleType:
    """Replace what tables hold for training by what lookups need, in place.

    The float latents of low-precision rows become packed codes, those of sparse rows the numbers
    that are kept, so that exactly the bytes of each table's plan are resident. Lookups give what
    they gave before. Tables that share latents go on to share their packed form. The state of a
    fused optimizer goes with the latents; scales, biases and heads stay parameters. Tables without
    latents stay as they are.

    Args:
        module: a table, a collection, or a model that contains some.

    Returns:
        The module itself.

    Raises:
        ValueError: a latent of low-precision rows is NaN, or the mask of sparse rows keeps more or
            fewer numbers than the plan says; nothing was changed.
    """
    tables = [child for child in module.modules() if isinstance(child, CompressedTable)]
    shared: dict[Tensor, dict[str, Tensor]] = {}  # packed form of every latent, tied ones once
    for table in tables:
        stores = table.stores()
        for name in table.latents():
            if stores[name] not in shared:
                shared[stores[name]] = _packed(table.plan, table.plan.store(name), stores)
    for table in tables:
        stores = table.stores()
        packed: dict[str, Tensor] = {}
        for name in table.latents():
            packed |= shared[stores[name]]
        table.hold_packed(packed)
        table.spec = None
    return module


def _packed(plan: LookupPlan, store: Store, stores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The packed form of a store's latents, by the names of the stores that hold it."""
    if store.sparsity is not None:
        return pack_sparse(plan, store, stores)
    return {store.name: pack_latents(plan, store, stores)}
