"""The report of a sweep: a table in the terminal, Markdown, PNG files and one HTML page."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embcompress.bench.plots import save_plots
from embcompress.bench.records import FAILED, Record
from embcompress.bench.settings import TrainingSettings, jsonable
from embcompress.bench.summary import Summary, load_records, summarize
from embcompress.bench.tables import (
    NAMES,
    Table,
    details_table,
    difference_table,
    failure_table,
    ranking_table,
    table_rows,
)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } 
th, td { padding: .3rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left }
thead { border-bottom: 2px solid #444; position: sticky; top: 0; background: #fff }
tr:nth-child(even) td { background: #f4f4f4 } img { max-width: 100% } .best { font-weight: bold }
.small { color: #666; font-size: 13px }
"""


_PRINTED_COLUMNS = 200


def print_tables(summaries: list[Summary]) -> None:
    """Print every table to the terminal."""
    from rich.console import Console
    from rich.table import Table

    # What is written to a file is not cut at the width of a terminal that is not there.
    console = Console(width=None if sys.stdout.isatty() else _PRINTED_COLUMNS)
    for summary in summaries:
        header, rows = table_rows(summary)
        title = f"\n{summary.title}: {summary.description}; {summary.dense_bytes:,} dense bytes"
        if summary.teacher_auc is not None:
            title += f", the teacher's own AUC is {summary.teacher_auc:.4f}"
        console.print(title, highlight=False, markup=False)
        table = Table()
        for number, name in enumerate(header):
            table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(f"[bold]{text}[/bold]" if best else text for text, best in row))
        console.print(table)


def print_failures(records: list[Record]) -> None:
    """Say on standard error which runs failed, and why."""
    for record in records:
        assert record["status"] == FAILED
        place = f"{record['method']} at {record['budget']}, seed {record['seed']}"
        print(f"failed: {place} ({record['data']}): {record['error']}", file=sys.stderr)


def _html_table(table: Table, *, few: bool = False) -> str:
    """A table; ``few``: left out where it has no rows."""
    header, rows = table
    if few and not rows:
        return ""
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


_RANKS = (
    "<p>The mean place over the budgets, by test AUC. Methods that cannot meet a budget, or failed "
    "there, share its last places. AUC lost is the mean over the budgets that were met.</p>"
)
_DIFFERENCES = (
    "<p>Mean over seeds of the difference at the same budget, and p of the paired t-test "
    "(two-sided, not corrected for the number of comparisons). With three seeds the test has two "
    "degrees of freedom: a large p says little, and one comparison in twenty of equal methods has "
    "p &lt; 0.05.</p>"
)
_COSTS = (
    "<p>Bytes in training come on top of those at lookup: the most after any epoch of full tables "
    "of a search, latents, optimizer state and tensors of procedures. The time of lookups is a "
    "median over rounds in which full tables take turns; the last column is the ratio.</p>"
)


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
    quality = "".join(_html_table(table_rows(summary, metric, with_bytes=True)) for metric in NAMES)
    return (
        f"<h2>{html.escape(summary.title)}</h2><p>{html.escape(summary.description)}; "
        f"{summary.dense_bytes:,} bytes of dense tables.</p>{ceiling}"
        f"<h3>Ranks</h3>{_RANKS}{_html_table(ranking_table(summary))}"
        f"<h3>Quality</h3>{quality}{images}"
        f"<h3>Against plain hashing</h3>{_DIFFERENCES}{_html_table(difference_table(summary))}"
        f"<h3>Every cell</h3>{_COSTS}{_html_table(details_table(summary))}"
    )


def _environment_lines(records: list[Record]) -> list[str]:
    """Where the runs were made: a line for each machine and each set of versions."""
    dates: dict[str, list[str]] = {}
    for record in records:
        dates.setdefault(_environment_text(record), []).append(record["date"])
    return [
        f"{len(runs)} run{'s' if len(runs) > 1 else ''} on {where}; last run {max(runs)}"
        for where, runs in dates.items()
    ]


def _environment_text(record: Record) -> str:
    hardware: dict[str, Any] = record["hardware"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    engine = f"{record['engine']} engine; " if "engine" in record else ""
    return (
        f"{hardware['processor']}, {hardware['threads']} threads of {hardware['cores']} cores; "
        f"{engine}{versions}"
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
    environments = _environment_lines([record for record in records if "auc" in record])
    failures = _html_table(failure_table(records), few=True)
    commands = [command] if command else _commands(records, directory)
    shown = "".join(f"<p><code>{html.escape(text)}</code></p>" for text in commands)
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Memory-budget sweep</title>"
        f"<style>{_STYLE}</style><h1>Memory-budget sweep</h1>{shown}"
        "<p>Mean ± sample deviation over seeds; learning rate and epoch are chosen on validation "
        "rows. Bytes are all that is resident at lookup time, read off the storages.</p>"
        f"{failures}{''.join(sections)}"
        f"{''.join(f'<p class=small>{html.escape(line)}' for line in environments)}</html>"
    )
    aside = directory / "report.html.tmp"
    aside.write_text(page)
    os.replace(aside, directory / "report.html")
    return summaries
