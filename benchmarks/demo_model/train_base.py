"""Train the demo's base model from scratch: a 2.6 M parameter Llama with a 2048-token byte-level BPE.

    OMP_NUM_THREADS=2 nice -n 19 python train_base.py --work work --text text --out base

Arithmetic under bf16 autocast, weights in fp32. Seeded: the same machine, thread count and library versions give the same model. Loss is in nats per token.
The checkpoint in --out is replaced every --save-minutes, so that a usable model exists early.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

CONTEXT = 256
VOCABULARY = 2048


def read_texts(path: Path) -> list[str]:
    """The texts of a `.jsonl.gz` file."""
    return [json.loads(line)["text"] for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`; `<s>` is put in front of a text, as Llama does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines(keepends=True)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised fp32 model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=48,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """One stream of token ids, `<s> document </s> <s> document </s> …`, shape (tokens,)."""
    ids = tokenizer([document + tokenizer.eos_token for document in documents], verbose=False)["input_ids"]
    return torch.tensor([token for document in ids for token in document])


def windows(stream: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Cut a stream of ids into rows of CONTEXT tokens, the rest dropped: (rows, CONTEXT)."""
    rows = (len(stream) - offset) // CONTEXT
    return stream[offset : offset + rows * CONTEXT].view(rows, CONTEXT)


def batches(stream: torch.Tensor, batch_size: int, generator: torch.Generator):
    """Shuffled windows without end, cut at another offset in every epoch: (batch_size, CONTEXT) each."""
    while True:
        rows = windows(stream, int(torch.randint(CONTEXT, (), generator=generator)))
        order = torch.randperm(len(rows), generator=generator)
        yield from (rows[part] for part in order.split(batch_size) if len(part) == batch_size)


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: torch.Tensor, batch_size: int = 16) -> float:
    """Mean loss per predicted token over windows; its exponential is the perplexity."""
    training = model.training
    model.eval()
    total = sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(batch_size))
    model.train(training)
    return total / len(rows)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Replace `out` by a bf16 copy of the model, its tokenizer and its generation config."""
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    copy.save_pretrained(fresh, max_shard_size="3MB")
    tokenizer.save_pretrained(fresh)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with base-train.jsonl.gz (make_text.py --work)")
    parser.add_argument("--text", type=Path, required=True, help="folder with the shipped text (make_text.py --text)")
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch-size", type=int, default=16, help="windows of 256 tokens")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    base_texts = read_texts(args.work / "base-train.jsonl.gz")
    tasks = [text for task in ("docs", "cpp") for text in read_texts(args.text / f"{task}-train.jsonl.gz")]
    tokenizer = train_tokenizer(base_texts[::3] + tasks)
    stream = encode(tokenizer, base_texts)
    held_out = {
        path.stem: windows(encode(tokenizer, read_texts(path.with_suffix(".jsonl.gz"))))
        for path in (args.work / "python-test", args.text / "docs-valid", args.text / "cpp-valid")
    }
    model = build_model(tokenizer)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=args.steps // 20, num_training_steps=args.steps)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(stream):,} tokens, {args.steps} steps", flush=True)

    started = saved = time.monotonic()
    data = batches(stream, args.batch_size, generator)
    model.train()
    compiled = torch.compile(model)  # about a fifth faster on a CPU; shares its parameters with `model`
    for step in range(1, args.steps + 1):
        rows = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step:5} loss {loss.item():.4f} {time.monotonic() - started:6.0f} s", flush=True)
        if time.monotonic() - saved > 60 * args.save_minutes or step == args.steps:
            save(model, tokenizer, args.out)
            saved = time.monotonic()
            for name, rows in held_out.items():
                held_out_loss = mean_loss(model, rows)
                print(f"step {step:5} {name}: loss {held_out_loss:.4f} perplexity {math.exp(held_out_loss):.2f}", flush=True)


if __name__ == "__main__":
    main()
