"""Tensors that wait on disk: those of a model that is written layer by layer, and activations that memory has no room for.

Both wait in files without a name, which are gone with the process whatever ends it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CaloraError
from .checkpoint import CHUNK, alignment_metadata, header_json


def _full(directory: Path, error: OSError) -> CaloraError:
    return CaloraError(f"cannot write to {directory}: {error.strerror or error}; free some space or choose another directory")


class TensorSpool:
    """Tensors by name in one file, in the order in which they come; :meth:`write` makes a safetensors file of them."""

    def __init__(self, directory: Path) -> None:
        """directory: where the file without a name lies."""
        self.directory = directory
        self.file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 (close)
        self.begins: dict[str, int] = {}
        self.tensors: dict[str, Tensor] = {}  # on the meta device

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises CaloraError where the disk refuses."""
        try:
            self.begins[name] = self.file.seek(0, os.SEEK_END)
            if tensor.numel():
                for piece in tensor.detach().contiguous().view(-1).view(torch.uint8).split(CHUNK):
                    self.file.write(memoryview(piece.numpy()))
        except OSError as error:
            raise _full(self.directory, error) from error
        self.tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def write(self, path: Path, names: Iterable[str], done: Callable[[int], Any]) -> None:
        """The file that safetensors would write of these tensors, packed ones aligned. done: told how many bytes more were written."""
        tensors = {name: self.tensors[name] for name in names}
        header, order = header_json(tensors, alignment_metadata(tensors, {"format": "pt"}))
        try:
            with open(path, "wb") as target:
                target.write(len(header).to_bytes(8, "little") + header)
                for name in order:
                    self.file.seek(self.begins[name])
                    left = tensors[name].nbytes
                    while left:
                        piece = self.file.read(min(left, CHUNK))
                        target.write(piece)
                        left -= len(piece)
                        done(len(piece))
        except OSError as error:
            raise _full(path.parent, error) from error

    def close(self) -> None:
        self.file.close()


class ActivationSpool:
    """Moves tensors to disk in place: they are mapped from then on, and what was read of them can be dropped from memory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.maps: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # by address, while tensors use them

    def move(self, tensor: Tensor) -> None:
        """Does nothing for one that was moved already. Raises CaloraError where the disk refuses."""
        if tensor.data_ptr() in self.maps:
            return
        try:
            with tempfile.TemporaryFile(dir=self.directory) as file:
                file.write(memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()))
                file.flush()
                mapped = mmap.mmap(file.fileno(), tensor.nbytes)
        except OSError as error:
            raise _full(self.directory, error) from error
        moved = torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape)
        self.maps[moved.data_ptr()] = mapped
        tensor.data = moved  # whoever holds the tensor, frames of the model's own forward pass included, holds this one now

    def rest(self) -> None:
        """Drop what was read from memory; it is read again from disk, or from what the system still caches of it."""
        for mapped in self.maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)
