"""Train mode, with the model's own dropout or without."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


def enter_train_mode(model: nn.Module, distilled: bool) -> Callable[[], None]:
    """Put the model in train mode. Returns what puts each module back as it was.

    distilled: the model's own dropout is off, as its teacher's is. The noise would be most of the distance between the two: all-MiniLM
    on SST-2 got worse with every step of distillation by it (benchmarks/NOTES.md). That of the trained branches acts as asked for.
    """
    modes = {module: module.training for module in model.modules()}
    noise = list(_dropouts(model)) if distilled else []

    def leave() -> None:
        for module, mode in modes.items():
            module.training = mode
        for module, key, probability in noise:
            setattr(module, key, probability)

    model.train()
    for module, key, _ in noise:
        setattr(module, key, 0.0)
    return leave


@contextmanager
def train_mode(model: nn.Module, distilled: bool) -> Iterator[None]:
    """:func:`enter_train_mode` for the time being."""
    leave = enter_train_mode(model, distilled)
    try:
        yield
    finally:
        leave()


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """(module, attribute, probability) of a transformers model: of modules, and of functions, which find it as ``dropout`` or
    ``attention_dropout`` where they are called."""
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, float) and (key.endswith("dropout") or (key == "p" and isinstance(module, nn.Dropout))):
                yield module, key, value
