"""compress(): finding tables, one budget for all, ties, refusals, and the reports."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import embcompress as ec


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.user = nn.Embedding(20_000, 16, padding_idx=3, sparse=True)
        self.bags = nn.ModuleList(
            [nn.EmbeddingBag(10_000, 16, mode="sum"), nn.EmbeddingBag(40, 16, mode="max")]
        )
        self.head = nn.ModuleDict({"deep": nn.Sequential(nn.Linear(16, 4))})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.user(ids).sum(1) + self.bags[0](ids) + self.bags[1](ids % 40)


def test_tables_are_swapped_in_place_under_one_budget() -> None:
    model = Model()
    dense = 16 * 4 * (20_000 + 10_000 + 40)
    report = ec.compress(model, method="hash", budget="5%")
    assert isinstance(model.user, ec.Embedding) and isinstance(model.bags[0], ec.EmbeddingBag)
    assert type(model.bags[1]) is nn.EmbeddingBag  # small: left as it was
    assert model.user.padding_idx == 3 and model.user.sparse and model.bags[0].mode == "sum"
    assert 0.9 * 0.05 * dense <= report.after == ec.memory(model).total <= 0.05 * dense
    assert report.before == dense == ec.memory(model).dense
    assert [table.method for table in report.tables] == ["hash", "hash", "full"]
    model(torch.randint(0, 10_000, (4, 3))).sum().backward()
    text = str(report)
    for word in ("user", "bags.0", "bags.1", "better left full", "total", "5.0000%"):
        assert word in text


def test_new_tables_keep_the_deviation_dtype_and_training_flag() -> None:
    model = Model().double()
    nn.init.normal_(model.user.weight, std=0.02)
    model.user.eval()
    ec.compress(model, method="qr", budget="10%")
    assert model.user.to_dense().dtype == torch.float64 and not model.user.training
    assert float(model.user.to_dense().std()) == pytest.approx(0.02, rel=0.1)


def test_shared_modules_stay_shared() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(1000, 8)})
    model["b"] = model["a"]
    report = ec.compress(model, method="hash", budget="10%")
    assert model["a"] is model["b"] and isinstance(model["a"], ec.Embedding)
    assert report.tables[0].also == ("b",) and "also b" in str(report)
    assert len(ec.memory(model).tables) == 1


def test_tied_tables_stay_tied() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(1000, 8), "b": nn.EmbeddingBag(1000, 8, mode="sum")})
    model["b"].weight = model["a"].weight
    report = ec.compress(model, method="qr", budget="50%")
    assert model["a"].weight_0 is model["b"].weight_0
    assert "stay tied" in str(report)
    assert ec.memory(model).total == report.after == model["a"].plan.bytes
    ids = torch.tensor([[1, 2]])
    torch.testing.assert_close(model["b"](ids), model["a"](ids).sum(1))


def test_a_table_tied_to_a_layer_is_left_alone() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(1000, 8), "other": nn.Embedding(1000, 8)})
    model["output"] = nn.Linear(8, 1000, bias=False)
    model["output"].weight = model["embedding"].weight
    report = ec.compress(model, method="hash", budget="10%")
    assert type(model["embedding"]) is nn.Embedding
    assert "tied to output.weight" in str(report)
    assert isinstance(model["other"], ec.Embedding)


class Special(nn.Embedding):
    pass


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (nn.Embedding(100, 8, max_norm=1.0), "max_norm"),
        (nn.EmbeddingBag(100, 8, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.Embedding.from_pretrained(torch.randn(100, 8)), "frozen"),
        (Special(100, 8), "subclass"),
        (nn.utils.parametrizations.weight_norm(nn.Embedding(100, 8)), "parametrized"),
    ],
)
def test_tables_that_cannot_be_swapped_are_left_with_a_reason(
    table: nn.Module, reason: str
) -> None:
    model = nn.ModuleDict({"left": table, "swapped": nn.Embedding(100, 8)})
    report = ec.compress(model, method="hash", budget="50%")
    assert model["left"] is table and isinstance(model["swapped"], ec.Embedding)
    assert reason in report.tables[0].note
    with pytest.raises(ValueError, match=f"no table can be compressed.*{reason}"):
        ec.compress(nn.ModuleList([table]), method="hash", budget="50%")


def test_hooks_are_not_lost() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(100, 8), "b": nn.Embedding(100, 8)})
    model["a"].register_forward_hook(lambda *_: None)
    report = ec.compress(model, method="hash", budget="50%")
    assert "hooks" in report.tables[0].note


def test_patterns_choose_methods() -> None:
    model = Model()
    report = ec.compress(
        model, method={"user": "low_dim", "bags.0": ec.QuotientRemainder("sum")}, budget="20%"
    )
    assert [table.method for table in report.tables] == ["low_dim", "qr", "full"]
    assert report.tables[2].note == "no pattern matches"
    assert report.budget == int(0.2 * 16 * 4 * 30_000)
    with pytest.raises(ValueError, match=r"\['nothing'\] match no table.*'bags.1'"):
        ec.compress(Model(), method={"nothing": "hash"}, budget="20%")


def test_an_impossible_budget_changes_nothing() -> None:
    model = Model()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ec.BudgetError, match="smallest budget") as caught:
        ec.compress(model, method="qr", budget=1000)
    assert [type(module) for module in model.modules()] == before
    assert ec.compress(model, method="qr", budget=caught.value.smallest).after <= (
        caught.value.smallest
    )


def test_nothing_to_do_is_an_error() -> None:
    with pytest.raises(ValueError, match="contains no"):
        ec.compress(nn.Linear(2, 2), method="hash", budget="5%")
    with pytest.raises(ValueError, match="is itself a table"):
        ec.compress(nn.Embedding(10, 2), method="hash", budget="50%")


def test_our_own_full_tables_are_swapped_too() -> None:
    tables = [ec.TableConfig("a", 1000, 8), ec.TableConfig("b", 3000, 8)]
    collection = ec.EmbeddingBagCollection(tables)
    ec.compress(collection, method="hash", budget="10%")
    assert ec.memory(collection).ratio <= 0.1
    out = collection({"a": torch.tensor([1, 2]), "b": torch.tensor([5, 6])})
    assert out.shape == (2, 16)


def test_a_model_on_the_meta_device_is_planned_without_memory() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"huge": nn.EmbeddingBag(10**9, 64)})
    report = ec.compress(model, method="hash", budget="64MiB")
    assert report.after <= 64 * 2**20 < report.before == 10**9 * 64 * 4


def test_compressed_models_are_not_compressed_again() -> None:
    model = Model()
    ec.compress(model, method="hash", budget="5%")
    user = model.user
    ec.compress(model, method={"bags.1": "hash"}, budget="50%")
    assert model.user is user and isinstance(model.bags[1], ec.EmbeddingBag)


def test_memory_counts_every_storage_once() -> None:
    model = Model()
    report = ec.memory(model)
    assert report.total == report.dense == 16 * 4 * 30_040 and report.ratio == 1.0
    assert [table.name for table in report.tables] == ["user", "bags.0", "bags.1"]
    assert "bags.1" in str(report)
    assert ec.memory(nn.Linear(2, 2)).total == 0 and ec.memory(nn.Linear(2, 2)).ratio == 1.0


@pytest.mark.parametrize("method", sorted(ec.methods()))
def test_reported_bytes_are_the_bytes_of_the_storages(method: str) -> None:
    module = ec.deploy(ec.EmbeddingBag(5000, 16, method=method))
    tensors = [*module.parameters(), *module.buffers()]
    held = sum(t.untyped_storage().nbytes() for t in tensors)
    before = ec.memory(module)
    assert before.total + before.training + before.offloaded == held
    tensors = ec.deploy(module).stores().values()
    assert before.total == ec.memory(module).total
    assert before.total + before.offloaded == sum(t.nbytes for t in tensors)
    assert ec.memory(module).training == 0
    assert ec.memory(module).dense == 5000 * 16 * 4


def test_a_model_that_is_compressed_already_is_told_so() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(100, 8)})
    ec.compress(model, method="hash", budget="50%")
    with pytest.raises(ValueError, match="compressed already"):
        ec.compress(model, method="qr", budget="50%")


def test_a_table_without_rows_is_left_alone() -> None:
    model = nn.ModuleDict({"empty": nn.Embedding(0, 8), "a": nn.Embedding(100, 8)})
    empty = model["empty"]
    ec.compress(model, method="hash", budget="50%")
    assert model["empty"] is empty and isinstance(model["a"], ec.Embedding)


@pytest.mark.parametrize("method", sorted(set(ec.methods()) - {"full"}))
def test_tables_of_several_dtypes_keep_theirs(method: str) -> None:
    """Also where they share a store."""
    dtypes = {"a": torch.float16, "b": torch.float32, "c": torch.bfloat16, "d": torch.float32}
    model = nn.ModuleDict({name: nn.Embedding(900, 16, dtype=d) for name, d in dtypes.items()})
    report = ec.compress(model, method=method, budget="40%")
    assert sum(table.after for table in report.tables) == ec.memory(model).total
    for name, dtype in dtypes.items():
        assert model[name](torch.tensor([1, 2])).dtype == dtype
