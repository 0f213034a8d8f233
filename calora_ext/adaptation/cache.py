"""The teacher's targets on disk, so that teacher and student never sit in memory together.

    teacher.json             what it was made from, and which shard holds which sample
    shard-00000.safetensors  per sample: "KEY/decoder:-1" (T, width), and "KEY/logits" (T, vocabulary) or "KEY/top", "KEY/top_ids" (T, k)

A sample's KEY is the hash of what the model sees of it. Classification has logits (classes,) and always stores all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import CaloraError
from ..io.batches import IGNORED, Batch, Sample, collate, sample_key
from ..io.files import read_json, save_tensors
from .config import Distill
from .objective import Targets, mask_of
from .teacher import LiveTeacher, fingerprint, frozen

MANIFEST = "teacher.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SHARD_BYTES = 256 << 20


def tokenizer_fingerprint(tokenizer) -> str:
    return hashlib.blake2b(json.dumps(sorted(tokenizer.get_vocab().items())).encode(), digest_size=16).hexdigest()


def facts(samples: list[Sample], tokenizer, task: str, max_length: int, distill: Distill, adapter: str | None) -> dict:
    """What a cache must share with the run that uses it, apart from the teacher itself. adapter: hash of the inherited files."""
    keys = hashlib.blake2b("".join(sorted({sample_key(s) for s in samples})).encode(), digest_size=16)
    return {
        "tokenizer": tokenizer_fingerprint(tokenizer), "max_length": max_length, "task": task, "data": keys.hexdigest(),
        "hidden states": sorted(distill.targets()), "logits": bool(distill.logits),
        "temperature": distill.temperature if distill.logits else None, "inherited adapter": adapter,
    }  # fmt: skip


def write(
    directory: str | os.PathLike, teacher: nn.Module, samples: list[Sample], pad_id: int, task: str, distill: Distill,
    about: dict, dtype: str = "bfloat16", top_k: int | None = 64, batch_size: int = 8, disable_tqdm: bool | None = None,
) -> Path:  # fmt: skip
    """Run the teacher once over all samples. about: ``facts``. dtype: float32 or bfloat16, of what is stored.

    top_k: logits kept per position (as log-probabilities at the temperature, the rest taken as one outcome); None keeps all.
    The directory appears whole or not at all. Raises CaloraError if it exists already.
    """
    directory = Path(directory)
    if dtype not in DTYPES:
        raise CaloraError(f"a teacher cache stores float32 or bfloat16, not {dtype!r}")
    if top_k is not None and top_k < 1:
        raise CaloraError(f"top_k must be at least 1, or None for all logits, got {top_k}")
    if directory.exists():
        raise CaloraError(f"{directory} exists already; remove it or name another teacher cache")
    part = directory.with_name(f".{directory.name}.{os.getpid()}.part")
    unique = list({sample_key(s): s for s in samples}.items())
    unique.sort(key=lambda item: len(item[1]["input_ids"]))  # equal lengths together: less padding
    shards: dict[str, str] = {}
    pending: dict[str, Tensor] = {}
    try:
        part.mkdir(parents=True)
        live, number = LiveTeacher(teacher, task, distill), 0
        with frozen(teacher):
            for start in tqdm(
                range(0, len(unique), batch_size), unit="batch", desc="teacher", disable=disable_tqdm, dynamic_ncols=True
            ):
                piece = unique[start : start + batch_size]
                batch = collate([s for _, s in piece], pad_id)
                targets = live.targets([s for _, s in piece], batch)
                for i, (key, _) in enumerate(piece):
                    pending |= {
                        f"{key}/{name}": t
                        for name, t in _of_sample(targets, batch, i, task, distill, DTYPES[dtype], top_k).items()
                    }
                    shards[key] = f"shard-{number:05}.safetensors"
                if start + batch_size >= len(unique) or sum(t.nbytes for t in pending.values()) >= _SHARD_BYTES:
                    save_tensors(pending, part / shards[piece[-1][0]])
                    pending, number = {}, number + 1
        stored = {"dtype": dtype, "top_k": top_k}
        manifest = {"version": 1, "about": {**about, "teacher": fingerprint(teacher)}, "stored": stored, "shards": shards}
        (part / MANIFEST).write_text(json.dumps(manifest) + "\n")
        part.replace(directory)
    except (OSError, SafetensorError) as error:
        raise CaloraError(f"cannot write the teacher cache {directory}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return directory


def _of_sample(
    targets: Targets, batch: Batch, i: int, task: str, distill: Distill, dtype: torch.dtype, top_k: int | None
) -> dict[str, Tensor]:
    """Sample i of a batch without its padding."""
    out = {}
    for name, state in targets.hidden.items():
        length = (
            int(mask_of(batch, name.partition(":")[0], task)[i].sum())
            if task == "seq2seq-lm"
            else int(batch["attention_mask"][i].sum())
        )
        out[name] = state[i, :length].to(dtype).cpu().contiguous()
    if targets.logits is not None:
        logits = targets.logits[i].float().cpu()
        if task == "sequence-classification":
            out["logits"] = logits
        else:
            length = int((batch["labels"][i] != IGNORED).sum()) if task == "seq2seq-lm" else int(batch["attention_mask"][i].sum())
            logits = logits[:length]
            if top_k is None:
                out["logits"] = logits.to(dtype).contiguous()
            else:
                top = (logits / distill.temperature).log_softmax(-1).topk(min(top_k, logits.shape[-1]))
                out["top"], out["top_ids"] = top.values.contiguous(), top.indices.int()
    return out


class TeacherCache:
    """Targets read from a directory that ``write`` made. Shards are mapped, not read whole."""

    def __init__(self, directory: str | os.PathLike, about: dict, teacher: nn.Module | None) -> None:
        """about: ``facts`` of this run; teacher: the model itself if it is at hand. Raises CaloraError, naming what differs."""
        self.directory = Path(directory)
        if not (self.directory / MANIFEST).is_file():
            raise CaloraError(f"{self.directory} is not a teacher cache: it holds no {MANIFEST}; give a teacher to make one")
        manifest = read_json(self.directory / MANIFEST)
        if manifest.get("version") != 1 or not all(isinstance(manifest.get(key), dict) for key in ("about", "shards")):
            raise CaloraError(f"{self.directory / MANIFEST} is damaged or of another version; make the cache again")
        expected = dict(about) if teacher is None else {**about, "teacher": fingerprint(teacher)}
        theirs = manifest["about"]
        if changed := [name for name, value in expected.items() if theirs.get(name) != value]:
            raise CaloraError(
                f"the teacher cache {self.directory} was made with another {', another '.join(changed)}; remove it or make one for this run"
            )
        self.shards: dict[str, str] = manifest["shards"]
        self._open: dict[str, object] = {}

    def targets(self, samples: list[Sample], batch: Batch) -> Targets:
        rows = [self._read(sample_key(s)) for s in samples]
        stacked = {}
        for name in rows[0]:
            tensors = [row[name] for row in rows]
            stacked[name] = (
                torch.stack(tensors) if tensors[0].dim() == 1 else torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
            )
        top = (stacked.pop("top"), stacked.pop("top_ids").long()) if "top" in stacked else None
        return Targets(logits=stacked.pop("logits", None), top=top, hidden=stacked)

    def _read(self, key: str) -> dict[str, Tensor]:
        name = self.shards.get(key)
        if not isinstance(name, str):
            raise CaloraError(f"the teacher cache {self.directory} lacks a sample of the data; make it again")
        try:
            if name not in self._open:
                file = safe_open(self.directory / Path(name).name, "pt")
                keys: dict[str, list[str]] = {}
                for full in file.keys():  # noqa: SIM118 (not a dict)
                    keys.setdefault(full.partition("/")[0], []).append(full)
                self._open[name] = (file, keys)
            file, keys = self._open[name]
            return {full.partition("/")[2]: file.get_tensor(full) for full in keys[key]}
        except (OSError, SafetensorError, KeyError) as error:
            raise CaloraError(f"the teacher cache {self.directory} is damaged ({name}: {error}); make it again") from error
