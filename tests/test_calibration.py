"""Steps and biases for trained tables."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from embcompress.approximation.calibration import Share, calibrate, shape_of_steps
from embcompress.engine.quantization import code_positions, dequantize

SHARES: tuple[Share, ...] = ("row", "column", "table")


def table(rows: int = 500, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.1, 3, width)
    return torch.randn(rows, width, generator=generator) * scales + scales


def read(values: Tensor, step: Tensor, bias: Tensor, bits: int) -> Tensor:
    return dequantize(code_positions(values, step, bias, bits).round(), step, bias, bits)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_without_clipping_errors_are_at_most_half_a_step(share: Share, bits: int) -> None:
    values = table()
    step, bias = calibrate(values, bits, share, clip=False)
    assert step.shape == bias.shape == shape_of_steps(share, *values.shape)
    error = (read(values, step, bias, bits) - values).abs()
    # The end of the range is 2**bits steps away, and float32 rounds it.
    slack = 1e-4 + 2**bits * torch.finfo(torch.float32).eps
    assert (error <= 0.5 * step * (1 + 2 * slack)).all()


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_clipping_makes_the_squared_error_smaller(share: Share, bits: int) -> None:
    values = table()
    values[7] *= 5  # outliers
    errors = [
        (read(values, *calibrate(values, bits, share, clip=clip), bits) - values).square().sum()
        for clip in (True, False)
    ]
    assert errors[0] <= errors[1]
    if bits <= 4 and share != "row":
        assert errors[0] < 0.8 * errors[1]


def test_one_bit_of_normal_numbers_is_as_good_as_it_can_be() -> None:
    values = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    for symmetric in (False, True):
        step, bias = calibrate(values, 1, "column", symmetric=symmetric)
        error = (read(values, step, bias, 1) - values).square().mean()
        assert float(error) == pytest.approx(1 - 2 / torch.pi, rel=0.02)  # Max 1960
    assert float(bias) == -float(step) / 2


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("clip", [False, True])
def test_numbers_that_are_equal_are_exact(share: Share, clip: bool) -> None:
    values = torch.full((20, 4), 0.1234567)
    step, bias = calibrate(values, 4, share, clip=clip)
    assert torch.equal(read(values, step, bias, 4), values)


def test_constant_rows_are_exact_beside_others() -> None:
    values = table()
    values[3], values[9] = 0.7, -1e-20
    step, bias = calibrate(values, 4, "row")
    assert torch.equal(read(values, step, bias, 4)[[3, 9]], values[[3, 9]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("clip", [False, True])
def test_the_largest_numbers_do_not_overflow(
    dtype: torch.dtype, share: Share, bits: int, clip: bool
) -> None:
    end = torch.finfo(dtype).max
    values = torch.tensor([[end, -end, 0.0], [end / 2, 1.0, -end]])
    step, bias = calibrate(values, bits, share, clip=clip, dtype=dtype)
    assert step.isfinite().all() and bias.isfinite().all()
    assert read(values, step, bias, bits).isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("share", SHARES)
def test_what_is_no_number_is_refused(value: float, share: Share) -> None:
    values = table()
    values[17, 3] = value
    with pytest.raises(ValueError, match=rf"row 17, column 3 of the table is {value}"):
        calibrate(values, 8, share)


def test_frequent_ids_are_nearer() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, 1, generator=generator)
    values[:50] = 3 + 0.2 * torch.randn(50, 1, generator=generator)
    counts = torch.where(torch.arange(1000) < 50, 10_000, 1)
    errors = []
    for importance in (None, counts):
        step, bias = calibrate(values, 2, "column", importance=importance)
        errors.append((read(values, step, bias, 2) - values)[:50].square().mean())
    assert errors[1] < 0.5 * errors[0]
