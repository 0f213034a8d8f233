"""Replacing dense modules by compressed ones, and what transformers must forget about the dense ones."""

from __future__ import annotations

from torch import Tensor, nn

from ..embedding import CompressedEmbedding, TiedEmbedding, TiedLinear
from ..errors import CaloraError
from ..formats import WeightFormat
from ..linear import CompressedLinear, dense_weight
from ..policy import features
from ..pruning import Target, magnitude

Compressed = CompressedLinear | CompressedEmbedding


def compressed_modules(model: nn.Module) -> dict[str, Compressed]:
    """The compressed modules by dotted name, those that read another's matrix included."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Compressed)}


def empty(module: nn.Module, fmt: WeightFormat, extent: int = 0) -> Compressed:
    """The compressed counterpart of a dense module on the meta device, to be filled from a checkpoint; extent as in
    ``WeightFormat.tensors``."""
    in_features, out_features = features(module)
    dtype = module.weight.dtype
    if isinstance(module, nn.Embedding):
        return CompressedEmbedding(out_features, in_features, fmt, module.padding_idx, dtype, "meta")
    return CompressedLinear(in_features, out_features, module.bias is not None, fmt, dtype, "meta", extent)


def pack(name: str, module: nn.Module, fmt: WeightFormat, target: Target | Tensor | None, packed: dict[str, Tensor] | None = None) -> Compressed:
    """Compress a dense module, rounded to nearest unless `packed` was chosen already. target: how much a sparse format prunes,
    by magnitude, or the mask (out, in). CaloraErrors name the module."""
    try:
        if isinstance(module, nn.Embedding):
            return CompressedEmbedding.from_embedding(module, fmt)
        mask = None
        if fmt.sparse and packed is None:
            mask = target if isinstance(target, Tensor) else magnitude(dense_weight(module), target)
        return CompressedLinear.from_linear(module, fmt, packed, mask)
    except CaloraError as error:
        raise CaloraError(f"{name}: {error}") from None


def tie(model: nn.Module, source: str, targets: list[str]) -> None:
    """Make `targets` read the packed matrix of the compressed embedding `source`, where transformers tied the dense one."""
    table = model.get_submodule(source)
    for name in targets:
        dense = model.get_submodule(name)
        tied = TiedEmbedding(table) if isinstance(dense, nn.Embedding) else TiedLinear(table, dense.bias)
        model.set_submodule(name, tied.train(dense.training))


def forget_ties(model: nn.Module) -> None:
    """Take compressed modules out of transformers' declarations of tied weights: they have no ``weight`` to tie."""
    names = {f"{name}.weight" for name in compressed_modules(model)}
    for prefix, module in model.named_modules():
        prefix = f"{prefix}." if prefix else ""
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            declared = getattr(module, attribute, None)
            if isinstance(declared, dict):
                kept = {t: s for t, s in declared.items() if prefix + t not in names and prefix + s not in names}
                if kept != declared:
                    setattr(module, attribute, kept)  # on the instance: the class keeps its own
