"""Peak memory of one forward and backward, beside what must be there: stores, output, gradients.

    python benchmarks/memory.py [--method qr] [--budget 1%] …

Linux alone: the kernel's high-water mark of the process is reset before the step, read after it.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import numpy as np
import torch
from contestants import compressed_tables, engine_name
from measure import make_batches

_MIB = 1 << 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--method", default="qr")
    parser.add_argument("--budget", default="10%")
    parser.add_argument("--bag", type=int, default=20)
    parser.add_argument("--batch", type=int, default=65536)
    return parser.parse_args()


def status_bytes(field: str) -> int:
    """A line of /proc/self/status, such as VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def reset_peak() -> None:
    """Set VmHWM to the present VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    options = arguments()
    tables = compressed_tables(options.rows, options.width, [options.method], [options.budget])
    if not tables:
        raise SystemExit(1)
    table = tables[0].table
    generator = np.random.default_rng(0)
    small, _ = make_batches("uniform", options.rows, 64, options.bag, generator)[:2]
    batch = make_batches("uniform", options.rows, options.batch, options.bag, generator)[0]
    first = table(small.ids, small.starts)
    first.backward(torch.ones_like(first))  # threads, caches, code
    table.zero_grad(set_to_none=True)
    gc.collect()
    gradient = torch.ones(options.batch, options.width)
    before = status_bytes("VmRSS")
    reset_peak()
    output = table(batch.ids, batch.starts)
    output.backward(gradient)
    extra = status_bytes("VmHWM") - before
    stores = sum(tensor.nbytes for tensor in table.stores().values())
    gradients = sum(p.grad.nbytes for p in table.parameters() if p.grad is not None)
    needed = stores + output.nbytes + gradients
    print(f"embcompress runs {engine_name()}")
    print(f"{options.method} at {options.budget} of {options.rows:,} x {options.width}: ", end="")
    print(f"batch {options.batch:,}, {options.bag} ids a bag")
    for name, size in (("stores", stores), ("output", output.nbytes), ("gradients", gradients)):
        print(f"{name:>28}: {size / _MIB:8.1f} MiB")
    print(f"{'peak above the start':>28}: {extra / _MIB:8.1f} MiB")
    print(f"{'stores and peak, over needed':>28}: {(stores + extra) / needed:8.3f}")


if __name__ == "__main__":
    main()
