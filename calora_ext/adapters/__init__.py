"""The adapters of a model: ``resident`` (load, select, save) and ``merge``."""

from .merge import MergeReport, merge_adapter, replace_packed, requantised
from .resident import (
    active_adapters,
    adapter_banks,
    add_adapter,
    base_only,
    check_fits,
    delete_adapter,
    dense_copy,
    disable_adapters,
    enable_adapters,
    enable_hotswap,
    install,
    list_adapters,
    load_adapter,
    save_adapter,
    set_adapter,
)  # fmt: skip

__all__ = [
    "MergeReport", "active_adapters", "adapter_banks", "add_adapter", "base_only", "check_fits", "delete_adapter", "dense_copy", "disable_adapters",
    "enable_adapters", "enable_hotswap", "install", "list_adapters", "load_adapter", "merge_adapter", "replace_packed", "requantised", "save_adapter",
    "set_adapter",
]  # fmt: skip
