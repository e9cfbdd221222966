"""``mgqe``: codes of two lengths, the longer ones for the most frequent ids of a hash's buckets."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import embcompress as ec
from embcompress.budget import fit_plan
from embcompress.hashing import derive_key, hash_bucket
from embcompress.layouts.granular import GranularLayout, hot_ids
from embcompress.methods import TableSpec
from tests.plan_cases import unpack_bits

ROWS, WIDTH, PARTS, BITS, TAIL_BITS = 200, 8, 2, 4, 2
WORDS, TAIL_WORDS = 15, 3
MGQE = ec.MultiGranularQuantization
METHOD = MGQE(parts=PARTS, bits=BITS, tail_bits=TAIL_BITS, hot=10)
IDS = torch.arange(ROWS)


def counts() -> Tensor:
    """Few different values, so that there are ties; some ids never occur."""
    return torch.randint(0, 9, (ROWS,), generator=torch.Generator().manual_seed(0))


def table(method: ec.Method = METHOD, *, known: bool = True) -> ec.Embedding:
    torch.manual_seed(0)
    often = counts() if known else None
    return ec.Embedding(ROWS, WIDTH, method=method, budget="90%", counts=often, seed=3, name="t")


def row_of(x: int) -> int:
    """The row of an id among the codes of hot ids."""
    return hash_bucket(x, derive_key(3, "t", 100), ROWS // 10)


def codes_by_hand(module: ec.Embedding) -> list[tuple[bool, list[int]]]:
    """Of every id: whether it is hot, and its codes."""
    tail = torch.tensor(unpack_bits(module.codes, TAIL_BITS)).view(-1, PARTS).tolist()
    hot = torch.tensor(unpack_bits(module.hot_codes, BITS)).view(-1, PARTS).tolist()
    is_hot = [codes == [TAIL_WORDS] * PARTS for codes in tail]
    return [(is_hot[x], hot[row_of(x)] if is_hot[x] else tail[x]) for x in range(ROWS)]


def hot_by_hand(often: Tensor) -> list[int]:
    """Of every bucket the id that occurs most, the first of equal ones."""
    best: dict[int, int] = {}
    for x in range(ROWS):
        other = best.get(row_of(x))
        if often[x] > (0 if other is None else often[other]):
            best[row_of(x)] = x
    return sorted(best.values())


# ------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize("known", [False, True])
def test_vectors_are_those_of_the_formula(known: bool) -> None:
    module = table(known=known)
    books = [module.codebook_0.detach(), module.codebook_1.detach()]
    found = codes_by_hand(module)
    expected = [torch.cat([book[c] for book, c in zip(books, codes, strict=True)])
                for _, codes in found]  # fmt: skip
    assert torch.equal(module(IDS), torch.stack(expected))
    assert {len(book) for book in books} == {WORDS}
    assert all(max(codes) < TAIL_WORDS for hot, codes in found if not hot)
    code_bits = PARTS * (ROWS * TAIL_BITS + ROWS // 10 * BITS)
    assert module.plan.bytes == code_bits // 8 + WORDS * WIDTH * 4


def test_the_most_frequent_id_of_every_bucket_is_hot() -> None:
    hot = [x for x, (is_hot, _) in enumerate(codes_by_hand(table())) if is_hot]
    assert hot == hot_by_hand(counts())
    assert len(hot) == len({row_of(x) for x in hot}) == ROWS // 10


def test_the_padding_id_is_not_hot() -> None:
    often = counts().index_fill(0, torch.tensor(7), 10**6)
    module = ec.Embedding(ROWS, WIDTH, 7, method=METHOD, counts=often, seed=3, name="t")
    hot = [x for x, (is_hot, _) in enumerate(codes_by_hand(module)) if is_hot]
    assert hot == hot_by_hand(often.index_fill(0, torch.tensor(7), 0))


def test_without_counts_a_hash_draws_the_hot_ids() -> None:
    hot = [x for x, (is_hot, _) in enumerate(codes_by_hand(table(known=False))) if is_hot]
    assert len({row_of(x) for x in hot}) == len(hot) == ROWS // 10
    assert 0.3 * ROWS < sum(hot) / len(hot) < 0.7 * ROWS  # small ids are not preferred


def test_of_ids_by_rank_the_first_ones_are_hot() -> None:
    """Rank r has a row of its own with probability exp(-r / rows)."""
    spec = TableSpec(20_000, WIDTH, counts=torch.arange(20_000, 0, -1))
    hot = hot_ids(GranularLayout.of_size(spec, PARTS, BITS, TAIL_BITS, 2000), spec)
    expected = sum(torch.exp(-torch.arange(1000) / 2000).tolist())
    assert abs(int((hot < 1000).sum()) - expected) < 40
    assert len(hot) == 2000 - int(2000 * 2.718281828**-10)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01])
def test_at_least_nine_tenths_of_a_budget_are_used(share: float) -> None:
    spec = TableSpec(1_000_000, 16)
    budget = int(share * spec.dense_bytes)
    assert 0.9 * budget <= fit_plan(MGQE(), spec, budget).bytes <= budget


# -------------------------------------------------------------------------------- the training


def train(module: ec.Embedding, procedure: ec.TrainingProcedure, steps: range) -> None:
    for step in steps:
        ids = torch.randint(0, ROWS, (64,), generator=torch.Generator().manual_seed(step))
        (module(ids) - target()[ids]).square().sum().backward()
        procedure.step()


def target() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def test_a_query_takes_a_step_of_adagrad_and_names_the_nearest_of_its_codewords() -> None:
    module = table(MGQE(parts=PARTS, bits=BITS, tail_bits=TAIL_BITS, hot=10, query_rate=2.0))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.25)
    procedure = ec.TrainingProcedure(module, optimizer)
    queries = procedure.tables[""].tensor("queries")
    torch.testing.assert_close(queries, module.to_dense().detach())
    before = codes_by_hand(module)
    hot = next(x for x in range(ROWS) if before[x][0])
    cold = next(x for x in range(ROWS) if not before[x][0])
    with torch.no_grad():  # both are nearest to the last codeword, which one of them may not have
        last = torch.cat([module.codebook_0[-1], module.codebook_1[-1]])
        queries[[hot, cold]] = last + 0.5
    module(torch.tensor([hot, cold])).backward(torch.ones(2, WIDTH))
    procedure.step()  # the optimizer makes no step; a first one of Adagrad has length 2 · 0.25
    torch.testing.assert_close(queries[[hot, cold]], last.detach().expand(2, -1))
    nearest = [
        int(torch.cdist(book.detach()[-1:], book.detach()[:TAIL_WORDS]).argmin())
        for book in (module.codebook_0, module.codebook_1)
    ]
    expected = dict(enumerate(before))
    expected |= {hot: (True, [WORDS - 1] * PARTS), cold: (False, nearest)}
    assert dict(enumerate(codes_by_hand(module))) == expected


@pytest.mark.parametrize("settings", [{}, {"commitment": 0.1, "pull": 0.1}])
def test_training_goes_on_from_a_saved_state(settings: dict[str, float]) -> None:
    method = MGQE(parts=PARTS, bits=BITS, tail_bits=TAIL_BITS, hot=10, **settings)
    straight, resumed = table(method), table(method)
    procedure = ec.TrainingProcedure(straight)
    ec.fuse_optimizer(straight, "adagrad", lr=0.1)
    train(straight, procedure, range(13))
    again = ec.TrainingProcedure(resumed)
    again.load_state_dict(copy.deepcopy(procedure.state_dict()))
    ec.fuse_optimizer(resumed, "adagrad", lr=0.1)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    train(straight, procedure, range(13, 30))
    train(resumed, again, range(13, 30))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_hot_ids_come_nearer_to_what_they_want() -> None:
    module = table()
    ec.fuse_optimizer(module, "adagrad", lr=0.1)
    train(module, ec.TrainingProcedure(module), range(600))
    errors = (module.to_dense().detach() - target()).square().mean(1)
    hot = torch.tensor([is_hot for is_hot, _ in codes_by_hand(module)])
    assert errors[hot].mean() < 0.7 * errors[~hot].mean()
    assert errors[~hot].mean() < 0.9 * target().var()


def test_gradients_of_codebooks_are_those_of_the_formula() -> None:
    module = table().double()
    hot = next(x for x, (is_hot, _) in enumerate(codes_by_hand(module)) if is_hot)
    names = [name for name, _ in module.named_parameters()]

    def vectors(*books: Tensor) -> Tensor:
        own = dict(zip(names, books, strict=True))
        return torch.func.functional_call(module, own, (torch.tensor([0, 5, hot, hot, 130]),))

    books = [parameter.detach().requires_grad_() for parameter in module.parameters()]
    assert torch.autograd.gradcheck(vectors, books)


def test_the_queries_are_reported_as_memory_of_training() -> None:
    module = table()
    before = ec.memory(module)
    procedure = ec.TrainingProcedure(module, torch.optim.SGD(module.parameters(), lr=0.1))
    assert ec.memory(module).total == before.total == module.plan.bytes
    assert ec.memory(module).training - before.training == ROWS * (WIDTH + 2) * 4
    procedure.close()


# ---------------------------------------------------------------------------- a trained table


@pytest.mark.parametrize("known", [False, True])
def test_a_trained_table_is_clustered(known: bool) -> None:
    often = counts() if known else None
    full = torch.nn.Embedding.from_pretrained(target())
    module = ec.Embedding.from_pretrained(
        full.weight, method=METHOD, counts=often, seed=3, name="t", budget="90%"
    )
    found = codes_by_hand(module)
    books = [module.codebook_0.detach(), module.codebook_1.detach()]
    for x, (hot, codes) in enumerate(found):
        for part, book, code in zip(target()[x].chunk(PARTS), books, codes, strict=True):
            allowed = book if hot else book[:TAIL_WORDS]
            assert code == int((allowed - part).square().sum(1).argmin())
    errors = (module.to_dense().detach() - target()).square().mean(1)
    hot = torch.tensor([is_hot for is_hot, _ in found])
    assert errors[hot].mean() < 0.6 * errors[~hot].mean() < 0.8 * target().var()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"hot": 0}, "hot must be a whole percentage"),
        ({"hot": 100}, "hot must be a whole percentage"),
        ({"hot": 0.1}, "hot must be a whole percentage from 1 to 99, got 0.1"),
        ({"tail_bits": 0}, "tail_bits must be in"),
        ({"bits": 4, "tail_bits": 5}, "tail_bits must be in \\[1, bits = 4\\], got 5"),
        ({"tail_bits": 13}, "tail_bits must be in \\[1, bits = 12\\]"),
        ({"query_rate": 0.0}, "query_rate must be positive"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MGQE(**settings)


def test_another_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="not the plan of a table in codes of two lengths"):
        GranularLayout.of(ec.Embedding(ROWS, WIDTH, method="dpq").plan)
