"""Peak resident memory of a piece of code, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

# Not getrusage: its maximum is inherited from the process that starts this one.
_TAIL = """
import pathlib as _pathlib
_status = _pathlib.Path("/proc/self/status").read_text()
print(int(_status.split("VmHWM:")[1].split()[0]) * 1024)
"""


def measure_peak(code: str, *arguments: str) -> tuple[int, list[str], str]:
    """Run ``code``.

    Returns:
        Peak resident bytes, the lines that the code printed, and its standard error.
    """
    command = [sys.executable, "-c", code + _TAIL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, peak = done.stdout.splitlines()
    return int(peak), lines, done.stderr
