"""Pictures of a sweep: quality against bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from embcompress.bench.comparison import BASELINE, rankings
from embcompress.bench.summary import Cell, Summary
from embcompress.budget import parse_budget

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe and Ito's palette, distinguishable by most colour-blind readers.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7F7F7F")
_MARKERS = "osD^vPX*"
#: What chooses among ways to compress is drawn so that it can be told from them.
_PLANNER = "auto"
#: Of more methods than there are pairs of a colour and a line style, only the best get colours.
_MOST_LINES = 2 * len(_COLORS)
_METRICS = {"auc": "test AUC (higher is better)", "logloss": "test log-loss (lower is better)"}


def budget_figure(summary: Summary, metric: str) -> Figure:
    """Quality against the share of the dense bytes, on a log axis; bars are ± one deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    methods = [name for name in summary.methods if name != "full"]
    if len(methods) > _MOST_LINES:
        methods = _leaders(summary)
        figure.set_size_inches(10, 6)
        _draw_crowd(axes, summary, metric, methods)
    for number, method in enumerate(methods):
        _draw(axes, _finished_cells(summary, method), metric, method, number)
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
    model = summary.training["model"]
    axes.set_title(f"{summary.title}, {model}  ({summary.dense_bytes:,} dense bytes)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _finished_cells(summary: Summary, method: str) -> list[Cell]:
    cells = [c for c in summary.cells if c.method == method and c.auc is not None]
    return sorted(cells, key=lambda cell: cell.bytes)


def _leaders(summary: Summary) -> list[str]:
    """The methods worth a colour among many: the best of every budget, and by mean rank."""
    ranked = [ranking.method for ranking in rankings(summary)]
    best = [summary.best(budget) for budget in summary.budgets]
    wanted = [m for m in (*best, _PLANNER, BASELINE, *ranked) if m in ranked]
    chosen = list(dict.fromkeys(wanted))[: len(_COLORS)]
    return sorted(chosen, key=ranked.index)


def _draw_crowd(axes: Any, summary: Summary, metric: str, leaders: list[str]) -> None:
    """The others as thin grey lines, and the best of all at every budget as a broad band."""
    others = [m for m in summary.methods if m != "full" and m not in leaders]
    for number, method in enumerate(others):
        cells = _finished_cells(summary, method)
        axes.plot(
            [cell.share for cell in cells],
            [getattr(cell, metric).mean for cell in cells],
            color="#BBBBBB",
            linewidth=0.9,
            marker=".",
            markersize=3,
            zorder=1,
            label=f"{len(others)} others" if number == 0 else None,
        )
    best = [(summary.best(budget, metric), budget) for budget in summary.budgets]
    found = [summary.find(name, budget) for name, budget in best if name is not None]
    tops = [cell for cell in found if cell is not None]
    axes.plot(
        [cell.share for cell in tops],
        [getattr(cell, metric).mean for cell in tops],
        color="#F0E442",
        alpha=0.6,
        linewidth=9,
        zorder=0,
        solid_capstyle="round",
        label="best at each budget",
    )


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
    has_files = any(cell.offloaded_bytes for cell in cells)
    axes.errorbar(
        [cell.share for cell in cells],
        [value.mean for value in values],
        yerr=[value.deviation for value in values],
        label=f"{method} + files" if has_files else method,
        linewidth=3.0 if method == _PLANNER else 1.8,
        zorder=3 if method == _PLANNER else 2,
        markersize=6,
        color="#000000" if method == _PLANNER else _COLORS[number % len(_COLORS)],
        marker=_MARKERS[number % len(_MARKERS)],
        linestyle="-" if number < len(_COLORS) else ":",
        capsize=3,
    )


def time_figure(summary: Summary) -> Figure | None:
    """AUC over a prequential run, a panel a budget; None where no run has one."""
    from matplotlib.figure import Figure

    drawn = [cell for cell in summary.cells if any(cell.auc_over_time)]
    budgets = [b for b in summary.budgets if any(cell.budget == b for cell in drawn)]
    if not budgets:
        return None
    figure = Figure(figsize=(8.2, 1.2 + 3.2 * len(budgets)), layout="constrained")
    panels = figure.subplots(len(budgets), 1, sharex=True, squeeze=False)[:, 0]
    others = [name for name in summary.methods if name != "full"]
    for axes, budget in zip(panels, budgets, strict=True):
        for cell in drawn:
            if cell.budget == budget or cell.method == "full":
                _draw_over_time(axes, cell, others)
        axes.set_title(f"{summary.title}, {budget} of the bytes", fontsize=10)
        axes.set_ylabel("AUC before training")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    panels[-1].set_xlabel("share of the rows seen, in time order")
    return figure


def _draw_over_time(axes: Any, cell: Cell, others: list[str]) -> None:
    count = len(cell.auc_over_time)
    middles = [(number + 0.5) / count for number in range(count)]
    values = [float("nan") if auc is None else auc for auc in cell.auc_over_time]
    if cell.method == "full":
        axes.plot(middles, values, color="black", linewidth=1, linestyle="--", label="full (100%)")
        return
    number = others.index(cell.method)
    axes.plot(
        middles,
        values,
        label=cell.method,
        linewidth=1.8,
        color=_COLORS[number % len(_COLORS)],
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4,
        linestyle="-" if number < len(_COLORS) else ":",
    )


def save_plots(summary: Summary, directory: Path, stem: str) -> list[Path]:
    """Write a PNG for each metric, and of a prequential run one over time; returns their paths."""
    paths = []
    for metric in _METRICS:
        path = directory / f"{stem}{metric}.png"
        budget_figure(summary, metric).savefig(path, dpi=130)
        paths.append(path)
    over_time = time_figure(summary)
    if over_time is not None:
        paths.append(directory / f"{stem}over_time.png")
        over_time.savefig(paths[-1], dpi=130)
    return paths
