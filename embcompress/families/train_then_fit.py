"""Two phases of methods that compress a trained table: the full table, then its fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embcompress.methods.base import Method
from embcompress.methods.full import Full
from embcompress.procedures.phases import Phase, PhasedTable, TableForm

TRAIN, GO_ON = "train", "go_on"


def train_then_fit(epochs: int) -> tuple[Phase, ...]:
    """The phases, the first of so many epochs."""
    return Phase(TRAIN, epochs), Phase(GO_ON)


def form_of(method: Method, phase: Phase, tables: Sequence[PhasedTable]) -> list[TableForm]:
    """What tables become: full ones, then the method's :meth:`~embcompress.Method.fit` of these."""
    forms = []
    for table in tables:
        if phase.name == TRAIN:
            plan = Full().plan(table.spec, table.spec.num_embeddings)
            forms.append(TableForm(plan, table.new_stores(plan)))
            continue
        (weight,) = table.stores().values()
        fitted = method.fit(table.spec, table.built, weight)
        stores = {
            store.name: fitted[store.name].to(weight.device, _dtype(weight, fitted[store.name]))
            for store in table.built.stores
        }
        forms.append(TableForm(table.built, stores))
    return forms


def _dtype(weight: Tensor, store: Tensor) -> torch.dtype:
    return weight.dtype if store.is_floating_point() else store.dtype
