"""Train one of the demo's LoRAs with stock PEFT, on the dense, bf16-rounded base.

    OMP_NUM_THREADS=2 python train_lora.py --base base --text text --task docs --steps 500 --out lora-docs

Seeded. The adapter of the last step is written to --out, in bf16, loaded again, and its held-out losses are printed (nats per
token). It counts as trained when --steps 10 % higher improves them by less than 0.2 %: assets/SOURCES.md has both results.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from train_base import batches, encode, mean_loss, read_texts, windows
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_base(base: Path) -> torch.nn.Module:
    """The dense model: its weights are bf16 values, its arithmetic fp32."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def save(model: PeftModel, base: Path, out: Path) -> None:
    """Write the adapter, with the base named by its folder alone so that no path of this machine is recorded."""
    model.peft_config["default"].base_model_name_or_path = base.name
    model.to(torch.bfloat16).save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card; SOURCES.md describes the adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="dense model directory (train_base.py --out)")
    parser.add_argument("--text", type=Path, required=True, help="folder with the shipped text (make_text.py --text)")
    parser.add_argument("--task", required=True, choices=["docs", "cpp"])
    parser.add_argument("--out", type=Path, required=True, help="adapter directory to write")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=8, help="windows of 256 tokens")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)

    def ids(name: str) -> torch.Tensor:
        return encode(tokenizer, read_texts(args.text / f"{name}.jsonl.gz"))

    data = batches(ids(f"{args.task}-train"), args.batch_size, generator)
    held_out = {name: windows(ids(name)) for name in (f"{args.task}-valid", f"{args.task}-test")}
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS)
    model = get_peft_model(load_base(args.base), lora)
    model.print_trainable_parameters()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=args.steps // 20, num_training_steps=args.steps)

    started = time.monotonic()
    model.train()
    for step in range(1, args.steps + 1):
        rows = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % args.eval_every == 0:
            valid = mean_loss(model, held_out[f"{args.task}-valid"])
            print(f"step {step:5} loss {loss.item():.4f} valid {valid:.4f} {time.monotonic() - started:6.0f} s", flush=True)
    save(model, args.base, args.out)

    dense = load_base(args.base)
    before = {name: mean_loss(dense, rows) for name, rows in held_out.items()}
    adapted = PeftModel.from_pretrained(dense, args.out)
    for name, rows in held_out.items():
        print(f"{name:10} dense {before[name]:.4f}, with the LoRA {mean_loss(adapted, rows):.4f} after {args.steps} steps")


if __name__ == "__main__":
    main()
