"""The report of a sweep: a table in the terminal, Markdown, PNG files and one HTML page."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shlex
from dataclasses import asdict
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

from embcompress.bench.plots import save_plots
from embcompress.bench.records import Record
from embcompress.bench.settings import TrainingSettings, jsonable
from embcompress.bench.summary import Cell, Summary, load_records, summarize
from embcompress.text_table import markdown_table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } 
th, td { padding: .3rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left } thead { border-bottom: 2px solid #444 }
tr:nth-child(even) td { background: #f4f4f4 } img { max-width: 100% } .best { font-weight: bold }
.small { color: #666; font-size: 13px }
"""


def _cell_text(cell: Cell | None, summary: Summary, metric: str) -> str:
    if cell is None:
        return "–"
    if cell.auc is None:
        assert cell.smallest_bytes is not None
        return f"needs {percent_at_least(cell.smallest_bytes, summary.dense_bytes)}%"
    return getattr(cell, metric).text()


def percent_at_least(count: int, dense_bytes: int) -> str:
    """The percentage in two digits, rounded up: a budget written so can be met."""
    percent = Decimal(100 * count) / dense_bytes
    rounded = percent.quantize(Decimal((0, (1,), percent.adjusted() - 1)), ROUND_CEILING)
    text = f"{rounded:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


_NAMES = {
    "auc": "test AUC",
    "logloss": "test log-loss",
    "single_epoch_auc": "test AUC, one epoch",
}


def table_rows(
    summary: Summary, metric: str = "auc"
) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Header, and rows of (text, is best of its column): a metric by method and budget.

    Args:
        metric: ``"auc"``, ``"logloss"`` or ``"single_epoch_auc"``.
    """
    budgets = summary.budgets
    rows = []
    for method in summary.methods:
        if method == "full":
            continue
        cells = [
            (
                _cell_text(summary.find(method, budget), summary, metric),
                summary.best(budget, metric) == method,
            )
            for budget in budgets
        ]
        rows.append([(method, False), *cells])
    if summary.full is not None:
        text = _cell_text(summary.full, summary, metric)
        rows.insert(0, [("full (100%)", False), *[(text, False)] * len(budgets)])
    return [_NAMES[metric], *budgets], rows


def markdown_results(summary: Summary) -> str:
    """The table in Markdown, the best of each budget in bold."""
    header, rows = table_rows(summary)
    texts = [[f"**{text}**" if best else text for text, best in row] for row in rows]
    return markdown_table(header, texts)


def print_tables(summaries: list[Summary]) -> None:
    """Print every table to the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for summary in summaries:
        header, rows = table_rows(summary)
        title = f"\n{summary.title}: {summary.dense_bytes:,} dense bytes"
        if summary.teacher_auc is not None:
            title += f", the teacher's own AUC is {summary.teacher_auc:.4f}"
        console.print(title, highlight=False, markup=False)
        table = Table()
        for number, name in enumerate(header):
            table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(f"[bold]{text}[/bold]" if best else text for text, best in row))
        console.print(table)


def _html_table(header: list[str], rows: list[list[tuple[str, bool]]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="best">{html.escape(text)}</td>'
            if best
            else f"<td>{html.escape(text)}</td>"
            for text, best in row
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _details(summary: Summary) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    header = [
        "method", "budget", "bytes", "share", "AUC", "log-loss", "AUC, one epoch", "examples/s",
    ]  # fmt: skip
    rows = []
    for cell in summary.cells:
        if cell.auc is None or cell.logloss is None or cell.single_epoch_auc is None:
            continue
        assert cell.examples_per_second is not None
        texts = [
            cell.method, cell.budget, f"{cell.bytes:,}", f"{cell.share:.3%}", cell.auc.text(),
            cell.logloss.text(), cell.single_epoch_auc.text(),
            f"{cell.examples_per_second.mean:,.0f}",
        ]  # fmt: skip
        rows.append([(text, False) for text in texts])
    return header, rows


#: Options of the command line by the setting that they set.
_OPTIONS = {
    "model": "--model",
    "split": "--split",
    "embedding_dim": "--embedding-dim",
    "epochs": "--epochs",
    "batch_size": "--batch-size",
    "learning_rates": "--learning-rates",
    "validation": "--validation",
    "test": "--test",
}


def sweep_command(records: list[Record], directory: Path) -> str:
    """The command that makes these records (of one summary), read off their keys."""
    keys = [json.loads(record["key"]) for record in records]
    methods, seeds = (list(dict.fromkeys(key[name] for key in keys)) for name in ("method", "seed"))
    budgets = list(dict.fromkeys(key["budget"] for key in keys if key["method"] != "full"))
    parts = ["embcompress", "sweep", "--data", keys[0]["data"], "--methods", ",".join(methods)]
    if budgets:
        parts += ["--budgets", ",".join(budgets)]
    parts += ["--seeds", ",".join(map(str, sorted(seeds)))]
    default = jsonable(asdict(TrainingSettings()))
    for name, value in keys[0]["training"].items():
        if name in _OPTIONS and value != default[name]:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            parts += [_OPTIONS[name], text]
    return shlex.join([*parts, "--out", str(directory)])


def _section(summary: Summary, plots: list[Path]) -> str:
    images = "".join(
        f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for path in plots
    )
    ceiling = (
        ""
        if summary.teacher_auc is None
        else f"<p>The noise ceiling, the teacher's own AUC: {summary.teacher_auc:.4f}.</p>"
    )
    return (
        f"<h2>{html.escape(summary.title)}</h2>{ceiling}"
        f"{''.join(_html_table(*table_rows(summary, metric)) for metric in _NAMES)}"
        f"{images}<h3>Every cell</h3>{_html_table(*_details(summary))}"
    )


def _environment_text(record: Record) -> str:
    hardware: dict[str, Any] = record["hardware"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    engine = f"{record['engine']} engine; " if "engine" in record else ""
    return (
        f"{hardware['processor']}, {hardware['threads']} threads of {hardware['cores']} cores; "
        f"{engine}{versions}; last run {record['date']}"
    )


def _commands(records: list[Record], directory: Path) -> list[str]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        key = json.loads(record["key"])
        groups.setdefault(json.dumps([key["data"], key["training"]]), []).append(record)
    return [sweep_command(group, directory) for group in groups.values()]


def write_report(directory: Path, command: str = "") -> list[Summary]:
    """Write ``report.html`` and PNG files from the records in a directory.

    Args:
        directory: of a sweep.
        command: the command that made it, to be shown; read off the records where it is empty.

    Returns:
        What the report shows.

    Raises:
        FileNotFoundError: there are no records.
    """
    records = load_records(directory)
    summaries = summarize(records)
    sections = []
    for summary in summaries:
        stem = "" if len(summaries) == 1 else re.sub(r"\W+", "-", summary.title).strip("-") + "-"
        sections.append(_section(summary, save_plots(summary, directory, stem)))
    finished = [record for record in records if "auc" in record]
    commands = [command] if command else _commands(records, directory)
    shown = "".join(f"<p><code>{html.escape(text)}</code></p>" for text in commands)
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Memory-budget sweep</title>"
        f"<style>{_STYLE}</style><h1>Memory-budget sweep</h1>{shown}"
        "<p>Mean ± sample deviation over seeds; learning rate and epoch are chosen on validation "
        "rows. Bytes are all that is resident at lookup time, read off the storages.</p>"
        f"{''.join(sections)}<p class=small>"
        f"{html.escape(_environment_text(finished[-1])) if finished else ''}</p></html>"
    )
    aside = directory / "report.html.tmp"
    aside.write_text(page)
    os.replace(aside, directory / "report.html")
    return summaries
