"""The CUDA kernels of ``csrc/cuda`` compiled by the C++ compiler against ``cuda_emulator.h`` and called through ctypes."""

from __future__ import annotations

import ctypes as c
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from calora_ext.formats import WeightFormat
from calora_ext.formats.bitmask import tail_bytes
from calora_ext.formats.cuda_order import to_cuda_order
from calora_ext.formats.layout import PATTERN_IDS, VALUE_IDS

ROOT = Path(__file__).parent.parent
LAUNCHERS = {"dense": "dense", "2:4": "two_four", "unstructured": "bitmask"}  # pattern: its file, and how its launchers' names end
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


class PackedWeight(c.Structure):
    _fields_ = [*((n, c.c_void_p) for n in ("packed", "zeros", "scales", "offsets", "kept")), *((n, c.c_int64) for n in ("kept_limit", "pattern", "values", "in_features", "out_features", "group_size"))]


class LowRank(c.Structure):
    _fields_ = [*((n, c.c_void_p) for n in ("down", "up", "row_adapter")), *((n, c.c_int64) for n in ("adapters", "up_adapter")), ("t", c.c_void_p),
                *((n, c.c_int64) for n in ("dtype", "rank", "identity_rank", "up_tile", "up_row", "up_rank"))]  # fmt: skip


class LinearArgs(c.Structure):
    _fields_ = [*((n, c.c_void_p) for n in ("x", "y", "bias")), *((n, c.c_int64) for n in ("x_dtype", "bias_dtype", "m", "x_stride")),
                ("w", PackedWeight), ("bank", LowRank)]  # fmt: skip


def start(folder: Path, pattern: str, mutations: dict[str, tuple[str, str]] | None = None) -> subprocess.Popen:
    """Start compiling the kernels of one pattern into folder/emulated.so. mutations: file name -> (text, replacement): planted
    bugs; such a build has no fp16, which halves the time it takes."""
    shutil.copytree(ROOT / "csrc" / "cuda", folder / "csrc" / "cuda")
    shutil.copy(ROOT / "csrc" / "layouts.h", folder / "csrc")
    without_f16 = ("linear.cuh", ("case Dtype::f16: return by_values<P, F16>(a, stream);", ""))
    for name, (text, replacement) in (*mutations.items(), without_f16) if mutations else ():
        path = folder / "csrc" / "cuda" / name
        code = path.read_text()
        assert code.count(text) == 1, f"{name} has {code.count(text)} times: {text}"
        path.write_text(code.replace(text, replacement))
    flags = ["-std=c++17", "-O2" if mutations is None else "-O1", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-DCALORA_EMULATE", "-Wno-unknown-pragmas", "-I", str(Path(__file__).parent)]
    files = [str(folder / "csrc" / "cuda" / f"{name}.cu") for name in (LAUNCHERS[pattern], "bank")]
    return subprocess.Popen([COMPILER, *flags, "-x", "c++", *files, "-o", str(folder / "emulated.so")], stderr=subprocess.PIPE, text=True)


def finish(build: subprocess.Popen) -> Path:
    """The library that :func:`start` began to compile."""
    errors = build.communicate()[1]
    assert build.returncode == 0, errors
    return Path(build.args[-1])


class Emulated:
    """The launchers, on CPU tensors. Packed tensors are given in the canonical order and converted here. libraries: by pattern."""

    def __init__(self, libraries: dict[str, Path]) -> None:
        self.libraries = {pattern: c.CDLL(str(path)) for pattern, path in libraries.items()}

    def options(self, late_copies: bool = False, reverse: bool = False) -> None:
        for library in self.libraries.values():
            library.emulate_options(late_copies + 2 * reverse)

    def weight(self, packed: dict[str, Tensor], fmt: WeightFormat, in_features: int, out_features: int) -> PackedWeight:
        ordered = {name: aligned(to_cuda_order(name, t, fmt, in_features, out_features, packed["packed"])) for name, t in packed.items()}
        pointers = [ordered[name].data_ptr() if name in ordered else None for name in ("packed", "zeros", "scales", "offsets", "kept")]
        limit = packed["kept"].numel() - tail_bytes(fmt.values) if "kept" in packed else 0
        weight = PackedWeight(*pointers, limit, PATTERN_IDS[fmt.pattern], VALUE_IDS[fmt.values], in_features, out_features, fmt.group_size)
        weight.keep = ordered  # args hold bare pointers
        return weight

    def linear(self, x: Tensor, packed, fmt: WeightFormat, out_features: int, bias=None, down=None, up=None, identity_rank=0, row_adapter=None) -> Tensor:
        """y, as the operator computes it: x padded where its rows are not 16-byte aligned, then bank_down, then the pattern's kernel."""
        m, in_features = x.shape
        library = self.libraries[fmt.pattern]
        stride = fmt.geometry(in_features, out_features).columns
        if stride != in_features:
            padded = aligned(torch.full((m, stride), float("nan"), dtype=x.dtype))
            self.check(library.calora_cuda_copy_rows(c.c_void_p(padded.data_ptr()), c.c_int64(2 * stride), c.c_void_p(x.data_ptr()),
                                                          c.c_int64(2 * in_features), c.c_int64(m), None))  # fmt: skip
        else:
            padded = aligned(x)
        y = torch.full((m, out_features), float("nan"), dtype=x.dtype)
        weight = self.weight(packed, fmt, in_features, out_features)
        args = LinearArgs(padded.data_ptr(), y.data_ptr(), None, DTYPES[x.dtype], 0, m, stride, weight)
        if bias is not None:
            args.bias, args.bias_dtype = bias.data_ptr(), DTYPES[bias.dtype]
        if down is not None:
            adapters = 1 if row_adapter is None else len(down)
            rank, tiled = down.shape[-2], up.dim() == (3 if row_adapter is None else 4)
            t = torch.full((rank, -(-m // 8) * 8), float("nan"))
            args.bank = LowRank(down.data_ptr(), up.data_ptr(), None if row_adapter is None else row_adapter.data_ptr(), adapters,
                                up.numel() // adapters, t.data_ptr(), DTYPES[down.dtype], rank, identity_rank,
                                32 * rank, *((1, 32) if tiled else (rank, 1)))  # fmt: skip
            self.check(library.calora_cuda_bank_down(c.byref(args), None))
            library.emulate_pending(c.c_void_p(t.data_ptr()), c.c_int64(t.numel() * t.element_size()))
        self.check(getattr(library, f"calora_cuda_linear_{LAUNCHERS[fmt.pattern]}")(c.byref(args), None))
        return y

    def decode(self, packed, fmt: WeightFormat, in_features: int, out_features: int, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        out = aligned(torch.full((end - begin, in_features), float("nan"), dtype=dtype))
        weight = self.weight(packed, fmt, in_features, out_features)
        launch = getattr(self.libraries[fmt.pattern], f"calora_cuda_decode_{LAUNCHERS[fmt.pattern]}")
        self.check(launch(c.byref(weight), c.c_int64(begin), c.c_int64(end), c.c_void_p(out.data_ptr()), c.c_int64(DTYPES[dtype]), None))
        return out

    @staticmethod
    def check(code: int) -> None:
        if code:
            raise RuntimeError(f"the kernel failed with {code}")


def aligned(t: Tensor) -> Tensor:
    """A copy that starts at a multiple of 64 bytes, as torch's CUDA allocations do."""
    buffer = torch.empty(t.numel() * t.element_size() + 64, dtype=torch.uint8)
    view = buffer[-buffer.data_ptr() % 64 :][: t.numel() * t.element_size()].view(t.dtype).view(t.shape)
    return view.copy_(t)
