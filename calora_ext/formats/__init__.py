"""Weight formats: a sparsity pattern times a value type, both described in ``csrc/layouts.h``.

``WeightFormat`` is what the rest of the package knows: it names the packed tensors of a layer, packs and decodes them,
and counts their bytes. ``decode`` on torch tensors is the reference every kernel is tested against.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import CaloraError
from . import layout
from .bitmask import Bitmask
from .dense import Dense
from .layout import LAYOUT_VERSION, Geometry
from .paired import Paired
from .two_four import TwoFour
from .values import VALUES, Quantized, dequantize

STORED = (Dense, TwoFour, Bitmask)  # what a file may hold
PATTERNS = {p.name: p for p in (*STORED, Paired)}

__all__ = ["LAYOUT_VERSION", "PATTERNS", "Geometry", "Quantized", "WeightFormat", "extent_of"]


@dataclass(frozen=True)
class WeightFormat:
    """How one layer's weight is stored.

    values: ``"int4"``, ``"nf4"``, ``"int8"`` or ``"bf16"``. group_size: columns that share a scale (a multiple of 32), or -1
    for one scale per row; only int4 and nf4 have groups. symmetric: False stores a zero point per group (dense int4 only).
    pattern: ``"dense"``; ``"2:4"``: at most two of every four weights along a row are kept, the others are 0; or
    ``"unstructured"``: any are kept, and the size depends on how many. (``"paired"``: what unstructured int4 weights may run as.)
    id: the number that the operators take, 16 * pattern + values. names: of a layer's packed tensors, in the operators' order.
    Raises :class:`CaloraError` for a combination without meaning.
    """

    values: str = "int4"
    group_size: int = 64
    symmetric: bool = True
    pattern: str = "dense"

    def __post_init__(self) -> None:
        if self.values not in VALUES:
            raise CaloraError(f"unknown weights {self.values!r}; choose one of {', '.join(sorted(VALUES))}")
        if self.pattern not in PATTERNS:
            raise CaloraError(f"unknown pattern {self.pattern!r}; choose one of {', '.join(p.name for p in STORED)}")
        if self.pattern == Paired.name and self.values != "int4":
            raise CaloraError(f"weights in pairs of rows are int4, not {self.values}")
        if self.sparse and not self.symmetric:
            raise CaloraError(f"{self.pattern} weights have no zero points; use symmetric=True")
        if not self.symmetric and not VALUES[self.values].zero_points:
            raise CaloraError(f"{self.values} has no zero points; use symmetric=True")
        if not VALUES[self.values].grouped:
            object.__setattr__(self, "group_size", -1)
        elif self.group_size != -1 and (self.group_size < 32 or self.group_size % 32):
            raise CaloraError(f"group_size must be -1 (one scale per row) or a multiple of 32, got {self.group_size}")
        # Not properties: they are asked for at every call of a layer.
        object.__setattr__(self, "id", 16 * layout.PATTERN_IDS[self.pattern] + layout.VALUE_IDS[self.values])
        object.__setattr__(self, "names", tuple(self.tensors(1, 1)))

    @property
    def sparse(self) -> bool:
        return PATTERNS[self.pattern].sparse

    def __str__(self) -> str:
        group = "" if self.group_size == -1 else f" g{self.group_size}"
        pattern = f" {self.pattern}" if self.sparse else ""
        return f"{self.values}{group}{'' if self.symmetric else ' asymmetric'}{pattern}"

    def to_dict(self) -> dict:
        return asdict(self)

    def geometry(self, in_features: int, out_features: int) -> Geometry:
        return Geometry(self.values, in_features, out_features, self.group_size, self.pattern)

    def tensors(self, in_features: int, out_features: int, extent: int = 0) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the packed tensors of a layer, all uint8, in the order of :attr:`names`.

        extent: bytes of the last one where the pattern decides them (``extent_of`` a layer's tensors).
        """
        g = self.geometry(in_features, out_features)
        shapes: dict[str, tuple[int, ...]] = {"packed": g.packed_shape}
        if not self.symmetric:
            shapes["zeros"] = g.zeros_shape
        if self.values == "nf4":
            shapes["scales"] = g.scales_shape
        return shapes | PATTERNS[self.pattern].shapes(g, extent)

    def nbytes(self, in_features: int, out_features: int, density: float = 1.0) -> int:
        """Bytes on disk and in RAM, scales, zero points and padding included. density: share of the weights that an
        unstructured weight keeps, for which this is what to expect, not what a given mask takes."""
        g = self.geometry(in_features, out_features)
        extent = Bitmask.expected_extent(g, density) if self.pattern == Bitmask.name else 0
        return sum(torch.Size(shape).numel() for shape in self.tensors(in_features, out_features, extent).values())

    def density(self, in_features: int, out_features: int, extent: int) -> float:
        """About which share of its weights an unstructured layer keeps: inverse of ``Bitmask.expected_extent``, but for its padding."""
        return Bitmask.expected_density(self.geometry(in_features, out_features), extent)

    def bits_per_weight(self, in_features: int, out_features: int, density: float = 1.0) -> float:
        return 8 * self.nbytes(in_features, out_features, density) / (in_features * out_features)

    def quantize(self, weight: Tensor, mask: Tensor | None = None) -> Quantized:
        """Round a weight (out, in) to nearest.

        mask: (out, in) bool, the weights to keep in a sparse pattern; without it those that are not 0.
        Raises CaloraError for NaN, infinity, a scale beyond fp16 (nf4: fp32), or a mask that the pattern does not hold.
        """
        if weight.dim() != 2 or not weight.is_floating_point():
            raise CaloraError(f"a weight must be a 2-D floating-point tensor, got {tuple(weight.shape)} {weight.dtype}")
        if not torch.isfinite(weight).all():
            raise CaloraError("the weight holds NaN or infinite values; the checkpoint is damaged or training diverged")
        mask = self._settle_mask(weight, mask)
        if mask is not None:
            weight = weight.detach() * mask
        g = self.geometry(weight.shape[1], weight.shape[0])
        parts = []
        for rows in weight.detach().split(g.chunk_rows):
            w = pad(rows.float(), (0, g.columns - g.in_features)).view(-1, g.blocks, g.block_columns)
            parts.append(VALUES[self.values].quantize(w, self.symmetric))
        codes, scale, zero, outer = (None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
        q = Quantized(codes.reshape(g.out_features, g.columns)[:, : g.in_features], scale, zero, mask, outer)
        if scale is not None and not torch.isfinite(q.scales()).all():
            kind = "fp16" if outer is None else "fp32"
            raise CaloraError(f"a weight is too large for an {kind} scale; rescale the layer or keep it in bf16")
        return q

    def _settle_mask(self, weight: Tensor, mask: Tensor | None) -> Tensor | None:
        if mask is not None and not self.sparse:
            raise CaloraError(f"a mask has no meaning for {self}, which keeps every weight; leave it out")
        if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
            raise CaloraError(f"a mask must be bool and of the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)} {mask.dtype}")
        return (weight != 0) if mask is None and self.sparse else mask

    def pack_quantized(self, q: Quantized) -> dict[str, Tensor]:
        """The packed tensors of codes that are already chosen (by rounding, GPTQ, an importer)."""
        g = self.geometry(q.codes.shape[1], q.codes.shape[0])
        rows, columns = g.tiles * layout.TILE_ROWS - g.out_features, g.columns - g.in_features
        value_type = VALUES[self.values]
        # Padding decodes to 0: its code is the zero point; padding rows have scale 0 and the middle zero point.
        zero = None if q.zero is None else pad(q.zero, (0, 0, 0, rows), value=8)
        filler = torch.as_tensor(value_type.padding(zero), device=q.codes.device).to(q.codes.dtype)
        codes = filler.expand(len(q.codes) + rows, g.blocks, g.block_columns).contiguous().view(-1, g.columns)
        codes[: g.out_features, : g.in_features] = q.codes
        mask = None if q.mask is None else pad(q.mask, (0, columns, 0, rows))
        data, others = PATTERNS[self.pattern].tile(codes, mask, g)
        scale = None if q.scale is None else pad(q.scale, (0, 0, 0, rows))
        if scale is not None and q.outer_scale is None:
            data = torch.cat((data, layout.tile_scales(scale, g)), dim=-1)
        packed = {"packed": data.reshape(g.packed_shape)}
        if zero is not None:
            packed["zeros"] = layout.tile_zeros(zero, g)
        if q.outer_scale is not None:
            packed["scales"] = layout.join_scales(scale, q.outer_scale, g)
        return packed | others

    def pack(self, weight: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Round to nearest and pack a weight (out, in); mask as in :meth:`quantize`."""
        return self.pack_quantized(self.quantize(weight, mask))

    def unpack(self, packed: dict[str, Tensor], in_features: int, out_features: int) -> Quantized:
        """Inverse of :meth:`pack_quantized`, exactly."""
        g = self.geometry(in_features, out_features)
        self.check(packed, in_features, out_features)
        data = packed["packed"].view(g.tiles, g.blocks, g.block_bytes)
        codes, mask = PATTERNS[self.pattern].untile(data[..., : g.code_bytes], packed, g)
        codes = codes[:out_features, :in_features]
        mask = None if mask is None else mask[:out_features, :in_features]
        scale = zero = outer = None
        if g.block_bytes > g.code_bytes:
            scale = layout.untile_scales(data[..., g.code_bytes :], g)[:out_features]
        if not self.symmetric:
            zero = layout.untile_zeros(packed["zeros"], g)[:out_features]
        if "scales" in packed:
            scale, outer = layout.split_scales(packed["scales"], g)
            scale = scale.transpose(1, 2).reshape(-1, g.blocks)[:out_features]
        return Quantized(codes, scale, zero, mask, outer)

    def kept(self, packed: dict[str, Tensor], in_features: int, out_features: int) -> int:
        """How many weights the pattern keeps; one of them may have been rounded to 0."""
        if not self.sparse:
            return in_features * out_features
        g = self.geometry(in_features, out_features)
        return PATTERNS[self.pattern].kept(packed["packed"].view(g.tiles, g.blocks, g.block_bytes)[..., : g.code_bytes], g)

    def decode(self, packed: dict[str, Tensor], in_features: int, out_features: int) -> Tensor:
        """The dense weight (out, in) in float32: the reference of every kernel."""
        g = self.geometry(in_features, out_features)
        q = self.unpack(packed, in_features, out_features)
        codes = pad(q.codes, (0, g.columns - in_features)).view(out_features, g.blocks, g.block_columns)
        dense = dequantize(self.values, codes, q.scales(), q.zero)
        return dense.view(out_features, g.columns)[:, :in_features].contiguous()

    def check(self, packed: dict[str, Tensor], in_features: int, out_features: int) -> None:
        """Raises CaloraError unless names, shapes and dtypes are those of this format and every scale is finite."""
        expected = self.tensors(in_features, out_features, extent_of({name: t.shape for name, t in packed.items()}))
        if set(packed) != set(expected):
            raise CaloraError(f"packed tensors {sorted(packed)} do not belong to {self}, which has {sorted(expected)}")
        for name, shape in expected.items():
            if tuple(packed[name].shape) != shape or packed[name].dtype != torch.uint8:
                raise CaloraError(
                    f"{name} is {tuple(packed[name].shape)} {packed[name].dtype}; a {out_features} x {in_features} layer "
                    f"in {self} has {shape} uint8: the file belongs to another model or is damaged"
                )
        g = self.geometry(in_features, out_features)
        data = packed["packed"].view(g.tiles, g.blocks, g.block_bytes)
        scales = layout.split_scales(packed["scales"], g)[1] if "scales" in packed else None
        if g.block_bytes > g.code_bytes:
            scales = layout.untile_scales(data[..., g.code_bytes :], g)
        if scales is not None and not torch.isfinite(scales).all():
            raise CaloraError("a packed weight has a scale that is not finite; the file is damaged")
        PATTERNS[self.pattern].check(data[..., : g.code_bytes], packed, g)


def extent_of(shapes: dict[str, tuple[int, ...]]) -> int:
    """The `extent` of ``WeightFormat.tensors`` that packed tensors of these shapes have."""
    shape = shapes.get("kept", ())
    return shape[0] if len(shape) == 1 and shape[0] % layout.TILE_ALIGN == 0 else 0
