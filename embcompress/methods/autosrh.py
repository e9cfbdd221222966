"""Columns chosen for groups of ids by gates that are learned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.engine.rows import unpack_bits
from embcompress.families.sparse_rows import WEIGHT, SparseRows, best_mask, final_form, full_weight
from embcompress.layouts.packing import pack_codes, unpack_codes
from embcompress.methods import register
from embcompress.plan import Code, Digit, LookupPlan, Probe, Store
from embcompress.procedures.base import Observes, TableProcedure, TrainedTable
from embcompress.procedures.phases import Phase, PhasedTable, TableForm

GATES, GROUPS = "gates", "groups"
_EPSILON = 1e-10


@register
@dataclass(frozen=True)
class AutoSRH(SparseRows):
    """Columns kept for groups of ids of like frequency, by gates that are learned.

    The ids are cut into ``groups`` of as many ids, by falling count. In the first phase the full
    table is trained under gates, one for every group g and column c,

        E[x, c] · gate[g(x), c]

    which learn from validation examples, by Adagrad, and shrink by the l1 penalty. Then the gates
    go into the table, and the numbers under the largest gates are kept, as many as the budget
    holds (of those under the last gate the largest), and trained on.

    Memory: for k kept numbers 4·k bytes, and the smaller of n·d bits and about k·(log2(d) + 6)
    bits to tell which they are, with a few bits more for every block of rows; all of it is in the
    budget. While it searches, a table holds n·d numbers, the gates, and a code an id.

    Source: Kong et al., "AutoSrh: An embedding dimensionality search framework for tabular data
    prediction", TKDE 2022, section 4: soft selection, first-order search, hard selection. What
    differs: the table keeps what it has learned when columns are pruned; a penalty is applied by a
    proximal step; without counts, groups are ranges of ids.

    Attributes:
        groups: number of groups, ≥ 1; at most one an id.
        epochs: of the first phase, ≥ 1.
        rate: learning rate of the gates, > 0.
        l1: weight of the gates' magnitudes in the loss, ≥ 0.
    """

    name: ClassVar[str] = "autosrh"
    groups: int = 20
    epochs: int = 2
    rate: float = 0.01
    l1: float = 1e-3

    def __post_init__(self) -> None:
        if self.groups < 1 or self.epochs < 1 or not self.rate > 0 or self.l1 < 0:
            raise ValueError(
                "groups and epochs must be at least 1, rate positive and l1 not negative, got "
                f"{self.groups}, {self.epochs}, {self.rate}, {self.l1}"
            )

    def phases(self) -> tuple[Phase, Phase]:
        return Phase("search", self.epochs, split="validation"), Phase("train")

    def phase_procedure(self, phase: Phase) -> TableProcedure | None:
        return GateSearch(self.rate, self.l1) if phase == self.phases()[0] else None

    def search(self, table: PhasedTable) -> TableForm:
        count = min(self.groups, table.spec.num_embeddings)
        weight, groups = full_weight(table), group_of_ids(table.spec.counts, table, count)
        plan = gated_plan(table, count)
        stores = {
            WEIGHT: weight,
            GATES: torch.ones(count, plan.embedding_dim, dtype=weight.dtype, device=weight.device),
            GROUPS: pack_codes(groups.to(weight.device), plan.store(GROUPS).bits),
        }
        return TableForm(plan, stores, frozen=(GATES,))

    def final(self, table: PhasedTable) -> TableForm:
        stores, plan = table.stores(), table.plan
        weight, gates = stores[WEIGHT].detach(), stores[GATES].detach()
        codes = unpack_codes(stores[GROUPS], 0, plan.num_embeddings, plan.store(GROUPS).bits)
        gated = weight * gates[codes]
        scores = gate_scores(gated, gates, codes)
        return final_form(table, gated, best_mask(table.built, scores))


def group_of_ids(counts: Tensor | None, table: PhasedTable, groups: int) -> Tensor:
    """(num_embeddings,) int64 the group of every id: of as many ids, the most frequent in 0."""
    n = table.spec.num_embeddings
    ranks = torch.arange(n)
    if counts is not None:
        order = torch.sort(counts.cpu(), descending=True, stable=True).indices
        ranks = torch.empty_like(order).index_copy_(0, order, ranks)
    return ranks * groups // n


def gated_plan(table: PhasedTable, groups: int) -> LookupPlan:
    """The plan of the full table times the gates of every id's group."""
    built, everyone = table.built, Digit(1, table.built.num_embeddings)
    n, d, dtype = built.num_embeddings, built.embedding_dim, table.spec.dtype
    return replace(
        built.with_pool("none", built.padding_idx),
        stores=(
            Store(WEIGHT, n, d, dtype),
            Store(GATES, groups, d, dtype),
            Store(GROUPS, n, 1, f"uint{groups.bit_length()}"),
        ),
        probes=(Probe(WEIGHT, everyone), Probe(GATES, Code(GROUPS, groups, everyone))),
        combine="mul",
    )


def gate_scores(gated: Tensor, gates: Tensor, codes: Tensor) -> Tensor:
    """(n, d) float64 scores: by the magnitude of the gate, and under one gate by the number's.

    Args:
        gated: (n, d) numbers times their gates.
        gates: (groups, d).
        codes: (n,) group of every id.
    """
    ranks = gates.abs().reshape(-1).argsort(stable=True).argsort().view_as(gates)
    magnitudes = gated.double().abs()
    return ranks[codes] + magnitudes / (magnitudes.max() * (1 + 1e-9)).clamp(min=_EPSILON)


class GateSearch(TableProcedure):
    """Gates that learn by Adagrad from gradients of vectors, with an l1 penalty.

    The gradient of a gate is the sum over the ids of its group of the gradient of the vector times
    the number that the gate multiplies.
    """

    observes: Observes = "gradients of vectors"
    averaged: tuple[str, ...] = ("gradient",)

    def __init__(self, rate: float, l1: float) -> None:
        self._rate, self._l1 = rate, l1

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        gates = table.stores()[GATES].detach().float()
        return {"gradient": torch.zeros_like(gates), "squares": torch.zeros_like(gates)}

    def observe(self, table: TrainedTable, ids: Tensor, amounts: Tensor) -> None:
        stores, ids = table.stores(), ids.long()
        groups = unpack_bits(stores[GROUPS], ids, table.plan.store(GROUPS).bits)
        finite = torch.nan_to_num(amounts, nan=0.0, posinf=0.0, neginf=0.0)
        gradients = finite * stores[WEIGHT].detach()[ids].float()
        table.tensor("gradient").index_add_(0, groups, gradients)

    def is_due(self, number: int) -> bool:
        return True

    def step(self, table: TrainedTable, number: int) -> None:
        gradient, squares = table.tensor("gradient"), table.tensor("squares")
        gates = table.stores()[GATES]
        squares.add_(gradient.square())
        moved = gates.float() - self._rate * gradient / (squares.sqrt() + _EPSILON)
        gates.copy_(moved.sign() * (moved.abs() - self._rate * self._l1).clamp(min=0))
        gradient.zero_()
