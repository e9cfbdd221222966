"""What the planner chose, and what else there was: in words and as a plot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embcompress.methods.base import TableSpec
from embcompress.plan import LookupPlan, total_bytes
from embcompress.planner.frontier import Frontier
from embcompress.planner.loss import FLOAT, table_value
from embcompress.text_table import text_table


@dataclass(frozen=True)
class TableChoice:
    """What one table got.

    Attributes:
        name: of the table.
        ids, rows, width, bits: its ids; its rows, their columns, and bits of a number.
        bytes: of rows, steps and a projection of its own.
        value: bits an example that its ids tell (entropy).
        kept: share of the value that is expected to be left.
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
        alternatives: (columns, share lost) of the best plans within the same bytes whose rows
            have another number of columns; those that do not fit are left out.
        curve: (bytes, share lost) of all plans that no other one beats.
    """

    tables: tuple[TableChoice, ...]
    bytes: int
    lost: float
    alternatives: tuple[tuple[int, float], ...]
    curve: tuple[tuple[int, float], ...]

    @classmethod
    def of(
        cls, frontier: Frontier, tables: Sequence[TableSpec], plans: Sequence[LookupPlan]
    ) -> Explanation:
        """The explanation of plans of :class:`embcompress.Auto`."""
        size = total_bytes(plans)
        values = [table_value(table).value for table in tables]
        whole = max(sum(values), 1e-300)
        point = int((frontier.bytes <= size).sum()) - 1
        options = frontier.options(max(point, 0))
        choices = []
        for table, plan, value, option in zip(tables, plans, values, options, strict=True):
            store = plan.store("weight")
            own = sum(s.bytes for s in plan.stores if not s.shared)
            bits = FLOAT if store.is_float else store.bits
            kept = 1.0 if plan.is_dense or value == 0 else 1 - option.loss / value
            choices.append(
                TableChoice(
                    table.name,
                    table.num_embeddings,
                    store.rows,
                    store.width,
                    bits,
                    own,
                    value,
                    kept,
                )
            )
        others = []
        for width, chain in frontier.chains.items():
            fitting = int((chain.bytes <= size).sum())
            if fitting and width != int(frontier.width[max(point, 0)]):
                others.append((width, float(chain.loss[fitting - 1]) / whole))
        curve = tuple(
            (int(b), float(loss) / whole)
            for b, loss in zip(frontier.bytes, frontier.loss, strict=True)
        )
        lost = sum(c.value * (1 - c.kept) for c in choices) / whole
        choices.sort(key=lambda choice: -choice.bytes)
        others.sort(key=lambda other: other[1])
        return cls(tuple(choices), size, lost, tuple(others), curve)

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
        tried = ", ".join(
            f"{width} columns lose {lost:.1%}" for width, lost in self.alternatives[:4]
        )
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
