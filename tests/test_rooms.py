"""The rooms of docs/architecture.md: every file is in one, and imports from those above alone."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "embcompress"


@functools.cache
def rooms() -> dict[str, int]:
    """What the first column of the table names -> the row it is in."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("## The rooms")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name: at for at, row in enumerate(rows) for name in re.findall(r"`([^`]+)`", row)}


def room_of(path: Path) -> int | None:
    """The row that names the file, or else the folder it is in."""
    known = rooms()
    relative = path.relative_to(PACKAGE)
    return known.get(str(relative), known.get(f"{relative.parts[0]}/"))


def imported(path: Path) -> Iterator[Path]:
    """Files of the package that are imported together with this one."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("embcompress"):
            target = ROOT.joinpath(*(node.module or "").split("."))
            if not target.is_dir():
                yield target.with_suffix(".py")
                continue
            for alias in node.names:
                module = target / f"{alias.name}.py"
                yield module if module.exists() else target / "__init__.py"


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_up_the_list_of_rooms(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        pytest.skip("the public names, from all rooms")
    room = room_of(path)
    assert room is not None, f"{path.name} is in no room of docs/architecture.md"
    below = [str(other.relative_to(ROOT)) for other in imported(path) if room_of(other) > room]
    assert not below, f"imports what is further down the list: {', '.join(below)}"


def test_every_room_exists() -> None:
    missing = [
        name for name in rooms() if not (PACKAGE / name).exists() and not (ROOT / name).exists()
    ]
    assert not missing
