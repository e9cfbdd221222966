"""A second reading of plans, one number at a time: Python's own integers and floats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from embcompress.hashing import hash_bucket, hash_sign, mix64, murmur_words
from embcompress.plan import (
    Address,
    Code,
    Digit,
    Hash,
    LookupPlan,
    MurmurHash,
    Network,
    Probe,
    Sign,
    Slot,
    Store,
    TensorTrain,
    Weight,
)

Vector = list[float]


class ScalarLoop:
    """Looks ids up in plain lists. Every float is a double."""

    def __init__(self, plan: LookupPlan, stores: dict[str, Tensor]) -> None:
        self.plan = plan
        self.floats = {
            s.name: stores[s.name].detach().double().tolist() for s in plan.stores if s.is_float
        }
        self.streams = {
            s.name: int.from_bytes(bytes(stores[s.name].tolist()), "little")
            for s in plan.stores
            if not s.is_float
        }

    def code(self, store: Store, row: int, column: int) -> int:
        position = (row * store.width + column) * store.bits
        return (self.streams[store.name] >> position) & ((1 << store.bits) - 1)

    def row(self, address: Address, id: int) -> int | None:
        if isinstance(address, Digit):
            return (id // address.divisor) % address.radix
        if isinstance(address, Hash):
            return hash_bucket(id, address.key, address.buckets)
        if isinstance(address, MurmurHash):
            return murmur_words(id, address.seed)[address.word] % address.buckets
        if isinstance(address, Slot):
            return self.slot(address, id)
        assert isinstance(address, Code)
        store = self.plan.store(address.store)
        code_row = self.row(address.row, id)
        assert code_row is not None
        code = self.code(store, code_row, address.column)
        if code != 2**store.bits - 1:
            row = code - address.first
            return row if 0 <= row < address.size else None
        return None if address.otherwise is None else self.row(address.otherwise, id)

    def slot(self, address: Slot, id: int) -> int | None:
        store = self.plan.store(address.store)
        bucket, tag = self.row(address.bucket, id), self.row(address.tag, id)
        assert bucket is not None
        for column in range(store.width):
            if self.code(store, bucket, column) == tag:
                row = address.first + bucket * store.width + column
                return row if row < address.size else None
        return None if address.otherwise is None else self.row(address.otherwise, id)

    def value(self, store: Store, row: int, column: int) -> float:
        if store.sparsity is not None:
            return self.sparse_value(store, row, column)
        if store.quantization is None:
            number = row * store.step + column
            line = self.floats[store.name]
            return line[number // len(line[0])][number % len(line[0])]

        def part(name: str) -> float:
            table = self.floats[name]
            line = table[0] if len(table) == 1 else table[row]
            return line[0] if len(line) == 1 else line[column]

        scale, code = part(store.quantization.scale), self.code(store, row, column)
        if store.quantization.bias is None:
            return scale * (code - (2**store.bits - 1) / 2)
        return scale * code + part(store.quantization.bias)

    def sparse_value(self, store: Store, row: int, column: int) -> float:
        """Found by going through all that is kept before it."""
        sparsity, values = store.sparsity, self.floats[store.name]
        assert sparsity is not None
        place = row * store.width + column
        if isinstance(values[0], list):  # latents under a mask
            return values[row][column] if self.streams[sparsity.index] >> place & 1 else 0.0
        if sparsity.form == "mask":
            kept = [p for p in range(place + 1) if self.streams[sparsity.index] >> p & 1]
            return values[len(kept) - 1] if kept and kept[-1] == place else 0.0
        starts, index = self.plan.store(sparsity.starts), self.plan.store(sparsity.index)
        begins = [self.code(starts, block, 0) for block in range(starts.rows)]
        block = row // sparsity.block
        end = [*begins, sparsity.stored][block + 1]
        for number in range(begins[block], end):
            if self.code(index, number, 0) == place - block * sparsity.block * store.width:
                return values[number]
        return 0.0

    def scale(self, probe: Probe, id: int) -> float:
        if isinstance(probe.scale, Sign):
            return hash_sign(id, probe.scale.key)
        if isinstance(probe.scale, Weight):
            row = self.row(probe.scale.address, id)
            if row is None:
                return 0.0
            return self.floats[probe.scale.store][row][probe.scale.column]
        return 1.0

    def probe(self, probe: Probe, id: int) -> Vector:
        store = self.plan.store(probe.store)
        row = self.row(probe.address, id)
        if row is None:
            return [0.0] * store.width
        scale = self.scale(probe, id)
        return [
            scale * self.value(store, probe.offset + row, column) for column in range(store.width)
        ]

    def vector(self, id: int) -> Vector:
        """The combined vector of an id, before the head."""
        if id == self.plan.padding_idx:
            return [0.0] * self.plan.width
        if self.plan.inputs is not None:
            inputs = self.plan.inputs
            keys = [mix64(inputs.key + i) for i in range(inputs.count)]
            found = [hash_bucket(id, key, inputs.buckets) for key in keys]
            return [2 * bucket / (inputs.buckets - 1) - 1 for bucket in found]
        parts = [self.probe(probe, id) for probe in self.plan.probes]
        if self.plan.combine == "concat":
            return [value for part in parts for value in part]
        if self.plan.combine == "mul":
            return [math.prod(values) for values in zip(*parts, strict=True)]
        terms: list[Vector] = [[] for _ in range(self.plan.width)]
        for probe, part in zip(self.plan.probes, parts, strict=True):
            for column, value in enumerate(part, start=probe.column or 0):
                terms[column].append(value)
        return [math.fsum(values) for values in terms]

    def head(self, vector: Vector) -> Vector:
        head = self.plan.head
        if head is None:
            return vector
        if isinstance(head, TensorTrain):
            return [self.path_sum(head, vector, j) for j in range(math.prod(head.widths))]
        if isinstance(head, Network):
            return self.network(head, vector)
        return self.product(head.weight, vector)

    def product(self, weight: str, vector: Vector) -> Vector:
        return [
            math.fsum(w * v for w, v in zip(row, vector, strict=True))
            for row in self.floats[weight]
        ]

    def path_sum(self, head: TensorTrain, cores: Vector, column: int) -> float:
        """Number ``column`` of a train: the sum over all paths through the ranks."""
        starts = [sum(head.sizes[:k]) for k in range(len(head.sizes))]
        digits = [
            column // math.prod(head.widths[k + 1 :]) % width for k, width in enumerate(head.widths)
        ]
        paths = itertools.product(*(range(rank) for rank in head.ranks))
        return math.fsum(
            math.prod(
                cores[start + (row * width + digit) * after + to]
                for start, digit, (_, width, after), row, to in zip(
                    starts, digits, head.shapes, (0, *path), (*path, 0), strict=True
                )
            )
            for path in paths
        )

    def network(self, head: Network, vector: Vector) -> Vector:
        for number, (weight, bias) in enumerate(zip(head.weights, head.biases, strict=True), 1):
            sums = self.product(weight, vector)
            vector = [total + b for total, b in zip(sums, self.floats[bias][0], strict=True)]
            if number < len(head.weights):
                mean = math.fsum(vector) / len(vector)
                variance = math.fsum((v - mean) ** 2 for v in vector) / len(vector)
                normal = [(v - mean) / math.sqrt(variance + 1e-5) for v in vector]
                vector = [v * math.tanh(math.log1p(math.exp(v))) for v in normal]
        return vector

    def bag(self, ids: Sequence[int], weights: Sequence[float] | None) -> Vector:
        """The pooled vector of a bag, after the head."""
        plan, counted = self.plan, [i for i, id in enumerate(ids) if id != self.plan.padding_idx]
        vectors = [self.head(self.vector(ids[i])) for i in counted]
        if not vectors:
            return [0.0] * plan.embedding_dim
        columns = list(zip(*vectors, strict=True))
        if plan.pool == "max":
            return [max(column) for column in columns]
        if weights is not None:
            columns = [
                tuple(weights[i] * v for i, v in zip(counted, column, strict=True))
                for column in columns
            ]
        size = len(counted) if plan.pool == "mean" else 1
        return [math.fsum(column) / size for column in columns]

    def lookup(
        self, ids: Sequence[int], offsets: Sequence[int], weights: Sequence[float] | None
    ) -> list[Vector]:
        if self.plan.pool == "none":
            zero = [0.0] * self.plan.embedding_dim
            padding = self.plan.padding_idx
            return [zero if id == padding else self.head(self.vector(id)) for id in ids]
        ranges = itertools.pairwise(offsets)
        return [
            self.bag(ids[begin:end], None if weights is None else weights[begin:end])
            for begin, end in ranges
        ]
