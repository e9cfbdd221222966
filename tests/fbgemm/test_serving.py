"""Lookups by FBGEMM's quantized kernel give what the engine gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.fbgemm import BatchedLookup

pytest.importorskip("fbgemm_gpu")

ROWS, WIDTH = 800, 12
METHODS = [
    "full", "hash", "multihash", "pq", "low_dim", "low_bit", "int8", "int4", "mixed_dim", "pruned",
    "unified", ec.QuotientRemainder("concat"), ec.QuotientRemainder("sum"),
    ec.Int4(scale="table"), ec.LowBit(bits=1), ec.LowBit(width=3, bits=2),
    ec.LowBit(width=5, bits=4),
]  # fmt: skip


def _bags(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.randint(0, 6, (20,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(0, ROWS, (int(offsets[-1]),), generator=generator)
    return ids, offsets, torch.rand(len(ids), generator=generator)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_sum_of_rows(method: str | ec.Method, mode: str) -> None:
    torch.manual_seed(0)
    table = ec.EmbeddingBag(
        ROWS, WIDTH, mode=mode, method=method, include_last_offset=True, padding_idx=7
    )
    ec.deploy(table)
    served = BatchedLookup(table)
    ids, offsets, weights = _bags(torch.Generator().manual_seed(1))
    ids[::5] = 7
    torch.testing.assert_close(served(ids, offsets), table(ids, offsets), rtol=1e-5, atol=1e-5)
    if mode == "sum":
        expected = table(ids, offsets, weights)
        torch.testing.assert_close(served(ids, offsets, weights), expected, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="mode='sum'"):
            served(ids, offsets, weights)
    grid = torch.arange(12).view(3, 4)
    torch.testing.assert_close(served(grid), table(grid), rtol=1e-5, atol=1e-5)
    with pytest.raises(IndexError, match=str(ROWS)):
        served(torch.tensor([[ROWS]]))


def test_scales_by_row_are_float16() -> None:
    torch.manual_seed(0)
    table = ec.deploy(ec.EmbeddingBag(ROWS, WIDTH, mode="sum", method=ec.Int8(scale="row")))
    ids = torch.arange(40).view(10, 4)
    torch.testing.assert_close(BatchedLookup(table)(ids), table(ids), rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("method", ["hash", "unified", "low_bit"])
def test_collections_are_one_call(method: str) -> None:
    torch.manual_seed(0)
    tables = [
        ec.TableConfig("users", ROWS, 8, ("user", "friend")),
        ec.TableConfig("articles", 5000, 12, mode="mean"),
        ec.TableConfig("countries", 40, 4),
    ]
    collection = ec.deploy(ec.EmbeddingBagCollection(tables, method=method, budget="30%"))
    served = BatchedLookup(collection)
    batch = 6
    lengths = torch.randint(0, 4, (4, batch))
    ends = zip((ROWS, ROWS, 5000, 40), lengths, strict=True)
    ids = torch.cat([torch.randint(0, rows, (int(own.sum()),)) for rows, own in ends])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.reshape(-1).cumsum(0)])
    expected = collection(ids, offsets)
    torch.testing.assert_close(served(ids, offsets), expected, rtol=1e-5, atol=1e-5)
    assert served(ids[:0], offsets[:1]).shape == (0, expected.shape[1])
    with pytest.raises(ValueError, match="4 features"):
        served(ids, torch.cat([offsets, offsets[-1:]]))


def test_what_the_kernel_cannot_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="sums rows"):
        BatchedLookup(ec.EmbeddingBag(ROWS, WIDTH, mode="sum", method="qr"))
    with pytest.raises(ValueError, match="sums rows"):
        BatchedLookup(ec.EmbeddingBag(ROWS, WIDTH, mode="max", method="hash"))
    with pytest.raises(ValueError, match="deploy"):
        BatchedLookup(ec.EmbeddingBag(ROWS, WIDTH, mode="sum", method="int8"))
    with pytest.raises(ValueError, match="codes of 16 bits"):
        BatchedLookup(ec.deploy(ec.EmbeddingBag(ROWS, WIDTH, mode="sum", method="int16")))
    with pytest.raises(ValueError, match="bfloat16"):
        BatchedLookup(ec.EmbeddingBag(ROWS, WIDTH, mode="sum", dtype=torch.bfloat16))
