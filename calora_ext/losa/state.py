"""A run after a pruning, on disk: directory/pruning-T holds the sparse weights and their masks, and what training leaves there.

The adapters that follow are fresh and drawn from the seed, or lie there too, the steps within are checkpoints of the training loop in the same
directory: with both a run goes on bit for bit wherever it was interrupted.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from torch import Tensor

from ..adaptation import checkpoint
from ..errors import CaloraError
from .masked import MaskedLinear

_LAYERS = "layers.safetensors"
_HEAD = "head of the model/"
_NAME = re.compile(r"pruning-(\d+)")


def directory_of(directory: Path, pruning: int) -> Path:
    return directory / f"pruning-{pruning}"


def save(directory: Path, pruning: int, run: dict, phases: list[dict], history: list[dict], layers: dict[str, MaskedLinear], head: dict[str, Tensor]) -> None:
    """Write the state after a pruning, then remove those of other prunings."""
    parts = {name: {"base": layer.base, "mask": layer.mask, **layer.prepared} for name, layer in layers.items()}
    tensors = {f"{name}/{key}": t.contiguous() for name, part in parts.items() for key, t in part.items()}
    tensors |= {f"{_HEAD}{key}": t.detach() for key, t in head.items()}
    target = directory_of(directory, pruning)
    checkpoint.write(target, {"pruning": pruning, "run": run, "phases": phases, "history": history}, {_LAYERS: tensors})
    for other in _found(directory):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)


def restore(directory: Path, run: dict, layers: dict[str, MaskedLinear], head: dict[str, Tensor]) -> tuple[list[dict], list[dict]] | None:
    """(phases, history) of the newest state, its weights and masks put into the layers, and the head's; None where there is nothing to resume.

    Raises CaloraError where it is damaged or belongs to another run.
    """
    found = _found(directory)
    if not found:
        return None
    state = checkpoint.read(found[-1], run, {"pruning", "phases", "history"})
    tensors: dict[str, Tensor] = checkpoint.tensors_in(found[-1], _LAYERS)
    expected = {f"{name}/{key}": layer.base.shape for name, layer in layers.items() for key in ("base", "mask")}
    expected |= {f"{_HEAD}{key}": t.shape for key, t in head.items()}
    if {key: t.shape for key, t in tensors.items() if key.endswith(("/base", "/mask")) or key.startswith(_HEAD)} != expected:
        raise CaloraError(f"{found[-1]} holds other layers than this model; start afresh")
    for name, layer in layers.items():
        layer.keep(tensors[f"{name}/base"], tensors[f"{name}/mask"])
        layer.prepared = {key: tensors[f"{name}/{key}"] for key in ("down", "up", "at") if f"{name}/{key}" in tensors}
    for key, t in head.items():
        t.detach().copy_(tensors[f"{_HEAD}{key}"])
    return state["phases"], state["history"]


def _found(directory: Path) -> list[Path]:
    """Whole states, the oldest first."""
    if not directory.is_dir():
        return []
    named = [(int(m[1]), p) for p in directory.iterdir() if (m := _NAME.fullmatch(p.name)) and (p / "state.json").is_file()]
    return [p for _, p in sorted(named)]
