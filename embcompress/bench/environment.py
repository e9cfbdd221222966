"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


@cache
def processor_name() -> str:
    """The CPU's name as the system knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def environment() -> dict[str, Any]:
    """Versions and hardware, for records and reports."""

    try:
        own = version("embcompress")
    except PackageNotFoundError:
        own = "not installed"
    return {
        "versions": {
            "embcompress": own,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "hardware": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }
