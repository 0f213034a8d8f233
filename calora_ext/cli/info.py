"""``calora info``: what this machine and this build can do, or what a directory holds."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CaloraError
from .common import Json, emit


def register(app: typer.Typer) -> None:
    app.command()(info)


def info(
    model: Annotated[Path | None, typer.Argument(metavar="[MODEL]", help="A model or adapter directory.")] = None,
    json_file: Json = None,
) -> None:
    """CPU features, kernels chosen, build and CUDA; with MODEL, what that directory holds."""
    facts = machine_facts() if model is None else directory_facts(model)
    title = "this machine" if model is None else str(model)
    emit((title, ""), [(key, _text(value)) for key, value in facts.items()], facts, json_file)


def machine_facts() -> dict[str, object]:
    """What decides which kernels run, as plain JSON values."""
    import torch

    from .. import __version__, formats, ops

    return {
        "calora_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor_name(),
        "cpu features": ops.native.cpu_features(),
        "rungs": ops.native.available(),
        "rung chosen": ops.native.isa(),
        "unstructured int4 weights run as": ops.runs_as(formats.WeightFormat(pattern="unstructured")).pattern + " weights",
        "unstructured int8 weights run as": ops.runs_as(formats.WeightFormat("int8", pattern="unstructured")).pattern + " weights",
        "sparse nf4 weights run as": ops.runs_as(formats.WeightFormat("nf4", pattern="2:4")).pattern + " weights",
        "CALORA_ISA": os.environ.get("CALORA_ISA"),
        "threads": torch.get_num_threads(),
        "layout version": formats.LAYOUT_VERSION,
        "compiler": ops.native.build_info(),
        "cuda devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda kernels": ops.native.cuda_architectures() or "not in this build (nvcc was not found)",
    }


def directory_facts(directory: Path) -> dict[str, object]:
    """What a model or adapter directory holds, from its configs and file headers. Raises CaloraError if it is neither."""
    from ..io.files import read_json

    if (directory / "config.json").is_file():
        return _model_facts(directory, read_json(directory / "config.json"))
    if (directory / "adapter_config.json").is_file():
        return _adapter_facts(directory, read_json(directory / "adapter_config.json"))
    if (directory / "recovery_config.json").is_file():  # recovery modules alone
        return _adapter_facts(directory, {})
    raise CaloraError(f"{directory} holds neither config.json nor adapter_config.json; name a model or adapter directory")


def _model_facts(directory: Path, config: dict) -> dict[str, object]:
    from ..io import checkpoint
    from ..recipe import Recipe

    headers = checkpoint.read_headers(checkpoint.shard_paths(directory))
    stored = [(name, header.tensors[name]) for name, header in headers.items()]
    recipe = config.get("quantization_config")
    if not isinstance(recipe, dict | None):
        raise CaloraError(f"{directory / 'config.json'} is damaged: its quantization_config is not an object; copy it again")
    kept = {f.name for f in dataclasses.fields(Recipe)}
    return {
        "kind": "dense model" if recipe is None else f"compressed model ({recipe.get('quant_method')})",
        "architecture": config.get("architectures"),
        "layers": config.get("num_hidden_layers"),
        "width": config.get("hidden_size"),
        "context": config.get("max_position_embeddings"),
        "weight bytes": sum(t.end - t.begin for _, t in stored),
        "weight files": len({header.path for header in headers.values()}),
        "packed layers": sum(name.endswith(".packed") for name, _ in stored),
        "dense tensors": sum(t.dtype != "U8" for _, t in stored),
        **{f"recipe {name}": value for name, value in (recipe or {}).items() if name in kept},
    }


def _adapter_facts(directory: Path, config: dict) -> dict[str, object]:
    weights = sorted(directory.glob("*.safetensors"))
    return {
        "kind": "adapter" + (" with recovery modules" if (directory / "recovery_config.json").is_file() else ""),
        "type": config.get("peft_type"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": config.get("target_modules"),
        "task": config.get("task_type"),
        "base": config.get("base_model_name_or_path"),
        "weight bytes": sum(path.stat().st_size for path in weights),
        "weight files": len(weights),
    }


def processor_name() -> str:
    """The processor's marketing name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)
