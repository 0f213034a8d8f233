"""How small CA-LoRA's adapter can be: recovery modules of several ranks, stored in int8, beside the LoRA that they were trained with.

    OMP_NUM_THREADS=1 python benchmarks/recovery/small_banks.py --ranks 15 --seeds 0 1 2 --work DIR --out benchmarks/results/small_banks.json

The demo's model in 2:4 int4 and its task docs, trained as `calora demo --full` trains its CA-LoRA: 240 steps of 2 x 256 tokens, learning rate 1e-3,
recovery from the residual; only the rank differs. Reported are nats per token over windows of 256 of docs-valid, on which a rank is chosen, and of docs-test; bytes
are those of all files of an adapter directory. --work keeps the model and the adapters in fp32: what is there is not trained again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch

import calora_ext as cx
from calora_ext.adaptation import Settings
from calora_ext.demo import ASSETS
from calora_ext.demo.plan import FORMATS, TASKS
from calora_ext.demo.story import LORA_RANK, WINDOW, branches
from calora_ext.integrations.directories import open_tokenizer, quiet_loading
from calora_ext.io.batches import token_stream
from calora_ext.io.data import read_records
from calora_ext.tables import table

FORMAT, TASK = "2:4 int4", "docs"
INHERITED = ASSETS / f"lora-{TASK}"  # bf16
STORED = {  # name: how an adapter is saved
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "bf16, recovery int8": {"dtype": torch.bfloat16, "recovery_dtype": torch.int8},
}  # fmt: skip


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work
        self.tokenizer = open_tokenizer(ASSETS / "base")
        self.model = partial(cx.load, self.work / "model", dtype=torch.float32)
        if not (self.work / "model").exists():
            model = cx.load(ASSETS / "base")
            cx.compress(model, cx.Recipe(**FORMATS[FORMAT]), calibration=[self._windows(task, "train") for task in TASKS])
            model.save_pretrained(self.work / "model")

    def _windows(self, task: str, split: str) -> torch.Tensor:
        """Windows spread evenly over a split: (tokens,)."""
        ids = token_stream([record.text for record in read_records(self._file(task, split))], self.tokenizer)
        windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
        count = min(self.options.windows, len(windows))
        return windows[torch.arange(count) * len(windows) // count].flatten()

    @staticmethod
    def _file(task: str, split: str) -> Path:
        return ASSETS / "text" / f"{task}-{split}.jsonl.gz"

    def train(self, rank: int, seed: int) -> Path:
        """The adapter in fp32."""
        directory = self.work / f"r{rank}-seed{seed}"
        if directory.exists():
            return directory
        arm = branches("i-rc-d", INHERITED, LORA_RANK, partial(cx.load, ASSETS / "base", dtype=torch.float32))
        arm["recovery"] = replace(arm["recovery"], rank=rank)
        settings = Settings(max_steps=self.options.steps, per_device_train_batch_size=2, learning_rate=1e-3, seed=seed)
        model = self.model()
        cx.adapt(model, data=self._file(TASK, "train"), tokenizer=self.tokenizer, max_length=WINDOW, args=settings, adapter_name=TASK, **arm)
        cx.save_adapter(model, TASK, directory)
        return directory

    def measure(self, rank: int, seed: int, stored: str) -> dict:
        """Losses and bytes of an adapter as it is when it was stored in some way and loaded again."""
        model, directory = self.model(), self.work / "stored"
        cx.load_adapter(model, self.train(rank, seed), TASK)
        cx.save_adapter(model, TASK, directory, **STORED[stored])
        cx.delete_adapter(model, TASK)
        cx.load_adapter(model, directory, TASK)
        cx.set_adapter(model, TASK)
        losses = {split: cx.perplexity(model, self.tokenizer, self._windows(TASK, split), WINDOW).loss for split in ("valid", "test")}
        return {"rank": rank, "seed": seed, "stored": stored, "bytes": size_of(directory), **losses}


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[15])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--windows", type=int, default=64, help="of held-out text, and of text to prune with")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lora = size_of(INHERITED)
    with quiet_loading():
        bench = Bench(options)
        runs = [bench.measure(rank, seed, how) for seed in options.seeds for rank in options.ranks for how in STORED]
    plan = {"format": FORMAT, "task": TASK, "steps": options.steps, "windows": options.windows, "lora_bytes": lora}
    options.out.write_text(json.dumps({"plan": plan, "runs": runs}, indent=1) + "\n")
    print(summary(runs, lora))


def summary(runs: list[dict], lora: int) -> str:
    rows = []
    for rank, stored in dict.fromkeys((run["rank"], run["stored"]) for run in runs):
        same = [run for run in runs if (run["rank"], run["stored"]) == (rank, stored)]
        spread = [f"{mean(v):.4f}" + (f" ± {stdev(v):.4f}" if len(v) > 1 else "") for v in ([r[s] for r in same] for s in ("valid", "test"))]
        rows.append([f"{rank}", stored, f"{same[0]['bytes']:,}", f"{same[0]['bytes'] / lora:.2f}", *spread])
    return table(["recovery rank", "stored in", "bytes", "x the LoRA", "valid", "test"], rows)


if __name__ == "__main__":
    main()
