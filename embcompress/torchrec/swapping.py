"""What :func:`embcompress.compress` does about TorchRec's collections.

Their tables are swapped as any others; then a collection whose tables are compressed is replaced
by ours, which holds them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from embcompress.collection import full_plan
from embcompress.methods import TableSpec
from embcompress.modules import Embedding, EmbeddingBag
from embcompress.plan import Pool
from embcompress.tables.compressed_table import CompressedTable
from embcompress.tables.store_tensors import dtype_name
from embcompress.torchrec.collections import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)

COLLECTIONS = (EmbeddingBagCollection, EmbeddingCollection)
_PLAIN = (nn.Embedding, nn.EmbeddingBag)


def tables_of(collection: nn.Module) -> dict[str, nn.Module]:
    """The tables of a TorchRec collection by name."""
    bags = isinstance(collection, EmbeddingBagCollection)
    tables = collection.embedding_bags if bags else collection.embeddings
    assert isinstance(tables, nn.ModuleDict)
    return dict(tables.items())


def refusals(model: nn.Module) -> dict[nn.Module, str]:
    """The tables inside TorchRec's collections that cannot be swapped, and why."""
    found = {}
    for module in model.modules():
        if isinstance(module, COLLECTIONS):
            reason = _refusal(module)
            found.update({table: reason for table in tables_of(module).values() if reason})
    return found


def _refusal(collection: nn.Module) -> str:
    if type(collection) not in COLLECTIONS:
        return f"inside a {type(collection).__name__}, which may compute something else"
    if collection._forward_hooks or collection._forward_pre_hooks:
        return "its collection has hooks"
    for name, table in tables_of(collection).items():
        changed = table._forward_hooks or table._forward_pre_hooks
        if changed or parametrize.is_parametrized(table) or type(table) not in _PLAIN:
            return f"table {name!r} of its collection is not as TorchRec made it"
    return ""


def compressed_collections(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Ours for every collection of TorchRec's with a compressed table."""
    return {
        module: _compressed(module)
        for module in model.modules()
        if type(module) in COLLECTIONS
        and any(isinstance(table, CompressedTable) for table in tables_of(module).values())
    }


def _compressed(collection: nn.Module) -> nn.Module:
    new: nn.Module
    tables = {name: _as_table(table, name) for name, table in tables_of(collection).items()}
    configs = _configs(collection)
    for config in configs:
        if next(tables[config.name].parameters()).device.type == "meta":
            # What TorchRec would have drawn: uniform numbers between these.
            width = config.get_weight_init_max() - config.get_weight_init_min()
            tables[config.name].start_deviation = width / 12**0.5
    if isinstance(collection, EmbeddingBagCollection):
        weighted = collection.is_weighted()
        bags = {name: each for name, each in tables.items() if isinstance(each, EmbeddingBag)}
        new = CompressedEmbeddingBagCollection(configs, bags, weighted)
    else:
        assert isinstance(collection, EmbeddingCollection)
        rows = {name: each for name, each in tables.items() if isinstance(each, Embedding)}
        new = CompressedEmbeddingCollection(configs, rows, collection.need_indices())
    return new.train(collection.training)


def _configs(collection: nn.Module) -> list[Any]:
    if isinstance(collection, EmbeddingBagCollection):
        return list(collection.embedding_bag_configs())
    assert isinstance(collection, EmbeddingCollection)
    return list(collection.embedding_configs())


def _as_table(module: nn.Module, name: str) -> CompressedTable:
    """The table itself, or one of ours that holds the weight of a table that was left full."""
    if isinstance(module, CompressedTable):
        return module
    weight = module.weight
    assert isinstance(module, _PLAIN) and isinstance(weight, Tensor)
    rows, width = weight.shape
    plan = full_plan(TableSpec(rows, width, name, dtype=dtype_name(weight.dtype)))
    table: CompressedTable
    if isinstance(module, nn.EmbeddingBag):
        pool: Pool = "mean" if module.mode == "mean" else "sum"
        table = EmbeddingBag.from_plan(
            plan.with_pool(pool), "full", include_last_offset=True, device="meta"
        )
    else:
        table = Embedding.from_plan(plan, "full", device="meta")
    table.weight = module.weight  # the parameter itself, so that what it is tied to stays so
    return table
