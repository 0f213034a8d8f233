"""Every rung of the fused op against float64: ragged shapes, M from 1 to hundreds, ranks 0 to 64, both activation modes."""

import copy
import math
import pickle
import random
import weakref

import pytest
import torch
from formats_table import FORMATS, PAIRED, SPARSE, mask_for, pack

from calora_ext import CompressedLinear, WeightFormat, ops
from calora_ext.formats import extent_of, nf4

# (m, in, out, rank, identity_rank)
CASES = [(1, 64, 32, 0, 0), (1, 300, 97, 17, 8), (2, 65, 31, 1, 1), (3, 128, 64, 16, 16), (7, 33, 130, 32, 16),
         (8, 257, 65, 64, 0), (9, 96, 40, 8, 4), (12, 40, 33, 33, 7), (13, 321, 64, 0, 0), (33, 130, 70, 24, 16),
         (130, 100, 64, 5, 5), (300, 70, 35, 3, 1)]  # fmt: skip


@pytest.fixture(params=ops.native.available())
def rung(request):
    before = ops.native.isa()
    ops.native.set_isa(request.param)
    yield request.param
    ops.native.set_isa(before)


def quantised_activations(x, fmt, in_features):
    """x after the int8 rounding that the op documents: per row and block, amax / 127, half to even. float64."""
    g = fmt.geometry(in_features, 1)
    blocks = torch.nn.functional.pad(x.float(), (0, g.columns - in_features)).view(x.shape[0], g.blocks, g.block_columns)
    amax = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(amax < 1e-30, torch.zeros_like(amax), 127 / amax)
    return ((blocks * inverse).round().double() * (amax / 127).double()).view(x.shape[0], -1)[:, :in_features]


def met_by_int8(fmt, packed, out, in_):
    """The weight that int8 activations are multiplied with: nf4's book in 124ths. float64."""
    dense = fmt.decode(packed, in_, out).double()
    if fmt.values != "nf4":
        return dense
    q = fmt.unpack(packed, in_, out)
    book = (124 * torch.tensor(nf4.BOOK, dtype=torch.float64)).round() / 124
    return book[q.codes.int()] * q.scales().double().repeat_interleave(fmt.geometry(in_, out).block_columns, 1)[:, :in_]


def layer(fmt, out, in_, rank, dtype, seed=0, density=0.5):
    gen = torch.Generator().manual_seed(seed)
    packed = pack(fmt, torch.randn(out, in_, generator=gen), density, seed)
    bias = torch.randn(out, generator=gen).to(dtype)
    down = (torch.randn(rank, in_, generator=gen) / in_**0.5).to(dtype) if rank else None
    up = torch.randn(out, rank, generator=gen).to(dtype) if rank else None
    return packed, bias, down, up


def in_float64(x, dense, bias, down, up, identity_rank, x_base=None):
    y = (x if x_base is None else x_base).double() @ dense.double().t() + bias.double()
    if down is not None:
        y = y + ops.gelu_rows(x.double() @ down.double().t(), identity_rank) @ up.double().t()
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_exact_is_within_twice_torch_own_error(rung, fmt, case, dtype):
    m, in_, out, rank, identity_rank = case
    packed, bias, down, up = layer(fmt, out, in_, rank, dtype)
    dense = fmt.decode(packed, in_, out)
    x = torch.randn(m, in_, generator=torch.Generator().manual_seed(9)).to(dtype)
    y = ops.linear(x, list(packed.values()), fmt, in_, out, bias, down, up, identity_rank, "exact")
    want = in_float64(x, dense, bias, down, up, identity_rank)
    torch_error = (in_float64(x, dense, bias, down, up, identity_rank).to(dtype).double() - want).norm()  # rounding of the output
    same_dtype = torch.nn.functional.linear(x, dense.to(dtype), bias)
    if down is not None:
        same_dtype = same_dtype + ops.gelu_rows(x @ down.t(), identity_rank) @ up.t()
    torch_error = max(torch_error, (same_dtype.double() - want).norm())
    assert y.dtype == dtype and y.shape == (m, out)
    assert (y.double() - want).norm() <= 2 * torch_error + 1e-7 * want.norm()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.values != "bf16"], ids=str)
def test_int8_activations_follow_the_formula(rung, fmt, case):
    m, in_, out, rank, identity_rank = case
    packed, bias, down, up = layer(fmt, out, in_, rank, torch.float32)
    dense = met_by_int8(fmt, packed, out, in_)
    x = torch.randn(m, in_, generator=torch.Generator().manual_seed(9))
    y = ops.linear(x, list(packed.values()), fmt, in_, out, bias, down, up, identity_rank, "int8")
    want = in_float64(x, dense, bias, down, up, identity_rank, quantised_activations(x, fmt, in_))
    assert (y.double() - want).norm() <= 3e-6 * want.norm()  # the integer sums are equal; fp32 adds them up


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.values != "bf16"], ids=str)
def test_int8_activations_cost_what_their_step_costs(rung, fmt):
    packed, *_ = layer(fmt, 64, 512, 0, torch.float32)
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(9))
    y = ops.linear(x, list(packed.values()), fmt, 512, 64, activations="int8").double()
    want = x.double() @ fmt.decode(packed, 512, 64).double().t()
    # A step of amax / 127 rounds with a standard deviation of step / sqrt(12): 5.7e-3 of a normal input's where 64 values
    # share a scale, 6.3e-3 where 128 do, 8.0e-3 for 1024.
    allowed = {32: 6e-3, 64: 6e-3, 128: 7e-3, -1: 9e-3}[fmt.group_size]
    if fmt.values == "nf4":  # its book in 124ths is another 4.8e-3 of a normal weight, where 64 share a scale
        allowed = math.hypot(allowed, {64: 5.5e-3}.get(fmt.group_size, 7e-3))
    assert (y - want).norm() <= allowed * want.norm()


@pytest.mark.parametrize("density", [0.0, 0.3, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("fmt", SPARSE + PAIRED, ids=str)
def test_sparse_weights_of_any_density(rung, fmt, density):
    """Every kind of kernel (decode of 1 and of 5 rows, prefill, backward) with a bank."""
    in_, out, rank = 229, 75, 9
    packed, bias, down, up = layer(fmt, out, in_, rank, torch.float32, density=density)
    dense, tensors = fmt.decode(packed, in_, out), list(packed.values())
    for m in (1, 5, 20):
        x = torch.randn(m, in_, generator=torch.Generator().manual_seed(m))
        for activations in ("exact",) if fmt.values == "bf16" else ("exact", "int8"):
            base = quantised_activations(x, fmt, in_) if activations == "int8" else None
            weight = met_by_int8(fmt, packed, out, in_) if activations == "int8" else dense
            want = in_float64(x, weight, bias, down, up, 4, base)
            y = ops.linear(x, tensors, fmt, in_, out, bias, down, up, 4, activations)
            assert (y.double() - want).norm() <= 3e-6 * want.norm(), (m, activations)
        grad = torch.randn(m, out, generator=torch.Generator().manual_seed(m))
        want = grad.double() @ dense.double()
        dx = torch.ops.calora.linear_dx(grad, tensors, fmt.id, in_, out, fmt.group_size)
        assert (dx.double() - want).norm() <= 3e-6 * want.norm(), m


@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("fmt", SPARSE + PAIRED, ids=str)
def test_sparse_decode_of_every_m(rung, fmt, density):
    """M from 1 to 8 on shapes that give several tiles to every stream, or fewer than there are streams; fp32 and bf16 x."""
    sparse_rows_against_float64(rung, fmt, density, range(1, 9))


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("fmt", SPARSE + PAIRED, ids=str)
def test_sparse_weights_by_more_rows_than_eight(rung, fmt, density):
    """Where some rungs go on decoding, eight rows after the other, and a little beyond."""
    sparse_rows_against_float64(rung, fmt, density, (9, 12, 16, 17, 31, 48, 49, 64, 65))


@pytest.mark.parametrize("fmt", [f for f in SPARSE + PAIRED if f.group_size in (-1, 128)], ids=str)
def test_sparse_rows_longer_than_a_piece(rung, fmt):
    """Rows of several pieces, in which a block is expanded or taken apart for prefill; the last one is short."""
    in_, out = 1060, 40
    packed, bias, *_ = layer(fmt, out, in_, 0, torch.float32, density=0.6)
    dense, tensors = fmt.decode(packed, in_, out), list(packed.values())
    for m in (1, 9, 30, 70):
        x = torch.randn(m, in_, generator=torch.Generator().manual_seed(m))
        want = in_float64(x, dense, bias, None, None, 0)
        y = ops.linear(x, tensors, fmt, in_, out, bias, activations="exact")
        assert (y.double() - want).norm() <= 3e-6 * want.norm(), m
        if fmt.values != "bf16":
            want = in_float64(x, met_by_int8(fmt, packed, out, in_), bias, None, None, 0, quantised_activations(x, fmt, in_))
            y = ops.linear(x, tensors, fmt, in_, out, bias, activations="int8")
            assert (y.double() - want).norm() <= 3e-6 * want.norm(), m


@pytest.mark.parametrize("fmt", [WeightFormat("int4", 96, pattern="2:4"), WeightFormat("int4", -1, pattern="2:4"), WeightFormat("int8", pattern="2:4")], ids=str)
def test_sums_hold_the_largest_weights_and_activations(rung, fmt):
    """Every kept code the most negative one, every activation the largest: no sum of 16 bits overflows, no product saturates."""
    in_, out = 1056, 40
    q = fmt.unpack(pack(fmt, torch.randn(out, in_, generator=torch.Generator().manual_seed(1))), in_, out)
    q.codes[q.mask] = {"int4": 0, "int8": 1}[fmt.values]
    packed = fmt.pack_quantized(q)
    for m in (1, 2, 4, 7, 12, 70):
        for value in (1.0, -1.0):
            x = torch.full((m, in_), value)
            want = in_float64(x, fmt.decode(packed, in_, out), torch.zeros(out), None, None, 0)
            y = ops.linear(x, list(packed.values()), fmt, in_, out, activations="int8")
            assert (y.double() - want).norm() <= 3e-6 * want.norm(), (m, value)


@pytest.mark.parametrize("group", [32, 128, -1])
def test_exact_activations_far_from_zero(rung, group):
    """Sums of x times code - zero stay small where those of x times the code do not: what leaves a sum late is rounded like all of it."""
    fmt = WeightFormat("int4", group)
    packed, bias, *_ = layer(fmt, 64, 1024, 0, torch.float32)
    dense = fmt.decode(packed, 1024, 64)
    for m in (1, 2, 5):
        x = 10 + torch.randn(m, 1024, generator=torch.Generator().manual_seed(m))
        want = in_float64(x, dense, bias, None, None, 0)
        torch_error = (torch.nn.functional.linear(x, dense, bias).double() - want).norm()
        y = ops.linear(x, list(packed.values()), fmt, 1024, 64, bias, activations="exact")
        assert (y.double() - want).norm() <= 2 * torch_error + 1e-7 * want.norm(), m


def sparse_rows_against_float64(rung, fmt, density, rows):
    rng = random.Random(f"{fmt} {density}")
    for m in rows:
        in_, out, rank = rng.randint(1, 300), rng.randint(1, 400 if rung != "reference" else 70), rng.choice([0, 1, 16, 64])
        packed, bias, down, up = layer(fmt, out, in_, rank, torch.float32, m, density)
        dense, tensors = fmt.decode(packed, in_, out), list(packed.values())
        x = torch.randn(m, in_, generator=torch.Generator().manual_seed(m))
        if fmt.values != "bf16":
            want = in_float64(x, met_by_int8(fmt, packed, out, in_), bias, down, up, rank // 2, quantised_activations(x, fmt, in_))
            y = ops.linear(x, tensors, fmt, in_, out, bias, down, up, rank // 2, "int8")
            assert (y.double() - want).norm() <= 3e-6 * want.norm(), (m, in_, out, rank)
        for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 3e-3)):  # of bf16 the result is rounded
            given = [None if v is None else v.to(dtype) for v in (x, bias, down, up)]
            want = in_float64(given[0], dense, *given[1:], rank // 2)
            y = ops.linear(given[0], tensors, fmt, in_, out, *given[1:], rank // 2, "exact")
            assert (y.double() - want).norm() <= tolerance * want.norm(), (m, in_, out, rank, dtype)


@pytest.mark.parametrize("fmt", SPARSE + PAIRED, ids=str)
def test_expanding_gives_the_same_weights_densely(rung, fmt):
    if rung == "reference":
        pytest.skip("it expands nothing")
    in_, out = 229, 75
    dense_fmt = WeightFormat(fmt.values, fmt.group_size)
    for density in (0.0, 0.4, 1.0):
        packed = pack(fmt, torch.randn(out, in_, generator=torch.Generator().manual_seed(1)), density)
        expanded = {"packed": ops.expand(list(packed.values()), fmt, in_, out)} | {name: t for name, t in packed.items() if name == "scales"}
        dense_fmt.check(expanded, in_, out)
        decoded = ops.decode(list(expanded.values()), dense_fmt, in_, out)
        assert torch.equal(dense_fmt.decode(expanded, in_, out), fmt.decode(packed, in_, out))
        assert torch.equal(decoded, ops.decode(list(packed.values()), fmt, in_, out))
        assert not decoded[~mask_for(fmt, (out, in_), density)].any()


@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 1.0])
def test_pairs_of_rows_are_the_same_weights(rung, density):
    if rung == "reference":
        pytest.skip("it pairs nothing")
    for group, in_, out in ((32, 229, 75), (128, 300, 31), (-1, 65, 130)):
        fmt, paired = WeightFormat("int4", group, pattern="unstructured"), WeightFormat("int4", group, pattern="paired")
        packed = pack(fmt, torch.randn(out, in_, generator=torch.Generator().manual_seed(3)), density)
        tensors = torch.ops.calora.pair(list(packed.values()), fmt.id, in_, out, group)
        slowly = paired.pack_quantized(fmt.unpack(packed, in_, out))
        assert all(torch.equal(a, b) for a, b in zip(tensors, slowly.values(), strict=True))
        assert torch.equal(paired.decode(slowly, in_, out), fmt.decode(packed, in_, out))


def test_what_an_unstructured_int4_weight_runs_as_depends_on_its_density():
    fmt, before = WeightFormat("int4", 64, pattern="unstructured"), ops.native.isa()
    for rung in ops.native.available():
        ops.native.set_isa(rung)
        for density, fewest in ((0.3, "paired"), (0.55, "paired"), (0.7, "dense"), (1.0, "dense")):
            packed = pack(fmt, torch.randn(256, 512, generator=torch.Generator().manual_seed(3)), density)
            runs = ops.as_it_runs(list(packed.values()), fmt, 512, 256)[1]
            assert runs.pattern == {"reference": "unstructured", "avx512-vnni": fewest}.get(rung, "dense"), (rung, density)
    ops.native.set_isa(before)


@pytest.mark.parametrize("fmt", [f for f in SPARSE if f.pattern == "unstructured" or f.values == "nf4"], ids=str)
def test_a_layer_runs_in_the_format_that_the_rung_prefers(rung, fmt):
    weight = torch.randn(70, 100, generator=torch.Generator().manual_seed(1))
    tensors = pack(fmt, weight, 0.4)
    layer = CompressedLinear(100, 70, False, fmt, extent=extent_of({name: t.shape for name, t in tensors.items()}))
    layer.load_state_dict(tensors)
    preferred = "paired" if fmt.values == "int4" else "dense" if fmt.values == "nf4" else fmt.pattern  # where there is vpexpandb
    preferred = {"reference": fmt.pattern, "avx512-vnni": preferred}.get(rung, "dense")
    differs = preferred != fmt.pattern
    running, running_fmt = layer.running()
    assert running_fmt.pattern == preferred
    running_fmt.check(dict(zip(running_fmt.tensors(100, 70), running, strict=True)) if differs else tensors, 100, 70)
    assert ("runs as" in repr(layer)) == differs
    assert layer.running()[0][0] is running[0]  # made once
    assert copy.deepcopy(layer)._expanded is None and len(pickle.dumps(layer)) < sum(t.numel() for t in tensors.values()) + 8000
    assert all(torch.equal(value, tensors[name]) for name, value in layer.state_dict().items())  # what is saved stays as it was
    for m in (1, 3, 20):
        x = torch.randn(m, 100, generator=torch.Generator().manual_seed(m))
        want = in_float64(x, layer.decode(), torch.zeros(70), None, None, 0)
        assert (layer.fused(x, activations="exact").double() - want).norm() <= 3e-6 * want.norm()
        if fmt.values != "bf16":
            want = in_float64(x, met_by_int8(fmt, tensors, 70, 100), torch.zeros(70), None, None, 0, quantised_activations(x, fmt, 100))
            assert (layer.fused(x, activations="int8").double() - want).norm() <= 3e-6 * want.norm()
    if differs:  # what a merge replaces keeps its address until the next call: another tensor there would pass for it
        replaced = weakref.ref(layer.packed)
        layer.packed = layer.packed.clone()
        assert replaced() is not None
        layer.running()
        assert replaced() is None
        assert layer.to(torch.float32)._expanded is None
    other = pack(fmt, -weight, 0.4)  # the same mask, hence the same shapes
    layer.load_state_dict(other)  # into the same buffers
    x = torch.randn(2, 100)
    want = in_float64(x, fmt.decode(other, 100, 70), torch.zeros(70), None, None, 0)
    assert (layer.fused(x, activations="exact").double() - want).norm() <= 3e-6 * want.norm()


@pytest.mark.parametrize("seed", range(2 * len(FORMATS)))
def test_random_ragged_prefill(rung, seed):
    """Any M above the decode rows, any shape, every panel height: both activation modes and the backward of it."""
    rng = random.Random(seed)
    fmt = FORMATS[seed % len(FORMATS)]
    m, in_, out, rank = rng.randint(9, 200), rng.randint(1, 400), rng.randint(1, 130), rng.choice([0, 1, 16, 40])
    identity_rank = rng.randint(0, rank)
    packed, bias, down, up = layer(fmt, out, in_, rank, torch.float32, seed)
    dense, tensors = fmt.decode(packed, in_, out), list(packed.values())
    x = torch.randn(m, in_, generator=torch.Generator().manual_seed(seed))
    want = in_float64(x, dense, bias, down, up, identity_rank)
    y = ops.linear(x, tensors, fmt, in_, out, bias, down, up, identity_rank, "exact")
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    if fmt.values != "bf16":
        want = in_float64(x, met_by_int8(fmt, packed, out, in_), bias, down, up, identity_rank, quantised_activations(x, fmt, in_))
        y = ops.linear(x, tensors, fmt, in_, out, bias, down, up, identity_rank, "int8")
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    grad = torch.randn(m, out, generator=torch.Generator().manual_seed(seed))
    want = grad.double() @ dense.double()
    dx = torch.ops.calora.linear_dx(grad, tensors, fmt.id, in_, out, fmt.group_size)
    torch.testing.assert_close(dx.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("fmt", [WeightFormat("int4", 64), WeightFormat("bf16", pattern="2:4"), WeightFormat("bf16", pattern="unstructured")], ids=str)
def test_more_rows_than_one_pass_takes(rung, fmt, dtype):
    m, in_, out = 2200, 64, 33
    packed, bias, down, up = layer(fmt, out, in_, 3, dtype)
    dense, tensors = fmt.decode(packed, in_, out), list(packed.values())
    x = torch.randn(m, in_, generator=torch.Generator().manual_seed(9)).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    want = in_float64(x, dense, bias, down, up, 1)
    y = ops.linear(x, tensors, fmt, in_, out, bias, down, up, 1, "exact")
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    grad = torch.randn(m, out, generator=torch.Generator().manual_seed(4)).to(dtype)
    want = grad.double() @ dense.double()
    dx = torch.ops.calora.linear_dx(grad, tensors, fmt.id, in_, out, fmt.group_size)
    torch.testing.assert_close(dx.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("m", [1, 8, 33])
def test_tiled_up_equals_row_major_up(rung, m):
    fmt = WeightFormat("int4", 64)
    packed, bias, down, up = layer(fmt, 97, 130, 24, torch.float32)
    x = torch.randn(m, 130)
    row_major = ops.linear(x, list(packed.values()), fmt, 130, 97, bias, down, up, 16, "exact")
    tiled = ops.linear(x, list(packed.values()), fmt, 130, 97, bias, down, ops.tile_up(up), 16, "exact")
    torch.testing.assert_close(row_major, tiled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.group_size == 128 or str(f) == "nf4 g64"], ids=str)
def test_the_result_does_not_depend_on_the_number_of_threads(rung, fmt, m, activations):
    in_, out = (256, 200) if rung == "reference" else (1024, 1400)  # smaller layers are decoded by one thread
    packed, bias, down, up = layer(fmt, out, in_, 32, torch.float32)
    x = torch.randn(m, in_)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.linear(x, list(packed.values()), fmt, in_, out, bias, down, up, 16, activations))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("fmt", [WeightFormat(values, *group, pattern=pattern) for pattern, values, *group in (("unstructured", "int8"), ("unstructured", "bf16"), ("paired", "int4", 128))], ids=str)
def test_tiles_that_hold_more_than_others_lose_nothing_to_threads(rung, fmt, m):
    """Threads share what is kept, not tiles: here the first, the middle and the last hold everything, the others next to nothing."""
    if rung == "reference" and fmt.pattern == "paired":
        pytest.skip("pairs no rows")
    in_, out = (256, 192) if rung == "reference" else (1024, 1440)
    weight, kept = torch.randn(out, in_), torch.rand(out, in_) < 0.02
    for tile in (0, out // 64, out // 32 - 1):
        kept[32 * tile : 32 * tile + 32] = True
    stored = WeightFormat("int4", 128, pattern="unstructured") if fmt.pattern == "paired" else fmt
    tensors = list(stored.pack(weight, kept).values())
    dense = ops.decode(tensors, stored, in_, out).double()
    if fmt.pattern == "paired":
        tensors = torch.ops.calora.pair(tensors, stored.id, in_, out, stored.group_size)
    x = torch.randn(m, in_)
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        y = ops.linear(x, tensors, fmt, in_, out, activations="exact")
        assert (y.double() - x.double() @ dense.t()).norm() <= 3e-6 * y.double().norm()
        if threads == 1:
            alone = y
        assert torch.equal(y, alone)
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_prefill_and_backward_do_not_depend_on_the_number_of_threads(rung, fmt, dtype):
    if rung == "reference":
        pytest.skip("one plain loop per output, and slow")
    in_, out, m = 256, 200, 300  # two blocks of panels
    packed, bias, down, up = layer(fmt, out, in_, 16, dtype)
    tensors = list(packed.values())
    x, grad = torch.randn(m, in_).to(dtype), torch.randn(m, out).to(dtype)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        forward = [ops.linear(x, tensors, fmt, in_, out, bias, down, up, 8, activations) for activations in ("exact", "int8")]
        results.append([*forward, torch.ops.calora.linear_dx(grad, tensors, fmt.id, in_, out, fmt.group_size)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_activation_is_not_hidden(rung, bad, activations):
    fmt = WeightFormat("int4", 64)
    packed, *_ = layer(fmt, 40, 128, 0, torch.float32)
    for m in (2, 20):
        x = torch.randn(m, 128)
        x[1, 70] = bad
        y = ops.linear(x, list(packed.values()), fmt, 128, 40, activations=activations)
        assert torch.isfinite(y[0]).all() and torch.isfinite(y[2:]).all() and not torch.isfinite(y[1]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("m", [1, 7, 50])
def test_backward_through_the_packed_weight(rung, fmt, m, dtype):
    in_, out = 100, 70
    packed, *_ = layer(fmt, out, in_, 0, dtype)
    dense = fmt.decode(packed, in_, out)
    grad = torch.randn(m, out, generator=torch.Generator().manual_seed(4)).to(dtype)
    dx = torch.ops.calora.linear_dx(grad, list(packed.values()), fmt.id, in_, out, fmt.group_size)
    want = grad.double() @ dense.double()
    torch_error = ((grad @ dense.to(dtype)).double() - want).norm()
    assert (dx.double() - want).norm() <= 2 * torch_error + 1e-7 * want.norm()


def test_no_rows_gives_no_rows(rung):
    fmt = WeightFormat("int4", 64)
    packed, *_ = layer(fmt, 40, 128, 0, torch.float32)
    assert ops.linear(torch.empty(0, 3, 128), list(packed.values()), fmt, 128, 40).shape == (0, 3, 40)
