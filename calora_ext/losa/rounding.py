"""``Rounding``: to the values that a packed format can hold, applied while a weight trains, so that packing it changes nothing.

QA-SparsePEFT (SQFT, arXiv 2410.03750): y = x Q(mask * (W + s U D))^T, where Q rounds to nearest with the scales that the format gives to the weight
before training. The gradient passes through Q as if it were not there (straight-through, Bengio et al., arXiv 1308.3432), also where a code
is clipped.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn.functional import pad

from ..formats import Quantized, WeightFormat
from ..formats.values import VALUES


class Rounding:
    """A function of weights (out, in) of one shape and mask: what ``fmt`` keeps of them, with the scales of the weight it is made from.

    Raises CaloraError for a weight that the format cannot hold.
    """

    def __init__(self, fmt: WeightFormat, weight: Tensor, mask: Tensor) -> None:
        plain = fmt.quantize(weight, mask)
        scales = plain.scales()
        self._values, self._geometry, self._code_dtype = VALUES[fmt.values], fmt.geometry(*reversed(weight.shape)), plain.codes.dtype
        self._plain = replace(plain, codes=plain.codes[:0])
        self._scales = None if scales is None else scales.unsqueeze(-1)  # (out, blocks, 1)

    def __call__(self, weight: Tensor) -> Tensor:
        return self._flat(self._values.value(self._codes(weight), self._scales, None)).to(weight.dtype)

    def quantized(self, weight: Tensor) -> Quantized:
        """The codes that stand for ``self(weight)``, exactly."""
        return replace(self._plain, codes=self._flat(self._codes(weight)).contiguous())

    def _codes(self, weight: Tensor) -> Tensor:
        g = self._geometry
        blocks = pad(weight.float(), (0, g.columns - g.in_features)).view(-1, g.blocks, g.block_columns)
        return self._values.codes(blocks, self._scales, None).to(self._code_dtype)

    def _flat(self, blocks: Tensor) -> Tensor:
        return blocks.view(len(blocks), -1)[:, : self._geometry.in_features]
