"""The order of packed bytes that the CUDA kernels read (``csrc/cuda/api.h`` draws it), and the way back.

Same bytes per block as the canonical layout, permuted inside chunks of 32 rows x 32 columns, and the codes of nf4 renumbered:
going to a GPU and back is bit-exact. The order shows in the shape, so that it can never be mistaken: canonical ``packed`` is 2-D,
in CUDA order it is (tiles, words, 16); canonical ``zeros``, ``scales`` and ``kept`` are 1-D, in CUDA order (words, 16).
``offsets`` have one order. What lies between the codes of ``kept`` is 0 either way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CaloraError
from .bitmask import tail_bytes
from .layout import BITS, SCALE_BYTES, TILE_ALIGN, TILE_ROWS, ZERO_CODE, Geometry, round_up, split_scales
from .nf4 import NF4

if TYPE_CHECKING:
    from . import WeightFormat

CHUNK_COLUMNS = 32
WORD = 16  # bytes that one lane reads at once
_DIMENSIONS = {"packed": 3, "zeros": 2, "scales": 2, "kept": 2}  # of each tensor in CUDA order

# In the comments: row = 16 rt + 8 j + g, column = 8 c + 4 s + 2 h + e of a chunk, all but g (8) and c (4) in {0, 1}.
# Per value type: dtype of an element, its canonical order inside a chunk, and where each axis of that goes.
_BYTES = {
    "int8": (torch.uint8, ("c", "s", "rt", "j", "g", "h", "e"), ("s", "g", "c", "rt", "h", "j", "e")),
    "bf16": (torch.int16, ("c", "s", "h", "rt", "j", "g", "e"), ("s", "rt", "g", "c", "h", "j", "e")),
}
_NIBBLES = {  # the last axis is low, high
    "int4": (("c", "rt", "j", "g", "h", "e", "s"), ("g", "c", "s", "rt", "e", "h", "j")),
    "nf4": (("c", "rt", "j", "g", "h", "e", "s"), ("g", "c", "s", "rt", "h", "j", "e")),
}
_NF4_CODE = (7, 0, 1, 2, 8, 9, 10, 11, 6, 5, 4, 3, 15, 12, 14, 13)  # of each place; kNf4Code of api.h
# 2:4, the kept elements of a unit: group q = 4 h + 2 c1 + c0, kept e; t is the turn, of one or two.
_KEPT = {
    "int4": (("t", "h", "rt", "j", "g", "c0", "e", "c1"), ("g", "c1", "c0", "t", "rt", "e", "h", "j")),
    "nf4": (("t", "h", "rt", "j", "g", "c0", "e", "c1"), ("g", "c1", "c0", "t", "rt", "h", "j", "e")),
    "int8": (("t", "h", "c1", "rt", "j", "g", "c0", "e"), ("t", "g", "c1", "c0", "rt", "h", "j", "e")),
    "bf16": (("t", "h", "c1", "c0", "rt", "j", "g", "e"), ("t", "rt", "g", "c1", "c0", "h", "j", "e")),
}
_PLACES = (("t", "rt", "j", "g", "c0", "e", "h", "c1"), ("g", "rt", "h", "t", "j", "c1", "c0", "e"))  # four a byte
_GROUPS = ("t", "rt", "j", "g", "h", "c1", "c0", "e")
# Canonical p0 + 4 p1 -> the number that stands for them on the GPU (api.h); -1: not in a file of ours, which says "none" by 1 0.
_NUMBERS = (9, 14, -1, -1, 13, 2, -1, -1, 1, 0, 15, -1, 5, 4, 7, 6)
_EXCHANGED = 15  # canonical: the weight in place 3 alone, which comes second there
# Unstructured, per value type: the weights of a unit of chunks as their bits lie canonically, and as they do here; the order of
# a chunk's codes there and here.
_BITMASK = {
    "int4": (("t", "c", "s", "rt", "j", "g", "h", "e"), ("g", "c", "t", "h", "e", "j", "s", "rt"), ("c", "s", "rt", "j", "g", "h", "e"), ("g", "c", "s", "rt", "h", "e", "j")),
    "nf4": (("t", "c", "s", "rt", "j", "g", "h", "e"), ("g", "c", "t", "h", "j", "e", "s", "rt"), ("c", "s", "rt", "j", "g", "h", "e"), ("g", "c", "s", "rt", "h", "j", "e")),
    "int8": (("t", "c", "s", "rt", "j", "g", "h", "e"), ("g", "c", "t", "s", "j", "e", "rt", "h"), ("c", "s", "rt", "j", "g", "h", "e"), ("g", "c", "s", "rt", "h", "j", "e")),
    "bf16": (("t", "c", "s", "h", "rt", "j", "g", "e"), ("g", "c", "t", "s", "e", "rt", "h", "j"), ("c", "s", "h", "rt", "j", "g", "e"), ("g", "c", "s", "rt", "h", "j", "e")),
}  # fmt: skip
_CHUNKS = 4096  # whose kept codes are moved at a time
_SIZES = {"g": 8, "c": 4}
_SCALES = (("rt", "j", "g"), ("g", "rt", "j"))
_ZEROS = (("j", "g", "rt"), ("g", "rt", "j"))  # nibbles


def in_cuda_order(name: str, tensor: Tensor) -> bool:
    """Whether a packed tensor (by its name) is in CUDA order. ``offsets``, which has one order, never is."""
    return tensor.dim() == _DIMENSIONS.get(name)


def to_cuda_order(name: str, tensor: Tensor, fmt: WeightFormat, in_features: int, out_features: int, packed: Tensor | None = None) -> Tensor:
    """One packed tensor of a layer, canonical -> CUDA order, on its own device.

    packed: the layer's ``packed`` in either order, which ``kept`` needs. Raises CaloraError where ``kept`` is not as long as its
    bit mask asks for.
    """
    if name == "offsets" or in_cuda_order(name, tensor):
        return tensor
    g = fmt.geometry(in_features, out_features)
    if name == "zeros":
        return _nibbles(tensor.view(-1, 16), *_ZEROS).view(-1, WORD)
    if name == "scales":
        return _scale_codes(tensor, g, 1).view(-1, WORD)
    if name == "kept":
        return _kept(tensor, from_cuda_order("packed", packed, fmt, in_features, out_features).to(tensor.device), g, False).view(-1, WORD)
    return _blocks(tensor, g, False).view(g.tiles, -1, WORD)


def from_cuda_order(name: str, tensor: Tensor, fmt: WeightFormat, in_features: int, out_features: int, packed: Tensor | None = None) -> Tensor:
    """Inverse of :func:`to_cuda_order`, bit for bit."""
    if not in_cuda_order(name, tensor):
        return tensor
    g = fmt.geometry(in_features, out_features)
    if name == "zeros":
        return _nibbles(tensor, *reversed(_ZEROS)).view(g.zeros_shape)
    if name == "scales":
        return _scale_codes(tensor.flatten(), g, -1)
    if name == "kept":
        return _kept(tensor.flatten(), from_cuda_order("packed", packed, fmt, in_features, out_features).to(tensor.device), g, True)
    return _blocks(tensor, g, True).view(g.packed_shape)


def arrange(name: str, tensor: Tensor, fmt: WeightFormat, in_features: int, out_features: int, packed: Tensor | None = None) -> Tensor:
    """The tensor in the order of the device it is on, canonical on "meta"; itself if it is already."""
    if tensor.is_meta and in_cuda_order(name, tensor):
        return tensor.view(fmt.geometry(in_features, out_features).packed_shape if name == "packed" else -1)
    if name == "offsets" or tensor.is_cuda == in_cuda_order(name, tensor):
        return tensor
    return (to_cuda_order if tensor.is_cuda else from_cuda_order)(name, tensor, fmt, in_features, out_features, packed)


def gather(packed: dict[str, Tensor], rows: Tensor, fmt: WeightFormat, in_features: int, out_features: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes (n, blocks, block_columns), scales (n, blocks) and zero points (n, blocks) of some rows (n,) in CUDA order."""
    g = fmt.geometry(in_features, out_features)
    tile, rt, j, group = rows // TILE_ROWS, rows // 16 % 2, rows // 8 % 2, rows % 8
    data = packed["packed"].view(g.tiles, g.blocks, g.block_bytes)
    nibbles = _NIBBLES.get(g.values)
    dtype, order = _BYTES[g.values][::2] if nibbles is None else (torch.uint8, nibbles[1][:-1])
    codes = data[..., : g.code_bytes].view(dtype).unflatten(-1, (-1, *(_SIZES.get(axis, 2) for axis in order)))  # a view: nothing is copied
    index: dict[str, Tensor] = {"g": group, "rt": rt, "j": j}
    codes = codes[(tile, slice(None), slice(None), *(index.get(axis, slice(None)) for axis in order))]
    left = [axis for axis in order if axis not in index]
    codes = codes.permute(0, 1, 2, *(3 + left.index(axis) for axis in ("c", "s", "h", "e") if axis in left)).flatten(2)
    scale = zero = None
    if g.values == "int4":
        codes = codes >> (4 * j).to(torch.uint8).view(-1, 1, 1) & 15
    elif g.values == "nf4":
        codes = _renumbered(_split(codes, 4).flatten(2), -1)
    elif g.values == "bf16":
        codes = codes.contiguous().view(torch.bfloat16)
    if g.block_bytes > g.code_bytes:
        scale = data[..., g.code_bytes :].unflatten(-1, (TILE_ROWS, 2))[tile, :, 4 * group + 2 * rt + j].contiguous().view(torch.float16).squeeze(-1)
    if "scales" in packed:
        scale_codes, outer = split_scales(packed["scales"].flatten(), g)
        scale = NF4.scales(scale_codes[tile, :, 4 * group + 2 * rt + j], outer[tile])
    if "zeros" in packed:
        nibbles = packed["zeros"].view(-1, 8, 2)[: g.tiles * g.blocks].view(g.tiles, g.blocks, 8, 2)[tile, :, group, rt]
        zero = nibbles >> (4 * j).to(torch.uint8).unsqueeze(-1) & 15
    return codes, scale, zero


def _blocks(tensor: Tensor, g: Geometry, back: bool) -> Tensor:
    """Codes and scales of every block, one way or the other."""
    data = tensor.reshape(g.tiles, g.blocks, g.block_bytes)
    out = torch.empty_like(data)
    codes = data[..., : g.code_bytes].contiguous()
    out[..., : g.code_bytes] = {"dense": _dense, "2:4": _two_four, "unstructured": _bits}[g.pattern](codes, g, -1 if back else 1).view_as(codes)
    if g.block_bytes > g.code_bytes:
        scales = data[..., g.code_bytes :].contiguous().view(torch.int16)
        out[..., g.code_bytes :] = _permute(scales, *_SCALES[:: -1 if back else 1]).view(torch.uint8).view(g.tiles, g.blocks, SCALE_BYTES)
    return out


def _dense(codes: Tensor, g: Geometry, step: int) -> Tensor:
    if g.values in _NIBBLES:
        elements = _split(codes, 4).view(-1, TILE_ROWS * CHUNK_COLUMNS)
        if g.values == "nf4":
            elements = _renumbered(elements, step)
        return _join(_permute(elements, *_NIBBLES[g.values][::step]), 4)
    dtype, *orders = _BYTES[g.values]
    return _permute(codes.view(dtype), *orders[::step]).view(torch.uint8)


def _renumbered(elements: Tensor, step: int) -> Tensor:
    """nf4 codes -> their places in the kernels' table, or back (step -1)."""
    code = torch.tensor(_NF4_CODE, dtype=torch.uint8, device=elements.device)
    return (code.argsort().to(torch.uint8) if step == 1 else code)[elements.int()]


def _scale_codes(tensor: Tensor, g: Geometry, step: int) -> Tensor:
    """The ``scales`` of nf4: codes move within their block, outer scales stay."""
    n = math.prod(g.scale_codes_shape)
    return torch.cat((_permute(tensor[:n], *_SCALES[::step]), tensor[n:]))


def _units(g: Geometry) -> list[tuple[int, int, int]]:
    """(turns of a unit, first turn, last) of a block: units of two turns of 32 columns, where they are odd one of a single turn."""
    turns = g.block_columns // CHUNK_COLUMNS
    return [unit for unit in ((2, 0, turns // 2 * 2), (1, turns // 2 * 2, turns)) if unit[1] < unit[2]]


def _two_four(codes: Tensor, g: Geometry, step: int) -> Tensor:
    place_bytes = 4 * TILE_ROWS
    turn_bytes = g.code_bytes * CHUNK_COLUMNS // g.block_columns
    codes = codes.view(-1, g.code_bytes)
    out = torch.empty_like(codes)
    for size, begin, end in _units(g):
        units = codes[:, begin * turn_bytes : end * turn_bytes].reshape(-1, size, turn_bytes)
        if step == 1:
            kept, places = units[..., :-place_bytes], units[..., -place_bytes:]
        else:
            kept, places = units.flatten(1).split([size * (turn_bytes - place_bytes), size * place_bytes], dim=1)
        kept, places = _unit(kept.contiguous(), places.contiguous(), g.values, size, step)
        parts = (kept.view(len(units), size, -1), places.view(len(units), size, -1))
        whole = torch.cat(parts, -1) if step == -1 else torch.cat([p.flatten(1) for p in parts], -1)
        out[:, begin * turn_bytes : end * turn_bytes] = whole.reshape(len(codes), -1)
    return out


def _unit(kept: Tensor, places: Tensor, values: str, turns: int, step: int) -> tuple[Tensor, Tensor]:
    """Kept elements and places of whole units, each in the order of its table, `step` along it."""
    sizes = _SIZES | {"t": turns}
    source, target = _KEPT[values][::step]
    bits = BITS[values]
    elements = kept.view(torch.int16) if bits == 16 else _split(kept, bits)
    if step == 1:
        elements = _coded(elements, values, 1)
    elements = _permute(elements, source, _GROUPS, sizes).view(-1, 2)
    at = _permute(_split(places, 2), _PLACES[::step][0], _GROUPS, sizes).view(-1, 2)
    at = _numbered(at[:, 0] | at[:, 1] << 2, step)
    exchanged = at == (_NUMBERS[_EXCHANGED] if step == 1 else _EXCHANGED)
    elements = torch.where(exchanged.unsqueeze(-1), elements.flip(-1), elements)
    at = torch.stack((at & 3, at >> 2), dim=-1)
    elements = _permute(elements, _GROUPS, target, sizes)
    if step == -1:
        elements = _coded(elements, values, -1)
    return (elements.view(torch.uint8) if bits == 16 else _join(elements, bits)), _join(_permute(at, _GROUPS, _PLACES[::step][1], sizes), 2)


def _numbered(places: Tensor, step: int) -> Tensor:
    """Both places of each group, p0 + 4 p1, as their number on the GPU, or back (step -1). Raises CaloraError for what no file of ours holds."""
    numbers = torch.tensor(_NUMBERS, dtype=torch.int8, device=places.device)
    if step == -1:
        return torch.stack([numbers == i for i in range(16)]).to(torch.uint8).argmax(1).to(torch.uint8)[places.int()]
    numbered = numbers[places.int()]
    if (numbered < 0).any():
        raise CaloraError("a 2:4 weight holds places that are not in order; the file is damaged, get it again or compress anew")
    return numbered.to(torch.uint8)


def _coded(elements: Tensor, values: str, step: int) -> Tensor:
    """Elements of 2:4: around 0 -> as the dense order has them, or back (step -1)."""
    if values == "nf4":  # canonical: code ^ 7
        return _renumbered(elements ^ 7, 1) if step == 1 else _renumbered(elements, -1) ^ 7
    return elements if values == "bf16" else elements ^ ZERO_CODE[values]


def _bits(codes: Tensor, g: Geometry, step: int) -> Tensor:
    codes = codes.view(-1, g.code_bytes)
    out = torch.empty_like(codes)
    chunk_bytes = TILE_ROWS * CHUNK_COLUMNS // 8
    for size, begin, end in _units(g):
        at = slice(begin * chunk_bytes, end * chunk_bytes)
        bits = _permute(_split(codes[:, at].contiguous(), 1), *_BITMASK[g.values][:2][::step], _SIZES | {"t": size})
        out[:, at] = _join(bits, 1).view(len(codes), -1)
    return out


def _kept(kept: Tensor, packed: Tensor, g: Geometry, back: bool) -> Tensor:
    """The codes of an unstructured weight, (bytes,) uint8, one way or the other; packed: its canonical bits and scales."""
    masks = packed.reshape(g.tiles, g.blocks, g.block_bytes)[..., : g.code_bytes].reshape(-1, TILE_ROWS * CHUNK_COLUMNS // 8)
    canonical, ours = _BITMASK[g.values][2:]
    place = torch.arange(TILE_ROWS * CHUNK_COLUMNS, device=kept.device)
    there, here = _permute(place, canonical, ours), _permute(place, ours, canonical)  # here[there[i]] == i
    nibbles = BITS[g.values] == 4
    elements = kept.view(torch.int16) if g.values == "bf16" else _split(kept, 4).view(-1) if nibbles else kept
    out = torch.zeros_like(elements)
    start = 0  # bytes
    for part in masks.split(_CHUNKS):
        mask = _split(part, 1).view(len(part), -1).bool()
        if nibbles:  # two streams: even steps in low nibbles, odd ones in high nibbles
            streams = mask.view(-1, 4, 2, 128).transpose(1, 2).reshape(len(part), 2, -1).long()
            sizes = streams.sum(-1).amax(-1)
            before = (streams.cumsum(-1) - streams) * 2 + torch.arange(2, device=kept.device).view(2, 1)
            source = before.view(len(part), 2, 4, 128).transpose(1, 2).reshape(mask.shape)
        else:
            source = mask.long().cumsum(-1) - mask.long()
            sizes = mask.sum(-1) * BITS[g.values] // 8
        ordered = mask[:, there].long()
        target = (ordered.cumsum(-1) - ordered)[:, here]
        ends = ((sizes + 7) // 8 * 8).cumsum(0) + start
        if int(ends[-1]) + tail_bytes(g.values) > kept.numel():
            raise CaloraError(f"an unstructured weight keeps {kept.numel()} bytes, its bit mask asks for more; the file is damaged")
        starts = torch.cat((ends.new_full((1,), start), ends[:-1])) * 8 // BITS[g.values]
        source, target = ((starts.unsqueeze(-1) + index)[mask] for index in ((target, source) if back else (source, target)))
        moved = elements[source]
        if nibbles:  # around the middle code <-> around 0
            moved = moved ^ 8 if g.values == "int4" else _renumbered(moved, -1 if back else 1)
        out[target] = moved
        start = int(ends[-1])
    if round_up(start + tail_bytes(g.values), TILE_ALIGN) != kept.numel():
        raise CaloraError(f"an unstructured weight keeps {kept.numel()} bytes, its bit mask asks for fewer; the file is damaged")
    return out.view(torch.uint8) if g.values == "bf16" else _join(out, 4) if nibbles else out


def _permute(data: Tensor, source: tuple[str, ...], target: tuple[str, ...], sizes: dict[str, int] = _SIZES) -> Tensor:
    """Elements whose axes lie in order `source` (as often as they fit) -> order `target`, flat."""
    shaped = data.reshape(-1, *(sizes.get(axis, 2) for axis in source))
    return shaped.permute(0, *(1 + source.index(axis) for axis in target)).reshape(-1)


def _nibbles(data: Tensor, source: tuple[str, ...], target: tuple[str, ...]) -> Tensor:
    """The same for 4-bit elements, two a byte, the low one first."""
    return _join(_permute(_split(data, 4), source, target), 4)


def _split(data: Tensor, bits: int) -> Tensor:
    """Bytes -> their fields of `bits` bits, the low one first, as a new last axis."""
    return torch.stack([data >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], dim=-1)


def _join(fields: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`_split`, flat."""
    columns = fields.view(-1, 8 // bits).unbind(-1)
    out = columns[0]
    for i, column in enumerate(columns[1:], 1):
        out = out | column << i * bits
    return out
