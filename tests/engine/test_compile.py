"""torch.compile without graph breaks or recompilation, torch.export, AOTInductor packages."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.export import Dim

import embcompress as ec
from embcompress.engine import ops

pytestmark = pytest.mark.skipif(
    not ops.is_available(),
    reason="the C++ extension is not built, or EMBCOMPRESS_ENGINE=reference is set",
)

METHODS = ("hash", "qr", "low_dim")
TABLES = [
    ec.TableConfig("user", 500, 8, ("viewer", "seller")),
    ec.TableConfig("item", 900, 8, mode="mean"),
]


@contextmanager
def one_graph() -> Iterator[None]:
    """The code inside compiles one graph, without a break, and never again."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"], dict(counters["graph_break"])


def make_bags(batch: int, features: int = 1) -> tuple[Tensor, Tensor]:
    """Ids and (features * batch + 1,) offsets of bags of 0 to 4 ids, to be compiled as dynamic."""
    generator = torch.Generator().manual_seed(batch)
    lengths = torch.randint(0, 5, (features * batch,), generator=generator)
    ids = torch.randint(0, 500, (int(lengths.sum()),), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    torch._dynamo.mark_dynamic(ids, 0)
    torch._dynamo.mark_dynamic(offsets, 0)
    return ids, offsets


def make_bag(method: str, mode: str = "sum") -> ec.EmbeddingBag:
    torch.manual_seed(0)
    return ec.EmbeddingBag(500, 8, mode=mode, method=method, include_last_offset=True)


def make_collection(method: str) -> ec.EmbeddingBagCollection:
    torch.manual_seed(0)
    return ec.EmbeddingBagCollection(TABLES, method=method, budget="20%")


def assert_compiles(module: nn.Module, inputs: list[tuple[Tensor, ...]], backend: str) -> None:
    """Values and gradients of the compiled module, for all inputs from one graph."""
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    parameters = list(module.parameters())
    with one_graph():
        for arguments in inputs:
            expected, found = module(*arguments), compiled(*arguments)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            gradient = torch.randn_like(expected)
            theirs = torch.autograd.grad(expected, parameters, gradient)
            ours = torch.autograd.grad(found, parameters, gradient)
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


BATCHES = (6, 17, 3, 64)
INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("method", "mode"), [("hash", "sum"), ("hash", "max"), ("qr", "mean"), ("low_dim", "max")]
)
def test_bags(method: str, mode: str) -> None:
    assert_compiles(make_bag(method, mode), [make_bags(b) for b in BATCHES], "aot_eager")


@pytest.mark.parametrize("method", METHODS)
def test_bags_with_weights(method: str) -> None:
    inputs = []
    for batch in BATCHES:
        ids, offsets = make_bags(batch)
        weights = torch.rand(len(ids))
        torch._dynamo.mark_dynamic(weights, 0)
        inputs.append((ids, offsets, weights))

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = make_bag(method)
            self.temperature = nn.Parameter(torch.tensor(0.5))

        def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
            return self.table(ids, offsets, weights * self.temperature)

    assert_compiles(Weighted(), inputs, "aot_eager")


@pytest.mark.parametrize(("method", "shape"), [("hash", 1), ("qr", 2), ("low_dim", 2)])
def test_embeddings(method: str, shape: int) -> None:
    torch.manual_seed(0)
    module = ec.Embedding(500, 8, method=method)
    inputs = []
    for batch in BATCHES:
        ids = torch.randint(0, 500, (batch, 3)[:shape])
        torch._dynamo.mark_dynamic(ids, 0)
        inputs.append((ids,))
    assert_compiles(module, inputs, "aot_eager")


@pytest.mark.parametrize("method", METHODS)
def test_collections(method: str) -> None:
    inputs = [make_bags(batch, 3) for batch in BATCHES]
    assert_compiles(make_collection(method), inputs, "aot_eager")


class Scorer(nn.Module):
    """A layer without a matrix product: Inductor compiles small ones anew for larger batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 24))

    def forward(self, vectors: Tensor) -> Tensor:
        return (vectors * self.weight).sum(1)


@pytest.mark.slow  # a minute of a C++ compiler where it has no precompiled headers yet
def test_inductor() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = make_collection("qr")
            self.layer = Scorer()

        def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
            return self.layer(self.tables(ids, offsets)).sigmoid()

    assert_compiles(Model(), [make_bags(batch, 3) for batch in BATCHES], "inductor")


def test_sizes_that_nobody_marked_compile_twice_at_most() -> None:
    torch._dynamo.reset()
    counters.clear()
    module = make_bag("qr")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch in (6, 17, 3, 64, 33, 9):
        ids = torch.randint(0, 500, (5 * batch,))
        offsets = torch.arange(batch + 1) * 5
        torch.testing.assert_close(compiled(ids, offsets), module(ids, offsets))
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("bad", [-1, 500, 2**40])
def test_a_bad_id_is_an_error_of_the_compiled_module_too(bad: int) -> None:
    compiled = torch.compile(make_bag("hash"), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        compiled(torch.tensor([1, bad]), torch.tensor([0, 2]))


# ----------------------------------------------------------------------------- a training step


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_training_steps(backend: str) -> None:
    plain = nn.ModuleDict({"tables": make_collection("qr"), "layer": Scorer()})
    other = copy.deepcopy(plain)

    def loss_of(model: nn.ModuleDict, ids: Tensor, offsets: Tensor) -> Tensor:
        return model["layer"](model["tables"](ids, offsets)).pow(2).mean()

    compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
    with one_graph():
        for model, loss in ((plain, loss_of), (other, compiled)):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for batch in BATCHES:
                optimizer.zero_grad()
                loss(model, *make_bags(batch, 3)).backward()
                optimizer.step()
    for ours, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def train_fused(eager: nn.Module, other: nn.Module, name: str, features: int, backend: str) -> None:
    """Steps of both, one compiled, with a rate that changes; stores and state stay equal."""
    rules = [ec.fuse_optimizer(module, name, lr=0.1) for module in (eager, other)]
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    tensors = [*other.parameters(), *other.buffers()]
    addresses = [tensor.data_ptr() for tensor in tensors]
    before = [p.clone() for p in other.parameters()]
    with one_graph():
        for step, batch in enumerate(BATCHES):
            for rule in rules:
                rule.lr = 0.1 / (step + 1)
            arguments = make_bags(batch, features)
            gradient = torch.randn_like(eager(*arguments))
            eager(*arguments).backward(gradient)
            compiled(*arguments).backward(gradient)
    for key, expected in eager.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], expected, rtol=1e-5, atol=1e-6)
    assert not any(map(torch.equal, before, other.parameters()))
    assert addresses == [tensor.data_ptr() for tensor in [*other.parameters(), *other.buffers()]]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("qr", "sgd"),
        ("qr", "adagrad"),
        ("qr", "rowwise_adagrad"),
        ("qr", "adam"),
        ("hash", "rowwise_adagrad"),
        ("low_dim", "adam"),
    ],
)
def test_fused_optimizers(name: str, method: str) -> None:
    train_fused(make_bag(method), make_bag(method), name, 1, "aot_eager")


@pytest.mark.parametrize("method", METHODS)
def test_fused_collections(method: str) -> None:
    if make_bag(method).plan.head is not None and not ops.runs_every_plan(torch.device("cpu")):
        pytest.skip("before heads that torch runs, gradients are dense in a compiled graph")
    train_fused(make_collection(method), make_collection(method), "adam", 3, "aot_eager")


def test_the_compiled_update_is_in_place() -> None:
    """Neither stores nor state are copied: the update costs what the batch costs."""
    from torch._inductor.utils import run_and_get_code

    module = make_bag("hash")
    ec.fuse_optimizer(module, "adam", lr=0.1)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True)

    def step(ids: Tensor, offsets: Tensor) -> None:
        compiled(ids, offsets).sum().backward()

    _, sources = run_and_get_code(step, *make_bags(6))
    (backward,) = [source for source in sources if "lookup_backward_update" in source]
    call = backward[backward.index("def call(") :]
    rows = module.plan.stores[0].rows
    assert f"({rows}, 8)" in call  # the store comes in
    assert f"empty_strided_cpu(({rows}, 8)" not in call
    assert "copy_(" not in call


def test_a_lookup_without_gradients_updates_nothing() -> None:
    module = make_bag("qr")
    ec.fuse_optimizer(module, "sgd", lr=0.1)
    before = copy.deepcopy(module.state_dict())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(*make_bags(6))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


# ------------------------------------------------------------------------------ export, packages


def exported(module: nn.Module, features: int) -> torch.export.ExportedProgram:
    ids, batch = Dim("ids", min=2), Dim("batch", min=2)
    shapes: Any = ({0: ids}, {0: features * batch + 1})
    arguments = tuple(tensor.clone() for tensor in make_bags(8, features))
    return torch.export.export(module.eval(), arguments, dynamic_shapes=shapes)


def modules() -> list[Any]:
    return [
        pytest.param(lambda: make_bag("hash"), 1, id="hash"),
        pytest.param(lambda: make_bag("qr", "mean"), 1, id="qr-mean"),
        pytest.param(lambda: make_bag("low_dim"), 1, id="low_dim"),
        pytest.param(lambda: make_collection("qr"), 3, id="collection"),
    ]


@pytest.mark.parametrize(("make", "features"), modules())
def test_export(make: Any, features: int) -> None:
    module = make()
    program = exported(module, features).module()
    for batch in (2, 5, 40):
        arguments = make_bags(batch, features)
        torch.testing.assert_close(program(*arguments), module(*arguments))


def test_export_of_an_embedding() -> None:
    module = ec.Embedding(500, 8, method="qr")
    shapes: Any = ({0: Dim("ids", min=2)},)
    program = torch.export.export(module, (torch.tensor([1, 2, 3]),), dynamic_shapes=shapes)
    for count in (2, 9, 100):
        ids = torch.randint(0, 500, (count,))
        assert torch.equal(program.module()(ids), module(ids))


# A process that knows torch and the library of operators, and nothing of this package.
SERVE = """
import sys
import torch

library, package, batches = sys.argv[1:]
torch.ops.load_library(library)
model = torch._inductor.aoti_load_package(package)
for arguments, expected in torch.load(batches):
    torch.testing.assert_close(model(*arguments), expected, rtol=0, atol=1e-6)
assert "embcompress" not in sys.modules
print("served")
"""


def library_path() -> Path:
    """The file that holds the operators of this process."""
    (path,) = [path for path in torch.ops.loaded_libraries if "_C" in Path(path).name] or [
        sys.modules["embcompress._C"].__file__
    ]
    return Path(str(path))


@pytest.mark.slow
@pytest.mark.parametrize(("make", "features"), modules()[1::2])
def test_a_package_runs_in_a_fresh_process(tmp_path: Path, make: Any, features: int) -> None:
    module = make()
    package = torch._inductor.aoti_compile_and_package(
        exported(module, features), package_path=str(tmp_path / "model.pt2")
    )
    batches = []
    for batch in (2, 5, 40):
        arguments = tuple(tensor.clone() for tensor in make_bags(batch, features))
        batches.append((arguments, module(*arguments).detach()))
    torch.save(batches, tmp_path / "batches.pt")
    command = [sys.executable, "-c", SERVE, str(library_path()), package]
    done = subprocess.run(
        [*command, str(tmp_path / "batches.pt")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "served"
