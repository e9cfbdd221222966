"""Records of a sweep, averaged over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from embcompress.bench.records import FAILED, Record, RecordDirectory
from embcompress.bench.settings import FULL_BUDGET
from embcompress.budget import parse_budget


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (0 for one value); infinite where a run diverged."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Statistic:
        given = list(values)
        numbers = [value for value in given if value is not None]
        if len(numbers) < len(given):
            return cls(math.inf, 0.0, len(given))
        deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        return cls(statistics.fmean(numbers), deviation, len(numbers))

    def text(self, digits: int = 4) -> str:
        """``0.7816 ± 0.0010``."""
        if math.isinf(self.mean):
            return "diverged"
        if self.count == 1:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.deviation:.{digits}f}"


@dataclass(frozen=True)
class Cell:
    """One method at one budget on one click log, over its seeds.

    Attributes:
        bytes: resident at lookup, the most of any seed.
        offloaded_bytes: in files beside them.
        auc, logloss: of test rows after the best epoch; None where no run is finished.
        single_epoch_auc: after the first epoch.
        auc_by_seed: the AUC of each finished run.
        training_bytes, train_seconds, examples_per_second: of training.
        lookup_microseconds: for 1,000 lookups of the deployed tables.
        lookup_ratio: that over the time of full tables, measured in turn with them.
        auc_over_time: of a prequential run, mean AUC of equal parts of all rows in time order; None
            where a part has one label.
        smallest_bytes: None, or the smallest possible budget where this one is impossible.
        failed: number of runs that ended in an error.
    """

    data: str
    method: str
    budget: str
    bytes: int = 0
    dense_bytes: int = 0
    auc: Statistic | None = None
    logloss: Statistic | None = None
    single_epoch_auc: Statistic | None = None
    auc_by_seed: Mapping[int, float] = field(default_factory=dict)
    offloaded_bytes: int = 0
    training_bytes: int | None = None
    train_seconds: Statistic | None = None
    examples_per_second: Statistic | None = None
    lookup_microseconds: Statistic | None = None
    lookup_ratio: Statistic | None = None
    auc_over_time: tuple[float | None, ...] = ()
    smallest_bytes: int | None = None
    failed: int = 0

    @property
    def share(self) -> float:
        """Bytes over the dense float32 bytes."""
        return self.bytes / self.dense_bytes


@dataclass(frozen=True)
class Summary:
    """All cells of one click log, trained with one set of settings.

    Attributes:
        training: the settings of all its runs, as their keys have them.
        differing: settings in which it differs from other summaries of the same click log.
    """

    data: str
    cells: tuple[Cell, ...]
    dense_bytes: int
    teacher_auc: float | None
    training: Mapping[str, Any] = field(default_factory=dict)
    differing: tuple[tuple[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """The click log, and what tells this summary from others of it."""
        return ", ".join([self.data, *(f"{name} {value}" for name, value in self.differing)])

    @property
    def description(self) -> str:
        """The model and how it was trained, in a few words."""
        t = self.training
        return (
            f"model {t['model']}, width {t['embedding_dim']}, {t['split']} split, at most "
            f"{t['epochs']} epochs, batches of {t['batch_size']}, learning rates "
            f"{', '.join(map(str, t['learning_rates']))}"
        )

    @property
    def methods(self) -> list[str]:
        """In order of first appearance, ``full`` first."""
        names = list(dict.fromkeys(cell.method for cell in self.cells))
        return sorted(names, key=lambda name: name != "full")

    @property
    def budgets(self) -> list[str]:
        """Largest first, without the full table's."""
        budgets = dict.fromkeys(cell.budget for cell in self.cells if cell.method != "full")
        return sorted(budgets, key=lambda budget: -parse_budget(budget, self.dense_bytes))

    @property
    def full(self) -> Cell | None:
        return self.find("full", FULL_BUDGET)

    def find(self, method: str, budget: str) -> Cell | None:
        """The cell, if there is one."""
        for cell in self.cells:
            if (cell.method, cell.budget) == (method, budget):
                return cell
        return None

    def best(self, budget: str, metric: str = "auc") -> str | None:
        """The method with the best mean at a budget: the lowest log-loss, the highest of others.

        Of those that have no more bytes in files.
        """
        tried = [c for c in self.cells if c.budget == budget and c.auc and c.method != "full"]
        tried = [cell for cell in tried if not cell.offloaded_bytes]
        sign = -1 if metric == "logloss" else 1
        key = {cell.method: sign * getattr(cell, metric).mean for cell in tried}
        return max(key, key=key.__getitem__) if key else None


def _cell(records: list[Record]) -> Cell:
    first = records[0]
    finished = [record for record in records if "auc" in record]
    failed = sum(record.get("status") == FAILED for record in records)
    cell = Cell(first["data"], first["method"], first["budget"], failed=failed)
    if not finished:
        smallest = [r["smallest_bytes"] for r in records if "smallest_bytes" in r]
        return replace(cell, smallest_bytes=max(smallest, default=None))
    return replace(
        cell,
        bytes=max(record["bytes"] for record in finished),
        dense_bytes=finished[0]["dense_bytes"],
        auc=Statistic.of(record["auc"] for record in finished),
        logloss=Statistic.of(record["logloss"] for record in finished),
        single_epoch_auc=Statistic.of(record["single_epoch"]["auc"] for record in finished),
        auc_by_seed={record["seed"]: record["auc"] for record in finished},
        auc_over_time=_over_time(finished),
        **_costs(finished),
    )


def _costs(records: list[Record]) -> dict[str, Any]:
    """Bytes and times; records of earlier versions lack some of them."""
    times = [r for r in records if r.get("full_lookup_microseconds")]
    ratios = [r["lookup_microseconds"] / r["full_lookup_microseconds"] for r in times]

    def statistic(name: str) -> Statistic | None:
        values = [record[name] for record in records if name in record]
        return Statistic.of(values) if values else None

    return {
        "offloaded_bytes": max(r.get("offloaded_bytes", 0) for r in records),
        "training_bytes": max(
            (r["training_bytes"] for r in records if "training_bytes" in r), default=None
        ),
        "train_seconds": statistic("train_seconds"),
        "examples_per_second": statistic("examples_per_second"),
        "lookup_microseconds": statistic("lookup_microseconds"),
        "lookup_ratio": Statistic.of(ratios) if ratios else None,
    }


def _over_time(records: list[Record]) -> tuple[float | None, ...]:
    """Means over the seeds, part by part."""
    every = [record.get("auc_over_time", []) for record in records]
    if len({len(each) for each in every}) != 1:  # some are of an older version
        return ()
    parts = [[each for each in part if each is not None] for part in zip(*every, strict=True)]
    return tuple(statistics.fmean(part) if part else None for part in parts)


def load_records(directory: Path) -> list[Record]:
    """Finished, impossible and failed runs of a sweep's directory.

    Raises:
        FileNotFoundError: there are none.
    """
    records = RecordDirectory(directory, read_only=True).all()
    if not records:
        raise FileNotFoundError(f"no results of a sweep in {directory}")
    return records


def _training(record: Record) -> dict[str, Any]:
    """The training settings of a record: what it was run with, as its key has them."""
    settings: dict[str, Any] = json.loads(record["key"])["training"]
    return settings


def summarize(records: Iterable[Record]) -> list[Summary]:
    """One summary for each click log and set of training settings: nothing else may be averaged."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        settings = json.dumps(_training(record), sort_keys=True)
        groups.setdefault((record["data"], settings), []).append(record)
    summaries = []
    for (data, _), group in groups.items():
        finished = [record for record in group if "auc" in record]
        if not finished:
            continue
        cells: dict[tuple[str, str], list[Record]] = {}
        for record in group:
            cells.setdefault((record["method"], record["budget"]), []).append(record)
        others = [_training(part[0]) for (name, _), part in groups.items() if name == data]
        summaries.append(
            Summary(
                data,
                tuple(_cell(part) for part in cells.values()),
                finished[0]["dense_bytes"],
                finished[0].get("teacher_auc"),
                _training(finished[0]),
                _differing(_training(finished[0]), others),
            )
        )
    return summaries


def _differing(
    settings: dict[str, Any], others: Iterable[dict[str, Any]]
) -> tuple[tuple[str, Any], ...]:
    others = list(others)
    return tuple(
        (name, value)
        for name, value in settings.items()
        if any(other.get(name) != value for other in others)
    )
