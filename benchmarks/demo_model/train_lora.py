"""Train the demo's LoRA with stock PEFT: Pride and Prejudice and Emma on the dense, bf16-rounded base.

    OMP_NUM_THREADS=1 python train_lora.py --base base --text text --out lora-austen

Seeded. Every --eval-every steps the loss on austen-valid is measured and the best adapter so far is written to --out;
at the end the saved files are loaded again and their perplexities printed. Loss is in nats per token.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from train_base import batches, mean_loss, read_text, windows
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_base(base: Path) -> torch.nn.Module:
    """The dense model: its weights are bf16 values, its arithmetic fp32."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def save(model: PeftModel, base: Path, out: Path) -> None:
    """Write the adapter, with the base named by its folder alone so that no path of this machine is recorded."""
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card; SOURCES.md describes the adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="dense model directory (train_base.py --out)")
    parser.add_argument("--text", type=Path, required=True, help="folder with the shipped text (make_text.py --text)")
    parser.add_argument("--out", type=Path, required=True, help="adapter directory to write")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8, help="windows of 256 tokens")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--eval-every", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)

    def ids(name: str) -> torch.Tensor:
        return torch.tensor(tokenizer(read_text(args.text / f"{name}.txt.gz"), verbose=False)["input_ids"])

    data = batches(ids("austen-train"), args.batch_size, generator)
    valid = windows(ids("austen-valid"))
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS)
    model = get_peft_model(load_base(args.base), lora)
    model.print_trainable_parameters()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=args.steps // 20, num_training_steps=args.steps)

    best = mean_loss(model, valid)
    print(f"step     0 austen-valid: loss {best:.4f} perplexity {math.exp(best):.2f}", flush=True)
    started = time.monotonic()
    model.train()
    for step in range(1, args.steps + 1):
        rows = next(data)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % args.eval_every == 0 or step == args.steps:
            held_out = mean_loss(model, valid)
            mark = ""
            if held_out < best:
                best, mark = held_out, " saved"
                save(model, args.base, args.out)
            seconds = time.monotonic() - started
            print(f"step {step:5} loss {loss.item():.4f} austen-valid: loss {held_out:.4f}", end=" ")
            print(f"perplexity {math.exp(held_out):.2f} {seconds:6.0f} s{mark}", flush=True)

    dense = load_base(args.base)
    for name in ("kjv-sample", "austen-valid", "austen-test"):
        print(f"dense        {name:12} perplexity {math.exp(mean_loss(dense, windows(ids(name)))):.2f}")
    adapted = PeftModel.from_pretrained(dense, args.out)
    for name in ("kjv-sample", "austen-valid", "austen-test"):
        print(f"dense + LoRA {name:12} perplexity {math.exp(mean_loss(adapted, windows(ids(name)))):.2f}")


if __name__ == "__main__":
    main()
