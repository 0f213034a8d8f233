"""The transformers quantizer ``quant_method="calora"``: loading packed checkpoints, compressing while loading, saving.

Registered when ``transformers.modeling_utils`` is imported (see ``integrations/__init__.py``). Extension points:
transformers 5.23 ``quantizers/base.py``, ``core_model_loading.py`` and ``modeling_utils.PreTrainedModel``.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import ops
from ..adapters import base_only
from ..card import model_card
from ..compression import rates
from ..compression.replace import Compressed, compressed_modules, empty, forget_ties, pack, tie
from ..errors import CaloraError
from ..formats import PATTERNS, STORED, WeightFormat, extent_of
from ..formats.layout import TILE_ALIGN
from ..io import checkpoint
from ..linear import CompressedLinear
from ..policy import features, is_conv1d, plan, tied_modules
from ..pruning import Target
from ..recipe import Recipe
from ..tables import format_bytes

METHOD = "calora"
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that accelerate works out
log = logging.getLogger("calora_ext")


class CaloraConfig(QuantizationConfigMixin):
    """What ``config.json:quantization_config`` holds: the recipe, and what saving adds to it.

    recipe: a :class:`Recipe`, or its fields as keywords. modules: the modules whose format is not the recipe's
    ``weights``, by dotted name (the output head, the embeddings). files: size and BLAKE2 of each shard.
    """

    def __init__(self, recipe: Recipe | None = None, *, modules: dict | None = None, files: dict | None = None, **fields: Any) -> None:
        if fields.pop("quant_method", METHOD) != METHOD:
            raise CaloraError(f"quant_method must be {METHOD!r}")
        if recipe is not None and (fields or not isinstance(recipe, Recipe)):
            raise CaloraError("CaloraConfig takes one Recipe, or the fields of one as keywords")
        self.quant_method = METHOD
        self.recipe = Recipe.from_dict(fields) if recipe is None else recipe
        self.modules = {name: _format(name, value) for name, value in _dictionary("modules", modules).items()}
        self.files = checkpoint.check_recorded(files)

    def format(self, module: str) -> WeightFormat:
        return self.modules.get(module, self.recipe.format())

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD, **self.recipe.to_dict(),
            "modules": {name: fmt.to_dict() for name, fmt in self.modules.items()}, "files": self.files,
        }  # fmt: skip


def _dictionary(name: str, value: Any) -> dict:
    if not isinstance(value, dict | None):
        raise CaloraError(f"{name} in quantization_config must be a dictionary; config.json is damaged")
    return value or {}


def _format(name: str, value: Any) -> WeightFormat:
    if isinstance(value, WeightFormat):
        return value
    try:
        fmt = WeightFormat(**value)
        if PATTERNS[fmt.pattern] not in STORED:
            raise CaloraError(f"no file holds {fmt.pattern!r} weights")
        return fmt
    except (TypeError, CaloraError) as error:
        raise CaloraError(f"the format of {name} in quantization_config is damaged ({error})") from None


class CaloraQuantizer(HfQuantizer):
    """Swaps modules before the weights are loaded, or packs them one by one as they arrive."""

    is_trainable = True  # with adapters
    is_qat_trainable = True  # so that Trainer accepts a model whose only trainable part is the low-rank bank
    is_compileable = True

    def __init__(self, quantization_config: CaloraConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)  # the caller's may be used again
        self.planned: dict[str, WeightFormat] = {}  # modules to pack while loading
        self.targets: dict[str, Target] = {}  # how much of the sparse ones is pruned
        self.tied: dict[str, str] = {}  # {module: the module whose matrix it reads}, while loading
        self.failure: CaloraError | None = None  # transformers would turn it into a RuntimeError

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        devices = device_map.values() if isinstance(device_map, dict) else [] if device_map in (None, *SPREAD) else [device_map]
        others = {str(device) for device in devices} - {"cpu"}
        if others and not self.pre_quantized:
            raise CaloraError(f'weights are packed on the CPU; leave device_map={device_map!r} out and call .to("cuda") on the compressed model')
        if others and not ops.native.cuda_architectures():
            raise CaloraError(f"this build has no CUDA kernels, so compressed models run on the CPU; leave device_map={device_map!r} out")
        if any(not device.isdecimal() and device.partition(":")[0] != "cuda" for device in others):
            raise CaloraError(f"compressed models run on CPUs and NVIDIA GPUs; device_map={device_map!r} asks for another place")
        if others and "cpu" in map(str, devices):
            raise CaloraError("a compressed model is on GPUs or on the CPU, not on both, where each call would move its weights; leave the CPU out of device_map")
        if not self.pre_quantized:
            self.quantization_config.recipe = self.quantization_config.recipe.resolve(calibrated=False)

    def update_device_map(self, device_map: Any) -> Any:
        spread = isinstance(device_map, str) and device_map in SPREAD
        usable = self.pre_quantized and torch.cuda.is_available() and ops.native.cuda_architectures()
        return {"": "cpu"} if spread and not usable else device_map

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        self.tied = tied_modules(model)
        if self.pre_quantized:
            self._swap(model, checkpoint_files)
        else:
            recipe = self.quantization_config.recipe
            self.planned = plan(model, recipe).formats
            self.targets = rates.targets(model, self.planned, recipe)
            default = recipe.format()
            self.quantization_config.modules = {name: fmt for name, fmt in self.planned.items() if fmt != default}

    # --- a packed checkpoint ---------------------------------------------------------------------------------------

    def _swap(self, model: nn.Module, checkpoint_files: list[str] | None) -> None:
        """Replace what the files hold packed. Checks headers, sizes and scales before any weight is touched."""
        if not checkpoint_files:
            raise CaloraError("a compressed model is loaded from safetensors files; pass its directory to from_pretrained")
        paths = [Path(path) for path in checkpoint_files]
        headers = checkpoint.read_headers(paths)
        checkpoint.check_sizes(paths, self.quantization_config.files)
        checkpoint.check_dense(headers)
        sources: list[str] = []
        for stored, name in self._packed_modules(model, headers).items():
            dense = model.get_submodule(name)
            fmt = self._format_of(model, name)
            checkpoint.check_packed(stored, fmt, *features(dense), headers)
            model.set_submodule(name, empty(dense, fmt, extent_of(checkpoint.packed_shapes(stored, fmt, headers))))
            sources.append(name)
        self._tie(model, sources)

    def _packed_modules(self, model: nn.Module, headers: dict) -> dict[str, str]:
        """{module name in the files: module name in the model}; what this model class lacks is left out."""
        state = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        found = {}
        for key in headers:
            stored, dot, tensor = key.rpartition(".")
            if tensor != "packed" or not dot:
                continue
            # transformers' own renaming, asked for the dense weight: the packed one is not in the model yet.
            for steps in ((renamings, converters), ([], [])):
                renamed, _ = rename_source_key(f"{stored}.weight", *steps, model.base_model_prefix, state)
                if renamed in state:
                    name = renamed.removesuffix(".weight")
                    module = model.get_submodule(name)
                    if isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module):
                        found[stored] = name
                    break
        return found

    def _format_of(self, model: nn.Module, name: str) -> WeightFormat:
        """Recorded by the name in the class that was saved, which may have one prefix more or less than this one."""
        prefix = f"{model.base_model_prefix}."
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in self.quantization_config.modules:
                return self.quantization_config.modules[candidate]
        return self.quantization_config.format(name)

    def _tie(self, model: nn.Module, sources: list[str]) -> None:
        for source in sources:
            if isinstance(model.get_submodule(source), nn.Embedding):
                tie(model, source, [t for t, s in self.tied.items() if s == source and t not in sources])
        forget_ties(model)

    # --- a dense checkpoint, packed while loading --------------------------------------------------------------------

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        name, _, parameter = param_name.rpartition(".")
        return parameter == "weight" and (name in self.planned or self.tied.get(name) in self.planned)

    def get_quantize_ops(self) -> ConversionOps:
        return PackWhileLoading(self)

    def pack_weight(self, model: nn.Module, name: str, weight: Any, missing: set[str]) -> dict[str, Any]:
        """Swap module `name` in and return its packed tensors, under the names transformers shall set them by."""
        missing.discard(f"{name}.weight")
        if name not in self.planned:  # a tied matrix that the file holds twice
            return {}
        dense = model.get_submodule(name)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        layer = pack(name, dense, self.planned[name], self.targets.get(name))
        if getattr(dense, "bias", None) is not None:  # transformers would initialise what does not carry the mark
            layer.bias._is_hf_initialized = getattr(dense.bias, "_is_hf_initialized", False)
        model.set_submodule(name, layer)
        if isinstance(layer, nn.Embedding):
            missing.difference_update(f"{t}.weight" for t, s in self.tied.items() if s == name)
            self._tie(model, [name])
        return {f"{name}.{tensor}": value for tensor, value in layer.packed_tensors().items()}

    # --- both --------------------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.failure is not None:
            raise self.failure
        dense = [name for name in self.planned if not isinstance(model.get_submodule(name), Compressed)]
        if dense:
            raise CaloraError(f"{dense[0]}.weight is missing from the checkpoint; there is nothing to compress")
        forget_ties(model)
        align_packed(model)
        expanded: dict[str, list[int]] = {}  # pattern that runs: bytes of each layer
        for module in compressed_modules(model).values():
            tensors, fmt = module.running()  # reorders what was loaded straight onto a GPU, expands what the rung runs in another format
            if fmt is not module.format:
                own = {id(t) for t in module.packed_tensors().values()}
                expanded.setdefault(fmt.pattern, []).append(sum(t.nbytes for t in tensors if id(t) not in own))
            if isinstance(module, CompressedLinear):
                module.activations = self.quantization_config.recipe.activations
                if module.bias is not None:
                    module.bias.requires_grad_(False)
        for pattern, sizes in expanded.items():
            log.warning("%d sparse layers run as %s weights, which are faster on %s: %s more memory", len(sizes), pattern, ops.native.isa(), format_bytes(sum(sizes)))
        self.pre_quantized, self.planned, self.tied = True, {}, {}
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """No state dict of our own, but metadata that aligns the file if it is one (`finish_save` sees to shards)."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        return None, checkpoint.alignment_metadata(_without_ties(model.state_dict()), {"format": "pt"})


class PackWhileLoading(ConversionOps):
    """Called by transformers with each dense weight that ``param_needs_quantization``."""

    def __init__(self, quantizer: CaloraQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: nn.Module, missing_keys: set[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        out = {}
        for key, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            if self.quantizer.failure is not None or not self.quantizer.param_needs_quantization(model, key):
                out[key] = value
                continue
            try:
                out |= self.quantizer.pack_weight(model, key.removesuffix(".weight"), value, missing_keys or set())
            except CaloraError as error:
                self.quantizer.failure = error
                out[key] = value
        return out


def _without_ties(state: dict[str, Any]) -> dict[str, Any]:
    """Of tensors that share memory only one is written; which one does not matter for the size of the header's data."""
    seen: dict[tuple, str] = {}
    return {name: t for name, t in state.items() if seen.setdefault((t.data_ptr(), t.nbytes), name) == name}


def align_packed(model: nn.Module) -> None:
    """Copy packed tensors that do not start at a multiple of 64 bytes: they came from a file saved by something else."""
    copied = 0
    for module in compressed_modules(model).values():
        for name, tensor in module._buffers.items():
            if tensor is not None and tensor.device.type == "cpu" and tensor.data_ptr() % TILE_ALIGN:
                module._buffers[name] = tensor.clone()
                copied += tensor.nbytes
    if copied:
        log.warning("%d bytes of packed weights were copied: the file is not aligned to 64 bytes; save the model again to map it", copied)


def mark_compressed(model: PreTrainedModel, config: CaloraConfig) -> None:
    """Tell transformers that `model` was compressed in place, so that ``save_pretrained`` and Trainer know."""
    model.hf_quantizer = CaloraQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = config
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
    forget_ties(model)


def _save_pretrained(original):
    """``save_pretrained`` of compressed models: written beside, aligned, hashed, then moved into place."""

    @functools.wraps(original)
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        quantizer = getattr(self, "hf_quantizer", None)
        adapters_only = getattr(self, "_hf_peft_config_loaded", False)
        if not isinstance(quantizer, CaloraQuantizer) or adapters_only or Path(save_directory).is_file():
            return original(self, save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        if kwargs.get("variant"):
            raise CaloraError("a compressed model has no variants: config.json describes one set of files; save it to a directory of its own")
        if push_to_hub:  # it saves to a temporary directory, through here, and uploads that
            names = ("repo_id", "commit_message", "private", "token", "revision", "create_pr", "max_shard_size", "tags")
            hub = {name: kwargs[name] for name in names if name in kwargs}
            self.push_to_hub(**{"repo_id": Path(save_directory).name} | hub)
        directory = Path(save_directory)
        created = not directory.exists()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as beside:
                with base_only(self):  # heads that an active adapter replaced are the adapter's
                    original(self, beside, *args, **kwargs)
                if kwargs.get("is_main_process", args[0] if args else True):
                    quantizer.quantization_config.files = checkpoint.finish_save(Path(beside))
                    if not (directory / "README.md").exists():
                        card = model_card(directory.name, quantizer.quantization_config.recipe.to_dict(), _sizes(quantizer))
                        (Path(beside) / "README.md").write_text(card, encoding="utf-8")
                    checkpoint.publish(Path(beside), directory)
                    for module in compressed_modules(self).values():
                        module.changed = False
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CaloraError(f"the model cannot be saved to {directory}: {reason}; free some space or choose another directory") from error
        finally:
            if created and directory.is_dir() and not any(directory.iterdir()):
                directory.rmdir()

    save_pretrained._calora = True
    return save_pretrained


def _sizes(quantizer: CaloraQuantizer) -> list[tuple[str, str]]:
    return [("weight files", format_bytes(sum(file["size"] for file in quantizer.quantization_config.files.values())))]


def register() -> None:
    """Make transformers know ``quant_method="calora"``; may be called again."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(CaloraConfig)
        register_quantizer(METHOD)(CaloraQuantizer)
    if not hasattr(PreTrainedModel.save_pretrained, "_calora"):
        PreTrainedModel.save_pretrained = _save_pretrained(PreTrainedModel.save_pretrained)


register()
