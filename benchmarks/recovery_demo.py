"""What CA-LoRA recovers on the demo model: every arm, every int4 setting, several seeds; JSON and a table.

    python benchmarks/recovery_demo.py --demo DIR --task austen --out recovery.json [--seeds 0 1 2] [--steps 150] [--lr 1e-3 3e-3]

DIR holds ``base`` (dense model), ``lora-TASK`` (trained on it) and ``text/TASK-{train,valid,test}.txt.gz``. All trained arms see the
same tokens in the same order for the same number of steps. With several learning rates each arm takes the one that is best for it
on the validation text (first seed), and is reported on the test text. Losses are nats per token, in windows of 256 tokens.

    dense, dense+LoRA   as they come; ``ceiling`` is dense+LoRA trained on
    inherited           compressed + the LoRA as it came (0 steps)
    rd, i, i-rc         LoRA from scratch; inherited and trained on; with recovery
    i-big               inherited, enlarged to as many parameters as i-rc-d trains
    i-rc-d              CA-LoRA: inherited, recovery, distilled from dense+LoRA (i-d, i-big-d: the same without, or with a larger LoRA)
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import calora_ext as cx
from calora_ext.adaptation import Distill, Lora, Recovery, Settings, cache_teacher
from calora_ext.adaptation.config import TAUGHT_LOGITS
from calora_ext.io.data import read_records

WINDOW = 256
SETTINGS = {"row": -1, "g128": 128, "g64": 64}
ARMS = ("ceiling", "rd", "i", "i-rc", "i-big", "i-rc-d")


class Demo:
    """The demo's files, and one run of one arm."""

    def __init__(self, args: argparse.Namespace, scratch: str) -> None:
        self.args = args
        self.base, self.lora = args.demo / "base", args.demo / f"lora-{args.task}"
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.train = args.demo / "text" / f"{args.task}-train.txt.gz"
        self.texts = {s: read_records(args.demo / "text" / f"{args.task}-{s}.txt.gz")[0].text for s in ("valid", "test")}
        self.cache = Path(scratch) / "teacher"
        self.distill = Distill({-1: args.hidden}, logits=args.logits, temperature=args.temperature)

    def dense(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    def compressed(self, setting: str) -> torch.nn.Module:
        model = self.dense()
        cx.compress(model, cx.Recipe(weights="int4", group_size=SETTINGS[setting]))
        return model

    def losses(self, model: torch.nn.Module) -> dict[str, float]:
        return {split: cx.perplexity(model, self.tokenizer, text, WINDOW).loss for split, text in self.texts.items()}

    def untrained(self, model: torch.nn.Module, bare: str, adapted: str) -> dict[str, dict[str, float]]:
        found = {bare: self.losses(model)}
        cx.load_adapter(model, self.lora, "task")
        cx.set_adapter(model, "task")
        return found | {adapted: self.losses(model)}

    def options(self, arm: str) -> dict:
        """Keyword arguments of cx.adapt for an arm."""
        parts, args = arm.split("-"), self.args
        options = {"inherit": self.lora, "recovery": None, "distill": None}
        if "rd" in parts:
            options |= {"inherit": None, "lora": Lora(rank=args.lora_rank)}
        if "big" in parts:
            options |= {"lora": Lora(rank=args.lora_rank + args.rank)}
        if "rc" in parts:
            options |= {"recovery": Recovery(rank=args.rank, alpha=args.alpha)}
        if "d" in parts:
            options |= {"distill": self.distill, "teacher_cache": self.teacher_cache()}
        return options

    def teacher_cache(self) -> Path:
        if not self.cache.exists():
            what = {"data": self.train, "tokenizer": self.tokenizer, "inherit": self.lora, "distill": self.distill}
            cache_teacher(self.cache, self.dense(), **what, max_length=WINDOW, top_k=self.args.top_k)
        return self.cache

    def run(self, arm: str, setting: str, seed: int, rate: float) -> dict:
        model = self.dense() if arm == "ceiling" else self.compressed(setting)
        settings = Settings(
            max_steps=self.args.steps,
            learning_rate=rate,
            seed=seed,
            per_device_train_batch_size=self.args.batch_size,
            disable_tqdm=True,
        )
        result = cx.adapt(
            model,
            data=self.train,
            tokenizer=self.tokenizer,
            max_length=WINDOW,
            args=settings,
            adapter_name="task",
            **self.options(arm),
        )
        return {
            "arm": arm, "setting": setting, "seed": seed, "learning_rate": rate, **self.losses(model),
            "parameters": sum(result.parameters.values()), "seconds": result.seconds, "train_loss": result.history[-1],
        }  # fmt: skip


def summarise(untrained: dict, runs: list[dict]) -> tuple[list[dict], str]:
    """Mean and sd over seeds on the test text, and what they say about the target."""
    rows = {name: {"arm": name, "loss": losses["test"], "sd": 0.0} for name, losses in untrained.items()}
    for arm in dict.fromkeys(r["arm"] for r in runs):
        found = [r for r in runs if r["arm"] == arm]
        losses = [r["test"] for r in found]
        rows[arm] = {"arm": arm, "loss": statistics.mean(losses), "sd": statistics.stdev(losses) if len(losses) > 1 else 0.0}
        rows[arm] |= {"seeds": len(losses), "parameters": found[0]["parameters"], "learning_rate": found[0]["learning_rate"]}
    if not {"ceiling", "i-rc-d"} <= rows.keys():
        return list(rows.values()), "no verdict without the arms ceiling and i-rc-d"
    inherited, ceiling, ours = rows["inherited"]["loss"], rows["ceiling"], rows["i-rc-d"]
    gap = inherited - ceiling["loss"]
    for row in rows.values():
        row["closed"] = (inherited - row["loss"]) / gap
    if gap < 0.02 or gap < 3 * max(ceiling["sd"], ours["sd"]):
        return list(
            rows.values()
        ), f"nothing to recover (gap {gap:.4f}); CA-LoRA - inherited {ours['loss'] - inherited:+.4f} (target: not above 0)"
    verdict = [f"gap {gap:.4f}", f"CA-LoRA closes {100 * ours['closed']:.0f} % (target 80)"]
    for other in ("i", "i-big"):
        if other in rows:
            sd = max(ours["sd"], rows[other]["sd"])
            verdict.append(f"{other} - CA-LoRA {rows[other]['loss'] - ours['loss']:+.4f} (target > 1 sd, {sd:.4f})")
    return list(rows.values()), "; ".join(verdict)


def table(rows: list[dict]) -> str:
    lines = [f"{'arm':12} {'test loss':>19} {'perplexity':>10} {'closed':>7} {'parameters':>10} {'lr':>7}"]
    for row in rows:
        spread = f" +- {row['sd']:.4f}" if row.get("seeds", 1) > 1 else ""
        closed = f"{100 * row['closed']:.0f} %" if "closed" in row else ""
        trained = f"{row['parameters']:10,} {row['learning_rate']:7.0e}" if "parameters" in row else ""
        lines.append(f"{row['arm']:12} {row['loss']:8.4f}{spread:11} {math.exp(row['loss']):10.2f} {closed:>7} {trained}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--task", default="austen")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr", nargs="+", type=float, default=[Settings.learning_rate])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=8, help="windows of 256 tokens")
    parser.add_argument("--lora-rank", type=int, default=16, help="of the inherited LoRA")
    parser.add_argument("--rank", type=int, default=Recovery.rank, help="of the recovery modules")
    parser.add_argument("--alpha", type=float, default=Recovery.alpha, help="of the recovery modules")
    parser.add_argument("--hidden", type=float, default=Distill().hidden[-1], help="weight of the MSE of the last hidden state")
    parser.add_argument("--logits", type=float, default=TAUGHT_LOGITS, help="weight of the KL divergence")
    parser.add_argument("--temperature", type=float, default=Distill.temperature)
    parser.add_argument("--top-k", type=int, default=64, help="logits of the teacher kept per position")
    return parser.parse_args()


def main() -> None:
    args, started = arguments(), time.monotonic()
    torch.set_num_threads(1)
    report = {
        "options": json.loads(json.dumps(vars(args), default=lambda path: path.name)),
        "untrained": {},
        "runs": [],
        "summary": {},
    }

    with tempfile.TemporaryDirectory() as scratch:
        demo = Demo(args, scratch)

        def run(arm: str, setting: str, seed: int, rate: float) -> dict:
            row = demo.run(arm, setting, seed, rate)
            report["runs"].append(row)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
            losses = f"valid {row['valid']:.4f} test {row['test']:.4f}"
            print(f"{time.monotonic() - started:6.0f} s  {setting:5} {arm:8} seed {seed} lr {rate:.0e}: {losses}", flush=True)
            return row

        def seeds(arm: str, setting: str) -> list[dict]:
            tried = [run(arm, setting, args.seeds[0], rate) for rate in args.lr]
            best = min(tried, key=lambda row: row["valid"])
            return [best, *(run(arm, setting, seed, best["learning_rate"]) for seed in args.seeds[1:])]

        dense = demo.untrained(demo.dense(), "dense", "dense+LoRA")
        ceiling = seeds("ceiling", "dense") if "ceiling" in args.arms else []
        for setting in args.settings:
            untrained = report["untrained"][setting] = dense | demo.untrained(demo.compressed(setting), "compressed", "inherited")
            chosen = [row for arm in args.arms if arm != "ceiling" for row in seeds(arm, setting)]
            rows, verdict = summarise(untrained, ceiling + chosen)
            report["summary"][setting] = {"rows": rows, "verdict": verdict}
            args.out.write_text(json.dumps(report, indent=1) + "\n")
            print(f"\nint4 {setting}\n{table(rows)}\n{verdict}\n", flush=True)


if __name__ == "__main__":
    main()
