"""Writes the measured tables of README.md from benchmarks/results: no figure there is typed.

    python benchmarks/readme_table.py [--check]

linear.json is `pytest benchmarks --benchmark-json`, gpu_check.json is gpu_check.sh's, the demo's full.json is `calora demo --full --json`. A block whose JSON is missing is left
empty. --check fails if README.md is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from calora_ext.demo import ASSETS
from calora_ext.demo.plan import TASKS
from calora_ext.demo.report import loss_table, verdict_lines
from calora_ext.tables import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHAPE = (4096, 11008)  # in and out of a 7B Llama's MLP
LORA = " + LoRA r16"
ROWS = ("calora int4 g128", "calora int4 g64", "calora nf4 g64", "calora int8", "calora bf16", "torch int4 g128", "torch dynamic int8", "bitsandbytes nf4",
        "onnxruntime int4", "llama.cpp Q4_0", "llama.cpp Q4_K", "torch bf16")  # fmt: skip


def speed(results: dict) -> str:
    """One token through one layer: each row without and with a LoRA."""
    infos = {}
    for entry in results["benchmarks"]:
        info = entry["extra_info"]
        if (info["in_features"], info["out_features"]) == SHAPE and info["m"] == 1 and info["threads"] == 1:
            infos.setdefault(info["isa"], {})[info["row"]] = {**info, "seconds": entry["stats"]["median"]}
    isa, rows = max(infos.items(), key=lambda item: (item[0].startswith("avx512"), len(item[0])))
    baseline = rows["torch bf16"]
    lines = []
    for name in ROWS:
        if name in rows:
            bare, adapted = rows[name], rows.get(name + LORA)
            lines.append((
                name, f"{bare['seconds'] * 1e6:,.0f}", f"{adapted['seconds'] * 1e6:,.0f}" if adapted else None,
                f"{baseline['seconds'] / bare['seconds']:.1f} ×", f"{100 * bare['bandwidth_fraction']:.0f} %",
            ))  # fmt: skip
    columns = (f"{SHAPE[1]} x {SHAPE[0]} layer, one token", "µs", "µs with a LoRA (r=16)", "× torch bf16", "of the read bandwidth")
    cpu = results["machine_info"]["cpu"]["brand_raw"]
    return f"{table(columns, lines)}\n\n{cpu}, one thread, rung `{isa}`, medians; weights colder than the last-level cache; read bandwidth: {baseline['probe']}."


def gpu(results: dict) -> str:
    """One token through one layer with its bank, beside what PEFT does on a dense layer."""
    ours, peft = "int4 g128 + LoRA 16 + recovery 64", "cuBLAS bf16 + LoRA as PEFT computes it"
    us = {row["what"]: 1e6 * row["seconds"] for row in results["speed"] if (row["in"], row["out"], row["m"]) == (8192, 8192, 1)}
    return (f"{results['gpu']}, 8192 x 8192 layer, one token, {ours}: {us[ours]:.1f} µs, {us[peft] / us[ours]:.1f} × as fast as cuBLAS bf16 with PEFT's LoRA; "
            "medians of CUDA graphs, weights rotated past the L2.")  # fmt: skip


def recovery(results: dict) -> str:
    """The demo's losses over its seeds."""
    tables = "\n\n".join(loss_table(results, task) for task in TASKS)
    plan = results["plan"]
    note = f"Held-out loss, nats per token. `calora demo --full`: {plan['steps']} steps, mean ± sd of {len(plan['seeds'])} seeds; CA-LoRA from the residual."
    return f"{tables}\n\n{note}\n\n{verdict_lines(results)}"


def filled(readme: str) -> str:
    for name, path, write in (("speed", RESULTS / "linear.json", speed), ("gpu", RESULTS / "gpu_check.json", gpu), ("recovery", ASSETS / "full.json", recovery)):
        block = f"\n{write(json.loads(path.read_text(encoding='utf-8')))}\n" if path.exists() else "\n"
        readme, found = re.subn(
            rf"(<!-- {name}: [^\n]*-->)\n.*?(<!-- /{name} -->)", lambda m, block=block: m[1] + block + m[2], readme, flags=re.S
        )
        if found != 1:
            sys.exit(f"README.md has no block <!-- {name}: ... --> ... <!-- /{name} -->")
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if check:
        sys.exit(None if before == after else "README.md is not what benchmarks/results says; run python benchmarks/readme_table.py")
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
