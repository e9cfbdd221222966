"""What each table tells a model, measured: how much is lost where all of its ids are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from embcompress.engine.rows import address_rows
from embcompress.methods.base import Method
from embcompress.methods.full import Full
from embcompress.methods.hash import Hashing
from embcompress.planner.lookups import count_lookups
from embcompress.planner.ranking import Ranking
from embcompress.planner.trial_data import TrialData
from embcompress.planner.trials import best_learning_rate, full_training, log_loss
from embcompress.tables.compressed_table import CompressedTable

#: Full tables are trained where they take no more bytes; else tables of hashed rows that do.
MOST_BYTES = 1 << 30
_CHUNK = 1 << 16  # ids


@dataclass(frozen=True)
class FullTables:
    """What trainings of a model with full tables show.

    Attributes:
        learning_rate: with which the model learns best.
        worths: nats an example by table name, which the model loses without the table; 0 where
            nothing is lost.
    """

    learning_rate: float
    worths: dict[str, float]


def train_full_tables(
    build: Callable[[Method, int, TrialData], nn.Module],
    dense_bytes: int,
    data: TrialData,
    end: float,
) -> FullTables | None:
    """The learning rate that a model learns best with, and what it loses without each table.

    A model of full tables is trained as long as its held-out AUC rises, with each learning rate
    (:func:`~embcompress.planner.trials.best_learning_rate`). Then one table after the other
    gives all of its ids their mean vector, as often as they occur: what a table does that is pruned
    to one row, but for what training would make up for.

    Args:
        build: makes the model with tables of a method in so many bytes.
        dense_bytes: of the full tables.
        data: what is trained on and compared by.
        end: time after which nothing more is begun (:func:`time.monotonic`).

    Returns:
        None if the time ran out in the first training.
    """
    unseen = replace(data, is_prequential=False)  # held-out examples stay so
    is_small = dense_bytes <= MOST_BYTES
    method, limit = (Full(), dense_bytes) if is_small else (Hashing(), MOST_BYTES)
    worths: dict[float, dict[str, float]] = {}

    def train(learning_rate: float) -> Ranking | None:
        worths[learning_rate] = {}

        def measure(model: nn.Module) -> None:
            worths[learning_rate] = _lost_without(model, unseen)

        return full_training(
            method,
            lambda method, _: build(method, limit, data),
            unseen,
            end,
            learning_rate=learning_rate,
            on_better=measure,
        )

    best = best_learning_rate(train)
    return None if best is None else FullTables(best[0], worths[best[0]])


@torch.no_grad()
def _lost_without(model: nn.Module, data: TrialData) -> dict[str, float]:
    whole = log_loss(model, data)
    tables = [
        module
        for module in model.modules()
        if isinstance(module, CompressedTable)
        and [store.is_float for store in module.plan.stores] == [True]
    ]
    lost: dict[str, float] = {}
    for table, counts in count_lookups(model, tables, data.validation).items():
        assert isinstance(table, CompressedTable)
        if table.table_name not in lost:  # tied modules are one table
            with _alike(table, counts):
                lost[table.table_name] = max(0.0, log_loss(model, data) - whole)
    return lost


@contextmanager
def _alike(table: CompressedTable, counts: Tensor) -> Iterator[None]:
    """The rows of a table of one store are all their mean, by how often ids occur."""
    [weight] = table.stores().values()
    ids = counts.nonzero().flatten()
    rows, _ = address_rows(table.plan.probes[0].address, ids, table.plan, {})
    mean = torch.zeros(weight.shape[1], dtype=torch.float64)
    for part, often in zip(rows.split(_CHUNK), counts[ids].split(_CHUNK), strict=True):
        mean += often.double() @ weight[part.to(weight.device)].double().cpu()
    saved = weight.clone()
    weight.copy_((mean / counts.sum().clamp(min=1)).to(weight).expand_as(weight))
    try:
        yield
    finally:
        weight.copy_(saved)
