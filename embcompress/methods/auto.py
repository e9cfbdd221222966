"""The planner's method: width, bits and sharing of every table, chosen together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.approximation.calibration import calibrate
from embcompress.approximation.fitting import principal_directions
from embcompress.engine.rows import address_rows
from embcompress.layouts.kept_ids import choose_kept_ids
from embcompress.layouts.latents import pack_latents
from embcompress.layouts.precision import fill_slots, offered_ids, slots
from embcompress.methods import register
from embcompress.methods.base import JointMethod, TableSpec
from embcompress.methods.low_bit import LowBit
from embcompress.plan import (
    Combine,
    Digit,
    Hash,
    Linear,
    LookupPlan,
    Probe,
    Quantization,
    Store,
)
from embcompress.planner.even import tables_frontier
from embcompress.planner.explanation import Explanation
from embcompress.planner.frontier import Frontier
from embcompress.planner.loss import FLOAT, NARROWNESS, table_values
from embcompress.planner.options import Choices, Hot, Option

_CHUNK = 1 << 18  # ids
_NARROWNESS_FACTORS = (1, 12, 40)


@register
@dataclass(frozen=True)
class Auto(JointMethod):
    """The planner's choice: w columns in b bits for every id or for shared rows, P·Q(E[x]).

    Each table has as many columns w ≤ d, bits a number (1, 2, 4, 8, or floats) and rows (one an
    id, or fewer, shared by a hash), and a projection of its own or one that tables share, as its
    ids are worth, by the closed forms of :mod:`embcompress.planner.loss`: how often each occurs
    (known counts; else a power law), what few columns and bits lose, what sharing loses. Of all
    ways to spend the budget it takes the one with the least expected loss, or where that is hardly
    less the one in which all tables have alike rows. Where w = d there is no projection.

    Memory: Σ ⌈R·w·b/8⌉ bytes for R rows a table, 4·w for the steps of each, 4·d·w for the
    projections; (w·b + t)·k/8 for k hot ids, whose slots have about t = log2(8·n/k) bits.

    Source: ours; see docs/planner.md.

    Attributes:
        share_projection: whether tables may share a projection.
        narrowness: what one column of many loses, as a share of what a table's ids tell.
        chunks: a shared row has this many parts at most, each found by a hash of its own: ids
            that share one part differ in others (as in :class:`~embcompress.Unified`).
        hot: whether, where counts are known, the ids that occur most may have columns of their
            own beside the others'.
        few: whether these may be the only ids that have rows; the others' vectors are zero, which
            short trainings have to show to be better.
        even: whether all tables have alike rows, each table a projection of its own, where the
            closed forms expect hardly more from others (:mod:`embcompress.planner.even`).
        worths: by table name, what the model loses without each table, in any unit; then a table
            counts by that, not by the entropy of its ids. Short trainings measure it
            (:mod:`embcompress.planner.worth`).
    """

    name: ClassVar[str] = "auto"
    uses_worths: ClassVar[bool] = True
    share_projection: bool = True
    narrowness: float = NARROWNESS
    chunks: int = 4
    hot: bool = True
    few: bool = False
    even: bool = True
    worths: Mapping[str, float] | Sequence[tuple[str, float]] | None = field(
        default=None, repr=False
    )

    def __post_init__(self) -> None:
        if self.worths is not None:
            worths = tuple(sorted(dict(self.worths).items()))
            for name, worth in worths:
                if not 0 <= worth < math.inf:
                    raise ValueError(f"worths must be at least 0, got {worth} of table {name!r}")
            object.__setattr__(self, "worths", worths)
        if not self.narrowness >= 0:
            raise ValueError(f"narrowness must not be negative, got {self.narrowness}")
        if self.chunks < 1:
            raise ValueError(f"chunks must be at least 1, got {self.chunks}")

    def candidates(self, worths: Mapping[str, float] | None = None) -> Sequence[Auto]:
        """Even rows or not, and more value put on columns; each also without chunks and hot ids.

        How much of what ids tell one column can hold depends on the data more than anything else
        here does. Which ids are hot may change with time, and what shares a row by parts needs
        more examples to be told apart. Where it was measured what tables are worth, all these are
        tried also with tables that count by that, not by their entropy.
        """
        free = replace(self, even=False, few=self.hot)
        plain = replace(free, chunks=1, hot=False, few=False)
        others = [
            replace(each, narrowness=round(factor * self.narrowness, 6))
            for factor in _NARROWNESS_FACTORS
            for each in (free, plain)
        ]
        if worths is not None:
            others += [replace(each, worths=worths) for each in others]
        return list(dict.fromkeys((self, *others)))

    def __str__(self) -> str:
        measured = "" if self.worths is None else ", by measured worths"
        return f"{self!r}{measured}"

    @property
    def choices(self) -> Choices:
        """What a table may be given."""
        return Choices(
            self.share_projection, self.narrowness, self.hot, self.few, self.chunks, even=self.even
        )

    @property
    def _worth_of(self) -> dict[str, float] | None:
        return None if self.worths is None else dict(self.worths)

    def _frontier(self, tables: Sequence[TableSpec]) -> Frontier:
        return tables_frontier(tables, self.choices, self._worth_of)

    def group_sizes(self, tables: Sequence[TableSpec]) -> range:
        return range(len(self._frontier(tables)))

    def group_plans(self, tables: Sequence[TableSpec], size: int) -> list[LookupPlan]:
        options = self._frontier(tables).options(size)
        return [_plan(*each) for each in zip(tables, options, strict=True)]

    def expected_loss(self, tables: Sequence[TableSpec], budget_bytes: int) -> float:
        """Share of what the ids of the tables tell that is expected to be lost.

        Infinite where the budget cannot be met.
        """
        # Without even plans, whose loss may rise with the bytes by what is not known so exactly.
        found = replace(self, even=False)._frontier(tables)
        point = found.within(budget_bytes)
        if point is None:
            return math.inf
        whole = sum(value.value for value in table_values(tables, self._worth_of))
        return float(found.loss[point]) / max(whole, 1e-300)

    def for_trained_tables(self) -> JointMethod:
        return replace(self, share_projection=False, hot=False, chunks=1)

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        """Slots of the ids that occur most."""
        if "keys" not in stores or stores["keys"].device.type == "meta":
            return
        assert table.counts is not None  # without, no id is known to be hot
        n, buckets = table.num_embeddings, plan.store("keys").rows
        ids = choose_kept_ids(table, offered_ids(n, buckets), plan.padding_idx)
        stores["keys"].copy_(fill_slots(n, buckets, ids)[0])

    def explain(self, tables: Sequence[TableSpec], plans: Sequence[LookupPlan]) -> Explanation:
        return Explanation.of(tables, plans, self.choices, self._worth_of)

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """Quantized leading columns, as of :class:`~embcompress.LowBit`.

        Rows that ids share approximate the mean of these, weighed by counts.
        """
        rows, counts = _row_means(table, plan, weight.detach())
        merged = replace(table, num_embeddings=len(rows), counts=counts)
        store = plan.store("weight")
        if plan.head is None:
            if store.is_float:
                return {"weight": rows}
            scale, _ = calibrate(rows, store.bits, "column", importance=counts, symmetric=True)
            stores = {"scale": scale, "weight": rows}
            return {**stores, "weight": pack_latents(plan, store, stores)}
        if store.is_float:
            directions = principal_directions(rows, store.width, counts)
            return {"weight": rows @ directions, "projection": directions}
        return LowBit().fit(merged, plan, rows)


def _plan(table: TableSpec, option: Option) -> LookupPlan:
    n, d, width, rows = table.num_embeddings, table.embedding_dim, option.width, option.rows
    stores, probes = _rows(table, option) if rows else ([], [])
    if (hot := option.hot) is not None:
        more, probe = _hot_rows(table, hot)
        stores += more
        probes.append(probe)
        width += hot.columns
    head = None
    if width != d or (rows and hot is not None):
        name = f"auto_{d}x{width}" if option.shares else ""
        stores.append(Store("projection", d, width, table.dtype, shared=name))
        head = Linear("projection")
    combine: Combine = "concat" if len(probes) > 1 else "sum"
    return LookupPlan(n, d, tuple(stores), tuple(probes), combine, head=head)


def _rows(table: TableSpec, option: Option) -> tuple[list[Store], list[Probe]]:
    """Rows of all ids, or such that they share."""
    n, rows, parts = table.num_embeddings, option.rows, option.parts
    shape = rows * parts, option.width // parts
    addresses = (
        [Digit(1, n)]
        if rows == n
        else [Hash(table.key(part), rows * parts) for part in range(parts)]
    )
    stores = _values("weight", "scale", shape, option.bits, table.dtype)
    return stores, [Probe("weight", address) for address in addresses]


def _hot_rows(table: TableSpec, hot: Hot) -> tuple[list[Store], Probe]:
    """Rows of the ids that occur most, and the slots that these are found in."""
    keys, slot = slots("keys", table.num_embeddings, hot.buckets)
    values = _values("hot", "hot_scale", (slot.size, hot.columns), hot.bits, table.dtype)
    return [keys, *values], Probe("hot", slot)


def _values(name: str, scale: str, shape: tuple[int, int], bits: int, dtype: str) -> list[Store]:
    """A store of rows, and the steps of its numbers."""
    if bits == FLOAT:
        return [Store(name, *shape, dtype)]
    quantized = Store(name, *shape, f"uint{bits}", Quantization(scale))
    return [Store(scale, 1, shape[1], dtype), quantized]


def _row_means(table: TableSpec, plan: LookupPlan, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """The mean of the ids of every row, and how often these occur together."""
    if plan.store("weight").rows == table.num_embeddings:
        return weight, table.counts
    ids = torch.arange(table.num_embeddings)
    address = plan.probes[0].address
    rows = torch.cat([address_rows(address, part, plan, {})[0] for part in ids.split(_CHUNK)])
    counts = torch.ones(len(ids)) if table.counts is None else table.counts.float().cpu() + 1e-3
    totals = torch.zeros(plan.store("weight").rows).index_add_(0, rows, counts)
    means = weight.new_zeros(len(totals), weight.shape[1])
    means.index_add_(0, rows.to(weight.device), weight * counts[:, None].to(weight))
    return means / totals.clamp(min=1e-12)[:, None].to(weight), totals
