"""Loads the one libcalora.so in environments with other versions of torch and checks its operators. `make abi-matrix` runs it.

    python benchmarks/abi_matrix.py [--out benchmarks/results/abi-matrix.json] [--python PATH ...]

Runs in this interpreter's torch and in a virtual environment per version under build/abi, which it makes where it is missing: the
build of the package index, which on PyPI is one with CUDA (several GB). With --python in those interpreters alone. What was not
run stands in the result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "calora_ext" / "lib" / "libcalora.so"
VERSIONS = ("2.10.0", "2.11.0", "2.12.0", "2.13.0")
BUILDS = ("cpu", "cuda")

# Needs torch alone. Format 0 is bf16 in tiles of 32 rows: the dense weight is what `decode` says, and a product must agree with it.
CHECK = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
o = torch.ops.calora
names = ("linear", "linear_inference", "linear_dx", "decode", "read")
registered = {k: all(torch._C._dispatch_has_kernel_for_dispatch_key("calora::" + n, k) for n in names) for k in ("CPU", "CUDA")}
torch.manual_seed(0)
packed = [torch.randn(2, 32 * 64).bfloat16().view(torch.uint8)]
w = o.decode(packed, 0, 64, 40, -1, 0, 40)
x, bias, down, up = torch.randn(3, 64), torch.randn(40), torch.randn(5, 64), torch.randn(40, 5)
y = o.linear_inference(x, packed, 0, 64, 40, -1, bias, down, up, 5, None, 0)
want = x.double() @ w.double().t() + bias.double() + x.double() @ down.double().t() @ up.double().t()
grad = torch.randn(3, 40)
dx = o.linear_dx(grad, packed, 0, 64, 40, -1)
right = bool((y - want).norm() < 1e-5 * want.norm()) and torch.allclose(dx, grad @ w, atol=1e-4)
try:
    o.linear_inference.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), x, packed, 0, 64, 40, -1, None, None, None, 0, None, 0)
    refused = None
except RuntimeError as error:
    refused = str(error).splitlines()[0]
print(json.dumps({"torch": torch.__version__, "cuda_build": torch.version.cuda, "python": sys.version.split()[0], "registered": registered, "cpu_results": right, "cpu_tensors_as_cuda": refused}))
"""


def environment(version: str) -> str:
    """The interpreter of an environment with that torch, made on the first call."""
    folder = ROOT / "build" / "abi" / version
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", f"torch==={version}", "numpy"], check=True)
        (folder / "ready").touch()
    return str(python)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--python", action="append", help="an interpreter that has torch, instead of the versions made here")
    options = parser.parse_args()
    rows = []
    for python in options.python or [sys.executable, *map(environment, VERSIONS)]:
        result = subprocess.run([python, "-c", CHECK, str(LIBRARY)], capture_output=True, text=True)
        if result.returncode:
            rows.append({"python": Path(python).name, "error": result.stderr.strip().splitlines()[-1]})
        else:
            rows.append(json.loads(result.stdout.strip().splitlines()[-1]))
        print(rows[-1], flush=True)
    run = {(row["torch"].split("+")[0], "cuda" if row["cuda_build"] else "cpu") for row in rows if "torch" in row}
    not_run = [f"{version} {build}" for version in VERSIONS for build in BUILDS if (version, build) not in run]
    print("not run:", ", ".join(not_run) or "nothing")
    if options.out:
        result = {"library_bytes": LIBRARY.stat().st_size, "rows": rows, "not_run": not_run}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(not all(row.get("cpu_results") and all(row["registered"].values()) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
