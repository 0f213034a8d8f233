"""NF4: 16 values that lie where the quantiles of normal weights do, and scales that are quantised themselves.

Dettmers et al., "QLoRA" (arXiv 2305.14314). The book is that of bitsandbytes. A group's scale is its largest magnitude, stored
in 8 bits: an unsigned float of 3 exponent and 5 mantissa bits times the fp32 scale of its tile of 32 rows. Within a tile scales
may differ by a factor of 128 and be stored to 1.6 %; what is smaller loses bits, and 1 / 8000 of the largest becomes 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import TILE_ROWS, ZERO_CODE

BOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
SCALE_SHIFT = 5  # a scale's code, shifted by this, is the fp16 number that it stands for


def small_floats(codes: Tensor) -> Tensor:
    """uint8 codes of scales -> float32: 0 for 0, up to 63 / 8192 for 255."""
    return (codes.to(torch.int16) << SCALE_SHIFT).view(torch.float16).float()


def nearest(values: Tensor, sorted_table: Tensor) -> Tensor:
    """Index of the entry of a sorted table (n,) that is nearest to each value."""
    return torch.bucketize(values, (sorted_table[1:] + sorted_table[:-1]) / 2, out_int32=True)


class NF4:
    name = "nf4"
    grouped = True
    zero_points = False

    @staticmethod
    def scales(codes: Tensor, outer: Tensor) -> Tensor:
        """float32 scales of rows: codes (rows, blocks) uint8, outer (rows,) float32 of each row's tile."""
        return small_floats(codes) * outer.unsqueeze(-1)

    @staticmethod
    def quantize(w: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, None, Tensor]:
        """w: (rows, blocks, block_columns) fp32 that starts a tile -> codes like w (uint8), scale (rows, blocks) uint8 and
        outer scale (tiles,) fp32."""
        largest = w.abs().amax(-1)
        table = small_floats(torch.arange(256, device=w.device))
        outer = pad(largest.amax(-1), (0, -len(w) % TILE_ROWS)).view(-1, TILE_ROWS).amax(-1) / table[-1]
        of_row = outer.repeat_interleave(TILE_ROWS)[: len(w)]
        safe = torch.where(of_row == 0, torch.ones_like(of_row), of_row)
        scale = nearest(largest / safe.unsqueeze(-1), table).to(torch.uint8)
        codes = NF4.codes(w, NF4.scales(scale, of_row).unsqueeze(-1), None).to(torch.uint8)
        return codes, scale, None, outer

    @staticmethod
    def codes(w: Tensor, scale: Tensor, zero: None) -> Tensor:
        """Nearest code of w (..., columns) for a scale (..., 1); what has the scale 0 gets the code of 0."""
        safe = torch.where(scale == 0, torch.full_like(scale, torch.inf), scale)
        return nearest(w / safe, torch.tensor(BOOK, device=w.device))

    @staticmethod
    def value(codes: Tensor, scale: Tensor, zero: None) -> Tensor:
        return torch.tensor(BOOK, device=codes.device)[codes.int()] * scale

    @staticmethod
    def padding(zero: None) -> int:
        """The code that decodes to exactly 0."""
        return ZERO_CODE["nf4"]
