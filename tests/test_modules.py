"""One contract for every method, generated over the registry: shapes, dtypes, inputs, state."""

from __future__ import annotations

import copy
import io
import os
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import embcompress as ec
from embcompress.budget import smallest_plan
from embcompress.layouts.latents import fixed_steps
from embcompress.methods import TableSpec

ROWS, WIDTH = 300, 8
MODES = ("sum", "mean", "max")
METHODS = sorted(ec.methods())


def bag(method: str, **arguments: object) -> ec.EmbeddingBag:
    torch.manual_seed(0)
    return ec.EmbeddingBag(ROWS, WIDTH, method=method, **arguments)


def some_bags() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, ROWS, (40,), generator=generator)
    return ids, torch.tensor([0, 0, 7, 8, 30, 40])


def in_memory(module: ec.EmbeddingBag) -> ec.EmbeddingBag:
    """The module, or where rows are in files a copy in memory, which takes dense gradients."""
    if not module.plan.offloaded:
        return module
    stores = tuple(replace(store, location="memory") for store in module.plan.stores)
    held = ec.EmbeddingBag.from_plan(replace(module.plan, stores=stores))
    held.load_stores(module.stores())
    return held


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_idx", [None, 5, -1])
def test_a_bag_pools_the_vectors_of_its_ids(method: str, mode: str, padding_idx: int) -> None:
    module = bag(method, mode=mode, padding_idx=padding_idx).double()
    ids, offsets = some_bags()
    ids[:3] = ROWS - 1 if padding_idx == -1 else 5
    dense = module.to_dense()
    expected = F.embedding_bag(ids, dense, offsets, mode=mode, padding_idx=padding_idx)
    torch.testing.assert_close(module(ids, offsets), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_every_form_of_input_gives_the_same(method: str, mode: str) -> None:
    module = bag(method, mode=mode)
    ids = torch.randint(0, ROWS, (6, 4))
    offsets = torch.arange(0, 24, 4)
    expected = module(ids)
    last = bag(method, mode=mode, include_last_offset=True)
    nested = torch.nested.nested_tensor(list(ids), layout=torch.jagged)
    forms = {
        "offsets": module(ids.reshape(-1), offsets),
        "int32": module(ids.int().reshape(-1), offsets.int()),
        "int32 ids, int64 offsets": module(ids.int().reshape(-1), offsets),
        "last offset": last(ids.reshape(-1), torch.arange(0, 25, 4)),
        "not contiguous": module(ids.t().contiguous().t()),
        "nested": module(nested),
    }
    for name, actual in forms.items():
        assert torch.equal(actual, expected), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_empty_bags_and_batches(method: str, mode: str) -> None:
    module = bag(method, mode=mode)
    none = torch.empty(0, dtype=torch.long)
    assert module(none, none).shape == (0, WIDTH)
    assert torch.equal(module(none, torch.tensor([0, 0])), torch.zeros(2, WIDTH))
    assert module(torch.empty(3, 0, dtype=torch.long)).equal(torch.zeros(3, WIDTH))
    one = module(torch.tensor([[7]]))
    assert one.shape == (1, WIDTH)
    module(none, torch.tensor([0])).sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_embedding_gives_a_vector_for_every_id(method: str) -> None:
    torch.manual_seed(0)
    module = ec.Embedding(ROWS, WIDTH, padding_idx=4, method=method)
    dense = module.to_dense()
    for shape in [(), (5,), (2, 3), (0,), (2, 0), (2, 3, 4)]:
        ids = torch.randint(0, ROWS, shape)
        # Products with a head are rounded differently in batches of another size.
        tolerance = 0.0 if module.plan.head is None else 1e-6
        torch.testing.assert_close(module(ids), dense[ids], rtol=tolerance, atol=tolerance)
    assert module(torch.tensor([4, 4])).eq(0).all()
    module(torch.tensor([4])).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_per_sample_weights(method: str) -> None:
    module = bag(method, mode="sum").double()
    ids, offsets = some_bags()
    weights = torch.randn(40, dtype=torch.double, requires_grad=True)
    reference = weights.detach().clone().requires_grad_()
    actual = module(ids, offsets, weights)
    expected = F.embedding_bag(
        ids, module.to_dense(), offsets, mode="sum", per_sample_weights=reference
    )
    torch.testing.assert_close(actual, expected)
    gradient = torch.randn_like(expected)
    actual.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(weights.grad, reference.grad)


@pytest.mark.parametrize("method", METHODS)
def test_per_sample_weights_need_sum(method: str) -> None:
    with pytest.raises(ValueError, match="mode='sum'"):
        bag(method, mode="mean")(torch.zeros(1, 1, dtype=torch.long), None, torch.ones(1, 1))


@pytest.mark.parametrize("method", METHODS)
def test_sparse_gradients_equal_dense_ones(method: str) -> None:
    dense, sparse = bag(method, mode="sum"), bag(method, mode="sum", sparse=True)
    sparse.load_state_dict(dense.state_dict())
    dense = in_memory(dense)
    ids, offsets = some_bags()
    for module in (dense, sparse):
        module(ids, offsets).pow(2).sum().backward()
    for name, parameter in sparse.named_parameters():
        if name in fixed_steps(sparse.plan):
            continue
        assert parameter.grad is not None
        assert parameter.grad.is_sparse == (name not in sparse.plan.head_stores)
        torch.testing.assert_close(
            parameter.grad.to_dense(), dense.get_parameter(name).grad, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = ec.EmbeddingBag(ROWS, WIDTH, mode="sum", method=method, dtype=dtype)
    ids, offsets = some_bags()
    assert module(ids, offsets).dtype == dtype
    floats = {store.dtype for store in module.plan.stores if store.is_float}
    assert floats == {str(dtype).removeprefix("torch.")}
    assert module.plan.bytes == ec.memory(module).total
    moved = module.to(torch.float32)
    assert {store.dtype for store in moved.plan.stores if store.is_float} == {"float32"}
    assert moved(ids, offsets).dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_deepcopy_and_pickle(method: str) -> None:
    module, other = bag(method, mode="sum"), bag(method, mode="sum")
    ids, offsets = some_bags()
    expected = module(ids, offsets)
    nn.init.zeros_(next(other.parameters()))
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    assert not other.load_state_dict(torch.load(buffer, weights_only=True)).missing_keys
    copies = [other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for twin in copies:
        assert torch.equal(twin(ids, offsets), expected)
        assert twin.plan == module.plan


@pytest.mark.parametrize("method", sorted({*METHODS} - {"full"}))
def test_weights_of_another_plan_are_refused(method: str) -> None:
    table, chosen = TableSpec(ROWS, WIDTH), ec.resolve_method(method)
    if len(chosen.sizes(table)) == 1:
        pytest.skip("a method of one size has one plan")
    if chosen.searches_plans:
        pytest.skip("a method that searches for plans takes that of the weights")
    module = bag(method, mode="sum", budget="50%")
    smaller = bag(method, mode="sum", budget=smallest_plan(chosen, table).bytes)
    with pytest.raises(RuntimeError, match="another plan"):
        smaller.load_state_dict(module.state_dict())
    state = module.state_dict()
    del state["plan"]
    with pytest.raises(RuntimeError, match=r"Missing key.*plan"):
        module.load_state_dict(state)


def test_weights_of_another_seed_are_refused() -> None:
    with pytest.raises(RuntimeError, match="same method, budget, seed and name"):
        bag("hash", seed=1).load_state_dict(bag("hash", seed=0).state_dict())


def test_full_reads_and_writes_torch_state() -> None:
    torch_bag, ours = nn.EmbeddingBag(ROWS, WIDTH), bag("full")
    ours.load_state_dict(torch_bag.state_dict())
    torch_bag.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_compile_without_graph_break(method: str) -> None:
    torch._dynamo.reset()
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    module = bag(method, mode="mean", padding_idx=1)
    if module.plan.offloaded:  # else a graph would have a dense gradient of the file
        ec.fuse_optimizer(module, "sgd", lr=0.1)
    # Inductor needs a C++ compiler; the graph is the same for the other backend.
    backend = "inductor" if compiler else "aot_eager"
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for count in (5, 17):
        ids = torch.randint(0, ROWS, (count * 3,))
        offsets = torch.arange(0, count * 3, 3)
        torch.testing.assert_close(compiled(ids, offsets), module(ids, offsets))


@pytest.mark.parametrize("method", METHODS)
def test_export_with_dynamic_ids_and_bags(method: str) -> None:
    module = bag(method, mode="mean")
    ids, offsets = some_bags()
    dynamic = {"input": {0: torch.export.Dim("ids")}, "offsets": {0: torch.export.Dim("bags")}}
    exported = torch.export.export(module, (ids, offsets), dynamic_shapes=dynamic).module()
    ids, offsets = torch.randint(0, ROWS, (9,)), torch.tensor([0, 3, 3])
    torch.testing.assert_close(exported(ids, offsets), module(ids, offsets))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [-1, ROWS, 2**31, 2**40, -(2**63)])
def test_ids_outside_the_vocabulary_are_refused(method: str, bad: int) -> None:
    ids = torch.tensor([[1, 2], [3, bad]])
    for module in (bag(method), ec.Embedding(ROWS, WIDTH, method=method)):
        with pytest.raises(IndexError, match=rf"id {bad} at position 3 is outside \[0, {ROWS}\)"):
            module(ids)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 2], r"offsets\[0\] must be 0, got 1"),
        ([0, 3, 2], r"offsets\[2\] = 2 after 3"),
        ([0, 9], "must not decrease"),
    ],
)
def test_offsets_that_describe_no_bags_are_refused(
    method: str, offsets: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bag(method)(torch.arange(5), torch.tensor(offsets))


@pytest.mark.parametrize("last", [4, 6])
def test_a_wrong_last_offset_is_refused(last: int) -> None:
    with pytest.raises(ValueError, match="last offset must be the number of ids, 5"):
        bag("full", include_last_offset=True)(torch.arange(5), torch.tensor([0, 2, last]))


def test_other_bad_input_is_refused() -> None:
    module = bag("hash", mode="sum")
    with pytest.raises(TypeError, match="int32 or int64"):
        module(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="offsets must be given"):
        module(torch.arange(3))
    with pytest.raises(ValueError, match="offsets must be None"):
        module(torch.zeros(2, 2, dtype=torch.long), torch.tensor([0]))
    with pytest.raises(ValueError, match="per_sample_weights has shape"):
        module(torch.arange(3), torch.tensor([0]), torch.ones(2))


@pytest.mark.parametrize("method", sorted({*METHODS} - {"full"}))
def test_arguments_about_dense_rows_are_refused_with_a_reason(method: str) -> None:
    with pytest.raises(ValueError, match="max_norm renormalizes rows of the dense table"):
        bag(method, max_norm=1.0)
    with pytest.raises(ValueError, match="scale_grad_by_freq divides"):
        bag(method, scale_grad_by_freq=True)
    with pytest.raises(ValueError, match="_weight is a dense table"):
        bag(method, _weight=torch.zeros(ROWS, WIDTH))


def test_bad_constructor_arguments() -> None:
    with pytest.raises(ValueError, match=r"known methods: .*full, hash"):
        bag("no_such_method")
    with pytest.raises(TypeError, match="method must be a name or a method object"):
        bag(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_embeddings must be an integer"):
        ec.EmbeddingBag(0, 4)
    with pytest.raises(ValueError, match="padding_idx must be in"):
        bag("hash", padding_idx=ROWS)
    with pytest.raises(ValueError, match="seed must be an integer, got 'x'"):
        bag("hash", seed="x")
    with pytest.raises(ValueError, match="mode must be"):
        bag("hash", mode="median")


def test_full_draws_the_numbers_that_torch_draws() -> None:
    torch.manual_seed(3)
    expected = nn.EmbeddingBag(50, 4, padding_idx=2)
    torch.manual_seed(3)
    assert torch.equal(ec.EmbeddingBag(50, 4, padding_idx=2).weight, expected.weight)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("std", [1.0, 0.05])
def test_vectors_start_with_the_wanted_deviation(method: str, std: float) -> None:
    torch.manual_seed(0)
    module = ec.Embedding(20_000, 32, method=method, budget=None if method == "full" else "40%")
    module.reset_parameters(std)
    vectors = module.to_dense()
    present = vectors.any(1)  # ids without a row read zero
    quantized = [store for store in module.plan.stores if store.quantization is not None]
    if quantized and all(store.bits == 1 for store in quantized):
        # The two values that read normal numbers with the least error lie closer together.
        std *= (2 / torch.pi) ** 0.5
    # Three standard errors of the deviation of as few numbers as the vectors may be made of.
    sizes = [module.stores()[probe.store].numel() for probe in module.plan.probes]
    slack = max(0.1, 3 / (2 * min(sizes, default=1000)) ** 0.5)
    assert float(vectors[present].std()) == pytest.approx(std, rel=slack)


@pytest.mark.parametrize("method", METHODS)
def test_training_reaches_every_store(method: str) -> None:
    module = bag(method, mode="sum")
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.arange(ROWS)[None]).pow(2).sum().backward()
    optimizer.step()
    fixed = fixed_steps(module.plan)
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (name not in fixed), name
        assert name in fixed or not torch.equal(parameter, before[name]), name


def test_from_pretrained_orders_its_arguments_as_torch() -> None:
    weight = torch.randn(6, 3)
    ours = ec.EmbeddingBag.from_pretrained(weight, False, None, 2.0, False, "max")
    assert ours.mode == "max" and ours.weight.requires_grad
    frozen = ec.Embedding.from_pretrained(weight, True, 2)
    assert frozen.padding_idx == 2 and not frozen.weight.requires_grad
    assert torch.equal(frozen(torch.arange(6)), weight)


def test_from_plan_runs_any_plan() -> None:
    plan = bag("qr", mode="sum").plan
    module = ec.EmbeddingBag.from_plan(ec.LookupPlan.from_json(plan.to_json()))
    assert module.plan == plan
    with pytest.raises(ValueError, match=r"plan\.pool is 'none'"):
        ec.EmbeddingBag.from_plan(plan.with_pool("none"))
