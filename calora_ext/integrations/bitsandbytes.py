"""Loading the NF4 checkpoints of bitsandbytes as models of ours: repacked matrix by matrix, or dense."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from ..errors import CaloraError
from ..io import bitsandbytes
from ..io.checkpoint import CONFIG, Header, check_dense
from ..policy import features, plan
from ..recipe import Recipe
from .transformers import CaloraConfig

log = logging.getLogger("calora_ext")


def from_pretrained(directory: Path, meta: nn.Module, headers: dict[str, Header], **kwargs: Any) -> tuple[nn.Module, dict]:
    """The model and transformers' loading info. meta: the model without weights. kwargs: of ``from_pretrained``; with a
    ``quantization_config`` among them, which may be None (dense), that decides instead of what the file holds in NF4."""
    check_dense(headers)
    tensors, blocks = bitsandbytes.state_dict(headers)
    config = transformers.AutoConfig.from_pretrained(directory)
    del config.quantization_config
    if "quantization_config" not in kwargs:
        recipe = _recipe(directory, meta, blocks)
        kwargs["quantization_config"] = CaloraConfig(recipe)
        across = [name for name in blocks if f"^{re.escape(name)}$" in recipe.skip]
        log.warning(
            "%s: %d NF4 matrices of bitsandbytes are repacked; their codes stay, their scales are rounded to 8-bit floats (by 1.6 %% at most)%s",
            directory, len(blocks) - len(across), f". {len(across)} more stay dense: their rows are no multiple of a block" if across else "",
        )  # fmt: skip
    kwargs.setdefault("dtype", config.dtype)
    model, info = type(meta).from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True, **kwargs)
    model.name_or_path = model.config.name_or_path = str(directory)
    if model.can_generate() and (directory / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model, info


def _recipe(directory: Path, meta: nn.Module, blocks: dict[str, int]) -> Recipe:
    """What packs the matrices that the file holds in NF4, and no other. One whose blocks lie across rows would be rounded a
    second time, on another grid, which costs as much again as NF4 itself: it stays dense."""
    sizes = set(blocks.values())
    if len(sizes) > 1:
        raise CaloraError(f"{directory} holds NF4 in blocks of {min(sizes)} and of {max(sizes)}; load it with quantization_config=None, which makes it dense")
    recipe = Recipe(weights="nf4", group_size=sizes.pop(), lm_head="nf4")
    formats = plan(meta, recipe).formats
    if not formats.keys() & blocks.keys():
        raise CaloraError(f"{next(iter(blocks))} is no linear layer of the model that {directory / CONFIG} describes; copy the model again")
    whole = {name for name, block in blocks.items() if name in formats and features(meta.get_submodule(name))[0] % block == 0}
    dense = tuple(f"^{re.escape(name)}$" for name in formats if name not in whole)
    return Recipe(weights="nf4", group_size=recipe.group_size, lm_head="nf4", skip=dense)
