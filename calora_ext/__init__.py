"""calora_ext: compressed transformers models that keep their LoRA adapters, on kernels of our own."""

from .errors import CaloraError
from .formats import WeightFormat
from .linear import CompressedLinear

__version__ = "0.1.0"
__all__ = ["CaloraError", "CompressedLinear", "WeightFormat"]
