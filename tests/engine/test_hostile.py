"""The operators refuse every input that would make them read or write outside of a tensor.

``make sanitize`` runs these under AddressSanitizer, which stops at any access that was not refused.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from embcompress.engine import ops
from embcompress.engine.encoding import encode_plans
from embcompress.engine.fused import OPTIMIZERS
from embcompress.plan import (
    Code,
    Digit,
    Hash,
    LookupPlan,
    Probe,
    Quantization,
    Store,
    Weight,
)

pytestmark = pytest.mark.skipif(
    not ops.is_available(),
    reason="the C++ extension is not built, or EMBCOMPRESS_ENGINE=reference is set",
)

HEADER = ["format", "num_features", "num_probes", "num_columns"]
FEATURE = [
    "num_embeddings", "padding_idx", "pool", "combine", "width", "out_column", "first_probe",
    "num_probes", "head_store", "out_width",
]  # fmt: skip
PROBE = [
    "store", "offset", "column", "width", "stride", "address.kind", "address.a", "address.b",
    "code.store", "code.bits", "code.width", "code.column", "code.first", "code.size",
    "code.is_slot", "tag.kind", "tag.a", "tag.b",
    "code.has_otherwise", "otherwise.kind", "otherwise.a", "otherwise.b",
    "other.store", "other.bits", "other.width", "other.column", "other.first", "other.size",
    "other.is_slot", "other.tag.kind", "other.tag.a", "other.tag.b",
    "scale.kind", "scale.key", "scale.store", "scale.column",
    "scale.address.kind", "scale.address.a", "scale.address.b",
    "scale.code.store", "scale.code.bits", "scale.code.width", "scale.code.column",
    "scale.code.first", "scale.code.size",
    "scale.code.is_slot", "scale.tag.kind", "scale.tag.a", "scale.tag.b",
    "scale.code.has_otherwise",
    "scale.otherwise.kind", "scale.otherwise.a", "scale.otherwise.b",
    "scale.other.store", "scale.other.bits", "scale.other.width", "scale.other.column",
    "scale.other.first", "scale.other.size", "scale.other.is_slot",
    "scale.other.tag.kind", "scale.other.tag.a", "scale.other.tag.b",
    "quantization.bits", "quantization.scale_store", "quantization.bias_store",
    "quantization.per_row", "quantization.per_column",
    "sparsity.form", "sparsity.stored", "sparsity.rows", "sparsity.block",
    "sparsity.index_store", "sparsity.index_bits", "sparsity.starts_store", "sparsity.starts_bits",
]  # fmt: skip

#: Every kind of address and store, codes of rows and of scales. Float stores come first.
PLAN = LookupPlan(
    1000,
    11,
    stores=(
        Store("rows", 50, 4),
        Store("steps", 40, 1),
        Store("lows", 40, 1),
        Store("scales", 9, 2),
        Store("packed", 40, 7, "uint4", Quantization("steps", "lows")),
        Store("codes", 100, 3, "uint6"),
        Store("others", 30, 2, "uint7"),
    ),
    probes=(
        Probe("rows", Hash(5, 45), Weight("scales", Digit(3, 9), column=1), offset=5),
        Probe(
            "packed",
            Code("codes", 40, Digit(10, 100), 1, Code("others", 40, Hash(6, 30))),
            Weight("scales", Code("codes", 9, Digit(10, 100), 2, Code("others", 9, Hash(4, 30)))),
        ),
    ),
    combine="concat",
    pool="sum",
    padding_idx=7,
)
NUM_FLOATS = 4


@dataclass
class Call:
    """Arguments of the operators: three bags for each of two features that share all stores."""

    stores: list[Tensor]
    ids: Any
    offsets: Any
    weights: Any
    encoding: Tensor
    ends_are_given: bool = True
    num_features: int = 2
    num_columns: int = 22

    @property
    def bags(self) -> list[Any]:
        return [
            self.stores, self.ids, self.offsets, self.weights, self.encoding, self.ends_are_given,
        ]  # fmt: skip

    def forward(self) -> Tensor:
        return torch.ops.embcompress.lookup(*self.bags, self.num_features, self.num_columns, False)

    def grad(self) -> Tensor:
        rows = 1 if self.offsets is None else self.offsets.numel() // self.num_features
        return torch.ones(rows, self.num_columns)

    def backward(self, grad: Tensor | None = None, wanted: Any = (0, 1, 2, 3)) -> Any:
        grad = self.grad() if grad is None else grad
        return torch.ops.embcompress.lookup_backward(grad, *self.bags, wanted)

    def backward_sparse(self, grad: Tensor | None = None, wanted: Any = (0, 1, 2, 3)) -> Any:
        grad = self.grad() if grad is None else grad
        return torch.ops.embcompress.lookup_backward_sparse(grad, *self.bags, wanted)

    def backward_weights(self, grad: Tensor | None = None) -> Tensor:
        grad = self.grad() if grad is None else grad
        return torch.ops.embcompress.lookup_backward_weights(grad, *self.bags)

    def update(self, grad: Tensor | None = None, wanted: Any = (0, 1, 2, 3), **other: Any) -> None:
        grad = self.grad() if grad is None else grad
        states = [torch.zeros_like(store) for store in self.stores[:NUM_FLOATS]]
        arguments = {
            "first": states,
            "second": [state.clone() for state in states],
            "steps": [torch.zeros(1, dtype=torch.int64) for _ in states],
            "settings": torch.tensor([0.1, 1e-8, 0.0, 0.9, 0.999], dtype=torch.float64),
            "kind": OPTIMIZERS["adam"],
        } | other
        torch.ops.embcompress.lookup_backward_update(grad, *self.bags, wanted, *arguments.values())

    def refused(self, match: str) -> None:
        """Every operator refuses these arguments."""
        for operator in (
            self.forward, self.backward, self.backward_sparse, self.backward_weights, self.update,
        ):  # fmt: skip
            with pytest.raises((RuntimeError, TypeError), match=match):
                operator()


def make_call() -> Call:
    generator = torch.Generator().manual_seed(0)
    floats = [torch.rand(s.rows, s.width, generator=generator) for s in PLAN.stores if s.is_float]
    packed = [
        torch.randint(0, 256, (s.bytes,), generator=generator).byte()
        for s in PLAN.stores
        if not s.is_float
    ]
    ids = torch.randint(0, 1000, (12,), generator=generator)
    numbers = {store.name: number for number, store in enumerate(PLAN.stores)}
    encoded = encode_plans([PLAN, PLAN], [numbers, numbers])
    offsets = torch.tensor([0, 2, 2, 5, 6, 9, 12])
    weights = torch.rand(12, generator=generator)
    return Call([*floats, *packed], ids, offsets, weights, encoded.tensor)


def run_everything(call: Call) -> None:
    call.forward()
    call.backward()
    call.backward_sparse()
    call.backward_weights()
    call.update()


def test_the_call_itself_is_fine() -> None:
    run_everything(make_call())


# ----------------------------------------------------------------------------------- encodings


def field(name: str, *, feature: int = 0, probe: int = 0) -> int:
    """Where a field is in the encoding of two features with two probes each."""
    if name in HEADER:
        return HEADER.index(name)
    if name.startswith("feature."):
        return len(HEADER) + feature * len(FEATURE) + FEATURE.index(name.removeprefix("feature."))
    start = len(HEADER) + 2 * len(FEATURE)
    return start + (2 * feature + probe) * len(PROBE) + PROBE.index(name)


def with_field(call: Call, position: int, value: int) -> Call:
    encoding = call.encoding.clone()
    encoding[position] = value
    return replace(call, encoding=encoding)


def test_the_fields_are_where_the_test_believes() -> None:
    call = make_call()
    assert len(call.encoding) == len(HEADER) + 2 * len(FEATURE) + 4 * len(PROBE)
    assert call.encoding[field("feature.num_embeddings", feature=1)] == 1000
    assert call.encoding[field("scale.column", probe=0)] == 1
    assert call.encoding[field("quantization.bias_store", probe=1)] == 2
    assert call.encoding[field("address.b", feature=1, probe=1)] == 100


HUGE = 2**63 - 1
DAMAGE = {
    "another format": ("format", 99),
    "no features": ("num_features", 0),
    "features beyond the tensor": ("num_features", 3),
    "features whose length overflows": ("num_features", 2**61 + 2),
    "negative features": ("num_features", -1),
    "probes whose length overflows": ("num_probes", 2**62 + 4),
    "columns of no feature": ("num_columns", 23),
    "no ids": ("feature.num_embeddings", 0),
    "negative ids": ("feature.num_embeddings", -(2**63)),
    "padding outside": ("feature.padding_idx", 1000),
    "an unknown pool": ("feature.pool", 3),
    "an unknown combine": ("feature.combine", 3),
    "a combine that needs equal widths": ("feature.combine", 0),
    "a wider feature": ("feature.width", 12),
    "a feature of no width": ("feature.width", 0),
    "a feature wider than memory": ("feature.width", HUGE),
    "another column": ("feature.out_column", 1),
    "a negative column": ("feature.out_column", -1),
    "another first probe": ("feature.first_probe", 1),
    "a negative probe": ("feature.first_probe", -1),
    "too many probes": ("feature.num_probes", HUGE),
    "a head that is not there": ("feature.head_store", 7),
    "a head of another shape": ("feature.head_store", 0),
    "a head that is packed": ("feature.head_store", 4),
    "an output of another width": ("feature.out_width", 12),
    "an output of no width": ("feature.out_width", 0),
    "an output wider than memory": ("feature.out_width", HUGE),
    "a store that is not there": ("store", 7),
    "a negative store": ("store", -1),
    "a narrower store": ("store", 1),
    "a packed store as floats": ("store", 4),
    "an offset past the store": ("offset", 6),
    "a negative offset": ("offset", -1),
    "an offset that overflows": ("offset", HUGE),
    "a column of a probe": ("column", 1),
    "a column that overflows": ("column", HUGE),
    "a narrower probe": ("width", 3),
    "a negative width": ("width", -4),
    "an unknown address": ("address.kind", 3),
    "more buckets than rows": ("address.b", 46),
    "no buckets": ("address.b", 0),
    "the most buckets": ("address.b", HUGE),
    "an unknown scale": ("scale.kind", 3),
    "a scale's store": ("scale.store", 7),
    "a scale's negative store": ("scale.store", -1),
    "a scale's column": ("scale.column", 2),
    "a scale's last column": ("scale.column", HUGE),
    "a scale's negative column": ("scale.column", -1),
    "a scale's rows": ("scale.address.b", 10),
    "a scale's divisor": ("scale.address.a", 0),
    "negative bits": ("quantization.bits", -1),
}
DAMAGE_OF_CODES = {
    "codes that are not there": ("code.store", 9),
    "codes that are floats": ("code.store", 0),
    "codes of no bits": ("code.bits", 0),
    "codes of too many bits": ("code.bits", 7),
    "codes of 64 bits": ("code.bits", 64),
    "a wider table of codes": ("code.width", 4),
    "a table of codes of no width": ("code.width", 0),
    "a table of codes that overflows": ("code.width", 2**62),
    "a column of codes": ("code.column", 3),
    "a negative column of codes": ("code.column", -1),
    "a negative first code": ("code.first", -1),
    "the smallest first code": ("code.first", -(2**63)),
    "codes past the store": ("code.size", 42),
    "codes of no size": ("code.size", 0),
    "the largest codes": ("code.size", HUGE),
    "rows of codes": ("address.b", 101),
    "all rows of codes": ("address.b", HUGE),
    "otherwise of no kind": ("otherwise.kind", -1),
    "rows past the other codes": ("otherwise.b", 31),
    "other codes that are not there": ("other.store", 7),
    "other codes that are floats": ("other.store", 0),
    "other codes of too many bits": ("other.bits", 33),
    "a wider table of other codes": ("other.width", 3),
    "a column of other codes": ("other.column", 2),
    "a negative first of other codes": ("other.first", -1),
    "other codes past the codes": ("other.size", 41),
    "other codes of no size": ("other.size", 0),
    "neither other codes nor slots": ("other.is_slot", 2),
    "a scale's codes that are not there": ("scale.code.store", 9),
    "a scale's codes that are floats": ("scale.code.store", 0),
    "a scale's codes of too many bits": ("scale.code.bits", 7),
    "a scale's column of codes": ("scale.code.column", 3),
    "a scale's negative first code": ("scale.code.first", -1),
    "a scale's codes past the store": ("scale.code.size", 10),
    "a scale's rows of codes": ("scale.address.b", 101),
    "a scale's rows past the other codes": ("scale.otherwise.b", 31),
    "a scale's other codes that are not there": ("scale.other.store", 7),
    "a scale's other codes past the codes": ("scale.other.size", 10),
    "neither codes nor slots": ("code.is_slot", 2),
    "values of more bits": ("quantization.bits", 5),
    "values of too many bits": ("quantization.bits", 32),
    "values as floats": ("quantization.bits", 0),
    "a step's store": ("quantization.scale_store", 7),
    "steps of other columns": ("quantization.scale_store", 3),
    "steps for every column": ("quantization.per_column", 1),
    "biases of other columns": ("quantization.bias_store", 0),
    "packed biases": ("quantization.bias_store", 4),
}


@pytest.mark.parametrize("what", sorted(DAMAGE))
def test_a_damaged_encoding_is_refused(what: str) -> None:
    name, value = DAMAGE[what]
    with_field(make_call(), field(name), value).refused("encoding|features")


@pytest.mark.parametrize("what", sorted(DAMAGE_OF_CODES))
def test_damaged_codes_and_steps_are_refused(what: str) -> None:
    name, value = DAMAGE_OF_CODES[what]
    with_field(make_call(), field(name, feature=1, probe=1), value).refused("encoding")


def test_rows_that_absent_ids_go_to_are_checked_without_another_table() -> None:
    def direct(call: Call, name: str, size: int) -> Call:
        call = with_field(call, field(f"{name}other.store", feature=1, probe=1), -1)
        return with_field(call, field(f"{name}otherwise.b", feature=1, probe=1), size)

    for name, most in (("", 40), ("scale.", 9)):
        run_everything(direct(make_call(), name, most))
        direct(make_call(), name, most + 1).refused("encoding: otherwise")


DAMAGE_OF_SLOTS = {
    "tags of more bits": ("tag.b", 64),
    "tags of no kind": ("tag.kind", 3),
    "no tags": ("tag.b", 0),
    "buckets past the store": ("address.b", 101),
    "a wider bucket": ("code.width", 4),
    "a first row that overflows": ("code.first", HUGE),
    "rows past the store": ("code.size", 42),
}
DAMAGE_OF_OTHER_SLOTS = {
    "tags of more bits": ("other.tag.b", 128),
    "tags of no kind": ("other.tag.kind", 3),
    "a wider bucket": ("other.width", 3),
    "a first row that overflows": ("other.first", HUGE),
    "rows past the codes": ("other.size", 41),
}


@pytest.mark.parametrize("what", sorted(DAMAGE_OF_SLOTS))
def test_damaged_slots_are_refused(what: str) -> None:
    name, value = DAMAGE_OF_SLOTS[what]
    call = with_field(make_call(), field("code.is_slot", feature=1, probe=1), 1)
    call = with_field(call, field("tag.b", feature=1, probe=1), 63)
    call.forward()  # these are slots
    with_field(call, field(name, feature=1, probe=1), value).refused("encoding")


@pytest.mark.parametrize("what", sorted(DAMAGE_OF_OTHER_SLOTS))
def test_damaged_slots_of_absent_ids_are_refused(what: str) -> None:
    name, value = DAMAGE_OF_OTHER_SLOTS[what]
    call = with_field(make_call(), field("other.is_slot", feature=1, probe=1), 1)
    call = with_field(call, field("other.tag.b", feature=1, probe=1), 127)
    run_everything(call)
    with_field(call, field(name, feature=1, probe=1), value).refused("encoding")


def test_a_truncated_encoding_is_refused() -> None:
    call = make_call()
    for length in range(len(call.encoding)):
        short = replace(call, encoding=call.encoding[:length].clone())
        with pytest.raises(RuntimeError, match="encoding"):
            short.forward()
    replace(call, encoding=torch.cat([call.encoding, torch.zeros(1).long()])).refused("encoding")


def test_an_encoding_that_is_no_int64_vector_is_refused() -> None:
    call = make_call()
    replace(call, encoding=call.encoding.int()).refused("encoding must be a contiguous int64")
    strided = torch.stack([call.encoding, call.encoding], dim=1)[:, 0]
    replace(call, encoding=strided).refused("encoding must be a contiguous int64")


@pytest.mark.parametrize("first", range(0, 3000, 1000))
def test_random_damage_is_refused_or_harmless(first: int) -> None:
    """Some numbers stay a valid encoding when they change; the sanitizers watch what those read."""
    values = [-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 5, 8, 40, 99, 2**31, 2**32 + 1, 2**61, HUGE]
    refused = 0
    for number in range(first, first + 1000):
        choice = random.Random(number)
        call = make_call()
        for _ in range(choice.choice((1, 1, 2, 4))):
            position = choice.randrange(len(call.encoding))
            value = choice.choice([*values, int(call.encoding[position]) + choice.choice((-1, 1))])
            if -(2**63) <= value < 2**63:
                call = with_field(call, position, value)
        call.num_features = max(1, min(int(call.encoding[1]), 4))
        call.num_columns = max(1, min(int(call.encoding[3]), 64))
        try:
            run_everything(call)
        except RuntimeError:
            refused += 1
    assert 500 < refused < 1000


def test_the_shape_of_the_output_is_the_encodings() -> None:
    call = make_call()
    for other in (replace(call, num_columns=21), replace(call, num_features=1)):
        with pytest.raises(RuntimeError, match="not the encoding's"):
            other.forward()


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
