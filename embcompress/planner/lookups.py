"""How often each id is looked up by the batches of a data loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from embcompress.collection import EmbeddingBagCollection
from embcompress.planner.trials import Example, call_model
from embcompress.tables.compressed_table import CompressedTable
from embcompress.training.observation import observe_collection


@torch.no_grad()
def count_lookups(
    model: nn.Module, tables: Iterable[nn.Module], batches: Iterable[Example]
) -> dict[nn.Module, Tensor]:
    """Call a model, and count what its tables are asked for.

    Args:
        model: is called in evaluation mode, and left as it was.
        tables: embedding modules of it, torch's or ours.
        batches: what to call it with.

    Returns:
        (num_embeddings,) int64 for each table.
    """
    counts = {table: torch.zeros(_size(table), dtype=torch.int64) for table in tables}

    def add(table: nn.Module, ids: Tensor) -> None:
        flat = (ids.values() if ids.is_nested else ids).reshape(-1).long().cpu()
        counts[table].index_add_(0, flat, torch.ones_like(flat))

    def see_table(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        add(module, args[0] if args else kwargs["input"])

    def see_collection(module: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        ours = {table for table in counts if isinstance(table, CompressedTable)}
        for seen in observe_collection(ours, module, output, *args, **kwargs):
            add(seen.table, seen.ids)

    handles = [table.register_forward_pre_hook(see_table, with_kwargs=True) for table in counts]
    handles += [
        module.register_forward_hook(see_collection, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, EmbeddingBagCollection)
    ]
    try:
        with _evaluating(model):
            for inputs, _ in batches:
                call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def _size(table: nn.Module) -> int:
    size: Any = table.num_embeddings
    return int(size)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
