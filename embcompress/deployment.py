"""``deploy``: from what is trained to what is served."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from embcompress.latents import pack_latents
from embcompress.modules import CompressedTable

ModuleType = TypeVar("ModuleType", bound=nn.Module)


@torch.no_grad()
def deploy(module: ModuleType) -> ModuleType:
    """Replace what tables hold for training by what lookups need, in place.

    The float latents of low-precision rows become packed codes, so that exactly the bytes of each
    table's plan are resident. Lookups give what they gave before. Tables that share latents go on
    to share their codes. The state of a fused optimizer goes with the latents; scales, biases and
    heads stay parameters. Tables without latents stay as they are.

    Args:
        module: a table, a collection, or a model that contains some.

    Returns:
        The module itself.

    Raises:
        ValueError: a latent is NaN; nothing was changed.
    """
    tables = [child for child in module.modules() if isinstance(child, CompressedTable)]
    shared: dict[Tensor, Tensor] = {}  # packed form of every latent, tied ones once
    for table in tables:
        stores = table.stores()
        for name in table.latents():
            if stores[name] not in shared:
                shared[stores[name]] = pack_latents(table.plan, table.plan.store(name), stores)
    for table in tables:
        stores = table.stores()
        table.hold_packed({name: shared[stores[name]] for name in table.latents()})
        table.spec = None
    return module
