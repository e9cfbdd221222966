"""Records of a sweep, averaged over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from embcompress.bench.records import Record, RecordFile
from embcompress.bench.settings import FULL_BUDGET
from embcompress.bench.sweep import IMPOSSIBLE, RESULTS


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (0 for one value)."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Statistic:
        numbers = list(values)
        deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        return cls(statistics.fmean(numbers), deviation, len(numbers))

    def text(self, digits: int = 4) -> str:
        """``0.7816 ± 0.0010``."""
        if self.count == 1:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.deviation:.{digits}f}"


@dataclass(frozen=True)
class Cell:
    """One method at one budget on one click log, over its seeds.

    Attributes:
        smallest_bytes: None, or the smallest possible budget where this one is impossible.
    """

    data: str
    method: str
    budget: str
    bytes: int = 0
    dense_bytes: int = 0
    auc: Statistic | None = None
    logloss: Statistic | None = None
    single_epoch_auc: Statistic | None = None
    examples_per_second: Statistic | None = None
    smallest_bytes: int | None = None

    @property
    def share(self) -> float:
        """Bytes over the dense float32 bytes."""
        return self.bytes / self.dense_bytes


@dataclass(frozen=True)
class Summary:
    """All cells of one click log."""

    data: str
    cells: tuple[Cell, ...]
    dense_bytes: int
    teacher_auc: float | None

    @property
    def methods(self) -> list[str]:
        """In order of first appearance, ``full`` first."""
        names = list(dict.fromkeys(cell.method for cell in self.cells))
        return sorted(names, key=lambda name: name != "full")

    @property
    def budgets(self) -> list[str]:
        """In order of first appearance, without the full table's."""
        budgets = dict.fromkeys(cell.budget for cell in self.cells if cell.method != "full")
        return list(budgets)

    @property
    def full(self) -> Cell | None:
        return self.find("full", FULL_BUDGET)

    def find(self, method: str, budget: str) -> Cell | None:
        """The cell, if there is one."""
        for cell in self.cells:
            if (cell.method, cell.budget) == (method, budget):
                return cell
        return None

    def best(self, budget: str) -> str | None:
        """The method with the best mean AUC at a budget."""
        tried = [c for c in self.cells if c.budget == budget and c.auc and c.method != "full"]
        return max(tried, key=lambda c: c.auc.mean).method if tried else None  # type: ignore[union-attr]


def _cell(records: list[Record]) -> Cell:
    first = records[0]
    if "smallest_bytes" in first:
        smallest = max(record["smallest_bytes"] for record in records)
        return Cell(first["data"], first["method"], first["budget"], smallest_bytes=smallest)
    return Cell(
        first["data"],
        first["method"],
        first["budget"],
        bytes=max(record["bytes"] for record in records),
        dense_bytes=first["dense_bytes"],
        auc=Statistic.of(record["auc"] for record in records),
        logloss=Statistic.of(record["logloss"] for record in records),
        single_epoch_auc=Statistic.of(record["single_epoch"]["auc"] for record in records),
        examples_per_second=Statistic.of(record["examples_per_second"] for record in records),
    )


def load_records(directory: Path) -> list[Record]:
    """Results and impossible runs of a sweep's directory.

    Raises:
        FileNotFoundError: there are none.
    """
    if not (directory / RESULTS).exists():
        raise FileNotFoundError(f"no {RESULTS} in {directory}")
    return [*RecordFile(directory / RESULTS), *RecordFile(directory / IMPOSSIBLE)]


def summarize(records: Iterable[Record]) -> list[Summary]:
    """One summary for each click log."""
    groups: dict[str, dict[tuple[str, str], list[Record]]] = {}
    for record in records:
        cells = groups.setdefault(record["data"], {})
        cells.setdefault((record["method"], record["budget"]), []).append(record)
    summaries = []
    for data, cells in groups.items():
        finished = [r for part in cells.values() for r in part if "auc" in r]
        if not finished:
            continue
        summaries.append(
            Summary(
                data,
                tuple(_cell(part) for part in cells.values()),
                finished[0]["dense_bytes"],
                finished[0].get("teacher_auc"),
            )
        )
    return summaries
