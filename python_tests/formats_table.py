"""The weight formats under test, and masks for the sparse ones: a format is a row of this table, not a test of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from calora_ext import CompressedLinear, WeightFormat
from calora_ext.formats import nf4
from calora_ext.linear import dense_weight

DENSE = [
    WeightFormat("int4", 32), WeightFormat("int4", 64), WeightFormat("int4", 128), WeightFormat("int4", -1),
    WeightFormat("int4", 64, symmetric=False), WeightFormat("int8"), WeightFormat("bf16"),
    WeightFormat("nf4", 32), WeightFormat("nf4", 64), WeightFormat("nf4", -1),
]  # fmt: skip
SPARSE = [
    WeightFormat("int4", 32, pattern="2:4"), WeightFormat("int4", 128, pattern="2:4"), WeightFormat("int4", -1, pattern="2:4"),
    WeightFormat("int8", pattern="2:4"), WeightFormat("bf16", pattern="2:4"),
    WeightFormat("int4", 32, pattern="unstructured"), WeightFormat("int4", 128, pattern="unstructured"),
    WeightFormat("int4", -1, pattern="unstructured"), WeightFormat("int8", pattern="unstructured"),
    WeightFormat("bf16", pattern="unstructured"),
    WeightFormat("nf4", 64, pattern="2:4"), WeightFormat("nf4", 128, pattern="unstructured"),
]  # fmt: skip
FORMATS = DENSE + SPARSE
PAIRED = [WeightFormat("int4", group, pattern="paired") for group in (32, 128, -1)]  # what runs in place of another; in no file
# What a code stands for, but for its scale: position in the table = code, where no zero point is stored.
LEVELS = {"int4": torch.arange(-8.0, 8), "int8": torch.arange(-128.0, 128), "nf4": torch.tensor(nf4.BOOK)}


def nearest_level(w: Tensor, fmt: WeightFormat, scale: Tensor, zero: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes nearest to w (n,) for float64 scales (n,), and the float64 values they stand for; by trying every code."""
    levels = LEVELS[fmt.values].double().expand(len(w), -1)
    if fmt.values == "int8":  # -128 is not used
        levels = levels.clamp(min=-127)
    if zero is not None:
        levels = torch.arange(16).double() - zero.unsqueeze(1)
    values = levels * scale.unsqueeze(1)
    codes = (values - w.unsqueeze(1)).abs().argmin(1)
    return codes, values.gather(1, codes.unsqueeze(1)).squeeze(1)


def mask_for(fmt: WeightFormat, shape: tuple[int, int], density: float = 0.5, seed: int = 0) -> Tensor | None:
    """A random mask (out, in) of about that density, as far as the pattern goes; None for a dense format."""
    if not fmt.sparse:
        return None
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    mask = noise < density
    if fmt.pattern == "2:4":  # of each four the two smallest at most
        groups = pad(noise, (0, -shape[1] % 4), value=2.0).view(shape[0], -1, 4)
        best = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.argsort(-1)[..., :2], True)
        mask &= best.view(shape[0], -1)[:, : shape[1]]
    return mask


def compress_linear(module: nn.Module, fmt: WeightFormat) -> CompressedLinear:
    """An nn.Linear or Conv1D in that format."""
    return CompressedLinear.from_linear(module, fmt, mask=mask_for(fmt, tuple(dense_weight(module).shape)))


def pack(fmt: WeightFormat, weight: Tensor, density: float = 0.5, seed: int = 0) -> dict[str, Tensor]:
    """`weight` in that format; the sparse ones keep about `density` of it."""
    return fmt.pack(weight, mask_for(fmt, tuple(weight.shape), density, seed))
