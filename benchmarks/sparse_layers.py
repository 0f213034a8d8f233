"""Sparse layers beside the same weights dense, on copies that together exceed the last-level cache, taking turns.

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/sparse_layers.py --shapes 4096x4096 [--isa avx2] [--m 1] [--rank 16] [--json FILE]

Prints, per format: bits per weight as it runs (``ops.runs_as``), microseconds, GB/s of its own bytes (the bank's included), the fraction of the read
bandwidth probed among the rows, how many times faster it is than the dense weight of the same value type, and than torch's
bf16 F.linear in the same run. --json adds the rows to those that the file holds for other shapes, rungs, M and ranks.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

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


def measure(out_features: int, in_features: int, m: int, rank: int, seconds: float, values: list[str]) -> list[dict]:
    """Rows of the table for one shape. rank: of LoRA rows and of as many recovery rows; 0 for none."""
    weight = torch.randn(out_features, in_features)
    x = torch.randn(m, in_features, dtype=torch.bfloat16)
    down, up = torch.randn(2 * rank, in_features, dtype=x.dtype), torch.randn(out_features, 2 * rank, dtype=x.dtype)
    masks = {s: None if s is None else magnitude(weight, NofM(2, 4) if s == "2:4" else round(s * weight.numel())) for _, s in ROWS}
    calls, nbytes = {}, {}
    for row in ROWS:
        if row[0] not in values:
            continue
        stored = format_of(*row)
        packed, fmt = ops.as_it_runs(list(stored.pack(weight, masks[row[1]]).values()), stored, in_features, out_features)
        nbytes[row] = sum(t.nbytes for t in packed) + (down.nbytes + up.nbytes if rank else 0)
        calls[row] = [
            partial(ops.linear, x, [t.clone() for t in packed], fmt, in_features, out_features, None,
                    down.clone() if rank else None, ops.tile_up(up) if rank else None, rank, "int8")
            for _ in range(copies_for(nbytes[row]))
        ]  # fmt: skip
    memory = torch.ones(PROBE, dtype=torch.uint8)
    calls["read"] = [partial(torch.ops.calora.read, part) for part in memory.split(PROBE // 8)]
    torch_weight = weight.bfloat16()
    calls["torch"] = [partial(linear, x, torch_weight.clone()) for _ in range(copies_for(torch_weight.nbytes))]
    with torch.inference_mode():
        times = interleaved(calls, seconds)
    bandwidth, torch_time = PROBE / 8 / times.pop("read") / 1e9, times.pop("torch")
    return [
        {
            "out_features": out_features, "in_features": in_features, "isa": ops.native.isa(), "threads": torch.get_num_threads(), "m": m,
            "rank": rank, "values": row[0], "sparsity": row[1] or "dense", "runs_as": str(ops.runs_as(format_of(*row))), "bits": 8 * nbytes[row] / weight.numel(), "microseconds": 1e6 * time,
            "gigabytes_per_second": nbytes[row] / time / 1e9, "of_read": nbytes[row] / time / 1e9 / bandwidth,
            "times_dense": times[row[0], None] / time, "times_torch_bf16": torch_time / time,
        }
        for row, time in times.items()
    ]  # fmt: skip


def add_to(path: Path, rows: list[dict]) -> None:
    """The rows beside those that the file already holds, in place of those of the same shape, rung, threads, M, rank and values."""
    key = ("out_features", "in_features", "isa", "threads", "m", "rank", "values")
    new = {tuple(row[k] for k in key) for row in rows}
    old = json.loads(path.read_text()) if path.exists() else []
    kept = [row for row in old if tuple(row[k] for k in key) not in new]
    path.write_text("[\n" + ",\n".join(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}) for row in kept + rows) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "4096x4096", "4096x11008"], metavar="OUTxIN")
    parser.add_argument("--isa")
    parser.add_argument("--m", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.5, help="per row")
    parser.add_argument("--values", nargs="+", default=["int4", "int8", "bf16"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with rung(arguments.isa):
        for shape in arguments.shapes:
            out_features, in_features = map(int, shape.split("x"))
            rows += measure(out_features, in_features, arguments.m, arguments.rank, arguments.seconds, arguments.values)
        print(f"{ops.native.isa()}, {torch.get_num_threads()} threads, m = {arguments.m}, rank = {arguments.rank} + {arguments.rank}")
    if arguments.json:
        add_to(arguments.json, rows)
    print(table(("shape", "values", "sparsity", "bits", "us", "GB/s", "of read", "x dense", "x torch bf16"), [
        (f"{r['out_features']}x{r['in_features']}", r["values"], r["sparsity"], f"{r['bits']:.2f}", f"{r['microseconds']:.1f}",
         f"{r['gigabytes_per_second']:.1f}", f"{r['of_read']:.2f}", f"{r['times_dense']:.2f}", f"{r['times_torch_bf16']:.2f}")
        for r in rows
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
