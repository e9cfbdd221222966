"""What the planner chose, and what else there was: in words and as a plot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from embcompress.methods.base import TableSpec
from embcompress.plan import LookupPlan, total_bytes
from embcompress.planner.even import tables_frontier
from embcompress.planner.loss import FLOAT, TableValue, table_values
from embcompress.planner.options import Choices, Option
from embcompress.text_table import text_table


@dataclass(frozen=True)
class TableChoice:
    """What one table got.

    Attributes:
        name: of the table.
        ids, rows, width, bits: its ids; its rows, their columns, and bits of a number.
        hot: what its most frequent ids have beside that, in words; empty for nothing.
        bytes: of rows, steps, codes and a projection of its own.
        value: what its ids tell: bits an example (entropy), or nats an example where it was
            measured.
        kept: share of the value that is expected to be left, were all tables as wide.
    """

    name: str
    ids: int
    rows: int
    width: int
    bits: int
    hot: str
    bytes: int
    value: float
    kept: float

    @property
    def sentence(self) -> str:
        """In words."""
        if not self.rows:
            return f"of its {self.ids:,} ids, {self.hot}"
        shared = "of their own" if self.rows == self.ids else f"among {self.rows:,} that they share"
        if self.rows == 1 < self.ids:
            shared = "in common, one for all"
        hot = f"; {self.hot}" if self.hot else ""
        return f"its {self.ids:,} ids have rows {shared}, {_numbers(self.width, self.bits)}{hot}"

    @property
    def kind(self) -> str:
        """Whether its rows are an id's own, or how many are shared."""
        if not self.rows:
            return "none"
        return "own" if self.rows == self.ids else f"{self.rows:,} shared"

    @property
    def label(self) -> str:
        """In few words."""
        if not self.rows:
            return self.hot
        own = "" if self.rows == self.ids else f", {self.rows:,} shared rows"
        hot = f", {self.hot}" if self.hot else ""
        return f"{self.width} × {_bits(self.bits)}{own}{hot}"


@dataclass(frozen=True)
class Tried:
    """A setting of the planner that was tried by a short training.

    Attributes:
        settings: of the method, as it prints.
        passes: over the training examples.
        auc: on held-out examples.
        lead: of its AUC over that of the planner's first guess on earlier examples, where it was
            compared there, too.
    """

    settings: str
    passes: float
    auc: float
    lead: float | None = None

    def __str__(self) -> str:
        if not self.passes:
            return f"{self.settings}: no time"
        again = "" if self.lead is None else f", {self.lead:+.4f} on earlier examples"
        return f"{self.settings}: AUC {self.auc:.4f}{again}, passes: {self.passes:g}"


@dataclass(frozen=True)
class Explanation:
    """Where the bytes of a plan went; prints as text.

    Attributes:
        tables: what each got, by falling bytes.
        bytes: of all together, the projection included.
        lost: share of the tables' value that is expected to be lost.
        alternatives: (what, share lost): the best plans within the same bytes under one
            restriction each; those that do not fit are left out.
        curve: (bytes, share lost) of all plans that no other one beats.
        has_counts: whether it is known how often ids occur.
        is_measured: whether values are measured, not entropies.
        tried: by short trainings, the chosen one first; empty without data.
        examples: number of examples of these.
        quality: how the bytes were found, where a quality was asked for; else empty.
    """

    tables: tuple[TableChoice, ...]
    bytes: int
    lost: float
    alternatives: tuple[tuple[str, float], ...]
    curve: tuple[tuple[int, float], ...]
    has_counts: bool
    is_measured: bool = False
    tried: tuple[Tried, ...] = ()
    examples: int = 0
    quality: str = ""

    @classmethod
    def of(
        cls,
        tables: Sequence[TableSpec],
        plans: Sequence[LookupPlan],
        choices: Choices,
        worths: Mapping[str, float] | None = None,
    ) -> Explanation:
        """The explanation of plans that were taken from these choices' frontier."""
        size = total_bytes(plans)
        values = table_values(tables, worths)
        whole = max(sum(value.value for value in values), 1e-300)
        best = tables_frontier(tables, choices, worths)
        point = best.within(size) or 0
        chosen = [
            _choice(*each) for each in zip(tables, plans, values, best.options(point), strict=True)
        ]
        others = []
        for name, restricted in _restrictions(choices):
            other = tables_frontier(tables, restricted, worths)
            fitting = other.within(size)
            if fitting is not None:
                others.append((name, float(other.loss[fitting]) / whole))
        curve = [
            (int(b), float(loss) / whole) for b, loss in zip(best.bytes, best.loss, strict=True)
        ]
        chosen.sort(key=lambda choice: -choice.bytes)
        others.sort(key=lambda other: other[1])
        return cls(
            tables=tuple(chosen),
            bytes=size,
            lost=float(best.loss[point]) / whole,
            alternatives=tuple(others),
            curve=tuple(curve),
            has_counts=any(table.counts is not None for table in tables),
            is_measured=worths is not None,
        )

    def __str__(self) -> str:
        parts = [self.quality, self._summary(), self._table(), self._alternatives(), self._trials()]
        return "\n".join(part for part in parts if part)

    def _summary(self) -> str:
        known = "known counts" if self.has_counts else "an assumed power law"
        if self.is_measured:
            known += " and by what the model lost without each table (nats an example)"
        first = self.tables[0]
        return (
            f"{self.bytes:,} bytes, expected to lose {self.lost:.1%} of what the ids tell, by "
            f"{known}.\n{first.bytes / max(1, self.bytes):.0%} of the bytes go to "
            f"{first.name or 'the table'}: {first.sentence}."
        )

    def _table(self) -> str:
        rows = [
            (
                choice.name,
                f"{choice.ids:,}",
                choice.kind,
                choice.width,
                "float" if choice.bits == FLOAT else choice.bits,
                choice.hot,
                f"{choice.bytes:,}",
                f"{choice.value:.4f}" if self.is_measured else f"{choice.value:.1f}",
                f"{choice.kept:.1%}",
            )
            for choice in self.tables
        ]
        value = "worth" if self.is_measured else "entropy"
        header = ("table", "ids", "rows", "columns", "bits", "and", "bytes", value, "kept")
        return text_table(header, rows)

    def _alternatives(self) -> str:
        others = ", ".join(f"{name} {lost:.1%}" for name, lost in self.alternatives)
        return f"Expected loss within the same bytes: {others}." if others else "Nothing else fits."

    def _trials(self) -> str:
        if not self.tried:
            return ""
        if len(self.tried) == 1:
            return "All settings of the planner give this plan, so none was tried."
        lines = [f"  {each}" for each in self.tried]
        return "\n".join([f"Tried on {self.examples:,} examples, the chosen first:", *lines])

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Save a picture: the bytes of every table, and expected loss against bytes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (``pip install embcompress[bench]``).
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        bars, line = figure.subplots(1, 2)
        shown = self.tables[:20][::-1]
        bars.barh([choice.name or "table" for choice in shown], [c.bytes for c in shown])
        for number, choice in enumerate(shown):
            bars.annotate(
                f" {choice.label}",
                (choice.bytes, number),
                va="center",
                fontsize=7,
            )
        bars.margins(x=0.4)
        bars.set_xlabel("bytes")
        sizes, losses = zip(*self.curve, strict=True)
        line.plot(sizes, losses, label="best plans")
        line.plot([self.bytes], [self.lost], "o", label="this plan")
        for name, lost in self.alternatives:
            line.plot([self.bytes], [lost], "_", color="grey")
            line.annotate(f" {name}", (self.bytes, lost), va="center", fontsize=6, color="grey")
        line.set_xscale("log")
        line.set_xlabel("bytes")
        line.set_ylabel("expected share lost")
        line.legend()
        target = Path(path)
        figure.savefig(target)
        return target


def _choice(
    table: TableSpec, plan: LookupPlan, table_value: TableValue, option: Option
) -> TableChoice:
    value, hot = table_value.value, option.hot
    more = ""
    if hot is not None:
        numbers = _numbers(hot.columns, hot.bits)
        more = f"{hot.ids:,} hot ids {numbers} more"
        if not option.rows:
            more = f"only {hot.ids:,} hot ids have rows, {numbers}"
    return TableChoice(
        name=table.name,
        ids=table.num_embeddings,
        rows=option.rows,
        width=option.width,
        bits=FLOAT if plan.is_dense else option.bits,
        hot=more,
        bytes=sum(each.bytes for each in plan.stores if not each.shared),
        value=value,
        kept=1.0 if plan.is_dense or value == 0 else 1 - option.loss,
    )


def _numbers(columns: int, bits: int) -> str:
    return f"{columns} column{'s' if columns > 1 else ''} in {_bits(bits)}"


def _bits(bits: int) -> str:
    return "floats" if bits == FLOAT else f"{bits} bit{'s' if bits > 1 else ''}"


def _restrictions(choices: Choices) -> list[tuple[str, Choices]]:
    """What else a person would think of."""
    free = replace(choices, even=False)
    narrow = [(f"{w} columns everywhere", replace(free, widths=(w,))) for w in (2, 4, 8, 16)]
    coarse = [(f"{_bits(b)} everywhere", replace(free, bits=(b,))) for b in (1, 2, 4, 8)]
    return [
        *([("free columns and bits", free)] if choices.even else []),
        ("a row for every id", replace(free, own_rows=True, hot=False)),
        ("1 column everywhere", replace(free, widths=(1,))),
        *narrow,
        *coarse,
        ("floats everywhere", replace(free, bits=(FLOAT,))),
    ]
