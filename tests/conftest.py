"""Fixtures that several folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same generated cases on every run, so that a failure is that of a change. With
# HYPOTHESIS_PROFILE=search, other ones each time.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Tests that draw from torch's generator draw the same numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real click logs; tests that need it are skipped where it is missing."""
    path = Path(os.environ.get("EMBCOMPRESS_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data in {path} (set EMBCOMPRESS_DATA)")
    return path
