"""``CompressedLinear``: an ``nn.Linear`` whose weight is packed bytes, and the read-only view that stands for ``.weight``.

It subclasses nn.Linear because transformers and PEFT find layers by ``isinstance`` and probe ``.weight.dtype``; the view
gives shape, dtype and device for free, decodes on first use, and refuses writes (a write would be lost silently).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import ops
from .errors import CaloraError
from .formats import WeightFormat
from .packed import PackedModule
from .recipe import Recipe


class DecodedView(torch.Tensor):
    """The dense weight of a CompressedLinear: decoded when its values are read, never stored, never written."""

    @staticmethod
    def __new__(cls, layer: CompressedLinear) -> DecodedView:
        view = torch.Tensor._make_wrapper_subclass(
            cls, (layer.out_features, layer.in_features), dtype=layer.compute_dtype, device=layer.packed.device
        )
        view._layer = layer
        view._is_hf_initialized = True  # transformers' weight initialisation leaves it alone
        return view

    def __repr__(self) -> str:
        return f"DecodedView({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        # These descriptors are created afresh on each access: `is` never matches.
        if func == torch.Tensor.data.__set__:
            raise CaloraError(args[0]._layer.read_only)
        if func == torch.Tensor.data.__get__ or func is torch.Tensor.detach:
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._layer)
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise CaloraError(args[0]._layer.read_only)
        decoded = lambda a: a._layer.decode().to(a.dtype) if isinstance(a, cls) else a  # noqa: E731
        return func(*tree_map(decoded, args), **tree_map(decoded, kwargs or {}))


class CompressedLinear(PackedModule, nn.Linear):
    """Drop-in for nn.Linear with a packed weight and a low-rank bank (LoRA + recovery) beside it.

    in_features, out_features: as in nn.Linear. bias: whether there is one. fmt: the weight format. dtype: what
    ``.weight.dtype`` reports and the bias is stored in. extent: see ``WeightFormat.tensors``. The packed tensors (uint8) are buffers named by ``fmt.tensors``;
    they start uninitialised: use :meth:`from_linear`, or load a state dict.
    """

    read_only = "CompressedLinear.weight is a decoded, read-only view; merge adapters with calora_ext.merge_adapter"
    changed = False  # whether an adapter was merged into it since it was compressed, loaded or saved

    def __init__(self, in_features: int, out_features: int, bias: bool, fmt: WeightFormat, dtype=None, device=None,
                 extent: int = 0) -> None:  # fmt: skip
        nn.Module.__init__(self)  # not nn.Linear's: there is no dense weight
        self.in_features, self.out_features = in_features, out_features
        self.format = fmt
        self.compute_dtype = dtype or torch.get_default_dtype()
        self.activations = "int8"
        self.bank: nn.Module | None = None  # lowrank.LowRankBank once an adapter is loaded
        for name, shape in fmt.tensors(in_features, out_features, extent).items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.uint8, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=self.compute_dtype, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(cls, linear: nn.Module, fmt: WeightFormat | Recipe, packed: dict[str, Tensor] | None = None,
                    mask: Tensor | None = None) -> CompressedLinear:  # fmt: skip
        """Pack an nn.Linear, or transformers' Conv1D (transposed once, here). packed: tensors already chosen for it.

        mask: (out_features, in_features) bool, the weights that a sparse format keeps; without it a recipe's pruner chooses,
        and a format keeps those that are not 0. Raises CaloraError for another kind of module, for weights that are not
        finite, or for a mask that the format cannot hold.
        """
        if isinstance(fmt, Recipe):
            recipe = fmt.resolve(calibrated=False)
            if packed is None and mask is None:
                mask = recipe.mask(dense_weight(linear))
            layer = cls.from_linear(linear, recipe.format(), packed, mask)
            layer.activations = recipe.activations
            return layer
        weight = dense_weight(linear)
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, linear.bias is not None, fmt, weight.dtype, "meta")
        packed = fmt.pack(weight, mask) if packed is None else packed
        fmt.check(packed, in_features, out_features)
        for name, tensor in packed.items():
            setattr(layer, name, tensor)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        layer.train(linear.training)
        return layer

    @property
    def weight(self) -> Tensor:
        return DecodedView(self)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        refuse_write(self, value)

    def decode(self) -> Tensor:
        """The dense weight, (out_features, in_features) float32."""
        return ops.decode(list(self.packed_tensors().values()), self.format, self.in_features, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        bank = self.bank
        if bank is None:
            return self.fused(x)
        term = bank.forward_train(x)
        if term is None:
            return self.fused(x, *bank.factors())
        # Trained with dropout: the branches see other inputs than the base, so torch adds them.
        return (self.fused(x, activations="exact").float() + term).to(x.dtype)

    def fused(self, x: Tensor, down: Tensor | None = None, up: Tensor | None = None, identity_rank: int = 0,
              activations: str | None = None) -> Tensor:  # fmt: skip
        """The base with these low-rank operands instead of the layer's own bank; see ``ops.linear``."""
        tensors, fmt = self.running()
        return ops.linear(
            x, tensors, fmt, self.in_features, self.out_features,
            self.bias, down, up, identity_rank, activations or self.activations,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """Nothing to initialise: the packed weight comes from a checkpoint or from_linear."""

    def extra_repr(self) -> str:
        bits = 8 * sum(t.numel() for t in self.packed_tensors().values()) / (self.in_features * self.out_features)
        fmt = self.runs_as()
        runs = "" if fmt is self.format else f", runs as {fmt} on {ops.native.isa()}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.format}, {bits:.2f} bits per weight{runs}"


def refuse_write(layer: nn.Module, value: Tensor) -> None:
    """What assigning to ``.weight`` does: nothing for the layer's own view (PEFT does that when it unwraps), else an error."""
    if not isinstance(value, DecodedView) or value._layer is not layer:
        raise CaloraError(layer.read_only)


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight of an nn.Linear or transformers Conv1D as (out_features, in_features)."""
    if isinstance(linear, CompressedLinear):
        raise CaloraError("this layer is compressed already; start from the dense model")
    if isinstance(linear, nn.Linear):
        return linear.weight.detach()
    if type(linear).__name__ == "Conv1D" and getattr(linear, "weight", None) is not None and linear.weight.dim() == 2:
        return linear.weight.detach().t()
    raise CaloraError(f"cannot compress a {type(linear).__name__}; expected nn.Linear or transformers' Conv1D")
