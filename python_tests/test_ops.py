"""The operators as torch sees them: opcheck, gradients, compile, autocast, argument checks."""

import pytest
import torch
from formats_table import pack

from calora_ext import CompressedLinear, WeightFormat, ops

FMT = WeightFormat("int4", 64)
each_pattern = pytest.mark.parametrize("fmt", [FMT, WeightFormat("int4", 64, pattern="2:4"), WeightFormat("int8", pattern="unstructured"), WeightFormat("nf4", 64)], ids=str)


def arguments(m=3, in_=100, out=70, rank=12, identity_rank=8, dtype=torch.float32, grad=False, fmt=FMT):
    gen = torch.Generator().manual_seed(0)
    packed = list(pack(fmt, torch.randn(out, in_, generator=gen)).values())
    make = lambda *s: torch.randn(*s, generator=gen).to(dtype).requires_grad_(grad)  # noqa: E731
    return (make(m, in_), packed, fmt.id, in_, out, fmt.group_size, make(out), make(rank, in_), make(out, rank), identity_rank, None, 0)


@each_pattern
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_linear(grad, fmt):
    torch.library.opcheck(torch.ops.calora.linear.default, arguments(grad=grad, fmt=fmt))


@each_pattern
def test_opcheck_backward_and_decode(fmt):
    _, packed, fmt, in_, out, group, *_ = arguments(fmt=fmt)
    torch.library.opcheck(torch.ops.calora.linear_dx.default, (torch.randn(3, out), packed, fmt, in_, out, group))
    torch.library.opcheck(torch.ops.calora.decode.default, (packed, fmt, in_, out, group, 10, 40))
    if fmt >= 16 and ops.native.isa() != "reference":  # sparse
        torch.library.opcheck(torch.ops.calora.expand.default, (packed, fmt, in_, out, group))


@each_pattern
def test_gradients_equal_those_of_the_formula(fmt):
    args = arguments(grad=True, fmt=fmt)
    x, packed, _, in_, out, _, bias, down, up, identity_rank, _, _ = args
    dense = ops.decode(packed, fmt, in_, out)
    weights = torch.randn(3, out, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((torch.ops.calora.linear(*args) * weights).sum(), (x, bias, down, up))
    x64, bias64, down64, up64 = (t.detach().double().requires_grad_() for t in (x, bias, down, up))
    y = x64 @ dense.double().t() + bias64 + ops.gelu_rows(x64 @ down64.t(), identity_rank) @ up64.t()
    want = torch.autograd.grad((y * weights.double()).sum(), (x64, bias64, down64, up64))
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", [3, 40])
@each_pattern
def test_gradients_in_bf16_are_as_exact_as_torchs(fmt, m):
    """x and the gradients that come in are bf16, the bank is fp32 as it is while it trains; at most twice the error of bf16 torch."""
    args = arguments(m, rank=24, identity_rank=16, fmt=fmt)
    x, packed, _, in_, out, _, bias, down, up, identity_rank, _, _ = args
    dense, x = ops.decode(packed, fmt, in_, out), x.bfloat16()
    weights = torch.randn(m, out, generator=torch.Generator().manual_seed(1)).bfloat16()

    def gradients(function, dtype):
        leaves = [t.detach().to(t.dtype if dtype is None else dtype).requires_grad_() for t in (x, down, up)]
        return [g.double() for g in torch.autograd.grad((function(*leaves) * weights).sum(), leaves)]

    ours = gradients(lambda x, down, up: torch.ops.calora.linear(x, *args[1:7], down, up, *args[9:]), None)
    formula = lambda x, down, up: x @ dense.to(x).t() + bias.to(x) + ops.gelu_rows(x @ down.to(x).t(), identity_rank) @ up.to(x).t()  # noqa: E731
    torchs, want = gradients(formula, None), gradients(formula, torch.float64)
    for a, b, exact in zip(ours, torchs, want, strict=True):
        assert (a - exact).norm() <= 2 * (b - exact).norm()


def test_recording_a_gradient_makes_the_forward_exact():
    x, packed, _, in_, out, _, bias, *_ = arguments()
    exact = ops.linear(x, packed, FMT, in_, out, bias, activations="exact")
    rounded = ops.linear(x, packed, FMT, in_, out, bias, activations="int8")
    recorded = ops.linear(x.requires_grad_(), packed, FMT, in_, out, bias, activations="int8")
    assert torch.equal(recorded, exact) and not torch.equal(exact, rounded)


def test_compile_fullgraph_dynamic():
    layer = CompressedLinear.from_linear(torch.nn.Linear(96, 64), FMT)
    compiled = torch.compile(lambda x: layer(x) * 2, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for m in (1, 3, 17):
            x = torch.randn(m, 96)
            assert torch.equal(compiled(x), layer(x) * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype):
    """Forward, compiled too, and backward inside of it, whose products write into each other."""
    x, packed, _, in_, out, _, bias, down, up, *_ = arguments()
    layer = CompressedLinear.from_linear(torch.nn.Linear(96, 64), FMT)
    rows = torch.randn(2, 96)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        y = layer(rows)
        assert y.dtype == dtype and torch.equal(torch.compile(layer, backend="aot_eager")(rows), y)
    leaves = [t.clone().requires_grad_() for t in (x, down, up)]
    with torch.autocast("cpu", dtype):
        y = ops.linear(leaves[0], packed, FMT, in_, out, bias, *leaves[1:], len(down))
        y.float().square().sum().backward()
    twins = [t.detach().clone().requires_grad_() for t in leaves]
    ops.linear(twins[0], packed, FMT, in_, out, bias, *twins[1:], len(down)).square().sum().backward()
    assert y.dtype == dtype
    for leaf, twin in zip(leaves, twins, strict=True):
        assert (leaf.grad - twin.grad).norm() < 0.02 * twin.grad.norm()


def test_products_of_a_decoded_weight_ignore_autocast():
    """What a GPU does with many rows runs inside of the operator, where autocast is still on."""
    x, w, down, up = (torch.randn(*shape).bfloat16() for shape in ((5, 64), (40, 64), (6, 64), (40, 6)))
    plain = torch.ops.calora.dense_linear(x, w, None, down, up, 2, None)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(torch.ops.calora.dense_linear(x, w, None, down, up, 2, None), plain)


def test_float16_input_is_computed_and_returned():
    layer = CompressedLinear.from_linear(torch.nn.Linear(96, 64), FMT)
    x = torch.randn(2, 96)
    with torch.no_grad():
        torch.testing.assert_close(layer(x.half()).float(), layer(x.half().float()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.randn(3, 99)}, "last dimension"),
        ({0: torch.randn(3, 100).int()}, "float32 or bfloat16"),
        ({1: []}, "got 0 tensors"),
        ({1: [torch.zeros(5, dtype=torch.uint8)]}, "has 5 bytes"),
        ({2: 99}, "unknown weight format"),
        ({2: 16 + 2}, "a 70 x 100 layer of this format needs"),
        ({2: 32 + 2}, "offsets and kept codes"),
        ({2: -1}, "unknown weight format"),
        ({3: -1}, "unsupported layer size"),
        ({5: 7}, "group_size"),
        ({6: torch.randn(3)}, "bias"),
        ({7: None}, "belong together"),
        ({7: torch.randn(12, 9)}, "down must be"),
        ({8: torch.randn(70, 3)}, "up must be"),
        ({9: 13}, "identity_rank"),
        ({10: torch.zeros(3, dtype=torch.int64)}, "row_adapter"),
        ({11: 2}, "activations"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments_are_refused(change, message):
    args = list(arguments())
    for index, value in change.items():
        args[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.calora.linear(*args)


def test_a_misaligned_packed_weight_never_reaches_a_kernel():
    x, packed, *rest = arguments()
    shifted = torch.zeros(packed[0].numel() + 1, dtype=torch.uint8)[1:]
    with pytest.raises(RuntimeError, match="aligned"):
        torch.ops.calora.linear(x, [shifted], *rest)
