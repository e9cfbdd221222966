"""Results of some MiB are written past the caches: bit by bit what small batches give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.engine import ops

BATCH, PIECE, ROWS = 20_001, 1_000, 30_000
LARGE = range(4 << 20, 32 << 20)  # bytes of results that are written so (csrc/cpu/output.h)

pytestmark = pytest.mark.skipif(not ops.is_available(), reason="the C++ extension is not built")


def random_ids(*shape: int) -> Tensor:
    return torch.randint(ROWS, shape, generator=torch.Generator().manual_seed(1))


def pieces(count: int) -> list[slice]:
    return [slice(first, first + PIECE) for first in range(0, count, PIECE)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [64, 72, 128])  # rows of 72 end within a line
@pytest.mark.parametrize("method", ["hash", "qr", "multihash", "cce", "pq", "low_bit"])
def test_one_table(method: str, width: int, weighted: bool) -> None:
    bag = ec.EmbeddingBag(ROWS, width, mode="sum", method=method, budget="20%", padding_idx=5)
    ec.deploy(bag)
    ids, starts, weights = random_ids(BATCH), torch.arange(BATCH), torch.rand(BATCH)

    def look_up(part: slice) -> Tensor:
        some = weights[part] if weighted else None
        return bag(ids[part], starts[: len(ids[part])], per_sample_weights=some)

    with torch.no_grad():
        result = look_up(slice(None))
        assert result.nbytes in LARGE
        assert torch.equal(result, torch.cat([look_up(part) for part in pieces(BATCH)]))


@pytest.mark.parametrize(
    "widths", [(16, 32, 64), (16, 8, 24)], ids=["whole lines", "parts of lines"]
)
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("method", ["qr", "low_bit"])
def test_collection(method: str, widths: tuple[int, ...], length: int) -> None:
    configs = [ec.TableConfig(f"t{i}x{width}", ROWS, width) for i in range(2) for width in widths]
    tables = ec.EmbeddingBagCollection(configs, method=method, budget="20%")
    ec.deploy(tables)
    ids = random_ids(len(configs), BATCH, length)

    def look_up(part: slice) -> Tensor:
        some = ids[:, part]
        offsets = torch.arange(0, some.numel() + 1, length)
        return tables(some.reshape(-1), offsets)

    with torch.no_grad():
        result = look_up(slice(None))
        assert result.nbytes in LARGE
        assert torch.equal(result, torch.cat([look_up(part) for part in pieces(BATCH)]))


def test_an_id_outside_is_an_error() -> None:
    bag = ec.EmbeddingBag(ROWS, 64, method="hash", budget="20%")
    ids = random_ids(BATCH)
    ids[-1] = ROWS
    with pytest.raises(IndexError, match=str(ROWS)):
        bag(ids, torch.arange(BATCH))
