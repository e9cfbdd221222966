"""Lookups and training steps on a GPU: compressed tables against the full table they replace.

    python benchmarks/gpu.py --out gpu-results/gpu.json --seconds 240

Forward calls run inside a CUDA graph that goes over several batches, so that neither Python nor a
warm cache is measured; training steps run as they do in a program. Times are CUDA events', medians
over rounds in which the contestants take turns. ``benchmarks/gpu.sh`` builds, tests and runs this.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestants import bytes_touched, compressed_tables, dense_plan, has_fbgemm
from criteo import CRITEO_CARDINALITIES
from measure import Batch, draw_ids
from torch import Tensor, nn

import embcompress as ec
from embcompress.bench.environment import environment
from embcompress.plan import LookupPlan

FULL, OURS, COMPOSED, FBGEMM = "nn.EmbeddingBag", "embcompress", "torch ops", "FBGEMM TBE"
METHODS = ("hash", "qr", "multihash", "low_dim", "pq")
#: Batches that one sample goes over: more ids than any cache of rows holds.
BATCHES = 8
LEARNING_RATE = 0.01
Run = Callable[[Any], Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results/gpu.json"))
    parser.add_argument("--seconds", type=float, default=240.0, help="stop after so long")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 16])
    parser.add_argument("--bags", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--batches", type=int, nargs="+", default=[65_536, 2048])
    parser.add_argument("--budgets", nargs="+", default=["10%", "1%"])
    return parser.parse_args()


# -------------------------------------------------------------------------------------- measuring


def milliseconds(run: Callable[[], Any]) -> float:
    """Time on the device of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def as_graph(run: Run, inputs: Sequence[Any]) -> Callable[[], Any] | None:
    """One replay of a graph that runs over all inputs; None where that cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for each in inputs:
            run(each)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = [run(each) for each in inputs]
    except RuntimeError as error:
        print(f"not captured: {error}")
        torch.cuda.synchronize()
        return None

    def replay(outputs: list[Any] = outputs) -> None:  # the graph writes to them
        graph.replay()

    return replay


def copy_bandwidth(mebibytes: int = 2048) -> float:
    """Bytes a second, read and written, of a copy larger than any cache."""
    source = torch.ones(mebibytes << 18, device="cuda")
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(10)]
    return 2 * 4 * source.numel() / (float(np.median(times)) * 1e-3)


class Benchmark:
    """Records, written after every setting, until the time is up."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out, self.rounds = options.out, options.rounds
        self.deadline = time.monotonic() + options.seconds
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.copy = copy_bandwidth()
        properties = torch.cuda.get_device_properties(0)
        self.about = {
            **environment(),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "copy_bytes_per_second": self.copy,
        }
        self.records: list[dict[str, Any]] = []
        print(f"{properties.name}, copy {self.copy / 1e9:.0f} GB/s", flush=True)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def measure(
        self,
        setting: dict[str, Any],
        contestants: dict[str, tuple[Run, float | None]],
        inputs: Sequence[Any],
        num_ids: int,
        *,
        graphs: bool,
    ) -> None:
        """Run the contestants in turn; a contestant is a call and the bytes that it must move."""
        runs: dict[str, Callable[[], Any]] = {}
        captured = {}
        for name, (run, _) in contestants.items():
            graph = as_graph(run, inputs) if graphs else None
            captured[name] = graph is not None

            def eager(run: Run = run) -> None:
                for each in inputs:
                    run(each)

            runs[name] = graph or eager
            runs[name]()
        torch.cuda.synchronize()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.rounds):
            for name, call in runs.items():
                times[name].append(milliseconds(call) * 1e-3 / len(inputs))
        baseline = np.array(times[next(iter(times))])
        for name, seconds in times.items():
            median = float(np.median(seconds))
            size = contestants[name][1]
            record = {
                **setting,
                "contestant": name,
                "seconds": median,
                "quartiles": [float(q) for q in np.percentile(seconds, [25, 75])],
                "lookups_per_second": num_ids / median,
                "speedup": float(np.median(baseline / np.array(seconds))),
                "graph": captured[name],
            }
            if size is not None:
                record["bytes"] = size
                record["bytes_per_second"] = size / median
                record["of_copy"] = size / median / self.copy
            self.records.append(record)
            share = f", {record['of_copy']:.0%} of copy" if size is not None else ""
            print(
                f"{setting} {name}: {num_ids / median / 1e6:.0f} M/s, "
                f"{record['speedup']:.2f}x{share}",
                flush=True,
            )
        self.write()

    def write(self) -> None:
        partial = self.out.with_suffix(".tmp")
        partial.write_text(json.dumps({**self.about, "records": self.records}, indent=1) + "\n")
        partial.rename(self.out)


# ------------------------------------------------------------------------------------ contestants


def make_batches(rows: int, batch: int, bag: int, distribution: str) -> list[Batch]:
    generator = np.random.default_rng(0)
    offsets = torch.arange(0, batch * bag + 1, bag, device="cuda")
    return [
        Batch(draw_ids(distribution, rows, batch * bag, generator).cuda(), offsets[:-1], offsets)
        for _ in range(BATCHES)
    ]


def full_table(rows: int, width: int, *, sparse: bool = False) -> nn.EmbeddingBag:
    weight = torch.empty(rows, width, device="cuda").uniform_(-0.05, 0.05)
    return nn.EmbeddingBag(rows, width, mode="sum", sparse=sparse, _weight=weight)


def fbgemm_table(shapes: Sequence[tuple[int, int]]) -> nn.Module:
    """FBGEMM's table-batched embedding, with its fused row-wise Adagrad."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    return SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, width, EmbeddingLocation.DEVICE, ComputeDevice.CUDA) for rows, width in shapes],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LEARNING_RATE,
        eps=1e-8,
        device=torch.device("cuda"),
    )


def workloads(options: argparse.Namespace) -> Iterator[tuple[int, int, str]]:
    for bag in options.bags:
        for batch in options.batches:
            for distribution in ("uniform", "power-law"):
                yield bag, batch, distribution


def run_lookups(options: argparse.Namespace, benchmark: Benchmark) -> None:
    for width in options.widths:
        contestants: dict[str, tuple[Run, LookupPlan]] = {}
        full = full_table(options.rows, width)
        dense = dense_plan(options.rows, width)
        contestants[FULL] = (lambda batch, t=full: t(batch.ids, batch.starts), dense)
        if has_fbgemm():
            table = fbgemm_table([(options.rows, width)])
            contestants[FBGEMM] = (lambda batch, t=table: t(batch.ids, batch.offsets), dense)
        for each in compressed_tables(options.rows, width, METHODS, options.budgets, device="cuda"):
            ours, other = each.table, each.composition
            name = f"{each.method} {each.budget}"
            contestants[f"{OURS} {name}"] = (
                lambda batch, t=ours: t(batch.ids, batch.starts), ours.plan,
            )  # fmt: skip
            if each.method in ("hash", "qr"):
                contestants[f"{COMPOSED} {name}"] = (other, ours.plan)
        for bag, batch, distribution in workloads(options):
            if benchmark.is_over:
                return
            sized = {
                name: (run, bytes_touched(plan, batch * bag, batch))
                for name, (run, plan) in contestants.items()
            }
            setting = {
                "table": f"{options.rows:,} rows", "width": width, "bag": bag, "batch": batch,
                "ids": distribution,
            }  # fmt: skip
            inputs = make_batches(options.rows, batch, bag, distribution)
            with torch.no_grad():
                benchmark.measure(setting, sized, inputs, batch * bag, graphs=True)
        del contestants, full
        torch.cuda.empty_cache()


def run_huge_table(benchmark: Benchmark, width: int) -> None:
    """40M rows: a full table of 10 GB (width 64) against stores of 100 MB, and stores beyond L2.

    A bag of one id, a long batch of these, where the launch is no part of the time, bags of 20.
    """
    rows = 40_000_000
    if torch.cuda.mem_get_info()[0] < rows * width * 9:
        return
    full = full_table(rows, width)
    dense = dense_plan(rows, width)
    tables = {
        f"{OURS} {each.method} {each.budget}": each.table
        for each in compressed_tables(rows, width, ("hash", "qr"), ("25%", "1%"), device="cuda")
    }
    for bag, batch in ((1, 65_536), (1, 1_048_576), (20, 65_536)):
        if benchmark.is_over:
            return
        size = bytes_touched(dense, batch * bag, batch)
        contestants: dict[str, tuple[Run, float | None]] = {
            FULL: (lambda b: full(b.ids, b.starts), size)
        }
        for name, ours in tables.items():
            contestants[name] = (
                lambda b, t=ours: t(b.ids, b.starts),
                bytes_touched(ours.plan, batch * bag, batch),
            )
        setting = {
            "table": f"{rows:,} rows", "width": width, "bag": bag, "batch": batch,
            "ids": "uniform",
        }  # fmt: skip
        inputs = make_batches(rows, batch, bag, "uniform")
        with torch.no_grad():
            benchmark.measure(setting, contestants, inputs, batch * bag, graphs=True)


def run_training(options: argparse.Namespace, benchmark: Benchmark) -> None:
    """Forward, backward, row-wise Adagrad (torch's: Adagrad over sparse gradients)."""
    for width in options.widths:
        for bag in options.bags:
            if benchmark.is_over:
                return
            batch = max(options.batches)
            gradient = torch.randn(batch, width, device="cuda") / batch
            full = full_table(options.rows, width, sparse=True)
            contestants: dict[str, tuple[Run, float | None]] = {
                FULL: (train(lambda b, t=full: t(b.ids, b.starts), gradient, full), None)
            }
            if has_fbgemm():
                table = fbgemm_table([(options.rows, width)])
                contestants[FBGEMM] = (
                    train(lambda b, t=table: t(b.ids, b.offsets), gradient), None,
                )  # fmt: skip
            tables = compressed_tables(
                options.rows, width, ("hash", "qr"), options.budgets[-1:], sparse=True,
                device="cuda",
            )  # fmt: skip
            for each in tables:
                ours, other = each.table, each.composition
                ec.fuse_optimizer(ours, "rowwise_adagrad", lr=LEARNING_RATE)
                name = f"{each.method} {each.budget}"
                contestants[f"{COMPOSED} {name}"] = (train(other, gradient, other), None)
                contestants[f"{OURS} {name}"] = (
                    train(lambda b, t=ours: t(b.ids, b.starts), gradient), None,
                )  # fmt: skip
            setting = {
                "table": f"{options.rows:,} rows", "width": width, "bag": bag, "batch": batch,
                "ids": "power-law", "what": "training step",
            }  # fmt: skip
            inputs = make_batches(options.rows, batch, bag, "power-law")
            benchmark.measure(setting, contestants, inputs, batch * bag, graphs=False)


def train(forward: Run, gradient: Tensor, module: nn.Module | None = None) -> Run:
    """A step; without a module its optimizer is fused."""
    optimizer = None
    if module is not None:
        optimizer = torch.optim.Adagrad(module.parameters(), lr=LEARNING_RATE)

    def step(batch: Batch) -> None:
        forward(batch).backward(gradient)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def run_criteo(benchmark: Benchmark, batch: int) -> None:
    """26 tables of Criteo's sizes in one call, width 16, one id each."""
    width = 16
    bags = [full_table(rows, width) for rows in CRITEO_CARDINALITIES]
    configs = [
        ec.TableConfig(f"C{i + 1}", rows, width) for i, rows in enumerate(CRITEO_CARDINALITIES)
    ]
    generator = np.random.default_rng(1)
    offsets = torch.arange(len(bags) * batch + 1, device="cuda")
    starts = offsets[:batch]
    inputs = [
        torch.cat([draw_ids("power-law", n, batch, generator) for n in CRITEO_CARDINALITIES]).cuda()
        for _ in range(BATCHES)
    ]

    def run_full(ids: Tensor) -> Tensor:
        parts = zip(bags, ids.split(batch), strict=True)
        return torch.cat([bag(part, starts) for bag, part in parts], dim=1)

    contestants: dict[str, tuple[Run, float | None]] = {FULL: (run_full, None)}
    if has_fbgemm():
        table = fbgemm_table([(rows, width) for rows in CRITEO_CARDINALITIES])
        contestants[FBGEMM] = (lambda ids: table(ids, offsets), None)
    for budget in ("10%", "1%"):
        for method in ("hash", "qr", "multihash"):
            ours = ec.EmbeddingBagCollection(configs, method=method, budget=budget).cuda()
            contestants[f"{OURS} {method} {budget}"] = (
                lambda ids, t=ours: t(ids, offsets), None,
            )  # fmt: skip
    setting = {
        "table": "26 tables of Criteo", "width": width, "bag": 1, "batch": batch,
        "ids": "power-law",
    }  # fmt: skip
    with torch.no_grad():
        benchmark.measure(setting, contestants, inputs, len(bags) * batch, graphs=True)


def run_huge_tables(options: argparse.Namespace, benchmark: Benchmark) -> None:
    for width in (64, 128):
        run_huge_table(benchmark, width)
        torch.cuda.empty_cache()


def run_collections(options: argparse.Namespace, benchmark: Benchmark) -> None:
    for batch in options.batches:
        run_criteo(benchmark, batch)


#: In the order of their worth, for a run that is cut.
PARTS: dict[str, Callable[[argparse.Namespace, Benchmark], None]] = {
    "huge": run_huge_tables,
    "collection": run_collections,
    "training": run_training,
    "lookups": run_lookups,
}


def main() -> None:
    options = arguments()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU")
    torch.manual_seed(0)
    benchmark = Benchmark(options)
    for part in options.parts:
        PARTS[part](options, benchmark)
        torch.cuda.empty_cache()
    print(f"{len(benchmark.records)} records in {benchmark.out}")


if __name__ == "__main__":
    main()
