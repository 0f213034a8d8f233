"""Checkpoint directories: reading safetensors headers without trusting them, checking what they hold before anything is
loaded, 64-byte alignment, and the size and BLAKE2 of every shard recorded at save.

A model directory holds ``config.json`` and ``model.safetensors``, or shards named by ``model.safetensors.index.json``.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CaloraError
from ..formats import WeightFormat, extent_of
from ..formats.layout import TILE_ALIGN
from ..progress import progress
from .files import json_writer, read_json, write_together

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
MAX_HEADER = 100_000_000  # bytes, the limit of safetensors itself
MAX_ELEMENTS = 1 << 50
DIGEST_BYTES = 32
CHUNK = 1 << 24
PAD = "alignment"  # the metadata entry whose length moves the data to a multiple of 64

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file. begin, end: bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds, after every size in it was checked against the file."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Stored]
    data: int  # where tensor data begins, bytes from the start of the file

    def read(self, name: str) -> Tensor:
        """The bytes of a tensor, mapped on their own: nothing is read until it is used, what is written stays in memory, and what
        was read goes when the tensor does."""
        t = self.tensors[name]
        if t.begin == t.end:
            return torch.empty(0, dtype=torch.uint8, device="cpu")  # transformers checks models under torch.device("meta")
        start = t.begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), t.end - start, offset=start, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapped, dtype=torch.uint8, count=t.end - t.begin, offset=t.begin - start)

    def tensor(self, name: str) -> Tensor:
        """The tensor as it was saved, mapped; copied where the file does not align it."""
        t, data = self.tensors[name], self.read(name)
        dtype = DTYPES[t.dtype]
        return (data.clone() if t.begin % dtype.itemsize else data).view(dtype).view(t.shape)

    @property
    def misaligned(self) -> list[str]:
        """Packed tensors (uint8, whole 64-byte lines) that a kernel could not read where they lie."""
        return [name for name, t in self.tensors.items() if _is_packed(t) and t.begin % TILE_ALIGN]


def _is_packed(t: Stored) -> bool:
    return t.dtype == "U8" and t.end > t.begin and (t.end - t.begin) % TILE_ALIGN == 0


def read_header(path: Path) -> Header:
    """Raises CaloraError if the file is not a complete safetensors file; reads nothing but the header."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CaloraError(f"{path} is cut short or not a safetensors file; copy it again")
            text = file.read(length)
    except OSError as error:
        raise CaloraError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise CaloraError(f"the header of {path} is damaged ({error}); copy the file again") from None
    if not isinstance(entries, dict):
        raise CaloraError(f"the header of {path} is damaged (not a JSON object); copy the file again")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CaloraError(f"the header of {path} is damaged (metadata is not text); copy the file again")
    data = 8 + length
    tensors = {name: _stored(path, name, entry, data) for name, entry in entries.items()}
    at = data
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if t.begin != at:
            raise CaloraError(f"{path} is damaged: tensor {name!r} starts at byte {t.begin}, expected {at}; copy the file again")
        at = t.end
    if at != size:
        raise CaloraError(f"{path} is cut short or damaged: its tensors end at byte {at}, the file at {size}; copy it again")
    return Header(path, metadata, tensors, data)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _stored(path: Path, name: str, entry: Any, data: int) -> Stored:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = [*shape, begin, end]
        if len(entry) != 3 or any(type(n) is not int or not 0 <= n <= MAX_ELEMENTS for n in whole):
            raise ValueError
        if prod(shape) > MAX_ELEMENTS or prod(shape) * DTYPES[dtype].itemsize != end - begin:
            raise ValueError
    except (TypeError, ValueError, KeyError):
        raise CaloraError(f"the header of {path} is damaged at tensor {name!r}; copy the file again") from None
    return Stored(dtype, tuple(shape), data + begin, data + end)


def shard_paths(directory: Path) -> list[Path]:
    """The safetensors files of a model directory. Raises CaloraError if there are none."""
    if not directory.is_dir():
        raise CaloraError(f"{directory} is not a model directory")
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not (directory / INDEX).is_file():
        raise CaloraError(f"{directory} holds no weights; expected {WEIGHTS} or {INDEX}")
    names = read_json(directory / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) and SHARD.fullmatch(n) for n in names.values()):
        raise CaloraError(f"{directory / INDEX} is damaged: its weight_map does not name safetensors files; copy it again")
    paths = [directory / name for name in sorted(set(names.values()))]
    for path in paths:
        if not path.is_file():
            raise CaloraError(f"{path} is missing; {INDEX} names it")
    return paths


def read_headers(paths: Iterable[Path]) -> dict[str, Header]:
    """{tensor: header of the file that holds it} over all shards. Raises CaloraError for a tensor stored twice."""
    found: dict[str, Header] = {}
    for path in paths:
        if path.suffix != ".safetensors":
            raise CaloraError(f"{path} is not a safetensors file; nothing else is read")
        header = read_header(path)
        for name in header.tensors:
            if name in found:
                raise CaloraError(f"tensor {name!r} is both in {found[name].path.name} and in {path.name}; copy the model again")
            found[name] = header
    return found


def check_sizes(paths: Iterable[Path], recorded: dict[str, dict]) -> None:
    """Raises CaloraError for a shard whose size is not the one recorded at save, or that was not part of that save."""
    for path in paths:
        if not recorded or not SHARD.fullmatch(path.name):
            continue
        if path.name not in recorded:
            raise CaloraError(f"{path} does not belong to the model that config.json describes; remove it, or copy the model again")
        size = path.stat().st_size
        if size != recorded[path.name]["size"]:
            raise CaloraError(f"{path} has {size} bytes, {recorded[path.name]['size']} were saved; copy it again")


def check_packed(name: str, fmt: WeightFormat, in_features: int, out_features: int, headers: dict[str, Header]) -> None:
    """Raises CaloraError unless the packed tensors of module `name` are there with their shapes, and its scales are finite."""
    stored = packed_shapes(name, fmt, headers)
    for tensor, shape in fmt.tensors(in_features, out_features, extent_of(stored)).items():
        key = f"{name}.{tensor}"
        t = headers[key].tensors[key]
        if t.dtype != "U8" or t.shape != shape:
            raise CaloraError(
                f"{key} is {t.shape} {t.dtype} in {headers[key].path.name}, a {out_features} x {in_features} layer in {fmt} has "
                f"{shape} U8; the file belongs to another config or is damaged"
            )
    try:
        fmt.check(read_packed(name, stored, headers), in_features, out_features)
    except CaloraError as error:
        raise CaloraError(f"{name} in {headers[f'{name}.packed'].path.name}: {error}") from None


def packed_shapes(name: str, fmt: WeightFormat, headers: dict[str, Header]) -> dict[str, tuple[int, ...]]:
    """Shapes that the files say the packed tensors of module `name` have. Raises CaloraError where one is missing."""
    shapes = {}
    for tensor in fmt.names:
        key = f"{name}.{tensor}"
        if key not in headers:
            raise CaloraError(f"{key} is missing from the checkpoint; copy the model again")
        shapes[tensor] = headers[key].tensors[key].shape
    return shapes


def read_packed(name: str, shapes: dict[str, tuple[int, ...]], headers: dict[str, Header]) -> dict[str, Tensor]:
    """The packed tensors of module `name`, mapped."""
    return {tensor: headers[f"{name}.{tensor}"].read(f"{name}.{tensor}").view(shape) for tensor, shape in shapes.items()}


def check_dense(headers: dict[str, Header]) -> None:
    """Raises CaloraError for a floating-point tensor that holds NaN. (Infinity can be meant: attention masks.)"""
    for name, header in headers.items():
        t = header.tensors[name]
        dtype = DTYPES[t.dtype]
        if dtype.is_floating_point and dtype.itemsize > 1 and t.end > t.begin:
            # Unaligned data cannot be viewed as a wider type in place; a chunk at a time is copied, never the tensor.
            for chunk in header.read(name).split(CHUNK):
                if torch.isnan(chunk.clone().view(dtype)).any():
                    raise CaloraError(f"{name} in {header.path.name} holds NaN values; the file is damaged")


def open_directory(directory: Path) -> tuple[dict[str, Any], dict[str, Header]]:
    """config.json and {tensor: header} of a model directory: all that can be checked before a model exists."""
    config = read_json(directory / CONFIG)
    return config, read_headers(shard_paths(directory))


# --- saving ------------------------------------------------------------------------------------------------------------


def header_json(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[bytes, list[str]]:
    """The JSON header that safetensors writes for these tensors, padding to 8 included, and their order in the file."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name in order:
        t = tensors[name]
        entries[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8), order


def alignment_metadata(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """`metadata` plus the padding that puts every packed tensor at a multiple of 64, if they are saved to one file.

    uint8 sorts behind wider types and packed tensors are multiples of 64: one shift aligns them all.
    """
    dense = sum(t.nbytes for t in tensors.values() if t.dtype != torch.uint8)
    for padding in range(0, TILE_ALIGN, 8):
        padded = {**metadata, PAD: " " * padding}
        if (8 + len(header_json(tensors, padded)[0]) + dense) % TILE_ALIGN == 0:
            return padded
    return metadata


def align(path: Path) -> None:
    """Rewrite a shard (beside, then rename) whose packed tensors are not aligned, by widening its header with spaces."""
    header = read_header(path)
    shifts = {-header.tensors[name].begin % TILE_ALIGN for name in header.misaligned}
    if len(shifts) != 1:  # aligned already, or not by any one shift: then loading copies
        return
    (shift,) = shifts
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(path, "rb") as source, open(beside, "wb") as target:
            text = source.read(header.data)[8:] + b" " * shift
            target.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(source, target, CHUNK)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def digest(path: Path, done: Callable[[int], Any] = lambda read: None) -> dict[str, Any]:
    """Size in bytes and BLAKE2b of a file. done: told how many bytes more were read."""
    blake2 = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            blake2.update(chunk)
            done(len(chunk))
    return {"size": path.stat().st_size, "blake2b": blake2.hexdigest()}


def finish_save(directory: Path) -> dict[str, dict]:
    """Align the shards of a directory just written and record them in its config.json. Returns what was recorded."""
    paths = shard_paths(directory)
    mode = (directory / CONFIG).stat().st_mode
    for path in paths:
        align(path)
        path.chmod(mode)  # safetensors makes files that only their owner may read
    files = {path.name: digest(path) for path in paths}
    config = read_json(directory / CONFIG)
    config["quantization_config"]["files"] = files
    write_together(directory, {CONFIG: json_writer(config)})
    return files


def publish(beside: Path, directory: Path) -> None:
    """Move a complete save into its place, replacing files by renaming: a model mapped from there keeps its old ones.
    Shards of an earlier save that are not part of this one are removed."""
    new = {path.name for path in beside.iterdir()}
    for path in list(directory.iterdir()):
        if SHARD.fullmatch(path.name) and path.name not in new:
            path.unlink()
    # config.json last: with the sizes it records, a half-moved directory is refused by the loader.
    for path in sorted(beside.iterdir(), key=lambda path: path.name == CONFIG):
        os.replace(path, directory / path.name)


def verify(directory: str | os.PathLike) -> dict[str, str]:
    """Hash every recorded shard again: {file: "ok", "missing", "size differs" or "content differs"}.

    Raises CaloraError if the directory is no calora model, or if nothing was recorded.
    """
    directory = Path(directory)
    quantization = read_json(directory / CONFIG).get("quantization_config")
    recorded = check_recorded(quantization.get("files") if isinstance(quantization, dict) else None)
    if not recorded:
        raise CaloraError(f"{directory / CONFIG} records no hashes; only models saved by calora_ext can be verified")
    with progress(None, "Verifying", "B", sum(entry["size"] for entry in recorded.values()), unit_scale=True) as bar:
        return {name: state for name, state in _verify(directory, recorded, bar.update)}


def _verify(directory: Path, recorded: dict[str, dict], done: Callable[[int], Any]) -> Iterator[tuple[str, str]]:
    for name, entry in recorded.items():
        path = directory / name
        if not path.is_file():
            yield name, "missing"
        elif path.stat().st_size != entry["size"]:
            yield name, "size differs"
        else:
            yield name, "ok" if digest(path, done) == entry else "content differs"


def check_recorded(files: Any) -> dict[str, dict]:
    """The recorded shards as a dictionary. Raises CaloraError if the record is damaged."""
    if files is None:
        return {}
    valid = isinstance(files, dict) and all(
        SHARD.fullmatch(name) and isinstance(entry, dict) and set(entry) == {"size", "blake2b"}
        and type(entry["size"]) is int and isinstance(entry["blake2b"], str)
        for name, entry in files.items()
    )  # fmt: skip
    if not valid:
        raise CaloraError("the recorded file sizes in config.json are damaged; copy the model again")
    return files
