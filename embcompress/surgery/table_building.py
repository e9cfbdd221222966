"""New modules in place of a model's tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from embcompress.methods import Method, TableSpec
from embcompress.methods.full import Full
from embcompress.modules import Embedding, EmbeddingBag
from embcompress.plan import LookupPlan, Pool
from embcompress.surgery.table_finding import TABLES, Candidate, torchrec_swapping
from embcompress.tables.compressed_table import CompressedTable, tie_shared_stores

#: Deviation of the start values where the table's own is zero or unknown.
_FALLBACK_STD = 0.01


@dataclass(frozen=True)
class Table:
    """A table that is to be swapped.

    Attributes:
        candidate: the modules that hold it.
        method: what for.
        spec: its shape and what is known of its ids.
    """

    candidate: Candidate
    method: Method
    spec: TableSpec


def build_modules(
    table: Table, plan: LookupPlan, keep_weights: bool = False
) -> dict[nn.Module, nn.Module]:
    """New modules for those that hold a table; tied ones share their stores."""
    candidate, method = table.candidate, table.method
    if plan.is_dense and not method.searches_plans:
        method = Full()  # the table is better left full
    first: CompressedTable | None = None
    built: dict[nn.Module, nn.Module] = {}
    for module in candidate.modules:
        new = _like(module, plan, method, "meta" if first else candidate.weight.device)
        if first is None:
            new.reset_parameters(_start_deviation(candidate.weight))
            method.fill(table.spec, plan, new.stores())
            if keep_weights:
                new.load_stores(method.fit(table.spec, plan, candidate.weight.detach()))
            first = new
        else:
            for name, tensor in first.stores().items():
                setattr(new, name, tensor)
        new.keep_spec(table.spec)
        new.train(module.training)
        built[module] = new
    return built


def _like(
    module: nn.Module, plan: LookupPlan, method: Method, device: torch.device | str
) -> CompressedTable:
    """A compressed module with the torch arguments of ``module``."""
    assert isinstance(module, TABLES)
    padding_idx, sparse = module.padding_idx, module.sparse
    if isinstance(module, (nn.EmbeddingBag, EmbeddingBag)):
        pooled = plan.with_pool(cast(Pool, module.mode), padding_idx)
        last = module.include_last_offset
        return EmbeddingBag.from_plan(
            pooled, method, sparse=sparse, include_last_offset=last, device=device
        )
    return Embedding.from_plan(
        plan.with_pool("none", padding_idx), method, sparse=sparse, device=device
    )


def swap_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, wherever in the model these are."""
    for parent in list(model.modules()):
        # Not named_children(): it names a module once, however many names lead to it.
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


def put_in_place(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Swap tables of a model for new ones, and TorchRec's collections that hold any for ours."""
    tie_shared_stores(new for new in replacements.values() if isinstance(new, CompressedTable))
    swap_modules(model, replacements)
    if (torchrec := torchrec_swapping()) is not None:
        swap_modules(model, torchrec.compressed_collections(model))


def _start_deviation(weight: Tensor) -> float:
    if weight.device.type == "meta":
        return 1.0
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // 1_000_000)].double()
    std = float(sample.std(correction=0))
    return std if 0 < std < float("inf") else _FALLBACK_STD
