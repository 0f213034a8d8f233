"""``MaskedLinear``: a sparse weight with a LoRA under its mask, y = x (mask * (W + s U D))^T + b, in one GEMM.

U D has the mask's zeros, so that folding it in keeps the sparsity: nothing is left of the adapter at run time. The gradients are
exact and need no second weight: with G = s (dL/dy)^T x * mask they are dL/dD = U^T G and dL/dU = G D^T. A few kept weights may also train
one by one, y = x (mask * (W + s U D) + S)^T (RoSA, arXiv 2401.04679): their gradients are entries of G / s, which is there already. With a
``Rounding`` the layer multiplies by what the packed weight will be; these gradients are then straight-through.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ..formats import WeightFormat
from ..linear import dense_weight
from .rounding import Rounding


def merged(base: Tensor, mask: Tensor, down: Tensor, up: Tensor, scale: float, values: Tensor | None = None, at: Tensor | None = None) -> Tensor:
    """mask * (base + scale * up down), plus values (n,) at (n,), numbers of kept weights: (out, in). base is 0 outside the mask already."""
    weight = torch.addmm(base, up, down, alpha=scale).masked_fill_(~mask, 0.0)
    return weight if values is None else weight.put_(at, values, accumulate=True)


class _MaskedProduct(torch.autograd.Function):
    """x (..., in) times the merged weight, rounded where asked, transposed: (..., out). The weight is formed again in backward, not kept."""

    @staticmethod
    def forward(
        ctx, x: Tensor, base: Tensor, mask: Tensor, down: Tensor, up: Tensor, scale: float, rounding: Rounding | None = None,
        values: Tensor | None = None, at: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, base, mask, down, up, values, at)
        ctx.scale, ctx.rounding = scale, rounding
        return linear(x, _rounded(merged(base, mask, down, up, scale, values, at), rounding).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, base, mask, down, up, values, at = ctx.saved_tensors
        to_x = to_down = to_up = to_values = None
        if ctx.needs_input_grad[0]:
            to_x = grad @ _rounded(merged(base, mask, down, up, ctx.scale, values, at), ctx.rounding).to(grad.dtype)
        if any(ctx.needs_input_grad[i] for i in (3, 4, 7)):
            product = grad.flatten(0, -2).t() @ x.flatten(0, -2).to(grad.dtype)  # (out, in)
            product = product.to(base.dtype)
            to_values = None if values is None else product.take(at)
            product = product.masked_fill_(~mask, 0.0).mul_(ctx.scale)
            to_down, to_up = up.t() @ product, product @ down.t()
        return to_x, None, None, to_down, to_up, None, None, to_values, None


def _rounded(weight: Tensor, rounding: Rounding | None) -> Tensor:
    return weight if rounding is None else rounding(weight)


class MaskedLinear(nn.Linear):
    """Stands for a dense linear layer while its sparse version is trained.

    base: (out, in) float32, the sparse weight without the adapter, 0 where mask (out, in) bool is False. lora_A (rank, in),
    lora_B (out, rank): the adapter, fp32; branch (n,): what is added to single weights, those numbered ``at``, or None. rounding: of their
    sum, or None. prepared: what the next adapter begins with, "down" and "up" or nothing, and "at". dense: the layer as it was, which
    ``as_dense`` runs instead.
    """

    def __init__(self, dense: nn.Module) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: the weight is formed from the parts
        weight = dense_weight(dense)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("base", weight.float(), persistent=False)
        self.register_buffer("mask", weight != 0, persistent=False)
        self.bias = dense.bias
        self.scale = 1.0
        self.lora_A = self.lora_B = self.branch = None
        self.prepared: dict[str, Tensor] = {}
        self.rounding: Rounding | None = None
        self.running_dense = False
        self.__dict__["dense"] = dense  # not a child: its parameters are not this model's
        self.train(dense.training)

    @property
    def weight(self) -> Tensor:
        """What it multiplies by, (out, in) float32."""
        return _rounded(self.master, self.rounding)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise AttributeError("the weight of a MaskedLinear is formed from base, mask and adapter; set those")

    @property
    def master(self) -> Tensor:
        """The weight before rounding, (out, in) float32."""
        with torch.no_grad():
            return self.base if self.lora_A is None else merged(self.base, self.mask, self.lora_A, self.lora_B, self.scale, self.branch, self.at)

    @property
    def at(self) -> Tensor | None:
        return self.prepared.get("at")

    @property
    def rank(self) -> int:
        return 0 if self.lora_A is None else len(self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        if self.running_dense:
            return self.dense(x)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            if self.lora_A is None:
                y = linear(x, self.weight.to(x.dtype))
            else:
                y = _MaskedProduct.apply(x, self.base, self.mask, self.lora_A, self.lora_B, self.scale, self.rounding, self.branch, self.at)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def fold(self) -> None:
        """Add the adapter to the base and forget it: what the layer computes stays the same, bit for bit."""
        self.base = self.master
        self.lora_A = self.lora_B = self.branch = None
        self.prepared = {}

    def keep(self, weight: Tensor, mask: Tensor) -> None:
        """Become weight * mask, (out, in), without an adapter and without rounding."""
        self.base, self.mask = weight.float().masked_fill(~mask, 0.0), mask
        self.lora_A = self.lora_B = self.branch = self.rounding = None
        self.prepared = {}

    def round_to(self, fmt: WeightFormat) -> None:
        """From now on compute with what a format keeps of the weight, the scales being those of the weight as it is."""
        self.rounding = Rounding(fmt, self.master, self.mask)

    def adapt(self, rank: int, scale: float, generator: torch.Generator) -> None:
        """A fresh adapter of any rank, which changes nothing yet: D uniform in +-1/sqrt(in_features), U zero; or what was prepared."""
        bound = 1 / math.sqrt(self.in_features)
        self.scale = scale
        down = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)  # drawn in any case: other layers' draws follow
        up = self.base.new_zeros(self.out_features, rank)
        self.lora_A = nn.Parameter(self.prepared.get("down", down).to(self.base.device))
        self.lora_B = nn.Parameter(self.prepared.get("up", up))
        self.branch = None if self.at is None else nn.Parameter(self.base.new_zeros(len(self.at)))


@contextmanager
def as_dense(layers: Iterable[MaskedLinear]) -> Iterator[None]:
    """The model that the layers lie in computes what it did before they replaced its own."""
    layers = list(layers)
    for layer in layers:
        layer.running_dense = True
    try:
        yield
    finally:
        for layer in layers:
            layer.running_dense = False
