"""Tables that nobody could hold: creating, training and saving them takes what the budget says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.peak_memory import measure_peak

ROWS, WIDTH, BUDGET = 20_000_000, 64, 0.01  # 5 GB dense
_TRAIN = f"""
import sys, torch, embcompress as ec
method, path = sys.argv[1:]
torch.manual_seed(0)
bags = ec.EmbeddingBag({ROWS}, {WIDTH}, mode="sum", method=method, budget={BUDGET})
ec.fuse_optimizer(bags, "rowwise_adagrad", lr=0.1)
for _ in range(100):
    bags(torch.randint(0, {ROWS}, (512, 3))).square().mean().backward()
torch.save(bags.state_dict(), path)
print(ec.memory(bags).total)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["multihash", "unified", "qr", "mixed_dim"])
def test_a_table_of_five_gigabytes_at_one_percent(method: str, tmp_path: Path) -> None:
    budget = int(ROWS * WIDTH * 4 * BUDGET)
    peak, (total,), _ = measure_peak(_TRAIN, method, str(tmp_path / "table.pt"))
    assert int(total) <= budget
    print(f"{method}: budget {budget:,}, peak {peak:,} bytes")
    assert peak < 4 * budget + 500e6
