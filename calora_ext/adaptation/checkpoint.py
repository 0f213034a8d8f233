"""Checkpoints of a training run: the trained parameters, the optimiser's state, the step. safetensors and JSON, never pickled.

The data order and every random draw are functions of (seed, step), so nothing else is needed to go on bit for bit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import CaloraError
from ..io.files import read_json, save_tensors
from .best import Best

_STATE, _TRAINED, _OPTIMIZER, _BEST = "state.json", "trained.safetensors", "optimizer.safetensors", "best.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class Checkpoint:
    """A run after ``step`` optimiser steps. run: what must be equal to go on. history: one row per step. best: its step, loss and
    parameters, of a run that keeps the best."""

    step: int
    run: dict
    history: list[dict]
    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: tuple[int, float, dict[str, Tensor]] | None = None


def save(
    directory: Path,
    step: int,
    run: dict,
    history: list[dict],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    keep: int | None,
    best: Best | None = None,
) -> Path:
    """Write directory/checkpoint-STEP: beside first, then renamed. Of others the newest keep - 1 stay."""
    target = directory / f"checkpoint-{step}"
    state, files = {"step": step, "run": run, "history": history}, snapshot(parameters, optimizer)
    if best is not None:
        state, files = state | {"best": {"step": best.step, "loss": best.loss}}, files | {_BEST: best.tensors}
    write(target, state, files)
    # The newest by time: a directory may hold later steps of an earlier run.
    others = sorted((p for p in found_in(directory) if p != target), key=lambda p: (p / _STATE).stat().st_mtime_ns)
    for old in [] if keep is None else others[: len(others) - max(1, keep) + 1]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def snapshot(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The files of tensors of a checkpoint. Where the parameters are sharded over processes, all of these must call it together."""
    whole = lambda t: t.full_tensor() if isinstance(t, DTensor) else t  # noqa: E731
    trained = {name: whole(p.detach()).contiguous() for name, p in parameters.items()}
    states = {f"{name}/{key}": whole(t) for name, p in parameters.items() for key, t in optimizer.state[p].items()}
    return {_TRAINED: trained, _OPTIMIZER: states}


def write(target: Path, state: dict, files: dict[str, dict[str, Tensor]]) -> None:
    """A directory of one JSON state and safetensors files, written beside and renamed; what was there is replaced."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        for name, tensors in files.items():
            save_tensors(tensors, part / name)
        (part / _STATE).write_text(json.dumps({"version": 1, **state}) + "\n")
        if target.exists():
            shutil.rmtree(target)
        part.replace(target)
    except (OSError, SafetensorError) as error:
        raise CaloraError(f"cannot write {target}: {error}; free some space or choose another output_dir") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def found_in(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not directory.is_dir():
        return []
    named = [(int(m[1]), p) for p in directory.iterdir() if (m := _NAME.fullmatch(p.name)) and (p / _STATE).is_file()]
    return [p for _, p in sorted(named)]


def newest(resume: str | bool | None, directory: str | None) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` asks for; None to start afresh."""
    if not resume:
        return None
    if resume is True or str(resume).lower() == "true":
        return next(reversed(found_in(Path(directory or "."))), None)
    path = Path(resume)
    if not (path / _STATE).is_file():
        raise CaloraError(
            f"{path} is not a checkpoint: it holds no {_STATE}; give a directory checkpoint-N, or True for the newest"
        )
    return path


def load(path: Path, run: dict, parameters: dict[str, nn.Parameter]) -> Checkpoint:
    """Read a checkpoint of this very run. Raises CaloraError that names what differs, or which file is damaged."""
    state = read(path, run, {"step", "history"})
    trained, optimizer = tensors_in(path, _TRAINED), tensors_in(path, _OPTIMIZER)
    shapes = {name: p.shape for name, p in parameters.items()}
    with_state = {k.rpartition("/")[0] for k in optimizer}  # none for an optimiser without any
    if {name: t.shape for name, t in trained.items()} != shapes or (with_state and with_state != shapes.keys()):
        raise CaloraError(f"{path} holds other parameters than this model trains; resume with the same model and adapter")
    best = None
    if "best" in state:
        try:
            best = int(state["best"]["step"]), float(state["best"]["loss"]), tensors_in(path, _BEST)
        except (TypeError, KeyError, ValueError) as error:
            raise CaloraError(f"{path / _STATE} is damaged; use an earlier checkpoint or start afresh") from error
        if {name: t.shape for name, t in best[2].items()} != shapes:
            raise CaloraError(f"{path} holds other parameters than this model trains; resume with the same model and adapter")
    return Checkpoint(state["step"], state["run"], state["history"], trained, optimizer, best)


def read(path: Path, run: dict, needed: set[str]) -> dict:
    """The JSON state that ``write`` left. Raises CaloraError where it is damaged or belongs to another run, naming what differs."""
    state = read_json(path / _STATE)
    if state.get("version") != 1 or not needed | {"run"} <= state.keys():
        raise CaloraError(f"{path / _STATE} is damaged or of another version; start afresh")
    theirs, ours = state["run"], json.loads(json.dumps(run))
    if changed := sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k)):
        raise CaloraError(
            f"{path} belongs to another run: {', '.join(changed)} changed; resume with the same settings or start afresh"
        )
    return state


def tensors_in(path: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(path / name)
    except (OSError, SafetensorError) as error:
        raise CaloraError(f"{path} is damaged: {error}; use an earlier checkpoint") from error


def restore(checkpoint: Checkpoint, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> None:
    """Put the parameters back, in place, and the optimiser's state if it is given."""
    with torch.no_grad():
        for name, tensor in checkpoint.trained.items():
            parameters[name].copy_(_placed_as(parameters[name], tensor))
    for key, tensor in checkpoint.optimizer.items() if optimizer is not None else ():
        name, _, field = key.rpartition("/")
        optimizer.state[parameters[name]][field] = _placed_as(parameters[name], tensor) if tensor.dim() else tensor.clone()


def _placed_as(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """A whole tensor on the device of a parameter, cut as that one is."""
    if isinstance(parameter, DTensor):  # every process holds the whole tensor and takes its own part
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor.to(parameter.device)
