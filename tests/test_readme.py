"""The README is true: its example runs, its tables are those of the registry and the records."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import embcompress as ec
from embcompress.bench.summary import load_records, summarize
from embcompress.bench.tables import markdown_lead, markdown_results
from embcompress.text_table import markdown_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def between(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, re.S)
    assert found is not None
    return found[1]


def test_the_method_table_is_the_registry() -> None:
    rows = [(f"`{name}`", text) for name, text in ec.methods().items()]
    assert between("methods") == markdown_table(("method", "what it does"), rows)


@pytest.mark.parametrize("part", ["", "-all"])
def test_the_results_are_the_committed_records(part: str) -> None:
    (summary,) = summarize(load_records(ROOT / "docs" / "results" / f"movielens-100k{part}"))
    assert between(f"results{part}") == markdown_results(summary)


def test_the_planner_s_table_is_the_committed_records() -> None:
    text = (ROOT / "docs" / "planner.md").read_text()
    found = re.search(r"<!-- planner -->\n(.*?)\n<!-- /planner -->", text, re.S)
    assert found is not None
    links = dict.fromkeys(re.findall(r"\[[^]]*\]\(([^)]*)\)", found[1]))
    summaries = {}
    for link in links:
        (summary,) = summarize(load_records((ROOT / "docs" / link).parent))
        title = re.search(rf"\[[^]]*\]\({re.escape(link)}\)", found[1])
        assert title is not None
        summaries[title[0]] = summary
    assert found[1] == markdown_lead(summaries, "auto")


def test_the_example_runs(capsys: object) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    namespace: dict[str, object] = {}
    exec(code[1], namespace)
    table = namespace["table"]
    assert isinstance(table, ec.EmbeddingBag)
    assert f"# {ec.memory(table).total} bytes" in code[1]
