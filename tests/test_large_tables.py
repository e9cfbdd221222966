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


_TRAIN_PACKED = """
import sys, time, torch, embcompress as ec
rows, budget = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
bags = ec.EmbeddingBag(rows, 16, mode="sum", method=ec.LowBit(width=1, bits=4), budget=budget)
ec.fuse_optimizer(bags, "rowwise_adagrad", lr=0.05)
ids = torch.randint(0, rows, (4096, 3))
wanted = torch.randn(4096, 1) @ torch.randn(1, 16)  # what one column can learn
losses = []
for step in range(200):
    loss = (bags(ids) - wanted).square().mean()
    loss.backward()
    losses.append(loss.item())
print(losses[0], losses[-1])
trained = ec.memory(bags)
expected = bags(ids).detach()
ec.deploy(bags)
assert torch.allclose(bags(ids), expected, atol=1e-5)
print(trained.total, trained.training, ec.memory(bags).total)
"""


@pytest.mark.slow
def test_a_hundred_million_ids_of_four_bits_can_be_trained() -> None:
    """6.4 GB dense, 50 MB deployed; training holds a float latent and its optimizer state an id."""
    rows, budget = 100_000_000, 50_000_100
    peak, (losses, sizes), _ = measure_peak(_TRAIN_PACKED, str(rows), str(budget))
    first, last = map(float, losses.split())
    total, training, deployed = map(int, sizes.split())
    print(f"deployed {deployed:,}, training {training:,} more, peak {peak:,} bytes")
    assert deployed == total <= budget
    assert last < 0.2 * first
    assert peak < 2 * 4 * rows + 600e6
