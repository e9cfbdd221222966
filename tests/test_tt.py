"""Tensor trains: the formula, TT-SVD, start values and layouts."""

from __future__ import annotations

import math

import pytest
import torch

import embcompress as ec
from embcompress.layouts.factors import balanced_factors
from embcompress.layouts.tensor_train import TrainLayout, balanced_digits
from embcompress.methods import TableSpec

ROWS, WIDTH = 1000, 12
IDS = torch.arange(ROWS)


def entries_of(module: ec.Embedding, radices: list[int], shapes: tuple) -> torch.Tensor:
    """Every vector by its own chain of matrices, column by column."""
    widths = [width for _, width, _ in shapes]
    cores = [
        module.get_parameter(f"core_{k}").reshape(radices[k], *shape)
        for k, shape in enumerate(shapes)
    ]
    rows = []
    for id in range(module.num_embeddings):
        numbers = []
        for column in range(math.prod(widths)):
            product = torch.eye(1)
            for k, core in enumerate(cores):
                digit = id // math.prod(radices[k + 1 :]) % radices[k]
                part = column // math.prod(widths[k + 1 :]) % widths[k]
                product = product @ core[digit, :, part, :]
            numbers.append(product.squeeze())
        rows.append(torch.stack(numbers))
    return torch.stack(rows)


@pytest.mark.parametrize(("cores", "ranks"), [(2, (5,)), (3, (3, 2)), (4, (2, 3, 2))])
def test_vectors_are_products_of_matrices(cores: int, ranks: tuple[int, ...]) -> None:
    layout = TrainLayout(balanced_digits(60, cores), balanced_factors(WIDTH, cores))
    module = ec.Embedding.from_plan(layout.plan(60, ranks, "float32"))
    with torch.no_grad():
        expected = entries_of(module, list(layout.radices), module.plan.head.shapes)
    torch.testing.assert_close(module.to_dense(), expected, rtol=1e-4, atol=1e-5)


def test_a_table_of_full_rank_is_exact() -> None:
    weight = torch.randn(50, 6)
    for cores in (2, 3, 4):
        layout = TrainLayout(balanced_digits(50, cores), balanced_factors(6, cores))
        parts = layout.decompose(weight, layout.most_ranks)
        module = ec.Embedding.from_plan(layout.plan(50, layout.most_ranks, "float32"))
        module.load_stores({f"core_{k}": part for k, part in enumerate(parts)})
        torch.testing.assert_close(module.to_dense(), weight, rtol=1e-4, atol=1e-4)


def test_a_fit_finds_the_train_of_a_train() -> None:
    weight = ec.Embedding(ROWS, WIDTH, method="tt", budget="10%").to_dense()
    fitted = ec.Embedding.from_pretrained(weight, method="tt", budget="10%")
    torch.testing.assert_close(fitted.to_dense(), weight, rtol=1e-3, atol=1e-3)


def test_counts_weigh_the_fit() -> None:
    torch.manual_seed(0)
    weight, counts = torch.randn(300, 8), torch.ones(300)
    counts[:20] = 1000

    def error(**arguments: object) -> float:
        fitted = ec.Embedding.from_pretrained(weight, method="tt", budget="30%", **arguments)
        return float((fitted.to_dense() - weight)[:20].norm() / weight[:20].norm())

    assert error(counts=counts) < 0.7 * error()


def test_start_values_are_not_near_zero() -> None:
    module = ec.Embedding(10_000, 32, method="tt", budget="5%")
    module.reset_parameters(0.1)
    dense = module.to_dense()
    assert float(dense.std()) == pytest.approx(0.1, rel=0.05)
    kurtosis = float(dense.pow(4).mean() / dense.square().mean() ** 2)
    assert kurtosis < 4  # 27 for products of three normal numbers


@pytest.mark.parametrize("rows", [1, 2, 7, 1000, 1682, 10**9, 2**62])
@pytest.mark.parametrize("cores", [2, 3, 4])
def test_digits_reach_every_id_and_little_more(rows: int, cores: int) -> None:
    digits = balanced_digits(rows, cores)
    assert len(digits) == cores and math.prod(digits) >= rows
    assert max(digits) ** cores < 2**cores * max(rows, 2)


@pytest.mark.parametrize(
    ("width", "expected"), [(1, (1, 1, 1)), (16, (4, 2, 2)), (13, (13, 1, 1)), (60, (5, 3, 4))]
)
def test_columns_are_factored(width: int, expected: tuple[int, ...]) -> None:
    assert balanced_factors(width, 3) == expected


@pytest.mark.parametrize("cores", [2, 3, 4])
def test_sizes_raise_one_rank_at_a_time(cores: int) -> None:
    table, method = TableSpec(5000, 16), ec.TensorTrainTable(cores)
    layout = method.layout(table)
    before = None
    for size in method.sizes(table):
        ranks = layout.ranks(size)
        assert all(1 <= rank <= most for rank, most in zip(ranks, layout.most_ranks, strict=True))
        if before is not None:
            assert 0 <= sum(ranks) - sum(before) <= 1
        before = ranks
    assert method.plan(table, method.sizes(table)[-1]).bytes <= table.dense_bytes
    every = layout.steps(2**62)
    assert layout.ranks(every[-1]) == layout.most_ranks != layout.ranks(every[-1] - 1)


def test_a_budget_is_used() -> None:
    for share in (0.5, 0.1, 0.01):
        table = TableSpec(1_000_000, 16)
        from embcompress.budget import fit_plan

        budget = int(share * table.dense_bytes)
        assert fit_plan(ec.TensorTrainTable(), table, budget).bytes >= 0.9 * budget


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="cores must be 2, 3 or 4, got 5"):
        ec.TensorTrainTable(cores=5)
