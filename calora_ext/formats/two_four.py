"""The 2:4 pattern: of every four columns of a row at most two are kept (picture: ``csrc/layouts.h``).

A group of four columns stores two codes and two 2-bit positions p0, p1, which also say how many are kept:
``p0 < p1``: both; ``p0 == p1``: the first alone; ``p0 > p1``: none. What is not kept holds the code of 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CaloraError
from .layout import BITS, TILE_ROWS, ZERO_CODE, Geometry, check_finite

GROUP, KEEP = 4, 2
TURN_COLUMNS = 32  # columns whose positions fill whole bytes: a block is a sequence of turns


class TwoFour:
    name = "2:4"
    sparse = True

    @staticmethod
    def check_mask(mask: Tensor) -> None:
        """mask: (out, columns) bool, columns a multiple of 4. Raises CaloraError where it keeps more than two of four."""
        kept = mask.view(len(mask), -1, GROUP).sum(-1)
        if (kept > KEEP).any():
            row, group = (kept > KEEP).nonzero()[0].tolist()
            raise CaloraError(
                f"the mask keeps {int(kept[row, group])} of the four weights at row {row}, columns {GROUP * group} to "
                f"{GROUP * group + 3}; 2:4 holds two: prune the weight first, or let a Recipe with sparsity='2:4' do it"
            )

    @staticmethod
    def shapes(g: Geometry, extent: int) -> dict[str, tuple[int, ...]]:
        """Tensors beside ``packed``: none."""
        return {}

    @staticmethod
    def check(data: Tensor, packed: dict[str, Tensor], g: Geometry) -> None:
        """Whatever the bytes are, they lead nowhere outside. Raises CaloraError for bf16 that is not finite."""
        turns = data.unflatten(-1, (g.block_columns // TURN_COLUMNS, -1))
        check_finite(g.values, turns[..., : -TILE_ROWS * TURN_COLUMNS // 8])  # but for the places

    @staticmethod
    def tile(codes: Tensor, mask: Tensor, g: Geometry) -> tuple[Tensor, dict[str, Tensor]]:
        """Bytes of kept codes and positions, (tiles, blocks, code_bytes) uint8; codes, mask: (tiles * 32, columns)."""
        TwoFour.check_mask(mask)
        parts = zip(codes.split(g.chunk_rows), mask.split(g.chunk_rows), strict=True)
        return torch.cat([TwoFour._tiled(c, m, replace(g, out_features=len(c))) for c, m in parts]), {}

    @staticmethod
    def _tiled(codes: Tensor, mask: Tensor, g: Geometry) -> Tensor:
        m = mask.view(len(mask), -1, GROUP).to(torch.uint8)
        first = m.argmax(-1, keepdim=True)
        last = GROUP - 1 - m.flip(-1).argmax(-1, keepdim=True)
        kept = codes.view(len(codes), -1, GROUP)
        pair = torch.cat((kept.gather(-1, first), kept.gather(-1, last)), dim=-1)
        # Stored with the bits of the code of 0 turned, so that a place which is not kept is 0 in every value type.
        if g.values != "bf16":
            pair = pair ^ ZERO_CODE[g.values]
        empty = m.sum(-1, keepdim=True) == 0  # there argmax finds 0 and 3
        pair = torch.where(torch.cat((empty, empty | (first == last)), dim=-1), pair.new_zeros(()), pair)
        places = torch.cat((torch.where(empty, 1, first), torch.where(empty, 0, last)), dim=-1).to(torch.uint8)
        turns = g.columns // TURN_COLUMNS
        places = places.view(g.tiles, TILE_ROWS, turns, 4, 4)  # substeps of 8 columns, 2 groups of 2 places
        places = places[..., 0, :] | places[..., 1, :] << 2 | places[..., 2, :] << 4 | places[..., 3, :] << 6
        places = places.transpose(1, 2).reshape(g.tiles, turns, -1)
        if g.values == "bf16":
            pair = pair.view(g.tiles, TILE_ROWS, turns, 8, 2)
        else:
            pair = pair.view(g.tiles, TILE_ROWS, turns, 4, 4)
            if BITS[g.values] == 4:
                pair = pair[..., 0::2, :] | pair[..., 1::2, :] << 4
        pair = pair.permute(0, 2, 3, 1, 4).contiguous().view(torch.uint8).view(g.tiles, turns, -1)
        return torch.cat((pair, places), dim=-1).view(g.tiles, g.blocks, g.code_bytes)

    @staticmethod
    def kept(data: Tensor, g: Geometry) -> int:
        """How many weights the bytes of :meth:`tile` keep."""
        places = data.reshape(g.tiles, g.columns // TURN_COLUMNS, -1)[..., -4 * TILE_ROWS :]
        first, last = places[..., 0::2], places[..., 1::2]
        pairs = [(first >> shift & 3, last >> shift & 3) for shift in (0, 2, 4, 6)]
        return sum(int((a <= b).sum() + (a < b).sum()) for a, b in pairs)

    @staticmethod
    def untile(data: Tensor, packed: dict[str, Tensor], g: Geometry) -> tuple[Tensor, Tensor]:
        """Inverse of :meth:`tile`: codes and mask, (tiles * 32, columns)."""
        turns = g.columns // TURN_COLUMNS
        data = data.reshape(g.tiles, turns, -1)
        pair, places = data[..., : -4 * TILE_ROWS], data[..., -4 * TILE_ROWS :]
        if g.values == "bf16":
            pair = pair.contiguous().view(torch.bfloat16).view(g.tiles, turns, 8, TILE_ROWS, 2)
        else:
            pair = pair.reshape(g.tiles, turns, -1, TILE_ROWS, 4)
            if BITS[g.values] == 4:
                pair = torch.stack((pair & 15, pair >> 4), dim=3).flatten(2, 3)
            pair = pair ^ ZERO_CODE[g.values]
        pair = pair.permute(0, 3, 1, 2, 4).reshape(g.tiles * TILE_ROWS, -1, KEEP)
        places = places.reshape(g.tiles, turns, TILE_ROWS, 1, 4)
        places = torch.cat([places >> shift & 3 for shift in (0, 2, 4, 6)], dim=3)  # (tiles, turns, 32, substeps, 4)
        places = places.transpose(1, 2).reshape(g.tiles * TILE_ROWS, -1, KEEP)
        first, last = places[..., :1], places[..., 1:]
        at = torch.arange(GROUP, dtype=torch.uint8)
        is_first, is_last = (at == first) & (first <= last), (at == last) & (first < last)
        filler = pair.new_full((), ZERO_CODE[g.values])
        codes = torch.where(is_first, pair[..., :1], torch.where(is_last, pair[..., 1:], filler))
        return codes.view(-1, g.columns), (is_first | is_last).view(-1, g.columns)
