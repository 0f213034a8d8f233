"""``sparse_adapt``: prune a little, train a LoRA under the mask, fold it in, prune again; then pack what came of it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

from torch import Tensor, nn

from ..adaptation import Distill, Settings
from ..adaptation.loop import DataOrder
from ..adaptation.run import NOT_OF_THE_RUN, evaluate, peak_rss, samples_of, training_length
from ..adaptation.student import head_of
from ..adaptation.teacher import fingerprint, frozen
from ..adapters import list_adapters
from ..arguments import require_kind, require_model
from ..compression.apply import apply
from ..compression.calibrate import PIECE, find_blocks, token_batches
from ..compression.report import Outcome
from ..errors import CaloraError
from ..evaluate import pad_id_of
from ..integrations.models import declare
from ..io.batches import Sample, sample_key, task_name
from ..policy import Coverage, plan
from ..progress import progress
from ..recipe import Recipe
from .head import trained_head
from .masked import MaskedLinear
from .phases import Plan, Run
from .result import SparseAdaptResult

SPARSITY = 0.7  # of the published headline
AT_ONCE = 0.5  # up to which one pruning was better than five (benchmarks/NOTES.md)
CALIBRATION = 128 * PIECE  # tokens; published: 128 sequences


def sparse_adapt(
    model: nn.Module,
    *,
    data,
    tokenizer,
    sparsity: str | float | None = None,
    recipe: Recipe | None = None,
    prunings: int | None = None,
    schedule: str = "cubic",
    rank: int = 8,
    rank_growth: float = 1.0,
    ranks: str = "error",
    revive: bool = False,
    on_grid: bool = False,
    init: str | None = None,
    sparse_branch: float = 0.0,
    distill: Distill | None = None,
    calibration: Sequence | None = None,
    task: str = "causal-lm",
    args=None,
    eval_data=None,
    max_length: int | None = None,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
) -> SparseAdaptResult:
    """LoSA: prune a dense model and train it under the masks, in place; it becomes an ordinary sparse packed model without adapter.

    A classifier's head (``score``, ``classifier``) trains with the adapters, as it is: dense, in fp32 meanwhile.
    `prunings` times the adapters are folded into the weights (fp32), the masks are chosen anew on them, and fresh adapters are
    trained: y = x (mask * (W + 2 U D))^T. What they learn has the mask's zeros, so nothing of them is left at run time; the
    result saves, loads and carries adapters like any other compressed model. Until then a weight takes 5 bytes beside the dense one.

    sparsity: a share (default 0.7, the paper's headline) or a pattern such as "2:4". recipe: instead of it, everything about the
    result; by default bf16 weights, which round least, chosen by SparseGPT, with rates "rmi" (a pattern: uniform), as published.
    prunings: by default 5 for a share above one half, as published, else 1: up to one half, and for a pattern, more lost (benchmarks/NOTES.md). schedule: how the sparsity
    grows over them, "cubic" as published, or "linear".
    rank: 8, as published, the mean over blocks and prunings; rank_growth: by how much the mean rises at each (1). ranks: "error",
    in proportion to the error of each block's output and at most twice the rank, as published, or "uniform".
    revive: whether SparseGPT may bring back weights that an earlier pruning removed, as the released code does.
    on_grid: train with the weights rounded to what the recipe's format holds, the scales chosen at each pruning (``Rounding``): then
    packing changes nothing, bit for bit. Without it they are rounded once, after training.
    init: "zero", as published: a fresh adapter changes nothing; "residual": it begins with what the kept weights can bring back of what the
    pruning took (``Start``). By default "residual" with SparseGPT, whose statistics it needs, which was better (benchmarks/NOTES.md), else "zero". sparse_branch: a share of the kept weights, those with the largest gradient, that train one by one beside the adapter, as in RoSA.
    distill: also learn from the model as it came (``Distill``, its logits' weight 0 where it is None); None, as published: the task's loss alone.
    With it the dropout that the model itself has is off.
    calibration: texts or token ids for the pruning; default 128 x 512 tokens of the data.
    data, eval_data, tokenizer, task, args, max_length, *_column: as in ``adapt``; args.output_dir and save_steps keep checkpoints, from
    which resume_from_checkpoint=True goes on bit for bit. The steps after the last pruning are 60 % of all, as published.

    Raises CaloraError, leaving the model as it was, for input that does not fit together, and where training diverges.
    """
    began = time.monotonic()
    settings, task = Settings.of(args), task_name(task)
    require_model("model", model)
    require_kind("distill", distill, Distill)
    if settings.load_best_model_at_end:
        raise CaloraError("sparse_adapt keeps its last step, the one at the asked sparsity; leave load_best_model_at_end out")
    recipe = _recipe(sparsity, recipe, on_grid)
    prunings = default_prunings(recipe.sparsity) if prunings is None else prunings
    init = default_init(recipe.pruner) if init is None else init
    chosen = Plan(recipe, prunings, schedule, rank, rank_growth, ranks, revive, on_grid, init, sparse_branch)
    if resident := list_adapters(model):
        raise CaloraError(f"adapter {resident[0]!r} is loaded on the layers, which are replaced; delete_adapter it first")
    coverage = plan(model, recipe)
    names = [name for name, fmt in coverage.formats.items() if fmt.sparse]
    blocks = find_blocks(model, names)
    if not blocks:
        raise CaloraError("the model has no list of blocks with linear layers, which are pruned one after the other; LoSA needs one")
    chosen.check_sizes(model, names)
    columns = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    length = training_length(model, max_length)
    samples, said = samples_of(model, tokenizer, data, task, length, columns)
    held_out = None if eval_data is None else samples_of(model, tokenizer, eval_data, task, length, columns)[0]
    batches = token_batches(_sequences(samples, settings) if calibration is None else calibration, tokenizer, model.config)
    pad_id = pad_id_of(model, tokenizer)
    facts = _facts(model, samples, batches, settings, task, length, chosen, distill)
    distill = distill and distill.resolve(taught=False)
    dense = evaluate(model, held_out, task, pad_id, settings)
    with _restoring(model, coverage, task):
        with frozen(model), trained_head(model, task) as head:
            run = Run(model, _attach(model, names), blocks, batches, chosen, settings, task, distill, pad_id, facts, head)
            run.train(samples)
            merged = evaluate(model, held_out, task, pad_id, settings)
        outcome = _pack(model, coverage, recipe, run.layers, batches)
    declare(model, recipe, coverage)
    packed = evaluate(model, held_out, task, pad_id, settings)
    sizes = coverage.with_sizes(model)
    return SparseAdaptResult(
        recipe, task, said, length, run.phases, run.history, outcome, dense, merged, packed, sizes.dense_nbytes, sizes.nbytes,
        time.monotonic() - began, run.tokens / max(run.seconds, 1e-9), peak_rss(), run.resumed_at, facts,
    )  # fmt: skip


def _recipe(sparsity: str | float | None, recipe: Recipe | None, on_grid: bool) -> Recipe:
    """The recipe of the result, resolved. Raises CaloraError where it is not sparse, or where both are given."""
    if recipe is None:
        sparsity = SPARSITY if sparsity is None else sparsity
        recipe = Recipe(weights="bf16", sparsity=sparsity, rates=default_rates(sparsity))
    elif sparsity is not None:
        raise CaloraError("give sparsity or a recipe, which has one of its own, not both")
    if recipe.sparsity is None:
        raise CaloraError("the recipe keeps every weight; give it a sparsity such as 0.7 or '2:4'")
    if on_grid and recipe.rounding == "gptq":
        raise CaloraError('on_grid=True rounds to nearest while it trains, which leaves rounding="gptq" nothing to do; leave one of them out')
    nearest = on_grid or recipe.weights == "bf16"
    return replace(recipe, pruner=recipe.pruner or "sparsegpt", rounding=recipe.rounding or ("rtn" if nearest else "gptq"))


def default_prunings(sparsity: str | float) -> int:
    """A large share is approached little by little; up to one half, and for 2:4, steps spent before it are lost."""
    return 1 if ":" in str(sparsity) or float(sparsity) <= AT_ONCE else 5


def default_init(pruner: str) -> str:
    """What adapters begin with: measured with SparseGPT alone, which has the Gram matrices at hand."""
    return "residual" if pruner == "sparsegpt" else "zero"


def default_rates(sparsity: str | float) -> str:
    """What spreads a sparsity over the blocks: a pattern is the same everywhere."""
    return "uniform" if ":" in str(sparsity) else "rmi"


def _sequences(samples: list[Sample], settings: Settings) -> list[Tensor]:
    """Samples in the order of training, until there are as many tokens as the pruning looks at."""
    order = DataOrder(len(samples), settings.seed if settings.data_seed is None else settings.data_seed)
    chosen, tokens = [], 0
    for i in range(len(samples)):
        if tokens >= CALIBRATION:
            break
        chosen.append(samples[order[i]]["input_ids"])
        tokens += len(chosen[-1])
    return chosen


def _facts(model, samples, batches, settings, task, length, chosen, distill) -> dict:
    """What must be equal for a run to be continued; JSON."""
    of = lambda parts: hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()  # noqa: E731
    plain = {name: value for name, value in asdict(settings).items() if name not in NOT_OF_THE_RUN}
    return {
        "model": fingerprint(model), "data": of(sample_key(s).encode() for s in samples), "calibration": of(b.numpy().tobytes() for b in batches),
        "task": task, "max_length": length, "distill": repr(distill), **chosen.to_dict(), **plain,
    }  # fmt: skip


@contextmanager
def _restoring(model: nn.Module, coverage: Coverage, task: str) -> Iterator[None]:
    """Whatever goes wrong, every module that would be replaced is the dense one again, and a classifier's head as it came."""
    originals = {entry.name: model.get_submodule(entry.name) for entry in coverage.entries if entry.format is not None}
    modes = {module: module.training for module in model.modules()}
    head = model.get_submodule(head_of(model)) if task == "sequence-classification" else nn.Module()
    came = {key: t.clone() for key, t in head.state_dict().items()}
    try:
        yield
    except BaseException:
        head.load_state_dict(came)
        for name, module in originals.items():
            model.set_submodule(name, module)
        for module, mode in modes.items():
            module.training = mode
        raise


def _attach(model: nn.Module, names: list[str]) -> dict[str, MaskedLinear]:
    layers = {name: MaskedLinear(model.get_submodule(name)) for name in names}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def _pack(model: nn.Module, coverage: Coverage, recipe: Recipe, layers: dict[str, MaskedLinear], batches: list[Tensor]) -> Outcome:
    """Replace the trained layers, and what else the recipe compresses, by packed ones that keep exactly the masks."""
    for layer in layers.values():
        layer.fold()
    with progress(None, "Packing", "layer", len(coverage.formats)) as bar:
        kept = {name: layer.mask if layer.rounding is None else layer.rounding.quantized(layer.base) for name, layer in layers.items()}
        outcome = apply(model, coverage, recipe, kept, batches if recipe.rounding == "gptq" else None, lambda: bar.update())
    for name, layer in layers.items():
        model.get_submodule(name).compute_dtype = layer.dense.weight.dtype
    return outcome
