"""The teacher: the uncompressed model with its adapter, in evaluation mode and without gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from ..evaluate import evaluating, task_loss
from ..io.batches import Batch, Sample
from .config import Distill
from .objective import Targets, hidden_state


class Teacher(Protocol):
    """Where a step's targets come from: a model (``LiveTeacher``) or files (``cache.TeacherCache``)."""

    def targets(self, samples: list[Sample], batch: Batch) -> Targets: ...


class LiveTeacher:
    """Runs the teacher for every batch. Its parameters get no gradient and its dropout is off."""

    def __init__(self, model: nn.Module, task: str, distill: Distill) -> None:
        self.model, self.task, self.distill = model, task, distill

    def targets(self, samples: list[Sample], batch: Batch) -> Targets:
        wanted = self.distill.targets()
        with evaluating(self.model), torch.no_grad():
            _, _, output = task_loss(self.model, batch, self.task, output_hidden_states=bool(wanted))
        hidden = {name: hidden_state(output, *which) for name, which in wanted.items()}
        return Targets(hidden, output.logits if self.distill.logits else None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model, also where PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's parameters and buffers: names, shapes, and up to 1024 evenly spaced values of each."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // 1024)
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model records a gradient for the time being."""
    recording = [p for p in model.parameters() if p.requires_grad]
    for p in recording:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in recording:
            p.requires_grad_(True)
