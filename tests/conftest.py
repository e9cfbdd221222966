"""Fixtures that several folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real click logs; tests that need it are skipped where it is missing."""
    path = Path(os.environ.get("EMBCOMPRESS_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data in {path} (set EMBCOMPRESS_DATA)")
    return path
