"""The tables of a sweep's report, as texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Decimal

from embcompress.bench.comparison import BASELINE, difference, rankings
from embcompress.bench.records import FAILED, Record
from embcompress.bench.summary import Cell, Statistic, Summary
from embcompress.budget import format_bytes
from embcompress.text_table import markdown_table

#: Header, and rows of (text, is best of its column).
Table = tuple[list[str], list[list[tuple[str, bool]]]]

NAMES = {
    "auc": "test AUC",
    "logloss": "test log-loss",
    "single_epoch_auc": "test AUC, one epoch",
}


def plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table without a best of anything."""
    return list(header), [[(text, False) for text in row] for row in rows]


def percent_at_least(count: int, dense_bytes: int) -> str:
    """The percentage in two digits, rounded up: a budget written so can be met."""
    percent = Decimal(100 * count) / dense_bytes
    rounded = percent.quantize(Decimal((0, (1,), percent.adjusted() - 1)), ROUND_CEILING)
    text = f"{rounded:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _cell_text(cell: Cell | None, summary: Summary, metric: str, *, with_bytes: bool) -> str:
    if cell is None:
        return "–"
    if cell.auc is not None:
        some_failed = f" ({cell.failed} failed)" if cell.failed else ""
        in_files = f" + {format_bytes(cell.offloaded_bytes)} in files"
        beside = in_files if cell.offloaded_bytes else ""
        return getattr(cell, metric).text() + beside + some_failed
    if cell.smallest_bytes is None:
        return "failed"
    share = percent_at_least(cell.smallest_bytes, summary.dense_bytes)
    return f"≥ {share} % ({cell.smallest_bytes:,} bytes)" if with_bytes else f"needs {share}%"


def table_rows(summary: Summary, metric: str = "auc", *, with_bytes: bool = False) -> Table:
    """A metric by method and budget, the method of the best mean rank first.

    Args:
        metric: ``"auc"``, ``"logloss"`` or ``"single_epoch_auc"``.
        with_bytes: whether an impossible budget shows the smallest possible bytes.
    """
    rows = []
    for method in [ranking.method for ranking in rankings(summary)]:
        cells = [
            (
                _cell_text(summary.find(method, budget), summary, metric, with_bytes=with_bytes),
                summary.best(budget, metric) == method,
            )
            for budget in summary.budgets
        ]
        rows.append([(method, False), *cells])
    if summary.full is not None:
        text = _cell_text(summary.full, summary, metric, with_bytes=with_bytes)
        rows.insert(0, [("full (100%)", False), *[(text, False)] * len(summary.budgets)])
    return [NAMES[metric], *summary.budgets], rows


def markdown_results(summary: Summary) -> str:
    """The table of AUC in Markdown, the best of each budget in bold."""
    header, rows = table_rows(summary)
    texts = [[f"**{text}**" if best else text for text, best in row] for row in rows]
    return markdown_table(header, texts)


def markdown_lead(summaries: Mapping[str, Summary], method: str) -> str:
    """One method against the best other one at each budget, and hashing, in Markdown.

    Leads have the standard error of the differences over the seeds, where both have the same.

    Args:
        summaries: by what the first column says of each.
        method: whose AUC is compared; the best other one is chosen afterwards, by its test AUC, of
            those that have no more bytes in files.
    """
    header = [
        "click log",
        "budget",
        "full",
        method,
        "lost",
        "best other method",
        "ahead by",
        "hash",
    ]
    rows = []
    for name, summary in summaries.items():
        for budget in summary.budgets:
            means = {
                cell.method: cell.auc.mean
                for cell in summary.cells
                if cell.budget == budget and cell.auc is not None and not cell.offloaded_bytes
            }
            own, full = summary.find(method, budget), summary.full
            others = {other: mean for other, mean in means.items() if other != method}
            if own is None or own.auc is None or full is None or full.auc is None or not others:
                continue
            best = max(others, key=others.__getitem__)
            mean = own.auc.mean
            rows.append([
                name, budget, f"{full.auc.mean:.4f}", own.auc.text(),
                f"{full.auc.mean - mean:+.4f}", f"{best} {others[best]:.4f}",
                f"{mean - others[best]:+.4f}{_error_text(summary, method, budget, best)}",
                f"{means[BASELINE]:.4f}" if BASELINE in means else "–",
            ])  # fmt: skip
    return markdown_table(header, rows)


def _error_text(summary: Summary, method: str, budget: str, other: str) -> str:
    """The standard error of a lead, where both methods have the same seeds, two or more."""
    cells = [summary.find(each, budget) for each in (method, other)]
    paired = difference(summary, method, budget, other)
    if paired is None or paired.error is None:
        return ""
    is_whole = all(cell is not None and len(cell.auc_by_seed) == paired.seeds for cell in cells)
    return f" ± {paired.error:.4f}" if is_whole else ""


def ranking_table(summary: Summary) -> Table:
    """Mean rank, and what is lost against full tables."""
    rows = [
        [
            each.method,
            f"{each.rank:.1f}",
            "–" if each.loss is None else f"{each.loss:+.4f}",
            f"{each.met} of {each.budgets}",
        ]
        for each in rankings(summary)
    ]
    return plain(["method", "mean rank", "mean AUC lost against full", "budgets met"], rows)


def difference_table(summary: Summary) -> Table:
    """AUC gained over plain hashing at the same budget, with p-values."""
    rows = []
    for method in [ranking.method for ranking in rankings(summary)]:
        texts = [_difference_text(summary, method, budget) for budget in summary.budgets]
        if any(text != "–" for text in texts):
            rows.append([method, *texts])
    return plain([f"test AUC less that of {BASELINE}", *summary.budgets], rows)


def _difference_text(summary: Summary, method: str, budget: str) -> str:
    found = difference(summary, method, budget)
    if found is None:
        return "–"
    p_value = "" if found.p_value is None else f" (p = {found.p_value:.2g})"
    return f"{found.mean:+.4f}{p_value}"


def details_table(summary: Summary) -> Table:
    """Every finished cell with its costs, by budget and then by falling AUC."""
    header = [
        "method", "budget", "bytes", "share", "AUC", "log-loss", "AUC, one epoch",
        "in files", "more in training", "training, s", "examples/s", "µs for 1,000 lookups",
        "× full tables",
    ]  # fmt: skip
    order = {budget: place for place, budget in enumerate(summary.budgets)}
    finished = [(cell, cell.auc) for cell in summary.cells if cell.auc is not None]
    finished.sort(key=lambda pair: (order.get(pair[0].budget, -1), -pair[1].mean))
    return plain(header, [_details(cell) for cell, _ in finished])


def _details(cell: Cell) -> list[str]:
    def text(statistic: Statistic | None, digits: int = 4) -> str:
        return "–" if statistic is None else statistic.text(digits)

    def mean(statistic: Statistic | None, digits: int) -> str:
        return "–" if statistic is None else f"{statistic.mean:,.{digits}f}"

    training = "–" if cell.training_bytes is None else f"{cell.training_bytes:,}"
    return [
        cell.method, cell.budget, f"{cell.bytes:,}", f"{cell.share:.3%}", text(cell.auc),
        text(cell.logloss), text(cell.single_epoch_auc), f"{cell.offloaded_bytes:,}", training,
        mean(cell.train_seconds, 1), mean(cell.examples_per_second, 0),
        mean(cell.lookup_microseconds, 1), mean(cell.lookup_ratio, 2),
    ]  # fmt: skip


def failure_table(records: Sequence[Record]) -> Table:
    """Runs that ended in an error."""
    rows = [
        [r["method"], r["budget"], str(r["seed"]), r["data"], r["error"]]
        for r in records
        if r.get("status") == FAILED
    ]
    return plain(["failed", "budget", "seed", "data", "error"], rows)
