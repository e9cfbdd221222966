"""Every way to spend bytes on some tables that no other way beats, by expected loss."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from embcompress.planner.loss import TableValue
from embcompress.planner.options import (
    FLOAT_BYTES,
    Choices,
    Option,
    candidate_widths,
    falling,
    hull,
    table_options,
)

Numbers = NDArray[np.int64]

#: Budgets that are tried, for each doubling.
_STEPS_A_DOUBLING = 32
#: After the best steps, so many more options may be exchanged for larger ones that still fit.
_EXCHANGES = 6


@dataclass(frozen=True)
class Frontier:
    """Points of rising bytes and falling expected loss.

    Attributes:
        bytes, loss: (points,) of all tables together.
        chosen: for each point, the option of each table.
    """

    bytes: Numbers
    loss: NDArray[np.float64]
    chosen: list[list[Option]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.bytes)

    def options(self, point: int) -> list[Option]:
        """Each table's option."""
        return self.chosen[point]

    def within(self, budget_bytes: int) -> int | None:
        """The last point of at most so many bytes; None if there is none."""
        fitting = int(np.searchsorted(self.bytes, budget_bytes, side="right"))
        return fitting - 1 if fitting else None


@functools.lru_cache(maxsize=64)
def frontier(values: tuple[TableValue, ...], dims: tuple[int, ...], choices: Choices) -> Frontier:
    """The frontier of tables of known value.

    For every number of columns it is tried that no table has more, and that they may also share a
    projection of that many; each with and without columns for hot ids alone, and shared rows. A
    search among more options goes by steeper first steps, and may end in a worse place.

    Args:
        values: what each is worth.
        dims: ``embedding_dim`` of each.
        choices: what they may be given.
    """
    has_heads = choices.hot and any(value.heads for value in values)
    searches = [
        search
        for hot in sorted({False, has_heads})
        for own_rows in sorted({True, choices.own_rows})
        for search in _searches(values, dims, replace(choices, hot=hot, own_rows=own_rows))
    ]
    sizes = np.concatenate([search.bytes for search in searches])
    losses = np.concatenate(
        [expected_loss(values, dims, search, choices.narrowness) for search in searches]
    )
    order = np.lexsort((losses, sizes))
    points = order[falling(losses[order])]
    starts = np.cumsum([0, *(len(search.bytes) for search in searches)])
    chosen = []
    for point in points.tolist():
        number = int(np.searchsorted(starts, point, side="right")) - 1
        chosen.append(searches[number].chosen(point - int(starts[number])))
    return Frontier(sizes[points], losses[points], chosen)


def _searches(values: Sequence[TableValue], dims: Sequence[int], choices: Choices) -> list[Search]:
    """With at most so many columns, for all numbers of columns."""
    searches = []
    alike = [replace(value, value=1.0) for value in values]  # what options follow from
    worth = [value.value for value in values]
    fitting: list[list[Option]] = [[] for _ in values]  # of at most so many columns
    for width in candidate_widths(max(dims), choices.widths):
        # Narrower tables have columns in proportion.
        widths = [-(-width * dim // max(dims)) for dim in dims]
        for options, value, own, dim in zip(fitting, alike, widths, dims, strict=True):
            options += table_options(value, own, dim, choices, shares=False)
        searches.append(_search(fitting, worth, 0))
        # Tables of one width have one projection; a single table has nothing to share.
        heads = {(own, dim) for own, dim in zip(widths, dims, strict=True) if own < dim}
        if choices.share_projection and len(values) > 1 and heads:
            sharing = [
                [*options, *table_options(value, own, dim, choices, shares=True)]
                for options, value, own, dim in zip(fitting, alike, widths, dims, strict=True)
            ]
            size = sum(own * dim * FLOAT_BYTES for own, dim in heads)
            searches.append(_search(sharing, worth, size))
    return searches


@dataclass(frozen=True)
class Search:
    """The best choices among some options, budget by budget.

    Attributes:
        options: of each table, those that no other one beats, cheapest first.
        taken: (budgets, tables) number of the option that a table gets.
        bytes: (budgets,) of all tables together.
    """

    options: list[list[Option]]
    taken: Numbers
    bytes: Numbers

    def chosen(self, budget: int) -> list[Option]:
        """Each table's option at one of the budgets."""
        return [each[k] for each, k in zip(self.options, self.taken[budget].tolist(), strict=True)]


def _search(offered: list[list[Option]], worth: list[float], heads_bytes: int) -> Search:
    """Best steps first, as far as a budget goes; then what else still fits."""
    options = [_undominated(each) for each in offered]
    hulls = [hull(each) for each in options]
    places = [{id(option): k for k, option in enumerate(each)} for each in options]
    steps = sorted(
        (
            (
                worth[table] * (before.loss - after.loss) / (after.bytes - before.bytes),
                table,
                before,
                after,
            )
            for table, each in enumerate(hulls)
            for before, after in itertools.pairwise(each)
        ),
        key=lambda step: -step[0],  # each table's own keep their order: they gain less and less
    )
    start = heads_bytes + sum(each[0].bytes for each in hulls)
    sizes = np.cumsum([start, *(after.bytes - before.bytes for _, _, before, after in steps)])
    states = np.zeros((len(steps) + 1, len(options)), dtype=np.int64)
    for number, (_, table, _, after) in enumerate(steps, 1):
        states[number] = states[number - 1]
        states[number, table] = places[table][id(after)]
    doublings = np.log2(max(1.0, sizes[-1] / sizes[0]))
    budgets = sizes[0] * 2 ** np.linspace(0, doublings, 1 + round(doublings * _STEPS_A_DOUBLING))
    budgets = np.unique(np.append(budgets.astype(np.int64), sizes[-1]))
    reached = np.searchsorted(sizes, budgets, side="right") - 1
    taken, total = states[reached], sizes[reached]
    known = [
        (
            np.array([option.bytes for option in each]),
            worth[table] * np.array([option.loss for option in each]),
        )
        for table, each in enumerate(options)
    ]
    for _ in range(_EXCHANGES):
        taken, total = _exchange(known, taken, total, budgets)
    return Search(options, taken, total)


def _exchange(
    options: Sequence[tuple[Numbers, NDArray[np.float64]]],
    taken: Numbers,
    total: Numbers,
    budgets: Numbers,
) -> tuple[Numbers, Numbers]:
    """For each budget, the one larger option that gains most within what is left of it.

    Args:
        options: bytes and losses of those of each table.
    """
    points = np.arange(len(budgets))
    larger, gains, more = [], [], []
    for table, (sizes, losses) in enumerate(options):
        now = taken[:, table]
        # Options are in order of bytes and of falling loss, so the last that fits is the best.
        best = np.searchsorted(sizes, sizes[now] + budgets - total, side="right") - 1
        larger.append(best)
        gains.append(losses[now] - losses[best])
        more.append(sizes[best] - sizes[now])
    table = np.argmax(gains, axis=0)
    exchanged = taken.copy()
    exchanged[points, table] = np.array(larger)[table, points]
    return exchanged, total + np.array(more)[table, points]


def _undominated(options: list[Option]) -> list[Option]:
    """Those that no option of fewer bytes and less loss beats, cheapest first."""
    ordered = sorted(options, key=lambda option: (option.bytes, option.loss))
    kept = falling(np.array([option.loss for option in ordered]))
    return [option for option, is_better in zip(ordered, kept, strict=True) if is_better]


def expected_loss(
    values: Sequence[TableValue], dims: Sequence[int], search: Search, narrowness: float
) -> NDArray[np.float64]:
    """(budgets,) the expected loss of all tables.

    In the product of two tables' vectors the columns of the wider one that the narrower one lacks
    are lost, so a table's columns count by how much its partners have them, too: partner j by the
    square of its value, because the pairs that tell most are those of the tables that tell most.
    """
    value, dim = np.array([each.value for each in values]), np.array(dims)
    partner = value**2 / max(float((value**2).sum()), 1e-300)
    # (budgets, tables, 2): columns, share and kept share of the others' and the hot ids' value.
    parts = [
        np.array([_parts(option) for option in each])[search.taken[:, table]]
        for table, each in enumerate(search.options)
    ]
    width, share, kept = np.moveaxis(np.stack(parts, axis=1), -1, 0)
    edges = np.unique([*width[width > 0], max(dims)])
    losses = value.sum() - (value * kept.sum(2)).sum(1)
    for before, after in itertools.pairwise(edges):
        has = (width > before) | (width == dim[:, None])
        present = ((share * has).sum(2) * partner).sum(1, keepdims=True)
        lost = kept.sum(2) - present * (kept * has).sum(2)
        losses += narrowness * (1 / before - 1 / after) * (value * (dim > before) * lost).sum(1)
    return np.asarray(losses)


def _parts(option: Option) -> list[tuple[int, float, float]]:
    """Columns, share and kept share of the value, of the ids that are not hot and of the hot."""
    if option.hot is None:
        return [(option.width, 1.0, option.kept), (0, 0.0, 0.0)]
    hot = option.hot
    return [(option.width, 1 - hot.share, option.kept), (hot.width, hot.share, hot.kept)]
