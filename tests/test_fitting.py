"""Starting from trained tables: least squares, k-means, and the errors that are reported."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import embcompress as ec
from embcompress.approximation.fitting import principal_directions, relative_error
from embcompress.clustering import cluster
from embcompress.methods import resolve_method

ROWS, WIDTH = 400, 8


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    """Two strong directions and noise."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(ROWS, 2, generator=generator) @ torch.randn(2, WIDTH, generator=generator)
    return low + 0.2 * torch.randn(ROWS, WIDTH, generator=generator)


@pytest.fixture(scope="module")
def counts() -> torch.Tensor:
    return (1000 / (torch.arange(ROWS) + 1)).long()


#: All but those without a table: a network cannot be fitted by least squares.
FITTED = sorted(set(ec.methods()) - {"full", "dhe"})


@pytest.mark.parametrize("method", FITTED)
def test_a_fit_beats_the_start(method: str, table: torch.Tensor, counts: torch.Tensor) -> None:
    budget = "40%"
    fitted = ec.Embedding.from_pretrained(table, method=method, budget=budget, counts=counts)
    assert not any(p.requires_grad for p in fitted.parameters())
    weighted = relative_error(table, fitted.vectors, counts)
    zero = relative_error(table, lambda ids: torch.zeros(len(ids), WIDTH), counts)
    assert zero == pytest.approx(1) and weighted < 0.85


@pytest.mark.parametrize("method", FITTED)
def test_the_reported_error_is_the_error(method: str, table: torch.Tensor) -> None:
    model = nn.ModuleDict({"table": nn.EmbeddingBag(ROWS, WIDTH, mode="sum", _weight=table)})
    counts = torch.arange(ROWS)
    report = ec.compress(
        model, method=method, budget="50%", keep_weights=True, counts={"table": counts}
    )
    (change,) = report.tables
    dense = model["table"].to_dense()
    squares = ((dense - table).square().sum(1) * counts).sum() / (
        table.square().sum(1) * counts
    ).sum()
    assert change.error == pytest.approx(float(squares.sqrt()), rel=1e-3, abs=1e-6)
    assert f"error {change.error:.1%}" in str(report)


@pytest.mark.parametrize("method", sorted({*FITTED} - {"auto", "pruned"}))  # pruned keeps rows
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(method: str, bad: float) -> None:
    table = torch.randn(ROWS, WIDTH)
    table[7, 3] = bad
    with pytest.raises(ValueError, match=r"row 7, column 3 of the table is (nan|-inf)"):
        ec.Embedding.from_pretrained(table, method=method, budget="40%")


def test_hashed_rows_are_weighted_means(table: torch.Tensor, counts: torch.Tensor) -> None:
    hashed = ec.Embedding.from_pretrained(table, method="hash", budget="10%", counts=counts)
    rows = hashed.weight.shape[0]
    plan = hashed.plan
    from embcompress.engine.rows import address_rows

    row, _ = address_rows(plan.probes[0].address, torch.arange(ROWS), plan, {})
    share = counts + max(1e-3, 1e-3 * float(counts.float().mean()))
    for r in row.unique()[:10]:
        mine = row == r
        mean = (table[mine] * share[mine, None]).sum(0) / share[mine].sum()
        torch.testing.assert_close(hashed.weight[r], mean, atol=1e-4, rtol=1e-4)
    assert rows == 40


@pytest.mark.parametrize("kind", ["radix", "coprime"])
def test_a_sum_of_partitions_is_recovered(kind: str) -> None:
    method = ec.QuotientRemainder("sum", 2, kind)
    truth = ec.Embedding(ROWS, WIDTH, method=method, budget="30%")
    found = ec.Embedding.from_pretrained(truth.to_dense(), method=method, budget="30%")
    assert relative_error(truth.to_dense(), found.vectors) < 1e-3


def test_a_product_of_positive_partitions_is_recovered() -> None:
    truth = ec.Embedding(ROWS, WIDTH, method="qr", budget="30%")
    with torch.no_grad():
        for parameter in truth.parameters():
            parameter.abs_().add_(0.1)
    found = ec.Embedding.from_pretrained(truth.to_dense(), method="qr", budget="30%")
    assert relative_error(truth.to_dense(), found.vectors) < 1e-2


def test_low_dim_is_the_truncated_svd(table: torch.Tensor) -> None:
    found = ec.Embedding.from_pretrained(table, method="low_dim", budget="30%")
    rank = found.weight.shape[1]
    u, s, v = torch.linalg.svd(table, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    torch.testing.assert_close(found.to_dense(), best, atol=1e-4, rtol=1e-4)
    directions = principal_directions(table, rank)
    torch.testing.assert_close(directions.T @ directions, torch.eye(rank), atol=1e-5, rtol=0)


def test_full_is_torchs_and_shares_memory(table: torch.Tensor) -> None:
    ours = ec.Embedding.from_pretrained(table)
    assert ours.weight.data_ptr() == table.data_ptr()


def test_what_cannot_be_fitted_is_an_error(table: torch.Tensor) -> None:
    module = ec.Embedding(ROWS, WIDTH, method="hash", budget="10%")
    with pytest.raises(ValueError, match=r"weight has shape \(3, 8\)"):
        module.fit_(table[:3])


def test_unified_tables_are_fitted_apart(table: torch.Tensor) -> None:
    def model() -> nn.ModuleList:
        return nn.ModuleList(
            [nn.Embedding.from_pretrained(table[:rows].clone(), False) for rows in (ROWS, 50)]
        )

    compressed = model()
    report = ec.compress(compressed, method="unified", budget="40%", keep_weights=True)
    large, small = compressed
    assert 0.9 * report.budget < ec.memory(compressed).total == report.after <= report.budget
    assert large.weight is not small.weight and len(large.weight) == 8 * len(small.weight)
    assert all(change.error is not None and change.error < 0.9 for change in report.tables)

    class Sharing(ec.Unified):
        def for_trained_tables(self) -> ec.Unified:
            return self

    with pytest.raises(ValueError, match="share a store"):
        ec.compress(model(), method=Sharing(), budget="40%", keep_weights=True)


# ------------------------------------------------------------------------ product quantization


def test_pq_is_its_formula(table: torch.Tensor) -> None:
    method = ec.ProductQuantization(parts=4, bits=5)
    module = ec.Embedding.from_pretrained(table, method=method, budget="90%")
    stream = int.from_bytes(bytes(module.codes.tolist()), "little")
    code = torch.tensor([[stream >> (5 * (4 * i + t)) & 31 for t in range(4)] for i in range(ROWS)])
    books = [getattr(module, f"codebook_{t}") for t in range(4)]
    expected = torch.cat([book[code[:, t]] for t, book in enumerate(books)], dim=1)
    assert torch.equal(module.to_dense(), expected)
    # Every code names the nearest codeword.
    for t, (book, part) in enumerate(zip(books, table.chunk(4, dim=1), strict=True)):
        assert torch.equal(torch.cdist(part, book).argmin(1), code[:, t])
    assert module.plan.bytes == ROWS * 4 * 5 // 8 + 31 * WIDTH * 4


def test_pq_codebooks_train_and_codes_stay(table: torch.Tensor) -> None:
    method = ec.ProductQuantization(parts=4, bits=4)
    module = ec.Embedding.from_pretrained(table, freeze=False, method=method, budget="90%")
    codes, before = module.codes.clone(), relative_error(table, module.vectors)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        (module(torch.arange(ROWS)) - table).square().sum().backward()
        optimizer.step()
    assert torch.equal(module.codes, codes)
    assert relative_error(table, module.vectors) < before * 1.001


def test_pq_with_norms_apart_is_its_formula(table: torch.Tensor) -> None:
    method = ec.ProductQuantization(parts=2, bits=8, norm_bits=5)
    module = ec.Embedding.from_pretrained(table, method=method, budget="95%")
    stream = int.from_bytes(bytes(module.norm_codes.tolist()), "little")
    norm = module.norms[torch.tensor([stream >> (5 * i) & 31 for i in range(ROWS)])]
    parts = [
        module.codebook_0[module.codes[0::2].long()],
        module.codebook_1[module.codes[1::2].long()],
    ]
    torch.testing.assert_close(module.to_dense(), norm * torch.cat(parts, dim=1))
    # Norms are near to the table's; codewords are of vectors of norm 1.
    assert (norm[:, 0] / table.norm(dim=1) - 1).abs().mean() < 0.05
    assert module.plan.bytes == ROWS * 2 + ROWS * 5 // 8 + (255 * WIDTH + 31) * 4


def test_pq_drops_the_least_rows(table: torch.Tensor) -> None:
    method = ec.ProductQuantization(parts=2, bits=6, drop=0.25)
    module = ec.Embedding.from_pretrained(table, method=method, budget="90%")
    gone = (module.to_dense() == 0).all(1)
    assert gone.sum() == ROWS // 4
    assert table[gone].norm(dim=1).max() <= table[~gone].norm(dim=1).min()


@pytest.mark.parametrize("budget", ["8%", "15%", "30%"])
def test_pq_uses_its_budget(budget: str) -> None:
    module = ec.Embedding(20_000, 16, method="pq", budget=budget)
    share = float(budget[:-1]) / 100
    assert 0.75 * share < module.plan.bytes / module.plan.dense_bytes <= share


def test_new_pq_tables_have_hashed_codes_of_their_own() -> None:
    one, same, other = (
        ec.Embedding(1000, 8, method="pq", budget="20%", seed=seed).codes for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert resolve_method("pq").name == "pq"


def test_pq_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="parts = 3 does not divide"):
        ec.Embedding(100, 8, method=ec.ProductQuantization(parts=3))
    with pytest.raises(ValueError, match=r"bits must be in \[1, 16\]"):
        ec.ProductQuantization(bits=17)


@pytest.mark.parametrize("without", [(), ("faiss",)])
def test_k_means(without: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in without else find(n))
    generator = torch.Generator().manual_seed(1)
    truth = 10 * torch.randn(3, 3, generator=generator)
    group = torch.randint(0, 3, (600,), generator=generator)
    vectors = truth[group] + 0.1 * torch.randn(600, 3, generator=generator)
    centers, labels = cluster(vectors, 3, seed=3)
    assert (vectors - centers[labels]).square().sum(1).mean() < 2 * 0.01 * 3
    again, _ = cluster(vectors, 3, seed=3)
    assert torch.equal(centers, again)


def test_few_distinct_vectors_are_exact() -> None:
    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
    centers, labels = cluster(vectors, 5)
    assert torch.equal(centers[labels], vectors) and centers.shape == (5, 2)
