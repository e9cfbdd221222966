"""Forward lookups: compressed tables against the full table they replace.

    python benchmarks/lookup.py            # everything; about half an hour, 10 GB of memory
    python benchmarks/lookup.py --quick    # one small table, a minute

Ours, ``torch.nn.EmbeddingBag`` on the full table, FBGEMM's table-batched embedding on the full
table (where ``fbgemm-gpu-cpu`` is installed) and each method composed from torch ops, over widths,
bags, distributions of ids, sizes, budgets and batches; and 26 tables of Criteo's sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from contestants import (
    Compressed,
    bytes_touched,
    compressed_tables,
    default_methods,
    dense_plan,
    engine_name,
    fbgemm_tables,
    full_weight,
    has_fbgemm,
    parse_method,
    torch_full,
)
from criteo import CRITEO_CARDINALITIES, CollectionBatch, make_collection_batches
from measure import Batch, machine_bandwidths, make_batches, warn_if_busy
from report import COMPOSED, FBGEMM, FULL, OURS, Benchmark, Contestant, Setting
from torch import Tensor, nn

import embcompress as ec

NO_CONCATENATION = "26 nn.EmbeddingBag, not concatenated"
FILL = "a fill of the output"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small table and few rounds")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 8_000_000])
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--bags", type=int, nargs="+", default=[1, 20], help="ids a bag")
    parser.add_argument("--batches", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--distributions", nargs="+", default=["power-law", "uniform"])
    parser.add_argument("--budgets", nargs="+", default=["10%", "1%"])
    parser.add_argument(
        "--methods", nargs="+", default=[*default_methods(), "low_bit"],
        help="names; low_bit:4x4 is four columns of four bits",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-tables", action="store_true", help="the collection alone")
    parser.add_argument("--no-collection", action="store_true", help="the single tables alone")
    parser.add_argument("--no-fbgemm", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results/lookup"))
    options = parser.parse_args()
    if options.quick:
        options.rows, options.widths, options.bags = [200_000], [16, 64], [1, 20]
        options.batches, options.distributions, options.rounds = [2048], ["power-law"], 5
    return options


# ---------------------------------------------------------------------------------- single tables


def table_contestants(
    full: nn.EmbeddingBag, fbgemm: nn.Module | None, tables: Sequence[Compressed], setting: Setting
) -> list[Contestant]:
    """All who look up one table. Full tables come first: they are everybody's baseline."""
    batch, ids = setting.batch_size, setting.batch_size * setting.bag_length
    plan = dense_plan(full.num_embeddings, full.embedding_dim)
    size = bytes_touched(plan, ids, batch)

    def run_full(batch: Batch) -> Tensor:
        return full(batch.ids, batch.starts)

    def run_fill(batch: Batch) -> Tensor:
        return torch.full((len(batch.starts), full.embedding_dim), 1.0)

    contestants = [
        Contestant(FULL, run_full, bytes=size, plan=plan),
        Contestant(FILL, run_fill, bytes=4.0 * setting.batch_size * setting.width),
    ]
    if fbgemm is not None:

        def run_fbgemm(batch: Batch) -> Tensor:
            return fbgemm(batch.ids, batch.offsets)

        contestants.append(Contestant(FBGEMM, run_fbgemm, bytes=size, plan=plan))
    for each in tables:

        def run_ours(batch: Batch, table: nn.Module = each.table) -> Tensor:
            return table(batch.ids, batch.starts)

        about = {"method": each.method, "budget": each.budget, "plan": each.table.plan}
        size = bytes_touched(each.table.plan, ids, batch)
        contestants.append(Contestant(OURS, run_ours, bytes=size, **about))
        contestants.append(Contestant(COMPOSED, each.composition, bytes=size, **about))
    return contestants


def run_tables(options: argparse.Namespace, benchmark: Benchmark) -> None:
    generator = np.random.default_rng(0)
    for rows in options.rows:
        for width in options.widths:
            fbgemm, weight = None, None
            if has_fbgemm() and not options.no_fbgemm:
                fbgemm, (weight,) = fbgemm_tables([(rows, width)])
            # Both full tables read the same memory: at 8M × 128 there is no room for two.
            full = torch_full(full_weight(rows, width) if weight is None else weight)
            tables = compressed_tables(rows, width, options.methods, options.budgets, deployed=True)
            for setting in settings(options, f"{rows:,} rows", width):
                benchmark.measure(
                    setting,
                    table_contestants(full, fbgemm, tables, setting),
                    lambda setting=setting, rows=rows: make_batches(
                        setting.distribution,
                        rows,
                        setting.batch_size,
                        setting.bag_length,
                        generator,
                    ),
                    options.rounds,
                    setting.batch_size * setting.bag_length,
                )


def settings(options: argparse.Namespace, table: str, width: int) -> list[Setting]:
    return [
        Setting(table, width, distribution, bag, batch)
        for distribution in options.distributions
        for bag in options.bags
        for batch in options.batches
    ]


# ------------------------------------------------------------------------------------- collection


def collection_contestants(options: argparse.Namespace, width: int) -> list[Contestant]:
    shapes = [(rows, width) for rows in CRITEO_CARDINALITIES]
    fbgemm = None
    if has_fbgemm() and not options.no_fbgemm:
        fbgemm, weights = fbgemm_tables(shapes)
    else:
        weights = [full_weight(*shape) for shape in shapes]
    bags = [torch_full(weight) for weight in weights]

    def each(batch: CollectionBatch) -> list[Tensor]:
        return [bag(ids, batch.starts) for bag, ids in zip(bags, batch.parts, strict=True)]

    contestants = [
        Contestant(FULL, lambda batch: torch.cat(each(batch), dim=1)),
        Contestant(NO_CONCATENATION, each),
        Contestant(FILL, lambda batch: torch.full((len(batch.starts), width * len(shapes)), 1.0)),
    ]
    if fbgemm is not None:
        contestants.append(Contestant(FBGEMM, lambda batch: fbgemm(batch.ids, batch.offsets)))
    configs = [ec.TableConfig(f"C{i + 1}", rows, width) for i, (rows, _) in enumerate(shapes)]
    for budget in options.budgets:
        for method in options.methods:
            try:
                chosen = parse_method(method)
                ours = ec.EmbeddingBagCollection(configs, method=chosen, budget=budget)
                ec.deploy(ours)
            except ec.BudgetError as error:
                print(f"left out: {error}")
                continue

            def run_ours(batch: CollectionBatch, ours: nn.Module = ours) -> Tensor:
                return ours(batch.ids, batch.offsets)

            contestants.append(Contestant(OURS, run_ours, method, budget))
    return contestants


def run_collection(options: argparse.Namespace, benchmark: Benchmark) -> None:
    generator = np.random.default_rng(1)
    width = 16
    contestants = collection_contestants(options, width)
    for distribution in options.distributions:
        for batch in options.batches:
            benchmark.measure(
                Setting("26 tables of Criteo", width, distribution, 1, batch),
                contestants,
                lambda distribution=distribution, batch=batch: make_collection_batches(
                    distribution, batch, generator
                ),
                options.rounds,
                batch * len(CRITEO_CARDINALITIES),
            )


def main() -> None:
    options = arguments()
    warn_if_busy()
    benchmark = Benchmark(options.out)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    widths = sorted({*options.widths, 16})
    bandwidths = machine_bandwidths(widths, 128 if options.quick else 1024)
    print(f"embcompress runs {engine_name()}")
    gathers = ", ".join(f"{w}: {b / 1e9:.1f}" for w, b in bandwidths["gather"].items())
    print(f"copy {bandwidths['copy'] / 1e9:.1f} GB/s; random gather by width {gathers} GB/s")
    benchmark.bandwidths = bandwidths
    with torch.no_grad():
        if not options.no_tables:
            run_tables(options, benchmark)
        if not options.no_collection:
            run_collection(options, benchmark)
    benchmark.finish("Forward lookups")


if __name__ == "__main__":
    main()
