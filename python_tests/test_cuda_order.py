"""The byte order of the GPU, on CPU tensors: a permutation, inverted exactly; and modules that keep it to themselves."""

import pytest
import torch
from formats_table import compress_linear, pack

from calora_ext import WeightFormat, ops
from calora_ext.embedding import gather_rows
from calora_ext.errors import CaloraError
from calora_ext.formats import cuda_order

DENSE = [WeightFormat("int4", 32), WeightFormat("int4", 128), WeightFormat("int4", -1), WeightFormat("int4", 64, symmetric=False),
         WeightFormat("int8"), WeightFormat("bf16"), WeightFormat("nf4", 64), WeightFormat("nf4", -1)]  # fmt: skip
TWO_FOUR = [WeightFormat("int4", 32, pattern="2:4"), WeightFormat("int4", 96, pattern="2:4"), WeightFormat("int4", 128, pattern="2:4"),
            WeightFormat("int4", -1, pattern="2:4"), WeightFormat("nf4", 96, pattern="2:4"), WeightFormat("int8", pattern="2:4"), WeightFormat("bf16", pattern="2:4")]  # fmt: skip
UNSTRUCTURED = [WeightFormat("int4", 32, pattern="unstructured"), WeightFormat("int4", 96, pattern="unstructured"),
                WeightFormat("int4", -1, pattern="unstructured"), WeightFormat("nf4", 96, pattern="unstructured"), WeightFormat("int8", pattern="unstructured"),
                WeightFormat("bf16", pattern="unstructured")]  # fmt: skip
SHAPES = [(32, 32), (97, 130), (1, 1), (64, 300)]  # (out, in)


def ordered(packed, fmt, in_, out):
    return {name: cuda_order.to_cuda_order(name, t, fmt, in_, out) for name, t in packed.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", DENSE + TWO_FOUR, ids=str)
def test_there_and_back_is_bit_exact(fmt, shape):
    out, in_ = shape
    for name, size in fmt.tensors(in_, out).items():
        t = torch.randint(0, 256, size, dtype=torch.uint8)
        if fmt.pattern == "2:4" and name == "packed":  # places are not any bytes
            t = pack(fmt, torch.randn(out, in_), density=0.6)[name]
        there = cuda_order.to_cuda_order(name, t, fmt, in_, out)
        assert cuda_order.in_cuda_order(name, there) and not cuda_order.in_cuda_order(name, t)
        assert there.numel() == t.numel() and not torch.equal(there.flatten(), t.flatten())
        assert torch.equal(cuda_order.from_cuda_order(name, there, fmt, in_, out), t)
        assert cuda_order.to_cuda_order(name, there, fmt, in_, out) is there


def test_places_of_a_damaged_file_are_refused():
    fmt = WeightFormat("bf16", pattern="2:4")
    packed = fmt.pack(torch.zeros(32, 32))["packed"]
    packed[0, -2:] = torch.tensor([2, 0])  # after 2 comes 0, which is not how a file says "none"
    with pytest.raises(CaloraError, match="damaged"):
        cuda_order.to_cuda_order("packed", packed, fmt, 32, 32)


def test_where_a_weight_lies():
    """One element by hand, from the picture in csrc/cuda/api.h: row 27 = 16 + 8 + 3, column 32 + 21 = 32 + 8 * 2 + 4 + 1."""
    g, rt, j, c, s, h, e = 3, 1, 1, 2, 1, 0, 1
    lane = 4 * g + c
    places = {  # byte and shift inside the chunk of 32 x 32
        "int4": (16 * lane + 4 * (2 * s + rt) + (4 * (j + 2 * h) + 16 * e) // 8, 4 * (j + 2 * h) % 8),
        "int8": (512 * s + 16 * lane + 4 * (2 * rt + h) + 2 * j + e, 0),
        "bf16": (512 * (2 * s + rt) + 16 * lane + 4 * (j + 2 * h) + 2 * e, 0),
    }
    for values, chunk in (("int4", 512), ("int8", 1024), ("bf16", 2048)):
        fmt = WeightFormat(values, 64) if values == "int4" else WeightFormat(values)
        weight = torch.zeros(32, 64)
        empty = ordered(fmt.pack(weight), fmt, 64, 32)["packed"].flatten()
        q = fmt.quantize(weight)
        q.codes[27, 53] = {"int4": 3, "int8": 7, "bf16": 1.5}[values]
        one = ordered(fmt.pack_quantized(q), fmt, 64, 32)["packed"].flatten()
        byte, shift = places[values]
        changed = (one != empty).nonzero().flatten().tolist()
        assert chunk + byte in changed and set(changed) <= {chunk + byte, chunk + byte + (values == "bf16")}
        if values == "int4":
            assert int(one[chunk + byte]) >> shift & 15 == 3


def test_places_of_2_4_lie_as_cutlass_has_them():
    """Against torch's own conversion to what CUTLASS hands to the same instruction, for groups that keep two."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    fmt, weight = WeightFormat("bf16", pattern="2:4"), torch.randn(64, 128)
    mask = torch.zeros(64, 32, 4, dtype=torch.bool).scatter_(-1, torch.rand(64, 32, 4).argsort(-1)[..., :2], True).view(64, 128)
    packed = cuda_order.to_cuda_order("packed", fmt.pack(weight, mask)["packed"], fmt, 128, 64)
    ours = packed.view(2, 2, -1)[..., 2048:].contiguous().view(torch.int32).view(2, 2, 32, 2)  # tiles, units, lanes, turns
    values, places = sparse_semi_structured_from_dense_cutlass((weight * mask).bfloat16())
    t = (~ours | ours << 1) & 0x66666666  # guide_of of two_four.cu
    ours = ours & (t | t << 1) | ~ours & ~t
    assert torch.equal(ours.permute(1, 3, 0, 2).reshape(4, 64), places.view(-1).view(torch.int32).view(4, 64))
    # The values of lane (g, c), k16 step t: those of row 16 rt + 8 j + g, compressed columns 16 t' + 8 h + 2 c + e.
    kept = packed.view(2, 2, -1)[..., :2048].contiguous().view(torch.bfloat16).view(2, 2, 2, 2, 8, 4, 2, 2, 2)  # tile, unit, t, rt, g, c, h, j, e
    assert torch.equal(kept.permute(0, 3, 7, 4, 1, 2, 6, 5, 8).reshape(64, 64), values)


@pytest.mark.parametrize("fmt", DENSE, ids=str)
def test_rows_are_gathered_from_either_order(fmt):
    out, in_ = 97, 130
    packed = fmt.pack(torch.randn(out, in_))
    rows = torch.tensor([0, 96, 8, 16, 24, 31, 32, 77, 8])
    want = fmt.decode(packed, in_, out)[rows]
    assert torch.equal(gather_rows(packed, rows, fmt, in_, out), want)
    assert torch.equal(gather_rows(ordered(packed, fmt, in_, out), rows, fmt, in_, out), want)


def on_a_pretended_gpu(monkeypatch):
    """CPU tensors count as GPU tensors for the order of their bytes."""
    monkeypatch.setattr("calora_ext.packed.arrange", cuda_order.to_cuda_order)


@pytest.mark.parametrize("fmt", [WeightFormat("int4", 64, symmetric=False), WeightFormat("int8"), WeightFormat("int4", 64, pattern="2:4"), WeightFormat("int4", 64, pattern="unstructured"), WeightFormat("nf4", 64), WeightFormat("nf4", 64, pattern="unstructured")], ids=str)
def test_state_dicts_are_canonical_wherever_the_module_is(fmt, monkeypatch):
    layer = compress_linear(torch.nn.Linear(130, 97), fmt)
    canonical = {name: t.clone() for name, t in layer.state_dict().items()}
    with monkeypatch.context() as m:
        on_a_pretended_gpu(m)
        layer.to(torch.bfloat16)  # any move
        assert layer.packed.dim() == 3
        assert all(torch.equal(t, canonical[name]) for name, t in layer.state_dict().items() if name != "bias")
        other = compress_linear(torch.nn.Linear(130, 97), fmt)
        other.to(torch.bfloat16)
        wrong = [t.clone() for t in other.packed_tensors().values()]
        other.load_state_dict(canonical)
        loaded = list(other.packed_tensors().values())
        assert all(map(torch.equal, loaded, layer.packed_tensors().values())) and not all(map(torch.equal, loaded, wrong))
    layer.float()  # and back: the CPU's order again
    assert torch.equal(layer.packed, canonical["packed"])
    torch.testing.assert_close(layer.decode(), fmt.decode({n: t for n, t in canonical.items() if n != "bias"}, 130, 97))


@pytest.mark.parametrize("fmt", [WeightFormat("int4", 64, pattern="2:4"), WeightFormat("int4", 64, pattern="unstructured"), WeightFormat("nf4", 64)], ids=str)
def test_meta_and_back_to_where_weights_are_loaded(fmt, monkeypatch):
    """``.to("meta")`` of a module on a GPU, and the usual way from there: to_empty, whose bytes are no weights, then load_state_dict."""
    layer = compress_linear(torch.nn.Linear(130, 97), fmt)
    canonical = {name: t.clone() for name, t in layer.state_dict().items()}
    monkeypatch.setattr("calora_ext.packed.arrange", lambda name, t, *rest: (cuda_order.arrange if t.is_meta else cuda_order.to_cuda_order)(name, t, *rest))
    layer.to(torch.float32)
    there = [t.clone() for t in layer.packed_tensors().values()]
    layer.to("meta")
    assert all(t.is_meta and t.shape == canonical[name].shape for name, t in layer.packed_tensors().items())
    layer._apply(lambda t: torch.randint(0, 256, t.shape).to(t.dtype))  # to_empty, of memory in which something was
    layer.load_state_dict(canonical)
    assert all(map(torch.equal, layer.packed_tensors().values(), there))


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", UNSTRUCTURED, ids=str)
def test_unstructured_there_and_back(fmt, shape, density, monkeypatch):
    monkeypatch.setattr(cuda_order, "_CHUNKS", 3)
    out, in_ = shape
    packed = pack(fmt, torch.randn(out, in_), density)
    there = {name: cuda_order.to_cuda_order(name, t, fmt, in_, out, packed["packed"]) for name, t in packed.items()}
    for name, t in packed.items():
        assert cuda_order.in_cuda_order(name, there[name]) == (name != "offsets") and there[name].numel() == t.numel()
        assert torch.equal(cuda_order.from_cuda_order(name, there[name], fmt, in_, out, there["packed"]), t)


def test_where_a_kept_weight_lies():
    """One element by hand, from the picture in csrc/cuda/api.h: the same one as below; before it lie lanes 0..13 and its own bits."""
    g, rt, j, c, s, h, e = 3, 1, 1, 2, 1, 0, 1
    lane, mask = 4 * g + c, torch.rand(32, 64) < 0.5
    mask[27, 53] = True
    for values, word, element, each in (("int4", 2 * s + rt, j + 2 * e + 4 * h, 8), ("int8", 4 * s + 2 * rt + h, 2 * j + e, 4), ("bf16", 8 * s + 4 * rt + 2 * h + j, e, 2)):
        fmt = WeightFormat(values, 64, pattern="unstructured")
        q = fmt.quantize(torch.randn(32, 64), mask)
        packed = fmt.pack_quantized(q)
        there = {name: cuda_order.to_cuda_order(name, t, fmt, 64, 32, packed["packed"]) for name, t in packed.items()}
        bits = there["packed"].flatten()[:256].view(torch.int32).view(32, 2)[:, 1]  # of the second chunk

        def bit(word, element, values=values):
            run = {"int4": 4, "int8": 4, "bf16": 8}[values]  # words whose bits stand side by side
            return 16 * (word // run) + run * element + word % run if values != "int4" else word + 4 * element

        mine = int(bits[lane])
        before = [b for w in range(word + 1) for k in range(each) if (w, k) < (word, element) and mine >> (b := bit(w, k)) & 1]
        place = sum((int(b) & 0xFFFFFFFF).bit_count() for b in bits[:lane]) + len(before)
        start, kept = 8 * int(there["offsets"].view(torch.int32)[1]), there["kept"].flatten()
        assert mine >> bit(word, element) & 1
        if values == "int4":
            assert (int(kept[start + place // 2]) >> 4 * (place % 2) & 15) ^ 8 == q.codes[27, 53]
        else:
            assert kept[start:].view(q.codes.dtype)[place] == q.codes[27, 53]


def test_kept_codes_that_do_not_fit_their_bits_are_refused():
    fmt = WeightFormat("int8", pattern="unstructured")
    packed = pack(fmt, torch.randn(64, 64), 0.5)
    for kept, words in ((packed["kept"][:-64], "more"), (torch.cat((packed["kept"], packed["kept"][:64])), "fewer")):
        with pytest.raises(CaloraError, match=f"asks for {words}"):
            cuda_order.to_cuda_order("kept", kept, fmt, 64, 64, packed["packed"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("tiled", [False, True], ids=["up", "tiled"])
@pytest.mark.parametrize(("rank", "identity_rank", "bias"), [(0, 0, True), (5, 5, False), (24, 8, True), (7, 0, False)])
def test_dense_linear_is_the_layer(rank, identity_rank, bias, tiled, dtype):
    gen = torch.Generator().manual_seed(1)
    x, w = (torch.randn(*shape, generator=gen).to(dtype) for shape in ((3, 40, 130), (97, 130)))
    b = torch.randn(97, generator=gen).to(dtype) if bias else None
    down, up = (torch.randn(rank, 130, generator=gen) / 130**0.5, torch.randn(97, rank, generator=gen)) if rank else (None, None)
    y = torch.ops.calora.dense_linear(x, w, b, down, ops.tile_up(up) if tiled and rank else up, identity_rank, None)
    want = x.double() @ w.double().t() + (b.double() if bias else 0)
    if rank:
        t = x.double() @ down.double().t()
        t = torch.cat((t[..., :identity_rank], torch.nn.functional.gelu(t[..., identity_rank:])), -1)
        want = want + t @ up.double().t()
    assert y.shape == (3, 40, 97) and y.dtype == dtype
    assert (y.double() - want).norm() <= {torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype] * want.norm()


@pytest.mark.parametrize("tiled", [False, True], ids=["up", "tiled"])
def test_dense_linear_with_an_adapter_for_each_row(tiled):
    gen = torch.Generator().manual_seed(2)
    x, w, down, up = (torch.randn(*shape, generator=gen) for shape in ((2, 3, 130), (97, 130), (4, 24, 130), (4, 97, 24)))
    rows = torch.tensor([0, -1, 3, 1, 4, 1])
    stack = torch.stack([ops.tile_up(u) for u in up]) if tiled else up
    y = torch.ops.calora.dense_linear(x, w, None, down, stack, 8, rows).view(6, 97)
    for i, a in enumerate(rows.tolist()):
        if a == 4:
            assert torch.isnan(y[i]).all()
            continue
        bank = (down[a], up[a]) if a >= 0 else (None, None)
        torch.testing.assert_close(y[i], torch.ops.calora.dense_linear(x.view(6, 130)[i], w, None, *bank, 8, None), rtol=1e-4, atol=1e-4)


def test_dense_linear_passes_opcheck():
    x, w, down, up = torch.randn(5, 64), torch.randn(40, 64), torch.randn(3, 64), torch.randn(40, 3)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.calora.dense_linear.default, (x, w, None, down, up, 1, None), test_utils=tests)
