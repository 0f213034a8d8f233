"""Pack, decode and byte accounting against the formulas, and the Python layout against csrc/layouts.h."""

from dataclasses import replace

import pytest
import torch
from formats_table import FORMATS, SPARSE, mask_for, pack

from calora_ext import CaloraError, WeightFormat, ops
from calora_ext.formats import layout
from calora_ext.formats.values import VALUES, Quantized
from calora_ext.pruning import NofM, magnitude

SHAPES = [(1, 1), (33, 7), (31, 65), (64, 128), (97, 300)]  # (out, in): ragged tails everywhere
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@each_format
@each_shape
def test_native_decode_equals_the_reference(fmt, shape):
    torch.manual_seed(0)
    packed = pack(fmt, torch.randn(shape))
    reference = fmt.decode(packed, shape[1], shape[0])
    native = ops.decode(list(packed.values()), fmt, shape[1], shape[0])
    assert torch.equal(reference, native)


@each_format
@each_shape
def test_unpack_is_the_inverse_of_pack(fmt, shape):
    torch.manual_seed(1)
    out, in_ = shape
    blocks = fmt.geometry(in_, out).blocks
    if fmt.values == "bf16":
        q = Quantized(torch.randn(shape).bfloat16())
    else:
        top = 256 if fmt.values == "int8" else 16
        zero = None if fmt.symmetric else torch.randint(0, 16, (out, blocks), dtype=torch.uint8)
        scale, outer = torch.rand(out, blocks).half(), None
        if fmt.values == "nf4":
            scale, outer = torch.randint(0, 256, (out, blocks), dtype=torch.uint8), torch.rand(-(-out // 32))
        q = Quantized(torch.randint(0, top, shape, dtype=torch.uint8), scale, zero, None, outer)
    if fmt.sparse:  # what is not kept holds the code of 0
        mask = mask_for(fmt, shape)
        q = replace(q, codes=torch.where(mask, q.codes, VALUES[fmt.values].padding(None)), mask=mask)
    back = fmt.unpack(fmt.pack_quantized(q), in_, out)
    assert torch.equal(back.codes, q.codes)
    assert q.mask is None or torch.equal(back.mask, q.mask)
    assert q.scale is None or torch.equal(back.scale, q.scale)
    assert q.zero is None or torch.equal(back.zero, q.zero)
    assert q.outer_scale is None or torch.equal(back.outer_scale, q.outer_scale)


@each_format
@each_shape
def test_bytes_are_those_of_layouts_h(fmt, shape):
    out, in_ = shape
    packed, zeros, offsets, scales = ops.native.packed_bytes(fmt.id, in_, out, fmt.group_size)
    sizes = {name: t.numel() for name, t in pack(fmt, torch.randn(shape)).items()}
    assert tuple(sizes) == fmt.names
    assert sizes["packed"] == packed and sizes.get("zeros") in (None, zeros) and sizes.get("offsets") in (None, offsets)
    assert sizes.get("scales") == (scales if fmt.values == "nf4" else None)
    assert ("zeros" in sizes) == (not fmt.symmetric) and ("offsets" in sizes) == ("kept" in sizes) == (fmt.pattern == "unstructured")
    assert all(size % 64 == 0 for size in sizes.values())


def test_layout_constants_are_those_of_layouts_h():
    native = ops.native.layout_constants()
    assert native == {
        "layout_version": layout.LAYOUT_VERSION, "tile_rows": layout.TILE_ROWS, "column_align": layout.COLUMN_ALIGN,
        "tile_align": layout.TILE_ALIGN, "scale_bytes": layout.SCALE_BYTES, "zero_bytes": layout.ZERO_BYTES, "int4_zero": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [(WeightFormat("int4", 64), 4.26), (WeightFormat("int4", 128), 4.14), (WeightFormat("int8"), 8.05), (WeightFormat("bf16"), 16.0),
     (WeightFormat("int4", 128, symmetric=False), 4.14 + 4 / 128), (WeightFormat("int4", 128, pattern="2:4"), 3.26),
     (WeightFormat("nf4", 64), 4.13), (WeightFormat("nf4", 128), 4.07), (WeightFormat("nf4", -1), 4.01),
     (WeightFormat("int4", 64, pattern="2:4"), 3.40), (WeightFormat("int8", pattern="2:4"), 5.01), (WeightFormat("bf16", pattern="2:4"), 9.0)],
    ids=str,
)  # fmt: skip
def test_bits_per_weight(fmt, bits):
    assert fmt.bits_per_weight(4096, 4096) <= bits


def test_int4_error_is_at_most_half_a_step_inside_the_clip_range():
    torch.manual_seed(2)
    w = torch.randn(64, 256)
    for symmetric in (True, False):
        fmt = WeightFormat("int4", 64, symmetric)
        q = fmt.quantize(w)
        decoded = fmt.decode(fmt.pack_quantized(q), 256, 64)
        inside = (q.codes > 0) & (q.codes < 15)
        half_step = q.scale.float().abs().repeat_interleave(64, 1) / 2
        assert ((decoded - w).abs() <= half_step * 1.001)[inside].all()


def test_int4_search_is_never_worse_than_plain_absmax():
    torch.manual_seed(3)
    w = torch.randn(32, 512) ** 3
    plain_scale = w.view(32, -1, 64).abs().amax(-1, keepdim=True) / 7
    plain = (w.view(32, -1, 64) / plain_scale).round().clamp(-8, 7) * plain_scale
    fmt = WeightFormat("int4", 64)
    ours = fmt.decode(fmt.pack(w), 512, 32)
    assert (ours - w).square().sum() < (plain.view_as(w) - w).square().sum()


@each_format
def test_zero_and_extreme_weights(fmt):
    w = torch.zeros(5, 70)
    assert torch.equal(fmt.decode(fmt.pack(w), 70, 5), w)
    w[2, 3] = 1e-20  # underflows an fp16 scale: decodes to something finite
    assert torch.isfinite(fmt.decode(fmt.pack(w), 70, 5)).all()


@pytest.mark.parametrize(
    ("values", "group", "sparsity", "bits"),
    [("int4", 128, 0.5, 3.30), ("int4", 128, 0.7, 2.50), ("int4", 64, 0.5, 3.45), ("int4", 64, 0.7, 2.65), ("int8", -1, 0.7, 3.60),
     ("bf16", -1, 0.5, 9.1)],
)  # fmt: skip
def test_bits_per_weight_of_unstructured_weights(values, group, sparsity, bits):
    fmt, weight = WeightFormat(values, group, pattern="unstructured"), torch.randn(1024, 1024, generator=torch.Generator().manual_seed(6))
    packed = fmt.pack(weight, magnitude(weight, round(sparsity * weight.numel())))
    took = 8 * sum(t.numel() for t in packed.values()) / weight.numel()
    assert took <= bits and fmt.bits_per_weight(1024, 1024, 1 - sparsity) == pytest.approx(took, rel=0.01)


@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("fmt", SPARSE, ids=str)
def test_the_zero_pattern_is_the_mask_bit_for_bit(fmt, density):
    torch.manual_seed(4)
    out, in_ = 45, 171
    weight, mask = torch.randn(out, in_), mask_for(fmt, (out, in_), density)
    packed = fmt.pack(weight, mask)
    assert torch.equal(fmt.unpack(packed, in_, out).mask, mask)
    decoded = fmt.decode(packed, in_, out)
    assert not decoded[~mask].any()
    # The kept weights are those of the dense format, whose scales do not see a weight that is 0.
    dense = replace(fmt, pattern="dense")
    assert torch.equal(decoded, dense.decode(dense.pack(weight * mask), in_, out))
    # Packing what was decoded keeps every zero, whatever the mask had kept there.
    again = fmt.pack(decoded)
    assert torch.equal(fmt.unpack(again, in_, out).mask, decoded != 0)


def test_magnitude_keeps_the_two_largest_of_four():
    torch.manual_seed(5)
    weight = torch.randn(33, 70)
    weight[3], weight[4] = 1.0, 0.0
    mask = magnitude(weight, NofM(2, 4))
    for row in range(33):
        for first in range(0, 70, 4):
            group = weight[row, first : first + 4].abs()
            best = sorted(range(len(group)), key=lambda c: (-group[c].item(), c))[:2]
            want = [c in best and group[c] > 0 for c in range(len(group))]
            assert mask[row, first : first + 4].tolist() == want


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 1.0])
def test_magnitude_keeps_the_largest_share_of_a_matrix(sparsity):
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(5))
    mask = magnitude(weight, round(sparsity * 2000))
    assert mask.sum() == round((1 - sparsity) * 2000)
    assert sparsity in (0.0, 1.0) or weight.abs()[mask].min() > weight.abs()[~mask].max()
    equal = magnitude(torch.ones(40, 50), round(sparsity * 2000))  # of equals the first
    assert equal.view(-1)[: mask.sum()].all() and equal.sum() == mask.sum()
    assert not magnitude(torch.zeros(4, 5), 3).any()


@pytest.mark.parametrize("values", ["int4", "int8", "bf16"])
def test_rows_cost_what_they_hold(values):
    """Empty and wholly dense rows and tiles in one matrix."""
    torch.manual_seed(7)
    fmt, weight = WeightFormat(values, -1, pattern="unstructured"), torch.randn(128, 256)
    mask = torch.zeros(128, 256, dtype=torch.bool)
    mask[5], mask[64:96] = True, True
    packed = fmt.pack(weight, mask)
    codes = {"int4": 0.5, "int8": 1, "bf16": 2}[values]
    tail = packed["kept"].numel() - 33 * 256 * codes
    assert 64 <= tail <= 1024 * codes + 2 * 64 + 8 * 32  # a few rows share their bytes' other halves with none
    assert torch.equal(fmt.unpack(packed, 256, 128).mask, mask)
    x = torch.randn(3, 256)
    y = ops.linear(x, list(packed.values()), fmt, 256, 128, activations="exact")
    assert not y[:, :5].any() and not y[:, 6:64].any() and not y[:, 96:].any()
    torch.testing.assert_close(y, x @ fmt.decode(packed, 256, 128).t(), rtol=1e-5, atol=1e-5)


def damage(packed, name, change):
    return {**packed, name: change(packed[name].clone())}


@pytest.mark.parametrize("fmt", [f for f in SPARSE if f.pattern == "unstructured"], ids=str)
def test_damaged_unstructured_weights_are_refused_and_lead_nowhere(fmt):
    """check() finds what no mask can mean; and the kernels, given it all the same, stay inside."""
    out, in_ = 97, 130
    packed = pack(fmt, torch.randn(out, in_, generator=torch.Generator().manual_seed(8)))
    fill = lambda value: lambda t: t.fill_(value)  # noqa: E731
    for name, change, message in (
        ("offsets", fill(255), "offsets"), ("offsets", lambda t: t.flip(0), "offsets"), ("kept", lambda t: t[:-64], "asks for"),
        ("kept", lambda t: torch.cat((t, t)), "asks for"), ("kept", lambda t: t[:-1], "another model or is damaged"),
        ("offsets", lambda t: t[:-64], "another model or is damaged"),
    ):  # fmt: skip
        with pytest.raises(CaloraError, match=message):
            fmt.decode(damage(packed, name, change), in_, out)
    g = fmt.geometry(in_, out)
    wrong = packed["packed"].clone()
    wrong.view(g.tiles, g.blocks, g.block_bytes)[..., : g.code_bytes] = 255
    with pytest.raises(CaloraError, match="offsets"):
        fmt.decode({**packed, "packed": wrong}, in_, out)
    before = ops.native.isa()
    for isa in ops.native.available():
        ops.native.set_isa(isa)
        for bad in (damage(packed, "offsets", fill(255)), {**packed, "packed": wrong}, damage(packed, "offsets", fill(1)) | {"packed": wrong}):
            tensors = list(bad.values())
            for m in (1, 3, 20):
                for activations in ("exact", "int8"):
                    ops.linear(torch.randn(m, in_), tensors, fmt, in_, out, activations=activations)
            torch.ops.calora.linear_dx(torch.randn(3, out), tensors, fmt.id, in_, out, fmt.group_size)
        with pytest.raises(RuntimeError, match="too few"):
            ops.decode([*tensors[:-1], tensors[-1][:64]], fmt, in_, out)
        with pytest.raises(RuntimeError, match="offsets have"):
            ops.decode([*tensors[:-2], tensors[-2][:-64], tensors[-1]], fmt, in_, out)
    ops.native.set_isa(before)


def test_bad_masks_are_refused_in_a_sentence():
    fmt, weight = WeightFormat("int4", 64, pattern="2:4"), torch.randn(4, 64)
    with pytest.raises(CaloraError, match="keeps 4 of the four weights at row 0, columns 0 to 3"):
        fmt.pack(weight)
    with pytest.raises(CaloraError, match="shape"):
        fmt.pack(weight, torch.ones(4, 63, dtype=torch.bool))
    with pytest.raises(CaloraError, match="no meaning for int4 g64"):
        WeightFormat("int4", 64).pack(weight, weight > 0)
    with pytest.raises(CaloraError, match="no zero points"):
        WeightFormat("int4", 64, False, "2:4")
    with pytest.raises(CaloraError, match="unknown pattern"):
        WeightFormat("int4", 64, pattern="4:8")


def test_bad_weights_and_formats_are_refused_in_a_sentence():
    fmt = WeightFormat("int4", 64)
    with pytest.raises(CaloraError, match="NaN"):
        fmt.pack(torch.full((4, 4), float("nan")))
    with pytest.raises(CaloraError, match="fp16 scale"):
        fmt.pack(torch.full((4, 4), 1e9))
    with pytest.raises(CaloraError, match="2-D"):
        fmt.pack(torch.randn(4))
    with pytest.raises(CaloraError, match="multiple of 32"):
        WeightFormat("int4", 48)
    with pytest.raises(CaloraError, match="unknown weights"):
        WeightFormat("int3")
    with pytest.raises(CaloraError, match="zero points"):
        WeightFormat("int8", symmetric=False)
    with pytest.raises(CaloraError, match="nf4 has no zero points"):
        WeightFormat("nf4", symmetric=False)
    with pytest.raises(CaloraError, match="fp32 scale"):
        WeightFormat("nf4").pack(torch.full((4, 4), 3e38))
    packed = fmt.pack(torch.randn(4, 64))
    with pytest.raises(CaloraError, match="another model"):
        fmt.decode(packed, 128, 4)
