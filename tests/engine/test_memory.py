"""Peak memory of a training step: stores, output and gradients, and little beside them.

Linux alone: the kernel's high-water mark of a fresh process is reset before the step.
"""

from __future__ import annotations

import json
import os
import sys

import pytest

from embcompress.engine import ops
from tests.peak_memory import measure_peak

#: One case of each kind is quick enough for every run.
slow = pytest.mark.slow
pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
    pytest.mark.skipif(
        "EMBCOMPRESS_LIBRARY" in os.environ,
        reason="sanitizers and emulations take memory themselves",
    ),
    pytest.mark.skipif(
        not ops.is_available(),
        reason="the C++ extension is not built, or EMBCOMPRESS_ENGINE=reference is set",
    ),
]

#: 65,536 bags of 20 ids over a table of 2 GiB, compressed to a tenth.
STEP = """
import json, sys
from pathlib import Path
import torch
import embcompress as ec
from embcompress.engine.rows import address_rows

def status(field):
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


method, mode, sparse, optimizer = sys.argv[1:]
rows, width, batch, length = 8_000_000, 64, 65_536, 20
torch.manual_seed(0)
torch.set_num_threads(2)
table = ec.EmbeddingBag(
    rows, width, mode=mode, method=method, budget="10%", sparse=sparse == "sparse"
)
if optimizer != "none":
    ec.fuse_optimizer(table, optimizer, lr=0.1)
    for state in table.buffers():
        state.fill_(0)  # zeros are no memory before they are written
ids = torch.randint(0, rows, (batch * length,))
offsets = torch.arange(batch) * length
first = table(ids[:640], offsets[:32])
first.backward(torch.ones_like(first))  # threads and code: torch imports some for a given gradient
table.zero_grad(set_to_none=True)
gradient = torch.ones(batch, width)
resident = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
output = table(ids, offsets)
output.backward(gradient)
above = status("VmHWM") - resident
touched = sum(
    address_rows(probe.address, ids, table.plan, table.stores())[0].unique().numel() * width * 4
    for probe in table.plan.probes
)
stores = sum(store.nbytes for store in table.stores().values())
print(json.dumps([above, stores, output.nbytes, touched]))
"""


def measure(method: str, mode: str, gradients: str, optimizer: str) -> tuple[int, int, int, int]:
    """Bytes above those before the step, of the stores, the output, and the touched rows."""
    _, lines, _ = measure_peak(STEP, method, mode, gradients, optimizer)
    above, stores, output, touched = json.loads(lines[-1])
    return above, stores, output, touched


#: What the ids are grouped by: a key and the number of a bag for each.
BYTES_AN_ID = 8 + 4
IDS = 65_536 * 20


@pytest.mark.parametrize(
    ("method", "mode"),
    [
        pytest.param("hash", "sum", marks=slow),
        pytest.param("qr", "sum", marks=slow),
        ("qr", "mean"),
    ],
)
def test_dense_gradients(method: str, mode: str) -> None:
    """Nothing is expanded: the gradient is written where it stays."""
    above, stores, output, _ = measure(method, mode, "dense", "none")
    gradients = stores
    assert above >= 0.9 * (output + gradients)  # the measurement sees them at all
    assert stores + above <= 1.1 * (stores + output + gradients)


@pytest.mark.parametrize("method", ["hash", pytest.param("qr", marks=slow)])
def test_sparse_gradients(method: str) -> None:
    """The touched rows exist once, in order."""
    above, stores, output, touched = measure(method, "sum", "sparse", "none")
    assert above >= 0.9 * (output + touched)
    assert stores + above <= 1.1 * (stores + output + touched)


@pytest.mark.parametrize("method", ["qr", pytest.param("hash", marks=slow)])
@pytest.mark.parametrize(
    "optimizer",
    ["rowwise_adagrad", *(pytest.param(n, marks=slow) for n in ("sgd", "adagrad", "adam"))],
)
def test_fused_updates(method: str, optimizer: str) -> None:
    """Neither the gradient of the store nor that of all touched rows ever exists."""
    above, _, output, touched = measure(method, "sum", "dense", optimizer)
    assert output <= above <= 1.1 * (output + IDS * BYTES_AN_ID)
    assert above < 0.5 * touched
