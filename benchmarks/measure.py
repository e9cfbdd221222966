"""Honest timing: interleaved runs, fresh inputs, ratios by round, and what the machine can do."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Ids that one sample looks up at least, over as many batches as that takes.
IDS_PER_SAMPLE = 1 << 17
#: Exponent of power-law ids: the r-th most frequent id has a share proportional to r**-1.05.
POWER_LAW_EXPONENT = 1.05
_MIB = 1 << 20


# --------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Batch:
    """Bags of one length: ``ids`` (B * length,), their ``starts`` (B,), ``offsets`` (B + 1,)."""

    ids: Tensor
    starts: Tensor
    offsets: Tensor


def draw_ids(
    distribution: str, num_embeddings: int, count: int, generator: np.random.Generator
) -> Tensor:
    """(count,) int64 ids; frequent ids are spread over the table, not neighbors in memory.

    Args:
        distribution: ``"uniform"`` or ``"power-law"``.
    """
    if distribution == "uniform":
        return torch.from_numpy(generator.integers(0, num_embeddings, count))
    # Inverse of the distribution function of the continuous power law on [1, n + 1).
    exponent = 1 - POWER_LAW_EXPONENT
    uniform = generator.random(count)
    rank = (1 + uniform * ((num_embeddings + 1.0) ** exponent - 1)) ** (1 / exponent)
    rank = np.minimum(rank.astype(np.int64) - 1, num_embeddings - 1)
    return torch.from_numpy(rank * _coprime(num_embeddings) % num_embeddings)


def _coprime(n: int) -> int:
    """A multiplier near n / golden ratio that permutes ``range(n)``; n below 2**31."""
    candidate = max(1, int(n * 0.6180339887498949))
    while np.gcd(candidate, n) != 1:
        candidate += 1
    return candidate


def make_batches(
    distribution: str,
    num_embeddings: int,
    batch_size: int,
    bag_length: int,
    generator: np.random.Generator,
) -> list[Batch]:
    """The batches of one sample, and a first one to warm up on."""
    per_batch = batch_size * bag_length
    offsets = torch.arange(0, per_batch + 1, bag_length)
    return [
        Batch(draw_ids(distribution, num_embeddings, per_batch, generator), offsets[:-1], offsets)
        for _ in range(1 + batches_per_sample(per_batch))
    ]


def batches_per_sample(ids_per_batch: int) -> int:
    return max(2, IDS_PER_SAMPLE // ids_per_batch)


# --------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        lower, median, upper = np.percentile(np.asarray(values), [25, 50, 75])
        return cls(float(median), float(lower), float(upper))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


Run = Callable[[Any], Any]


def interleave(
    contestants: Mapping[str, Run], make_inputs: Callable[[], Sequence[Any]], rounds: int
) -> dict[str, list[float]]:
    """Seconds a call of every contestant in every round.

    A round draws fresh inputs and lets each contestant in turn run over all of them, in an order
    of its own, after one untimed call. So drifts of the machine hit all alike, and so does what the
    one before leaves behind, in the caches and in threads that may still wait for work. No table is
    warm because its rows were read a moment ago.
    """
    order, shuffled = random.Random(0), list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    warm_up = make_inputs()[0]
    for run in contestants.values():  # first calls build and allocate
        run(warm_up)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            first, *inputs = make_inputs()
            order.shuffle(shuffled)
            for name in shuffled:
                run = contestants[name]
                run(first)
                start = time.perf_counter()
                for each in inputs:
                    run(each)
                seconds[name].append((time.perf_counter() - start) / len(inputs))
    finally:
        gc.enable()
    return seconds


def speedup(seconds: Mapping[str, list[float]], name: str, baseline: str) -> Spread:
    """How many times faster ``name`` is than ``baseline``, over the rounds."""
    pairs = zip(seconds[baseline], seconds[name], strict=True)
    return Spread.of([theirs / ours for theirs, ours in pairs])


# -------------------------------------------------------------------------------------- machine


def other_load() -> float:
    """Processes that wanted a core over the last minute. Ask before the benchmark adds its own."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def warn_if_busy() -> None:
    """Threads that wait for each other on a busy machine wait for the scheduler: milliseconds."""
    load, cores = other_load(), os.cpu_count() or 1
    if load > 0.3 * cores:
        print(
            f"warning: load average {load:.1f} on {cores} cores before the start; "
            "the figures will be those of a busy machine"
        )


def _median_seconds(run: Callable[[], Any], repeats: int = 7) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def copy_bandwidth(mebibytes: int = 512) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.ones(mebibytes * _MIB // 4)
    target = torch.empty_like(source)
    return 2 * mebibytes * _MIB / _median_seconds(lambda: target.copy_(source))


def gather_bandwidth(width: int, mebibytes: int = 1024) -> float:
    """Bytes a second of reading random float32 rows of a large table and writing them out."""
    rows, count = mebibytes * _MIB // (4 * width), 1 << 18
    table = torch.ones(rows, width)
    output = torch.empty(count, width)
    generator = np.random.default_rng(0)

    def run() -> None:
        torch.index_select(table, 0, ids.pop(), out=output)

    repeats = 7
    ids = [draw_ids("uniform", rows, count, generator) for _ in range(repeats + 1)]
    return count * (8 + 2 * 4 * width) / _median_seconds(run, repeats)


def machine_bandwidths(widths: Sequence[int], mebibytes: int = 1024) -> dict[str, Any]:
    """What the machine itself can do, for the fractions in the tables."""
    return {
        "copy": copy_bandwidth(mebibytes // 2),
        "gather": {width: gather_bandwidth(width, mebibytes) for width in widths},
    }
