"""Which precision groups of ids should have: measured while training, and chosen by a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from embcompress.layouts.kept_ids import choose_kept_ids
from embcompress.layouts.precision import PRECISIONS, PrecisionLayout, bucket_ranges, ways_of
from embcompress.methods.base import TableSpec
from embcompress.methods.full import Full
from embcompress.plan import LookupPlan, total_bytes
from embcompress.procedures.base import Observes, TableProcedure, TrainedTable

WEIGHT, GROUPS, SENSITIVITY = "weight", "groups", "sensitivity"
#: Mean squared error of normal numbers of deviation 1 in so many bits, with the steps that new
#: tables have (:mod:`embcompress.initialization`); without a row they are read as zero.
ERRORS = {0: 1.0, 1: 0.3634, 2: 0.1188, 4: 0.01154, 8: 0.0000877}
_HALVINGS, _SHARE_HALVINGS = 60, 40
_KEY_BITS = 8  # about what a slot takes


# ---------------------------------------------------------------------------------- the search


def group_sizes(table: TableSpec, groups: int) -> list[int]:
    """Sizes of the groups, that of the most frequent ids first; one group without counts.

    The last has half of the ids, the one before it half of the others, and so on.
    """
    n = table.num_embeddings
    count = 1 if table.counts is None else min(groups, n.bit_length())
    ends = [n >> (count - 1 - group) for group in range(count)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def by_count(table: TrainedTable) -> Tensor:
    """(num_embeddings,) ids by falling count, the padding id last."""
    device = next(iter(table.stores().values())).device
    spec = table.spec
    return choose_kept_ids(spec, spec.num_embeddings, table.built.padding_idx, device)


class SensitivitySearch(TableProcedure):
    """Measures how much the loss minds errors in the rows of every group.

    With g the gradient of the loss at a vector e, an error of the share ε of each number of e costs
    about ε²/2·Σ h·e², where the curvature h is taken to be in proportion to the expected square of
    g (as for a likelihood it is). So a group's sensitivity is Σ (g·e)² over all that is looked up
    of it, and rows in b bits cost it the share of that by which the bits miss normal numbers.

    Its tensors: ``groups``, (num_embeddings,) uint8; ``sensitivity``, (groups,) float64.

    Args:
        groups: number of groups, at most.
    """

    observes: Observes = "gradients of vectors"
    averaged: tuple[str, ...] = (SENSITIVITY,)

    def __init__(self, groups: int) -> None:
        self._groups = groups

    def new_tensors(self, table: TrainedTable) -> dict[str, Tensor]:
        sizes = torch.tensor(group_sizes(table.spec, self._groups))
        order = by_count(table)
        numbers = torch.arange(len(sizes), dtype=torch.uint8).repeat_interleave(sizes)
        return {
            GROUPS: torch.empty_like(order, dtype=torch.uint8).index_copy_(
                0, order, numbers.to(order.device)
            ),
            SENSITIVITY: torch.zeros(len(sizes), dtype=torch.float64, device=order.device),
        }

    def observe(self, table: TrainedTable, ids: Tensor, amounts: Tensor) -> None:
        rows = table.stores()[WEIGHT].detach()[ids].double()
        squares = (amounts.double() * rows).square().sum(1)
        finite = torch.nan_to_num(squares, nan=0.0, posinf=0.0)
        table.tensor(SENSITIVITY).index_add_(0, table.tensor(GROUPS)[ids].long(), finite)

    def is_due(self, number: int) -> bool:
        return True  # so that processes agree

    def step(self, table: TrainedTable, number: int) -> None:
        """Nothing happens to the table."""


# ---------------------------------------------------------------------------------- the choice

#: Numbers of ids and the bits that they have, the most frequent first.
Segments: TypeAlias = list[tuple[int, int]]


@dataclass(frozen=True)
class SearchedTable:
    """What a search has found for a table.

    Attributes:
        spec: the table.
        sizes: number of ids of each group, the most frequent first.
        sensitivity: (groups,) float64, not negative, in one unit for all tables.
    """

    spec: TableSpec
    sizes: Sequence[int]
    sensitivity: Tensor

    def precisions(self, price: float) -> tuple[int, list[int]]:
        """The bits of the rows of all ids, and those of each group, at a price of a bit of memory.

        They make the sum of errors and prices the least there is.
        """
        width = self.spec.embedding_dim
        sizes = torch.tensor(self.sizes, dtype=torch.float64)[:, None]
        options = []
        for place, base in enumerate(PRECISIONS):
            allowed = PRECISIONS[place:]
            errors = torch.tensor([ERRORS[bits] for bits in allowed], dtype=torch.float64)
            costs = [0, *(bits * width + _KEY_BITS for bits in allowed[1:])]
            totals = self.sensitivity[:, None] * errors + price * sizes * torch.tensor(costs)
            least, chosen = totals.min(1)
            total = float(least.sum()) + price * self.spec.num_embeddings * width * base
            options.append((total, base, [allowed[number] for number in chosen.tolist()]))
        _, base, bits = min(options)
        return base, bits

    def segments(self, fitting: Sequence[int], larger: Sequence[int], share: float) -> Segments:
        """Each group with the larger bits for a share of its ids, and the fitting ones for others.

        Args:
            fitting, larger: bits of each group.
            share: in [0, 1].
        """
        segments = []
        for size, bits, more in zip(self.sizes, fitting, larger, strict=True):
            first = int(size * share)
            segments += [(first, more), (size - first, bits)]
        return segments

    def layout(self, base: int, segments: Segments) -> PrecisionLayout:
        """The layout with rows of ``base`` bits for all ids, and slots for what has more.

        There is one row at least.
        """
        n, d = self.spec.num_embeddings, self.spec.embedding_dim
        ranges, ways = bucket_ranges(n), ways_of(n)
        fewest, most = ranges[0][0], ranges[-1][-1]
        buckets = []
        for bits in PRECISIONS[:0:-1]:
            count = sum(ids for ids, own in segments if own == bits) // ways
            if bits > base and count >= fewest:
                buckets.append((bits, min(count, most)))
        if buckets or base:
            return PrecisionLayout(n, d, base, tuple(buckets))
        few = PRECISIONS[1]
        smallest = PrecisionLayout(n, d, 0, ((few, fewest),)), PrecisionLayout(n, d, few, ())
        return min(smallest, key=lambda layout: layout.plan(self.spec.dtype).bytes)

    def plan(self, layout: PrecisionLayout) -> LookupPlan:
        """The layout's plan, or that of the full table where it takes no fewer bytes."""
        spec = self.spec
        plans = Full().plan(spec, spec.num_embeddings), layout.plan(spec.dtype)
        return min(plans, key=lambda plan: plan.bytes)


def choose_plans(tables: Sequence[SearchedTable], budget: int) -> list[tuple[LookupPlan, Segments]]:
    """Precisions for the groups of all tables, by one price of memory that meets the budget.

    At a price the sum of the errors is the least that any choice of as many bits has. Where the
    next group to go up does not fit as a whole, a part of its ids does that fits.

    Args:
        tables: all that share the budget.
        budget: bytes of all tables; the smallest plans must fit.

    Returns:
        For each table its plan, and which ids are to have which of its rows.
    """
    # At this price no group takes a bit, and where it is paid for them every group takes all.
    above = 1 + max(float(table.sensitivity.max()) for table in tables)
    below = -above

    def fits(share: float) -> bool:
        return _bytes(_between(tables, above, below, share)) <= budget

    if fits(1.0):
        return _between(tables, above, below, 1.0)
    for _ in range(_HALVINGS):
        price = (below + above) / 2
        if _bytes(_between(tables, price, price, 0.0)) <= budget:
            above = price
        else:
            below = price
    share, beyond = 0.0, 1.0
    for _ in range(_SHARE_HALVINGS):
        middle = (share + beyond) / 2
        share, beyond = (middle, beyond) if fits(middle) else (share, middle)
    return _between(tables, above, below, share)


def _between(
    tables: Sequence[SearchedTable], above: float, below: float, share: float
) -> list[tuple[LookupPlan, Segments]]:
    """The plans at the upper price, with a share of what changes at the lower one."""
    plans = []
    for table in tables:
        base, bits = table.precisions(above)
        segments = table.segments(bits, table.precisions(below)[1], share)
        plans.append((table.plan(table.layout(base, segments)), segments))
    return plans


def _bytes(chosen: Sequence[tuple[LookupPlan, Segments]]) -> int:
    return total_bytes(plan for plan, _ in chosen)
