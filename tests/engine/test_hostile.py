"""The operators refuse every input that would make them read or write outside of a tensor.

``make sanitize`` runs these under AddressSanitizer, which stops at any access that was not refused.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from embcompress.engine import ops
from embcompress.engine.encoding import encode_plans
from tests.engine.calls import NUM_FLOATS, PLAN, Call, make_call, run_everything

pytestmark = pytest.mark.skipif(
    not ops.is_available(),
    reason="the C++ extension is not built, or EMBCOMPRESS_ENGINE=reference is set",
)


def test_the_call_itself_is_fine() -> None:
    run_everything(make_call())


# -------------------------------------------------------------------------------------- stores


def with_store(call: Call, number: int, store: Tensor) -> Call:
    return replace(call, stores=[*call.stores[:number], store, *call.stores[number + 1 :]])


def test_wrong_numbers_of_stores_are_refused() -> None:
    call = make_call()
    for count in range(len(call.stores)):
        fewer = replace(call, stores=call.stores[:count])
        with pytest.raises(RuntimeError, match=r"encoding: (store|reads)"):
            fewer.forward()


@pytest.mark.parametrize("number", range(6))
def test_a_store_that_is_too_small_is_refused(number: int) -> None:
    call = make_call()
    with_store(call, number, call.stores[number][:-1].clone()).refused("encoding: (reads|takes)")


@pytest.mark.parametrize(("number", "columns"), [(0, 3), (0, 5), (1, 0), (1, 2), (2, 0), (3, 1)])
def test_a_store_of_another_width_is_refused(number: int, columns: int) -> None:
    call = make_call()
    with_store(call, number, torch.rand(len(call.stores[number]), columns)).refused(
        "encoding|float stores must be 2-D"
    )


def test_stores_of_other_layouts_and_dtypes_are_refused() -> None:
    call = make_call()
    rows, packed = call.stores[0], call.stores[4]
    with_store(call, 0, rows.t().contiguous().t()).refused("contiguous")
    with_store(call, 0, rows.repeat(1, 2)[:, :4]).refused("contiguous")
    with_store(call, 4, packed.repeat(2)[::2]).refused("contiguous")
    with_store(call, 0, rows.double()).refused("must be float32, float16 or bfloat16")
    with_store(call, 0, rows.long()).refused("must be float32, float16 or bfloat16")
    with_store(call, 0, rows.flatten()).refused("encoding: reads")
    with_store(call, 4, packed[:, None]).refused("1-D")
    with_store(call, 4, packed.float()[:, None]).refused("encoding: reads")
    with_store(call, 0, torch.empty(50 * 4 * 4).byte()).refused("encoding: reads")


# ------------------------------------------------------------------------------ ids and offsets

BAD_OFFSETS = {
    "decreasing": [0, 2, 1, 5, 6, 9, 12],
    "past the end": [0, 2, 2, 5, 6, 13, 12],
    "far past the end": [0, 2, 2, 5, 6, 2**40, 12],
    "negative": [0, -1, 2, 5, 6, 9, 12],
    "differences that overflow": [0, 2**63 - 1, -(2**63), 5, 6, 9, 12],
    "the first is not 0": [1, 2, 2, 5, 6, 9, 12],
    "the first is negative": [-1, 2, 2, 5, 6, 9, 12],
    "the last is short": [0, 2, 2, 5, 6, 9, 11],
    "the last is long": [0, 2, 2, 5, 6, 9, 13],
    "not features * B + 1": [0, 2, 5, 6, 9, 12],
    "too many": [0, 2, 2, 5, 6, 9, 12, 12],
    "ids, but no bags": [0],
    "the first is the last": [12],
    "none at all": [],
}


@pytest.mark.parametrize("what", sorted(BAD_OFFSETS))
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ends_are_given", [True, False])
def test_bad_offsets_are_refused(what: str, dtype: torch.dtype, ends_are_given: bool) -> None:
    values = BAD_OFFSETS[what]
    if dtype == torch.int32 and any(abs(value) >= 2**31 for value in values):
        pytest.skip("does not fit")
    if not ends_are_given:
        values = values[:-1]
        if what in ("the last is short", "the last is long"):
            pytest.skip("the last is left out")
    call = make_call()
    call.ids = call.ids.to(dtype)
    call.offsets = torch.tensor(values, dtype=dtype)
    call.ends_are_given = ends_are_given
    call.refused("offsets")


def test_one_feature_without_offsets_and_bags_is_refused() -> None:
    call = make_call()
    numbers = {store.name: number for number, store in enumerate(PLAN.stores)}
    call.encoding, call.num_columns = encode_plans([PLAN], [numbers]).tensor, 11
    call.num_features = 1
    call.ids, call.weights = call.ids[:0], call.weights[:0]
    call.offsets = torch.empty(0, dtype=torch.int64)
    call.refused("offsets")
    call.ends_are_given = False
    assert call.forward().shape == (0, 11)  # no ids, no bags: nothing is wrong


def test_many_features_need_offsets() -> None:
    replace(make_call(), offsets=None).refused("features need offsets")


@pytest.mark.parametrize("bad", [-1, 1000, 2**31, 2**40, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("position", [0, 5, 11])
def test_ids_outside_the_vocabulary_are_refused(bad: int, position: int) -> None:
    call = make_call()
    call.ids[position] = bad
    call.refused("outside the vocabulary")
    if abs(bad) < 2**31:
        replace(call, ids=call.ids.int(), offsets=call.offsets.int()).refused("outside the voc")


def test_a_refused_update_changes_nothing() -> None:
    call = make_call()
    call.ids[-1] = 1000
    before = [store.clone() for store in call.stores]
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        call.update()
    assert all(map(torch.equal, before, call.stores))


def test_ids_and_offsets_of_other_dtypes_and_layouts_are_refused() -> None:
    call = make_call()
    for dtype in (torch.float32, torch.int16, torch.uint8, torch.bool):
        replace(call, ids=call.ids.to(dtype)).refused("must be int32 or int64")
        replace(call, offsets=call.offsets.to(dtype)).refused("must be int32 or int64")
    replace(call, offsets=call.offsets.int()).refused("one dtype")
    replace(call, ids=call.ids.repeat(2)[::2]).refused("contiguous 1-D")
    replace(call, ids=call.ids.reshape(3, 4)).refused("contiguous 1-D")
    replace(call, offsets=call.offsets.repeat(2)[::2]).refused("contiguous 1-D")


def test_bad_weights_are_refused() -> None:
    call = make_call()
    replace(call, weights=call.weights[:-1].clone()).refused("one for each of 12 ids")
    replace(call, weights=call.weights.repeat(2)[::2]).refused("contiguous 1-D")
    replace(call, weights=call.weights.reshape(3, 4)).refused("contiguous 1-D")
    for dtype in (torch.float64, torch.int64, torch.uint8):
        replace(call, weights=call.weights.to(dtype)).refused("per_sample_weights must be float32")


# ----------------------------------------------------------------------------------- gradients


def test_bad_gradients_are_refused() -> None:
    call = make_call()
    good = call.grad()
    for bad in (good[:-1], good[:, :-1], good.flatten(), good.double(), good.half(), good[None]):
        for operator in (call.backward, call.backward_sparse, call.backward_weights, call.update):
            with pytest.raises(RuntimeError, match="the gradient must be float32 of the output's"):
                operator(bad)


@pytest.mark.parametrize(
    ("wanted", "match"),
    [
        ([7], "store 7 of 7"),
        ([-1], "store -1 of 7"),
        ([2**62], "of 7"),
        ([4], "packed stores have no gradient"),
        ([0, 0], "wanted twice"),
    ],
)
def test_gradients_of_stores_that_are_not_there_are_refused(wanted: list[int], match: str) -> None:
    call = make_call()
    states = [torch.zeros(50, 4)] * len(wanted)
    with pytest.raises(RuntimeError, match=match):
        call.backward(wanted=wanted)
    with pytest.raises(RuntimeError, match=match):
        call.backward_sparse(wanted=wanted)
    with pytest.raises(RuntimeError, match=match):
        call.update(wanted=wanted, first=states, second=states)


def test_bad_optimizer_state_is_refused() -> None:
    call = make_call()
    good = [torch.zeros_like(store) for store in call.stores[:NUM_FLOATS]]
    long = [torch.zeros(1, dtype=torch.int64) for _ in good]
    settings = torch.zeros(5, dtype=torch.float64)
    for bad in (
        good[:3],
        [],
        [*good[:3], good[3][:-1]],
        [*good[:3], good[3].double()],
        [*good[:3], torch.zeros(2, 9).t()],
        [good[1], good[0], *good[2:]],
    ):
        for name in ("first", "second"):
            with pytest.raises(RuntimeError, match="optimizer state"):
                call.update(**{name: bad})
    for bad in (long[:3], [step.int() for step in long], [step[:0] for step in long]):
        with pytest.raises(RuntimeError, match="optimizer state"):
            call.update(steps=bad)
    with pytest.raises(RuntimeError, match="negative number of steps"):
        call.update(steps=[step - 5 for step in long])
    for wrong in (settings[:4], settings.float(), settings.repeat(2)[::2]):
        with pytest.raises(RuntimeError, match="settings must be 5 float64 numbers"):
            call.update(settings=wrong)
    for kind in (-1, 4, 2**40):
        with pytest.raises(RuntimeError, match="unknown optimizer"):
            call.update(kind=kind)
