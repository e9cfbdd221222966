"""What the batches of a data loader ask the tables of a model for: counts, and company."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from embcompress.approximation.co_occurrence import CoOccurrence, Occurrences, add_company
from embcompress.collection import EmbeddingBagCollection
from embcompress.engine import make_bags
from embcompress.planner.progress import Show, silent
from embcompress.planner.trial_data import Example
from embcompress.planner.trials import call_model
from embcompress.tables.compressed_table import CompressedTable
from embcompress.training.observation import observe_collection

#: Pairs of ids that are looked at for company, at most, which takes seconds.
_MOST_PAIRS = 1 << 24


@dataclass(frozen=True)
class Lookup:
    """What one call asks a table for.

    Attributes:
        table: the module.
        ids: (N,) int64.
        lengths: (rows,) int64 ids of each bag, or of each row of an input without bags.
    """

    table: nn.Module
    ids: Tensor
    lengths: Tensor

    def rows(self) -> Tensor:
        """(N,) int64 the bag of each id."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)


def read_lookups(
    model: nn.Module,
    tables: Iterable[nn.Module],
    batches: Sequence[Example],
    show: Show = silent,
) -> Iterator[list[Lookup]]:
    """Call a model with one batch after the other, and see what its tables are asked for.

    Args:
        model: is called in evaluation mode, and left as it was.
        tables: embedding modules of it, torch's or ours.
        batches: what to call it with.
        show: is told which batch it is.
    """
    tables = set(tables)
    ours = {table for table in tables if isinstance(table, CompressedTable)}
    seen: list[Lookup] = []

    def see_table(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_lookup(module, *args, **kwargs))

    def see_collection(module: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        for each in observe_collection(ours, module, output, *args, **kwargs):
            seen.append(Lookup(each.table, _plain(each.ids), _plain(each.bags.offsets).diff()))

    handles = [table.register_forward_pre_hook(see_table, with_kwargs=True) for table in tables]
    handles += [
        module.register_forward_hook(see_collection, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, EmbeddingBagCollection)
    ]
    try:
        with _evaluating(model):
            for number, (inputs, _) in enumerate(batches, 1):
                show(f"ids of batch {number:,} of {len(batches):,}")
                with torch.no_grad():
                    call_model(model, inputs)
                yield list(seen)
                seen.clear()
    finally:
        for handle in handles:
            handle.remove()


def count_lookups(
    model: nn.Module,
    tables: Iterable[nn.Module],
    batches: Sequence[Example],
    show: Show = silent,
) -> dict[nn.Module, Tensor]:
    """How often each id is looked up (:func:`read_lookups`).

    Returns:
        (num_embeddings,) int64 for each table.
    """
    tables = list(tables)
    counts = {table: torch.zeros(_size(table), dtype=torch.int64) for table in tables}
    for seen in read_lookups(model, tables, batches, show):
        for each in seen:
            counts[each.table].index_add_(0, each.ids, torch.ones_like(each.ids))
    return counts


def sample_company(
    model: nn.Module,
    features: Mapping[nn.Module, str],
    samples: Mapping[str, CoOccurrence],
    batches: Sequence[Example],
    show: Show = silent,
) -> None:
    """Take note of what ids occur with: those that other tables are asked for by the same example.

    A call whose bags are not the examples of the batch, one for one, says nothing of that.

    Args:
        model: is called in evaluation mode, and left as it was.
        features: names of all embedding modules, whose ids are company.
        samples: what to add to, by these names.
        batches: as many of them are used as have :data:`_MOST_PAIRS` pairs, evenly spread.
        show: is told which batch it is.
    """
    [first] = read_lookups(model, features, batches[:1])
    pairs = _count_pairs(_occurrences(first, features, batches[0]), samples)
    chosen = batches[:: max(1, -(-pairs * len(batches) // _MOST_PAIRS))]
    for batch, seen in zip(chosen, read_lookups(model, features, chosen, show), strict=True):
        add_company(samples, _occurrences(seen, features, batch))


def _occurrences(
    seen: Iterable[Lookup], features: Mapping[nn.Module, str], batch: Example
) -> list[Occurrences]:
    found = []
    for each in seen:
        if len(each.lengths) != batch[1].numel():
            continue
        padding_idx: Any = getattr(each.table, "padding_idx", None)
        counted = each.ids != (-1 if padding_idx is None else padding_idx)
        ids, rows = each.ids[counted], each.rows()[counted]
        found.append(Occurrences(features[each.table], ids, rows))
    return found


def _count_pairs(batch: Sequence[Occurrences], samples: Mapping[str, CoOccurrence]) -> int:
    """About how many pairs a batch has, if all its examples are alike."""
    examples = max((int(each.rows[-1]) + 1 for each in batch if len(each.rows)), default=1)
    total = sum(len(each.ids) for each in batch)
    own = [len(each.ids) for each in batch if each.feature in samples]
    return sum(count * (total - count) for count in own) // examples


def _lookup(
    module: nn.Module,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Lookup:
    """The arguments of a call of ``Embedding`` or ``EmbeddingBag``, torch's or ours."""
    last: Any = getattr(module, "include_last_offset", None)
    if last is None and not input.is_nested:
        rows = input.shape[0] if input.dim() else 1
        return Lookup(
            module, _plain(input.reshape(-1)), torch.full((rows,), input.numel() // max(rows, 1))
        )
    bags = make_bags(input, offsets, None, include_last_offset=bool(last)).complete()
    return Lookup(module, _plain(bags.ids), _plain(bags.offsets).diff())


def _plain(values: Tensor) -> Tensor:
    return values.detach().long().cpu()


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
