"""Plans that break each rule once, and JSON that is no plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from embcompress.plan import (
    Code,
    Digit,
    Hash,
    HashFeatures,
    Linear,
    LookupPlan,
    MurmurHash,
    Network,
    Probe,
    Quantization,
    Sign,
    Slot,
    Sparsity,
    Store,
    TensorTrain,
    Weight,
)

ROWS = Store("rows", 10, 4)
CODES = Store("codes", 10, 2, "uint3")
READ = Probe("rows", Digit(1, 10))
DIGIT_5 = Digit(1, 5)


def table(*stores: Store, probe: Probe = READ, **fields: Any) -> LookupPlan:
    return LookupPlan(10, 4, **{"stores": (ROWS, *stores), "probes": (probe,), **fields})


def coded(code: Code | Slot, *stores: Store) -> LookupPlan:
    return table(CODES, *stores, probe=Probe("rows", code))


def packed(scale: Store, bias: Store | None = None) -> LookupPlan:
    quantization = Quantization(scale.name, None if bias is None else bias.name)
    store = Store("packed", 10, 4, "uint4", quantization)
    return table(store, scale, *([] if bias is None else [bias]))


MASK, POSITIONS = Store("index", 10, 4, "uint1"), Store("index", 7, 1, "uint4")
STARTS = Store("starts", 4, 1, "uint3")


def sparse(
    index: Store = MASK, starts: Store = STARTS, stored: int = 7, block: int = 3, form: Any = "mask"
) -> LookupPlan:
    sparsity = Sparsity(stored, "index", "starts", block, form)
    return table(index, starts, stores=(replace(ROWS, sparsity=sparsity), index, starts))


def thresholded(threshold: Store) -> LookupPlan:
    return table(threshold, stores=(replace(ROWS, threshold="t"), threshold))


def with_sparse_part(plan: LookupPlan, name: str) -> LookupPlan:
    """The plan whose store of that name is sparse."""
    sparsity = Sparsity(1, "index", "starts", 10, "positions")
    stores = [replace(s, sparsity=sparsity) if s.name == name else s for s in plan.stores]
    parts = (Store("index", 1, 1, "uint32"), Store("starts", 1, 1, "uint1"))
    return replace(plan, stores=(*stores, *parts))


def network(
    inputs: HashFeatures, bias: Store | None = None, probes: tuple[Probe, ...] = ()
) -> LookupPlan:
    stores = (Store("w", 4, 4), bias or Store("b", 1, 4), *([ROWS] if probes else []))
    return LookupPlan(10, 4, stores, probes, head=Network(("w",), ("b",), inputs))


#: Something that breaks a rule, and words of the error.
BROKEN: dict[str, tuple[Callable[[], object], str]] = {
    "store name": (lambda: Store("a b", 1, 1), "store name 'a b'"),
    "empty store name": (lambda: Store("", 1, 1), "store name ''"),
    "name with a dot": (lambda: Store("a.b", 1, 1), "store name"),
    "nothing kept": (lambda: Sparsity(0, "index", "starts", 1), "keeps 1 to"),
    "a block of no rows": (lambda: Sparsity(1, "index", "starts", 0), "at least one row"),
    "form of sparsity": (lambda: sparse(form="rows"), "form of sparsity 'rows'"),
    "sparse codes": (
        lambda: Store("s", 10, 4, "uint2", sparsity=Sparsity(1, "index", "starts", 1)),
        "only floats can be sparse",
    ),
    "more kept than there is": (lambda: sparse(stored=41), "keeps 41 of 40 numbers"),
    "a float index": (lambda: sparse(replace(MASK, dtype="float32")), "is not unsigned"),
    "float starts": (lambda: sparse(starts=replace(STARTS, dtype="float32")), "is not unsigned"),
    "a mask of other rows": (lambda: sparse(replace(MASK, rows=9)), "is no mask of the rows"),
    "a mask of two bits": (lambda: sparse(replace(MASK, dtype="uint2")), "is no mask"),
    "too few positions": (
        lambda: sparse(replace(POSITIONS, rows=6), form="positions"),
        "is no positions of the rows",
    ),
    "positions of too few bits": (
        lambda: sparse(replace(POSITIONS, dtype="uint3"), form="positions"),
        "is no positions of the rows",
    ),
    "starts of other blocks": (lambda: sparse(block=2), "does not say where 5 blocks"),
    "starts of too few bits": (
        lambda: sparse(starts=replace(STARTS, dtype="uint2")),
        "does not say where 4 blocks",
    ),
    "a sparse scale": (
        lambda: with_sparse_part(packed(Store("scale", 10, 1)), "scale"),
        "scale or bias of 'packed' is 'scale', which is sparse",
    ),
    "a sparse weight": (
        lambda: with_sparse_part(
            table(
                Store("weights", 10, 1),
                probe=Probe("rows", Digit(1, 10), Weight("weights", Digit(1, 10))),
            ),
            "weights",
        ),
        "scale of probe of 'rows' is 'weights', which is sparse",
    ),
    "a threshold of codes": (
        lambda: Store("s", 10, 4, "uint4", threshold="t"),
        "only floats in rows of their own have a threshold",
    ),
    "a threshold of other columns": (
        lambda: thresholded(Store("t", 1, 2)),
        "'t' does not broadcast over the rows of 'rows'",
    ),
    "a threshold of codes' numbers": (
        lambda: thresholded(Store("t", 1, 4, "uint8")),
        "'t' does not broadcast over the rows of 'rows'",
    ),
    "a sparse threshold": (
        lambda: with_sparse_part(thresholded(Store("t", 10, 1)), "t"),
        "threshold of 'rows' is 't', which is sparse",
    ),
    "a sparse head": (
        lambda: with_sparse_part(table(Store("head", 4, 4), head=Linear("head")), "head"),
        "the head's weight is 'head', which is sparse",
    ),
    "no rows": (lambda: Store("s", 0, 1), "no rows or columns"),
    "no columns": (lambda: Store("s", 1, 0), "no rows or columns"),
    "dtype": (lambda: Store("s", 1, 1, "int8"), "unknown dtype 'int8'"),
    "dtype of 33 bits": (lambda: Store("s", 1, 1, "uint33"), "unknown dtype"),
    "dtype of 0 bits": (lambda: Store("s", 1, 1, "uint0"), "unknown dtype"),
    "dtype with a newline": (lambda: Store("s", 1, 1, "uint8\n"), "unknown dtype"),
    "too many bits": (lambda: Store("s", 2**40, 2**20), "2\\*\\*63 bits or more"),
    "no stride": (lambda: Store("s", 2, 4, stride=0), "a stride must be in \\[1, width = 4\\)"),
    "stride of the width": (lambda: Store("s", 2, 4, stride=4), "not 4 and 'float32'"),
    "stride of codes": (lambda: Store("s", 2, 4, "uint8", stride=1), "not 1 and 'uint8'"),
    "unknown location": (lambda: Store("s", 2, 4, location="tape"), "unknown location 'tape'"),
    "codes in a file": (
        lambda: Store("s", 2, 4, "uint8", location="file"),
        "only floats in rows of their own, of one table, can be in a file",
    ),
    "quantized float": (
        lambda: Store("s", 1, 1, "float32", Quantization("t")),
        "take uint1, uint2, uint4, uint8 or uint16, not 'float32'",
    ),
    "quantized to 3 bits": (
        lambda: Store("s", 1, 1, "uint3", Quantization("t")),
        "take uint1, uint2, uint4, uint8 or uint16, not 'uint3'",
    ),
    "divisor": (lambda: Digit(0, 5), "divisor and radix"),
    "large divisor": (lambda: Digit(2**63, 5), "divisor and radix"),
    "radix": (lambda: Digit(1, 0), "divisor and radix"),
    "large radix": (lambda: Digit(1, 2**63), "divisor and radix"),
    "negative hash key": (lambda: Hash(-1, 5), "unsigned 64-bit"),
    "large hash key": (lambda: Hash(2**64, 5), "unsigned 64-bit"),
    "no buckets": (lambda: Hash(0, 0), "buckets must be"),
    "too many buckets": (lambda: Hash(0, 2**63), "buckets must be"),
    "negative sign key": (lambda: Sign(-1), "unsigned 64-bit"),
    "large sign key": (lambda: Sign(2**64), "unsigned 64-bit"),
    "code below 0": (lambda: Code("codes", 1, Digit(1, 10), first=-1), "first must be ≥ 0"),
    "Murmur seed": (lambda: MurmurHash(2**32, 0, 5), "unsigned 32-bit integer"),
    "Murmur word": (lambda: MurmurHash(0, 4, 5), "word must be in"),
    "Murmur buckets": (lambda: MurmurHash(0, 0, 0), "buckets must be in"),
    "code of size 0": (lambda: Code("codes", 0, Digit(1, 10)), "size must be ≥ 1"),
    "negative code column": (lambda: Code("codes", 1, Digit(1, 10), -1), "column ≥ 0"),
    "otherwise past the size": (
        lambda: Code("codes", 5, Digit(1, 10), otherwise=Digit(1, 6)),
        "otherwise reaches past its size",
    ),
    "otherwise in another table past the size": (
        lambda: Code("codes", 5, Digit(1, 10), otherwise=Code("codes", 6, Digit(1, 10))),
        "otherwise reaches past its size",
    ),
    "a third address": (
        lambda: Code("codes", 5, DIGIT_5, 0, Code("codes", 5, DIGIT_5, 0, DIGIT_5)),
        "a code's otherwise goes on to a third address",
    ),
    "a third address of a slot": (
        lambda: Slot("codes", 5, DIGIT_5, DIGIT_5, Code("codes", 5, DIGIT_5, 0, DIGIT_5)),
        "a slot's otherwise goes on to a third address",
    ),
    "codes of too few bits in another table": (
        lambda: coded(Code("codes", 8, Digit(1, 10), 0, Code("codes", 8, Digit(1, 10), 1))),
        "otherwise of probe of 'rows': 3 bits cannot hold",
    ),
    "another table that is no store": (
        lambda: coded(Code("codes", 3, Digit(1, 10), 0, Code("other", 3, Digit(1, 10)))),
        "no store 'other'",
    ),
    "slots of size 0": (lambda: Slot("codes", 0, DIGIT_5, DIGIT_5), "size must be in"),
    "negative first slot": (lambda: Slot("codes", 1, DIGIT_5, DIGIT_5, first=-1), "first must be"),
    "a slot's otherwise past the size": (
        lambda: Slot("codes", 4, DIGIT_5, DIGIT_5, otherwise=DIGIT_5),
        "otherwise reaches past its size",
    ),
    "negative weight column": (lambda: Weight("w", Digit(1, 1), -1), "column must be ≥ 0"),
    "no ids": (lambda: replace(table(), num_embeddings=0), "empty table"),
    "no width": (lambda: replace(table(), embedding_dim=0), "empty table"),
    "too many ids": (lambda: replace(table(), num_embeddings=2**63), "below 2\\*\\*63"),
    "combine": (lambda: table(combine="max"), "unknown combine 'max'"),
    "pool": (lambda: table(pool="median"), "unknown pool 'median'"),
    "no probes": (lambda: table(probes=()), "at least one probe"),
    "same name twice": (lambda: table(Store("rows", 3, 3)), "not unique"),
    "negative padding": (lambda: table(padding_idx=-1), "padding_idx -1"),
    "padding past the ids": (lambda: table(padding_idx=10), "padding_idx 10"),
    "unknown store": (lambda: table(probe=Probe("other", Digit(1, 1))), "no store 'other'"),
    "unknown code store": (lambda: coded(Code("other", 3, Digit(1, 10))), "no store 'other'"),
    "unknown weight store": (
        lambda: table(probe=replace(READ, scale=Weight("other", Digit(1, 1)))),
        "no store 'other'",
    ),
    "unknown head": (lambda: table(head=Linear("other")), "no store 'other'"),
    "unknown quantization scale": (
        lambda: table(Store("packed", 2, 2, "uint4", Quantization("other"))),
        "no store 'other'",
    ),
    "scale of other rows": (lambda: packed(Store("scale", 3, 4)), "does not broadcast"),
    "scale of other columns": (lambda: packed(Store("scale", 10, 2)), "does not broadcast"),
    "scale of codes": (lambda: packed(Store("scale", 1, 1, "uint8")), "does not broadcast"),
    "scale of overlapping rows": (
        lambda: packed(Store("scale", 10, 4, stride=2)),
        "which is sparse or of rows that overlap",
    ),
    "bias of another shape": (
        lambda: packed(Store("scale", 1, 4), Store("bias", 1, 1)),
        "store 'bias' does not broadcast",
    ),
    "address past the rows": (
        lambda: table(probe=Probe("rows", Digit(1, 11))),
        "probe of 'rows' reaches row 10 of 10",
    ),
    "offset past the rows": (lambda: table(probe=replace(READ, offset=1)), "reaches row 9 of 9"),
    "negative offset": (lambda: table(probe=replace(READ, offset=-1)), "negative offset"),
    "codes read as values": (
        lambda: table(CODES, probe=Probe("codes", Digit(1, 10))),
        "reads codes as if values",
    ),
    "codes in a float store": (lambda: coded(Code("rows", 3, Digit(1, 10))), "reads codes from"),
    "codes in a quantized store": (
        lambda: coded(
            Code("packed", 3, Digit(1, 10)),
            Store("packed", 10, 4, "uint4", Quantization("scale")),
            Store("scale", 1, 1),
        ),
        "reads codes from 'packed'",
    ),
    "code column": (lambda: coded(Code("codes", 3, Digit(1, 10), 2)), "column 2"),
    "codes of too few bits": (lambda: coded(Code("codes", 8, Digit(1, 10))), "3 bits cannot hold"),
    "code row past the codes": (
        lambda: coded(Code("codes", 3, Digit(1, 11))),
        "row of probe of 'rows' reaches row 10 of 10",
    ),
    "slots in a float store": (
        lambda: coded(Slot("rows", 3, DIGIT_5, DIGIT_5)),
        "reads slots from 'rows'",
    ),
    "tags of too few bits": (
        lambda: coded(Slot("codes", 3, DIGIT_5, Digit(1, 8))),
        "3 bits cannot hold 8 tags and 'empty'",
    ),
    "bucket past the slots": (
        lambda: coded(Slot("codes", 3, Digit(1, 11), DIGIT_5)),
        "bucket of probe of 'rows' reaches row 10 of 10",
    ),
    "slots past the rows": (
        lambda: coded(Slot("codes", 11, DIGIT_5, DIGIT_5)),
        "probe of 'rows' reaches row 10 of 10",
    ),
    "weight column": (
        lambda: table(probe=replace(READ, scale=Weight("rows", Digit(1, 10), 4))),
        "takes its scale from column 4 of 'rows'",
    ),
    "weight of overlapping rows": (
        lambda: table(
            Store("laps", 10, 4, stride=1), probe=replace(READ, scale=Weight("laps", Digit(1, 10)))
        ),
        "which is sparse or of rows that overlap",
    ),
    "weight of codes": (
        lambda: table(CODES, probe=replace(READ, scale=Weight("codes", Digit(1, 10)))),
        "takes its scale from column 0 of 'codes'",
    ),
    "weight past its rows": (
        lambda: table(probe=replace(READ, scale=Weight("rows", Digit(1, 11)))),
        "scale of probe of 'rows' reaches row 10 of 10",
    ),
    "rows of two widths": (
        lambda: table(Store("other", 5, 3), probes=(READ, Probe("other", Digit(1, 5)))),
        "needs rows of one width, got \\[3, 4\\]",
    ),
    "a column of a product": (
        lambda: table(probe=replace(READ, column=0), combine="mul"),
        "begins at column 0; only those of a sum may",
    ),
    "a negative column": (lambda: table(probe=replace(READ, column=-1)), "begins at column -1"),
    "columns left out": (
        lambda: table(Store("two", 5, 2), probes=(READ, Probe("two", Digit(1, 5), column=5))),
        "probe of 'two' begins at column 5, those before it end at 4",
    ),
    "width": (lambda: replace(table(), embedding_dim=5), "width 4, not embedding_dim 5"),
    "width of concat": (
        lambda: table(probes=(READ, READ), combine="concat"),
        "width 8, not embedding_dim 4",
    ),
    "shape of the head": (
        lambda: table(Store("head", 4, 3), head=Linear("head")),
        "the head's weight 'head' is 4 × 3, not 4 × 4",
    ),
    "no cores": (lambda: TensorTrain((), ()), "a rank between two of them"),
    "ranks of a tensor train": (lambda: TensorTrain((2, 2), ()), "a rank between two of them"),
    "a rank of 0": (lambda: TensorTrain((2, 2), (0,)), "positive widths"),
    "width of a tensor train": (
        lambda: table(head=TensorTrain((2, 2), (3,))),
        "the head maps width 12 to 4, not 4 to 4",
    ),
    "columns of a tensor train": (
        lambda: table(head=TensorTrain((3, 1), (1,))),
        "the head maps width 4 to 3, not 4 to 4",
    ),
    "key of hash features": (lambda: HashFeatures(2**64, 3), "unsigned 64-bit"),
    "no hash features": (lambda: HashFeatures(0, 0), "count must be at least 1"),
    "buckets of hash features": (lambda: HashFeatures(0, 3, 2**24 + 1), "buckets in"),
    "a network of no layers": (lambda: Network((), ()), "as many weights as biases"),
    "a network without a bias": (lambda: Network(("w", "v"), ("b",)), "as many weights as biases"),
    "probes beside hash features": (
        lambda: network(HashFeatures(0, 4), probes=(READ,)),
        "or hash features instead of probes",
    ),
    "width of a network": (lambda: network(HashFeatures(0, 3)), "'w' is 4 × 4, not 4 × 3"),
    "bias of a network": (
        lambda: network(HashFeatures(0, 4), Store("b", 1, 3)),
        "'b' is 1 × 3, not 1 × 4",
    ),
    "a store of a network that is gathered": (
        lambda: table(Store("b", 1, 4), head=Network(("rows",), ("b",))),
        "used twice, or gathered too",
    ),
    "head in a file": (
        lambda: table(Store("head", 4, 4, location="file"), head=Linear("head")),
        "the head's weight is 'head', which is in a file",
    ),
    "head of overlapping rows": (
        lambda: table(Store("head", 4, 4, stride=2), head=Linear("head")),
        "which is sparse or of rows that overlap",
    ),
    "head of codes": (
        lambda: table(Store("head", 4, 4, "uint8"), head=Linear("head")),
        "the head's weight",
    ),
}

TEXT = table().to_json()


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(TEXT), **fields})


def without(name: str) -> str:
    data = json.loads(TEXT)
    del data[name]
    return json.dumps(data)


def with_probe(**fields: Any) -> str:
    return changed(probes=[{**json.loads(TEXT)["probes"][0], **fields}])


def with_store(**fields: Any) -> str:
    return changed(stores=[{**json.loads(TEXT)["stores"][0], **fields}])


def with_head(kind: str, **fields: Any) -> str:
    return changed(head={"kind": kind, **fields})


DIGIT = {"kind": "digit", "divisor": 1, "radix": 10}

#: JSON that is not a plan, and words of the error.
HOSTILE: dict[str, tuple[str, str]] = {
    "nothing": ("", "not JSON"),
    "cut short": (TEXT[:-5], "not JSON"),
    "deeply nested": ("[" * 100_000, "not JSON"),
    "deeply nested, closed": ("[" * 50_000 + "]" * 50_000, "not JSON|JSON object"),
    "an endless number": (TEXT.replace("10", "1" * 5000), "not JSON|below|2\\*\\*63"),
    "a list": ("[]", "JSON object, not list"),
    "a number": ("3", "JSON object, not int"),
    "no version": (without("format"), "plan format None"),
    "a later version": (changed(format=2), "plan format 2"),
    "a version that is true": (changed(format=True), "plan format True"),
    "a float version": (changed(format=1.0), "plan format 1.0"),
    "an unknown field": (changed(colour=3), "LookupPlan has no field \\['colour'\\]"),
    "a kind where none belongs": (changed(kind="digit"), "LookupPlan has no field"),
    "a missing field": (without("probes"), "LookupPlan lacks \\['probes'\\]"),
    "a float for int": (changed(embedding_dim=4.0), "must be int, got 4.0"),
    "a bool for int": (changed(num_embeddings=True), "must be int, got True"),
    "a string for int": (changed(num_embeddings="10"), "must be int, got '10'"),
    "null for int": (changed(num_embeddings=None), "must be int, got None"),
    "NaN for int": (changed(num_embeddings=float("nan")), "must be int, got nan"),
    "a number for str": (with_store(name=3), "Store.name must be str, got 3"),
    "an object for stores": (changed(stores={}), "expected a list"),
    "a store that is none": (changed(stores=[3]), "expected an object for Store"),
    "a store with a kind": (with_store(kind="digit"), "Store has no field"),
    "a quantization that is a name": (with_store(quantization="scale"), "Quantization"),
    "a probe without address": (changed(probes=[{"store": "rows"}]), "Probe lacks"),
    "an address without kind": (with_probe(address={"divisor": 1}), "unknown kind"),
    "an address of unknown kind": (with_probe(address={"kind": "table"}), "unknown kind"),
    "an address whose kind is a list": (with_probe(address={"kind": []}), "unknown kind"),
    "an address that is a scale": (
        with_probe(address={"kind": "sign", "key": 1}),
        "Sign is not allowed here",
    ),
    "an address that is null": (with_probe(address=None), "unknown kind"),
    "a code read through a code": (
        with_probe(
            address={
                "kind": "code",
                "store": "rows",
                "size": 1,
                "row": {"kind": "code", "store": "rows", "size": 1, "row": DIGIT},
            }
        ),
        "Code is not allowed here",
    ),
    "widths that are no list": (with_head("tensor_train", widths=4, ranks=[]), "expected a list"),
    "a rank that is true": (
        with_head("tensor_train", widths=[2, 2], ranks=[True]),
        "expected int in a list, got True",
    ),
    "weights that are numbers": (
        with_head("network", weights=[1], biases=["b"]),
        "expected str in a list, got 1",
    ),
    "inputs that are a name": (
        with_head("network", weights=["w"], biases=["b"], inputs="x"),
        "expected an object for HashFeatures",
    ),
    "a head that is a hash": (with_head("hash", key=1, buckets=2), "Hash is not allowed here"),
    "a slot read through a code": (
        with_probe(
            address={
                "kind": "slot",
                "store": "rows",
                "size": 1,
                "bucket": DIGIT,
                "tag": {"kind": "code", "store": "rows", "size": 1, "row": DIGIT},
            }
        ),
        "Code is not allowed here",
    ),
    "a digit with a row": (with_probe(address={**DIGIT, "row": DIGIT}), "Digit has no field"),
    "a plan that contradicts itself": (changed(num_embeddings=0), "empty table"),
}
