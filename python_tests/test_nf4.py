"""NF4: the published code book, bitsandbytes' own codes, and what quantising the scales costs."""

import math

import pytest
import torch

from calora_ext import CaloraError, WeightFormat
from calora_ext.formats import nf4
from calora_ext.formats.nf4 import BOOK, NF4, small_floats


def test_the_book_is_the_published_one():
    """QLoRA, appendix E: quantiles of the normal distribution, the two halves sharing 0, scaled to [-1, 1]."""
    quantile = lambda p: math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * p - 1, dtype=torch.float64)))  # noqa: E731
    offset = 0.9677083  # of bitsandbytes' create_normal_map
    positive = [quantile(p) for p in torch.linspace(offset, 0.5, 9, dtype=torch.float64).tolist()[:-1]]
    negative = [-quantile(p) for p in torch.linspace(offset, 0.5, 8, dtype=torch.float64).tolist()[:-1]]
    want = torch.tensor(sorted([*positive, *negative, 0.0])) / max(positive)
    torch.testing.assert_close(torch.tensor(BOOK), want, rtol=1e-5, atol=1e-6)
    assert BOOK[0] == -1 and BOOK[7] == 0 and BOOK[15] == 1


def test_codes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    assert torch.equal(torch.tensor(BOOK), functional.get_4bit_type("nf4", device="cpu"))
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    theirs = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), dim=-1).view(96, 4, 64)
    ours = NF4.codes(weight.view(96, 4, 64), state.absmax.view(96, 4, 1), None)
    assert torch.equal(ours.to(torch.uint8), theirs)


def test_a_scale_code_is_a_small_float():
    value = lambda c: (c % 32 + 32 * (c > 31)) * 2.0 ** (max(c // 32, 1) - 20)  # noqa: E731
    assert small_floats(torch.arange(256)).tolist() == [value(c) for c in range(256)]
    assert value(255) == 63 / 8192 and small_floats(torch.arange(256)).diff().gt(0).all()


def test_quantised_scales_cost_next_to_nothing():
    """Against scales that are kept as they are, and where bitsandbytes is installed against its own double quantisation."""
    gen = torch.Generator().manual_seed(1)
    weight = torch.randn(256, 1024, generator=gen) * torch.logspace(-1, 1, 256).unsqueeze(1)  # rows of a tile differ by half
    blocks = weight.view(256, 16, 64)
    plain = NF4.value(NF4.codes(blocks, blocks.abs().amax(-1, keepdim=True), None), blocks.abs().amax(-1, keepdim=True), None)
    fmt = WeightFormat("nf4", 64)
    ours = fmt.decode(fmt.pack(weight), 1024, 256)
    error = lambda w: float((w.reshape(256, 1024) - weight).norm() / weight.norm())  # noqa: E731
    assert error(ours) < 1.01 * error(plain) < 0.1
    try:
        from bitsandbytes import functional
    except ImportError:
        return
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert error(ours) < 1.01 * error(functional.dequantize_4bit(packed, state))


def test_scales_are_near_the_largest_weight_of_their_group():
    weight = torch.randn(40, 192, generator=torch.Generator().manual_seed(2))
    weight[3] *= 1 / 64
    largest = weight.view(40, 3, 64).abs().amax(-1)
    q = WeightFormat("nf4", 64).quantize(weight)
    torch.testing.assert_close(q.scales(), largest, rtol=1 / 63, atol=0)
    assert q.outer_scale.shape == (2,)
    # The largest of a tile is stored exactly, but for fp32.
    torch.testing.assert_close(q.scales()[:32].max(), largest[:32].max(), rtol=1e-6, atol=0)


def test_zeros_stay_zeros_and_tiny_groups_vanish():
    weight = torch.randn(33, 100, generator=torch.Generator().manual_seed(3))
    weight[:, ::3] = 0
    weight[5, :64] *= 1e-6  # 1 / 8000 of what its tile holds cannot be told from 0
    fmt = WeightFormat("nf4", 64)
    decoded = fmt.decode(fmt.pack(weight), 100, 33)
    assert not decoded[weight == 0].any() and not decoded[5, :64].any() and decoded[5, 64:].any()
    again = fmt.pack(decoded)
    assert torch.equal(fmt.decode(again, 100, 33) == 0, decoded == 0)


def test_damaged_nf4_weights_are_refused():
    fmt = WeightFormat("nf4", 64)
    packed = fmt.pack(torch.randn(40, 100))
    bad = packed["scales"].clone()
    bad[132:136] = torch.tensor([0, 0, 0x80, 0x7F], dtype=torch.uint8)  # infinity, of the second tile
    with pytest.raises(CaloraError, match="not finite"):
        fmt.decode({**packed, "scales": bad}, 100, 40)
    for name, change in (("scales", packed["scales"][:128]), ("packed", packed["packed"][:, :-32]), ("packed", packed["packed"][:1])):
        with pytest.raises(CaloraError, match="another model or is damaged"):
            fmt.decode({**packed, name: change.contiguous()}, 100, 40)
    with pytest.raises(CaloraError, match="do not belong"):
        fmt.decode({"packed": packed["packed"]}, 100, 40)
    with pytest.raises(RuntimeError, match="got 1 tensors"):
        torch.ops.calora.decode([packed["packed"]], fmt.id, 100, 40, 64, 0, 40)
    with pytest.raises(RuntimeError, match="scales have 128 bytes"):
        torch.ops.calora.decode([packed["packed"], packed["scales"][:128].clone()], fmt.id, 100, 40, 64, 0, 40)
    assert nf4.NF4.padding(None) == 7
