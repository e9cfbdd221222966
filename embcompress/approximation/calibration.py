"""Steps and biases for the numbers of a trained table."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from embcompress.engine.quantization import code_positions, dequantize

Share: TypeAlias = Literal["row", "column", "table"]

#: Shares of the range that codes start from; least squares moves them on.
_SHRINKS = (1.0, 0.8, 0.6, 0.4, 0.25)
_REFINEMENTS = 8
_SAMPLE = 1 << 20  # numbers that are looked at where many share a step
_CHUNK_ROWS = 1 << 16


def check_share(share: object) -> None:
    """Raise ValueError unless it says what shares one step."""
    if share not in get_args(Share):
        raise ValueError(f"scale must be 'row', 'column' or 'table', got {share!r}")


def shape_of_steps(share: Share, rows: int, width: int) -> tuple[int, int]:
    """Rows and columns of a store of steps."""
    return (rows if share == "row" else 1), (width if share == "column" else 1)


def check_finite(values: Tensor) -> None:
    """Raise ValueError, naming the first, if a number is NaN or infinite."""
    if not values.isfinite().all():
        row, column = (~values.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"row {row}, column {column} of the table is {values[row, column].item()}, which a "
            "compressed table cannot approximate; repair it, or leave the table uncompressed"
        )


@torch.no_grad()
def calibrate(
    values: Tensor,
    bits: int,
    share: Share,
    *,
    clip: bool = True,
    symmetric: bool = False,
    importance: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Step and bias of codes for some numbers.

    Without clipping the codes span the range of the numbers: every error is at most half a step.
    With clipping, step and bias minimize the squared error: starting from several shares of the
    range, codes and the line through them are fitted in turns. Numbers beyond the codes take the
    nearest one. Numbers that are all equal get step 0 and are exact.

    Args:
        values: (rows, width) float, finite.
        bits: 1, 2, 4, 8 or 16.
        share: what shares a step: each row, each column, or the table.
        clip: as above.
        symmetric: the middle of the codes is zero, so the bias follows from the step.
        importance: (rows,) weights of the squared errors, or None.
        dtype: of the result.

    Returns:
        Step and bias, of the shape that ``share`` says (:func:`shape_of_steps`). No value of a
        code overflows: a range that is wider than the dtype's largest number is cut.

    Raises:
        ValueError: numbers that are NaN or infinite: no code stands for them.
    """
    check_finite(values)
    if share == "row":
        parts = [
            _calibrate(chunk.double(), bits, (1,), clip, symmetric, None, dtype)
            for chunk in values.split(_CHUNK_ROWS)
        ]
        return torch.cat([step for step, _ in parts]), torch.cat([bias for _, bias in parts])
    shared = (0,) if share == "column" else (0, 1)
    return _calibrate(values, bits, shared, clip, symmetric, importance, dtype)


def _calibrate(
    values: Tensor,
    bits: int,
    shared: tuple[int, ...],
    clip: bool,
    symmetric: bool,
    importance: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    low, high = values.amin(shared, True).double(), values.amax(shared, True).double()
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best_step, best_bias = _span(low, high, bits, dtype)
    if not clip:
        return best_step.to(dtype), best_bias.to(dtype)
    stride = max(1, values.numel() // _SAMPLE) if 0 in shared else 1
    sample = values[::stride].double()
    weight = torch.ones_like(sample[:, :1])
    if importance is not None:
        weight = importance[::stride, None].double()
    best_error = _squared_error(sample, weight, best_step, best_bias, bits, shared)
    center, half = (low + high) / 2, (high - low) / 2
    for shrink in _SHRINKS:
        step, bias = _span(center - shrink * half, center + shrink * half, bits, dtype)
        for _ in range(_REFINEMENTS):
            step, bias = _refine(sample, weight, step, bias, bits, shared, symmetric)
            error = _squared_error(sample, weight, step, bias, bits, shared)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_step = torch.where(better, step, best_step)
            best_bias = torch.where(better, bias, best_bias)
    last = best_bias + (2**bits - 1) * best_step
    best_step, best_bias = _span(best_bias, last, bits, dtype)
    return best_step.to(dtype), best_bias.to(dtype)


def _span(low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes from ``low`` to ``high``, cut so that neither end nor ``step * code`` overflows."""
    end = torch.finfo(dtype).max / 2
    low, high = low.clamp(-end, end), high.clamp(-end, end)
    # A little less than exact, so that rounding to the dtype does not pass its end.
    step = (high - low) / (2**bits - 1)
    return torch.where(high - low > 1.99 * end, step * 0.99, step), low


def _squared_error(
    values: Tensor,
    weight: Tensor,
    step: Tensor,
    bias: Tensor,
    bits: int,
    shared: tuple[int, ...],
) -> Tensor:
    codes = code_positions(values, step, bias, bits).round()
    errors = dequantize(codes, step, bias, bits) - values
    return (weight * errors * errors).sum(shared, keepdim=True)


def _refine(
    values: Tensor,
    weight: Tensor,
    step: Tensor,
    bias: Tensor,
    bits: int,
    shared: tuple[int, ...],
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """The line through the numbers over their codes, by weighted least squares.

    It passes through their means, or if ``symmetric`` through zero at the middle of the codes.
    """
    codes = code_positions(values, step, bias, bits).round()
    if symmetric:
        code, value = torch.tensor((2**bits - 1) / 2), torch.tensor(0.0)
    else:
        total = (weight * torch.ones_like(values)).sum(shared, keepdim=True)
        total = total.clamp(min=torch.finfo(total.dtype).tiny)
        code = (weight * codes).sum(shared, keepdim=True) / total
        value = (weight * values).sum(shared, keepdim=True) / total
    codes, values = codes - code, values - value
    squares = (weight * codes * codes).sum(shared, keepdim=True)
    together = (weight * codes * values).sum(shared, keepdim=True)
    # Where all numbers have one code, the step says nothing.
    slope = torch.where(squares > 0, together / squares.clamp(min=1e-300), step)
    return slope, value - slope * code
