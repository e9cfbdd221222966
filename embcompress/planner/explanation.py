"""What the planner chose, and what else there was: in words and as a plot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from embcompress.methods.base import TableSpec
from embcompress.plan import LookupPlan, total_bytes
from embcompress.planner.frontier import tables_frontier
from embcompress.planner.loss import FLOAT, table_value
from embcompress.planner.options import Choices, Option
from embcompress.text_table import text_table


@dataclass(frozen=True)
class TableChoice:
    """What one table got.

    Attributes:
        name: of the table.
        ids, rows, width, bits: its ids; its rows, their columns, and bits of a number.
        bytes: of rows, steps and a projection of its own.
        value: bits an example that its ids tell (entropy).
        kept: share of the value that is expected to be left, were all tables as wide.
    """

    name: str
    ids: int
    rows: int
    width: int
    bits: int
    bytes: int
    value: float
    kept: float


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
    """

    tables: tuple[TableChoice, ...]
    bytes: int
    lost: float
    alternatives: tuple[tuple[str, float], ...]
    curve: tuple[tuple[int, float], ...]

    @classmethod
    def of(
        cls, tables: Sequence[TableSpec], plans: Sequence[LookupPlan], choices: Choices
    ) -> Explanation:
        """The explanation of plans that were taken from these choices' frontier."""
        size = total_bytes(plans)
        whole = max(sum(table_value(table).value for table in tables), 1e-300)
        best = tables_frontier(tables, choices)
        options = best.options(best.within(size) or 0)
        chosen = [_choice(*each) for each in zip(tables, plans, options, strict=True)]
        lost = float(best.loss[best.within(size) or 0]) / whole
        others = []
        for name, restricted in _restrictions(choices):
            other = tables_frontier(tables, restricted)
            point = other.within(size)
            if point is not None:
                others.append((name, float(other.loss[point]) / whole))
        curve = [
            (int(b), float(loss) / whole) for b, loss in zip(best.bytes, best.loss, strict=True)
        ]
        chosen.sort(key=lambda choice: -choice.bytes)
        others.sort(key=lambda other: other[1])
        return cls(tuple(chosen), size, lost, tuple(others), tuple(curve))

    def __str__(self) -> str:
        rows = [
            (
                choice.name,
                f"{choice.ids:,}",
                "own" if choice.rows == choice.ids else f"{choice.rows:,} shared",
                choice.width,
                "float" if choice.bits == FLOAT else choice.bits,
                f"{choice.bytes:,}",
                f"{choice.value:.1f}",
                f"{choice.kept:.1%}",
            )
            for choice in self.tables
        ]
        header = ("table", "ids", "rows", "columns", "bits", "bytes", "entropy", "kept")
        text = (
            f"{self.bytes:,} bytes, expected to lose {self.lost:.1%} of what the ids tell.\n"
            f"{text_table(header, rows)}\n"
        )
        tried = ", ".join(f"{name} {lost:.1%}" for name, lost in self.alternatives)
        return text + (f"Within the same bytes: {tried}." if tried else "Nothing else fits.")

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
            bits = "float" if choice.bits == FLOAT else f"{choice.bits} bit"
            own = "" if choice.rows == choice.ids else f", {choice.rows:,} shared rows"
            bars.annotate(
                f" {choice.width} × {bits}{own}", (choice.bytes, number), va="center", fontsize=7
            )
        bars.margins(x=0.3)
        bars.set_xlabel("bytes")
        sizes, losses = zip(*self.curve, strict=True)
        line.plot(sizes, losses, label="best plans")
        line.plot([self.bytes], [self.lost], "o", label="this plan")
        line.set_xscale("log")
        line.set_xlabel("bytes")
        line.set_ylabel("expected share lost")
        line.legend()
        target = Path(path)
        figure.savefig(target)
        return target


def _choice(table: TableSpec, plan: LookupPlan, option: Option) -> TableChoice:
    store, value = plan.store("weight"), table_value(table).value
    return TableChoice(
        name=table.name,
        ids=table.num_embeddings,
        rows=store.rows,
        width=store.width,
        bits=FLOAT if store.is_float else store.bits,
        bytes=sum(each.bytes for each in plan.stores if not each.shared),
        value=value,
        kept=1.0 if plan.is_dense or value == 0 else 1 - option.loss / value,
    )


def _restrictions(choices: Choices) -> list[tuple[str, Choices]]:
    """What else a person would think of."""
    narrow = [(f"{w} columns everywhere", replace(choices, widths=(w,))) for w in (2, 4, 8, 16)]
    coarse = [(f"{b} bits everywhere", replace(choices, bits=(b,))) for b in (1, 2, 4, 8)]
    return [
        ("a row for every id", replace(choices, own_rows=True)),
        ("1 column everywhere", replace(choices, widths=(1,))),
        *narrow,
        *coarse,
        ("floats everywhere", replace(choices, bits=(FLOAT,))),
    ]
