"""LoSA: a LoRA trained under the sparsity mask, merged without cost (Huang et al., ICLR 2025, arXiv 2502.14816).

run        sparse_adapt()                          schedule   how sparse, how many steps, which mean rank at each pruning
masked     y = x (mask * (W + s U D))^T + b        reconstruction   how far each block is from the dense model, and its rank
prune      masks on the merged weights             state      to go on bit for bit           result   what came of it
rounding   to the packed grid, while training      start      an adapter that begins with what a pruning took
"""

from .result import SparseAdaptResult
from .run import default_rates, sparse_adapt

__all__ = ["SparseAdaptResult", "default_rates", "sparse_adapt"]
