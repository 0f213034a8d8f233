"""The prunings of a run and the training between them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adaptation import Distill, Settings
from ..adaptation.loop import DataOrder, derived_seed, train
from ..adaptation.mode import train_mode
from ..adaptation.objective import Objective, Targets
from ..adaptation.run import checkpointed
from ..adaptation.teacher import LiveTeacher
from ..compression import rates
from ..compression.calibrate import Gram
from ..errors import CaloraError
from ..io.batches import Batch, Sample, collate
from ..policy import features
from ..progress import progress
from ..recipe import Recipe
from . import reconstruction, state
from .head import Head
from .masked import MaskedLinear, as_dense
from .prune import prune_layers
from .schedule import check, rank_at, sparsity_at, steps_at
from .start import Start

INITS = ("zero", "residual")
PROBES = 8  # micro-batches whose gradient chooses the weights of the sparse branch
SCALE = 2.0  # of an adapter, whatever its rank; published: alpha 16 where the rank is 8
RANKS = ("error", "uniform")


@dataclass(frozen=True)
class Plan:
    """How a model is pruned and trained; fields as in ``sparse_adapt``, recipe resolved. Raises CaloraError for what has no meaning."""

    recipe: Recipe
    prunings: int
    schedule: str
    rank: int
    rank_growth: float
    ranks: str
    revive: bool
    on_grid: bool
    init: str
    sparse_branch: float

    def __post_init__(self) -> None:
        check(self.prunings, self.schedule, self.rank, self.rank_growth)
        if self.ranks not in RANKS:
            raise CaloraError(f"unknown ranks {self.ranks!r}; choose one of {', '.join(RANKS)}")
        if self.init not in INITS:
            raise CaloraError(f"unknown init {self.init!r}; choose one of {', '.join(INITS)}")
        share = self.sparse_branch
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise CaloraError(f"sparse_branch must be a share of the kept weights, from 0 to 1, got {share!r}")
        if self.revive and self.recipe.pruner != "sparsegpt":
            raise CaloraError(f"revive=True has no meaning for pruner={self.recipe.pruner!r}, under which a pruned weight stays 0; leave it out")

    def check_sizes(self, model: nn.Module, names: list[str]) -> None:
        """Raises CaloraError where a layer is smaller than the rank."""
        most = round(self.rank_at(self.prunings))
        for name in names:
            if (size := min(features(model.get_submodule(name)))) < most:
                raise CaloraError(f"rank {most} is above the size of {name}, which is {size}; ask for a smaller rank or less growth")

    def rank_at(self, pruning: int) -> float:
        return rank_at(self.rank, self.rank_growth, pruning, self.prunings)

    def recipe_at(self, pruning: int) -> Recipe:
        """The recipe with the sparsity of a pruning, a user's rates in proportion."""
        sparsity = sparsity_at(self.recipe.sparsity, pruning, self.prunings, self.schedule)
        table = self.recipe.rates
        if isinstance(table, dict) and self.recipe.sparsity:
            table = {name: rate * sparsity / self.recipe.sparsity for name, rate in table.items()}
        return replace(self.recipe, sparsity=sparsity, rates=table)

    def to_dict(self) -> dict:
        return {**asdict(self), "recipe": self.recipe.to_dict()}


@dataclass
class Run:
    """A model on its way. layers: the MaskedLinears in it, by name; blocks: {block: its layers}; batches: token ids to prune with. head: what
    trains beside the layers.

    phases, history: what was done so far, as in ``SparseAdaptResult``. seconds, tokens: of the training in this process.
    """

    model: nn.Module
    layers: dict[str, MaskedLinear]
    blocks: dict[str, list[str]]
    batches: list[Tensor]
    plan: Plan
    settings: Settings
    task: str
    distill: Distill | None
    pad_id: int
    facts: dict
    head: Head | None = None

    def __post_init__(self) -> None:
        self.phases: list[dict] = []
        self.history: list[dict] = []
        self.seconds, self.tokens, self.resumed_at = 0.0, 0, 0
        self.saving = bool(self.settings.output_dir and self.settings.save_steps)
        if self.settings.resume_from_checkpoint not in (None, False, True, "true", "True"):
            raise CaloraError("sparse_adapt goes on in output_dir; give resume_from_checkpoint=True instead of a path")

    def train(self, samples: list[Sample]) -> None:
        """Every pruning and every step, from wherever an earlier run was interrupted."""
        resuming = self.settings.resume_from_checkpoint and self.settings.output_dir
        resumed = state.restore(Path(self.settings.output_dir), self.facts, self.layers, self.head_parameters) if resuming else None
        if resumed:
            self.phases, self.history = resumed
        first = max(1, len(self.phases))
        for pruning in range(first, self.plan.prunings + 1):
            if pruning > len(self.phases):
                try:
                    self._prune(pruning, samples)
                except CaloraError as error:
                    trained = f", after training at learning_rate {self.settings.learning_rate:g}" if self.history else ""
                    raise CaloraError(f"pruning {pruning} of {self.plan.prunings}{trained}: {error}") from None
            self._adapt(self.phases[-1])
            with checkpointed(self.model, self.settings):
                began_at = self._steps(self.phases[-1], samples, bool(resumed) and pruning == first)
            if resumed and pruning == first:
                self.resumed_at = began_at

    def _prune(self, pruning: int, samples: list[Sample]) -> None:
        """Fold the adapters in, choose the masks anew, the ranks to come and what adapters begin with; saved, where checkpoints are."""
        for layer in self.layers.values():
            layer.fold()
        recipe, plan = self.plan.recipe_at(pruning), self.plan
        measured = not isinstance(recipe.rates, dict) and rates.RULES[recipe.rates].measure is not None
        total = (1 + measured) * len(self.blocks) + len(self.batches)
        with progress(None, f"pruning {pruning}/{plan.prunings}", "pass", total) as bar:
            zeros = {} if plan.revive else {name: int((~layer.mask).sum()) for name, layer in self.layers.items()}
            formats = dict.fromkeys(self.layers, plan.recipe.format())
            targets = rates.targets(self.model, formats, recipe, self.batches, zeros, lambda: bar.update())
            starts: dict[str, Start] = {}
            generator = torch.Generator().manual_seed(derived_seed(self.settings.seed, "start", pruning))
            caps = {name: self._cap(names) for names in self.blocks.values() for name in names}

            def lost(name: str, weight: Tensor, inputs: Gram) -> None:
                starts[name] = Start(weight, self.layers[name].mask, inputs, caps[name], generator)

            residual = lost if plan.init == "residual" else None
            prune_layers(self.model, self.layers, self.blocks, self.batches, recipe.pruner, targets, plan.revive, lambda: bar.update(), residual)
            errors = reconstruction.errors(self.model, self.layers, list(self.blocks), self.batches, lambda: bar.update())
        mean = plan.rank_at(pruning)
        scores = errors if plan.ranks == "error" else torch.ones_like(errors)
        ranks = reconstruction.ranks(scores, mean, torch.tensor([self._cap(names) for names in self.blocks.values()]))
        self.phases.append(self._row(pruning, errors.tolist(), ranks, steps_at(self.settings.steps(len(samples)), pruning, plan.prunings)))
        self._prepare(self.phases[-1], starts, samples)
        if self.saving:
            state.save(Path(self.settings.output_dir), pruning, self.facts, self.phases, self.history, self.layers, self.head_parameters)

    def _prepare(self, phase: dict, starts: dict[str, Start], samples: list[Sample]) -> None:
        """What the adapters of a phase begin with, where the plan asks for more than fresh ones."""
        inside = {name: phase["ranks"][block] for block, names in self.blocks.items() for name in names}
        branches = self._chosen(phase, samples) if self.plan.sparse_branch else {}
        for name, start in starts.items():
            down, up = start.factors(inside[name], SCALE)
            self.layers[name].prepared = {"down": down, "up": up}
        for name, at in branches.items():
            self.layers[name].prepared["at"] = at

    def _chosen(self, phase: dict, samples: list[Sample]) -> dict[str, Tensor]:
        """The kept weights that train one by one: those with the largest gradient on the data that comes next, as in RoSA. For it all
        kept weights are a branch once."""
        size = self.settings.per_device_train_batch_size
        order = DataOrder(len(samples), self._data_seed())
        first = self.settings.samples_per_step * sum(row["steps"] for row in self.phases[:-1])
        objective = Objective(self.task, None)
        for layer in self.layers.values():
            layer.prepared = {"at": layer.mask.flatten().nonzero().flatten()}
            layer.adapt(1, SCALE, torch.Generator().manual_seed(0))  # U is 0: it changes nothing
        with checkpointed(self.model, self.settings), train_mode(self.model, self.distill is not None), torch.random.fork_rng():
            torch.manual_seed(derived_seed(self.settings.seed, "probe", phase["pruning"]))
            for begin in range(first, first + PROBES * size, size):
                batch = collate([samples[order[i]] for i in range(begin, begin + size)], self.pad_id)
                with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bf16):
                    loss = objective.loss(self.model, batch, None, objective.counts([batch]))["task"]
                loss.backward()
        for p in self.head_parameters.values():
            p.grad = None
        chosen = {}
        for name, layer in self.layers.items():
            count = round(self.plan.sparse_branch * len(layer.at))
            chosen[name] = layer.at[layer.branch.grad.abs().topk(count).indices.sort().values] if layer.branch.grad is not None else layer.at[:0]
            layer.fold()
        return chosen

    @property
    def head_parameters(self) -> dict[str, nn.Parameter]:
        return {} if self.head is None else self.head.parameters

    def _data_seed(self) -> int:
        return self.settings.seed if self.settings.data_seed is None else self.settings.data_seed

    def _cap(self, names: list[str]) -> int:
        """The largest rank of a block."""
        return min(reconstruction.LARGEST * self.plan.rank, *(min(self.layers[name].base.shape) for name in names))

    def _row(self, pruning: int, errors: list[float], ranks: list[int], steps: int) -> dict:
        pruned = {name: int((~layer.mask).sum()) for name, layer in self.layers.items()}
        sizes = {name: layer.mask.numel() for name, layer in self.layers.items()}
        rate = lambda names: sum(pruned[n] for n in names) / sum(sizes[n] for n in names)  # noqa: E731
        return {
            "pruning": pruning, "pruned": sum(pruned.values()), "weights": sum(sizes.values()), "sparsity": rate(self.layers),
            "rates": {block: rate(names) for block, names in self.blocks.items()},
            "errors": dict(zip(self.blocks, errors, strict=True)), "ranks": dict(zip(self.blocks, ranks, strict=True)),
            "mean_rank": sum(ranks) / len(ranks), "steps": steps,
        }  # fmt: skip

    def _adapt(self, phase: dict) -> None:
        """Fresh adapters, which change nothing: whatever the rank was before, it is in the weights. Where the run is on the grid,
        which is chosen here, rounding changes them."""
        generator = torch.Generator().manual_seed(derived_seed(self.settings.seed, "initial", phase["pruning"]))
        inside = {name: phase["ranks"][block] for block, names in self.blocks.items() for name in names}
        for name, layer in self.layers.items():
            if self.plan.on_grid:
                layer.round_to(self.plan.recipe.format())
            layer.adapt(inside.get(name, round(phase["mean_rank"])), SCALE, generator)

    def _steps(self, phase: dict, samples: list[Sample], resume: bool) -> int:
        """The optimiser steps after a pruning; optimiser and learning rate start anew, the data go on. Returns the steps, of all
        phases, that an earlier run had done."""
        pruning = phase["pruning"]
        before = sum(row["steps"] for row in self.phases[:-1])
        settings = self.settings
        own = replace(
            settings, max_steps=phase["steps"], seed=derived_seed(settings.seed, "pruning", pruning),
            data_seed=self._data_seed(),
            output_dir=str(state.directory_of(Path(settings.output_dir), pruning)) if settings.output_dir else None,
            resume_from_checkpoint=resume or None,
        )  # fmt: skip
        parameters = {f"{name}.{key}": p for name, layer in self.layers.items() for key, p in layer.named_parameters(recurse=False) if key != "bias"}
        parameters |= {f"head.{key}": p for key, p in self.head_parameters.items()}
        teacher = None if self.distill is None else _DenseTeacher(self)
        with train_mode(self.model, self.distill is not None):
            done = train(
                self.model, parameters, samples, Objective(self.task, self.distill), teacher, own, self.pad_id, self.facts,
                skip=before * settings.samples_per_step, title=f"adapt {pruning}/{self.plan.prunings}",
            )  # fmt: skip
        self.seconds, self.tokens = self.seconds + done.seconds, self.tokens + done.tokens
        self.history = self.history[:before] + [{**row, "step": before + row["step"], "pruning": pruning} for row in done.history]
        return before + done.resumed_at


class _DenseTeacher:
    """The model as it came, for the time of a forward pass."""

    def __init__(self, run: Run) -> None:
        self.layers, self.head, self.live = run.layers, run.head, LiveTeacher(run.model, run.task, run.distill)

    def targets(self, samples: list[Sample], batch: Batch) -> Targets:
        with as_dense(self.layers.values()), nullcontext() if self.head is None else self.head.as_it_came():
            return self.live.targets(samples, batch)
