"""Stock PEFT on compressed layers: LoRA through the fused operator, merging in the layer's own format.

PEFT has no registry for layers of others: ``LoraModel._create_new_module`` asks a list of dispatchers, the last of which,
``dispatch_default``, is looked up in its module at each call. That name is replaced (peft 0.21), so that get_peft_model,
PeftModel.from_pretrained and transformers' ``model.load_adapter`` / ``add_adapter`` all meet it; and the copies that
``modules_to_save`` trains are made dense. Other PEFT methods see an nn.Linear whose weight is decoded when it is read and
refuses to be written.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from typing import Any

import peft.tuners.lora.model as lora_model
import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .. import ops
from ..adapters import dense_copy, replace_packed, requantised
from ..embedding import CompressedEmbedding
from ..errors import CaloraError
from ..io.peft_adapter import BASE_CHANGING_INITS
from ..linear import CompressedLinear
from ..lowrank import NO_BANK, Bank


class CaloraLoraLinear(lora.Linear):
    """PEFT's LoRA layer around a CompressedLinear.

    Plain LoRA without dropout runs as one fused operator. Everything else (dropout in training, DoRA and other variants,
    ``lora_bias``, adapter_names) runs as PEFT does it, on the compressed base.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.fan_in_fan_out = False  # a Conv1D was transposed when it was packed
        self._operands: tuple[Any, Bank] = (None, NO_BANK)
        self._original: tuple[dict[str, Tensor], Tensor | None] | None = None  # packed tensors and bias, while merged
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.merge_error = 0.0  # |stored - (base + delta)| / |delta| of what is merged now

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        refuse(self.get_base_layer(), config)
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self.disable_adapters or self.merged or not isinstance(self.base_layer, CompressedLinear):
            return super().forward(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not all(self._is_plain(name) for name in active):
            return super().forward(x)
        return self.base_layer.fused(x, *self._bank(active))

    def _is_plain(self, name: str) -> bool:
        dropout = self.lora_dropout[name]
        return name not in self.lora_variant and not self.lora_bias[name] and (not self.training or isinstance(dropout, nn.Identity))

    def _bank(self, active: list[str]) -> Bank:
        """The active adapters side by side. For inference they are cast and tiled once, until a weight or a scale changes."""
        if not active:
            return NO_BANK
        weights = [(self.lora_A[n].weight, self.lora_B[n].weight, self.scaling[n]) for n in active]
        trained = torch.is_grad_enabled() and any(a.requires_grad or b.requires_grad for a, b, _ in weights)
        if trained or torch.compiler.is_compiling():
            return side_by_side(weights)
        dtype = torch.bfloat16 if self.base_layer.compute_dtype == torch.bfloat16 else torch.float32
        key = (dtype, *((a.data_ptr(), a._version, b.data_ptr(), b._version, float(s)) for a, b, s in weights))
        if self._operands[0] != key:
            with torch.no_grad():
                down, up, rank = side_by_side(weights)
                self._operands = (key, (down.to(dtype), ops.tile_up(up.to(dtype)), rank))
        return self._operands[1]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Round base + LoRA anew in the base's format. The packed original is kept, so that unmerging is exact.

        Warns with the measured error. Raises CaloraError for variants (DoRA, ...) and for a matrix shared with another layer.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base = self.get_base_layer()
        wanted = [*self.merged_adapters, *names]
        if variants := [name for name in wanted if name in self.lora_variant]:
            raise CaloraError(f"adapter {variants[0]!r} is a LoRA variant, which cannot be merged into packed weights; keep it unmerged")
        if base.bias is None and any(self.lora_bias[name] for name in wanted):
            raise CaloraError("lora_bias cannot be merged into a layer without bias; keep the adapter unmerged")
        original, original_bias = self._original or (base.packed_tensors(), base.bias)
        delta = sum(self.get_delta_weight(name).float() for name in wanted)
        packed, self.merge_error = requantised(base, delta, original)  # all that is merged is rounded together, once
        bias = original_bias
        for name in wanted:
            if self.lora_bias[name]:
                bias = bias + (self.lora_B[name].bias * self.scaling[name]).to(bias.dtype)
        self._set_base(packed, bias, changed=True)
        self._original, self.merged_adapters = (original, original_bias), wanted
        if self.merge_error > 0.005:
            # One significant digit: layers with the same loss warn once, by Python's default filter.
            share = round(self.merge_error, -math.floor(math.log10(self.merge_error)))
            warnings.warn(f"merging LoRA into {base.format} weights rounds it: error / adapter is about {share:g}", stacklevel=2)

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._set_base(*self._original, changed=False)
        self._original, self.merged_adapters, self.merge_error = None, [], 0.0

    def _set_base(self, packed: dict[str, Tensor], bias: Tensor | None, changed: bool) -> None:
        base = self.get_base_layer()
        replace_packed(base, packed, changed)
        base.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)


def side_by_side(weights: list[tuple[Tensor, Tensor, float]]) -> Bank:
    """One bank of several (A, B, scale): A stacked, B scale beside each other, in float32."""
    downs, ups = [a.float() for a, _, _ in weights], [b.float() * scale for _, b, scale in weights]
    down, up = (downs[0], ups[0]) if len(weights) == 1 else (torch.cat(downs), torch.cat(ups, 1))
    return down, up, down.shape[0]


def refuse(base: CompressedLinear, config: Any) -> None:
    """Raises CaloraError for what PEFT would do to a packed weight, and for a layer that has native adapters."""
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise CaloraError(f"init_lora_weights={init!r} rewrites the base weight, which is packed here; use another initialisation")
    if getattr(config, "kasa_config", None):
        raise CaloraError("KaSA rewrites the base weight, which is packed here; use plain LoRA")
    if base.bank is not None and base.bank.names():
        raise CaloraError(
            f"this layer already has native adapters ({', '.join(base.bank.names())}); delete them with calora_ext.delete_adapter "
            "before adding a PEFT adapter"
        )


def _dispatch(original):
    @functools.wraps(original)
    def dispatch_default(target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, CompressedLinear) and parameter_name is None:
            return CaloraLoraLinear(target, adapter_name, config=config, **kwargs)
        return original(target, adapter_name, config=config, parameter_name=parameter_name, **kwargs)

    dispatch_default._calora = True
    return dispatch_default


def _update(original):
    """``ModulesToSaveWrapper.update``: what it copies is to be trained and saved, so packed weights in the copy are decoded."""

    @functools.wraps(original)
    def update(self: ModulesToSaveWrapper, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        original(self, adapter_name, *args, **kwargs)
        own = self.modules_to_save[adapter_name]
        if any(isinstance(module, CompressedLinear | CompressedEmbedding) for module in own.modules()):
            self.modules_to_save[adapter_name] = dense_copy(own).requires_grad_(adapter_name == self.active_adapter)

    update._calora = True
    return update


def register() -> None:
    """Let PEFT put its LoRA on compressed layers; may be called again."""
    if not hasattr(ModulesToSaveWrapper.update, "_calora"):
        ModulesToSaveWrapper.update = _update(ModulesToSaveWrapper.update)
    if not hasattr(lora_model.dispatch_default, "_calora"):
        lora_model.dispatch_default = _dispatch(lora_model.dispatch_default)


register()
