"""The dense pattern: every weight is kept, codes lie in steps of 128 bytes (picture: ``csrc/layouts.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import BITS, TILE_ROWS, Geometry, check_finite

STEP_COLUMNS = {"bf16": 2, "int8": 4, "int4": 8, "nf4": 8}  # columns in one 128-byte step of a tile


class Dense:
    name = "dense"
    sparse = False

    @staticmethod
    def shapes(g: Geometry, extent: int) -> dict[str, tuple[int, ...]]:
        """Tensors beside ``packed``: none."""
        return {}

    @staticmethod
    def check(data: Tensor, packed: dict[str, Tensor], g: Geometry) -> None:
        """Whatever the bytes are, they lead nowhere outside. Raises CaloraError for bf16 that is not finite."""
        check_finite(g.values, data)

    @staticmethod
    def tile(codes: Tensor, mask: None, g: Geometry) -> tuple[Tensor, dict[str, Tensor]]:
        """Bytes of the codes, (tiles, blocks, code_bytes) uint8.

        codes: (tiles * 32, columns), already padded; bfloat16 for bf16, else uint8.
        """
        step = STEP_COLUMNS[g.values]
        c = codes.view(g.tiles, TILE_ROWS, g.blocks, g.block_columns // step, step).permute(0, 2, 3, 1, 4)
        if BITS[g.values] == 4:
            c = c[..., :4] | (c[..., 4:] << 4)
        return c.contiguous().view(torch.uint8).view(g.tiles, g.blocks, g.code_bytes), {}

    @staticmethod
    def untile(data: Tensor, packed: dict[str, Tensor], g: Geometry) -> tuple[Tensor, None]:
        """Inverse of :meth:`tile`: (tiles, blocks, code_bytes) uint8 -> codes (tiles * 32, columns) and no mask."""
        step = STEP_COLUMNS[g.values]
        if g.values == "bf16":
            data = data.contiguous().view(torch.bfloat16)
        c = data.reshape(g.tiles, g.blocks, g.block_columns // step, TILE_ROWS, -1)
        if BITS[g.values] == 4:
            c = torch.cat((c & 15, c >> 4), dim=-1)
        return c.permute(0, 3, 1, 2, 4).reshape(g.tiles * TILE_ROWS, g.columns), None
