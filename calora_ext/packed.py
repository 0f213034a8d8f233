"""What modules with a packed weight share: the tensors themselves, and the order of their bytes on each device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops
from .formats import WeightFormat
from .formats.cuda_order import arrange, from_cuda_order, in_cuda_order, to_cuda_order


class PackedModule(nn.Module):
    """Mixin of a module whose packed tensors are buffers named by ``format.tensors``.

    On a CPU they are the canonical bytes; on a GPU they are reordered, one tensor at a time, in place of what was moved there.
    State dicts always hold canonical bytes, of a module on a GPU on the CPU: a second copy there might not fit.
    """

    format: WeightFormat
    in_features: int
    out_features: int
    compute_dtype: torch.dtype
    # What runs in place of the packed tensors, and those it was made of: held, so that no other tensor gets their addresses.
    _expanded: tuple[tuple[str, list[tuple[int, int]]], list[Tensor], tuple[list[Tensor], WeightFormat]] | None = None

    def packed_tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, in the order of the device they are on. Whatever put them there (``.to``, a loader), they are reordered
        on first use."""
        tensors = {}
        for name in self.format.names:
            tensor = self._buffers[name]  # not getattr, which takes 0.6 us of a call that should cost 8
            tensors[name] = arrange(name, tensor, self.format, self.in_features, self.out_features, tensors.get("packed"))
            if tensors[name] is not tensor:
                setattr(self, name, tensors[name])
        return tensors

    def runs_as(self) -> WeightFormat:
        """The format of :meth:`running` on a CPU."""
        extent = self._buffers["kept"].numel() if "kept" in self._buffers else 0
        return ops.runs_as(self.format, self.format.density(self.in_features, self.out_features, extent))

    def running(self) -> tuple[list[Tensor], WeightFormat]:
        """What the kernels are given, and its format: the packed tensors as they are, or, where the rung in use computes
        another format faster (``ops.runs_as``), that one. It is made on first use and kept; the packed tensors stay what is
        saved, and mapped from a file they take no memory that something else needs. Under ``torch.compile``, which cannot make it, it is
        what an earlier call made, if there was one."""
        tensors = list(self.packed_tensors().values())
        if torch.compiler.is_compiling():
            return (tensors, self.format) if self._expanded is None else self._expanded[2]
        if ops.runs_as(self.format) is self.format or tensors[0].device.type != "cpu":
            return tensors, self.format
        source = (ops.native.isa(), [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors])
        if self._expanded is None or self._expanded[0] != source:
            self._expanded = (source, tensors, ops.as_it_runs(tensors, self.format, self.in_features, self.out_features))
        return self._expanded[2]

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_expanded"}  # copies and pickles make it again

    def _apply(self, fn, recurse=True):
        self._expanded = None  # a copy that is left behind would only take memory
        empty = self.packed.is_meta  # what to_empty() then holds are no weights yet, in whatever order
        # uint8 buffers are not cast by .to(dtype); the dtype that the module reports follows, as nn.Linear's would.
        super()._apply(fn, recurse)
        if not empty:
            self.packed_tensors()
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.packed.device)).dtype
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.format.names:
            tensor = destination.get(prefix + name)
            if tensor is not None and in_cuda_order(name, tensor):
                destination[prefix + name] = from_cuda_order(name, tensor, self.format, self.in_features, self.out_features, self.packed).cpu()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        self._expanded = None  # tensors made in inference mode do not count what is copied into them
        # Loading copies into buffers that may be in CUDA order; assigned tensors are arranged when they are first used.
        if not local_metadata.get("assign_to_params_buffers", False):
            arranged = {}
            for name in self.format.names:
                tensor, own = state_dict.get(prefix + name), self._buffers.get(name)
                if tensor is not None and own is not None and in_cuda_order(name, own) and tensor.dtype == own.dtype and tensor.numel() == own.numel():
                    tensor, bits = tensor.to(own.device), state_dict.get(prefix + "packed", self.packed)
                    arranged[prefix + name] = to_cuda_order(name, tensor, self.format, self.in_features, self.out_features, bits)
            state_dict = {**state_dict, **arranged} if arranged else state_dict
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
