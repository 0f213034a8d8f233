"""The head of a classifier, which trains with the adapters: a fresh one is drawn at random."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..adaptation.student import TrainedHead, head_of
from ..errors import CaloraError


class Head:
    """A model's head, in fp32 and recording gradients until ``trained.finish()``; came: a copy as it was.

    Raises CaloraError where there is none, or where others share its weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.path = model, head_of(model)
        module = model.get_submodule(self.path)
        own = {id(p) for p in module.parameters()}
        for name, p in model.named_parameters(remove_duplicate=False):
            if id(p) in own and not name.startswith(f"{self.path}."):
                raise CaloraError(f"the head {self.path} shares its weight with {name}, which would be trained too; untie it first")
        self.came = copy.deepcopy(module)
        self.trained = TrainedHead(module)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.trained.module.named_parameters())

    @contextmanager
    def as_it_came(self) -> Iterator[None]:
        self.model.set_submodule(self.path, self.came)
        try:
            yield
        finally:
            self.model.set_submodule(self.path, self.trained.module)


@contextmanager
def trained_head(model: nn.Module, task: str) -> Iterator[Head | None]:
    """The head of a classifier while it trains; None for other tasks."""
    if task != "sequence-classification":
        yield None
        return
    head = Head(model)
    try:
        yield head
    finally:
        head.trained.finish()
