"""Records -> token ids -> padded batches, for the three tasks.

A **sample** is a dict of 1-D int64 tensors; a **batch** is what a transformers model takes, padded on the right, plus:

    causal-lm                 labels (B, T): the token itself where it is to be predicted, -100 elsewhere (shift not applied)
    sequence-classification   labels (B,)
    seq2seq-lm                labels (B, T_out), padded with -100
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ..arguments import require_tokenizer
from ..errors import CaloraError
from .data import Record, labelled

TASKS = ("causal-lm", "seq2seq-lm", "sequence-classification")
PEFT_TASKS = {"CAUSAL_LM": "causal-lm", "SEQ_2_SEQ_LM": "seq2seq-lm", "SEQ_CLS": "sequence-classification"}
IGNORED = -100

Sample = dict[str, Tensor]
Batch = dict[str, Tensor]


def task_name(task: str) -> str:
    """One of TASKS, from our name or PEFT's."""
    name = PEFT_TASKS.get(str(task), str(task))
    if name not in TASKS:
        raise CaloraError(f"{task!r} is not a task; choose one of {', '.join(TASKS)}")
    return name


def tokenize(
    records: list[Record], tokenizer, task: str, max_length: int, label_names: Mapping[str, int] | None = None, classes: int = 0
) -> tuple[list[Sample], str]:
    """Samples of a task and one line that says what was made, and what was dropped.

    max_length: tokens per sample; plain texts for causal-lm are packed into blocks of exactly that many (the last, shorter
    one is dropped unless it is the only one), everything else is cut to it. label_names, classes: for classification.
    Raises CaloraError where the records do not fit the task or no sample remains.
    """
    require_tokenizer(tokenizer)
    if max_length < 2:
        raise CaloraError(f"max_length must be at least 2 tokens, got {max_length}")
    if task == "sequence-classification":
        return _classification(records, tokenizer, max_length, label_names, classes)
    prompts = records[0].completion is not None
    if task == "seq2seq-lm":
        if not prompts:
            raise CaloraError('seq2seq-lm needs rows {"prompt", "completion"}')
        return _seq2seq(records, tokenizer, max_length)
    if prompts:
        return _responses(records, tokenizer, max_length)
    if any(r.pair is not None for r in records):
        raise CaloraError("causal-lm reads one text per row but the data holds pairs; choose one with text_column")
    ids = token_stream([r.text for r in records], tokenizer)
    blocks = list(ids.split(max_length))
    if len(blocks) > 1 and len(blocks[-1]) < max_length:
        blocks.pop()
    if len(blocks[0]) < 2:
        raise CaloraError("the data holds fewer than 2 tokens")
    return [{"input_ids": b, "labels": b} for b in blocks], f"{len(blocks)} blocks of {len(blocks[0])} tokens"


def token_stream(texts: list[str], tokenizer) -> Tensor:
    """All texts as one (tokens,) int64 tensor. Each gets the tokenizer's own special tokens; several are ended by eos."""
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    if len(encoded) > 1 and eos is not None:
        encoded = [ids if ids and ids[-1] == eos else [*ids, eos] for ids in encoded]
    return torch.tensor([i for ids in encoded for i in ids], dtype=torch.int64)


def _responses(records: list[Record], tokenizer, max_length: int) -> tuple[list[Sample], str]:
    """prompt + completion + eos; only the completion and its eos are predicted."""
    prompts = tokenizer([r.text for r in records], verbose=False)["input_ids"]
    completions = tokenizer([r.completion for r in records], add_special_tokens=False, verbose=False)["input_ids"]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    samples, cut = [], 0
    for prompt, completion in zip(prompts, completions, strict=True):
        if eos and prompt and prompt[-1] == eos[0]:
            prompt = prompt[:-1]  # tokenizers that end every text with eos: the completion goes on
        ids = torch.tensor([*prompt, *completion, *eos][:max_length], dtype=torch.int64)
        labels = ids.clone()
        labels[: len(prompt)] = IGNORED
        if not (labels[1:] != IGNORED).any():
            cut += 1
            continue
        samples.append({"input_ids": ids, "labels": labels})
    return _some(samples, max_length), f"{len(samples)} prompts with completions{_dropped(cut, max_length)}"


def _seq2seq(records: list[Record], tokenizer, max_length: int) -> tuple[list[Sample], str]:
    inputs = tokenizer([r.text for r in records], truncation=True, max_length=max_length, verbose=False)["input_ids"]
    labels = tokenizer(text_target=[r.completion for r in records], truncation=True, max_length=max_length, verbose=False)[
        "input_ids"
    ]
    pairs = zip(inputs, labels, strict=True)
    samples = [
        {"input_ids": torch.tensor(i, dtype=torch.int64), "labels": torch.tensor(t, dtype=torch.int64)}
        for i, t in pairs
        if i and t
    ]
    return _some(
        samples, max_length
    ), f"{len(samples)} prompts with completions{_dropped(len(records) - len(samples), max_length)}"


def _classification(records, tokenizer, max_length, label_names, classes) -> tuple[list[Sample], str]:
    kept, dropped = labelled(records, label_names, classes)
    if any((r.pair is None) != (kept[0].pair is None) for r in kept):
        raise CaloraError("some rows have a pair and some have none")
    pair = None if kept[0].pair is None else [r.pair for r in kept]
    encoded = tokenizer([r.text for r in kept], pair, truncation=True, max_length=max_length, verbose=False)
    names = [n for n in ("input_ids", "token_type_ids") if n in encoded]
    samples = [
        {**{n: torch.tensor(encoded[n][i], dtype=torch.int64) for n in names}, "labels": torch.tensor(r.label)}
        for i, r in enumerate(kept)
    ]
    samples = [s for s in samples if len(s["input_ids"])]
    said = f", {dropped} dropped for a negative label" if dropped else ""
    return _some(samples, max_length), f"{len(samples)} labelled texts{said}"


def _some(samples: list[Sample], max_length: int) -> list[Sample]:
    if not samples:
        raise CaloraError(f"no sample is left: no text has tokens to learn from within max_length={max_length}")
    return samples


def _dropped(count: int, max_length: int) -> str:
    return f", {count} dropped (nothing to predict within {max_length} tokens)" if count else ""


def collate(samples: list[Sample], pad_id: int) -> Batch:
    """Pad samples on the right to the longest and stack them. pad_id: what input_ids are filled with; it is masked."""
    batch = {}
    for name in samples[0]:
        tensors = [s[name] for s in samples]
        if tensors[0].dim() == 0:
            batch[name] = torch.stack(tensors)
        else:
            fill = {"input_ids": pad_id, "labels": IGNORED}.get(name, 0)
            batch[name] = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)
    lengths = torch.tensor([len(s["input_ids"]) for s in samples])
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch


def sample_key(sample: Sample) -> str:
    """A hash of everything the model sees of a sample (16 bytes, hexadecimal): equal samples share it."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(sample):
        digest.update(name.encode() + len(sample[name].shape).to_bytes(1, "little"))
        digest.update(sample[name].numpy().tobytes() + b"\0")
    return digest.hexdigest()
