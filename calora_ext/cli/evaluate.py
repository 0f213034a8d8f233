"""``calora eval``: how good a model is on a file, and how far it is from the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import CaloraError
from .common import Adapter, Data, Json, LabelColumn, MaxLength, Model, PairColumn, Task, TextColumn, emit


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    model: Model,
    data: Data,
    adapter: Adapter = None,
    task: Task = None,
    against: Annotated[
        Path | None, typer.Option(metavar="DENSE", help="Also measure KL and top-1 agreement with this model, on the same text.")
    ] = None,
    max_length: MaxLength = None,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    json_file: Json = None,
) -> None:
    """Perplexity of a language model or accuracy of a classifier; with --against, the distance from the dense model."""
    from ..evaluate import divergence
    from ..integrations import directories
    from ..io.batches import task_name
    from ..io.data import read_records

    task = task_name(task or "causal-lm")
    if against is not None and task != "causal-lm":
        raise CaloraError("--against compares causal language models; leave it out for other tasks")
    records = read_records(data, text_column, pair_column, label_column)
    loaded, tokenizer = directories.open_model(model, adapter)
    result = {"model": str(model), "adapter": None if adapter is None else str(adapter), "data": str(data), "task": task}
    measured = _measure(loaded, tokenizer, records, task, max_length)
    if against is not None:
        reference, _ = directories.open_model(against)
        far = divergence(loaded, reference, tokenizer, [r.text + (r.completion or "") for r in records], max_length)
        measured |= {"kl": far.kl, "top1_agreement": far.top1_agreement}
    rows = [(name.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else value) for name, value in measured.items()]
    emit(("measured", "value"), rows, {**result, **measured}, json_file)


def _measure(model, tokenizer, records, task: str, max_length: int | None) -> dict:
    from ..evaluate import accuracy, mean_loss, pad_id_of, perplexity, perplexity_of, window_of
    from ..io.batches import tokenize

    if task == "causal-lm" and all(r.completion is None and r.pair is None for r in records):
        return perplexity(model, tokenizer, [r.text for r in records], max_length).to_dict()
    labels = (model.config.label2id, model.config.num_labels) if task == "sequence-classification" else ()
    samples, _ = tokenize(records, tokenizer, task, window_of(model, max_length), *labels)
    pad_id = pad_id_of(model, tokenizer)
    if task == "sequence-classification":
        return {"accuracy": accuracy(model, samples, pad_id), "texts": len(samples)}
    loss = mean_loss(model, samples, task, pad_id)
    return {"perplexity": perplexity_of(loss), "loss": loss, "samples": len(samples)}
