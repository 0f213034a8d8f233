"""Every line of the CUDA kernels, without a GPU: compiled for the CPU (``cuda_emulator.h``), against float64.

Proves layouts, fragments, rings, reductions, bounds and the epilogue; proves nothing about speed, caches or races.
"""

import json
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cuda_emulation
import pytest
import torch
from formats_table import pack

from calora_ext import WeightFormat, ops

pytestmark = pytest.mark.skipif(cuda_emulation.COMPILER is None, reason="no C++ compiler found")

FORMATS = [WeightFormat("int4", 32), WeightFormat("int4", 64), WeightFormat("int4", 96), WeightFormat("int4", 128), WeightFormat("int4", -1),
           WeightFormat("int4", 64, symmetric=False), WeightFormat("int8"), WeightFormat("bf16"),
           WeightFormat("int4", 32, pattern="2:4"), WeightFormat("int4", 64, pattern="2:4"), WeightFormat("int4", 96, pattern="2:4"), WeightFormat("int4", 128, pattern="2:4"),
           WeightFormat("int8", pattern="2:4"), WeightFormat("bf16", pattern="2:4"),
           WeightFormat("int4", 32, pattern="unstructured"), WeightFormat("int4", 96, pattern="unstructured"),
           WeightFormat("int4", 128, pattern="unstructured"), WeightFormat("int8", pattern="unstructured"),
           WeightFormat("bf16", pattern="unstructured"),
           WeightFormat("nf4", 64), WeightFormat("nf4", -1), WeightFormat("nf4", 64, pattern="2:4"), WeightFormat("nf4", 96, pattern="2:4"),
           WeightFormat("nf4", 96, pattern="unstructured")]  # fmt: skip
DTYPES = [torch.bfloat16, torch.float16]
BOOK_ROUNDING = {torch.bfloat16: 9.5e-4, torch.float16: 1e-4}  # of normal weights, relative
# (m, in, out, rank, identity_rank): every width of the mma, ragged rows and columns, warps without work, rings that go round
CASES = [(1, 64, 32, 0, 0), (3, 300, 70, 17, 8), (8, 2600, 33, 4, 4), (9, 130, 33, 5, 0), (17, 104, 64, 3, 1), (40, 257, 33, 9, 9),
         (64, 1056, 32, 8, 2), (70, 64, 40, 0, 0), (101, 64, 33, 3, 1)]  # fmt: skip
# What planted bugs are looked for in.
FORMATS_OF_BUGS = [WeightFormat("int4", 96), WeightFormat("int4", 128), WeightFormat("int4", 32, symmetric=False), WeightFormat("int8"), WeightFormat("bf16"),
                   WeightFormat("int4", 96, pattern="2:4"), WeightFormat("int4", 128, pattern="2:4"), WeightFormat("bf16", pattern="2:4"),
                   *(WeightFormat("nf4", 96, pattern=pattern) for pattern in ("dense", "2:4", "unstructured")),
                   *(WeightFormat(values, 96, pattern="unstructured") for values in ("int4", "int8", "bf16"))]  # fmt: skip
# Rows so long that every warp looks up where its chunks lie more than once.
LONG = {WeightFormat("bf16", pattern="unstructured"): ((1, 17000, 32, 0, 0),), WeightFormat("int4", pattern="unstructured"): ((1, 35000, 20, 0, 0),)}
# Planted bugs: file -> (code, what someone might write instead). Each must be noticed by failures() of the pattern that its name
# begins with, else of the dense one.
BUGS = {
    "zero point": {"values.cuh": ("? T::kBase + kInt4Zero : 0", "? T::kBase + kInt4Zero - 1 : 0")},
    "fragment rows": {"values.cuh": ("words[4 * s + 2 * rt + (i >> 1)], i & 1", "words[4 * s + 2 * rt + (i & 1)], i >> 1")},
    "k step": {"dense.cu": ("mma<T>(d[rt][n], fragment, x[n][2 * s], x[n][2 * s + 1])", "mma<T>(d[rt][n], fragment, x[n][2 * s + 1], x[n][2 * s])")},
    "ring: one copy too few awaited": {"linear.cuh": ("copy_wait<R::kStages - 2>", "copy_wait<R::kStages - 1>")},
    "ring: stage overwritten too early": {"linear.cuh": ("for (int i = 0; i < R::kStages - 2; ++i) fetch", "for (int i = 0; i < R::kStages - 1; ++i) fetch")},
    "scale of the wrong block": {"linear.cuh": ("from += ends ? odd_bytes : P::kUnitBytes;", "from += P::kUnitBytes;")},
    "scale rows": {"values.cuh": ("(i & 1 ? 16 : 0)", "(i & 1 ? 0 : 16)")},
    "unscaled rest": {"linear.cuh": ("(ends || left == 0)", "ends")},
    "missing barrier": {"linear.cuh": ("__syncthreads();\n    const int64_t out", "const int64_t out")},
    "no barrier between rows": {"linear.cuh": ("__syncthreads();\n#pragma unroll\n    for (int rt", "#pragma unroll\n    for (int rt")},
    "columns beyond the end": {"bank.cu": ("[i] : 0;", "[i] : 0x7fc0;")},
    "rows beyond the end": {"linear.cuh": ("m >= a.m || out >= a.w.out_features", "out >= a.w.out_features + 31")},
    "GELU on LoRA": {"bank.cu": ("r0 + r >= a.bank.identity_rank)", "r0 + r > a.bank.identity_rank)")},
    "half of the shuffle": {"bank.cu": ("int offset = 16;", "int offset = 8;")},
    "by row: the next row's adapter": {"bank.cuh": ("const int64_t adapter = bank.row_adapter[m], padded_m", "const int64_t adapter = bank.row_adapter[m ? m - 1 : 0], padded_m")},
    "by row: rows of U exchanged": {"bank.cuh": ("to[8 * c + q] = sum[0]", "to[8 * c + (q ^ 1)] = sum[0]")},
    "by row: not among the sums": {"linear.cuh": ("R::kWarps + (a.bank.row_adapter ? 1 : 0)", "R::kWarps")},
    "by row: the first adapter's U": {"bank.cuh": ("? adapter * bank.up_adapter : 0", "? 0 : 0")},
    "by row: the first adapter's D": {"bank.cu": ("there ? adapter * a.bank.rank : 0", "there ? 0 : 0")},
    "t read before the wait": {"linear.cuh": ("    wait_for_previous();  // for t\n    release_next();\n", "")},
    "released before the wait": {"bank.cu": ("  wait_for_previous();\n  release_next();", "  release_next();")},
    "bank rows": {"bank.cuh": ("row = 16 * rt + 8 * (i & 1) + g, r =", "row = 16 * rt + 8 * (i >> 1) + g, r =")},
    "bank: a half of t twice": {"bank.cuh": ("mma<Bf16>(y[rt][n], high, t0.low, t1.low)", "mma<Bf16>(y[rt][n], high, t0.high, t1.high)")},
    "bank: U in shared memory, rows of the other half": {"bank.cuh": ("32 * rt + lane / 8 % 2 * 16", "32 * rt + lane / 16 * 16")},
    "bank: U in shared memory read too early": {"linear.cuh": ("    if (up_shared) __syncthreads();\n", "")},
    "x of the unit before": {"linear.cuh": ("step(x_next, x_now)", "step(x_now, x_next)")},
    "x of another turn": {"linear.cuh": ("load_turn(t, t < turns ? t : turns - 1)", "load_turn(t, turns - 1)")},
    "decoded before the kernel in front has ended": {"decode.cuh": ("  wait_for_previous();\n", "")},
    "x copied before the kernel in front has ended": {"bank.cu": ("  wait_for_previous();\n  for (int64_t i = threadIdx.x", "  for (int64_t i = threadIdx.x")},
    "decoded columns": {"decode.cuh": ("i >> 2, i >> 1 & 1, i & 1", "i >> 2, i & 1, i >> 1 & 1")},
    "2:4: numbers taken for places": {"two_four.cu": ("= guide_of(t ? numbers.y : numbers.x)", "= t ? numbers.y : numbers.x")},
    "2:4: another function of the numbers": {"two_four.cu": ("& 0x66666666", "& 0x22222222")},
    "2:4: places of the other turn": {"two_four.cu": ("guide_of(t ? numbers.y : numbers.x)", "guide_of(t ? numbers.x : numbers.y)")},
    "2:4: places of the other half": {"two_four.cu": ("mma_sparse<T, 0>(d[0][n], low, x, guide);\n          mma_sparse<T, 1>", "mma_sparse<T, 1>(d[0][n], low, x, guide);\n          mma_sparse<T, 0>")},
    "2:4: rows of the other half": {"two_four.cu": ("Value::fragment(words, 0, t, low);\n        Value::fragment(words, 1, t, high)", "Value::fragment(words, 1, t, low);\n        Value::fragment(words, 0, t, high)")},
    "2:4: x of the first pair twice": {"two_four.cu": ("((2 * pair + t) * NB + n) * 512", "(t * NB + n) * 512")},
    "2:4: the second pair where the first begins": {"two_four.cu": ("stage + (pair * kPair + v * 512 + lane * 16)", "stage + (v * 512 + lane * 16)")},
    "2:4: a third of the unit not copied": {"two_four.cu": ("v < kUnitBytes / 512; ++v", "v < kUnitBytes / 512 - 1; ++v")},
    "2:4: a pair that is one turn copied whole": {"two_four.cu": ("turns == 2 * pair + 1, lane", "false, lane")},
    "2:4: x transposed": {"two_four.cu": ("x_slot(lane % 8, lane / 8)", "x_slot(lane / 4, lane % 4)")},
    "2:4: a turn alone taken for two": {"linear.cuh": ("    const int turns = ends ? odd_turns : P::kTurns;\n    if constexpr", "    const int turns = P::kTurns;\n    if constexpr")},
    "2:4: lanes do not wait for each other": {"linear.cuh": ("    __syncwarp();\n    fetch();", "    fetch();")},
    "unstructured: bits of the other chunk": {"bitmask.cu": ("mask = t ? both.y : both.x", "mask = t ? both.x : both.y")},
    "unstructured: own codes among those before": {"bitmask.cu": ("return sum - v", "return sum")},
    "unstructured: half of the scan": {"bitmask.cu": ("offset < 32; offset *= 2", "offset < 16; offset *= 2")},
    "unstructured: window moved by what might have been kept": {"bitmask.cu": ("window.drop(__popc(bits) * kBits, i)", "window.drop(32, i)")},
    "unstructured: second window where the first began": {"bitmask.cu": ("(quarter ? __popc(mask & earlier) : 0)", "0")},
    "unstructured: int8 that is not kept": {"bitmask.cu": ("0x80808080", "0x7f7f7f7f")},
    "unstructured: int4 that is not kept": {"bitmask.cu": ("0x8) + 0x88888888u", "0x8)")},
    "unstructured: bf16 behind another": {"bitmask.cu": ("0x2200 - 0x44", "0x1100 - 0x44")},
    "unstructured: start of the second chunk": {"bitmask.cu": ("t ? info >> 16 :", "t ? info >> 17 :")},
    "unstructured: start within a word": {"bitmask.cu": ("info >> 15 & 1,", "0,")},
    "unstructured: last word not copied": {"bitmask.cu": ("? end + 1 :", "? end - 1 :")},
    "unstructured: a round of units late": {"bitmask.cu": ("look_up(first + taken + 32 + lane)", "look_up(first + taken + lane)")},
    "unstructured: offset of int4 not taken off": {"bitmask.cu": ("kSums ? 16 + kInt4Zero : 0", "kSums ? 16 : 0")},
    "unstructured: decoded from the lane's first": {"bitmask.cu": ("before + __popc(mask & earlier)", "before")},
    "nf4: bytes of the lower half as they are": {"values.cuh": ("place < 8 && byte >= 128 ? 255 - byte : byte", "byte")},
    "nf4: upper half of the table": {"values.cuh": ("kNf4Bytes<T, 1, 12>, second", "kNf4Bytes<T, 1, 12>, first")},
    "nf4: places taken for codes": {"values.cuh": ("= kNf4[kNf4Code[place]];", "= kNf4[place];")},
    "nf4: values without their unit": {"values.cuh": ("static_cast<float>(1 / T::kBookUnit)", "1")},
    "nf4: scale of another row": {"values.cuh": ("(word.x >> (8 * i) & 255)", "(word.x >> (8 * (i ^ 1)) & 255)")},
    "nf4: scale of the next block": {"linear.cuh": ("if (V::kOuter) scales += kTileRows;", "if (V::kOuter) scales += kTileRows / 2;")},
    "nf4: outer scale of another tile": {"values.cuh": ("kTileRows)[tile] : 1.f", "kTileRows)[tile / 2 * 2] : 1.f")},
    "unstructured: nf4 elements in int4's order": {"bitmask.cu": ("return e + 2 * j + 4 * h", "return j + 2 * e + 4 * h")},
    "unstructured: nf4 bytes put together in int4's order": {"bitmask.cu": ("0x6420", "0x6240")},
    "2:4: decoded place": {"two_four.cu": ("second == place ? codes[1] : codes[0]", "second == place ? codes[0] : codes[1]")},
}  # fmt: skip


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> dict[str, Path]:
    """The compiled kernels of each pattern."""
    builds = {pattern: cuda_emulation.start(tmp_path_factory.mktemp("cuda"), pattern) for pattern in cuda_emulation.LAUNCHERS}
    return {pattern: cuda_emulation.finish(build) for pattern, build in builds.items()}


@pytest.fixture(scope="session")
def kernels(libraries):
    return cuda_emulation.Emulated(libraries)


def layer(fmt, m, in_, out, rank, dtype, seed=0, bank_dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    packed = pack(fmt, torch.randn(out, in_, generator=gen), density=0.7, seed=seed)
    x = torch.randn(m, in_, generator=gen).to(dtype)
    bias = torch.randn(out, generator=gen).to(dtype)
    down = (torch.randn(rank, in_, generator=gen) / in_**0.5).to(bank_dtype) if rank else None
    up = torch.randn(out, rank, generator=gen).to(bank_dtype) if rank else None
    return x, packed, bias, down, up


def in_float64(x, dense, bias, down, up, identity_rank):
    y = x.double() @ dense.double().t()
    if bias is not None:
        y = y + bias.double()
    return y if down is None else y + ops.gelu_rows(x.double() @ down.double().t(), identity_rank) @ up.double().t()


def wrong(kernels, fmt, case, dtype, seed=0, tiled=False, bank_dtype=torch.float32, bias=True) -> str:
    """What is wrong with the result of one case; "" if nothing is."""
    m, in_, out, rank, identity_rank = case
    x, packed, b, down, up = layer(fmt, m, in_, out, rank, dtype, seed, bank_dtype)
    dense = fmt.decode(packed, in_, out)
    want = in_float64(x, dense, b if bias else None, down, up, identity_rank)
    y = kernels.linear(x, packed, fmt, out, b if bias else None, down, ops.tile_up(up) if tiled and rank else up, identity_rank)
    error, rounding = (y.double() - want).norm(), (want.to(dtype).double() - want).norm()
    if fmt.values == "nf4":  # its book is rounded too, by less than the dtype rounds weights
        rounding = torch.hypot(rounding, BOOK_ROUNDING[dtype] * (x.double() @ dense.double().t()).norm())
    return "" if error <= 1.2 * rounding else f"error {error:.3g}, where rounding the output costs {rounding:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "f16"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_linear(kernels, fmt, case, dtype):
    kernels.options()
    assert not wrong(kernels, fmt, case, dtype)


@pytest.mark.parametrize("seed", range(16))
def test_random_shapes_with_late_copies_and_reversed_threads(kernels, seed):
    rng = random.Random(seed)
    kernels.options(late_copies=True, reverse=seed % 2 == 0)
    rank = rng.choice([0, 1, 16, 40])
    case = (rng.randint(1, 64), rng.randint(1, 1500), rng.randint(1, 100), rank, rng.randint(0, rank))
    assert not wrong(kernels, FORMATS[seed % len(FORMATS)], case, rng.choice(DTYPES), seed, tiled=rng.random() < 0.5,
                     bank_dtype=rng.choice([torch.float32, *DTYPES]), bias=rng.random() < 0.5)  # fmt: skip


@pytest.mark.parametrize(("fmt", "cases"), LONG.items(), ids=str)
def test_long_rows(kernels, fmt, cases):
    kernels.options(late_copies=True)
    assert not wrong(kernels, fmt, cases[0], torch.bfloat16)


def test_results_do_not_depend_on_the_order_of_threads(kernels):
    fmt = WeightFormat("int4", 64)
    x, packed, bias, down, up = layer(fmt, 9, 700, 64, 20, torch.bfloat16)
    results = []
    for late, reverse in ((False, False), (True, False), (False, True), (True, True)):
        kernels.options(late, reverse)
        results.append(kernels.linear(x, packed, fmt, 64, bias, down, up, 8))
    assert all(torch.equal(results[0], y) for y in results[1:])


def by_row(kernels, fmt, m, tiled=False, rank=24, identity_rank=8, dtype=torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """(what is wrong, the results): rows of x that take one of three banks each, or none, against the same rows with that bank alone."""
    in_, out, adapters = 300, 70, 3
    gen = torch.Generator().manual_seed(m)
    x, packed, bias, *_ = layer(fmt, m, in_, out, 0, dtype)
    bank_dtype = torch.bfloat16 if tiled else torch.float32
    down, up = (t.to(bank_dtype) for t in (torch.randn(adapters, rank, in_, generator=gen) / in_**0.5, torch.randn(adapters, out, rank, generator=gen)))
    rows = torch.randint(-1, adapters, (m,), generator=gen)
    stack = torch.stack([ops.tile_up(u) for u in up]) if tiled else up
    y = kernels.linear(x, packed, fmt, out, bias, down, stack, identity_rank, rows)
    want = torch.stack([in_float64(x[i], fmt.decode(packed, in_, out), bias, *((down[a], up[a]) if a >= 0 else (None, None)), identity_rank)
                        for i, a in enumerate(rows)])  # fmt: skip
    error, rounding = (y.double() - want).norm(), (want.to(dtype).double() - want).norm()
    return "" if error <= 1.2 * rounding else f"by row: error {error:.3g}, where rounding the output costs {rounding:.3g}", y


@pytest.mark.parametrize("tiled", [False, True], ids=["up", "tiled"])
@pytest.mark.parametrize("m", [1, 8, 13, 40])
@pytest.mark.parametrize("fmt", [WeightFormat("int4", 64), WeightFormat("int8", pattern="2:4"), WeightFormat("int4", 64, pattern="unstructured")], ids=str)
def test_an_adapter_for_each_row(kernels, fmt, m, tiled):
    kernels.options(late_copies=True, reverse=m % 2 == 0)
    assert not by_row(kernels, fmt, m, tiled)[0]


def test_a_number_that_is_no_adapter_makes_its_row_nan(kernels):
    kernels.options()
    fmt = WeightFormat("int4", 64)
    x, packed, bias, *_ = layer(fmt, 5, 300, 70, 0, torch.bfloat16)
    down, up = torch.randn(2, 8, 300), torch.randn(2, 70, 8)
    y = kernels.linear(x, packed, fmt, 70, bias, down, up, 8, torch.tensor([0, 2, -1, -2, 1 << 40]))
    assert torch.isnan(y).all(1).tolist() == [False, True, False, True, True] and torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_activation_stays_in_its_row(kernels, value):
    kernels.options()
    for fmt in FORMATS:
        x, packed, *_ = layer(fmt, 3, 200, 40, 0, torch.bfloat16)
        x[1, 150] = value
        y = kernels.linear(x, packed, fmt, 40)
        assert torch.isfinite(y[[0, 2]]).all()
        assert not torch.isfinite(y[1]).any() if not fmt.sparse else not torch.isfinite(y[1]).all()  # a weight that is not kept meets none


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_decode(kernels, fmt, dtype):
    kernels.options()
    for out, in_, begin, end in ((97, 130, 0, 97), (64, 256, 5, 40), (40, 33, 39, 40)):
        packed = pack(fmt, torch.randn(out, in_), density=0.7)
        decoded = kernels.decode(packed, fmt, in_, out, begin, end, dtype)
        assert torch.equal(decoded, fmt.decode(packed, in_, out)[begin:end].to(dtype))


def test_nothing_is_read_or_written_beyond_the_tensors(libraries):
    """Every buffer ends where an unmapped page begins; in a process of its own, which a stray access would kill."""
    code = """
        import ctypes, mmap, sys, torch
        import cuda_emulation as ce
        from test_cuda_emulated import FORMATS, layer, pack
        libc = ctypes.CDLL(None)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        maps = []
        def guarded(t, align=16):
            size = t.numel() * t.element_size()
            pages = -(-size // mmap.PAGESIZE) + 1
            area = mmap.mmap(-1, pages * mmap.PAGESIZE)
            maps.append(area)
            base = ctypes.addressof(ctypes.c_char.from_buffer(area))
            assert libc.mprotect(base + (pages - 1) * mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0
            start = (pages - 1) * mmap.PAGESIZE - size
            start -= start % align
            return torch.frombuffer(area, dtype=torch.uint8, count=size, offset=start).view(t.dtype).view(t.shape).copy_(t)
        ce.aligned = guarded
        kernels = ce.Emulated(dict(zip(ce.LAUNCHERS, sys.argv[1:])))
        for fmt in FORMATS:
            for m, in_, out, rank in ((1, 64, 32, 0), (5, 136, 40, 8), (20, 104, 64, 3), (64, 96, 33, 5)):
                x, packed, bias, down, up = layer(fmt, m, in_, out, rank, torch.bfloat16)
                kernels.linear(x, packed, fmt, out, guarded(bias, 2), None if down is None else guarded(down), None if up is None else guarded(up, 4), rank // 2)
                kernels.decode(packed, fmt, in_, out, 3, out, torch.bfloat16)
        # Bits, offsets and codes that have nothing to do with each other, as in a damaged file.
        for fmt in FORMATS:
            if fmt.pattern != "unstructured":
                continue
            for seed, (m, in_, out) in enumerate(((1, 64, 32), (5, 1000, 40), (20, 200, 64))):
                gen = torch.Generator().manual_seed(seed)
                packed = {n: torch.randint(0, 256, t.shape, dtype=torch.uint8, generator=gen) for n, t in pack(fmt, torch.randn(out, in_), 0.3).items()}
                packed["packed"], packed["kept"] = packed["packed"].view(-(-out // 32), -1, 16), packed["kept"].view(-1, 16)
                if seed == 1:
                    packed["offsets"].view(torch.int32).random_(0, packed["kept"].numel() // 8, generator=gen)
                kernels.linear(torch.randn(m, in_, generator=gen).bfloat16(), packed, fmt, out)
                kernels.decode(packed, fmt, in_, out, 0, out, torch.float32)
        print("done")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), *(str(libraries[pattern]) for pattern in cuda_emulation.LAUNCHERS)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cuda_emulation.ROOT / "python_tests")
    assert result.stdout.strip() == "done", (result.returncode, result.stderr[-2000:])


def failures(kernels: cuda_emulation.Emulated, pattern: str) -> Iterator[str]:
    """A few cases that between them use every path of a pattern; what is wrong with them."""
    gen = torch.Generator().manual_seed(0)
    for late, reverse in ((False, False), (True, True)):
        kernels.options(late, reverse)
        for fmt in (fmt for fmt in FORMATS_OF_BUGS if fmt.pattern == pattern):
            cases = ((3, 300, 70, 17, 8), (24, 3000, 33, 2, 1), *LONG.get(fmt, ()))
            banks = [{}, {"tiled": True, "bank_dtype": torch.bfloat16}]
            for check in (*(partial(wrong, kernels, fmt, case, torch.bfloat16, **bank) for case in cases for bank in banks[: 1 + (case[3] > 0)]),
                          *(lambda fmt=fmt, tiled=tiled: by_row(kernels, fmt, 13, tiled)[0] for tiled in (False, True))):  # fmt: skip
                try:
                    found = check()
                except RuntimeError as error:  # the emulator's own complaint
                    found = str(error)
                if found:
                    yield found
            packed = pack(fmt, torch.randn(33, 130, generator=gen))
            if not torch.equal(kernels.decode(packed, fmt, 130, 33, 0, 33, torch.float32), fmt.decode(packed, 130, 33)):
                yield "decode differs"


@pytest.mark.parametrize("pattern", cuda_emulation.LAUNCHERS)
def test_the_kernels_pass_what_planted_bugs_must_fail(kernels, pattern):
    assert list(failures(kernels, pattern)) == []


def hunt(bugs: list[str], folder: Path) -> dict[str, bool]:
    """Which bugs were noticed. Each runs in a child of its own, which a kernel that writes where it must not may end, while the
    next ones are compiled."""
    pattern = {bug: next((p for p in cuda_emulation.LAUNCHERS if bug.startswith(p)), "dense") for bug in bugs}
    left, builds, noticed = list(bugs), {}, {}
    for bug in bugs:
        while left and len(builds) < 3:
            name = left.pop(0)
            builds[name] = cuda_emulation.start(folder / str(len(bugs) - len(left)), pattern[name], BUGS[name])
        kernels = cuda_emulation.Emulated({pattern[bug]: cuda_emulation.finish(builds.pop(bug))})
        child = os.fork()
        if child == 0:
            os._exit(next(failures(kernels, pattern[bug]), None) is not None)
        noticed[bug] = os.waitpid(child, 0)[1] != 0
    return noticed


@pytest.fixture(scope="session")
def noticed(request, tmp_path_factory) -> dict[str, bool]:
    """:func:`hunt` after all bugs that this session asks for, in a process that may fork: one whose torch has no threads yet."""
    bugs = [item.callspec.params["bug"] for item in request.session.items if item.name.startswith("test_a_planted_bug_is_noticed")]
    code = """
        import json, sys
        from pathlib import Path
        from test_cuda_emulated import hunt
        print(json.dumps(hunt(json.loads(sys.argv[1]), Path(sys.argv[2]))))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), json.dumps(bugs), str(tmp_path_factory.mktemp("bugs"))]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cuda_emulation.ROOT / "python_tests", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.timeout(1800)  # the first one waits for all of them
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug, noticed):
    assert noticed[bug]
