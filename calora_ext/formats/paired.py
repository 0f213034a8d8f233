"""Pairs of rows: what an unstructured int4 weight runs as where there is vpexpandb (picture: ``csrc/layouts.h``).

Made at load by ``ops.as_it_runs`` and never saved. A bit stands for the weights of rows r and 16 + r of a tile in one column, a
byte holds both codes. Which of the two the mask kept is forgotten: a weight of 0 is a weight of 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CaloraError
from .bitmask import CHUNK_COLUMNS, UNIT, Bitmask, tail_bytes
from .layout import TILE_ALIGN, TILE_ROWS, ZERO_CODE, Geometry, round_up

STEP_COLUMNS = 4  # of a register: 16 pairs of rows by 4 columns
PAIRS = TILE_ROWS // 2 * CHUNK_COLUMNS  # of a chunk


class Paired:
    name = "paired"
    sparse = True
    shapes = Bitmask.shapes

    @staticmethod
    def tile(codes: Tensor, mask: Tensor, g: Geometry) -> tuple[Tensor, dict[str, Tensor]]:
        """Bits (tiles, blocks, code_bytes) uint8, and the tensors of :meth:`shapes`; codes, mask: (tiles * 32, columns)."""
        _check_values(g)
        codes = torch.where(mask, codes, ZERO_CODE[g.values])
        steps = codes.view(g.tiles, 2, TILE_ROWS // 2, -1, CHUNK_COLUMNS // STEP_COLUMNS, STEP_COLUMNS)
        pairs = (steps[:, 0] | steps[:, 1] << 4).permute(0, 2, 3, 1, 4).reshape(-1, PAIRS)  # (chunks, pairs in the order of bits)
        bits = pairs != _nothing(g)
        powers = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8)
        data = (bits.view(-1, 8) * powers).sum(-1, dtype=torch.uint8).view(g.tiles, g.blocks, g.code_bytes)
        starts, extent = _starts(bits, g)
        offsets = torch.zeros(Paired.shapes(g, 0)["offsets"], dtype=torch.uint8)
        offsets[: 4 * len(starts)] = (starts // UNIT).to(torch.int32).view(torch.uint8)
        kept = torch.zeros(extent, dtype=torch.uint8)
        for start, chunk, chosen in zip(starts.tolist(), pairs, bits, strict=True):
            kept[start : start + int(chosen.sum())] = chunk[chosen]
        return data, {"offsets": offsets, "kept": kept}

    @staticmethod
    def untile(data: Tensor, packed: dict[str, Tensor], g: Geometry) -> tuple[Tensor, Tensor]:
        """Inverse of :meth:`tile`: codes and which of them are not 0, (tiles * 32, columns)."""
        bits = _bits(data)
        starts, _ = _starts(bits, g)
        pairs = torch.full(bits.shape, _nothing(g), dtype=torch.uint8)
        for start, chunk, chosen in zip(starts.tolist(), pairs, bits, strict=True):
            chunk[chosen] = packed["kept"][start : start + int(chosen.sum())]
        steps = pairs.view(g.tiles, -1, CHUNK_COLUMNS // STEP_COLUMNS, TILE_ROWS // 2, STEP_COLUMNS).permute(0, 3, 1, 2, 4)
        codes = torch.stack((steps & 15, steps >> 4), dim=1).reshape(g.tiles * TILE_ROWS, g.columns)
        return codes, codes != ZERO_CODE[g.values]

    @staticmethod
    def check(data: Tensor, packed: dict[str, Tensor], g: Geometry) -> None:
        """Raises CaloraError unless the offsets and the length of ``kept`` are those that the bits demand."""
        _check_values(g)
        starts, extent = _starts(_bits(data), g)
        if packed["kept"].numel() != extent or not torch.equal(packed["offsets"].view(torch.int32)[: len(starts)].long() * UNIT, starts):
            raise CaloraError("the bits, offsets and codes of a weight in pairs of rows do not belong together")


def _check_values(g: Geometry) -> None:
    if g.values != "int4":
        raise CaloraError(f"weights in pairs of rows are int4, not {g.values}")


def _nothing(g: Geometry) -> int:
    return ZERO_CODE[g.values] * 0x11


def _bits(data: Tensor) -> Tensor:
    """(chunks, pairs) bool."""
    return (data.reshape(-1, 1) >> torch.arange(8, dtype=torch.uint8) & 1).bool().view(-1, PAIRS)


def _starts(bits: Tensor, g: Geometry) -> tuple[Tensor, int]:
    """Where each chunk starts in ``kept`` (bytes), and how long ``kept`` is."""
    sizes = -(-bits.sum(-1) // UNIT) * UNIT
    return sizes.cumsum(0) - sizes, round_up(int(sizes.sum()) + tail_bytes(g.values), TILE_ALIGN)
