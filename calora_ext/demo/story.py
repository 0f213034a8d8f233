"""What the demo does and measures; every figure is taken here and now. ``report`` writes it down."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev

import torch
from torch import Tensor, nn

from .. import bench
from ..adaptation import Lora, Recovery, Settings, adapt
from ..adapters import disable_adapters, enable_adapters, load_adapter, save_adapter, set_adapter
from ..errors import CaloraError
from ..evaluate import perplexity
from ..formats import WeightFormat
from ..integrations.directories import open_tokenizer, quiet_loading
from ..integrations.generation import generate
from ..integrations.models import compress, load, set_activations
from ..io.batches import token_stream
from ..io.checkpoint import read_headers, shard_paths
from ..io.data import read_records
from ..recipe import Recipe
from .plan import ARMS, FORMATS, Plan

ASSETS = Path(__file__).parent / "assets"
WINDOW = 256  # tokens, the model's context
PROMPT = "She could not"
LAYER = (2048, 5632)  # in and out of a 1B Llama's MLP: the demo's own layers are too small to time
WORTH_RECOVERING = 0.02  # nats

Say = Callable[[str], None]


def tell(plan: Plan, out: Path, say: Say = print, assets: Path = ASSETS) -> dict:
    """Do everything in ``plan``; models and adapters are saved under ``out``. Returns the results as JSON values."""
    if not (assets / "base" / "config.json").is_file():
        raise CaloraError(f"{assets} holds no demo model; install calora_ext again, its package data is missing")
    with quiet_loading():
        return _Story(plan, out, say, assets).tell()


class _Story:
    def __init__(self, plan: Plan, out: Path, say: Say, assets: Path) -> None:
        self.plan, self.out, self.say = plan, out, say
        self.base, self.lora, self.train = assets / "base", assets / "lora-austen", assets / "text" / "austen-train.txt.gz"
        self.tokenizer = open_tokenizer(self.base)
        self.texts = {name: self._tokens(assets / "text" / f"{name}.txt.gz") for name in ("austen-test", "kjv-sample")}
        self.arms: list[dict] = []
        self.curves: dict[str, list[float]] = {}
        self.began = time.monotonic()

    def _tokens(self, path: Path) -> Tensor:
        ids = token_stream([record.text for record in read_records(path)], self.tokenizer)
        return ids if self.plan.windows is None else ids[: self.plan.windows * WINDOW]

    def tell(self) -> dict:
        dense = self._dense()
        sizes, errors, same = self._compress()
        self._carry_over()
        self._train(dense)
        samples = self._samples()
        self.say("\nTiming one layer of a 1B model: our int4 beside torch, without and with a LoRA of rank 16 ...")
        kernels = self._kernels()
        return {
            "plan": {**vars(self.plan), "window": WINDOW, "prompt": PROMPT},
            "tokens": {name: len(ids) for name, ids in self.texts.items()},
            "sizes": sizes, "errors": errors, "round_trip_bit_exact": same, "arms": self.arms, "verdicts": self._verdicts(),
            "curves": self.curves, "samples": samples, "kernels": kernels, "seconds": time.monotonic() - self.began,
        }  # fmt: skip

    # -- the chapters -------------------------------------------------------------------------------------------------

    def _dense(self) -> nn.Module:
        """The dense model, alone and with its LoRA. It stays as the teacher."""
        self.say("A 2.6M-parameter Llama, trained on the King James Bible and three of Jane Austen's novels,")
        self.say("and a LoRA trained on two more of her novels. Held-out text: a sixth novel, and chapters of the Bible.\n")
        model = self._load(self.base)
        self._arm(model, "dense", None, [self.base])
        load_adapter(model, self.lora, "austen")
        set_adapter(model, "austen")
        self._arm(model, "dense + LoRA", None, [self.base, self.lora])
        return model

    def _compress(self) -> tuple[dict, dict, bool]:
        """Compress, save, load again: bytes on disk, error of each layer, and whether the round trip was exact."""
        sizes = {"dense bf16": self._parts(self.base)}
        errors, same = {}, True
        probe = self.texts["austen-test"][None, :64]
        for name in self.plan.formats:
            model = load(self.base)
            errors[name] = compress(model, Recipe(**FORMATS[name])).errors
            model.save_pretrained(self._model(name))
            self.tokenizer.save_pretrained(self._model(name))
            with torch.inference_mode():
                same &= torch.equal(model(probe).logits, load(self._model(name))(probe).logits)
            sizes[name] = self._parts(self._model(name))
            self.say(f"Compressed to {name}: {sum(sizes['dense bf16'].values()):,} -> {sum(sizes[name].values()):,} bytes on disk")
        self.say(f"Saved and loaded again: logits {'bit-identical' if same else 'DIFFER'}\n")
        return sizes, errors, same

    def _carry_over(self) -> None:
        """The dense model's LoRA, loaded on each compressed model as it is."""
        for name in self.plan.formats:
            model = self._load(self._model(name))
            self._arm(model, name, name, [self._model(name)])
            if name == self.plan.trained[-1]:
                set_activations(model, "exact")
                self._arm(model, f"{name}, exact activations", name, [self._model(name)], speed=False)
                set_activations(model, "int8")
            load_adapter(model, self.lora, "austen")
            set_adapter(model, "austen")
            self._arm(model, f"{name} + LoRA, inherited", name, [self._model(name), self.lora])

    def _train(self, teacher: nn.Module) -> None:
        self.say(f"\nTraining each arm for {self.plan.steps} steps of {self.plan.batch_size} x {WINDOW} tokens ...")
        if "ceiling" in self.plan.arms:
            self._trained("ceiling", None, teacher)
        for name in self.plan.trained:
            for arm in self.plan.arms:
                if arm != "ceiling":
                    self._trained(arm, name, teacher)

    def _trained(self, arm: str, form: str | None, teacher: nn.Module) -> None:
        """One arm over its seeds: a row of means, the first seed's curve and adapter."""
        title = f"{form} {ARMS[arm]}" if form else ARMS[arm]
        rows = []
        for seed in self.plan.seeds:
            model = self._load(self._model(form) if form else self.base)
            settings = Settings(
                max_steps=self.plan.steps, per_device_train_batch_size=self.plan.batch_size,
                learning_rate=self.plan.learning_rate, seed=seed,
            )  # fmt: skip
            result = adapt(
                model, data=self.train, tokenizer=self.tokenizer, max_length=WINDOW, args=settings, adapter_name="austen",
                **self._branches(arm, teacher),
            )  # fmt: skip
            saved = self.out / "adapters" / f"{form or 'dense'} {arm} seed {seed}".replace(" ", "-")
            save_adapter(model, "austen", saved)
            paths = [self._model(form) if form else self.base, saved]
            rows.append(self._measure(model, paths, speed=seed == self.plan.seeds[0]))
            self.curves.setdefault(title, [row["task"] for row in result.history])
        losses = [row["loss"] for row in rows]
        row = {**rows[0], "loss": mean(losses), "perplexity": math.exp(mean(losses)), "kjv_loss": mean(r["kjv_loss"] for r in rows)}
        row |= {"sd": stdev(losses) if len(losses) > 1 else None, "seeds": len(losses), "steps": self.plan.steps}
        self._add(title, form, row)

    def _branches(self, arm: str, teacher: nn.Module) -> dict:
        """Keyword arguments of ``adapt`` for an arm."""
        parts = arm.split("-")
        recovery = Recovery()
        options: dict = {"inherit": None if "rd" in parts else self.lora, "recovery": None, "distill": None}
        if "big" in parts:  # as many parameters as CA-LoRA trains
            options["lora"] = Lora(rank=16 + recovery.rank)
        if "rc" in parts:
            options["recovery"] = recovery
        if "d" in parts:
            del options["distill"]
            options["teacher"] = teacher
        return options

    def _samples(self) -> list[dict]:
        """Text of one compressed model with the adapter on and off."""
        name = self.plan.trained[-1]
        adapter = next(iter(sorted((self.out / "adapters").glob(f"{name.replace(' ', '-')}-i-rc-d-*"))), self.lora)
        model = self._load(self._model(name))
        load_adapter(model, adapter, "austen")
        set_adapter(model, "austen")
        samples = []
        for label, switch in (("on", enable_adapters), ("off", disable_adapters)):
            switch(model)
            made = generate(model, self.tokenizer, PROMPT, 40, temperature=0.7, top_p=0.9, seed=0)
            samples.append({"adapter": label, "model": name, "prompt": PROMPT, "text": made.text})
            self.say(f"\nAdapter {label}: {PROMPT}{made.text}")
        return samples

    def _kernels(self) -> list[dict]:
        formats = [WeightFormat("int4", 64), WeightFormat("int4", 128)]
        others = [name for name in bench.installed(*LAYER) if name in ("torch fp32", "torch bf16", "torch int4 g128")]
        rows = bench.compare(*LAYER, rows=1, rank=16, formats=formats, others=others, seconds=self.plan.bench_seconds)
        for row in rows:
            if row.rank == 0:
                self.say(f"  {row.peer:20} {row.seconds * 1e6:9,.0f} µs")
        return [row.to_dict() for row in rows]

    def _verdicts(self) -> list[dict]:
        """What was lost by compression and how much of it came back, for each format that was trained."""
        return [verdict(self.arms, name) for name in self.plan.trained if "i-rc-d" in self.plan.arms]

    # -- measuring ----------------------------------------------------------------------------------------------------

    def _load(self, directory: Path) -> nn.Module:
        """A model in fp32 arithmetic, so that arms differ by what was compressed and by nothing else."""
        return load(directory, dtype=torch.float32).eval()

    def _model(self, form: str) -> Path:
        return self.out / "models" / form.replace(" ", "-")

    def _arm(self, model: nn.Module, name: str, form: str | None, paths: list[Path], speed: bool = True) -> None:
        self._add(name, form, self._measure(model, paths, speed))

    def _add(self, name: str, form: str | None, row: dict) -> None:
        self.arms.append({"arm": name, "format": form, **row})
        self.say(f"{name:36} loss {row['loss']:.4f}   perplexity {row['perplexity']:6.2f}   (Bible: {math.exp(row['kjv_loss']):6.2f})")

    def _measure(self, model: nn.Module, paths: list[Path], speed: bool = True) -> dict:
        austen = perplexity(model, self.tokenizer, self.texts["austen-test"], WINDOW)
        bible = perplexity(model, self.tokenizer, self.texts["kjv-sample"], WINDOW)
        size = sum(f.stat().st_size for path in paths for f in path.glob("*.safetensors"))
        return {
            "loss": austen.loss, "perplexity": float(austen), "kjv_loss": bible.loss, "bytes": size,
            "tokens_per_second": self._speed(model) if speed else None, "sd": None, "seeds": 0, "steps": 0,
        }  # fmt: skip

    def _speed(self, model: nn.Module) -> float:
        """Tokens per second of greedy decoding, median of three after a warm-up."""
        runs = [generate(model, self.tokenizer, PROMPT, self.plan.new_tokens, temperature=0) for _ in range(4)]
        return median(run.tokens_per_second for run in runs[1:])

    def _parts(self, directory: Path) -> dict[str, int]:
        """Bytes on disk of the linear layers, and of everything else in the weight files."""
        stored = {name: header.tensors[name] for name, header in read_headers(shard_paths(directory)).items()}
        linear = sum(t.end - t.begin for name, t in stored.items() if "_proj." in name)
        return {"linear layers": linear, "embeddings, norms, headers": sum(p.stat().st_size for p in shard_paths(directory)) - linear}


def verdict(arms: list[dict], form: str) -> dict:
    """Gap between inheriting and the ceiling, and the share of it that CA-LoRA closes."""
    loss = {row["arm"]: row["loss"] for row in arms}
    spread = max((row["sd"] or 0.0) for row in arms)
    # Training on can overfit: the ceiling is the better of the dense model's two LoRAs, so that a gap is never flattered.
    ceiling = min(loss.get(ARMS["ceiling"], loss["dense + LoRA"]), loss["dense + LoRA"])
    inherited, ours = loss[f"{form} + LoRA, inherited"], loss[f"{form} {ARMS['i-rc-d']}"]
    gap = inherited - ceiling
    worth = gap >= WORTH_RECOVERING and gap >= 3 * spread
    return {
        "format": form, "ceiling": ceiling, "inherited": inherited, "ca_lora": ours, "gap": gap,
        "closed": (inherited - ours) / gap if worth else None,
        "says": f"CA-LoRA closes {100 * (inherited - ours) / gap:.0f} % of the gap of {gap:.4f} nats" if worth
        else f"nothing to recover: the gap is {gap:.4f} nats; CA-LoRA - inherited = {ours - inherited:+.4f}",
    }  # fmt: skip
