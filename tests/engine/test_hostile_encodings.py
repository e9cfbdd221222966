"""The operators refuse damaged encodings, codes and slots.

``make sanitize`` runs these under AddressSanitizer, which stops at any access that was not refused.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from embcompress.engine import ops
from tests.engine.calls import Call, make_call, run_everything

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
