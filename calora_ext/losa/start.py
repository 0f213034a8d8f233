"""``Start``: an adapter that begins with what a pruning took from the layer, as far as the kept weights can bring it back.

EoRA (arXiv 2410.21271) begins a LoRA with the truncated SVD of W - What as the inputs see it. Under the mask that product would lose most of
itself, so only its D is taken, and U solved for: row i of the weight has the u that makes ||(lost_i - s u (mask_i * D)) L|| smallest, where
L L^T is the second moment of the inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..adaptation.residual import DAMPING, root, truncated
from ..compression.calibrate import Gram

SKETCH = 256  # random mixtures of a layer's inputs that stand for all of them on the left side, which has 16 unknowns a row
CHUNK = 1 << 21  # values of the largest intermediate


class Start:
    """Of one layer: D of the largest rank it may get, and the equations of U, of which a smaller rank needs the leading ones.

    lost: (out, in), the weight before the pruning less that after it. mask: (out, in) bool. Raises CaloraError for inputs that are not finite.
    """

    def __init__(self, lost: Tensor, mask: Tensor, gram: Gram, rank: int, generator: torch.Generator) -> None:
        lower = root(gram.matrix / gram.tokens)
        columns = lost.shape[1]
        down = truncated(lost, lower, rank, generator)[0]
        # As large as a D that is drawn (MaskedLinear.adapt): the optimiser's steps are made for that.
        self.down = (down / (math.sqrt(3 * columns) * down.square().mean(1, keepdim=True).sqrt())).contiguous()
        # (lost_i L) (mask_i * D L)^T for all rows at once, exactly: of what is lost little can come back, which noise would bury.
        self.right = (lost @ lower @ lower.t()).masked_fill_(~mask, 0.0) @ self.down.t()  # (out, rank)
        if columns > SKETCH:
            lower = lower @ torch.randn(columns, SKETCH, generator=generator).div_(math.sqrt(SKETCH)).to(lower)
        left = []
        for rows in mask.split(max(1, CHUNK // (rank * lower.shape[1]))):
            terms = (self.down * rows.unsqueeze(1)) @ lower  # (rows, rank, sketch)
            left.append(terms @ terms.mT)
        self.left = torch.cat(left)  # (out, rank, rank)

    def factors(self, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """D (rank, in) and U (out, rank), both float32; rank: at most that of the whole."""
        left = self.left[:, :rank, :rank].double()
        diagonal = left.diagonal(dim1=1, dim2=2)
        diagonal += DAMPING * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny  # rows may keep fewer weights than the rank
        up = torch.linalg.solve(left, self.right[:, :rank].double())
        return self.down[:rank].clone(), (up / scale).float().contiguous()
