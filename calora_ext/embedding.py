"""``CompressedEmbedding``: a packed embedding table whose rows are gathered and decoded on look-up, and the modules
that read the same packed matrix where transformers ties weights (an output head, a decoder's embeddings)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops
from .errors import CaloraError
from .formats import WeightFormat, cuda_order
from .formats.layout import BITS, TILE_ROWS, ZERO_BYTES, split_scales
from .formats.nf4 import NF4
from .formats.values import dequantize
from .linear import CompressedLinear, DecodedView, refuse_write
from .packed import PackedModule


def gather_rows(packed: dict[str, Tensor], rows: Tensor, fmt: WeightFormat, in_features: int, out_features: int) -> Tensor:
    """Rows (n,) of a packed matrix (out_features, in_features), decoded to (n, in_features) float32.

    Only the bytes of those rows are read: of each 128-byte step a row owns 4 (``csrc/layouts.h``).
    """
    g = fmt.geometry(in_features, out_features)
    if cuda_order.in_cuda_order("packed", packed["packed"]):
        return dequantize(fmt.values, *cuda_order.gather(packed, rows, fmt, in_features, out_features)).flatten(1)[:, :in_features]
    tile, row = rows // TILE_ROWS, rows % TILE_ROWS
    data = packed["packed"].view(g.tiles, g.blocks, g.block_bytes)
    codes = data[..., : g.code_bytes].unflatten(-1, (-1, TILE_ROWS, 4))[tile, :, :, row]  # (n, blocks, steps, 4)
    if BITS[fmt.values] == 4:
        codes = torch.cat((codes & 15, codes >> 4), dim=-1)
    elif fmt.values == "bf16":
        codes = codes.contiguous().view(torch.bfloat16)
    scale = zero = None
    if g.block_bytes > g.code_bytes:
        scale = data[..., g.code_bytes :].unflatten(-1, (TILE_ROWS, 2))[tile, :, row]
        scale = scale.contiguous().view(torch.float16).squeeze(-1)  # (n, blocks)
    if "scales" in packed:
        scale_codes, outer = split_scales(packed["scales"], g)
        scale = NF4.scales(scale_codes[tile, :, row], outer[tile])
    if "zeros" in packed:
        nibbles = packed["zeros"][: g.tiles * g.blocks * ZERO_BYTES].view(g.tiles, g.blocks, ZERO_BYTES)
        zero = (nibbles[tile, :, row % ZERO_BYTES] >> (row // ZERO_BYTES * 4).to(torch.uint8).unsqueeze(-1)) & 15
    dense = dequantize(fmt.values, codes.flatten(2), scale, zero)
    return dense.flatten(1)[:, :in_features]


class CompressedEmbedding(PackedModule, nn.Embedding):
    """Drop-in for nn.Embedding with a packed table (num_embeddings, embedding_dim).

    Look-ups return ``dtype``, what ``.weight.dtype`` reports; ``.weight`` is a decoded, read-only view as that of
    CompressedLinear. The packed tensors (uint8) are buffers named by ``fmt.tensors`` and start uninitialised: use
    :meth:`from_embedding`, or load a state dict. No gradient flows into the table.
    """

    read_only = "compressed embeddings cannot be changed; compress the dense model with embeddings=None to resize or train them"

    def __init__(self, num_embeddings: int, embedding_dim: int, fmt: WeightFormat, padding_idx=None, dtype=None, device=None) -> None:
        nn.Module.__init__(self)  # not nn.Embedding's: there is no dense weight
        if fmt.sparse:
            raise CaloraError(f"embeddings are gathered row by row and cannot be stored as {fmt}; choose a dense format")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.format = fmt
        self.compute_dtype = dtype or torch.get_default_dtype()
        self._allocate(device)

    def _allocate(self, device) -> None:
        for name, shape in self.format.tensors(self.in_features, self.out_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.uint8, device=device))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, fmt: WeightFormat) -> CompressedEmbedding:
        """Pack an nn.Embedding, rounding to nearest. Raises CaloraError for another kind of module, or for NaN."""
        if type(embedding) is not nn.Embedding:
            raise CaloraError(f"cannot compress a {type(embedding).__name__}; expected nn.Embedding")
        weight = embedding.weight.detach()
        layer = cls(*weight.shape, fmt, embedding.padding_idx, weight.dtype, "meta")
        for name, tensor in fmt.pack(weight).items():
            setattr(layer, name, tensor)
        layer.train(embedding.training)
        return layer

    @property
    def in_features(self) -> int:
        """Columns of the packed matrix, as seen by a layer that multiplies with it."""
        return self.embedding_dim

    @property
    def out_features(self) -> int:
        return self.num_embeddings

    @property
    def weight(self) -> Tensor:
        return DecodedView(self)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        refuse_write(self, value)

    def decode(self) -> Tensor:
        """The dense table, (num_embeddings, embedding_dim) float32."""
        return ops.decode(list(self.packed_tensors().values()), self.format, self.in_features, self.out_features)

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        # Not on a GPU, which would have to be waited for, in a graph in vain: there the look-up fails by itself, as torch's does.
        if flat.device.type == "cpu" and not torch.compiler.is_compiling() and flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < self.num_embeddings:
            raise IndexError(f"a token id lies outside 0..{self.num_embeddings - 1}")
        rows = gather_rows(self.packed_tensors(), flat, self.format, self.in_features, self.out_features)
        return rows.to(self.compute_dtype).view(*ids.shape, self.embedding_dim)

    def reset_parameters(self) -> None:
        """Nothing to initialise: the packed table comes from a checkpoint or from_embedding."""

    def extra_repr(self) -> str:
        bits = self.format.bits_per_weight(self.in_features, self.out_features)
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}, {bits:.2f} bits per weight"


class _ReadsAnother:
    """The packed tensors of another module under one's own name; they stay out of this module's state dict."""

    @property
    def packed(self) -> Tensor:
        return self._source[0].packed

    @property
    def zeros(self) -> Tensor:
        return self._source[0].zeros

    @property
    def scales(self) -> Tensor:
        return self._source[0].scales

    def packed_tensors(self) -> dict[str, Tensor]:
        return self._source[0].packed_tensors()


class TiedLinear(_ReadsAnother, CompressedLinear):
    """An output head that multiplies with the packed table of a :class:`CompressedEmbedding`."""

    def __init__(self, source: CompressedEmbedding, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self._source = (source,)  # in a tuple: not a submodule, so that nothing is saved or moved twice
        self.in_features, self.out_features = source.embedding_dim, source.num_embeddings
        self.format, self.compute_dtype = source.format, source.compute_dtype
        self.activations = "int8"
        self.bank = None
        self.register_parameter("bias", bias)


class TiedEmbedding(_ReadsAnother, CompressedEmbedding):
    """Another look-up into the packed table of a :class:`CompressedEmbedding` (T5's encoder and decoder)."""

    def __init__(self, source: CompressedEmbedding) -> None:
        super().__init__(source.num_embeddings, source.embedding_dim, source.format, source.padding_idx, source.compute_dtype)
        self._source = (source,)

    def _allocate(self, device) -> None:
        """The source holds the packed tensors."""
