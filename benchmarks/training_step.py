"""One LoRA step through packed weights, beside the same step on dense bf16 weights and on bitsandbytes' 4 bits (both with PEFT).

    python benchmarks/training_step.py [--batch 1] [--tokens 512] [--layers 22] [--threads 2] [--json benchmarks/results/training-step.json]

The shape is TinyLlama 1.1B's, its weights are random: LoRA of rank 16 on every linear layer of a block, bf16 autocast, gradient checkpointing, AdamW.
Every peer runs in a process of its own. Time: median of the steps after the first. Memory: the peak of the resident set during those
steps, mapped weights included, less what the interpreter took with everything imported. --peers chooses some; --json keeps the others' rows.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from calora_ext.tables import table

PEERS = ("bf16 + PEFT", "bitsandbytes nf4 + PEFT", "calora int4 g64", "calora int4 g64 + PEFT")
TARGETS = {"seconds": 1.3, "bytes": 0.45}  # at most so many times those of bf16
RANK = 16
SHAPE = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
KEY = ("peer", "layers", "batch", "tokens", "threads", "isa")


def prepare(directory: Path, layers: int) -> None:
    """The model dense and packed, in directory/dense and directory/small; one random block as often as there are layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import calora_ext as cx

    def save(model: LlamaForCausalLM, name: str) -> None:
        model.model.layers.extend(copy.deepcopy(model.model.layers[0]) for _ in range(layers - 1))
        model.config.num_hidden_layers = layers
        model.save_pretrained(directory / name)

    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 1})).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        p.data.fill_(1.0) if "norm" in name else p.data.normal_(0, 0.02)
    save(copy.deepcopy(model), "dense")
    cx.compress(model, cx.Recipe(weights="int4", group_size=64))
    save(model, "small")


def measure(peer: str, directory: Path, layers: int, batch: int, tokens: int, threads: int, steps: int) -> dict:
    """The row of a peer, in this process."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    import calora_ext as cx
    from calora_ext import heap, ops
    from calora_ext.adaptation import Lora, student
    from calora_ext.evaluate import task_loss

    if "bitsandbytes" in peer:
        import bitsandbytes  # noqa: F401 (part of the interpreter's share)
    torch.set_num_threads(threads)
    interpreter = memory("VmRSS")
    if "calora" in peer:
        model = cx.load(directory / "small")
    else:
        fourbit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        options = {"quantization_config": fourbit} if "bitsandbytes" in peer else {}
        model = LlamaForCausalLM.from_pretrained(directory / "dense", dtype=torch.bfloat16, **options)
    model.requires_grad_(False)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    if "PEFT" in peer:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM"))
    else:
        lora = Lora(rank=RANK, targets=r"model\.layers\..*")
        plan = student.plan(model, "causal-lm", lora, None)
        student.attach(model, "lora", plan, lora, None, None, "causal-lm", 0)
        student.start_training(model, "lora", plan, lora, None)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids = torch.randint(0, SHAPE["vocab_size"], (batch, tokens))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step() -> float:
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss, count, _ = task_loss(model, inputs, "causal-lm")
        if peer == "calora int4 g64":
            heap.trim()
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begin

    with heap.frugal(heap.STEP) if peer == "calora int4 g64" else nullcontext():  # as cx.adapt does beside checkpointing
        step()
        gc.collect()
        heap.trim()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        times = [step() for _ in range(steps)]
    return {
        "peer": peer, "layers": layers, "batch": batch, "tokens": tokens, "threads": threads, "isa": ops.native.isa(),
        "seconds": statistics.median(times), "fastest": min(times), "bytes": memory("VmHWM") - interpreter, "steps": steps,
        "parameters": sum(p.numel() for p in parameters),
    }  # fmt: skip


def memory(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def report(rows: list[dict]) -> str:
    """Rows of one setting, beside bf16's where it was measured."""
    by = {row["peer"]: row for row in rows}
    dense, lines = by.get(PEERS[0]), []
    for peer, row in by.items():
        ratios = {key: row[key] / dense[key] if dense else None for key in TARGETS}
        missed = [
            f"MISS: more than {most} x the {'time' if key == 'seconds' else 'memory'} of bf16"
            for key, most in TARGETS.items()
            if peer == PEERS[2] and ratios[key] is not None and ratios[key] > most
        ]
        other = by.get(PEERS[1])
        if peer == PEERS[2] and other and row["seconds"] > other["seconds"]:
            missed.append("MISS: slower than bitsandbytes")
        shown = [f"{ratio:.2f} x" if ratio is not None else None for ratio in ratios.values()]
        lines.append((peer, f"{row['seconds']:.2f}", shown[0], f"{row['bytes'] / 1e6:,.0f}", shown[1], "; ".join(missed)))
    return table(("LoRA step", "seconds", "of bf16's", "MB", "of bf16's", ""), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 22), ("batch", 1), ("tokens", 512), ("threads", 2), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--directory", type=Path, help="keeps the models for the next call; default: a temporary one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.in_this_process:
        numbers = {name: getattr(given, name) for name in ("layers", "batch", "tokens", "threads", "steps")}
        print(json.dumps(measure(given.peers[0], given.directory, **numbers)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = given.directory or Path(temporary)
        if not (directory / "small").exists():
            prepare(directory, given.layers)
        own = [*sys.argv[1:], "--directory", str(directory), "--in-this-process", "--peers"]
        rows = json.loads(given.json.read_text()) if given.json and given.json.exists() else []
        for peer in given.peers:
            done = subprocess.run([sys.executable, __file__, *own, peer], stdout=subprocess.PIPE, text=True, check=True)
            new = json.loads(done.stdout.splitlines()[-1])
            rows = [row for row in rows if any(row[k] != new[k] for k in KEY)] + [new]
            if given.json:
                given.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    shown = [row for row in rows if all(row[k] == new[k] for k in KEY[1:])]
    print(report(sorted(shown, key=lambda row: PEERS.index(row["peer"]))))


if __name__ == "__main__":
    main()
