"""The README is true: its example runs, its tables are those of the registry and the records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import embcompress as ec
from embcompress.bench.summary import Summary, load_records, summarize
from embcompress.bench.tables import markdown_lead, markdown_results
from embcompress.text_table import markdown_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def between(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, re.S)
    assert found is not None
    return found[1]


def test_the_method_table_is_the_registry() -> None:
    rows = [
        (f"`{m}`", text, ec.resolve_method(m).procedure_kind) for m, text in ec.methods().items()
    ]
    assert between("methods") == markdown_table(("method", "what it does", "procedure"), rows)


@pytest.mark.parametrize("part", ["", "-all"])
def test_the_results_are_the_committed_records(part: str) -> None:
    (summary,) = summarize(load_records(ROOT / "docs" / "results" / f"movielens-100k{part}"))
    assert between(f"results{part}") == markdown_results(summary)


def ten_seeds(directory: Path) -> Summary:
    """The methods of a sweep that ran with five more seeds."""
    more = directory.with_name(f"{directory.name}-fresh-seeds")
    (summary,) = summarize([*load_records(directory), *load_records(more)])
    cells = tuple(cell for cell in summary.cells if len(cell.auc_by_seed) == 10)
    return replace(summary, cells=cells)


def all_records(directory: Path) -> Summary:
    (summary,) = summarize(load_records(directory))
    return summary


@pytest.mark.parametrize(("block", "read"), [("planner", all_records), ("ten-seeds", ten_seeds)])
def test_the_planner_s_tables_are_the_committed_records(
    block: str, read: Callable[[Path], Summary]
) -> None:
    text = (ROOT / "docs" / "planner.md").read_text()
    found = re.search(rf"<!-- {block} -->\n(.*?)\n<!-- /{block} -->", text, re.S)
    assert found is not None
    links = dict.fromkeys(re.findall(r"\[[^]]*\]\([^)]*\)", found[1]))
    summaries = {
        link: read((ROOT / "docs" / re.sub(r".*\((.*)\)", r"\1", link)).parent) for link in links
    }
    assert found[1] == markdown_lead(summaries, "auto")


SPEEDS = (
    ("lookup, width 16, one id a bag", "lookup", "8,000,000 rows", 16, 1),
    ("lookup, width 64, one id a bag", "lookup", "8,000,000 rows", 64, 1),
    ("lookup, width 64, 20 ids a bag", "lookup", "8,000,000 rows", 64, 20),
    (
        "lookup, 26 tables in one call, against 26 and `torch.cat`",
        "lookup",
        "26 tables of Criteo",
        16,
        1,
    ),
    ("training step, width 16, one id a bag", "train_step", "8,000,000 rows", 16, 1),
    ("training step, width 64, 20 ids a bag", "train_step", "8,000,000 rows", 64, 20),
)


def test_the_speeds_are_the_committed_records() -> None:
    methods = ("hash", "qr", "multihash")
    found = {}
    for kind in ("lookup", "train_step"):
        path = ROOT / "docs" / "results" / f"{kind}_epyc_avx512" / "results.json"
        for record in json.loads(path.read_text())["results"]:
            if record["implementation"] == "embcompress":
                fields = ("table", "width", "bag_length", "batch_size", "method")
                speed = record["speedups"]["nn.EmbeddingBag"]["median"]
                found[(kind, *(record[name] for name in fields))] = f"{speed:.1f}"
    rows = [
        (
            label,
            *(
                " / ".join(found[(*key, batch, name)] for batch in (2048, 16384))
                for name in methods
            ),
        )
        for label, *key in SPEEDS
    ]
    assert between("speed") == markdown_table(("", *(f"`{name}`" for name in methods)), rows)


def test_the_example_runs(capsys: object) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    namespace: dict[str, object] = {}
    exec(code[1], namespace)
    table = namespace["table"]
    assert isinstance(table, ec.EmbeddingBag)
    assert f"# {ec.memory(table).total} bytes" in code[1]
