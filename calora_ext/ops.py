"""The Python door to the native operators: loading, shapes for tracing, derivatives, autocast.

    y = x W^T + bias + phi(x D^T) U^T

x: (..., in_features). W is packed (``formats``). down D: (rank, in_features); up U: (out_features, rank), or tiled
(``tile_up``) for inference. phi is the identity on the first ``identity_rank`` rows and GELU (erf) on the rest.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .errors import CaloraError, NotBuiltError
from .formats import WeightFormat
from .formats.cuda_order import arrange
from .formats.layout import TILE_ROWS, VALUE_IDS, Geometry

ACTIVATIONS = {"exact": 0, "int8": 1}
MOST_PAIRED = 0.6  # share of the weights kept, up to which pairs of rows have fewer bytes than a dense weight (benchmarks/NOTES.md)
RUNGS = ("reference", "avx2", "avx2-vnni", "avx512", "avx512-vnni")

_LIBRARY = Path(__file__).parent / "lib" / "libcalora.so"
if not _LIBRARY.exists():
    raise NotBuiltError(
        f"{_LIBRARY.name} is missing: the package was not built. Run `pip install .` in the source folder (torch installed first)."
    )
_cap = os.environ.get("CALORA_ISA")
if _cap is not None and _cap not in RUNGS:
    raise CaloraError(f"CALORA_ISA={_cap!r} is not a rung; choose one of {', '.join(RUNGS)}")
torch.ops.load_library(str(_LIBRARY))

from . import _native  # noqa: E402  (links against the library loaded above)

native = _native


def linear(
    x: Tensor,
    packed: list[Tensor],
    fmt: WeightFormat,
    in_features: int,
    out_features: int,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    identity_rank: int = 0,
    activations: str = "int8",
    row_adapter: Tensor | None = None,
) -> Tensor:
    """The fused layer. Where a gradient is recorded the exact path runs, so that backward is the derivative of forward.

    float16 x (which no CPU kernel takes) is computed in float32 and returned as float16. On a GPU, where x is multiplied as it
    is, activations are always exact. Under autocast x, bias and bank are cast to its dtype first, as nn.Linear's operands are.

    row_adapter: on a GPU, one bank for each row of x: (rows,) int64 numbers into stacked banks, down (adapters, rank, in_features)
    and up (adapters, out_features, rank) or tiled (adapters, tiles, rank, 32); -1 for none. For inference only. A number that is
    none of theirs makes its row NaN where it cannot be refused without waiting for the GPU.
    """
    recording = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, down, up, bias))
    if recording:
        activations = "exact"
    device = "cuda" if x.is_cuda else "cpu"  # x.device.type takes 0.4 us
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, bias, down, up = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, bias, down, up))
    if x.dtype == torch.float16 and not x.is_cuda:
        x, bias, down, up = (t if t is None else t.float() for t in (x, bias, down, up))
        with _as_they_are(x):
            return linear(x, packed, fmt, in_features, out_features, bias, down, up, identity_rank, activations, row_adapter).half()
    layer = (packed, fmt.id, in_features, out_features, fmt.group_size)
    # Autograd is a Python wrapper of several microseconds: it is passed through only where it does something.
    if recording and not torch.compiler.is_compiling():
        args = (x, *layer, bias, down, up, identity_rank, row_adapter, ACTIVATIONS["exact"])
        return _Computed.apply(_Saved.apply(*args), *args)
    op = torch.ops.calora.linear if recording else torch.ops.calora.linear_inference
    return op.default(x, *layer, bias, down, up, identity_rank, row_adapter, ACTIVATIONS[activations])


def decode(packed: list[Tensor], fmt: WeightFormat, in_features: int, out_features: int, rows: slice | None = None) -> Tensor:
    """Rows of the dense weight, float32, by the native decoder."""
    begin, end = (0, out_features) if rows is None else (rows.start, rows.stop)
    if packed[0].is_cuda:
        packed = [arrange(name, t, fmt, in_features, out_features, packed[0]) for name, t in zip(fmt.names, packed, strict=False)]
    return torch.ops.calora.decode(packed, fmt.id, in_features, out_features, fmt.group_size, begin, end)


def runs_as(fmt: WeightFormat, density: float = 0.5) -> WeightFormat:
    """The format in which the rung in use computes fastest what is stored in ``fmt``, of whose weights that share is kept.

    An unstructured weight needs vpexpandb (avx512-vnni). Without it, putting codes at their places takes a table look-up per 8
    of them, 4 times as long as reading the dense codes, whatever the density: the rungs below run it as a dense weight. With it,
    int4 is bound by placing its codes one by one, and runs in pairs of rows, or as a dense weight where that has fewer bytes.
    Sparse nf4 has a kernel on no rung: each call would expand it. The reference rung runs every format as it is.
    """
    if not fmt.sparse or native.isa() == "reference":
        return fmt
    expands = fmt.pattern == "unstructured" and fmt.values != "nf4" and native.isa() == "avx512-vnni"
    if expands and fmt.values == "int4":
        return replace(fmt, pattern="paired" if density <= MOST_PAIRED else "dense")
    lacking = fmt.values == "nf4" or fmt.pattern == "unstructured"
    return replace(fmt, pattern="dense") if lacking and not expands else fmt


def expand(packed: list[Tensor], fmt: WeightFormat, in_features: int, out_features: int) -> Tensor:
    """A sparse weight as the ``packed`` tensor of the dense format of the same codes and scales: the same weights, bit for bit,
    and exactly 0 where none is kept. The ``scales`` of nf4 are the same tensor in both."""
    return torch.ops.calora.expand(packed, fmt.id, in_features, out_features, fmt.group_size)


def as_it_runs(packed: list[Tensor], fmt: WeightFormat, in_features: int, out_features: int) -> tuple[list[Tensor], WeightFormat]:
    """CPU tensors in ``fmt`` -> what :func:`linear` is fastest with, and its format (:func:`runs_as`)."""
    runs = runs_as(fmt, fmt.density(in_features, out_features, packed[-1].numel()) if fmt.pattern == "unstructured" else 0.5)
    if runs is fmt:
        return packed, fmt
    if runs.pattern == "paired":
        return torch.ops.calora.pair(packed, fmt.id, in_features, out_features, fmt.group_size), runs
    shared = dict(zip(fmt.names, packed, strict=True))
    dense = {"packed": expand(packed, fmt, in_features, out_features)}
    return [dense.get(name, shared.get(name)) for name in runs.names], runs


def tile_up(up: Tensor) -> Tensor:
    """(out_features, rank) -> (tiles, rank, 32): the order in which decoding streams it. Padding rows are 0."""
    out_features, rank = up.shape
    tiles = -(-out_features // TILE_ROWS)
    return pad(up, (0, 0, 0, tiles * TILE_ROWS - out_features)).view(tiles, TILE_ROWS, rank).transpose(1, 2).contiguous()


def untile_up(up: Tensor, out_features: int) -> Tensor:
    """Inverse of :func:`tile_up`."""
    return up.transpose(1, 2).reshape(-1, up.shape[1])[:out_features]


@torch.library.register_fake("calora::linear_inference")
@torch.library.register_fake("calora::linear")
def _(x, packed, format, in_features, out_features, group_size, bias, down, up, identity_rank, row_adapter, activations):
    torch._check(x.shape[-1] == in_features, lambda: f"calora: the last dimension of x must be {in_features}")
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("calora::linear_dx")
def _(grad, packed, format, in_features, out_features, group_size):
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.register_fake("calora::decode")
def _(packed, format, in_features, out_features, group_size, row_begin, row_end):
    return packed[0].new_empty((row_end - row_begin, in_features), dtype=torch.float32)


@torch.library.register_fake("calora::expand")
def _(packed, format, in_features, out_features, group_size):
    values = next(name for name, number in VALUE_IDS.items() if number == format % 16)
    return packed[0].new_empty(Geometry(values, in_features, out_features, group_size, "dense").packed_shape)


def _setup_context(ctx, inputs, output):
    x, packed, fmt, in_features, out_features, group_size, bias, down, up, identity_rank, row_adapter, activations = inputs
    if row_adapter is not None:
        raise CaloraError("one adapter per row is for inference; run it under torch.no_grad()")
    if activations != ACTIVATIONS["exact"]:
        raise CaloraError("int8 activations have no derivative; call calora::linear with activations=0 where gradients are recorded")
    ctx.save_for_backward(x, down, up, *packed)
    ctx.layer = (fmt, in_features, out_features, group_size)
    ctx.identity_rank = identity_rank
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    x, down, up, *packed = ctx.saved_tensors
    need = ctx.needs_input_grad
    grad = grad.to(x.dtype)
    d_down = d_up = None
    with _as_they_are(x):
        dx = torch.ops.calora.linear_dx(grad, packed, *ctx.layer) if need[0] else None
        if down is not None:
            dx, d_down, d_up = _bank_backward(grad, x, down, up, ctx.identity_rank, dx)
            d_down, d_up = d_down if need[7] else None, d_up if need[8] else None
    d_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if need[6] else None
    return dx, [None] * len(packed), None, None, None, None, d_bias, d_down, d_up, None, None, None


class _Saved(torch.autograd.Function):
    """The layer's derivative without the layer: returns what only looks like its output.

    What backward needs is saved here, before anything is computed, and nothing in ``_Computed``. Gradient checkpointing ends the second
    forward pass of a block with the last tensor it saves, so that the last layer, a quarter of a Llama block's products, is left out of it.
    """

    @staticmethod
    def forward(ctx, *inputs) -> Tensor:
        _setup_context(ctx, inputs, None)
        x, out_features = inputs[0], inputs[4]
        return x.new_empty(()).expand(*x.shape[:-1], out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        dx, _, *others = _backward(ctx, grad)
        return dx, None, *others


class _Computed(torch.autograd.Function):
    """The layer's output, whose gradient is that of the first argument."""

    @staticmethod
    def forward(ctx, saved: Tensor, *inputs) -> Tensor:
        return torch.ops.calora.linear_inference.default(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, *[None] * (len(ctx.needs_input_grad) - 1)


def _as_they_are(x: Tensor) -> AbstractContextManager:
    """No autocast: what was cast has been cast, and products that write into each other need one dtype."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _bank_backward(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, identity_rank: int, dx: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx (added to, in place), and the gradients of down and up. Products of matrices in x's dtype, as torch's own would be: in bf16 they
    take a third of the time of fp32 copies of x and grad, which are larger than all else here."""
    x_rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    D, U = down.to(x.dtype), (untile_up(up, grad.shape[-1]) if up.dim() == 3 else up).to(x.dtype)
    t = (x_rows @ D.t()).float()
    d_up = (gelu_rows(t, identity_rank).to(x.dtype).t() @ grad_rows).t().contiguous()  # faster than the other way round
    dt = grad_rows @ U
    if identity_rank < dt.shape[-1]:
        dt = (dt.float() * gelu_rows_derivative(t, identity_rank)).to(x.dtype)
    d_down = dt.t() @ x_rows
    if dx is not None:
        dx.view(-1, dx.shape[-1]).addmm_(dt, D)
    d_up = tile_up(d_up) if up.dim() == 3 else d_up
    return dx, d_down.to(down.dtype), d_up.to(up.dtype)


def gelu_rows(t: Tensor, identity_rank: int) -> Tensor:
    """phi of t (..., rank): identity on the first identity_rank entries, GELU (erf) on the rest."""
    if identity_rank == t.shape[-1]:
        return t
    return torch.cat((t[..., :identity_rank], torch.nn.functional.gelu(t[..., identity_rank:])), dim=-1)


def gelu_rows_derivative(t: Tensor, identity_rank: int) -> Tensor:
    """phi'(t): 1 on the first identity_rank entries, Phi(t) + t * density(t) of the normal distribution on the rest."""
    z = t[..., identity_rank:]
    density = torch.exp(-0.5 * z * z) * 0.3989422804014327  # 1 / sqrt(2 pi)
    slope = 0.5 * (1 + torch.erf(z * 0.7071067811865476)) + z * density
    return torch.cat((torch.ones_like(t[..., :identity_rank]), slope), dim=-1)


DENSE_LINEAR = "(Tensor x, Tensor weight, Tensor? bias, Tensor? down, Tensor? up, int identity_rank, Tensor? row_adapter) -> Tensor"
torch.library.define("calora::dense_linear", DENSE_LINEAR)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, identity_rank: int,
                 row_adapter: Tensor | None = None) -> Tensor:  # fmt: skip
    """The layer on a weight that is decoded already, (out_features, in_features) in x's dtype, by torch's matrix products: what
    the CUDA operator does with many rows of x. The bank comes first, so that the base is added to it inside the product."""
    rows = x.reshape(-1, x.shape[-1])
    shape = (*x.shape[:-1], weight.shape[0])
    bias = None if bias is None else bias.to(x.dtype)
    if down is None or up is None:
        return torch.nn.functional.linear(x, weight, bias)
    if row_adapter is None:
        up = (untile_up(up, weight.shape[0]) if up.dim() == 3 else up).to(x.dtype)
        t = gelu_rows(rows @ down.to(x.dtype).t(), identity_rank)
    else:  # one bank of all ranks side by side, of which each row keeps its own: nothing here waits for the numbers
        up = up.transpose(-1, -2).flatten(1, 2)[:, : weight.shape[0]] if up.dim() == 4 else up
        adapters, rank, _ = down.shape
        own = row_adapter.view(-1, 1) == torch.arange(adapters, device=x.device)
        wrong = (row_adapter < -1) | (row_adapter >= adapters)
        t = gelu_rows((rows @ down.to(x.dtype).flatten(0, 1).t()).view(-1, adapters, rank), identity_rank)
        t = t.masked_fill(~own.unsqueeze(-1), 0).masked_fill(wrong.view(-1, 1, 1), torch.nan).flatten(1)
        up = up.to(x.dtype).transpose(0, 1).flatten(1)
    y = t @ up.t() if bias is None else torch.addmm(bias, t, up.t())
    return y.addmm_(rows, weight.t()).view(shape)


@torch.library.impl("calora::dense_linear", "CompositeExplicitAutograd")
def _(x, weight, bias, down, up, identity_rank, row_adapter):
    with _as_they_are(x):
        return dense_linear(x, weight, bias, down, up, identity_rank, row_adapter)


@torch.library.register_fake("calora::dense_linear")
def _(x, weight, bias, down, up, identity_rank, row_adapter):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


torch.library.register_autograd("calora::linear", _backward, setup_context=_setup_context)
