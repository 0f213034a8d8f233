"""The unstructured pattern: any weight may be kept (picture: ``csrc/layouts.h``).

``packed`` holds a bit per weight where other formats hold codes, and the scales. The codes of the kept weights lie one after
the other in ``kept``, chunk by chunk (32 rows by 32 columns); ``offsets`` says where each chunk starts. How dense a chunk is
decides how long it is: sparse rows cost what they hold.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..errors import CaloraError
from .layout import BITS, TILE_ALIGN, TILE_ROWS, ZERO_CODE, Geometry, check_finite, round_up

CHUNK_COLUMNS = 32
CHUNK_WEIGHTS = TILE_ROWS * CHUNK_COLUMNS
UNIT = 8  # bytes: chunks start at multiples of it, offsets count them
STEP_COLUMNS = {"bf16": 2, "int8": 4, "int4": 4, "nf4": 4}  # columns in one step of bits: what one register of codes holds


class Bitmask:
    name = "unstructured"
    sparse = True

    @staticmethod
    def shapes(g: Geometry, extent: int) -> dict[str, tuple[int, ...]]:
        return {"offsets": (round_up(4 * _chunks(g), TILE_ALIGN),), "kept": (extent,)}

    @staticmethod
    def expected_extent(g: Geometry, density: float) -> int:
        """About how many bytes ``kept`` has where that share of the weights is kept, at random."""
        chunks = g.in_features * g.out_features / CHUNK_WEIGHTS
        kept = density * CHUNK_WEIGHTS * BITS[g.values] / 8
        if BITS[g.values] == 4:  # the longer of two halves: E max of two normal variables is mean + deviation / sqrt(pi)
            kept += math.sqrt(CHUNK_WEIGHTS / 2 * density * (1 - density) / math.pi)
        padding = UNIT / 2 if 0 < density < 1 else 0
        return round_up(int(chunks * (kept + padding)) + tail_bytes(g.values), TILE_ALIGN)

    @staticmethod
    def expected_density(g: Geometry, extent: int) -> float:
        """About which share of the weights is kept where ``kept`` has that many bytes, padding counted as kept."""
        return min(1.0, 8 * max(0, extent - tail_bytes(g.values)) / (BITS[g.values] * g.in_features * g.out_features))

    @staticmethod
    def tile(codes: Tensor, mask: Tensor, g: Geometry) -> tuple[Tensor, dict[str, Tensor]]:
        """Bits (tiles, blocks, code_bytes) uint8, and the tensors of :meth:`shapes`; codes, mask: (tiles * 32, columns)."""
        bits = _in_steps(mask, g)
        powers = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=bits.device)
        data = (bits.view(-1, 8) * powers).sum(-1, dtype=torch.uint8).view(g.tiles, g.blocks, g.code_bytes)
        starts, extent = _starts(data, g)
        kept = torch.zeros(extent, dtype=torch.uint8, device=codes.device)
        elements = kept.view(torch.bfloat16) if g.values == "bf16" else kept
        chunks = g.chunk_rows * g.columns // CHUNK_WEIGHTS
        for c, b, s in zip(*(t.split(chunks) for t in (_in_steps(codes, g), bits, starts)), strict=True):
            for i, (stream, chosen) in enumerate(zip(_streams(c, g), _streams(b, g), strict=True)):
                at = _places(s, chosen, g)
                elements[at] = stream[chosen] if i == 0 else elements[at] | stream[chosen] << 4
        return data, {"offsets": _offsets(starts, g), "kept": kept}

    @staticmethod
    def untile(data: Tensor, packed: dict[str, Tensor], g: Geometry) -> tuple[Tensor, Tensor]:
        """Inverse of :meth:`tile`: codes and mask, (tiles * 32, columns)."""
        bits = _bits(data)
        starts, _ = _starts(data, g)
        kept = packed["kept"].view(torch.bfloat16) if g.values == "bf16" else packed["kept"]
        codes = torch.full((bits.numel(),), ZERO_CODE[g.values], dtype=kept.dtype, device=kept.device).view(_chunks(g), -1)
        bits = bits.view(_chunks(g), -1)
        for i, (stream, chosen) in enumerate(zip(_streams(codes, g), _streams(bits, g), strict=True)):
            values = kept[_places(starts, chosen, g)]
            stream[chosen] = values >> 4 * i & 15 if BITS[g.values] == 4 else values
        return _in_rows(codes, g), _in_rows(bits, g)

    @staticmethod
    def kept(data: Tensor, g: Geometry) -> int:
        """How many weights the bits keep."""
        return int(np.bitwise_count(data.contiguous().numpy().view(np.uint64)).sum(dtype=np.int64))

    @staticmethod
    def check(data: Tensor, packed: dict[str, Tensor], g: Geometry) -> None:
        """Raises CaloraError unless the offsets and the length of ``kept`` are those that the bits demand, and for bf16 that is not finite."""
        starts, extent = _starts(data, g)
        if not torch.equal(packed["offsets"], _offsets(starts, g)):
            raise CaloraError("the offsets of an unstructured weight do not belong to its bit mask; the file is damaged")
        if packed["kept"].numel() != extent:
            raise CaloraError(f"an unstructured weight keeps {packed['kept'].numel()} bytes, its bit mask asks for {extent}; the file is damaged")
        check_finite(g.values, packed["kept"])


def tail_bytes(values: str) -> int:
    """What follows the last chunk: no bit mask, however damaged, makes a kernel read beyond it."""
    return CHUNK_WEIGHTS * BITS[values] // 8 + TILE_ALIGN


def _chunks(g: Geometry) -> int:
    return g.tiles * g.columns // CHUNK_COLUMNS


def _in_steps(t: Tensor, g: Geometry) -> Tensor:
    """(tiles * 32, columns) -> (chunks, 1024) in the order of the bits."""
    step = STEP_COLUMNS[g.values]
    t = t.view(g.tiles, TILE_ROWS, g.columns // CHUNK_COLUMNS, CHUNK_COLUMNS // step, step)
    return t.permute(0, 2, 3, 1, 4).reshape(_chunks(g), CHUNK_WEIGHTS)


def _in_rows(t: Tensor, g: Geometry) -> Tensor:
    """Inverse of :func:`_in_steps`."""
    step = STEP_COLUMNS[g.values]
    t = t.view(g.tiles, g.columns // CHUNK_COLUMNS, CHUNK_COLUMNS // step, TILE_ROWS, step)
    return t.permute(0, 3, 1, 2, 4).reshape(g.tiles * TILE_ROWS, g.columns)


def _bits(data: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    return (data.reshape(-1, 1) >> shifts & 1).bool().view(-1)


def _streams(t: Tensor, g: Geometry) -> list[Tensor]:
    """Views of (chunks, 1024): what is stored one after the other. 4 bits: even steps in low nibbles, odd ones in high ones."""
    if BITS[g.values] != 4:
        return [t]
    steps = t.view(len(t), -1, 2, TILE_ROWS * STEP_COLUMNS[g.values])
    return [steps[:, :, 0], steps[:, :, 1]]


def _starts(data: Tensor, g: Geometry) -> tuple[Tensor, int]:
    """Where each chunk starts in ``kept`` (bytes), and how long ``kept`` is; from the bits alone."""
    words = data.reshape(_chunks(g), CHUNK_WEIGHTS // 8).contiguous().numpy().view(np.uint64)
    counts = torch.from_numpy(np.bitwise_count(words)).long()  # (chunks, 16)
    if BITS[g.values] == 4:
        halves = counts.view(len(counts), -1, 2, 2).sum((1, 3))  # (chunks, even and odd steps)
        sizes = halves.amax(-1)
    else:
        sizes = counts.sum(-1) * BITS[g.values] // 8
    ends = (-(-sizes // UNIT) * UNIT).cumsum(0)
    total = int(ends[-1])
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    return starts, round_up(total + tail_bytes(g.values), TILE_ALIGN)


def _offsets(starts: Tensor, g: Geometry) -> Tensor:
    if int(starts[-1]) // UNIT >= 1 << 32:
        raise CaloraError("the layer keeps more than 32 GB, which its offsets cannot count")
    out = torch.zeros(Bitmask.shapes(g, 0)["offsets"], dtype=torch.uint8, device="cpu")  # models are checked under device("meta")
    out[: 4 * len(starts)] = torch.from_numpy((starts.numpy() // UNIT).astype("<u4").view(np.uint8))
    return out


def _places(starts: Tensor, chosen: Tensor, g: Geometry) -> Tensor:
    """Index into ``kept``, counted in codes, of each chosen element of a stream, in order."""
    counts = chosen.flatten(1).sum(-1)
    before = counts.cumsum(0) - counts
    first = starts // 2 if g.values == "bf16" else starts
    return torch.arange(int(counts.sum()), device=starts.device) + (first - before).repeat_interleave(counts)
