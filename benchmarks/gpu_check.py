"""What benchmarks/gpu_check.sh runs on a GPU: ceilings, correctness, safety, speed. Stages end early when time runs out.

    python benchmarks/gpu_check.py --out FOLDER [--seconds 540]
    python benchmarks/gpu_check.py --dry-run        the cases themselves on the CPU; writes nothing
    python benchmarks/gpu_check.py --small | --tiny a few small shapes only: what the memory checker and the others run

Speeds are medians of CUDA-graph replays over weights rotated through more memory than the L2 cache, on the clocks as they are;
each comes with the bytes read and the fraction of the read ceiling measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_speed import BANK, BY_ROW, CUBLAS, EAGER, INT4, PEFT, SPEED_SHAPES, beside, capture, ceilings, speed_rows
from gpu_stages import Run, read, said, work_off
from torch import Tensor

from calora_ext import WeightFormat, ops
from calora_ext.formats.cuda_order import to_cuda_order
from calora_ext.linear import CompressedLinear
from calora_ext.tables import table

FORMATS = [WeightFormat("int4", 32), WeightFormat("int4", 128), WeightFormat("int4", -1), WeightFormat("int4", 64, symmetric=False),
           WeightFormat("int8"), WeightFormat("bf16"), WeightFormat("nf4", 64), WeightFormat("nf4", -1),
           *(WeightFormat(*values, pattern=pattern) for pattern in ("2:4", "unstructured") for values in (("int4", 32), ("int4", 128), ("nf4", 96), ("int8",), ("bf16",)))]  # fmt: skip
# Targets: at most so many us (in, out); or, over M and shapes, at least so many times as fast as a peer.
MICROSECONDS = {(8192, 8192): 12.5, (8192, 28672): 34.0}  # INT4, M = 1 and 8
SPEED_UPS = [
    ((1, 8), (8192, 8192), BANK, INT4, 1 / 1.10), ((1, 8), (8192, 8192), BANK, PEFT, 3.0), ((1, 8), (8192, 8192), BANK + EAGER, PEFT + EAGER, 3.5),
    ((64,), None, INT4, CUBLAS, 1.4), ((1, 8), None, "int4 g128 2:4", INT4, 1.22), ((1, 8), None, "int4 g128 unstructured", INT4, 1.15),
    ((1, 8), None, "bf16 unstructured", CUBLAS, 1.4), ((2048,), None, BANK, CUBLAS, 1 / 1.15), ((8,), None, BY_ROW, BANK, 1 / 1.25),
]  # fmt: skip
OF_ONE_ROW = 0.9  # at M = 16, of the speed-up of INT4 over CUBLAS at M = 1
ROWS = (1, 2, 3, 8, 9, 16, 17, 64, 65, 97, 128, 200)
SHAPES = ((64, 32), (300, 97), (1024, 512), (4096, 1000))  # (in, out)
RANKS = ((0, 0), (8, 8), (16, 0), (80, 16))  # (rank, identity_rank)
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-5}  # relative, Frobenius, of fused results
PREFILL_TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float32: 1e-5}  # torch's own products of rounded weights
CHECKER_SECONDS = 150  # for all of them
RESULTS = "gpu_check.json"
MODELS = ("models", "compiled", "training", "adapters of a model")  # stages of gpu_models.py


def sparse_mask(fmt: WeightFormat, out: int, in_: int, device: str = "cpu", seed: int = 0) -> Tensor | None:
    """Half of the weights (out, in_), at random, as the format's pattern allows; None for a dense format."""
    if not fmt.sparse:
        return None
    noise = torch.rand(out, -(-in_ // 4) * 4, generator=torch.Generator(device).manual_seed(seed), device=device)
    if fmt.pattern == "unstructured":
        return noise[:, :in_] < 0.5
    groups = noise.view(out, -1, 4)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.argsort(-1)[..., :2], True).view(out, -1)[:, :in_]


@functools.cache
def weight(fmt: WeightFormat, in_: int, out: int, device: str) -> tuple[list[Tensor], Tensor]:
    """(packed tensors of a layer in the order of the device, the dense weight they stand for)."""
    gen = torch.Generator().manual_seed(0)
    packed = fmt.pack(torch.randn(out, in_, generator=gen) / in_**0.5, sparse_mask(fmt, out, in_))
    dense = fmt.decode(packed, in_, out).to(device)
    on_gpu = torch.device(device).type == "cuda"
    return [to_cuda_order(n, t.to(device), fmt, in_, out, packed["packed"]) if on_gpu else t for n, t in packed.items()], dense


class Case:
    """One layer on a device: packed tensors in its order, x, bias and bank, and what float64 makes of them."""

    def __init__(self, fmt, m, in_, out, rank, identity_rank, dtype, device, seed=0, bank_dtype=None) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.fmt, self.in_, self.out, self.identity_rank = fmt, in_, out, identity_rank
        self.packed, self.dense = weight(fmt, in_, out, device)
        self.x = torch.randn(m, in_, generator=gen).to(device, dtype)
        self.bias = torch.randn(out, generator=gen).to(device, dtype)
        bank_dtype = bank_dtype or dtype
        self.down = (torch.randn(rank, in_, generator=gen) / in_**0.5).to(device, bank_dtype) if rank else None
        self.up = torch.randn(out, rank, generator=gen).to(device, bank_dtype) if rank else None

    def run(self, x: Tensor | None = None, up: Tensor | None = None) -> Tensor:
        return ops.linear(self.x if x is None else x, self.packed, self.fmt, self.in_, self.out, self.bias, self.down,
                          self.up if up is None else up, self.identity_rank, "exact")  # fmt: skip

    def wanted(self, x: Tensor | None = None) -> Tensor:
        x = (self.x if x is None else x).double()
        y = x @ self.dense.double().t() + self.bias.double()
        if self.down is None:
            return y
        return y + ops.gelu_rows(x @ self.down.double().t(), self.identity_rank) @ self.up.double().t()


def relative(y: Tensor, want: Tensor) -> float:
    return float((y.double() - want).norm() / want.norm())


def fused(fmt: WeightFormat, m: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether this GPU takes the fused kernels, or decodes the weight."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return dtype != torch.float32 and m <= ops.native.fused_rows(10 * major + minor, fmt.id)


# -- correctness -------------------------------------------------------------------------------------------------------------


def correctness(device: str, small: bool = False, formats: list[WeightFormat] = FORMATS) -> dict:
    """The grid against float64: worst error by dtype, and every case that misses its tolerance."""
    worst: dict[str, float] = {}
    failed: list[str] = []
    count = 0
    for fmt in formats:
        for in_, out in SHAPES[: 2 if small else None]:
            for i, m in enumerate(ROWS[::3] if small else ROWS):
                rank, identity_rank = RANKS[(i + in_ + out) % len(RANKS)]
                for dtype in (torch.bfloat16,) if small else (torch.bfloat16, torch.float16, torch.float32):
                    case = Case(fmt, m, in_, out, rank, identity_rank, dtype, device, seed=count, bank_dtype=(None, torch.float32)[count % 2])
                    tiled = ops.tile_up(case.up) if rank and count % 3 == 0 else None
                    error = relative(case.run(up=tiled), case.wanted())
                    kind = "fused" if fused(fmt, m, dtype) else "decoded"
                    key = f"{kind} {str(dtype).removeprefix('torch.')}"
                    worst[key] = max(worst.get(key, 0.0), error)
                    limit = (TOLERANCE if kind == "fused" else PREFILL_TOLERANCE)[dtype]
                    if not error <= limit:
                        failed.append(f"{fmt} m={m} {out}x{in_} rank={rank} {dtype}: {error:.2e} > {limit:.0e}")
                    count += 1
            dense = ops.decode(case.packed, fmt, in_, out)
            if not torch.equal(dense, case.dense):
                failed.append(f"{fmt} {out}x{in_}: decode differs")
    return {"cases": count, "worst": worst, "failed": failed}


def backward(device: str) -> dict:
    """Gradients of x, D, U and the bias against float64 autograd."""
    failed = []
    dense, two_four, bitmask = WeightFormat("int4", 128), WeightFormat("int4", 128, pattern="2:4"), WeightFormat("bf16", pattern="unstructured")
    for m, fmt in ((5, dense), (100, dense), (100, two_four), (100, bitmask), (100, WeightFormat("nf4", 64))):
        case = Case(fmt, m, 256, 160, 24, 8, torch.float32, device)
        leaves = [t.clone().requires_grad_() for t in (case.x, case.bias, case.down, case.up)]
        x, bias, down, up = leaves
        ops.linear(x, case.packed, case.fmt, 256, 160, bias, down, up, 8).square().sum().backward()
        twins = [t.detach().double().requires_grad_() for t in leaves]
        x, bias, down, up = twins
        y = x @ case.dense.double().t() + bias + ops.gelu_rows(x @ down.t(), 8) @ up.t()
        y.square().sum().backward()
        for name, got, want in zip(("x", "bias", "down", "up"), leaves, twins, strict=True):
            if not relative(got.grad, want.grad) < 1e-4:
                failed.append(f"{fmt}: gradient of {name}, m={m}: {relative(got.grad, want.grad):.2e}")
    return {"failed": failed}


def adapters_by_row(device: str, rows_of_x: tuple[int, ...] = (8, 40, 100)) -> dict:
    """Rows of x that take one of three banks each, or none: fused and decoded, against float64."""
    failed = []
    for m in rows_of_x:
        case = Case(WeightFormat("int4", 128), m, 1024, 512, 0, 0, torch.bfloat16, device, seed=m)
        down, up = torch.randn(3, 24, 1024, device=device) / 32, torch.randn(3, 512, 24, device=device)
        down, up = down.bfloat16(), up.bfloat16()
        rows = torch.randint(-1, 3, (m,), device=device)
        y = ops.linear(case.x, case.packed, case.fmt, 1024, 512, case.bias, down, torch.stack([ops.tile_up(u) for u in up]), 8, "exact", rows)
        want = case.wanted()
        for i, adapter in enumerate(rows.tolist()):
            if adapter >= 0:
                want[i] += ops.gelu_rows(case.x[i].double() @ down[adapter].double().t(), 8) @ up[adapter].double().t()
        limit = (TOLERANCE if fused(case.fmt, m) else PREFILL_TOLERANCE)[torch.bfloat16]
        if not relative(y, want) <= limit:
            failed.append(f"an adapter for each row, m={m}: {relative(y, want):.2e} > {limit:.0e}")
    return {"failed": failed}


def opcheck(device: str) -> dict:
    failed = []
    for fmt in (WeightFormat("int4", 64, symmetric=False), WeightFormat("nf4", 64), WeightFormat("int4", 128, pattern="unstructured")):
        case = Case(fmt, 3, 300, 97, 24, 8, torch.bfloat16, device)
        layer = (case.packed, fmt.id, 300, 97, fmt.group_size)
        calls = {"linear": (case.x, *layer, case.bias, case.down, case.up, 8, None, 0), "linear_dx": (case.x.new_ones(3, 97), *layer), "decode": (*layer, 10, 40)}
        for name, args in calls.items():
            try:
                torch.library.opcheck(getattr(torch.ops.calora, name).default, args)
            except Exception as error:
                failed.append(f"opcheck of {name}, {fmt}: {said(error)}")
    return {"failed": failed}


def adapter_switch(device: str) -> dict:
    """Another adapter of the same ranks: the same compiled function, on a GPU the same graph."""
    failed = []
    case, other = (Case(WeightFormat("int4", 128), 4, 1024, 512, 80, 16, torch.bfloat16, device, seed=seed) for seed in (1, 2))
    other.x, other.bias = case.x, case.bias
    compiled = torch.compile(lambda x, down, up: ops.linear(x, case.packed, case.fmt, 1024, 512, case.bias, down, up, 16, "exact"), backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for one in (case, other):
            if not torch.equal(compiled(case.x, one.down, one.up), one.run()):
                failed.append("a compiled call with another adapter gives another result")
    graph, y = capture(case.run, device)
    case.down.copy_(other.down), case.up.copy_(other.up)
    graph.replay()
    if not torch.equal(y, other.run()):
        failed.append("a graph does not follow an adapter that was copied in")
    return {"failed": failed}


def module_moves(device: str) -> dict:
    """.to(GPU) and back: canonical bytes in the state dict, the same decoded weight, close results."""
    failed = []
    for fmt in FORMATS:
        layer = CompressedLinear.from_linear(torch.nn.Linear(300, 97), fmt, mask=sparse_mask(fmt, 97, 300))
        layer.activations = "exact"
        before, dense, x = {n: t.clone() for n, t in layer.state_dict().items()}, layer.decode(), torch.randn(4, 300)
        y = layer(x)
        layer.to(device)
        if not all(torch.equal(t.cpu(), before[n]) for n, t in layer.state_dict().items()):
            failed.append(f"{fmt}: the state dict changed on the GPU")
        if not torch.equal(layer.decode().cpu(), dense) or relative(layer(x.to(device)).cpu(), y.double()) > 1e-5:
            failed.append(f"{fmt}: another result on the GPU")
        layer.to("cpu")
        if not all(torch.equal(t, before[n]) for n, t in layer.state_dict().items()):
            failed.append(f"{fmt}: not the same bytes after the way back")
    return {"failed": failed}


def graphs_and_streams(device: str, repeats: int = 1000) -> dict:
    """Capture and replay with changed inputs, a stream of one's own, and 1000 runs that must not differ in a bit."""

    def same(a: Tensor, b: Tensor) -> bool:  # where the weight is decoded it is torch's product, whose bits may depend on the stream
        return torch.equal(a, b) if fused(fmt, len(a)) else relative(a, b.double()) < PREFILL_TOLERANCE[torch.bfloat16]

    failed = []
    patterns = [WeightFormat("int4", 128, pattern=pattern) for pattern in ("dense", "2:4", "unstructured")]
    others = [WeightFormat("nf4", 64), WeightFormat("nf4", 64, pattern="unstructured"), WeightFormat("int8"), WeightFormat("bf16", pattern="2:4")]
    for m, fmt in (*((m, patterns[0]) for m in (1, 8, 40, 100)), (100, others[2]), *((8, fmt) for fmt in (*patterns[1:], *others))):
        case = Case(fmt, m, 1024, 512, 80, 16, torch.bfloat16, device)
        if not same(beside(case.run, device), case.run()):
            failed.append(f"{fmt} m={m}: another result on another stream")
        graph, y = capture(case.run, device)
        case.x.copy_(torch.randn(m, 1024))
        graph.replay()
        if not same(y, case.run()):
            failed.append(f"{fmt} m={m}: a replayed graph gives another result")
        # Two inputs in turn: a kernel that read t before it was there would find that of the other.
        inputs, wanted, different = [case.x.clone(), torch.randn_like(case.x)], [], torch.zeros((), device=device, dtype=torch.int64)
        for x in inputs:
            case.x.copy_(x)
            graph.replay()
            wanted.append(y.clone())
        for i in range(repeats):
            case.x.copy_(inputs[i % 2])
            graph.replay()
            different += (y != wanted[i % 2]).any()
        if int(different):
            failed.append(f"{fmt} m={m}: {int(different)} of {repeats} runs differ")
    return {"failed": failed}


def checkers(seconds: float) -> dict:
    """compute-sanitizer over the small cases; says so where the tool is missing or refuses the device. Every tensor is an allocation
    of its own there: inside the blocks of torch's allocator an access beyond a tensor would go unseen."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {"failed": [], "skipped": "compute-sanitizer was not found"}
    result: dict = {"failed": []}
    end = time.monotonic() + seconds
    for name, cases in {"memcheck": "--small", "racecheck": "--tiny", "synccheck": "--tiny"}.items():
        command = [tool, "--tool", name, "--error-exitcode", "99", sys.executable, __file__, cases]
        alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=alone, start_new_session=True) as run:
            try:
                output = run.communicate(timeout=max(end - time.monotonic(), 1))[0]
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)  # what it checks, too
                result[name] = "not finished in time"
                continue
        summary = " ".join(line for line in output.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line)[-200:]
        refused = "Device not supported" in output
        result[name] = "the tool refuses this device" if refused else f"exit {run.returncode}: {summary or output[-200:].strip()}"
        if run.returncode and not refused:
            result["failed"].append(f"{name}: {result[name]}")
    return result


def with_models(name: str, device: str) -> dict:
    """A stage of gpu_models.py. Imported here only: the checkers do without transformers, and where it is missing the rest goes on."""
    import gpu_models

    return gpu_models.STAGES[name](device)


# -- results -----------------------------------------------------------------------------------------------------------------


def goals(by: dict[tuple[int, int, int, str], float]) -> list[tuple[str, str, str, str, str, str]]:
    """What the targets ask for, of seconds by (in, out, m, what): layer, M, what, is, should be, MISS."""
    shapes = sorted({key[:2] for key in by})
    rows = []

    def add(shape: tuple[int, int], m: int, what: str, value: float, limit: float, good: bool) -> None:
        rows.append((f"{shape[1]} x {shape[0]}", str(m), what, f"{value:.2f}", f"{limit:.2f}", "" if good else "MISS"))

    for shape, limit in MICROSECONDS.items():
        for m in (1, 8):
            if seconds := by.get((*shape, m, INT4)):
                add(shape, m, f"{INT4}, us at most", seconds * 1e6, limit, seconds * 1e6 <= limit)
    for ms, only, what, peer, least in SPEED_UPS:
        for shape in [only] if only else shapes:
            for m in ms:
                mine, other = by.get((*shape, m, what)), by.get((*shape, m, peer))
                if mine and other:
                    add(shape, m, f"{what} / {peer}", other / mine, least, other / mine >= least)
    for shape in shapes:
        try:
            one, many = (by[*shape, m, CUBLAS] / by[*shape, m, INT4] for m in (1, 16))
        except KeyError:
            continue
        add(shape, 16, f"{INT4} / {CUBLAS}, of that at M = 1", many / one, OF_ONE_ROW, many / one >= OF_ONE_ROW)
    return rows


def summary(results: dict) -> str:
    """Every speed, then what was checked, and last the targets."""
    lines = [(name, f"{len(part['failed'])} FAILED: {part['failed'][0]}" if part["failed"] else part.get("skipped", "ok"))
             for name, part in results.items() if isinstance(part, dict) and "failed" in part]  # fmt: skip
    lines += [(name, what) for name, what in results.get("checkers", {}).items() if name not in ("failed", "skipped")]
    lines += [(name, f"{value:.3g}") for name, value in results.get("ceilings", {}).items() if isinstance(value, float)]
    text = table(("check", "result"), lines)
    rows = results.get("speed", [])
    by = {(r["in"], r["out"], r["m"], r["what"]): r["seconds"] for r in rows}
    speeds = []
    for row in rows:
        where = (row["in"], row["out"], row["m"])
        base = by.get((*where, CUBLAS))
        speeds.append((f"{row['out']} x {row['in']}", str(row["m"]), row["what"], f"{row['seconds'] * 1e6:.1f}",
                       f"{base / row['seconds']:.2f}" if base else "-", f"{row['of_read_ceiling']:.2f}"))  # fmt: skip
    if speeds:
        text = table(("layer", "M", "what", "us", "x cuBLAS bf16", "of read ceiling"), speeds) + "\n\n" + text
    if wanted := goals(by):
        text += "\n\n" + table(("layer", "M", "speed-up", "is", "should be", ""), wanted)
    return text


def try_speed() -> None:
    """Every call that would be timed, once, small, on the CPU."""
    ceilings(4096, 64, "cpu")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for m in (1, 8, 64):
            speed_rows(256, 64, m, [], float("nan"), "cpu")


def on_the_gpu(folder: Path, seconds: float) -> bool:
    """Every stage that is still to run. True if anything failed, now or earlier."""
    run = Run(folder / RESULTS, seconds)
    run.results |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "architectures": ops.native.cuda_architectures()}
    stages: dict[str, Callable[[], dict]] = {
        "ceilings": ceilings, "correctness": lambda: correctness("cuda"), "backward": lambda: backward("cuda"), "opcheck": lambda: opcheck("cuda"),
        "adapters by row": lambda: adapters_by_row("cuda"), "adapter switch": lambda: adapter_switch("cuda"),
        "modules": lambda: module_moves("cuda"), "graphs": lambda: graphs_and_streams("cuda"),
        **{name: lambda name=name: with_models(name, "cuda") for name in MODELS},
    }  # fmt: skip
    for name, stage in stages.items():
        run.stage(name, stage)
    ceiling = run.results["ceilings"].get("read_bytes_per_s", float("nan"))
    for m in (1, 8, 16, 64, 65, 129, 2048):  # what is fused and what decoded at 65 and at 129 tells whether csrc/cuda/thresholds.h is right
        for in_, out in SPEED_SHAPES:
            run.stage(f"speed of {out} x {in_}, m={m}", lambda in_=in_, out=out, m=m: speed_rows(in_, out, m, run.results["speed"], ceiling), least=20)
            torch.cuda.empty_cache()
        if m == 64:  # the rest is what can be left out
            run.stage("checkers", lambda: checkers(min(CHECKER_SECONDS, run.left() - 5)))
    return run.finish()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"folder for {RESULTS}")
    parser.add_argument("--seconds", type=float, default=540, help="when to stop starting new stages")
    parser.add_argument("--dry-run", action="store_true", help="the cases on the CPU; writes nothing")
    parser.add_argument("--small", action="store_true", help="a few small cases on the GPU, for the checkers")
    parser.add_argument("--tiny", action="store_true", help="fewer still, for those checkers that take their time")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # goes on with what the folder has, see gpu_stages.py
    options = parser.parse_args()
    if options.dry_run:
        print("Dry run: no GPU is used, nothing is measured, no result is written. The cases run on the CPU kernels.")
        parts = {"correctness": correctness("cpu", small=True), "backward": backward("cpu"), "opcheck": opcheck("cpu"),
                 "adapter switch": adapter_switch("cpu"), "modules": module_moves("cpu"), "graphs": graphs_and_streams("cpu", 4),
                 **{name: with_models(name, "cpu") for name in MODELS}}  # fmt: skip
        try_speed()
        print(summary(parts))
        return any(part["failed"] for part in parts.values())
    if not torch.cuda.is_available():
        parser.error("no GPU that torch can use was found; --dry-run runs what needs none")
    if options.tiny:
        few = [WeightFormat("int4", 128), WeightFormat("int4", 64, symmetric=False), *(WeightFormat("int4", 128, pattern=pattern) for pattern in ("2:4", "unstructured"))]
        return bool(correctness("cuda", small=True, formats=few)["failed"] + adapters_by_row("cuda", (8,))["failed"])
    if options.small:
        return bool(correctness("cuda", small=True)["failed"] + adapters_by_row("cuda", (8,))["failed"])
    if options.out is None:
        parser.error("name a folder for the results with --out")
    if options.worker:
        return on_the_gpu(options.out, options.seconds)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / RESULTS
    status = work_off([sys.executable, __file__, "--worker", "--out", str(options.out)], file, options.seconds)
    print(summary(read(file)))
    return status


if __name__ == "__main__":
    sys.exit(main())
