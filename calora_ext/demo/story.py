"""What the demo does and measures. What is not trained here and now comes from the packaged results and is marked so."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from .. import bench
from ..adaptation import Lora, Recovery, Settings, adapt
from ..adapters import delete_adapter, disable_adapters, load_adapter, save_adapter, set_adapter
from ..errors import CaloraError
from ..evaluate import perplexity
from ..integrations.directories import open_tokenizer, quiet_loading
from ..integrations.generation import generate
from ..integrations.models import compress, load, set_activations
from ..io.batches import token_stream
from ..io.checkpoint import read_headers, shard_paths
from ..io.data import read_records
from ..peers import aten
from ..recipe import Recipe
from .plan import ARMS, DENSE, FORMATS, TASK_TITLES, TASKS, Plan, file_name
from .results import LEARNING_RATE, Row, Rows, packaged

ASSETS = Path(__file__).parent / "assets"
WINDOW = 256  # tokens, the model's context
LAYER = (2048, 5632)  # in and out of a 1B Llama's MLP: the demo's own layers are too small to time
LORA_RANK = 16  # of the adapters that came with the model

Say = Callable[[str], None]


def tell(plan: Plan, out: Path, say: Say = print, assets: Path = ASSETS) -> dict:
    """Do everything in ``plan``; models and adapters are saved under ``out``. Returns the results as JSON values."""
    if not (assets / "base" / "config.json").is_file():
        raise CaloraError(f"{assets} holds no demo model; install calora_ext again, its package data is missing")
    with quiet_loading():
        return _Story(plan, out, say, assets).tell()


def branches(arm: str, inherit: Path, rank: int, dense: Callable[[], nn.Module], sites: str = "all") -> dict:
    """Keyword arguments of ``adapt`` for an arm by its published shorthand. inherit: the LoRA of that rank that came with the dense
    model, which ``dense`` loads where it is needed. sites: of the recovery modules, and of the larger LoRA."""
    parts = arm.split("-")
    recovery = Recovery(sites=sites, init="residual")
    options: dict = {"inherit": None if "rd" in parts else inherit, "recovery": None, "distill": None}
    if "rd" in parts:
        options["lora"] = Lora(rank=rank)
    if "big" in parts:  # no fewer parameters than CA-LoRA trains
        options["lora"] = Lora(rank=rank + recovery.rank, targets=sites)
    if "rc" in parts:
        options["recovery"] = recovery
    if "d" in parts:
        del options["distill"]
    if {"rc", "d"} & set(parts):
        options["teacher"] = dense()
    return options


class _Story:
    def __init__(self, plan: Plan, out: Path, say: Say, assets: Path) -> None:
        self.plan, self.out, self.say, self.assets = plan, out, say, assets
        self.tokenizer = open_tokenizer(assets / "base")
        self.test = {task: self._text(task, "test") for task in TASKS}
        self.packaged = Rows(packaged(assets))
        self.rows: list[Row] = []
        self.curves: dict[str, list[float]] = {}
        self.began = time.monotonic()

    def tell(self) -> dict:
        self.say("A 2.6M-parameter Llama, trained on Python sources, and two LoRA adapters that came with it:")
        self.say("; ".join(f"{task} for {title}" for task, title in TASK_TITLES.items()) + ". Losses are on files that neither has seen.\n")
        sizes, errors, same = self._compress()
        activations = self._untrained()
        self._train()
        rows = Rows([*self.rows, *self.packaged])
        samples = self._samples()
        self.say("\nTiming one layer of a 1B model: our int4 beside torch, without and with a LoRA of rank 16 ...")
        kernels = self._kernels()
        verdicts = [rows.verdict(task, form) for task in TASKS for form in self.plan.formats]
        return {
            "plan": {**vars(self.plan), "window": WINDOW},
            "sizes": sizes, "errors": errors, "round_trip_bit_exact": same, "activations": activations,
            "rows": [row.to_dict() for row in rows], "verdicts": [v for v in verdicts if v], "curves": self.curves,
            "samples": samples, "kernels": kernels, "seconds": time.monotonic() - self.began,
        }  # fmt: skip

    # -- the chapters -------------------------------------------------------------------------------------------------

    def _compress(self) -> tuple[dict, dict, bool]:
        """Compress, save, load again: bytes on disk, error of each layer, and whether the round trip was exact."""
        sizes = {DENSE: self._parts(self._model(DENSE))}
        errors, same = {}, True
        probe = self.test["cpp"][None, :64]
        calibration = [self._text(task, "train") for task in TASKS]
        for name in self.plan.formats:
            model = load(self._model(DENSE))
            recipe = Recipe(**FORMATS[name])
            errors[name] = compress(model, recipe, None if recipe.sparsity is None else calibration).errors
            model.save_pretrained(self._model(name))
            self.tokenizer.save_pretrained(self._model(name))
            with torch.inference_mode():
                same &= torch.equal(model(probe).logits, load(self._model(name))(probe).logits)
            sizes[name] = self._parts(self._model(name))
            self.say(f"Compressed to {name:16} {sum(sizes[DENSE].values()):,} -> {sum(sizes[name].values()):,} bytes on disk")
        self.say(f"Saved and loaded again: logits {'bit-identical' if same else 'DIFFER'}\n")
        return sizes, errors, same

    def _untrained(self) -> dict:
        """Every model alone and with each LoRA as it came; what INT8 activations cost the last format."""
        activations = {}
        for form in (DENSE, *self.plan.formats):
            model = self._load(form)
            losses = {task: self._loss(model, task) for task in TASKS}
            speed = self._speed(model, next(iter(TASKS)))  # the same for every text
            for task, loss in losses.items():
                self._add(Row(task, form, "none", (loss,), self._bytes(form), tokens_per_second=speed))
            if form == self.plan.formats[-1]:
                set_activations(model, "exact")
                activations = {"format": form, "int8": losses, "exact": {task: self._loss(model, task) for task in TASKS}}
                set_activations(model, "int8")
            speed = None  # the same for every adapter of this rank
            for task in TASKS:
                load_adapter(model, self._lora(task), task)
                set_adapter(model, task)
                speed = speed or self._speed(model, task)
                self._add(Row(task, form, "inherited", (self._loss(model, task),), self._bytes(form, self._lora(task)), tokens_per_second=speed))
                delete_adapter(model, task)
        return activations

    def _train(self) -> None:
        """The trained arms of the plan, and the ceilings they are compared with."""
        self.say(f"\nTraining each arm for {self.plan.steps} steps of {self.plan.batch_size} x {WINDOW} tokens ...")
        for task in dict.fromkeys(task for task, _ in self.plan.trained):
            self._arm(task, DENSE, "i")
        for task, form in self.plan.trained:
            for arm in self.plan.arms:
                self._arm(task, form, arm)

    def _arm(self, task: str, form: str, arm: str) -> None:
        """One arm over its seeds, each with the learning rate that is best for the first of them on the validation text."""
        first, *others = self.plan.seeds
        rates = self.plan.learning_rates or (self._packaged_rate(task, form, arm),)
        tried = {rate: self._run(task, form, arm, first, rate, judge=len(rates) > 1) for rate in rates}
        rate = min(tried, key=lambda r: tried[r]["valid"])
        runs = [tried[rate], *(self._run(task, form, arm, seed, rate) for seed in others)]
        self.curves[f"{task}: {form} + {ARMS[arm]}"] = runs[0]["curve"]
        size, count = runs[0]["bytes"], runs[0]["parameters"]
        self._add(Row(task, form, arm, tuple(r["loss"] for r in runs), size, self.plan.steps, rate, count, runs[0]["speed"]))

    def _run(self, task: str, form: str, arm: str, seed: int, rate: float, judge: bool = False) -> dict:
        model = self._load(form)
        settings = Settings(
            max_steps=self.plan.steps, per_device_train_batch_size=self.plan.batch_size, learning_rate=rate, seed=seed
        )
        result = adapt(
            model, data=self._file(task, "train"), tokenizer=self.tokenizer, max_length=WINDOW, args=settings, adapter_name=task,
            **branches(arm, self._lora(task), LORA_RANK, lambda: self._load(DENSE), self._sites(form)),
        )  # fmt: skip
        saved = self.out / "adapters" / file_name(task, form, arm, "seed", str(seed))
        save_adapter(model, task, saved)
        return {
            "loss": self._loss(model, task), "valid": self._loss(model, task, self._text(task, "valid")) if judge else 0.0,
            "curve": [step["task"] for step in result.history], "parameters": sum(result.parameters.values()),
            "bytes": self._bytes(form, saved), "speed": self._speed(model, task),
        }  # fmt: skip

    def _sites(self, form: str) -> str:
        """Where recovery goes: to the layers from which compression took something, the output head as well where it is INT4."""
        return ".*(_proj|lm_head)" if FORMATS.get(form, {}).get("embeddings") else "all"

    def _packaged_rate(self, task: str, form: str, arm: str) -> float:
        row = self.packaged.get(task, form, arm)
        return row.learning_rate if row else LEARNING_RATE

    def _samples(self) -> list[dict]:
        """Text of the smallest model without an adapter and with each, switched on the resident model."""
        form = self.plan.formats[-1]
        model = self._load(form)
        for task in TASKS:
            trained = sorted((self.out / "adapters").glob(file_name(task, form, "i-rc-d") + "-*"))
            load_adapter(model, trained[0] if trained else self._lora(task), task)
        samples = []
        for adapter, prompt in ((None, TASKS["docs"]), *TASKS.items()):
            disable_adapters(model) if adapter is None else set_adapter(model, adapter)
            made = generate(model, self.tokenizer, prompt, 48, temperature=0.6, top_p=0.9, seed=0)
            samples.append({"adapter": adapter, "model": form, "prompt": prompt, "text": made.text})
            self.say(f"\n[{form}, {f'adapter {adapter}' if adapter else 'no adapter'}] {prompt}{made.text}")
        return samples

    def _kernels(self) -> list[dict]:
        recipes = [Recipe(weights="int4", group_size=128), Recipe(weights="int4", sparsity="2:4"), Recipe(weights="int4", sparsity=0.7)]
        others = {name: build for name, build in aten.peers(*LAYER).items() if name != "torch dynamic int8"}
        rows = bench.compare(*LAYER, rows=1, rank=16, recipes=recipes, others=others, seconds=self.plan.bench_seconds)
        return [row.to_dict() for row in rows]

    # -- measuring ----------------------------------------------------------------------------------------------------

    def _load(self, form: str) -> nn.Module:
        """A model in fp32 arithmetic, so that arms differ by what was compressed and by nothing else."""
        return load(self._model(form), dtype=torch.float32).eval()

    def _model(self, form: str) -> Path:
        return self.assets / "base" if form == DENSE else self.out / "models" / file_name(form)

    def _lora(self, task: str) -> Path:
        return self.assets / f"lora-{task}"

    def _file(self, task: str, split: str) -> Path:
        return self.assets / "text" / f"{task}-{split}.jsonl.gz"

    def _text(self, task: str, split: str) -> Tensor:
        """``plan.windows`` windows of token ids, spread evenly over a split: (tokens,)."""
        ids = token_stream([record.text for record in read_records(self._file(task, split))], self.tokenizer)
        windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
        count = min(self.plan.windows, len(windows))
        return windows[torch.arange(count) * len(windows) // count].flatten()

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        seeds = f" ± {row.sd:.4f} ({len(row.losses)} seeds)" if len(row.losses) > 1 else ""
        self.say(f"{row.task:5} {row.format:16} {ARMS[row.arm]:24} loss {row.loss:.4f}{seeds}")

    def _loss(self, model: nn.Module, task: str, ids: Tensor | None = None) -> float:
        return perplexity(model, self.tokenizer, self.test[task] if ids is None else ids, WINDOW).loss

    def _bytes(self, form: str, *adapters: Path) -> int:
        return sum(f.stat().st_size for path in (self._model(form), *adapters) for f in path.glob("*.safetensors"))

    def _speed(self, model: nn.Module, task: str) -> float:
        """Tokens per second of greedy decoding, median of three after a warm-up."""
        runs = [generate(model, self.tokenizer, TASKS[task], self.plan.new_tokens, temperature=0) for _ in range(4)]
        return median(run.tokens_per_second for run in runs[1:])

    def _parts(self, directory: Path) -> dict[str, int]:
        """Bytes on disk of the linear layers, and of everything else in the weight files."""
        stored = {name: header.tensors[name] for name, header in read_headers(shard_paths(directory)).items()}
        linear = sum(t.end - t.begin for name, t in stored.items() if "_proj." in name)
        return {"linear layers": linear, "embeddings, norms, headers": sum(p.stat().st_size for p in shard_paths(directory)) - linear}
