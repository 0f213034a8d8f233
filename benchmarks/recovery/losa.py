"""LoSA and its parts beside plain pruning and beside an adapter that stays apart, on the model and the text of the demo.

    OMP_NUM_THREADS=1 python benchmarks/recovery/losa.py --sparsity 0.7 --seeds 0 1 2 --out benchmarks/results/losa.json

Every arm trains on the same text (docs-train) for as many steps with the same data order; it takes the learning rate that is best for it
on docs-valid, first seed, and is reported on docs-test: mean loss in nats per token over windows of 256. All weights are bf16 unless --weights
says otherwise, so that what differs is the pruning and the training. Arms that are in the file already are kept: a run may be made in pieces.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn

import calora_ext as cx
from calora_ext import plots
from calora_ext.adaptation import Lora, Settings
from calora_ext.adaptation.loop import train
from calora_ext.adaptation.objective import Objective
from calora_ext.adaptation.run import samples_of
from calora_ext.demo import ASSETS
from calora_ext.evaluate import pad_id_of
from calora_ext.integrations.directories import open_tokenizer, quiet_loading
from calora_ext.io.batches import token_stream
from calora_ext.io.data import read_records
from calora_ext.tables import table

WINDOW = 256
RANK = 8
ONE_SHOT = {"prunings": 1}
UNIFORM = {"ranks": "uniform", "rank_growth": 0.0}
PUBLISHED = {"rates": "rmi"}

# name: (what is done, its options). "prune": cx.compress. "lora": that, then cx.adapt without merging. "full": that, then every kept weight
# is trained under its mask. "losa": cx.sparse_adapt.
ARMS = {
    "dense": ("dense", {}),
    "dense + LoRA": ("dense", {"train": True}),
    "magnitude": ("prune", {"pruner": "magnitude"}),
    "Wanda": ("prune", {"pruner": "wanda"}),
    "SparseGPT": ("prune", {"pruner": "sparsegpt"}),
    "SparseGPT, RMI": ("prune", {"pruner": "sparsegpt", "rates": "rmi"}),
    "SparseGPT, OWL": ("prune", {"pruner": "sparsegpt", "rates": "owl"}),
    "SparseGPT, arithmetic rates": ("prune", {"pruner": "sparsegpt", "rates": "arithmetic"}),
    "Wanda + unmerged LoRA": ("lora", {"pruner": "wanda"}),
    "SparseGPT + unmerged LoRA": ("lora", {"pruner": "sparsegpt"}),
    "SparseGPT, masked full fine-tuning": ("full", {"pruner": "sparsegpt"}),
    "Wanda, masked LoRA, uniform": ("losa", {"pruner": "wanda", **ONE_SHOT, **UNIFORM}),
    "SparseGPT, masked LoRA, uniform": ("losa", {**ONE_SHOT, **UNIFORM}),
    "SparseGPT, masked LoRA, uniform, on the grid": ("losa", {**ONE_SHOT, **UNIFORM, "on_grid": True}),
    "LoSA as published, Wanda": ("losa", {"pruner": "wanda", **PUBLISHED}),
    "LoSA as published": ("losa", PUBLISHED),
    "LoSA as published, rank 10": ("losa", {**PUBLISHED, "rank": 10}),  # as many parameters as with the sparse branch, or more
    "- RMI": ("losa", {"rates": "uniform"}),
    "OWL instead of RMI": ("losa", {"rates": "owl"}),
    "- rank growth": ("losa", {**PUBLISHED, **UNIFORM}),
    "- schedule": ("losa", {**PUBLISHED, **ONE_SHOT}),
    "+ distillation": ("losa", {**PUBLISHED, "distill": cx.Distill(hidden={}, logits=1.0)}),
    "+ start from the residual": ("losa", {**PUBLISHED, "init": "residual"}),
    "+ sparse branch, 5 % of the kept weights": ("losa", {**PUBLISHED, "sparse_branch": 0.05}),
    "+ start from the residual, + sparse branch": ("losa", {**PUBLISHED, "init": "residual", "sparse_branch": 0.05}),
    "+ arithmetic rates": ("losa", {"rates": "arithmetic"}),
    "arithmetic rates, - schedule": ("losa", {"rates": "arithmetic", **ONE_SHOT}),
}


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer = open_tokenizer(ASSETS / "base")
        self.test, self.valid = self._windows("test", options.windows), self._windows("valid", options.windows)
        self.calibration = list(self._windows("train", options.calibration).view(-1, WINDOW))

    def _windows(self, split: str, count: int) -> torch.Tensor:
        """`count` windows spread evenly over a split: (tokens,)."""
        ids = token_stream([r.text for r in read_records(self._file(split))], self.tokenizer)
        windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
        return windows[torch.arange(count) * len(windows) // count].flatten()

    @staticmethod
    def _file(split: str) -> Path:
        return ASSETS / "text" / f"docs-{split}.jsonl.gz"

    def run(self, arm: str, sparsity: str | float, seed: int, rate: float) -> dict:
        """One training: losses on test and valid, seconds, how sparse it is."""
        kind, options = ARMS[arm]
        options = dict(options)
        model = cx.load(ASSETS / "base")
        began, found = time.monotonic(), {}
        settings = Settings(
            max_steps=self.options.steps, per_device_train_batch_size=self.options.batch_size, learning_rate=rate or 1.0, seed=seed,
            disable_tqdm=True,
        )  # fmt: skip
        shared = {"data": self._file("train"), "tokenizer": self.tokenizer, "max_length": WINDOW, "args": settings}
        if kind in ("prune", "lora", "full"):
            recipe = cx.Recipe(weights=self.options.weights, sparsity=sparsity, lm_head=None, **options)
            calibration = None if options["pruner"] == "magnitude" else self.calibration
            found["sparsity"] = cx.compress(model, recipe, calibration=calibration).outcome.sparsity
        if kind == "lora" or options.get("train"):
            lora = Lora(rank=RANK, targets="all" if kind == "lora" else ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
            cx.adapt(model, lora=lora, recovery=None, distill=None, **shared)
        elif kind == "full":
            model = self._trained_whole(model, settings)
        elif kind == "losa":
            uniform = isinstance(sparsity, str)
            rates = options.pop("rates", "uniform")
            recipe = cx.Recipe(weights=self.options.weights, sparsity=sparsity, lm_head=None, pruner=options.pop("pruner", None), rates="uniform" if uniform else rates)
            result = cx.sparse_adapt(model, recipe=recipe, **{"rank": RANK, "init": "zero", **options}, calibration=self.calibration, **shared)
            found |= {"sparsity": result.sparsity, "ranks": [row["mean_rank"] for row in result.phases], "peak_rss_bytes": result.peak_rss_bytes}
        seconds = time.monotonic() - began
        if kind not in ("dense", "full"):
            cx.set_activations(model, "exact")
        losses = {split: cx.perplexity(model, self.tokenizer, getattr(self, split), WINDOW).loss for split in ("test", "valid")}
        return {"arm": arm, "pruned": str(sparsity), "seed": seed, "learning_rate": rate, **losses, "seconds": round(seconds, 1), **found}

    def _trained_whole(self, sparse: nn.Module, settings: Settings) -> nn.Module:
        """A dense model with the weights of a sparse one, all that are kept trained as fp32, then rounded to bf16."""
        model = cx.load(ASSETS / "base", dtype=torch.float32).requires_grad_(False)
        weights = {}
        for name, layer in sparse.named_modules():
            if isinstance(layer, cx.CompressedLinear):
                weights[name] = weight = model.get_submodule(name).weight
                weight.copy_(layer.decode())
                weight.requires_grad_().register_hook(lambda grad, kept=weight != 0: grad * kept)  # AdamW then leaves a 0 as it is
        samples, _ = samples_of(model, self.tokenizer, self._file("train"), "causal-lm", WINDOW, {})
        train(model.train(), weights, samples, Objective("causal-lm", None), None, settings, pad_id_of(model, self.tokenizer), {})
        for weight in weights.values():
            weight.data = weight.bfloat16().float()
        return model.eval()


def trains(arm: str) -> bool:
    kind, options = ARMS[arm]
    return kind in ("lora", "losa", "full") or bool(options.get("train"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", nargs="+", default=["0.7"], help="shares, or patterns such as 2:4")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--windows", type=int, default=64, help="of held-out text")
    parser.add_argument("--calibration", type=int, default=64, help="windows of training text to prune with")
    parser.add_argument("--weights", default="bf16", help="format of the pruned weights; rounded with GPTQ where it is not bf16, or while they train")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", action="store_true", help="run nothing: write tables and pictures of --out beside it")
    options = parser.parse_args()
    if options.report:
        report(options.out)
        return
    plan = {name: getattr(options, name) for name in ("steps", "batch_size", "windows", "calibration")} | {"rank": RANK, "window": WINDOW}
    plan |= {} if options.weights == "bf16" else {"weights": options.weights}
    stored = json.loads(options.out.read_text()) if options.out.exists() else {"plan": plan, "runs": []}
    if stored["plan"] != plan:
        parser.error(f"{options.out} was made with {stored['plan']}; name another --out")
    runs = stored["runs"]

    def run(arm: str, sparsity: str | float, seed: int, rate: float) -> dict:
        key = (arm, str(sparsity), seed, rate)
        done = next((r for r in runs if (r["arm"], r["pruned"], r["seed"], r["learning_rate"]) == key), None)
        if done is None:
            done = bench.run(arm, sparsity, seed, rate)
            runs.append(done)
            options.out.write_text(json.dumps(stored, indent=1) + "\n")
            print(f"{sparsity} {arm}, seed {seed}, {rate:g}: {done['test']:.4f} in {done['seconds']:.0f} s", flush=True)
        return done

    with quiet_loading():
        bench = Bench(options)
        for sparsity in [s if ":" in s else float(s) for s in options.sparsity]:
            for arm in options.arms:
                rates = options.learning_rates if trains(arm) else [0.0]
                best = min(rates, key=lambda rate, arm=arm, s=sparsity: run(arm, s, options.seeds[0], rate)["valid"])
                for seed in options.seeds[1:] if trains(arm) else []:
                    run(arm, sparsity, seed, best)
    print(tables(runs))


COLUMNS = ("arm", "loss", "sd", "seeds", "learning rate", "seconds")


def tables(runs: list[dict]) -> str:
    return "\n\n".join(f"sparsity {s}\n\n{table(COLUMNS, summary(runs, s))}" for s in dict.fromkeys(r["pruned"] for r in runs))


def report(path: Path) -> None:
    """The tables as Markdown beside the JSON, and a picture per sparsity."""
    stored = json.loads(path.read_text())
    plan, runs = stored["plan"], stored["runs"]
    text = (f"docs-test, nats per token, mean and sd over seeds; {plan['steps']} steps of {plan['batch_size']} x {plan['window']} tokens, mean rank {plan['rank']}, "
            f"{plan['calibration']} x {plan['window']} tokens to prune with, {plan.get('weights', 'bf16')} weights.")  # fmt: skip
    path.with_suffix(".md").write_text(f"# LoSA and its parts on the demo model\n\n{text}\n\n{tables(runs)}\n", encoding="utf-8")
    dense = {row[0]: float(row[1]) for s in dict.fromkeys(r["pruned"] for r in runs) for row in summary(runs, s) if row[0].startswith("dense")}
    for sparsity in dict.fromkeys(r["pruned"] for r in runs):
        rows = [row for row in summary(runs, sparsity) if not row[0].startswith("dense")]
        dots = [(name, float(loss), float(sd or 0), name.startswith("LoSA")) for name, loss, sd, *_ in rows]
        plots.loss_dots(path.with_name(f"{path.stem}-{sparsity.replace(':', '-')}.png"), f"sparsity {sparsity}: held-out loss, mean ± sd of the seeds", dots, dense)


def summary(runs: list[dict], sparsity: str) -> list[tuple]:
    """Rows of the table: per arm the learning rate that is best on valid, its mean test loss and standard deviation over seeds."""
    rows = []
    for arm in ARMS:
        own = [r for r in runs if (r["arm"], r["pruned"]) == (arm, sparsity)]
        if own:
            rate = min(own, key=lambda r: (r["seed"] != min(o["seed"] for o in own), r["valid"]))["learning_rate"]
            losses = [r["test"] for r in own if r["learning_rate"] == rate]
            sd = f"{stdev(losses):.4f}" if len(losses) > 1 else None
            rows.append((arm, f"{mean(losses):.4f}", sd, len(losses), f"{rate:g}" if rate else None, f"{mean(r['seconds'] for r in own):.0f}"))
    return rows


if __name__ == "__main__":
    main()
