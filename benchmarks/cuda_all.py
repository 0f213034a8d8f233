"""Compiles the CUDA kernels for every architecture, one by one: processor seconds, bytes and spills of each. `make cuda-all` runs it.

    python benchmarks/cuda_all.py [--out benchmarks/results/cuda-all.json] [--archs 80,90]
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from calora_ext.tables import format_bytes, table

ROOT = Path(__file__).parents[1]
ARCHS = ("90", "80", "120", "86", "89", "100", "103", "110")  # what wheels hold comes first


def children_seconds() -> float:
    """Processor time of all commands so far: what does not depend on who else uses the machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compiled(messages: str) -> dict[str, int]:
    """Bytes that each kernel spills, of what ptxas says: "Compiling entry function 'NAME' ...", then its properties."""
    kernels = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores", messages, re.S)
    names = subprocess.run(["c++filt", "-p", *(name for name, _ in kernels)], input="", capture_output=True, text=True, check=True).stdout.splitlines()
    return {re.sub(r"calora::cuda::|\(anonymous namespace\)::", "", name): int(spilled) for name, (_, spilled) in zip(names, kernels, strict=True)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--archs", default=",".join(ARCHS))
    options = parser.parse_args()
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        parser.error("nvcc was not found; install the CUDA toolkit")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in options.archs.split(","):
            start, size, spilled = children_seconds(), 0, {}
            for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
                target = Path(folder) / f"{source.stem}.cubin"
                command = [nvcc, "-cubin", "-O3", "-std=c++17", f"-arch=sm_{arch}", "-Xptxas", "-v", str(source), "-o", str(target)]
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    sys.exit(f"sm_{arch}, {source.name}: {result.stderr.strip()[-500:]}")
                size += target.stat().st_size
                spilled |= compiled(result.stdout + result.stderr)
            rows.append({"arch": f"sm_{arch}", "cpu_seconds": round(children_seconds() - start, 1), "kernels": len(spilled), "bytes": size,
                         "spilled_bytes": sum(spilled.values()), "spilling": {name: count for name, count in spilled.items() if count}})  # fmt: skip
            print(rows[-1], flush=True)
            if options.out:
                not_run = [other for other in ARCHS if f"sm_{other}" not in [row["arch"] for row in rows]]
                options.out.write_text(json.dumps({"nvcc": version, "rows": rows, "not_run": not_run}, indent=1) + "\n", encoding="utf-8")
    columns = [(r["arch"], f"{r['cpu_seconds']:.1f}", str(r["kernels"]), format_bytes(r["bytes"]), str(r["spilled_bytes"])) for r in rows]
    print(table(("architecture", "seconds", "kernels", "size", "spilled"), columns))
    return int(any(r["spilled_bytes"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
