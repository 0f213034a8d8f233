"""How a kept weight is stored: bf16, int8 (one scale per row), int4 (groups, symmetric or with zero points), nf4 (``nf4.py``).

A value type turns a padded weight (rows, blocks, block_columns) into codes and back:
``weight = scale * (code - zero)``, or ``scale * book[code]``. It knows nothing of bytes (``layout.py``) or of sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import TILE_ROWS, ZERO_CODE
from .nf4 import NF4

INT4_ZERO, INT4_MAX = ZERO_CODE["int4"], 15
INT8_ZERO, INT8_MAX = ZERO_CODE["int8"], 127
# Clipping a group's extreme weights trades a large error on few for a small one on many; the least squared error wins.
SHRINK = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)


@dataclass(frozen=True)
class Quantized:
    """Codes of a weight. codes: (out, in) uint8 (bfloat16 for bf16); scale: (out, blocks) fp16 (uint8 codes for nf4); zero:
    (out, blocks) uint8; mask: (out, in) bool, the weights that a sparse pattern keeps; outer_scale: (tiles,) fp32.

    scale is None for bf16; zero is None when the zero point is the middle code; mask is None for a dense weight; outer_scale is
    None but for nf4.
    """

    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    mask: Tensor | None = None
    outer_scale: Tensor | None = None

    def scales(self) -> Tensor | None:
        """The scale of each group, (out, blocks) float32; None for bf16."""
        if self.scale is None or self.outer_scale is None:
            return None if self.scale is None else self.scale.float()
        return NF4.scales(self.scale, self.outer_scale.repeat_interleave(TILE_ROWS)[: len(self.scale)])


def int4_codes(w: Tensor, scale: Tensor, zero: Tensor | int) -> Tensor:
    """Nearest code of w (..., columns) for a scale and zero point (..., 1); float tensor of integers in 0..15."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((w / safe).round_() + zero).clamp_(0, INT4_MAX)


def _keep_better(best: list[Tensor], error: Tensor, *candidate: Tensor) -> None:
    """best = [error, ...]: per group, replace what has the larger error."""
    better = error < best[0]
    for i, new in enumerate((error, *candidate)):
        best[i] = torch.where(better, new, best[i])


def int4_scales(w: Tensor, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scale (fp16) and zero point (uint8, or None) of each group, chosen by squared error over a few clip ratios.

    w: (..., columns) float32 -> (..., 1). The symmetric scale carries the sign that maps the group's extreme weight to
    the code 0, because -8 reaches further than +7.
    """
    if symmetric:
        high, low = w.amax(-1, keepdim=True), w.amin(-1, keepdim=True)
        extreme = torch.where(high > -low, high, low)
        candidates = [(extreme / -8 * s, INT4_ZERO) for s in SHRINK] + [(extreme / 7, INT4_ZERO)]
    else:
        high, low = w.amax(-1, keepdim=True).clamp_min(0), w.amin(-1, keepdim=True).clamp_max(0)
        candidates = []
        for s in SHRINK:
            scale = (high - low) * (s / INT4_MAX)
            safe = torch.where(scale == 0, torch.ones_like(scale), scale)
            candidates.append((scale, (-low * s / safe).round().clamp(0, INT4_MAX)))
    # A scale beyond fp16 never wins (its error is not a number): what stays infinite is refused by the caller.
    best: list[Tensor] = [torch.full_like(w[..., :1], torch.inf) for _ in range(3)]
    for scale, zero in candidates:
        scale = scale.half().float()
        error = ((int4_codes(w, scale, zero) - zero) * scale - w).square_().sum(-1, keepdim=True)
        _keep_better(best, error, scale, torch.as_tensor(zero, dtype=w.dtype).expand_as(scale))
    return best[1].half(), None if symmetric else best[2].to(torch.uint8)


class Int4:
    name = "int4"
    grouped = True  # takes a group_size
    zero_points = True  # may have them

    @staticmethod
    def quantize(w: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None, None]:
        """w: (rows, blocks, block_columns) fp32 -> codes like w (uint8), scale and zero (rows, blocks)."""
        scale, zero = int4_scales(w, symmetric)
        codes = Int4.codes(w, scale.float(), None if zero is None else zero.float()).to(torch.uint8)
        return codes, scale.squeeze(-1), None if zero is None else zero.squeeze(-1), None

    @staticmethod
    def codes(w: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Nearest code of w (..., columns), whole numbers, for a float scale and zero point (..., 1)."""
        return int4_codes(w, scale, INT4_ZERO if zero is None else zero)

    @staticmethod
    def value(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """What codes (..., columns) stand for, for a float scale and zero point (..., 1)."""
        return (codes.float() - (INT4_ZERO if zero is None else zero)) * scale

    @staticmethod
    def padding(zero: Tensor | None) -> Tensor | int:
        """The code that decodes to exactly 0."""
        return INT4_ZERO if zero is None else zero.unsqueeze(-1)


class Int8:
    name = "int8"
    grouped = False
    zero_points = False

    @staticmethod
    def quantize(w: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, None, None]:
        scale = (w.abs().amax(-1, keepdim=True) / INT8_MAX).half()
        return Int8.codes(w, scale.float(), None).to(torch.uint8), scale.squeeze(-1), None, None

    @staticmethod
    def codes(w: Tensor, scale: Tensor, zero: None) -> Tensor:
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        return (w / safe).round_().clamp_(-INT8_MAX, INT8_MAX).add_(INT8_ZERO)

    @staticmethod
    def value(codes: Tensor, scale: Tensor, zero: None) -> Tensor:
        return (codes.float() - INT8_ZERO) * scale

    @staticmethod
    def padding(zero: None) -> int:
        return INT8_ZERO


class BF16:
    name = "bf16"
    grouped = False
    zero_points = False

    @staticmethod
    def codes(w: Tensor, scale: None, zero: None) -> Tensor:
        return w.to(torch.bfloat16)

    @staticmethod
    def quantize(w: Tensor, symmetric: bool) -> tuple[Tensor, None, None, None]:
        return BF16.codes(w, None, None), None, None, None

    @staticmethod
    def value(codes: Tensor, scale: None, zero: None) -> Tensor:
        return codes.float()

    @staticmethod
    def padding(zero: None) -> int:
        return 0


VALUES = {v.name: v for v in (BF16, Int8, Int4, NF4)}


def dequantize(values: str, codes: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    """codes (rows, blocks, block_columns), float32 scales and zero points (rows, blocks) -> float32 weights like codes."""
    last = [None if t is None else t.float().unsqueeze(-1) for t in (scale, zero)]
    return VALUES[values].value(codes, *last)
