"""Records of a benchmark: as lines on the screen, as JSON, as a picture."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measure import Spread, interleave, other_load, speedup

from embcompress.bench.environment import environment
from embcompress.plan import LookupPlan
from embcompress.text_table import text_table

OURS, COMPOSED = "embcompress", "torch ops"
FULL, FBGEMM = "nn.EmbeddingBag", "FBGEMM TBE"
#: Okabe and Ito's palette.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Setting:
    """One workload: which table, how it is asked."""

    table: str
    width: int
    distribution: str
    bag_length: int
    batch_size: int

    def __str__(self) -> str:
        return (
            f"width {self.width}, {self.bag_length} a bag, batch {self.batch_size:,}, "
            f"{self.distribution}"
        )


@dataclass(frozen=True)
class Contestant:
    """One implementation: ``run`` takes an input of the setting.

    Attributes:
        bytes: bytes touched by one call, or None where that is not modelled.
    """

    implementation: str
    run: Callable[[Any], Any]
    method: str | None = None
    budget: str | None = None
    bytes: float | None = None
    plan: LookupPlan | None = None

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.implementation, self.method, self.budget) if part)


@dataclass
class Benchmark:
    """Collects records; every setting is printed and saved as soon as it is measured."""

    directory: Path
    bandwidths: dict[str, Any] | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    load_before: float = field(default_factory=other_load)

    def measure(
        self,
        setting: Setting,
        contestants: Sequence[Contestant],
        make_inputs: Callable[[], Sequence[Any]],
        rounds: int,
        lookups: int,
    ) -> None:
        """Time all contestants of a setting.

        Args:
            lookups: ids that one call looks up.
        """
        by_name = {c.name: c for c in contestants}
        seconds = interleave({n: c.run for n, c in by_name.items()}, make_inputs, rounds)
        records = []
        for name, contestant in by_name.items():
            spread = Spread.of(seconds[name])
            record = {
                **asdict(setting),
                "implementation": contestant.implementation,
                "method": contestant.method,
                "budget": contestant.budget,
                "table_bytes": contestant.plan.bytes if contestant.plan else None,
                "rounds": rounds,
                "seconds": spread.as_dict(),
                "lookups_per_second": lookups / spread.median,
                "speedups": {
                    label: speedup(seconds, name, baseline).as_dict()
                    for label, baseline in self._baselines(contestant, by_name).items()
                },
                **self._bandwidth(contestant, setting, spread.median),
            }
            records.append(record)
        self.records += records
        print(f"\n{setting.table}: {setting}", flush=True)
        print(table_of(records), flush=True)
        self.save()

    @staticmethod
    def _baselines(contestant: Contestant, by_name: dict[str, Contestant]) -> dict[str, str]:
        """Whom a contestant is compared with: the full tables, and its own composition."""
        found = {}
        for name, other in by_name.items():
            if other is contestant:
                continue
            same = (other.method, other.budget) == (contestant.method, contestant.budget)
            if other.method is None or (other.implementation == COMPOSED and same):
                found[other.implementation] = name
        return found

    def _bandwidth(
        self, contestant: Contestant, setting: Setting, seconds: float
    ) -> dict[str, float]:
        if contestant.bytes is None or self.bandwidths is None:
            return {}
        achieved = contestant.bytes / seconds
        return {
            "bytes_touched": contestant.bytes,
            "bytes_per_second": achieved,
            "fraction_of_copy": achieved / self.bandwidths["copy"],
            "fraction_of_gather": achieved / self.bandwidths["gather"][setting.width],
        }

    def save(self) -> None:
        """Write results.json, whole or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        content = {
            "command": " ".join(["python", *sys.argv]),
            **environment(),
            "load_before": self.load_before,
            "bandwidths": self.bandwidths,
            "results": self.records,
        }
        path = self.directory / "results.json"
        aside = path.with_suffix(".json.new")
        aside.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(aside, path)

    def finish(self, title: str) -> None:
        """Draw the picture and say where everything is."""
        self.save()
        if self.records:
            draw(self.records, title, self.directory / "speedups.png")
            print(f"\nwritten: {self.directory / 'results.json'}, speedups.png")


def _times(spread: dict[str, float] | None) -> str:
    if spread is None:
        return ""
    median, lower, upper = (_number(spread[key]) for key in ("median", "lower", "upper"))
    return f"{median} ({lower}-{upper})"


def _number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Medians and quartiles of one setting."""
    has_bytes = all("bytes_per_second" in record for record in records)
    header = ["implementation", "method", "budget", "ms", "M lookups/s"]
    baselines = [
        name for name in (FULL, FBGEMM, COMPOSED) if any(name in r["speedups"] for r in records)
    ]
    header += [f"x {name}" for name in baselines]
    header += ["GB/s", "of copy", "of gather"] if has_bytes else []
    rows = []
    for record in records:
        row = [record["implementation"], record["method"] or "", record["budget"] or ""]
        row += [_times({k: 1e3 * v for k, v in record["seconds"].items()})]
        row += [_number(record["lookups_per_second"] / 1e6)]
        row += [_times(record["speedups"].get(name)) for name in baselines]
        if has_bytes:
            row += [f"{record['bytes_per_second'] / 1e9:.1f}"]
            row += [f"{record[key]:.0%}" for key in ("fraction_of_copy", "fraction_of_gather")]
        rows.append(row)
    return text_table(header, rows)


def draw(records: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Speed-ups over the full nn.EmbeddingBag: a panel a table and budget, a line a setting."""
    from matplotlib.figure import Figure

    compared = [record for record in records if FULL in record["speedups"]]
    budgets = list(dict.fromkeys(r["budget"] for r in compared if r["budget"] is not None))
    tables = list(dict.fromkeys(record["table"] for record in compared))
    lines = {
        table: list(dict.fromkeys(_line(r) for r in compared if r["table"] == table))
        for table in tables
    }
    heights = [0.45 * len(lines[table]) + 0.8 for table in tables]
    figure = Figure(figsize=(3.5 + 4.5 * len(budgets), 1.5 + sum(heights)), layout="constrained")
    grid = figure.subplots(
        len(tables), len(budgets), squeeze=False, sharey="row", height_ratios=heights
    )
    styles = _styles(compared)
    for row, table in enumerate(tables):
        for axes, budget in zip(grid[row], budgets, strict=True):
            here = [r for r in compared if r["table"] == table and r["budget"] in (None, budget)]
            _draw_panel(axes, here, lines[table], styles)
            axes.set_title(f"{table}, budget {budget}", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("times as fast as the full nn.EmbeddingBag (median, quartiles)", fontsize=9)
    legend = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        legend.update(zip(labels, handles, strict=True))
    figure.legend(
        legend.values(), legend, loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    figure.suptitle(title, fontsize=11)
    aside = path.with_suffix(".new.png")
    figure.savefig(aside, dpi=130)
    os.replace(aside, path)


def _line(record: dict[str, Any]) -> str:
    names = ("table", "width", "distribution", "bag_length", "batch_size")
    return str(Setting(*(record[name] for name in names)))


def _series(record: dict[str, Any]) -> str:
    method = record["method"]
    return record["implementation"] if method is None else f"{method}, {record['implementation']}"


def _styles(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Looks of every series: color by method, a filled circle where it is ours."""
    methods = list(dict.fromkeys(r["method"] for r in records if r["method"] is not None))
    greys = iter(("#7F7F7F", "#BBBBBB", "#444444"))
    styles: dict[str, dict[str, Any]] = {}
    for record in records:
        if _series(record) in styles:
            continue
        ours = record["implementation"] == OURS
        by_method = record["method"] is not None
        color = _COLORS[methods.index(record["method"]) % 6] if by_method else next(greys)
        styles[_series(record)] = {"color": color, "marker": "o" if ours else "x"}
    return styles


def _draw_panel(
    axes: Any,
    records: Sequence[dict[str, Any]],
    lines: Sequence[str],
    styles: dict[str, dict[str, Any]],
) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    for number, (series, style) in enumerate(styles.items()):
        points = [record for record in records if _series(record) == series]
        if not points:
            continue
        spreads = [point["speedups"][FULL] for point in points]
        shift = 0.8 * ((number + 0.5) / len(styles) - 0.5)  # side by side within a line
        axes.errorbar(
            [spread["median"] for spread in spreads],
            [lines.index(_line(point)) + shift for point in points],
            xerr=[
                [spread["median"] - spread["lower"] for spread in spreads],
                [spread["upper"] - spread["median"] for spread in spreads],
            ],
            label=series,
            linestyle="none",
            elinewidth=1,
            capsize=1.5,
            markersize=4,
            **style,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    # Within a factor of five the 1, 2, 5 of a logarithmic axis are too few.
    axes.xaxis.set_major_locator(
        MaxNLocator(8, steps=[1, 2, 5, 10]) if high < 5 * low else LogLocator(subs=(1, 2, 5))
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=8)
    axes.set_yticks(range(len(lines)), lines, fontsize=8)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.grid(alpha=0.3, axis="x")
    for line in range(1, len(lines)):
        axes.axhline(line - 0.5, color="#DDDDDD", linewidth=0.8)
