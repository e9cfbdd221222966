"""Every form of input becomes the same bags, and what describes no bags is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import embcompress as ec
from embcompress.engine import Bags, check_ids, check_offsets, lookup, make_bags
from embcompress.plan import Digit, Hash, LookupPlan, Probe, Store

DTYPES = [torch.int32, torch.int64]
BAGS = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=6)


def contents(bags: Bags) -> list[list[int]]:
    ends = bags.offsets.tolist()
    return [bags.ids[begin:end].tolist() for begin, end in itertools.pairwise(ends)]


@settings(deadline=None)
@given(expected=BAGS, dtype=st.sampled_from(DTYPES), offsets_dtype=st.sampled_from(DTYPES))
def test_offsets_with_and_without_the_last(
    expected: list[list[int]], dtype: torch.dtype, offsets_dtype: torch.dtype
) -> None:
    ids = torch.tensor([id for bag in expected for id in bag], dtype=dtype)
    ends = torch.tensor([0, *(len(bag) for bag in expected)]).cumsum(0).to(offsets_dtype)
    for offsets, last in ((ends, True), (ends[:-1], False)):
        if not expected and not last:
            continue  # without bags there is no offset, and the ids must be empty: below
        bags = make_bags(ids, offsets, None, include_last_offset=last)
        assert contents(bags) == expected
        assert bags.ids.dtype == bags.offsets.dtype == torch.promote_types(dtype, offsets_dtype)


@settings(deadline=None)
@given(batch=st.integers(0, 4), length=st.integers(0, 4), dtype=st.sampled_from(DTYPES))
def test_two_dimensions(batch: int, length: int, dtype: torch.dtype) -> None:
    ids = torch.arange(batch * length, dtype=dtype).reshape(batch, length)
    weights = torch.rand(batch, length)
    bags = make_bags(ids, None, weights, include_last_offset=False)
    assert contents(bags) == ids.tolist()
    assert bags.offsets.dtype == dtype and bags.offsets.shape == (batch + 1,)
    assert torch.equal(bags.weights, weights.reshape(-1))


def test_two_dimensions_that_are_not_contiguous() -> None:
    ids = torch.arange(12).reshape(3, 4).t()
    assert contents(make_bags(ids, None, None, include_last_offset=False)) == ids.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_jagged_nested_tensors(dtype: torch.dtype) -> None:
    rows = [[1, 2, 3], [], [4]]
    ids = torch.nested.nested_tensor(
        [torch.tensor(row, dtype=dtype) for row in rows], layout=torch.jagged
    )
    weights = torch.arange(4.0)
    for given_weights in (weights, torch.nested.nested_tensor_from_jagged(weights, ids.offsets())):
        bags = make_bags(ids, None, given_weights, include_last_offset=False)
        assert contents(bags) == rows and bags.offsets.dtype == dtype
        assert torch.equal(bags.weights, weights)


def test_a_batch_without_bags() -> None:
    none = torch.empty(0, dtype=torch.int64)
    bags = make_bags(none, none, None, include_last_offset=False)
    assert bags.offsets.tolist() == [0] and contents(bags) == []


# ------------------------------------------------------------------------------------ refusals


def tensor(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


IDS = tensor(1, 2, 3)
BROKEN_OFFSETS = {
    "not from zero": (tensor(1, 3), "offsets\\[0\\] must be 0, got 1"),
    "negative": (tensor(-1, 3), "offsets\\[0\\] must be 0, got -1"),
    "decreasing": (
        tensor(0, 2, 1, 3),
        "offsets\\[2\\] = 1 after 2 \\(there are 3 ids\\)",
    ),
    "past the end and back": (tensor(0, 2**62, 3), "must not decrease: offsets\\[2\\] = 3"),
    "past the end": (tensor(0, 4), "last offset must be the number of ids, 3, got 4"),
    "short of the end": (tensor(0, 2), "last offset must be the number of ids, 3, got 2"),
    "empty": (tensor(), "at least one entry"),
}


@pytest.mark.parametrize("what", BROKEN_OFFSETS)
def test_offsets_that_describe_no_bags(what: str) -> None:
    offsets, words = BROKEN_OFFSETS[what]
    with pytest.raises(ValueError, match=words):
        make_bags(IDS, offsets, None, include_last_offset=True)


def test_a_start_past_the_end() -> None:
    with pytest.raises(ValueError, match="offsets\\[2\\] = 3 after 4"):
        make_bags(IDS, tensor(0, 4), None, include_last_offset=False)


def test_ids_without_a_bag() -> None:
    with pytest.raises(ValueError, match="offsets\\[0\\] must be 0, got 3"):
        make_bags(IDS, tensor(), None, include_last_offset=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8, torch.bool])
def test_ids_and_offsets_are_integers(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="input must be int32 or int64"):
        make_bags(IDS.to(dtype), tensor(0, 3), None, include_last_offset=True)
    with pytest.raises(TypeError, match="offsets must be int32 or int64"):
        make_bags(IDS, tensor(0, 1).to(dtype), None, include_last_offset=True)
    with pytest.raises(TypeError, match="input must be int32 or int64"):
        check_ids(IDS.to(dtype), 10)


@pytest.mark.parametrize("wanted", [True, False], ids=["with gradients", "without"])
def test_lists_and_arrays_are_refused_by_name(wanted: bool) -> None:
    offsets = tensor(0, 1)
    collection = ec.EmbeddingBagCollection([ec.TableConfig("a", 10, 4)], method="hash")
    table = collection.embedding_bags["a"]
    refused = "must be a tensor, got {}; call torch.as_tensor on it"
    with torch.set_grad_enabled(wanted):
        with pytest.raises(TypeError, match="^input " + refused.format("list")):
            ec.Embedding(10, 4, method="hash")(IDS.tolist())
        with pytest.raises(TypeError, match="^input " + refused.format("ndarray")):
            table(IDS.numpy(), offsets)
        with pytest.raises(TypeError, match="^offsets " + refused.format("list")):
            table(IDS, offsets.tolist())
        with pytest.raises(TypeError, match="^per_sample_weights " + refused.format("list")):
            table(IDS, offsets, [1.0, 2.0, 3.0])
        with pytest.raises(TypeError, match="^input " + refused.format("NoneType")):
            collection(None, offsets)
        with pytest.raises(TypeError, match="^feature 'a': input " + refused.format("list")):
            collection({"a": IDS.tolist()})


NESTED = torch.nested.nested_tensor([IDS, IDS], layout=torch.jagged)
BROKEN_INPUTS = {
    "1-D without offsets": ((IDS, None, None), "offsets must be given"),
    "2-D with offsets": ((IDS[None], tensor(0), None), "offsets must be None when input is 2-D"),
    "3-D": ((IDS[None, None], None, None), "1-D \\(with offsets\\) or 2-D, got 3-D"),
    "0-D": ((IDS[0], None, None), "got 0-D"),
    "2-D offsets": ((IDS, tensor(0)[None], None), "offsets must be 1-D, got 2-D"),
    "nested with offsets": ((NESTED, tensor(0), None), "None when input is a nested tensor"),
    "weights of another shape": ((IDS, tensor(0), torch.ones(2)), "\\(2,\\), input has \\(3,\\)"),
    "weights of another rank": ((IDS[None], None, torch.ones(3)), "they must be equal"),
    "weights of other lengths": ((NESTED, None, torch.ones(5)), "as many values as the nested"),
}


@pytest.mark.parametrize("what", BROKEN_INPUTS)
def test_inputs_that_describe_no_bags(what: str) -> None:
    arguments, words = BROKEN_INPUTS[what]
    with pytest.raises(ValueError, match=words):
        make_bags(*arguments, include_last_offset=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_strided_nested_tensor() -> None:
    strided = torch.nested.nested_tensor([IDS, IDS], layout=torch.strided)
    with pytest.raises(ValueError, match="layout=torch\\.jagged"):
        make_bags(strided, None, None, include_last_offset=False)


@settings(deadline=None)
@given(values=st.lists(st.integers(-2, 6), min_size=1, max_size=5), count=st.integers(0, 5))
def test_offsets_are_right_or_refused(values: list[int], count: int) -> None:
    right = values[0] == 0 and values[-1] == count and values == sorted(values)
    try:
        check_offsets(tensor(*values), count)
    except ValueError:
        assert not right
    else:
        assert right


# ----------------------------------------------------------------------------------------- ids

BAD_IDS = [-1, 10, 2**40, -(2**63), 2**63 - 1]
FULL = LookupPlan(10, 2, (Store("rows", 10, 2),), (Probe("rows", Digit(1, 10)),))
HASHED = LookupPlan(10, 2, (Store("rows", 3, 2),), (Probe("rows", Hash(5, 3)),))


@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize("plan", [FULL, HASHED], ids=["full", "hashed"])
@pytest.mark.parametrize("pool", ["none", "sum", "mean", "max"])
def test_ids_outside_the_vocabulary(plan: LookupPlan, pool: str, bad: int) -> None:
    stores = {"rows": torch.randn(plan.stores[0].rows, 2, requires_grad=True)}
    ids = tensor(3, bad, 4, -7)
    bags = Bags(ids, tensor(0, 4))
    with pytest.raises(IndexError, match=f"id {bad} at position 1 is outside \\[0, 10\\)"):
        lookup(plan.with_pool(pool), stores, bags)


def test_ids_at_the_ends_of_the_vocabulary() -> None:
    check_ids(tensor(0, 9), 10)
    check_ids(tensor(0, 2**63 - 2), 2**63 - 1)
    check_ids(torch.tensor([0, 2**31 - 1], dtype=torch.int32), 2**31)
    check_ids(tensor(), 1)


def test_a_bad_id_of_32_bits() -> None:
    with pytest.raises(IndexError, match="id -1 at position 0"):
        check_ids(torch.tensor([-1], dtype=torch.int32), 2**40)


def test_a_bad_id_in_two_dimensions() -> None:
    with pytest.raises(IndexError, match="id 12 at position 3"):
        check_ids(torch.tensor([[1, 2], [3, 12]]), 10)


def test_checks_survive_compilation() -> None:
    """A compiled graph refuses the same inputs, with torch's own error."""

    @torch.compile(fullgraph=True, backend="eager")
    def checked(ids: Tensor, offsets: Tensor) -> Tensor:
        check_offsets(offsets, ids.numel())
        check_ids(ids, 10)
        return ids + 1

    assert checked(IDS, tensor(0, 3)).tolist() == [2, 3, 4]
    with pytest.raises(RuntimeError, match="ids must be in \\[0, 10\\)"):
        checked(tensor(1, 2, 10), tensor(0, 3))
    with pytest.raises(RuntimeError, match="offsets must rise"):
        checked(IDS, tensor(0, 2))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_weights_that_are_no_floats_are_refused(dtype: torch.dtype) -> None:
    ids = torch.tensor([[1, 2]])
    weights = torch.ones(1, 2, dtype=dtype)
    nested = torch.nested.nested_tensor([torch.tensor([1, 2])], layout=torch.jagged)
    for input, each in ((ids, weights), (nested, weights[0])):
        with pytest.raises(TypeError, match=f"must be floating-point, got {dtype}; call .float"):
            make_bags(input, None, each, include_last_offset=False)
    with pytest.raises(TypeError, match="must be floating-point"):
        make_bags(ids[0], torch.tensor([0]), weights[0], include_last_offset=False)
