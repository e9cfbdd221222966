"""What :func:`embcompress.compress` did with a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from embcompress.budget import format_bytes
from embcompress.planner.explanation import Explanation
from embcompress.text_table import text_table


@dataclass(frozen=True)
class TableChange:
    """What :func:`compress` did with one table.

    Attributes:
        name: path of the module; further paths to it, or to modules tied to it, in ``also``.
        rows, width: shape of the dense table.
        method: the method it has now (``"full"``: left as it was).
        before, after: resident bytes; a store that tables share counts for the first of them.
        error: relative error of the vectors, √(Σ c·|v − w|² / Σ c·|w|²) over ids, where the
            table started from the old weights; c are the counts, where known, else 1.
        note: why it was left alone, or what a reader should know.
    """

    name: str
    rows: int
    width: int
    method: str
    before: int
    after: int
    note: str = ""
    also: tuple[str, ...] = ()
    error: float | None = None


def _notes(table: TableChange) -> list[str]:
    error = "" if table.error is None else f"error {table.error:.1%}"
    return [note for note in (table.note, error, *(f"also {path}" for path in table.also)) if note]


@dataclass(frozen=True)
class CompressionReport:
    """What :func:`compress` did; prints as a table."""

    tables: tuple[TableChange, ...] = field(default_factory=tuple)
    budget: int = 0
    explanations: tuple[Explanation, ...] = ()

    @property
    def before(self) -> int:
        """Bytes of all tables before."""
        return sum(table.before for table in self.tables)

    @property
    def after(self) -> int:
        """Bytes of all tables after."""
        return sum(table.after for table in self.tables)

    def explain(self) -> str:
        """In words, where the bytes went and what else there was, as far as the planner chose.

        For a picture: ``report.explanations[0].plot("plan.png")``.
        """
        if not self.explanations:
            return "Nothing was planned: the methods were given. method='auto' plans."
        return "\n\n".join(map(str, self.explanations))

    def __str__(self) -> str:
        rows = [
            (t.name, t.rows, t.width, t.method, format_bytes(t.before), format_bytes(t.after), note)
            for t in self.tables
            for note in [", ".join(_notes(t))]
        ]
        share = f"{self.after / self.before:.4%}" if self.before else ""
        total = ("total", "", "", share, format_bytes(self.before), format_bytes(self.after), "")
        header = ("table", "rows", "width", "method", "before", "after", "note")
        return text_table(header, [*rows, total])
