"""calora_ext: compressed transformers models that keep their LoRA adapters, on kernels of our own."""

from importlib import import_module
from typing import Any

from .errors import CaloraError
from .integrations import when_imported

__version__ = "0.1.0"

# Public names whose modules are imported on first use (PEP 562): `import calora_ext` loads neither torch, nor
# transformers, nor peft.
_LAZY = {
    "CaloraConfig": "integrations.transformers",
    "CaloraTrainer": "adaptation.trainer",
    "CompressedEmbedding": "embedding",
    "CompressedLinear": "linear",
    "Distill": "adaptation",
    "Recipe": "recipe",
    "Recovery": "adaptation",
    "WeightFormat": "formats",
    "active_adapters": "adapters",
    "adapt": "adaptation",
    "compress": "integrations.models",
    "compress_directory": "integrations.streaming",
    "delete_adapter": "adapters",
    "disable_adapters": "adapters",
    "enable_adapters": "adapters",
    "enable_hotswap": "adapters",
    "estimate": "integrations.models",
    "list_adapters": "adapters",
    "load": "integrations.models",
    "load_adapter": "adapters",
    "merge_adapter": "adapters",
    "perplexity": "evaluate",
    "save_adapter": "adapters",
    "set_activations": "integrations.models",
    "set_adapter": "adapters",
    "sparse_adapt": "losa",
}
__all__ = ["CaloraError", *_LAZY]


when_imported("transformers.modeling_utils", "calora_ext.integrations.transformers")
when_imported("peft.tuners.lora.model", "calora_ext.integrations.peft")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
