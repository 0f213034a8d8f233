"""Compressing a model directory into another one with a block of the model in memory at a time.

The model is built on the meta device. What lies outside its list of blocks is mapped from the files; the weights of a block are
mapped when its turn comes, written as soon as they are packed, and given up. The result is byte for byte what
:func:`calora_ext.compress` and ``save_pretrained`` make of the loaded model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict

from .. import heap
from ..card import model_card
from ..compression.calibrate import find_blocks
from ..compression.report import Report
from ..compression.residency import Residency
from ..errors import CaloraError
from ..io import bitsandbytes, checkpoint
from ..io.bitsandbytes import Lazy
from ..io.outputs import output_directory
from ..io.spool import ActivationSpool, TensorSpool
from ..packed import PackedModule
from ..policy import is_conv1d
from ..progress import progress
from ..recipe import Recipe
from ..tables import format_bytes
from .directories import has_tokenizer, open_tokenizer, quiet_loading
from .models import build, carry_out, check_depth, first_line, model_class

MAX_SHARD_SIZE = "50GB"  # as save_pretrained


def compress_directory(
    source: str | os.PathLike, output: str | os.PathLike, recipe: Recipe | None = None, calibration: Sequence | None = None,
    max_memory: int | None = None, overwrite: bool = False,
) -> Report:  # fmt: skip
    """Compress a dense model directory into a new one, with a block of the model in memory at a time.

    What it writes is what :func:`calora_ext.compress` and ``save_pretrained`` would, byte for byte, with the tokenizer beside it.
    Models larger than memory compress: no more than a block of weights, or a matrix outside of the blocks, is in memory besides the
    calibration activations, the Hessians of gptq and sparsegpt, the largest of them twice, and what is made on the way: about 12 bytes per
    weight of the layer that is pruned and packed, or a forward pass of 2048 tokens, of which some megabytes stay while it waits in its thread.
    Packed weights wait on the disk of the output, which needs their size twice.
    calibration: texts (the tokenizer beside the model reads them) or sequences of token ids, as for ``compress``. max_memory:
    bytes that calibration activations may take; what is more waits on disk. overwrite: replace an output that is not empty.
    Raises CaloraError as ``compress`` does, and for a directory that is incomplete or damaged, an output that is not empty, and a
    model that ties or calls its blocks twice. Then, and when interrupted, there is no output.
    """
    source, output = Path(source), Path(output)
    if max_memory is not None and (isinstance(max_memory, bool) or not isinstance(max_memory, int) or max_memory < 0):
        raise CaloraError(f"max_memory must be a number of bytes, got {max_memory!r}")
    with heap.frugal(), output_directory(output, overwrite, keep=[source]) as directory:
        text = calibration is not None and any(isinstance(item, str) for item in calibration)
        tokenizer = open_tokenizer(source) if text or has_tokenizer(source) else None
        streamed = Streamed(source, directory, max_memory)
        report = carry_out(streamed.model, recipe, calibration, tokenizer, streamed)
        streamed.save(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        card = model_card(output.resolve().name, report.recipe.to_dict(), sizes(report, directory))
        (directory / "README.md").write_text(card, encoding="utf-8")
    return report


def sizes(report: Report, directory: Path) -> list[tuple[str, str]]:
    """What a report and the files it is about say of their sizes: rows of a table."""
    on_disk = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return [
        ("weights before", format_bytes(report.bytes_before)),
        ("weight files", format_bytes(on_disk)),
        ("smaller by", f"{report.bytes_before / on_disk:.2f} ×"),
        ("parameters compressed", f"{100 * report.coverage.compressed_parameters / report.coverage.parameters:.1f} %"),
    ]


class Streamed(Residency):
    """A dense model directory, or a checkpoint of bitsandbytes, as ``model``, whose blocks are on the meta device but for those entered."""

    departs = True

    def __init__(self, source: Path, scratch: Path, max_memory: int | None) -> None:
        """scratch: a directory on the disk that has room. Raises CaloraError for what ``cx.load`` would refuse, and for tied blocks."""
        self.source, self.max_memory = source, max_memory
        self.written, self.activations = TensorSpool(scratch), ActivationSpool(scratch)
        self.share = 0.0  # bytes that may wait in memory for one forward pass
        self.entered: set[str] = set()
        self.finished: set[str] = set()
        config, headers = checkpoint.open_directory(source)
        if bitsandbytes.is_checkpoint(config):
            self.tensors, _ = bitsandbytes.state_dict(headers)
        elif config.get("quantization_config"):
            raise CaloraError(f"{source} is compressed already; start from the dense model")
        else:
            self.tensors = {key: Lazy(partial(header.tensor, key)) for key, header in headers.items()}
        make = model_class(config, source).from_config
        check_depth(source, config, len(headers))
        self.model = build(source, make, _dtype(config, {key: header for key, header in headers.items() if key in self.tensors}))
        if hasattr(self.model.config, "quantization_config"):
            del self.model.config.quantization_config  # of bitsandbytes
        linear = [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)]
        self.blocks = list(find_blocks(self.model, linear))
        self._refuse_ties()
        transforms = get_model_conversion_mapping(self.model)
        dtype = self.model.config.dtype
        self.loading = LoadStateDictConfig(
            pretrained_model_name_or_path=str(source), dtype=dtype, dtype_plan=self.model._get_dtype_plan(dtype), weight_mapping=transforms
        )
        self.names = self._by_block(transforms)
        self._load_rest()
        if max_memory is not None:
            self.model.get_input_embeddings().register_forward_hook(lambda module, args, out: self.hold([out]))

    def block_of(self, name: str) -> str:
        """The block that a module or tensor lies in; an empty string outside of all."""
        return next((block for block in self.blocks if name.startswith(f"{block}.")), "")

    def _refuse_ties(self) -> None:
        for pair in self.model.all_tied_weights_keys.items():
            for name in pair:
                if self.block_of(name):
                    raise CaloraError(f"{name} is tied to another weight, which needs the whole model in memory; load it and use cx.compress")

    def _by_block(self, transforms: list) -> dict[str, list[str]]:
        """{block: its tensors in the files}. Raises CaloraError where the files lack a tensor of a block."""
        state = self.model.state_dict()
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        found: dict[str, list[str]] = {block: [] for block in ("", *self.blocks)}
        there, converted = set(), False
        for key in self.tensors:
            for steps in ((renamings, converters), ([], [])):
                name, pattern = rename_source_key(key, *steps, self.model.base_model_prefix, state)
                if name in state:
                    break
            found[self.block_of(name)].append(key)
            there.add(name)
            converted |= pattern is not None
        lacking = [name for name in state if self.block_of(name) and name not in there]
        if lacking and not converted:  # what comes of a conversion is seen when it is done
            raise CaloraError(f"{self.source} lacks {lacking[0]}, which the model needs; copy it again")
        return found

    def _load_rest(self) -> None:
        """What lies outside the blocks, and buffers that no file holds: as ``from_pretrained`` does it."""
        try:
            info = self._read("")
            own = {name for name in self.model.state_dict() if self.block_of(name)}
            info.missing_keys -= own
            for name in own:
                self.model.get_parameter_or_buffer(name)._is_hf_initialized = True
            self.model._finalize_model_loading(self.model, self.loading, info)
            if self.model.can_generate():
                self.model.adjust_generation_fn(
                    None, True, None, str(self.source), cache_dir=None, force_download=False, proxies=None, local_files_only=True,
                    token=None, revision="main", subfolder="", trust_remote_code=False,
                )  # fmt: skip
        except CaloraError:
            raise
        except Exception as error:  # a damaged directory can fail anywhere inside transformers
            raise CaloraError(f"{self.source} cannot be loaded: {first_line(error)}") from error
        if info.missing_keys:
            raise CaloraError(f"{self.source} lacks {sorted(info.missing_keys)[0]}, which the model needs; copy it again")
        self.model.eval()

    def _read(self, block: str) -> Any:
        """Map the tensors of a block into the model; returns what transformers says of it."""
        tensors = {key: self.tensors[key][...] for key in self.names[block]}
        with quiet_loading():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, self.loading)
        if info.mismatched_keys:
            name, there, wanted = sorted(info.mismatched_keys)[0]
            raise CaloraError(f"{self.source} holds {name} as {tuple(there)}, config.json asks for {tuple(wanted)}; copy the model again")
        return info

    # --- what the work on the blocks tells ---------------------------------------------------------------------------

    def begin(self, blocks: Iterable[str], passes: int) -> None:
        if self.max_memory is not None:
            self.share = self.max_memory / passes / 2  # a pass holds what enters its block, and the output of the embeddings
        for block in self.blocks:
            if block not in blocks and block not in self.finished:
                self.enter(block)

    def enter(self, block: str) -> None:
        if block in self.entered:
            return
        self._read(block)
        module = self.model.get_submodule(block)
        lacking = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
        if lacking:
            raise CaloraError(f"{self.source} lacks {block}.{lacking[0]}, which the model needs; copy it again")
        self.entered.add(block)

    def leave(self, block: str, finished: bool) -> None:
        if finished:
            self._write({f"{block}.{name}": t for name, t in self.model.get_submodule(block).state_dict().items()})
            self.finished.add(block)
        _give_up(self.model.get_submodule(block))
        self.entered.discard(block)
        self.rest()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        if self.max_memory is not None and sum(t.nbytes for t in tensors) > self.share:
            for tensor in tensors:
                self.activations.move(tensor)

    def rest(self) -> None:
        self.activations.rest()
        heap.trim()

    def grouped(self, names: Iterable[str], finished: bool) -> Iterator[list[str]]:
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self.block_of(name), []).append(name)
        for block, group in groups.items():
            if block:
                self.enter(block)
            yield group
            if block:
                self.leave(block, finished)

    # --- the result ----------------------------------------------------------------------------------------------------

    def _write(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in revert_weight_conversion(self.model, tensors).items():
            self.written.add(name, tensor)

    def save(self, directory: Path) -> None:
        """The compressed model as ``save_pretrained`` would write it; blocks that stayed dense are copied. The model is used up."""
        for block in self.blocks:
            if block not in self.finished:
                self.enter(block)
                self.leave(block, True)
        rest = {name: t for name, t in self.model.state_dict().items() if not self.block_of(name)}
        self._write(remove_tied_weights_from_state_dict(rest, self.model))
        config = self.model.config
        config.dtype, config.architectures = str(self.model.dtype).removeprefix("torch."), [type(self.model).__name__]
        config.save_pretrained(directory)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(directory)
        split = split_torch_state_dict_into_shards(
            self.written.tensors, filename_pattern=checkpoint.WEIGHTS.replace(".", "{suffix}.", 1), max_shard_size=MAX_SHARD_SIZE
        )
        with progress(None, "Writing", "B", split.metadata["total_size"], unit_scale=True) as bar:
            for file, names in split.filename_to_tensors.items():
                self.written.write(directory / file, names, bar.update)
        if split.is_sharded:
            metadata = {"total_parameters": self.model.num_parameters(), **split.metadata}
            index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
            (directory / checkpoint.INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        self.written.close()
        checkpoint.finish_save(directory)


def _dtype(config: dict[str, Any], headers: dict[str, checkpoint.Header]) -> torch.dtype:
    """The model's as ``from_pretrained`` sees it: what config.json names, or that of the first floating-point weight."""
    named = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))), None)
    if isinstance(named, torch.dtype):
        return named
    kept = (checkpoint.DTYPES[header.tensors[name].dtype] for name, header in headers.items())
    return next((dtype for dtype in kept if dtype.is_floating_point), torch.float32)


def _give_up(block: nn.Module) -> None:
    """Put a block's weights, and buffers that are saved, on the meta device."""
    for module in block.modules():
        if isinstance(module, PackedModule):
            module._expanded = None
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty_like(buffer, device="meta")
