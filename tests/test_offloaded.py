"""Rows in files: ``offloaded``, what it counts, and how its modules are copied and trained."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import embcompress as ec
from embcompress.engine import ops
from embcompress.engine.file_tensors import directory_of, file_tensor, is_in_file
from embcompress.hashing import derive_key, hash_bucket
from embcompress.lowering.tables import why_not
from embcompress.methods import TableSpec
from embcompress.plan import Digit, LookupPlan, PlanError, Probe, Store
from tests.bench.test_comparison import summary_of
from tests.bench.test_summaries import record
from tests.peak_memory import measure_peak
from tests.plan_cases import unpack_bits

ROWS, WIDTH = 1000, 12
DENSE = ROWS * WIDTH * 4
IDS = torch.arange(ROWS)


def table(budget: int | str = "10%", **arguments: object) -> ec.Embedding:
    torch.manual_seed(0)
    arguments = {"method": "offloaded", **arguments}
    return ec.Embedding(ROWS, WIDTH, budget=budget, seed=3, name="t", **arguments)


def slots_of(module: ec.Embedding) -> dict[int, int]:
    """The row in memory of every id that owns one, by a search through the list of keys."""
    keys = module.plan.store("keys")
    held = unpack_bits(module.keys, keys.bits)[: keys.rows * keys.width]
    found = {}
    for x in range(ROWS):
        first = hash_bucket(x, derive_key(3, "t", 100), keys.rows) * keys.width
        mine = [slot for slot in range(first, first + keys.width) if held[slot] == x]
        if mine:
            found[x] = mine[0]
    return found


# ------------------------------------------------------------------------------ values, bytes


@pytest.mark.parametrize("budget", ["0.4%", "3%", "40%", ROWS * WIDTH * 4 * 104 // 100])
def test_an_id_reads_its_row_in_memory_or_that_in_the_file(budget: int | str) -> None:
    module, vectors = table(budget), []
    own = slots_of(module)
    for x in range(ROWS):
        vectors.append(module.weight[own[x]] if x in own else module.file_weight[x])
    assert torch.equal(module(IDS), torch.stack(vectors))
    assert len(own) >= 0.8 * len(module.weight)


def test_frequent_ids_own_rows() -> None:
    counts = torch.zeros(ROWS, dtype=torch.int64)
    counts[::20] = torch.arange(1, 51)
    own = slots_of(table("10%", counts=counts))
    assert set(own) <= set(range(0, ROWS, 20)) and len(own) >= 45


def test_vectors_start_with_the_deviation_of_a_full_table() -> None:
    module = ec.Embedding(20_000, 16, method="offloaded", budget="20%")
    module.reset_parameters(0.5)
    for store in (module.weight, module.file_weight):
        assert float(store.detach().std()) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("rows", [1000, 37_000])
def test_the_budget_is_of_resident_bytes_and_is_used(rows: int) -> None:
    for share in [*range(1, 20), 30, 50, 80]:
        module = ec.Embedding(rows, WIDTH, method="offloaded", budget=f"{share}%")
        report, budget = ec.memory(module), share * rows * WIDTH * 4 // 100
        assert report.total == module.plan.bytes
        assert report.total == module.weight.nbytes + module.keys.nbytes
        assert 0.9 * budget <= report.total <= budget
        assert report.offloaded == module.plan.offloaded == module.file_weight.nbytes
        assert report.training == 0


def test_the_smallest_budget_is_one_row_and_its_key() -> None:
    module = table(budget=WIDTH * 4 + 2)  # type: ignore[arg-type]
    assert module.weight.shape == (1, WIDTH) and len(slots_of(module)) == 1
    with pytest.raises(ec.BudgetError) as caught:
        table(budget=WIDTH * 4 + 1)  # type: ignore[arg-type]
    assert caught.value.smallest == WIDTH * 4 + 2


def test_reports_name_what_is_in_files() -> None:
    model = nn.ModuleDict({"a": nn.EmbeddingBag(ROWS, WIDTH), "b": nn.EmbeddingBag(10, WIDTH)})
    assert "in files" not in str(ec.memory(model))
    report = ec.compress(model, method="offloaded", budget="10%")
    assert report.after == ec.memory(model).total <= report.budget
    assert "46.9 KiB in a file" in str(report)
    assert "in files" in str(ec.memory(model)) and "46.9 KiB" in str(ec.memory(model))
    assert f"bytes_in_files={DENSE}" in str(model) and "in a file" in str(model["a"].plan)


def test_rows_in_memory_after_all_are_counted() -> None:
    module = table()
    module.file_weight.data = module.file_weight.detach().clone()
    assert ec.memory(module).total == module.plan.bytes + DENSE
    assert ec.memory(module).offloaded == 0


def test_a_sweep_shows_bytes_in_files_and_names_no_winner_for_them() -> None:
    from embcompress.bench.comparison import rankings
    from embcompress.bench.tables import details_table, table_rows

    records = [record("offloaded", "1%", 0, 0.8), record("hash", "1%", 0, 0.6)]
    records[0]["offloaded_bytes"] = 10_000
    summary = summary_of(records)
    assert summary.best("1%") == "hash"
    assert [each.method for each in rankings(summary)] == ["hash", "offloaded"]
    assert table_rows(summary)[1][1][1] == ("0.8000 + 9.8 KiB in files", False)
    header, rows = details_table(summary)
    column = header.index("in files")
    assert [row[column][0] for row in rows] == ["10,000", "0"]


_LARGE = """
import sys, torch, embcompress as ec
from pathlib import Path

def held():  # what is no mapped file
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

rows, directory = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
def train(rows):
    bags = ec.EmbeddingBag(rows, 32, mode="sum", method=ec.Offloaded(directory), budget=2**20)
    ec.fuse_optimizer(bags, "adagrad", lr=0.1)
    for _ in range(3):
        bags(torch.randint(0, rows, (512, 3))).square().mean().backward()
    return bags
train(10_000)
before = held()
bags = train(rows)
print(held() - before, ec.memory(bags).offloaded)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_table_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    rows = 1_000_000
    _, (line,), _ = measure_peak(_LARGE, str(rows), str(tmp_path))
    more, offloaded = map(int, line.split())
    assert offloaded == 2 * rows * 32 * 4  # the state of Adagrad, too
    assert more < 0.1 * offloaded


# -------------------------------------------------------------------------------------- files


def test_the_file_is_in_the_directory_and_has_no_name(tmp_path: Path) -> None:
    module = table(method=ec.Offloaded(str(tmp_path)))
    assert directory_of(module.file_weight) == str(tmp_path)
    assert not list(tmp_path.iterdir())
    assert not is_in_file(module.weight)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_has_a_file_of_its_own(copied: object, tmp_path: Path) -> None:
    module = table(method=ec.Offloaded(str(tmp_path)))
    ec.fuse_optimizer(module, "adam", lr=0.1)
    module(IDS).sum().backward()
    other = copied(module)  # type: ignore[operator]
    before = module.to_dense()
    assert torch.equal(other.to_dense(), before)
    assert ec.memory(other) == ec.memory(module)
    assert directory_of(other.file_weight) == str(tmp_path)
    other(IDS).sum().backward()  # goes on with state of its own
    assert torch.equal(module.to_dense(), before)
    module(IDS).sum().backward()
    assert torch.equal(module.to_dense(), other.to_dense())


def test_tied_tables_stay_tied_when_copied() -> None:
    tied = nn.Embedding(ROWS, WIDTH)
    model = nn.ModuleDict({"a": tied, "b": nn.Embedding(ROWS, WIDTH, _weight=tied.weight)})
    ec.compress(model, method="offloaded", budget="10%")
    for each in (model, copy.deepcopy(model)):
        assert each["a"].file_weight is each["b"].file_weight
        assert ec.memory(each).offloaded == DENSE


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("mmap", [False, True])
def test_a_saved_state_is_read_into_the_file(assign: bool, mmap: bool, tmp_path: Path) -> None:
    module, other = table(), table()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    torch.save(module.state_dict(), tmp_path / "table.pt")
    place = other.file_weight.data_ptr()
    other.load_state_dict(torch.load(tmp_path / "table.pt", mmap=mmap), assign=assign)
    assert torch.equal(other.to_dense(), module.to_dense())
    assert is_in_file(other.file_weight) and (assign or other.file_weight.data_ptr() == place)
    assert ec.memory(other).total == other.plan.bytes


def test_a_state_that_is_cut_short_is_refused() -> None:
    module = table()
    state = module.state_dict()
    state["file_weight"] = state["file_weight"][:-1]
    with pytest.raises(RuntimeError, match="size mismatch for file_weight"):
        module.load_state_dict(state)


def test_other_dtypes_are_in_files_too() -> None:
    module = table().double()
    assert is_in_file(module.file_weight) and module.file_weight.dtype == torch.float64
    assert ec.memory(module).total == module.plan.bytes
    assert ec.memory(module).offloaded == module.plan.offloaded == 2 * DENSE


def test_loading_weights_loses_nothing() -> None:
    weight = torch.randn(ROWS, WIDTH)
    module = ec.Embedding.from_pretrained(weight, method="offloaded", budget="10%")
    assert torch.equal(module.to_dense(), weight) and is_in_file(module.file_weight)
    with pytest.raises(ValueError, match="is nan"):
        ec.Embedding.from_pretrained(weight * float("nan"), method="offloaded", budget="10%")


# ----------------------------------------------------------------------------------- training


def test_only_rows_that_are_read_are_trained() -> None:
    module = table()
    own, before = slots_of(module), {n: p.detach().clone() for n, p in module.named_parameters()}
    ec.fuse_optimizer(module, "sgd", lr=1.0)
    ids = IDS[:100]
    module(ids).sum().backward()
    for name, rows in {
        "weight": [own[x] for x in range(100) if x in own],
        "file_weight": [x for x in range(100) if x not in own],
    }.items():
        expected = before[name]
        expected[rows] -= 1.0
        torch.testing.assert_close(module.get_parameter(name), expected)
        assert rows


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_it_is_trained_as_a_full_table_is(name: str) -> None:
    weight = torch.randn(ROWS, WIDTH)
    full, module = (
        ec.Embedding.from_pretrained(weight.clone(), freeze=False, method=method, **budget)
        for method, budget in (("full", {}), ("offloaded", {"budget": "10%"}))
    )
    for step in range(4):
        ids = torch.randint(0, ROWS, (200,), generator=torch.Generator().manual_seed(step))
        for each in (full, module):
            if step == 0:
                ec.fuse_optimizer(each, name, lr=0.1)
            each(ids).pow(2).sum().backward()
    torch.testing.assert_close(module.to_dense(), full.to_dense(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(full.to_dense(), weight)


@pytest.mark.parametrize("engine", ["kernel", "torch"])
def test_gradients_are_sparse_beside_tables_that_are_not(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "torch":
        monkeypatch.setattr("embcompress.engine.ops.is_available", lambda: False)
    tables = [ec.TableConfig("a", ROWS, WIDTH), ec.TableConfig("b", 5, WIDTH)]
    collection = ec.EmbeddingBagCollection(tables, method="offloaded", budget="10%")
    assert collection.embedding_bags["b"].plan.is_dense
    collection({"a": IDS[:5], "b": IDS[:5]}).sum().backward()
    gradient = collection.embedding_bags["a"].file_weight.grad
    assert gradient is not None and gradient.is_sparse


def test_an_optimizer_without_sparse_gradients_refuses() -> None:
    module = table()
    module(IDS).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        torch.optim.Adam(module.parameters()).step()


@pytest.mark.skipif(not ops.is_available(), reason="the reference refuses nothing in a graph")
def test_a_compiled_graph_has_no_dense_gradient_of_the_file() -> None:
    torch._dynamo.reset()
    module = table()
    with pytest.raises(Exception, match="fuse_optimizer"):
        torch.compile(module, fullgraph=True, backend="eager")(IDS)
    torch._dynamo.reset()
    torch.compile(module, backend="eager")(IDS).sum().backward()
    assert module.file_weight.grad.is_sparse


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "error"), [("missing", FileNotFoundError), ("file", NotADirectoryError)]
)
def test_a_directory_that_is_none(name: str, error: type[OSError], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(error, match=rf"rows of {DENSE} bytes .* name another directory"):
        table(method=ec.Offloaded(str(tmp_path / name)))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match="name another directory"):
        table(method=ec.Offloaded(str(tmp_path)))


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="free some room, or name a directory on a larger disk"):
        file_tensor((2**40, 2**10), torch.float32, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="free some room"):
        file_tensor((4, 4), torch.float32, tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_are_for_the_cpu() -> None:
    for device in ("cuda", torch.device("cuda", 1)):
        with pytest.raises(ValueError, match="leave this table on the CPU"):
            table(device=device)
    assert table(device="meta").file_weight.is_meta


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="ways must be"):
        ec.Offloaded(ways=0)
    with pytest.raises(TypeError, match="directory must be a string or None"):
        ec.Offloaded(directory=Path("/tmp"))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- the plan


def test_the_plan_says_what_is_in_a_file() -> None:
    plan = table().plan
    again = LookupPlan.from_json(plan.to_json())
    assert again == plan and again.store("file_weight").is_in_file and again.offloaded == DENSE
    with pytest.raises(PlanError, match="unknown location 'tape'"):
        LookupPlan.from_json(plan.to_json().replace('"file"', '"tape"'))
    assert "files" in why_not(plan.with_pool("sum"))
    store = Store("weight", ROWS, WIDTH, location="file")
    whole = LookupPlan(ROWS, WIDTH, (store,), (Probe("weight", Digit(1, ROWS)),))
    assert whole.bytes == 0 and not whole.is_dense


@pytest.mark.parametrize("settings", [{"dtype": "uint8"}, {"stride": 4}, {"shared": "all"}])
def test_only_plain_floats_are_in_files(settings: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="can be in a file"):
        Store("weight", ROWS, WIDTH, location="file", **settings)  # type: ignore[arg-type]


def test_ids_of_more_than_32_bits_have_hashed_tags() -> None:
    plan = ec.Offloaded().plan(TableSpec(2**40, 4), 1000)
    assert plan.store("keys").bits == 32 and plan.offloaded == 2**44
