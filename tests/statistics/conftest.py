"""A click log that several tests count."""

from __future__ import annotations

import pytest

from embcompress.data import ClickLog, load_click_log
from tests.statistics.logs import SPEC


@pytest.fixture(scope="package")
def log(tmp_path_factory: pytest.TempPathFactory) -> ClickLog:
    return load_click_log(SPEC, cache=tmp_path_factory.mktemp("cache"), progress=False)
