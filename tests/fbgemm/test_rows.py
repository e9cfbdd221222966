"""FBGEMM's row formats: the bytes of its operators, written from tables and read back."""

from __future__ import annotations

import pytest
import torch

import embcompress as ec
from embcompress.fbgemm import dequantize_rows, export_rows, import_rows, quantize_rows


def _vectors(seed: int, width: int = 16) -> torch.Tensor:
    torch.manual_seed(seed)
    vectors = torch.randn(300, width) * 10.0 ** (seed - 3)
    vectors[0], vectors[1] = 0, 3.25
    vectors[2] = 1e-9 * torch.randn(width)
    vectors[3] = 1e-6 * torch.randn(width)
    return vectors


@pytest.mark.parametrize("seed", range(6))
def test_bytes_are_those_of_the_operators(seed: int) -> None:
    pytest.importorskip("fbgemm_gpu")
    vectors = _vectors(seed)
    operators = torch.ops.fbgemm
    assert torch.equal(
        quantize_rows(vectors, 8), operators.FloatToFused8BitRowwiseQuantized(vectors)
    )
    for bits in (4, 2):
        expected = operators.FloatToFusedNBitRowwiseQuantizedSBHalf(vectors, bits)
        assert torch.equal(quantize_rows(vectors, bits), expected)
        values = operators.FusedNBitRowwiseQuantizedSBHalfToFloat(expected, bits)
        assert torch.equal(dequantize_rows(expected, bits), values)
    rows = quantize_rows(vectors, 8)
    values = operators.Fused8BitRowwiseQuantizedToFloat(rows)  # with a fused multiply-add
    apart = (dequantize_rows(rows, 8) - values).abs().amax(1)
    assert (apart <= 2e-7 * vectors.abs().amax(1)).all()


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_numbers_are_within_half_a_step(bits: int) -> None:
    vectors = _vectors(3, width=8)
    rows = quantize_rows(vectors, bits)
    assert rows.dtype == torch.uint8
    assert rows.shape == (300, 8 * bits // 8 + {16: 0, 8: 8}.get(bits, 4))
    apart = (dequantize_rows(rows, bits) - vectors).abs().amax(1)
    spread = vectors.amax(1) - vectors.amin(1)
    if bits == 16:
        assert torch.equal(dequantize_rows(rows, bits), vectors.half().float())
    else:
        # And what the format adds: 1e-8 to the spread of 8 bits; else scale and bias in float16.
        slack = 2e-8 if bits == 8 else 1e-6 + 2e-3 * vectors.abs().amax(1)
        assert (apart <= spread / (2**bits - 1) / 2 * 1.001 + slack).all()


@pytest.mark.parametrize("method", sorted(set(ec.methods()) - {"full"}))
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_any_table_is_exported_row_by_row(method: str, bits: int) -> None:
    table = ec.deploy(ec.Embedding(500, 16, method=method, budget="60%"))
    rows = export_rows(table, bits)
    assert torch.equal(rows, quantize_rows(table.to_dense(), bits))
    assert torch.equal(import_rows(rows, bits).to_dense().float(), dequantize_rows(rows, bits))


@pytest.mark.parametrize("scale", ["row", "table"])
@pytest.mark.parametrize("method", [ec.Int8, ec.Int4])
def test_tables_with_scales_by_row_keep_their_codes(method: type[ec.Method], scale: str) -> None:
    torch.manual_seed(0)
    table = ec.deploy(ec.Embedding(70, 8, method=method(scale=scale)))
    rows = export_rows(table, method.bits)
    tolerance = {"rtol": 0, "atol": 1e-7} if method is ec.Int8 else {"rtol": 2e-3, "atol": 4e-3}
    torch.testing.assert_close(dequantize_rows(rows, method.bits), table.to_dense(), **tolerance)
    again = import_rows(rows, method.bits)
    assert again.plan.store("weight").bytes == table.plan.store("weight").bytes
    assert torch.equal(again.weight, table.weight)


def test_imported_rows_are_pooled_by_another_module_of_their_plan() -> None:
    rows = quantize_rows(_vectors(3), 8)
    table = import_rows(rows, 8)
    bags = ec.EmbeddingBag.from_plan(table.plan.with_pool("sum"), deployed=True)
    bags.load_state_dict(table.state_dict())
    ids = torch.tensor([[0, 5, 299]])
    expected = dequantize_rows(rows, 8)[ids[0]].sum(0, keepdim=True)
    torch.testing.assert_close(bags(ids), expected)


def test_wrong_rows_are_errors() -> None:
    table = ec.Embedding(10, 6)
    with pytest.raises(ValueError, match="bits must be one of"):
        export_rows(table, 3)
    with pytest.raises(ValueError, match="do not end with a byte"):
        export_rows(table, 2)
    with pytest.raises(ValueError, match="finite"):
        quantize_rows(torch.tensor([[float("nan"), 1.0]]), 8)
    with pytest.raises(ValueError, match="uint8"):
        dequantize_rows(torch.zeros(3, 8, dtype=torch.uint8), 8)
    with pytest.raises(ValueError, match="float16"):
        dequantize_rows(torch.zeros(3, 5, dtype=torch.uint8), 16)
