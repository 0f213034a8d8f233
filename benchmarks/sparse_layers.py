"""Sparse layers beside the same weights dense, on copies that together exceed the last-level cache, taking turns.

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/sparse_layers.py --shapes 4096x4096 [--isa avx2] [--m 1 16] [--banks 0 16+16 64] [--json FILE]

Prints, per format: bits per weight as it runs (``ops.runs_as``), microseconds, GB/s of its own bytes (the bank's included), the fraction of the read
bandwidth probed among the rows, how many times faster it is than the dense weight of the same value type with the same bank, and than torch's
bf16 F.linear in the same run; and, with a bank, what is allowed for it (1.25 times its share of the base's bytes, and 2 us) over what it costs.
--json adds the rows to those that the file holds for other shapes, rungs, M and banks.
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
VALUES = ("int4", "nf4", "int8", "bf16")
ROWS = [(values, sparsity) for values in VALUES for sparsity in (None, "2:4", 0.5, 0.6, 0.7)]
MANY = 64  # rows of x from which on a call is so long that two copies of the weights do


def format_of(values: str, sparsity: str | float | None) -> WeightFormat:
    pattern = "dense" if sparsity is None else "2:4" if sparsity == "2:4" else "unstructured"
    return WeightFormat(values, 128, pattern=pattern)


def packed_rows(out_features: int, in_features: int, values: list[str]) -> dict[tuple, tuple[WeightFormat, list[torch.Tensor]]]:
    """(values, sparsity) -> a weight as it is stored."""
    weight = torch.randn(out_features, in_features)
    masks = {s: None if s is None else magnitude(weight, NofM(2, 4) if s == "2:4" else round(s * weight.numel())) for _, s in ROWS}
    rows = {}
    for row in ROWS:
        if row[0] in values:
            stored = format_of(*row)
            rows[row] = stored, list(stored.pack(weight, masks[row[1]]).values())
    return rows


def measure(rows: dict, out_features: int, in_features: int, m: int, banks: list[tuple[int, int]], seconds: float) -> list[dict]:
    """Rows of the table for one shape and M. banks: (LoRA rows, recovery rows) of each."""
    x = torch.randn(m, in_features, dtype=torch.bfloat16)
    calls, nbytes = {}, {}
    runs_as = {}
    for row, (stored, tensors) in rows.items():
        packed, fmt = ops.as_it_runs(tensors, stored, in_features, out_features)
        runs_as[row] = fmt

        def copy(stored=stored, tensors=tensors, fmt=fmt) -> list[torch.Tensor]:  # what runs in another format is made again, in pages as large as a layer's
            return [t.clone() for t in tensors] if fmt is stored else ops.as_it_runs(tensors, stored, in_features, out_features)[0]

        for lora, recovery in banks:
            rank = lora + recovery
            down, up = torch.randn(rank, in_features, dtype=x.dtype), torch.randn(out_features, rank, dtype=x.dtype)
            nbytes[row, (lora, recovery)] = sum(t.nbytes for t in packed) + down.nbytes + up.nbytes
            copies = copies_for(nbytes[row, (lora, recovery)]) if m < MANY else 2
            calls[row, (lora, recovery)] = [
                partial(ops.linear, x, copy(), fmt, in_features, out_features, None,
                        down.clone() if rank else None, ops.tile_up(up) if rank else None, lora, "int8")
                for _ in range(copies)
            ]  # fmt: skip
    memory = torch.ones(PROBE, dtype=torch.uint8)
    calls["read"] = [partial(torch.ops.calora.read, part) for part in memory.split(PROBE // 8)]
    weights = torch.randn(out_features, in_features, dtype=torch.bfloat16)
    calls["torch"] = [partial(linear, x, weights.clone()) for _ in range(copies_for(weights.nbytes) if m < MANY else 2)]
    with torch.inference_mode():
        times = interleaved(calls, seconds)
    bandwidth, torch_time = PROBE / 8 / times.pop("read") / 1e9, times.pop("torch")
    results = []
    for (row, bank), time in times.items():
        base, base_bytes = times.get((row, (0, 0))), nbytes.get((row, (0, 0)))
        result = {
            "out_features": out_features, "in_features": in_features, "isa": ops.native.isa(), "threads": torch.get_num_threads(), "m": m,
            "lora": bank[0], "recovery": bank[1], "values": row[0], "sparsity": row[1] or "dense", "runs_as": str(runs_as[row]),
            "bits": 8 * nbytes[row, bank] / (in_features * out_features), "microseconds": 1e6 * time, "gigabytes_per_second": nbytes[row, bank] / time / 1e9,
            "of_read": nbytes[row, bank] / time / 1e9 / bandwidth, "times_torch_bf16": torch_time / time, "gigaflops": 2e-9 * m * in_features * out_features / time,
        }  # fmt: skip
        if ((row[0], None), bank) in times:
            result["times_dense"] = times[(row[0], None), bank] / time
        if sum(bank) and base is not None:
            allowed = 1.25 * (nbytes[row, bank] - base_bytes) / base_bytes * base + 2e-6
            result |= {"bank_microseconds": 1e6 * (time - base), "bank_allowed_microseconds": 1e6 * allowed}
        results.append(result)
    return results


def add_to(path: Path, rows: list[dict]) -> None:
    """The rows beside those that the file already holds, in place of those of the same shape, rung, threads, M, bank and values."""
    key = ("out_features", "in_features", "isa", "threads", "m", "lora", "recovery", "values")
    new = {tuple(row[k] for k in key) for row in rows}
    old = json.loads(path.read_text()) if path.exists() else []
    kept = [row for row in old if tuple(row[k] for k in key) not in new]
    path.write_text("[\n" + ",\n".join(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}) for row in kept + rows) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "4096x4096", "4096x11008"], metavar="OUTxIN")
    parser.add_argument("--isa")
    parser.add_argument("--m", type=int, nargs="+", default=[1])
    parser.add_argument("--banks", type=bank, nargs="+", default=[(0, 0)], metavar="LORA[+RECOVERY]")
    parser.add_argument("--seconds", type=float, default=0.5, help="per row")
    parser.add_argument("--values", nargs="+", default=["int4", "int8", "bf16"], choices=VALUES)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with rung(arguments.isa):
        for shape in arguments.shapes:
            out_features, in_features = map(int, shape.split("x"))
            stored = packed_rows(out_features, in_features, arguments.values)
            for m in arguments.m:
                rows += measure(stored, out_features, in_features, m, arguments.banks, arguments.seconds)
        print(f"{ops.native.isa()}, {torch.get_num_threads()} threads")
    if arguments.json:
        add_to(arguments.json, rows)
    print(table(("shape", "m", "values", "sparsity", "bank", "bits", "us", "GB/s", "of read", "GF/s", "x dense", "x torch bf16", "allowed / cost"), [
        (f"{r['out_features']}x{r['in_features']}", r["m"], r["values"], r["sparsity"], f"{r['lora']}+{r['recovery']}", f"{r['bits']:.2f}", f"{r['microseconds']:.1f}",
         f"{r['gigabytes_per_second']:.1f}", f"{r['of_read']:.2f}", f"{r['gigaflops']:.0f}", f"{r.get('times_dense', 1):.2f}", f"{r['times_torch_bf16']:.2f}",
         f"{r['bank_allowed_microseconds'] / r['bank_microseconds']:.2f}" if r.get("bank_microseconds") else "")
        for r in rows
    ]))  # fmt: skip


def bank(text: str) -> tuple[int, int]:
    """LoRA rows and recovery rows: 16+16 -> (16, 16)."""
    lora, _, recovery = text.partition("+")
    return int(lora), int(recovery or 0)


if __name__ == "__main__":
    main()
