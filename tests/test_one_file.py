"""A method is one file: a class of twenty lines is known everywhere with no other edit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOY = '''
from dataclasses import dataclass
from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import Digit, LookupPlan, Probe, Store

@register
@dataclass(frozen=True)
class Toy(Method):
    """A toy, E[x mod m]: ids share rows by their remainder.

    Memory: m·d numbers.
    """
    name = "toy"

    def sizes(self, table: TableSpec) -> range:
        return range(1, table.num_embeddings + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        store = Store("weight", size, table.embedding_dim, table.dtype)
        probe = Probe("weight", Digit(1, size))
        return LookupPlan(table.num_embeddings, table.embedding_dim, (store,), (probe,))
'''
#: Test files that run over the registry.
GENERIC = ("test_budget.py", "test_modules.py", "test_collection.py", "test_surgery.py",
           "test_optimizers.py")  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file; nothing of it is in this process."""
    directory = tmp_path_factory.mktemp("toy")
    (directory / "toy_method.py").write_text(TOY)
    return directory


def run(toy: Path, *command: str) -> str:
    paths = os.pathsep.join([str(toy), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def command_line(toy: Path, *arguments: str) -> str:
    return run(toy, "-c", "import toy_method; from embcompress.commands import app; app()",
               *arguments)  # fmt: skip


def test_it_is_listed_and_in_the_table_of_the_documentation(toy: Path) -> None:
    listed = run(toy, "-c", "import toy_method, embcompress; print(embcompress.methods()['toy'])")
    assert listed.strip() == "A toy, E[x mod m]: ids share rows by their remainder."
    table = command_line(toy, "methods", "--markdown")
    assert f"| `toy` | {listed.strip()} |  |" in table.splitlines()


def test_the_sweep_and_its_report_have_it(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = command_line(
        toy, "sweep", "--data", "synthetic:rows=800,ids=100,features=2", "--methods", "hash,toy",
        "--budgets", "20%", "--seeds", "0", "--epochs", "1", "--learning-rates", "0.03",
        "--out", str(out), "--cache", str(tmp_path / "cache"),
    )  # fmt: skip
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    (record,) = [record for record in records if record["method"] == "toy"]
    assert record["bytes"] <= record["budget_bytes"] and "toy" in printed
    assert "<td>toy</td>" in (out / "report.html").read_text()


def test_the_generic_tests_run_over_it(toy: Path) -> None:
    files = [str(ROOT / "tests" / name) for name in GENERIC]
    output = run(toy, "-m", "pytest", "-p", "toy_method", "-p", "no:cacheprovider", "-k", "toy",
                 "-m", "not slow", *files)  # fmt: skip
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None and int(passed[1]) >= 20, output
