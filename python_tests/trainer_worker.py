"""Run by torchrun: trains adapters on the saved model DIR/small with CaloraTrainer, and writes what each process saw to DIR/NAME-RANK.json."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from adapt_helpers import make_gradients_infinite
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments

import calora_ext as cx
from calora_ext.adaptation import Distill, Lora, Recovery
from calora_ext.linear import CompressedLinear

LENGTHS = [(2 + i % 5, 1 + 3 * i % 7) for i in range(24)]  # words of prompts and completions: no two micro-batches predict as many


class Tokenizer:
    """Words w4, w5, ... to their numbers: what the samples need of a tokenizer."""

    eos_token_id = pad_token_id = None

    def __call__(self, texts, **_):
        return {"input_ids": [[int(word[1:]) for word in text.split()] for text in texts]}

    def get_vocab(self):
        return {}


def rows():
    """Prompts with completions, of many lengths."""
    draw = torch.Generator().manual_seed(1)
    text = lambda n: " ".join(f"w{i}" for i in torch.randint(4, 28, (n,), generator=draw).tolist())  # noqa: E731
    return [{"prompt": text(p), "completion": text(c)} for p, c in LENGTHS]


def arguments(directory, **options):
    options = {"max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "save_strategy": "no", **options}
    return TrainingArguments(str(directory), report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, **options)


def trainer(small, dense, args, dropout=0.0, **options):
    """small, dense: directories of the compressed model and its teacher."""
    model, teacher = cx.load(small), LlamaForCausalLM.from_pretrained(dense)
    arm = {"lora": Lora(rank=4, dropout=dropout), "recovery": Recovery(rank=3, dropout=dropout), "distill": Distill({-1: 0.3}, 0.5)}
    return cx.CaloraTrainer(model, args, train_dataset=rows(), processing_class=Tokenizer(), teacher=teacher, max_length=16, **arm, **options)


class Die(TrainerCallback):
    """Kills this process after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Start(TrainerCallback):
    step = None

    def on_train_begin(self, args, state, control, **_):
        self.step = state.global_step


def private_bytes(tensors, file):
    """Of the pages that tensors lie in: those that this process has copied; -1 where one is not mapped from the file."""
    regions, now = [], None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, end = (int(x, 16) for x in first.split("-"))
            now = [begin, end, rest[-1], 0]
            regions.append(now)
        elif first == "Anonymous:":
            now[3] = 1024 * int(rest[0])
    homes = [next(r for r in regions if r[0] <= t.data_ptr() < r[1]) for t in tensors]
    return sum(r[3] for r in homes) if all(r[2] == str(file) for r in homes) else -1


def facts(t):
    """What a test wants to know of a trainer that has trained."""
    model = t.model
    packed = [tensor for m in model.modules() if isinstance(m, CompressedLinear) for tensor in m.packed_tensors().values()]
    found = {"losses": [row["loss"] for row in t.state.log_history if "loss" in row]}
    if Path("/proc/self/smaps").exists():
        found["private"] = private_bytes(packed, Path(sys.argv[2]).resolve() / "small" / "model.safetensors")
    if t._sharding:
        shards = [p for p in model.parameters() if p.requires_grad]
        assert all(isinstance(p, DTensor) == p.requires_grad for p in model.parameters())
        moments = [t.optimizer.state[p]["exp_avg"] for p in shards]
        found["here"] = [sum(p.to_local().numel() for p in ps) for ps in (shards, moments)]
        found["whole"] = sum(p.numel() for p in shards)
    return found


def plain(directory, **options):
    return trainer(directory / "small", directory / "dense", arguments(directory / "plain", optim="sgd", learning_rate=0.3, **options))


def interrupted(directory, name, callbacks=()):
    args = arguments(directory / name, max_steps=6, save_strategy="steps", save_steps=2, per_device_train_batch_size=2, weight_decay=0.1)
    return trainer(directory / "small", directory / "dense", args, dropout=0.3, callbacks=list(callbacks))


def main(mode, directory):
    directory, rank = Path(directory), int(os.environ["RANK"])
    done = {}
    if mode == "killed":
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        start = Start()
        t = interrupted(directory, "killed", [start, *([Die(5)] if first and rank == 1 else [])])
        t.train(resume_from_checkpoint=True)
        t.save_model()
        done["killed"] = {"resumed_at": start.step, **facts(t)}
    else:
        t = plain(directory, per_device_train_batch_size=2, gradient_accumulation_steps=2)
        t.train()
        t.save_model()
        done["plain"] = facts(t)
        t = interrupted(directory, "whole")
        t.train()
        t.save_model()
        done["whole"] = facts(t)
        half = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "weight_decay": 0.1, "save_steps": 2}
        for name, fsdp in (("ddp", None), ("fsdp", True)):
            args = arguments(directory / name, max_steps=4, save_strategy="steps", fsdp=fsdp, activation_checkpointing=True, **half)
            t = trainer(directory / "small", directory / "dense", args)
            t.train()
            t.save_model()
            done[name] = facts(t)
        args = arguments(directory / "fsdp", max_steps=4, save_strategy="steps", fsdp=True, activation_checkpointing=True, **half)
        t = trainer(directory / "small", directory / "dense", args, callbacks=[start := Start()])
        t.train(resume_from_checkpoint=str(directory / "ddp" / "checkpoint-2"))
        done["resharded"] = {"resumed_at": start.step, **facts(t)}
        for name, fsdp in (("ddp", None), ("fsdp", True)):
            t = trainer(directory / "small", directory / "dense", arguments(directory / "diverged", fsdp=fsdp))
            if rank == 1:
                make_gradients_infinite(t.model)
            try:
                t.train()
            except cx.CaloraError as error:
                done[f"{name}-diverged"] = {"error": str(error), "step": t.state.global_step}
    for name, found in done.items():
        (directory / f"{name}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
