"""FBGEMM's row-wise quantized formats: written from tables and read back.

A row is its codes, low bits first, and behind them the scale and the bias of the row,
``value = scale * code + bias``: float32 each for 8 bits (``FloatToFused8BitRowwiseQuantized``),
float16 each for 4 and 2 bits (``FloatToFusedNBitRowwiseQuantizedSBHalf``). Rows of 16 bits are
float16 numbers. Source: FBGEMM's ``QuantUtils``, whose operators give the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embcompress.layouts.packing import pack_codes, unpack_codes
from embcompress.modules import Embedding
from embcompress.plan import Digit, LookupPlan, Probe, Quantization, Store
from embcompress.tables.compressed_table import CompressedTable

BITS = (16, 8, 4, 2)
_CHUNK_ROWS = 1 << 16


def _parameter_dtype(bits: int) -> torch.dtype:
    """Of the scale and bias of a row."""
    return torch.float32 if bits == 8 else torch.float16


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")


def _check_width(width: int, bits: int) -> None:
    if width * bits % 8:
        raise ValueError(
            f"rows of {width} numbers in {bits} bits do not end with a byte, as FBGEMM's do; "
            f"take a width that {8 // bits} divides, or more bits"
        )


def row_bytes(width: int, bits: int) -> int:
    """Bytes of a row of the format."""
    return width * bits // 8 + (0 if bits == 16 else 2 * _parameter_dtype(bits).itemsize)


def _join(codes: Tensor, scale: Tensor, bias: Tensor, bits: int) -> Tensor:
    """(N, bytes) uint8 rows from (N, width) codes and (N, 1) scales and biases."""
    packed = pack_codes(codes.reshape(-1), bits).view(len(codes), -1)
    parameters = torch.cat([scale, bias], dim=1).to(_parameter_dtype(bits))
    return torch.cat([packed, parameters.view(torch.uint8)], dim=1)


def _split(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(N, width) int64 codes and (N, 2) float32 scales and biases of rows."""
    _check_bits(bits)
    dtype = _parameter_dtype(bits)
    end = rows.shape[1] - 2 * dtype.itemsize if rows.dim() == 2 else 0
    if rows.dtype != torch.uint8 or end < 1:
        raise ValueError(
            f"rows must be (rows, bytes) uint8 with codes of {bits} bits and two {dtype} numbers, "
            f"got {tuple(rows.shape)} {rows.dtype}"
        )
    width = end * 8 // bits
    codes = unpack_codes(rows[:, :end].reshape(-1), 0, len(rows) * width, bits)
    return codes.view(-1, width), rows[:, end:].contiguous().view(dtype).float()


def quantize_rows(vectors: Tensor, bits: int) -> Tensor:
    """Quantize vectors, each between its least and its largest number.

    Args:
        vectors: (N, width) float, finite; ``width * bits`` is a multiple of 8.
        bits: 16, 8, 4 or 2.

    Returns:
        (N, bytes) uint8, the bytes of FBGEMM's operators.

    Raises:
        ValueError: other bits, a width that does not fill bytes, or NaN and infinite numbers.
    """
    _check_bits(bits)
    if vectors.dim() != 2 or not vectors.isfinite().all():
        raise ValueError("vectors must be (N, width) finite numbers")
    _check_width(vectors.shape[1], bits)
    vectors = vectors.detach().float()
    if bits == 16:
        return vectors.half().contiguous().view(torch.uint8)
    least, most = vectors.amin(1, keepdim=True), vectors.amax(1, keepdim=True)
    if bits == 8:
        spread = most - least
        inverse = 255.0 / (spread + 1e-8)  # FBGEMM's, also for rows of one number
        return _join(((vectors - least) * inverse).round().clamp(0, 255), spread / 255.0, least, 8)
    last = 2**bits - 1
    least = least.half().float()
    spread = most - least
    scale = torch.where(spread == 0, 1.0, spread / last).half().float()
    # A step too small for float16 has codes of zero.
    scale = torch.where((scale == 0) | (1.0 / scale).isinf(), 1.0, scale)
    inverse = 1.0 / scale
    return _join(((vectors - least) * inverse).round().clamp(0, last), scale, least, bits)


def dequantize_rows(rows: Tensor, bits: int) -> Tensor:
    """(N, width) float32 numbers of rows in FBGEMM's format.

    Args:
        rows: (N, bytes) uint8.
        bits: 16, 8, 4 or 2.

    Raises:
        ValueError: rows that cannot be of that format.
    """
    if bits == 16:
        if rows.dim() != 2 or rows.dtype != torch.uint8 or rows.shape[1] % 2:
            raise ValueError("rows of float16 must be (rows, 2 * width) uint8")
        return rows.contiguous().view(torch.float16).float()
    codes, parameters = _split(rows, bits)
    return codes * parameters[:, :1] + parameters[:, 1:]


@torch.no_grad()
def export_rows(table: CompressedTable, bits: int) -> Tensor:
    """A table's vectors as rows of FBGEMM's format, one an id.

    Rows that have a scale and a bias of their own in as many bits keep their codes (method
    ``int8`` or ``int4`` with ``scale="row"`` or ``"table"``); scales of 4 bits are rounded to
    float16, as the format has them. All other vectors are quantized, row by row.

    Args:
        table: any; it is read in chunks.
        bits: 16, 8, 4 or 2.

    Returns:
        (num_embeddings, bytes) uint8.

    Raises:
        ValueError: other bits, a width that does not fill bytes, or numbers that are not finite.
    """
    _check_bits(bits)
    _check_width(table.embedding_dim, bits)
    device = next(iter(table.stores().values())).device
    parts = []
    for first in range(0, table.num_embeddings, _CHUNK_ROWS):
        last = min(first + _CHUNK_ROWS, table.num_embeddings)
        if _keeps_codes(table, bits):
            parts.append(_own_rows(table, bits, first, last))
        else:
            vectors = table.vectors(torch.arange(first, last, device=device))
            parts.append(quantize_rows(vectors, bits))
    return torch.cat(parts)


def _keeps_codes(table: CompressedTable, bits: int) -> bool:
    """Whether the table's own packed rows are of the format but for where their scales are."""
    plan = table.plan
    if plan.head is not None or len(plan.probes) != 1:
        return False
    store = plan.store(plan.probes[0].store)
    names = store.quantization
    return (
        plan.probes == (Probe(store.name, Digit(1, store.rows)),)
        and names is not None
        and names.bias is not None
        and plan.store(names.scale).width == 1
        and store.bits == bits
        and store.name not in table.latents()
    )


def _own_rows(table: CompressedTable, bits: int, first: int, last: int) -> Tensor:
    store = table.plan.store(table.plan.probes[0].store)
    assert store.quantization is not None and store.quantization.bias is not None
    stores = table.stores()
    codes = unpack_codes(stores[store.name], first * store.width, last * store.width, bits)

    def part(name: str) -> Tensor:
        values = stores[name].float()
        return values.expand(last - first, 1) if len(values) == 1 else values[first:last]

    names = store.quantization
    assert names.bias is not None
    return _join(codes.view(-1, store.width), part(names.scale), part(names.bias), bits)


@torch.no_grad()
def import_rows(rows: Tensor, bits: int) -> Embedding:
    """A table that holds rows of FBGEMM's format, with the same vectors.

    Args:
        rows: (num_embeddings, bytes) uint8.
        bits: 16, 8, 4 or 2.

    Returns:
        An :class:`~embcompress.Embedding` of packed codes and of float32 scales and biases by row
        (16 bits: of float16 rows); another module of its plan and ``state_dict`` pools them.

    Raises:
        ValueError: rows that cannot be of that format.
    """
    if bits == 16:
        return Embedding.from_pretrained(dequantize_rows(rows, bits).half(), freeze=True)
    codes, parameters = _split(rows, bits)
    count, width = codes.shape
    plan = LookupPlan(
        count,
        width,
        stores=(
            Store("scale", count, 1),
            Store("bias", count, 1),
            Store("weight", count, width, f"uint{bits}", Quantization("scale", "bias")),
        ),
        probes=(Probe("weight", Digit(1, count)),),
    )
    table = Embedding.from_plan(plan, f"fbgemm_int{bits}", deployed=True, device=rows.device)
    table.load_stores(
        {
            "weight": pack_codes(codes.reshape(-1), bits),
            "scale": parameters[:, :1],
            "bias": parameters[:, 1:],
        }
    )
    return table.requires_grad_(False)
