"""``calora estimate``, ``compress`` and ``inspect``: model directories in, sizes and packed model directories out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CaloraError
from ..io.outputs import check_output
from ..tables import format_bytes, table
from . import recipe as options
from .common import Json, Model, Output, Overwrite, emit


def register(app: typer.Typer) -> None:
    app.command()(estimate)
    app.command()(compress)
    app.command()(inspect)


def estimate(
    model: Model,
    weights: options.Weights = "int4",
    group_size: options.GroupSize = None,
    symmetric: options.Symmetric = True,
    sparsity: options.Sparsity = None,
    pruner: options.Pruner = None,
    rates: options.Rates = "uniform",
    lm_head: options.LmHead = "int8",
    embeddings: options.Embeddings = "none",
    skip: options.Skip = None,
    json_file: Json = None,
) -> None:
    """What a recipe would make of a model: bytes and bits per weight, module by module. Reads no weights."""
    from .. import estimate as estimate_model

    recipe = options.build(
        weights=weights, group_size=group_size, symmetric=symmetric, sparsity=sparsity, pruner=pruner, rates=rates,
        lm_head=lm_head, embeddings=embeddings, skip=skip,
    )  # fmt: skip
    coverage = estimate_model(model, recipe)
    emit(*coverage_table(coverage), {"recipe": recipe.to_dict(), **coverage.to_dict()}, json_file)


def compress(
    model: Model,
    output: Output,
    weights: options.Weights = "int4",
    group_size: options.GroupSize = None,
    symmetric: options.Symmetric = True,
    rounding: options.Rounding = None,
    sparsity: options.Sparsity = None,
    pruner: options.Pruner = None,
    rates: options.Rates = "uniform",
    activations: options.Activations = "int8",
    lm_head: options.LmHead = "int8",
    embeddings: options.Embeddings = "none",
    skip: options.Skip = None,
    calibration: Annotated[Path | None, typer.Option(metavar="FILE", help="Text for gptq, wanda, sparsegpt, rmi and owl: .txt, .jsonl or .tsv, also .gz.")] = None,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory for calibration activations, as 4GB; what is more waits on disk.  [default: all of them]")] = None,
    overwrite: Overwrite = False,
    json_file: Json = None,
) -> None:
    """Compress a dense model into a new directory, which loads with from_pretrained after `import calora_ext`; one block of the model is in memory at a time."""
    recipe = options.build(
        weights=weights, group_size=group_size, symmetric=symmetric, rounding=rounding, sparsity=sparsity, pruner=pruner,
        rates=rates, activations=activations, lm_head=lm_head, embeddings=embeddings, skip=skip,
    )  # fmt: skip
    check_output(output, overwrite, keep=[p for p in (model, calibration) if p])
    from .. import compress_directory
    from ..integrations.streaming import sizes
    from ..io.data import read_records

    texts = None if calibration is None else [r.text for r in read_records(calibration)]
    report = compress_directory(model, output, recipe, calibration=texts, max_memory=_bytes(max_memory), overwrite=overwrite)
    print(table(*coverage_table(report.coverage)), *report.notes(), sep="\n\n", end="\n\n")
    on_disk = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    rows = [*sizes(report, output), ("largest error of a layer", f"{max(report.errors.values()):.4f}"), ("seconds", f"{report.seconds:.1f}")]
    emit(("", str(output)), rows, {"file_bytes": on_disk, **report.to_dict()}, json_file)


def _bytes(text: str | None) -> int | None:
    """``"512MB"`` -> 512000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip().upper()) if text is not None else None
    if text is not None and match is None:
        raise CaloraError(f"--max-memory {text} is not a size; write it as 8GB or 512MB")
    return None if match is None else int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))


def coverage_table(coverage) -> tuple[tuple[str, ...], list[tuple]]:
    """Columns and rows of a policy.Coverage."""
    rows = [
        (r["modules"], r["count"], f"{r['parameters']:,}", r["format"], format_bytes(r["bytes"]), r["bits_per_weight"], r["reason"])
        for r in coverage.rows()
    ]
    bits = round(8 * coverage.nbytes / coverage.parameters, 2)
    rows.append(("total", None, f"{coverage.parameters:,}", "", format_bytes(coverage.nbytes), bits, ""))
    return ("modules", "count", "parameters", "format", "size", "bits per weight", "why dense"), rows


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed model or an adapter directory.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every weight file and compare it with the hash recorded at save.")] = False,
    json_file: Json = None,
) -> None:
    """Check and list what a directory holds: headers, shapes, sizes, scales; with --verify every byte."""
    from ..io import checkpoint

    if not directory.is_dir():
        raise CaloraError(f"{directory} is not a directory; name a model or adapter directory")
    if verify:
        if not (directory / checkpoint.CONFIG).is_file():
            raise CaloraError(f"{directory} records no hashes; only models saved by calora_ext can be verified")
        states = checkpoint.verify(directory)
        emit(("file", "state"), list(states.items()), states, json_file)
        bad = [name for name, state in states.items() if state != "ok"]
        if bad:
            raise CaloraError(f"{directory / bad[0]}: {states[bad[0]]}; copy the model again or compress it anew")
        return
    rows, result = _contents(directory)
    emit(("tensor", "dtype", "shape", "size", "format", "bits per weight", "sparsity"), rows, result, json_file)


def _contents(directory: Path) -> tuple[list[tuple], list[dict]]:
    from ..io import checkpoint, peft_adapter, recovery

    layers = {}
    if (directory / checkpoint.CONFIG).is_file():
        paths = checkpoint.shard_paths(directory)
        if checkpoint.read_json(directory / checkpoint.CONFIG).get("quantization_config"):
            from ..integrations.models import packed_layers

            layers = packed_layers(directory)  # maps the packed tensors, and refuses what does not fit together
    else:
        halves = [(peft_adapter, peft_adapter.read_adapter), (recovery, recovery.read_recovery)]
        there = [(half, read) for half, read in halves if (directory / half.CONFIG_NAME).is_file() or (directory / half.WEIGHTS_NAME).is_file()]
        if not there:
            raise CaloraError(f"{directory} is neither a model nor an adapter directory; name one that holds config.json or adapter_config.json")
        for _, read in there:
            read(directory)
        paths = [directory / half.WEIGHTS_NAME for half, _ in there]
    tensors = [
        {"name": name, "dtype": header.tensors[name].dtype, "shape": list(header.tensors[name].shape),
         "bytes": header.tensors[name].end - header.tensors[name].begin, "file": header.path.name}
        for name, header in checkpoint.read_headers(paths).items()
    ]  # fmt: skip
    for t in tensors:
        name, _, kind = t["name"].rpartition(".")
        if kind == "packed" and name in layers:
            t |= layers[name]
    rows = [
        (t["name"], t["dtype"], " x ".join(map(str, t["shape"])), format_bytes(t["bytes"]), t.get("format"),
         f"{t['bits_per_weight']:.2f}" if "format" in t else None, f"{100 * t['sparsity']:.1f} %" if "format" in t else None)
        for t in tensors
    ]  # fmt: skip
    return rows, tensors
