"""``calora sparse-adapt``: prune a dense model and train it under the masks (LoSA); the result is sparse and has no adapter."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..io.outputs import output_directory
from ..tables import table
from . import recipe as options
from .adapt import distillation
from .common import (
    Data,
    Json,
    LabelColumn,
    MaxLength,
    Model,
    Output,
    Overwrite,
    PairColumn,
    Task,
    TextColumn,
    emit,
    write_text,
)


def register(app: typer.Typer) -> None:
    app.command()(sparse_adapt)


def sparse_adapt(
    model: Model,
    data: Data,
    output: Output,
    sparsity: Annotated[str, typer.Option(help="2:4 (keep 2 of 4), or the share of the linear layers' weights to remove.")] = "0.7",
    weights: options.Weights = "bf16",
    group_size: options.GroupSize = None,
    rounding: options.Rounding = None,
    pruner: Annotated[str, typer.Option(help="What chooses them: magnitude, wanda or sparsegpt.")] = "sparsegpt",
    rates: Annotated[
        str | None, typer.Option(help="How a share is spread over the layers: uniform, arithmetic, rmi, owl, or FILE.json with {layer: share}.  [default: rmi, n:m uniform]")
    ] = None,
    prunings: Annotated[int | None, typer.Option(help="How many times it is pruned, a little more each time.  [default: 5, up to one half and n:m once]")] = None,
    schedule: Annotated[str, typer.Option(help="How the sparsity grows: cubic or linear.")] = "cubic",
    rank: Annotated[int, typer.Option(help="Mean rank of the adapters that are trained and folded in.")] = 8,
    rank_growth: Annotated[float, typer.Option(help="By how much the mean rank rises at each pruning.")] = 1.0,
    ranks: Annotated[str, typer.Option(help="How ranks are spread over the blocks: error (of a block's output) or uniform.")] = "error",
    revive: Annotated[bool, typer.Option("--revive", help="SparseGPT may bring pruned weights back.")] = False,
    on_grid: Annotated[bool, typer.Option("--on-grid", help="Train with rounded weights, so that packing changes nothing.")] = False,
    init: Annotated[
        str | None, typer.Option(help="How adapters start: zero, or residual (from what the pruning took).  [default: residual with sparsegpt, else zero]")
    ] = None,
    sparse_branch: Annotated[float, typer.Option(help="Share of the kept weights that also train one by one.")] = 0.0,
    distill: Annotated[str, typer.Option(help="What to learn from the model as it came: hidden, logits, hidden,logits or none.")] = "none",
    calibration: Annotated[Path | None, typer.Option(metavar="FILE", help="Text to prune with.  [default: 65,536 tokens of the data]")] = None,
    activations: options.Activations = "int8",
    lm_head: options.LmHead = "int8",
    embeddings: options.Embeddings = "none",
    skip: options.Skip = None,
    task: Task = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps in all.  [default: one pass over the data]")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.  [default: 1e-3]")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples per step.  [default: 8]")] = None,
    max_length: MaxLength = None,
    seed: Annotated[int | None, typer.Option(help="Of every random draw.  [default: 42]")] = None,
    eval_data: Annotated[Path | None, typer.Option(metavar="FILE", help="Held-out data, measured dense, trained and packed.")] = None,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run of the same command stopped.")] = False,
    overwrite: Overwrite = False,
    json_file: Json = None,
) -> None:
    """Prune a dense model and train it under its masks (LoSA): a sparse model without adapter, in a new directory."""
    from ..losa import default_rates

    chosen = options.build(
        weights=weights, group_size=group_size, rounding=rounding, sparsity=sparsity, pruner=pruner, activations=activations,
        rates=rates or default_rates(sparsity), lm_head=lm_head, embeddings=embeddings, skip=skip,
    )  # fmt: skip
    with output_directory(output, overwrite, keep=[p for p in (model, data, calibration, eval_data) if p]) as directory:
        from .. import sparse_adapt as train
        from ..adaptation import Settings
        from ..integrations import directories
        from ..io.data import read_records

        checkpoints = output.resolve().with_name(f"{output.resolve().name}.checkpoints")
        given = {"max_steps": steps, "learning_rate": lr, "per_device_train_batch_size": batch_size, "seed": seed}
        settings = dataclasses.replace(
            Settings(), **{name: value for name, value in given.items() if value is not None},
            output_dir=str(checkpoints), save_steps=0.25, save_total_limit=1, resume_from_checkpoint=resume or None,
        )  # fmt: skip
        texts = None if calibration is None else [r.text for r in read_records(calibration)]
        small, tokenizer = directories.open_model(model)
        result = train(
            small, data=data, tokenizer=tokenizer, recipe=chosen, prunings=prunings, schedule=schedule, rank=rank, rank_growth=rank_growth,
            ranks=ranks, revive=revive, on_grid=on_grid, init=init, sparse_branch=sparse_branch, distill=distillation(distill, 1.0), calibration=texts, task=task or "causal-lm", args=settings,
            eval_data=eval_data, max_length=max_length, text_column=text_column, pair_column=pair_column, label_column=label_column,
        )  # fmt: skip
        small.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        _write_card(directory, output.resolve().name, result)
    shutil.rmtree(checkpoints, ignore_errors=True)
    print(table(*result.phase_table()), end="\n\n")
    emit(("sparse-adapt", str(output)), result.rows(), result.to_dict(), json_file)


def _write_card(directory: Path, name: str, result) -> None:
    from ..card import model_card

    sizes = [(row, value) for row, value in result.rows() if row not in ("time", "peak memory")]
    write_text(directory / "README.md", model_card(name, result.recipe.to_dict(), sizes, table(*result.phase_table())))
