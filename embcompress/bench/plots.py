"""Pictures of a sweep: quality against bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from embcompress.bench.summary import Cell, Summary
from embcompress.budget import parse_budget

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe and Ito's palette, distinguishable by most colour-blind readers.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7F7F7F")
_MARKERS = "osD^vPX*"
#: What chooses among ways to compress is drawn so that it can be told from them.
_PLANNER = "auto"
_METRICS = {"auc": "test AUC (higher is better)", "logloss": "test log-loss (lower is better)"}


def budget_figure(summary: Summary, metric: str) -> Figure:
    """Quality against the share of the dense bytes, on a log axis; bars are ± one deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for number, method in enumerate(name for name in summary.methods if name != "full"):
        cells = [c for c in summary.cells if c.method == method and c.auc is not None]
        _draw(axes, sorted(cells, key=lambda c: c.bytes), metric, method, number)
    if summary.full is not None:
        value = getattr(summary.full, metric)
        axes.axhline(value.mean, color="black", linewidth=1, linestyle="--", label="full (100%)")
        axes.axhspan(
            value.mean - value.deviation, value.mean + value.deviation, color="black", alpha=0.08
        )
    axes.set_xscale("log")
    _budget_ticks(axes, summary)
    axes.set_xlabel("bytes of all tables, share of the dense float32 tables")
    axes.set_ylabel(_METRICS[metric])
    axes.set_title(f"{summary.title}  ({summary.dense_bytes:,} dense bytes)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _budget_ticks(axes: Any, summary: Summary) -> None:
    """One tick a budget, labelled with it, and nothing between."""
    from matplotlib.ticker import NullLocator

    shares = {
        budget: parse_budget(budget, summary.dense_bytes) / summary.dense_bytes
        for budget in summary.budgets
    }
    axes.set_xticks(list(shares.values()), list(shares))
    axes.xaxis.set_minor_locator(NullLocator())


def _draw(axes: Any, cells: list[Cell], metric: str, method: str, number: int) -> None:
    values = [getattr(cell, metric) for cell in cells]
    axes.errorbar(
        [cell.share for cell in cells],
        [value.mean for value in values],
        yerr=[value.deviation for value in values],
        label=method,
        linewidth=3.0 if method == _PLANNER else 1.8,
        zorder=3 if method == _PLANNER else 2,
        markersize=6,
        color="#000000" if method == _PLANNER else _COLORS[number % len(_COLORS)],
        marker=_MARKERS[number % len(_MARKERS)],
        linestyle="-" if number < len(_COLORS) else ":",
        capsize=3,
    )


def save_plots(summary: Summary, directory: Path, stem: str) -> list[Path]:
    """Write a PNG for each metric; returns their paths."""
    paths = []
    for metric in _METRICS:
        path = directory / f"{stem}{metric}.png"
        budget_figure(summary, metric).savefig(path, dpi=130)
        paths.append(path)
    return paths
