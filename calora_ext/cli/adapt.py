"""``calora adapt``: carry a LoRA over to a compressed model and recover what compression lost (CA-LoRA)."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CaloraError
from ..io.outputs import output_directory
from ..tables import format_bytes
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
    app.command()(adapt)


def adapt(
    model: Model,
    data: Data,
    output: Output,
    teacher: Annotated[Path | None, typer.Option(metavar="MODEL", help="The dense model, to distil from.")] = None,
    inherit: Annotated[Path | None, typer.Option(metavar="ADAPTER", help="The LoRA that was trained on the dense model.")] = None,
    init: Annotated[
        str | None, typer.Option(help="inherit starts from --inherit, random from a fresh LoRA.  [default: inherit where given]")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Rank of the LoRA; larger than an inherited one enlarges it; 0 trains recovery alone.  [default: inherited, or 16]")
    ] = None,
    recovery_rank: Annotated[int | None, typer.Option(min=1, help="Rank of the recovery modules.  [default: 32]")] = None,
    recovery_init: Annotated[
        str | None, typer.Option(help="How they start: zero, or residual (from what compression lost; needs --teacher).  [default: zero]")
    ] = None,
    recovery_dtype: Annotated[
        str | None, typer.Option(help="What they are saved in: float32, bfloat16, float16, or int8, a byte a parameter.  [default: float32]")
    ] = None,
    recovery: Annotated[bool, typer.Option(help="Train recovery modules beside the LoRA.")] = True,
    distill: Annotated[
        str | None, typer.Option(help="What to learn from the teacher: hidden, logits, hidden,logits or none.  [default: hidden, and logits of a teacher with --inherit]")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Published settings: t5-3b, llama-13b or llama-2-13b; other options win over it.")] = None,
    task: Task = None,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Optimiser steps; 0 with --recovery-init residual recovers without training.  [default: one pass over the data]")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.  [default: 1e-3]")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples per step.  [default: 8]")] = None,
    max_length: MaxLength = None,
    seed: Annotated[int | None, typer.Option(help="Of every random draw.  [default: 42]")] = None,
    eval_data: Annotated[Path | None, typer.Option(metavar="FILE", help="Held-out data, measured before and after.")] = None,
    keep_best: Annotated[
        bool, typer.Option("--keep-best", help="Keep the step with the lowest loss on --eval-data, the start included, instead of the last.")
    ] = False,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    cache_teacher: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the teacher's targets there: made once, then trained from without the teacher.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run of the same command stopped.")] = False,
    overwrite: Overwrite = False,
    json_file: Json = None,
) -> None:
    """Train an adapter on a compressed model: inherited LoRA, recovery modules, distillation from the dense model."""
    saved_in = _dtype(recovery_dtype, recovery)
    if keep_best and eval_data is None:
        raise CaloraError("--keep-best needs --eval-data, on which the best step is chosen")
    inputs = (model, data, teacher, inherit, eval_data, cache_teacher)
    with output_directory(output, overwrite, keep=[p for p in inputs if p]) as directory:
        from .. import adapt as train
        from .. import load, save_adapter
        from ..adaptation import cache_teacher as write_cache
        from ..integrations import directories

        checkpoints = output.resolve().with_name(f"{output.resolve().name}.checkpoints")
        arguments = _arguments(
            teacher is not None or cache_teacher is not None, inherit, init, lora_rank, recovery_rank, recovery_init, recovery, distill, preset
        )
        arguments["args"] = _settings(arguments.get("args"), steps, lr, batch_size, seed, keep_best, checkpoints, resume)
        arguments["task"] = task or arguments.get("task", "causal-lm")
        samples = {"data": data, "max_length": max_length, "text_column": text_column, "pair_column": pair_column, "label_column": label_column}
        distilled = arguments.get("distill", True) is not None
        if distilled and cache_teacher is not None and teacher is not None and not cache_teacher.exists():
            # Before the student is opened: the two are never in memory together, unless their weights are compared.
            known = {name: arguments[name] for name in ("inherit", "distill", "task") if name in arguments}
            write_cache(cache_teacher, load(teacher), tokenizer=directories.open_tokenizer(model), **samples, **known)
            teacher = teacher if recovery_init == "residual" else None
        student, tokenizer = directories.open_model(model)
        result = train(
            student, tokenizer=tokenizer, teacher=load(teacher) if teacher else None, teacher_cache=cache_teacher,
            eval_data=eval_data, adapter_name=directories.ADAPTER, **samples, **arguments,
        )  # fmt: skip
        save_adapter(student, directories.ADAPTER, directory, recovery_dtype=saved_in)
        tokenizer.save_pretrained(directory)
        if student.can_generate():
            student.generation_config.save_pretrained(directory)
        _write_card(directory, output.resolve().name, result)
    shutil.rmtree(checkpoints, ignore_errors=True)
    emit(("adapt", result.arm), _rows(result), result.to_dict(), json_file)


def _arguments(distilled, inherit, init, lora_rank, recovery_rank, recovery_init, recovery, distill, preset) -> dict:
    """Keyword arguments of ``cx.adapt`` that say what is trained and against what."""
    from ..adaptation import TAUGHT_LOGITS, Lora, Recovery
    from ..adaptation import preset as published

    if init not in (None, "inherit", "random"):
        raise CaloraError(f"--init is inherit or random, got {init!r}")
    if init == "inherit" and inherit is None:
        raise CaloraError("--init inherit needs --inherit with the LoRA of the dense model")
    arguments = published(preset) if preset else {}
    arguments["inherit"] = None if init == "random" else inherit
    if lora_rank is not None:
        arguments["lora"] = dataclasses.replace(arguments.get("lora", Lora()), rank=lora_rank) if lora_rank else False
    elif inherit is not None and init != "random":
        arguments["lora"] = None
    if not recovery:
        arguments["recovery"] = None
    elif changes := {name: value for name, value in (("rank", recovery_rank), ("init", recovery_init)) if value is not None}:
        arguments["recovery"] = dataclasses.replace(arguments.get("recovery", Recovery()), **changes)
    if distill == "none" or (distill is None and not distilled):
        arguments["distill"] = None
    elif distill is not None:
        arguments["distill"] = distillation(distill, TAUGHT_LOGITS)
    return arguments


def _dtype(name: str | None, recovery: bool):
    """What the recovery half is saved in, refused before the training rather than after it."""
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
    if name is not None and not recovery:
        raise CaloraError("--recovery-dtype has no meaning with --no-recovery; leave one of them out")
    if name is not None and name not in dtypes:
        raise CaloraError(f"--recovery-dtype is one of {', '.join(dtypes)}, got {name!r}")
    return dtypes.get(name)


def distillation(text: str, logits: float):
    """``Distill`` from "hidden", "logits", both with a comma, or "none". logits: the weight of theirs."""
    from ..adaptation import Distill

    wanted = {part.strip() for part in text.split(",")}
    if wanted == {"none"}:
        return None
    if wanted - {"hidden", "logits"}:
        raise CaloraError(f"--distill is hidden, logits, hidden,logits or none, got {text!r}")
    return Distill(hidden={-1: 0.05} if "hidden" in wanted else {}, logits=logits if "logits" in wanted else 0.0)


def _settings(base, steps, lr, batch_size, seed, keep_best: bool, checkpoints: Path, resume: bool):
    """The optimiser's settings: a preset's or the defaults, with what was given on the command line."""
    from ..adaptation import Settings

    given = {"max_steps": steps, "learning_rate": lr, "per_device_train_batch_size": batch_size, "seed": seed}
    return dataclasses.replace(
        base or Settings(), **{name: value for name, value in given.items() if value is not None},
        load_best_model_at_end=keep_best, output_dir=str(checkpoints), save_steps=0.1, save_total_limit=1, resume_from_checkpoint=resume or None,
    )  # fmt: skip


def _rows(result) -> list[tuple]:
    rows: list[tuple] = [("data", result.data), ("steps", result.steps)]
    if result.history:
        rows.append(("training loss", f"{result.history[0]['loss']:.4f} -> {result.history[-1]['loss']:.4f}"))
    if result.kept_step is not None:
        rows.append(("kept", f"step {result.kept_step}"))
    for name in result.eval_after or ():
        rows.append((f"held-out {name}", f"{result.eval_before[name]:.4f} -> {result.eval_after[name]:.4f}"))
    rows += [(f"{kind} parameters", f"{count:,}") for kind, count in result.parameters.items() if count]
    rows += [("size", format_bytes(result.adapter_bytes)), ("tokens per second", f"{result.tokens_per_second:,.0f}")]
    return [*rows, ("seconds", f"{result.seconds:.1f}"), ("peak memory", format_bytes(result.peak_rss_bytes))]


def _write_card(directory: Path, name: str, result) -> None:
    from ..card import adapter_card

    settings = {"arm": result.arm, "task": result.task, "data": result.data, "steps": result.steps, "max_length": result.max_length}
    write_text(directory / "README.md", adapter_card(name, settings, [(n, str(v)) for n, v in _rows(result)]))
