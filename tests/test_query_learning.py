"""Methods whose codes follow queries, and those that are fitted to a table trained first."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.families.product_method import ProductMethod
from embcompress.layouts.product import ProductLayout
from embcompress.methods import TableSpec
from embcompress.plan import total_bytes
from embcompress.procedures.query_learning import _spacing, soft_gradients

ROWS, WIDTH = 200, 8
DPQ, CLUSTERED = ec.DifferentiableProductQuantization, ec.Clustered


def target() -> Tensor:
    """Ten groups of ids that want one vector each."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(10, WIDTH, generator=generator)
    return centers[torch.randint(0, 10, (ROWS,), generator=generator)]


def table(method: ec.Method | None = None) -> ec.Embedding:
    torch.manual_seed(0)
    return ec.Embedding(ROWS, WIDTH, method=method or DPQ(parts=2, bits=4), budget="90%")


def codes_of(module: ec.Embedding) -> Tensor:
    return ProductLayout.of(module.plan).read_codes(module.stores(), 0, ROWS)


def loss_of(module: ec.Embedding, step: int) -> Tensor:
    ids = torch.randint(0, ROWS, (64,), generator=torch.Generator().manual_seed(step))
    return (module(ids) - target()[ids]).square().sum()


def train(module: ec.Embedding, procedure: ec.TrainingProcedure, steps: range) -> None:
    for step in steps:
        loss_of(module, step).backward()
        procedure.step()


def error(module: ec.Embedding) -> float:
    return float((module.to_dense() - target()).square().mean().detach())


# ------------------------------------------------------------------------------------ the layout


def test_parts_of_one_book_share_its_codewords() -> None:
    module = table(CLUSTERED(parts=4, bits=3))
    book, codes = module.codebook_0.detach(), codes_of(module)
    assert module.plan.bytes == ROWS * 4 * 3 // 8 + 7 * 2 * 4
    by_hand = torch.stack([torch.cat([book[int(c)] for c in codes[x]]) for x in range(ROWS)])
    torch.testing.assert_close(module.to_dense().detach(), by_hand)
    layout = ProductLayout.of(module.plan)
    torch.testing.assert_close(layout.decode(module.stores(), codes).detach(), by_hand)
    assert torch.equal(layout.encode(module.stores(), by_hand), codes)


@pytest.mark.parametrize(
    "method",
    [DPQ(), CLUSTERED(), ec.ProductQuantization(norm_bits=3), ec.MultiGranularQuantization()],
    ids=str,
)
@pytest.mark.parametrize("rows", [(9_000,), (9_000, 40, 3), (1,)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bytes_of_shapes_are_those_of_their_plans(
    method: ProductMethod, rows: tuple[int, ...], dtype: str
) -> None:
    tables = [TableSpec(count, WIDTH, str(count), dtype=dtype) for count in rows]
    bits = 0.0
    for parts in (1, 2, 8):
        for code in method.codes_tried():
            plans = method.shaped_plans(tables, parts, code)
            assert method.shaped_bytes(tables, parts, code) == total_bytes(plans)
    for size in method.group_sizes(tables):
        parts, code = method._shapes(tables)[size]
        before, bits = bits, parts * method.mean_bits(code)
        assert bits > before


@pytest.mark.parametrize("method", [DPQ(parts=2, bits=4), CLUSTERED(parts=4, bits=3)], ids=str)
def test_gradients_of_codebooks_are_those_of_the_formula(method: ec.Method) -> None:
    module = table(method).double()
    names = [name for name, _ in module.named_parameters()]

    def vectors(*books: Tensor) -> Tensor:
        own = dict(zip(names, books, strict=True))
        return torch.func.functional_call(module, own, (torch.tensor([0, 5, 5, 130]),))

    books = [parameter.detach().requires_grad_() for parameter in module.parameters()]
    assert torch.autograd.gradcheck(vectors, books)


# ----------------------------------------------------------------------------------- the queries


def test_a_query_takes_a_step_of_adagrad_and_names_the_nearest_codewords() -> None:
    module = table(DPQ(parts=2, bits=4, query_rate=2.0))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.25)
    procedure = ec.TrainingProcedure(module, optimizer)
    wanted, codes = module.to_dense().detach().clone(), codes_of(module)
    torch.testing.assert_close(procedure.tables[""].tensor("queries"), wanted)
    module(torch.tensor([7, 7, 9])).backward(torch.tensor([[1.0], [1.0], [-3.0]]).expand(3, WIDTH))
    procedure.step()  # the optimizer makes no step
    # A first step of Adagrad has the length of its rate, 2 · 0.25, in every column.
    wanted[7] -= 0.5
    wanted[9] += 0.5
    for t in range(2):
        part, book = wanted[:, 4 * t : 4 * t + 4], module.get_parameter(f"codebook_{t}")
        codes[[7, 9], t] = torch.cdist(part, book)[[7, 9]].argmin(1)
    assert torch.equal(codes_of(module), codes)
    torch.testing.assert_close(procedure.tables[""].tensor("queries"), wanted)
    assert not procedure.tables[""].tensor("touched").any()


def test_queries_and_codewords_are_held_together() -> None:
    """Without a gradient a query goes half-way to its codewords, and these to their queries."""
    module = table(DPQ(parts=1, bits=3, commitment=0.5, pull=0.25))
    procedure = ec.TrainingProcedure(module, torch.optim.SGD(module.parameters(), lr=0.1))
    queries = procedure.tables[""].tensor("queries")
    book = module.codebook_0.detach().clone()
    with torch.no_grad():
        queries[3] = book[2] + 1e-3
        queries[4] = book[2] - 3e-3
        queries[5] = book[6] + 1e-3
    module(torch.tensor([3, 4, 4])).backward(torch.zeros(3, WIDTH))
    procedure.step()
    torch.testing.assert_close(queries[3], book[2] + 0.5e-3)
    torch.testing.assert_close(queries[4], book[2] - 1.5e-3)
    torch.testing.assert_close(queries[5], book[6] + 1e-3)  # not in the batch
    assert codes_of(module)[3:5].flatten().tolist() == [2, 2]
    book[2] += 0.25 * -0.5e-3  # the mean of the two queries is that far away
    torch.testing.assert_close(module.codebook_0.detach(), book)


@pytest.mark.parametrize(("parts", "one_book"), [(1, False), (2, False), (4, True)])
def test_soft_gradients_are_those_of_autograd(parts: int, one_book: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = ProductLayout(ROWS, WIDTH, parts, 3, one_book=one_book)
    stores = {
        name: torch.randn(layout.words, WIDTH // parts, generator=generator)
        for name in layout.codebooks
    }
    queries = torch.randn(5, WIDTH, generator=generator, requires_grad=True)
    gradients = torch.randn(5, WIDTH, generator=generator)
    soft = []
    for t, part in enumerate(queries.chunk(parts, dim=1)):
        book = stores[layout.book(t)]
        distances = (part[:, None] - book).square().sum(2)
        soft.append(torch.softmax(-distances / (0.7 * _spacing(book)), dim=1) @ book)
    (expected,) = torch.autograd.grad(torch.cat(soft, dim=1), queries, gradients)
    found = soft_gradients(layout, stores, queries.detach(), gradients, 0.7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_learned_codes_find_the_groups_and_hashed_ones_cannot() -> None:
    learned, fixed = table(), table()
    for module in (learned, fixed):
        ec.fuse_optimizer(module, "adagrad", lr=0.1)
    train(learned, ec.TrainingProcedure(learned), range(300))
    for step in range(300):
        loss_of(fixed, step).backward()
    assert error(learned) < 0.3 * error(fixed)


@pytest.mark.parametrize("method", [DPQ(parts=2, bits=4), CLUSTERED(parts=4, bits=4)], ids=str)
def test_training_goes_on_from_a_saved_state(method: ec.Method) -> None:
    def start(module: ec.Embedding) -> ec.TrainingProcedure:
        procedure = ec.TrainingProcedure(module)
        while len(procedure.phases) > 1 and procedure.phase != procedure.phases[-1]:
            procedure.begin_phase()
        ec.fuse_optimizer(module, "adagrad", lr=0.1)
        return procedure

    straight, resumed = table(method), table(method)
    procedure = start(straight)
    train(straight, procedure, range(13))
    again = ec.TrainingProcedure(resumed)
    again.load_state_dict(copy.deepcopy(procedure.state_dict()))
    ec.fuse_optimizer(resumed, "adagrad", lr=0.1)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    train(straight, procedure, range(13, 30))
    train(resumed, again, range(13, 30))
    assert torch.equal(straight.codes, resumed.codes)
    assert torch.equal(straight.to_dense(), resumed.to_dense())


def test_the_queries_are_reported_as_memory_of_training() -> None:
    module = table()
    before = ec.memory(module)
    procedure = ec.TrainingProcedure(module, torch.optim.SGD(module.parameters(), lr=0.1))
    during = ec.memory(module)
    assert during.total == before.total
    assert during.training - before.training == ROWS * (WIDTH + 2) * 4
    procedure.close()
    assert ec.memory(module).training == before.training


# ------------------------------------------------------------------------- fitted after training


@pytest.mark.parametrize("method", [ec.Subspace(parts=2, bits=4), CLUSTERED(parts=4, bits=5)],
                         ids=str)  # fmt: skip
def test_the_full_table_is_trained_then_fitted(method: ec.Method) -> None:
    module = table(method)
    built = module.plan
    procedure = ec.TrainingProcedure(module)
    phase = procedure.begin_phase()
    assert phase is not None and phase.epochs == 1 and module.plan.is_dense
    ec.fuse_optimizer(module, "adagrad", lr=0.3)
    train(module, procedure, range(200))
    trained = module.to_dense().detach().clone()
    assert error(module) < 0.05
    procedure.begin_phase()
    assert module.plan == built
    distance = float((module.to_dense() - trained).square().mean().detach())
    assert distance < 0.1 * float(trained.var())
    assert len(procedure.tables) == isinstance(method, CLUSTERED)
    ec.fuse_optimizer(module, "adagrad", lr=0.03)
    before = error(module)
    train(module, procedure, range(100))
    assert error(module) < before + 1e-4
    assert procedure.begin_phase() is None


@pytest.mark.parametrize(
    ("method", "settings", "match"),
    [
        (DPQ, {"query_rate": 0.0}, "query_rate must be positive"),
        (DPQ, {"commitment": 1.0}, "commitment must be in"),
        (DPQ, {"pull": -0.1}, "pull must be in"),
        (DPQ, {"parts": 0}, "parts must be at least 1"),
        (DPQ, {"bits": 17}, "bits must be in"),
        (CLUSTERED, {"temperature": 0.0}, "temperature must be positive"),
        (CLUSTERED, {"query_rate": -1.0}, "query_rate must be positive"),
        (CLUSTERED, {"pull": 1.0}, "pull must be in"),
        (CLUSTERED, {"epochs": 0}, "epochs must be at least 1"),
        (ec.Subspace, {"epochs": 0}, "epochs must be at least 1"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(method: type, settings: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        method(**settings)
