"""The recovery half of an adapter, beside its PEFT half: ``recovery_config.json`` + ``recovery_model.safetensors``.

Recovery modules (CA-LoRA, arXiv 2307.07705) make up for what one particular compression lost, so their config carries a
fingerprint of the base that they were trained on. In int8 (config: ``"weights": "int8"``) a module has a third tensor, the scales
of ``lowrank.Int8Factors``; the LoRA half beside it stays in floating point, which is all that stock PEFT loads.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaloraError
from ..lowrank import Branch, Int8Factors
from .files import Writers, is_number, json_writer, read_json, save_tensors
from .peft_adapter import FLOATS, float32_factors, read_tensors

CONFIG_NAME = "recovery_config.json"
WEIGHTS_NAME = "recovery_model.safetensors"
FORMAT_VERSIONS = {None: 1, "int8": 2}  # by the config's "weights": what an older version cannot read it refuses
ACTIVATION = "gelu"  # erf, on the rank, between down and up

_KEY = re.compile(r"(?P<path>.+)\.recovery_(?P<part>A\.weight|B\.weight|scales)")


@dataclass
class RecoveryAdapter:
    """factors: the branch of each module, by module path. base: :func:`fingerprint` of the model it was trained on. full:
    replaced parameters (a classification head) of an adapter that has no PEFT half to keep them, by parameter path."""

    factors: dict[str, Branch]
    base: dict = field(default_factory=dict)
    full: dict[str, Tensor] = field(default_factory=dict)


def has_recovery(directory: str | os.PathLike) -> bool:
    return (Path(directory) / CONFIG_NAME).exists() or (Path(directory) / WEIGHTS_NAME).exists()


def read_recovery(directory: str | os.PathLike) -> RecoveryAdapter:
    """Read the recovery half of an adapter directory. Raises CaloraError for anything that is not whole."""
    directory = Path(directory)
    config = read_json(directory / CONFIG_NAME)
    version, weights = config.get("format_version"), config.get("weights")
    if version not in FORMAT_VERSIONS.values():
        raise CaloraError(
            f"{directory / CONFIG_NAME} has format_version {version!r}, this version reads {max(FORMAT_VERSIONS.values())}; "
            "update calora_ext"
        )
    if (weights, version) not in list(FORMAT_VERSIONS.items()):
        raise CaloraError(f"{directory / CONFIG_NAME}: weights {weights!r} do not belong to format_version {version}; the file is damaged")
    if config.get("activation") != ACTIVATION:
        raise CaloraError(f"{directory / CONFIG_NAME}: activation {config.get('activation')!r} is not supported; only {ACTIVATION} is")
    scales, base, parameters = config.get("scales"), config.get("base"), config.get("parameters", [])
    if not isinstance(scales, dict) or not scales or not all(is_number(s) for s in scales.values()):
        raise CaloraError(f"{directory / CONFIG_NAME} lacks the scales of its modules; the file is damaged")
    if not isinstance(base, dict) or not isinstance(parameters, list):
        raise CaloraError(f"{directory / CONFIG_NAME} lacks the base that it belongs to; the file is damaged")
    int8 = weights == "int8"
    halves: dict[str, dict[str, Tensor]] = {}
    full = {}
    for key, tensor in read_tensors(directory / WEIGHTS_NAME, (*FLOATS, torch.int8) if int8 else FLOATS).items():
        match = _KEY.fullmatch(key)
        if key in parameters and tensor.dtype != torch.int8:
            full[key] = tensor
            continue
        if not match:
            raise CaloraError(f"{directory / WEIGHTS_NAME}: tensor {key} is no part of a recovery module; the file is damaged")
        halves.setdefault(match["path"], {})[match["part"]] = tensor
    needed = {"A.weight", "B.weight", "scales"} if int8 else {"A.weight", "B.weight"}
    for path in sorted(halves.keys() | scales.keys()):
        if set(halves.get(path, ())) != needed or path not in scales:
            raise CaloraError(f"{directory}: the recovery module of {path} is incomplete; the files are damaged or do not belong together")
    if len(full) != len(parameters):
        raise CaloraError(f"{directory}: {WEIGHTS_NAME} lacks replaced parameters that {CONFIG_NAME} lists; the file is damaged")
    make = _int8_factors if int8 else float32_factors
    factors = {}
    for path, half in halves.items():
        try:
            factors[path] = make(half["A.weight"], half["B.weight"], float(scales[path]), *([half["scales"]] if int8 else []))
        except CaloraError as error:
            raise CaloraError(f"{directory / WEIGHTS_NAME}: {path}: {error}") from None
    return RecoveryAdapter(factors, base, full)


def _int8_factors(down: Tensor, up: Tensor, scale: float, scales: Tensor) -> Int8Factors:
    """Copied, so that they do not map the file."""
    if not torch.isfinite(127 * scales).all():
        raise CaloraError("its scales are too large for float32; the file is damaged")
    return Int8Factors(down.clone(), up.clone(), scales.clone(), scale)


def recovery_writers(recovery: RecoveryAdapter, dtype: torch.dtype) -> Writers:
    """The two files of the recovery half, for ``write_together``. dtype: int8, or what its tensors are cast to."""
    tensors = dict(recovery.full)
    int8 = dtype == torch.int8
    for path, f in recovery.factors.items():
        if int8:
            f = Int8Factors.of(f)
            tensors[f"{path}.recovery_scales"] = f.scales
        tensors[f"{path}.recovery_A.weight"] = f.down_codes if int8 else f.down.to(dtype)
        tensors[f"{path}.recovery_B.weight"] = f.up_codes if int8 else f.up.to(dtype)
    tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    config = {
        "format_version": FORMAT_VERSIONS["int8" if int8 else None],
        "activation": ACTIVATION,
        "scales": {path: f.scale for path, f in recovery.factors.items()},
        "parameters": sorted(recovery.full),
        "base": recovery.base,
    }
    if int8:
        config["weights"] = "int8"
    return {WEIGHTS_NAME: lambda path: save_tensors(tensors, path), CONFIG_NAME: json_writer(config)}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What a recovery half remembers of its base: the model type, and how it was compressed (the recipe, the formats of
    single modules, and size and BLAKE2 of each file where the base was saved); None where it is dense."""
    config = getattr(model, "config", None)
    quantization = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    quantization = quantization or getattr(config, "quantization_config", None)
    if hasattr(quantization, "to_dict"):
        quantization = quantization.to_dict()
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "calora":
        quantization = None
    elif any(getattr(module, "changed", False) for module in model.modules()):
        quantization = {**quantization, "files": {}}  # they were recorded before an adapter was merged
    return {"model_type": getattr(config, "model_type", None), "quantization": quantization}


def compare_bases(trained_on: dict, model: dict) -> str | None:
    """A sentence about what differs between two fingerprints, for a warning; None if nothing does.

    Raises CaloraError for another architecture. Layer shapes are compared when the factors are loaded.
    """
    a, b = trained_on.get("model_type"), model.get("model_type")
    if a is not None and b is not None and a != b:
        raise CaloraError(f"the recovery modules were trained on a {a} model, this is a {b} model; load the adapter on its own base")
    old, new = trained_on.get("quantization"), model.get("quantization")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return None if old == new else f"they were trained on {_name(old)}, this is {_name(new)}"
    differing = sorted(key for key in old.keys() | new.keys() if key not in ("files", "layout_version") and old.get(key) != new.get(key))
    if differing:
        return "their base was compressed with " + ", ".join(f"{k}={old.get(k)!r} (here {new.get(k)!r})" for k in differing)
    if old.get("files") and new.get("files") and old["files"] != new["files"]:
        return "their base was compressed with the same recipe, but its files differ from this model's"
    return None


def _name(quantization: object) -> str:
    return "a compressed model" if isinstance(quantization, dict) else "a dense model"
