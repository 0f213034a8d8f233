"""PEFT LoRA directories, read and written without peft: ``adapter_config.json`` + ``adapter_model.safetensors``.

The rules are PEFT's: A (rank, in_features), B (out_features, rank); the scale is alpha / rank, or alpha / sqrt(rank) with
``use_rslora``; rank and alpha come from the first key of ``rank_pattern`` / ``alpha_pattern`` that matches the end of the module
path as a regex, else from ``r`` / ``lora_alpha``.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CaloraError
from ..lowrank import Factors
from .files import Writers, is_number, json_writer, read_json, save_tensors, write_together

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Keys that change what an adapter computes and are not implemented here.
SEMANTIC_KEYS = (
    "use_dora", "use_qalora", "use_bdlora", "layer_replication", "target_parameters", "alora_invocation_tokens", "velora_config",
    "arrow_config", "kasa_config", "monteclora_config", "trainable_token_indices", "ensure_weight_tying", "megatron_config",
)  # fmt: skip
# Keys of PEFT 0.21 that are read here, or that change nothing at inference.
KNOWN_KEYS = (
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout",
    "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_rslora",
)  # fmt: skip
_VARIANT = re.compile(r"use_.*|.*_config")  # how PEFT names what makes another method of a LoRA
# Initialisations that also change the base weight: the adapter means nothing without that changed base.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_LORA_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.(?P<what>weight|bias)")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass
class LoraAdapter:
    """What a PEFT LoRA directory holds; module paths are those of the dense model, without prefix.

    config: adapter_config.json as it was, unknown keys included. factors: LoRA of each module. lora_bias: ``lora_B.bias``
    (out_features,), not scaled. biases: replaced biases, by module path. full: other replaced parameters
    (``modules_to_save``), by parameter path. Tensors are float32, except full ones, which keep the dtype of the file.
    """

    config: dict
    factors: dict[str, Factors] = field(default_factory=dict)
    lora_bias: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    full: dict[str, Tensor] = field(default_factory=dict)


def read_adapter(directory: str | os.PathLike) -> LoraAdapter:
    """Read a PEFT LoRA directory. Raises CaloraError, naming the file and the reason, for anything that is not whole:
    another PEFT method, a key this reader does not implement, missing halves, wrong ranks, values that are not finite."""
    directory = Path(directory)
    if not (directory / CONFIG_NAME).is_file():
        raise CaloraError(f"{directory} holds no {CONFIG_NAME}; give the directory of a PEFT LoRA adapter")
    config = read_json(directory / CONFIG_NAME)
    check_config(config, directory)
    adapter = LoraAdapter(config)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(directory / WEIGHTS_NAME).items():
        name = key.removeprefix(PREFIX)
        lora = _LORA_KEY.fullmatch(name)
        if lora and lora["what"] == "weight":
            halves.setdefault(lora["path"], {})[lora["side"]] = tensor
        elif lora and lora["side"] == "B":
            adapter.lora_bias[lora["path"]] = tensor.float()
        elif "lora_embedding_" in name:
            raise CaloraError(f"{directory}: LoRA on an embedding ({key}) is not supported; train the adapter without it")
        elif "lora_" in name or "token_adapter" in name:
            raise CaloraError(f"{directory}: tensor {key} belongs to a LoRA variant that is not supported")
        else:
            # PEFT saves parameters of adapted layers under base_layer.
            path, _, parameter = name.replace(".base_layer.", ".").rpartition(".")
            if parameter == "bias" and config.get("bias", "none") != "none":
                adapter.biases[path] = tensor.float()
            elif ".base_layer." not in name:  # with it: a copy of the base's embedding; the base has its own
                adapter.full[f"{path}.{parameter}"] = tensor
    for path, half in halves.items():
        adapter.factors[path] = _factors(config, path, half, directory)
    if not adapter.factors:
        raise CaloraError(f"{directory / WEIGHTS_NAME} holds no LoRA tensors; the file is empty or belongs to another method")
    if stray := sorted(set(adapter.lora_bias) - set(adapter.factors)):
        raise CaloraError(f"{directory}: lora_B.bias of {stray[0]} has no LoRA weights; the file is damaged")
    return adapter


def write_adapter(directory: str | os.PathLike, adapter: LoraAdapter, dtype: torch.dtype = torch.float32) -> None:
    """Write a directory that stock PEFT loads on the dense model; existing adapter files are replaced, both or neither.

    dtype: what the LoRA tensors are stored in. The config is completed where it does not describe the factors.
    """
    write_together(directory, adapter_writers(adapter, dtype))


def adapter_writers(adapter: LoraAdapter, dtype: torch.dtype) -> Writers:
    """The two files of a PEFT LoRA directory, for ``write_together``."""
    if not adapter.factors:
        raise CaloraError("a PEFT adapter needs at least one LoRA module")
    tensors: dict[str, Tensor] = {}
    for path, f in adapter.factors.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = f.down.to(dtype)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = f.up.to(dtype)
    for path, bias in adapter.lora_bias.items():
        tensors[f"{PREFIX}{path}.lora_B.bias"] = bias.to(dtype)
    for path, bias in adapter.biases.items():
        tensors[f"{PREFIX}{path}{'.base_layer' if path in adapter.factors else ''}.bias"] = bias
    for name, value in adapter.full.items():
        tensors[PREFIX + name] = value
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    return {
        WEIGHTS_NAME: lambda path: save_tensors(tensors, path),
        CONFIG_NAME: json_writer(describe(adapter.config, adapter.factors)),
    }


def rank_and_scale(config: dict, path: str) -> tuple[int, float]:
    """Rank and scale that a config gives to a module."""
    rank = _first_match(config.get("rank_pattern"), path, config["r"])
    alpha = _first_match(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def is_target(config: dict, path: str) -> bool:
    """Whether ``target_modules`` (with layers_to_transform and exclude_modules) selects a module; all-linear selects none here."""
    targets, excluded, saved = config.get("target_modules"), config.get("exclude_modules"), config.get("modules_to_save") or ()
    if not targets or targets == "all-linear" or _selects(excluded, path):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in saved):
        return False
    layers = _as_list(config.get("layers_to_transform"))
    if not _selects(targets, path) or isinstance(targets, str) or path in targets or not layers:
        return _selects(targets, path)
    for pattern in _as_list(config.get("layers_pattern")) or [r"[^.]*"]:
        if found := re.match(rf"(?:.*?\.)?{pattern}\.(?P<layer>\d+)\.", path):
            return int(found["layer"]) in layers
    return False


def describe(config: dict, factors: dict[str, Factors]) -> dict:
    """The config with r, lora_alpha, the patterns and target_modules that say exactly what these factors are.

    A config that already does is returned with inference_mode set; other keys are kept.
    """
    config = {"peft_type": "LORA", "bias": "none", "task_type": None, "lora_dropout": 0.0, **config, "inference_mode": True}
    same = "r" in config and all(_agrees(rank_and_scale(config, path), f) for path, f in factors.items())
    targets = config.get("target_modules")
    if not targets or (targets != "all-linear" and not all(is_target(config, path) for path in factors)):
        config["target_modules"] = sorted(factors)
        config["layers_to_transform"] = config["layers_pattern"] = config["exclude_modules"] = None
    if same:
        return config
    common = Counter((f.rank, f.scale) for f in factors.values()).most_common(1)[0][0]
    config |= {"r": common[0], "lora_alpha": _alpha(*common), "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    for path, f in factors.items():
        if f.rank != common[0]:
            config["rank_pattern"]["^" + re.escape(path)] = f.rank
        if _alpha(f.rank, f.scale) != config["lora_alpha"]:
            config["alpha_pattern"]["^" + re.escape(path)] = _alpha(f.rank, f.scale)
    return config


def check_config(config: dict, where: object) -> None:
    """Raises CaloraError unless the config describes a LoRA that this reader implements."""
    if config.get("peft_type") != "LORA":
        raise CaloraError(f"{where}: peft_type is {config.get('peft_type')!r}; only LORA adapters are supported")
    for key in SEMANTIC_KEYS:
        if config.get(key):
            raise CaloraError(f"{where}: the adapter sets {key}, which is not supported; only plain LoRA is")
    unknown = [key for key, value in config.items() if value and key not in KNOWN_KEYS]
    for key in filter(_VARIANT.fullmatch, unknown):  # of a later PEFT; what other tools note down, such as unsloth_fixed, is only said
        raise CaloraError(f"{where}: the adapter sets {key}, which this version does not know and which may change what it computes; only plain LoRA is supported")
    if unknown:
        warnings.warn(f"{where}: {CONFIG_NAME} sets {', '.join(unknown)}, which is ignored", stacklevel=3)
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise CaloraError(
            f"{where}: init_lora_weights={init!r} changes the base weights too; save the adapter as plain LoRA with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise CaloraError(f"{where}: bias is {config['bias']!r}; expected none, all or lora_only")
    numbers = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha", 8)}
    for pattern in ("rank_pattern", "alpha_pattern"):
        value = config.get(pattern) or {}
        if not isinstance(value, dict):
            raise CaloraError(f"{where}: {pattern} must be an object of pattern: number")
        for key, number in value.items():
            _compiles(key, where)
            numbers[f"{pattern}[{key}]"] = number
    for name, number in numbers.items():
        whole = name == "r" or name.startswith("rank")
        if not is_number(number) or (whole and (not isinstance(number, int) or number < 1)):
            raise CaloraError(f"{where}: {name} is {number!r}; expected {'a positive integer' if whole else 'a number'}")
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        value = config.get(name)
        if isinstance(value, str) and name != "modules_to_save":
            _compiles(value, where)
        elif value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise CaloraError(f"{where}: {name} must be a list of module names, got {value!r}")
    for pattern in (*(config.get("modules_to_save") or ()), *_as_list(config.get("layers_pattern"))):
        _compiles(pattern, where)
    layers = config.get("layers_to_transform")
    if not all(isinstance(layer, int) for layer in _as_list(layers)):
        raise CaloraError(f"{where}: layers_to_transform must be a layer number or a list of them, got {layers!r}")


def read_tensors(path: Path, dtypes: Collection[torch.dtype] = FLOATS) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises CaloraError for a damaged file, other dtypes, or values that are not finite."""
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        hint = "; a .bin file is never unpickled: save the adapter as safetensors" if pickled else ""
        raise CaloraError(f"{path} is missing{hint}")
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise CaloraError(f"{path} is not a whole safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in dtypes:
            raise CaloraError(f"{path}: tensor {key} is {tensor.dtype}; expected floating point{' or int8' if torch.int8 in dtypes else ''}")
        if not torch.isfinite(tensor).all():
            raise CaloraError(f"{path}: tensor {key} holds NaN or infinite values; the file is damaged or training diverged")
    return tensors


def float32_factors(down: Tensor, up: Tensor, scale: float) -> Factors:
    """Factors from tensors of a file: copied, so that they neither map the file nor share its alignment."""
    return Factors(down.to(torch.float32, copy=True).contiguous(), up.to(torch.float32, copy=True).contiguous(), scale)


def _factors(config: dict, path: str, half: dict[str, Tensor], where: Path) -> Factors:
    if set(half) != {"A", "B"}:
        raise CaloraError(f"{where}: {path} has lora_{min(half)} only; the file is damaged")
    rank, scale = rank_and_scale(config, path)
    a, b = half["A"], half["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise CaloraError(
            f"{where}: {path} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, but {CONFIG_NAME} says rank {rank}; "
            "config and weights do not belong together"
        )
    return float32_factors(a, b, scale)


def _first_match(pattern: dict | None, path: str, default: float) -> float:
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _selects(names: str | list[str] | None, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith("." + name) for name in names or ())


def _as_list(value: object) -> list:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _agrees(described: tuple[int, float], f: Factors) -> bool:
    return described[0] == f.rank and math.isclose(described[1], f.scale, rel_tol=1e-12)


def _alpha(rank: int, scale: float) -> float:
    """The alpha with alpha / rank == scale, as an integer where it is one."""
    alpha = scale * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _compiles(pattern: object, where: object) -> None:
    try:
        re.compile(pattern)
        re.compile(f"({pattern})(?P<layer>)")  # as a part of another one: no flags, no group of our name
    except (re.error, RecursionError, TypeError) as error:
        raise CaloraError(f"{where}: {pattern!r} is not a regular expression: {error}") from error
