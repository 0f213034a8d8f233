"""Sparse layers beside the same weights dense, on copies that together exceed the last-level cache, taking turns.

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/sparse_layers.py --shapes 4096x4096 [--isa avx2] [--m 1] [--rank 16]

Prints, per format: bits per weight, microseconds, GB/s of its own bytes (the bank's included), the fraction of the read
bandwidth probed among the rows, and how many times faster it is than the dense weight of the same value type.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from calora_ext import WeightFormat, ops
from calora_ext.bench import rung
from calora_ext.measure import copies_for, interleaved
from calora_ext.pruning import NofM, magnitude
from calora_ext.tables import table

PROBE = 512 * 2**20  # bytes
ROWS = [(values, sparsity) for values in ("int4", "int8", "bf16") for sparsity in (None, "2:4", 0.5, 0.6, 0.7)]


def format_of(values: str, sparsity: str | float | None) -> WeightFormat:
    pattern = "dense" if sparsity is None else "2:4" if sparsity == "2:4" else "unstructured"
    return WeightFormat(values, 128, pattern=pattern)


def measure(out_features: int, in_features: int, m: int, rank: int, seconds: float) -> list[tuple]:
    """Rows of the table for one shape. rank: of LoRA rows and of as many recovery rows; 0 for none."""
    weight = torch.randn(out_features, in_features)
    x = torch.randn(m, in_features, dtype=torch.bfloat16)
    down, up = torch.randn(2 * rank, in_features, dtype=x.dtype), torch.randn(out_features, 2 * rank, dtype=x.dtype)
    calls, nbytes = {}, {}
    for values, sparsity in ROWS:
        fmt = format_of(values, sparsity)
        target = NofM(2, 4) if sparsity == "2:4" else round((sparsity or 0) * weight.numel())
        packed = list(fmt.pack(weight, None if sparsity is None else magnitude(weight, target)).values())
        size = sum(t.nbytes for t in packed) + (down.nbytes + up.nbytes if rank else 0)
        nbytes[values, sparsity] = size
        calls[values, sparsity] = [
            partial(ops.linear, x, [t.clone() for t in packed], fmt, in_features, out_features, None,
                    down.clone() if rank else None, ops.tile_up(up) if rank else None, rank, "int8")
            for _ in range(copies_for(size))
        ]  # fmt: skip
    memory = torch.ones(PROBE, dtype=torch.uint8)
    calls["read"] = [partial(torch.ops.calora.read, part) for part in memory.split(PROBE // 8)]
    with torch.inference_mode():
        times = interleaved(calls, seconds)
    bandwidth = PROBE / 8 / times.pop("read") / 1e9
    rows = []
    for (values, sparsity), time in times.items():
        speed = nbytes[values, sparsity] / time / 1e9
        rows.append((
            f"{out_features}x{in_features}", values, sparsity or "dense", f"{8 * nbytes[values, sparsity] / weight.numel():.2f}",
            f"{1e6 * time:.1f}", f"{speed:.1f}", f"{speed / bandwidth:.2f}", f"{times[values, None] / time:.2f}",
        ))  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "4096x4096", "4096x11008"], metavar="OUTxIN")
    parser.add_argument("--isa")
    parser.add_argument("--m", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.5, help="per row")
    arguments = parser.parse_args()
    rows = []
    with rung(arguments.isa):
        for shape in arguments.shapes:
            out_features, in_features = map(int, shape.split("x"))
            rows += measure(out_features, in_features, arguments.m, arguments.rank, arguments.seconds)
        print(f"{ops.native.isa()}, {torch.get_num_threads()} threads, m = {arguments.m}, rank = {arguments.rank} + {arguments.rank}")
    print(table(("shape", "values", "sparsity", "bits", "us", "GB/s", "of read", "x dense"), rows))


if __name__ == "__main__":
    main()
