"""Whole models, the functions users call first: compress, estimate, load, set_activations."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import list_adapters
from ..compression import rates
from ..compression.apply import apply
from ..compression.calibrate import token_batches
from ..compression.replace import compressed_modules
from ..compression.report import Report
from ..compression.residency import RESIDENT, Residency
from ..errors import CaloraError
from ..io import bitsandbytes, checkpoint
from ..linear import CompressedLinear
from ..policy import Coverage, features, plan
from ..progress import progress
from ..recipe import ACTIVATIONS, Recipe


def compress(model: nn.Module, recipe: Recipe | None = None, calibration: Sequence | None = None, tokenizer: Any = None) -> Report:
    """Compress a transformers model in place; ``model.save_pretrained`` then writes the compressed model.

    calibration: texts (these need the tokenizer) or sequences of token ids; given, int4, nf4 and int8 are rounded by GPTQ and
    sparse weights are chosen by SparseGPT, both in one, unless the recipe says otherwise.
    Raises CaloraError for a model that is compressed already, weights that are not finite, or calibration data that
    is empty, too short or leads to NaN; what comes to light halfway leaves a partly compressed model: load it again.
    """
    from .transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise CaloraError(f"expected a transformers model, got {type(model).__name__}; load it with from_pretrained first")
    if resident := list_adapters(model):
        raise CaloraError(f"adapter {resident[0]!r} is loaded on the dense layers, which are replaced; delete_adapter it and load it again afterwards")
    return carry_out(model, recipe, calibration, tokenizer)


def carry_out(
    model: nn.Module, recipe: Recipe | None, calibration: Sequence | None, tokenizer: Any, residency: Residency = RESIDENT
) -> Report:
    """:func:`compress`; residency: told which weights are needed, default: all are in memory."""
    started = time.perf_counter()
    recipe = (recipe or Recipe()).resolve(calibrated=calibration is not None)
    coverage = plan(model, recipe)
    if not coverage.formats:
        raise CaloraError("the recipe leaves every layer of this model dense; there is nothing to compress")
    batches = None if calibration is None else token_batches(calibration, tokenizer, model.config)
    with progress(None, "Measuring", "block") as bar:
        zeros = {}
        if isinstance(recipe.sparsity, float):
            for group in residency.grouped([name for name, fmt in coverage.formats.items() if fmt.sparse], finished=False):
                zeros |= {name: int((model.get_submodule(name).weight == 0).sum()) for name in group}
        targets = rates.targets(model, coverage.formats, recipe, batches, zeros, lambda: bar.update(), residency)
    if not {"pruner", "rounding"} & set(recipe.calibrated_choices):
        batches = None
    with progress(None, "Compressing", "layer", len(coverage.formats)) as bar:
        outcome = apply(model, coverage, recipe, targets, batches, lambda: bar.update(), residency)
    declare(model, recipe, coverage)
    return Report(recipe, coverage.with_sizes(model), outcome, time.perf_counter() - started)


def declare(model: nn.Module, recipe: Recipe, coverage: Coverage) -> None:
    """Tell transformers of a model whose modules were replaced in place; recipe: resolved."""
    from .transformers import CaloraConfig, mark_compressed

    config = CaloraConfig(recipe, modules={name: fmt for name, fmt in coverage.formats.items() if fmt != recipe.format()})
    mark_compressed(model, config)
    set_activations(model, recipe.activations)


def set_activations(model: nn.Module, activations: str) -> None:
    """``"int8"``: inference rounds the inputs of compressed layers to int8. ``"exact"``: it takes them as they are.

    Saved with the model. Where gradients are recorded layers are exact in either mode.
    """
    if activations not in ACTIVATIONS:
        raise CaloraError(f"unknown activations {activations!r}; choose one of {', '.join(ACTIVATIONS)}")
    layers = [m for m in compressed_modules(model).values() if isinstance(m, CompressedLinear)]
    if not layers:
        raise CaloraError("the model has no compressed layer; compress it first")
    for layer in layers:
        layer.activations = activations
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if hasattr(config, "recipe"):
        config.recipe = replace(config.recipe, activations=activations)
        model.hf_quantizer.quantization_config = config


def model_class(config: dict[str, Any], directory: Path) -> Any:
    """The transformers auto class for the architecture that config.json names."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
    from transformers.models.auto import modeling_auto as auto

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    for mapping, found in (
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
        (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, AutoModelForSeq2SeqLM),
        (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, AutoModelForSequenceClassification),
    ):
        if name is not None and any(name in value for value in _tuples(mapping.values())):
            return found
    raise CaloraError(
        f"{directory / checkpoint.CONFIG} names the architecture {name!r}; cx.load knows causal LMs, seq2seq LMs and sequence "
        "classifiers, load others with their transformers class"
    )


def _tuples(values: Any) -> list[tuple[str, ...]]:
    return [value if isinstance(value, tuple) else (value,) for value in values]


def estimate(directory: str | os.PathLike, recipe: Recipe | None = None) -> Coverage:
    """What `recipe` would make of a dense model directory, from its config and file headers: no weight is read.

    Raises CaloraError for a directory without weights, or a config that transformers cannot build a model from.
    """
    directory = Path(directory)
    config, headers = checkpoint.open_directory(directory)
    if config.get("quantization_config"):
        raise CaloraError(f"{directory} is compressed already; estimate starts from the dense model")
    kept = [checkpoint.DTYPES[h.tensors[n].dtype] for n, h in headers.items()]
    dtype = next((d for d in kept if d.is_floating_point), torch.float32)
    return plan(build(directory, model_class(config, directory).from_config, dtype), (recipe or Recipe()))


def build(directory: Path, make: Callable[..., nn.Module], dtype: torch.dtype) -> nn.Module:
    """The model on the meta device. make: a class's ``from_config``."""
    from transformers import AutoConfig

    try:
        with torch.device("meta"):
            return make(AutoConfig.from_pretrained(directory), dtype=dtype)
    except Exception as error:  # a config can be wrong in any way
        raise CaloraError(f"transformers cannot build a model from {directory / checkpoint.CONFIG}: {first_line(error)}") from error


def packed_layers(directory: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """``format``, ``bits_per_weight`` (everything counted) and ``sparsity`` (share of weights that are not kept) of every
    packed layer of a compressed model directory, by name; headers, shapes and scales are checked on the way.

    Raises CaloraError for a directory that is no compressed model, or one that ``load`` would refuse for its packed tensors.
    """
    import transformers

    from .transformers import CaloraConfig

    directory = Path(directory)
    config, headers = checkpoint.open_directory(directory)
    recorded = config.get("quantization_config")
    if not isinstance(recorded, dict):
        raise CaloraError(f"{directory} is not a compressed model")
    formats = CaloraConfig(**recorded)
    names = config.get("architectures")
    architecture = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if not hasattr(architecture, "_from_config"):
        raise CaloraError(f"{directory / checkpoint.CONFIG} names no architecture of transformers; copy it again")
    model = build(directory, architecture._from_config, torch.float32)
    found = {}
    for key in headers:
        name, _, kind = key.rpartition(".")
        if kind != "packed":
            continue
        fmt, shape = formats.format(name), features(_module(model, name, directory))
        checkpoint.check_packed(name, fmt, *shape, headers)
        packed = checkpoint.read_packed(name, checkpoint.packed_shapes(name, fmt, headers), headers)
        found[name] = {
            "format": str(fmt), "bits_per_weight": 8 * sum(t.numel() for t in packed.values()) / math.prod(shape),
            "sparsity": 1 - fmt.kept(packed, *shape) / math.prod(shape),
        }  # fmt: skip
    return found


def _module(model: nn.Module, name: str, directory: Path) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CaloraError(f"{directory} holds {name}.packed, which its config.json does not know; copy the model again") from None


def load(directory: str | os.PathLike, **kwargs: Any) -> nn.Module:
    """Load a model directory, compressed or dense, with the class its config names; kwargs go to ``from_pretrained``.

    An NF4 checkpoint of bitsandbytes (``load_in_4bit``) is repacked matrix by matrix: codes stay, scales are rounded to our 8 bits; what
    does not fit stays dense, and is announced. quantization_config=None loads all of it dense, a :class:`CaloraConfig` in another format.

    Stricter than ``from_pretrained``: everything wrong with the directory is one CaloraError, and so is a tensor that
    the model needs and the files lack.
    """
    from . import transformers  # noqa: F401  (registers the quantizer, whatever was imported before)

    directory = Path(directory)
    config, headers = checkpoint.open_directory(directory)
    auto = model_class(config, directory)
    check_depth(directory, config, len(headers))
    try:
        if bitsandbytes.is_checkpoint(config):
            from .bitsandbytes import from_pretrained

            model, info = from_pretrained(directory, build(directory, auto.from_config, torch.float32), headers, **kwargs)
        else:
            model, info = auto.from_pretrained(directory, output_loading_info=True, **kwargs)
    except CaloraError:
        raise
    except Exception as error:  # a damaged config can fail anywhere inside transformers
        raise CaloraError(f"{directory} cannot be loaded: {first_line(error)}") from error
    if info["missing_keys"]:
        raise CaloraError(f"{directory} lacks {sorted(info['missing_keys'])[0]}, which the model needs; copy it again")
    return model


def check_depth(directory: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse a layer count that the files cannot fill before transformers builds that many layers."""
    for name in ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        layers = config.get(name, 0)
        if isinstance(layers, int) and layers > tensors:
            raise CaloraError(f"{directory / checkpoint.CONFIG} asks for {name}={layers}, the files hold {tensors} tensors")


def first_line(error: Exception) -> str:
    """The first line of an error, for a sentence."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
