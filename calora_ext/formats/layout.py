"""How codes lie in the packed bytes: the Python side of ``csrc/layouts.h``, which draws the pictures.

Everything here is the slow, obvious version on torch tensors; the kernels read the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CaloraError

LAYOUT_VERSION = 1
TILE_ROWS = 32  # rows in a tile
COLUMN_ALIGN = 32  # columns are padded to a multiple of this, or of the group
TILE_ALIGN = 64  # bytes; packed tensors are multiples of it
SCALE_BYTES = 2 * TILE_ROWS  # fp16 scales that end a block of int4 or int8
ZERO_BYTES = TILE_ROWS // 2  # zero points of a block, two nibbles a byte

CHUNK = 1 << 20  # weights that are rounded, or put into tiles, at a time: what is made of them on the way takes many times their bytes

VALUE_IDS = {"bf16": 0, "int8": 1, "int4": 2, "nf4": 3}
PATTERN_IDS = {"dense": 0, "2:4": 1, "unstructured": 2, "paired": 3}
BITS = {"bf16": 16, "int8": 8, "int4": 4, "nf4": 4}
ZERO_CODE = {"bf16": 0, "int8": 128, "int4": 8, "nf4": 7}  # what a weight of 0 is stored as, where no zero point is


def round_up(n: int, to: int) -> int:
    return (n + to - 1) // to * to


def code_bytes(pattern: str, values: str, columns: int) -> int:
    """Bytes of `columns` columns of one tile but for scales: codes and what says where they belong, as far as a block has them."""
    bits = {"dense": BITS[values], "2:4": BITS[values] // 2 + 1, "unstructured": 1, "paired": 0.5}[pattern]
    return int(TILE_ROWS * columns * bits) // 8


def check_finite(values: str, codes: Tensor) -> None:
    """Raises CaloraError for bf16 codes, uint8 with the last dimension contiguous, that are NaN or infinite; others cannot be."""
    if values == "bf16":
        numbers = codes.view(torch.bfloat16)
        if not all(part.isfinite().all() for part in numbers.split(max(1, CHUNK * len(numbers) // max(1, numbers.numel())))):
            raise CaloraError("a packed weight holds NaN or infinite values; the file is damaged")


@dataclass(frozen=True)
class Geometry:
    """Where everything of one packed weight lies; the fields mirror ``calora::Geometry``."""

    values: str
    in_features: int
    out_features: int
    group_size: int  # columns that share a scale, or -1 for all of them
    pattern: str = "dense"

    @property
    def tiles(self) -> int:
        return round_up(self.out_features, TILE_ROWS) // TILE_ROWS

    @property
    def chunk_rows(self) -> int:
        """Rows, whole tiles, of a chunk."""
        return round_up(max(1, CHUNK // self.columns), TILE_ROWS)

    @property
    def columns(self) -> int:
        return round_up(self.in_features, self.group_size if self.group_size > 0 else COLUMN_ALIGN)

    @property
    def block_columns(self) -> int:
        return self.group_size if self.group_size > 0 else self.columns

    @property
    def blocks(self) -> int:
        return self.columns // self.block_columns

    @property
    def code_bytes(self) -> int:
        """Bytes of one block but for its scales."""
        return code_bytes(self.pattern, self.values, self.block_columns)

    @property
    def block_bytes(self) -> int:
        return self.code_bytes + (SCALE_BYTES if self.values in ("int4", "int8") else 0)

    @property
    def packed_shape(self) -> tuple[int, int]:
        return (self.tiles, self.blocks * self.block_bytes)

    @property
    def scale_codes_shape(self) -> tuple[int, int, int]:
        """Of nf4: a byte per row of every block."""
        return (self.tiles, self.blocks, TILE_ROWS)

    @property
    def scales_shape(self) -> tuple[int]:
        return (round_up(math.prod(self.scale_codes_shape) + 4 * self.tiles, TILE_ALIGN),)

    @property
    def zeros_shape(self) -> tuple[int]:
        return (round_up(self.tiles * self.blocks * ZERO_BYTES, TILE_ALIGN),)


def tile_scales(scale: Tensor, g: Geometry) -> Tensor:
    """(tiles * 32, blocks) fp16 -> (tiles, blocks, 64) uint8."""
    return scale.view(g.tiles, TILE_ROWS, g.blocks).transpose(1, 2).contiguous().view(torch.uint8)


def untile_scales(data: Tensor, g: Geometry) -> Tensor:
    """Inverse of :func:`tile_scales`; a copy, because a file may not be aligned to 2 bytes."""
    return data.clone(memory_format=torch.contiguous_format).view(torch.float16).transpose(1, 2).reshape(g.tiles * TILE_ROWS, g.blocks)


def join_scales(codes: Tensor, outer: Tensor, g: Geometry) -> Tensor:
    """Scale codes (tiles * 32, blocks) uint8 and outer scales (tiles,) fp32 -> the padded ``scales`` tensor, uint8."""
    parts = torch.cat((tile_scales(codes, g).view(-1), outer.view(torch.uint8)))
    return torch.nn.functional.pad(parts, (0, g.scales_shape[0] - len(parts)))


def split_scales(data: Tensor, g: Geometry) -> tuple[Tensor, Tensor]:
    """The ``scales`` tensor -> scale codes (tiles, blocks, 32) uint8, a view, and outer scales (tiles,) fp32, a copy, because a
    file may not be aligned to 4 bytes."""
    n = math.prod(g.scale_codes_shape)
    return data[:n].view(g.scale_codes_shape), data[n : n + 4 * g.tiles].clone().view(torch.float32)


def tile_zeros(zero: Tensor, g: Geometry) -> Tensor:
    """(tiles * 32, blocks) uint8 zero points -> the padded ``zeros`` tensor, uint8."""
    z = zero.view(g.tiles, 2, TILE_ROWS // 2, g.blocks)
    nibbles = (z[:, 0] | (z[:, 1] << 4)).transpose(1, 2).reshape(-1)  # (tiles, blocks, 16)
    out = zero.new_zeros(g.zeros_shape)
    out[: nibbles.numel()] = nibbles
    return out


def untile_zeros(data: Tensor, g: Geometry) -> Tensor:
    """Inverse of :func:`tile_zeros`."""
    n = data[: g.tiles * g.blocks * ZERO_BYTES].view(g.tiles, g.blocks, ZERO_BYTES)
    return torch.cat((n & 15, n >> 4), dim=-1).transpose(1, 2).reshape(g.tiles * TILE_ROWS, g.blocks)
