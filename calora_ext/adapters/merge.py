"""Merging a LoRA into packed weights: rounding them anew in their format, and saying what that cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..embedding import CompressedEmbedding
from ..errors import CaloraError
from ..io.peft_adapter import LoraAdapter
from ..linear import CompressedLinear
from ..lowrank import Factors
from .resident import base_only, branches_of, delete_adapter, install, select, set_module, state_of


@dataclass(frozen=True)
class MergeReport:
    """What merging cost. errors: by module path, |stored - (base + delta)| / |delta|, Frobenius: 0 is exact, 1 means that
    rounding moved the weight as far as the adapter did."""

    adapter_name: str
    errors: dict[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.errors.items(), key=lambda item: item[1])

    @property
    def mean(self) -> float:
        return sum(self.errors.values()) / len(self.errors)

    def __str__(self) -> str:
        path, worst = self.worst
        return (
            f"merged {self.adapter_name!r} into {len(self.errors)} layers; rounding error / adapter: "
            f"mean {self.mean:.3f}, worst {worst:.3f} ({path})"
        )


@torch.no_grad()
def merge_adapter(model: nn.Module, adapter_name: str, lora_only: bool = False) -> MergeReport:
    """Add an adapter's LoRA to the weights, rounding them anew in their format, and forget it.

    Raises CaloraError if the adapter has recovery rows (GELU cannot be merged): with lora_only they stay resident, and
    active if they were. It also raises for a matrix shared by two layers.
    """
    state = state_of(model)
    entry = state.get(adapter_name)
    lora, recovered = branches_of(entry, adapter_name)
    if recovered and not lora_only:
        raise CaloraError(
            f"adapter {adapter_name!r} has recovery rows, which cannot be merged (GELU is not linear); pass lora_only=True to "
            "merge its LoRA and keep the recovery resident"
        )
    if not lora:
        raise CaloraError(f"adapter {adapter_name!r} has no LoRA to merge")
    if any(bank.trained == adapter_name for bank in entry.banks.values()):
        raise CaloraError(f"adapter {adapter_name!r} is being trained; finish training before merging it")
    was_active = adapter_name in state.chosen
    with base_only(model):
        layers = {path: model.get_submodule(path) for path in lora}
        _refuse_shared(model, layers)
        for path in entry.lora_bias:
            if layers[path].bias is None:
                raise CaloraError(f"{path} has no bias to merge lora_bias into; keep adapter {adapter_name!r} unmerged")
        # Packed weights are all rounded before the first is replaced: one that cannot be leaves the model as it was.
        packed = {path: requantised(layer, delta_of(lora[path])) for path, layer in layers.items() if isinstance(layer, CompressedLinear)}
        errors = {path: error for path, (_, error) in packed.items()}
        for path, layer in layers.items():
            if path in packed:
                replace_packed(layer, packed[path][0])
            else:
                errors[path] = _add(layer, delta_of(lora[path]))
        for path, module in entry.modules.items():
            set_module(model, path, module)
        for path, bias in entry.biases.items():
            layer = model.get_submodule(path)
            layer.bias = nn.Parameter(bias.to(layer.bias), requires_grad=False)
        for path, bias in entry.lora_bias.items():
            layers[path].bias = nn.Parameter(layers[path].bias + bias.to(layers[path].bias), requires_grad=False)
    delete_adapter(model, adapter_name)
    if recovered:
        install(model, adapter_name, LoraAdapter({}), recovered, entry.base)
        if was_active:
            chosen = (*state.chosen, adapter_name)
            if state.enabled:
                select(model, state, chosen)
            state.chosen = chosen
    return MergeReport(adapter_name, errors)


def delta_of(f: Factors) -> Tensor:
    """What a LoRA adds to a weight, (out_features, in_features) float32."""
    return f.scale * (f.up @ f.down)


def replace_packed(layer: CompressedLinear, packed: dict[str, Tensor], changed: bool = True) -> None:
    """Give a layer other packed tensors. changed: whether they differ from those that it was compressed to, or loaded with."""
    for name, tensor in packed.items():
        setattr(layer, name, tensor)
    layer.changed = changed


@torch.no_grad()
def _add(layer: nn.Module, delta: Tensor) -> float:
    """Add delta (out_features, in_features) to a dense layer's weight; returns MergeReport's error."""
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()  # Conv1D is transposed
    wanted = weight.float() + delta
    weight.copy_(wanted)
    return _relative(weight.float() - wanted, delta)


@torch.no_grad()
def requantised(layer: CompressedLinear, delta: Tensor, packed: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], float]:
    """The packed tensors of a weight plus delta, and MergeReport's error. The layer stays as it is; what a sparse layer does
    not keep stays 0, and the delta there counts as error.

    packed: the weight, if not the layer's present one. Raises CaloraError for a layer that reads the matrix of another one.
    """
    if "packed" not in layer._buffers:
        raise CaloraError("this layer shares its weight with the input embeddings; an adapter on it cannot be merged")
    packed, size = packed or layer.packed_tensors(), (layer.in_features, layer.out_features)
    mask = layer.format.unpack(packed, *size).mask if layer.format.sparse else None
    wanted = ops.decode(list(packed.values()), layer.format, *size) + delta
    packed = layer.format.pack(wanted, mask)
    stored = ops.decode(list(packed.values()), layer.format, *size)
    return packed, _relative(stored - wanted, delta)


def _relative(error: Tensor, delta: Tensor) -> float:
    size = delta.norm()
    return float(error.norm() / size) if size > 0 else 0.0


def _refuse_shared(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """A merge into one of two layers that share a matrix (tied embeddings) would change, or untie, the other."""
    users: dict[int, set[str]] = {}
    for path, module in model.named_modules():
        tensor = _matrix(module)
        if tensor is not None:
            users.setdefault(tensor.data_ptr(), set()).add(path)
    for path, layer in layers.items():
        if others := users[_matrix(layer).data_ptr()] - {path}:
            raise CaloraError(f"{path} shares its weight with {min(others)}; an adapter on it cannot be merged")


def _matrix(module: nn.Module) -> Tensor | None:
    """What holds a layer's weight: the packed tensor, or the parameter."""
    return module.packed if isinstance(module, CompressedLinear | CompressedEmbedding) else module._parameters.get("weight")
