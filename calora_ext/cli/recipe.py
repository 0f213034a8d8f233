"""The options that spell the fields of ``cx.Recipe``, shared by the commands that take one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CaloraError

if TYPE_CHECKING:
    from ..recipe import Recipe

Weights = Annotated[str, typer.Option(help="How a weight is stored: int4, nf4, int8 or bf16.")]
GroupSize = Annotated[int | None, typer.Option(help="Columns that share an int4 or nf4 scale; -1 is one scale per row.  [default: 64, sparse 128]")]
Symmetric = Annotated[bool, typer.Option(help="No zero points, or one per int4 group.")]
Rounding = Annotated[str | None, typer.Option(help="rtn or gptq.  [default: gptq with --calibration, else rtn]")]
Activations = Annotated[str, typer.Option(help="What inference multiplies with: int8 or exact.")]
LmHead = Annotated[str, typer.Option(help="The output head where it is not tied: int4, nf4, int8, bf16, or none (dense).")]
Embeddings = Annotated[str, typer.Option(help="The input embeddings and a head tied to them: int4, nf4, int8, bf16, or none (dense).")]
Skip = Annotated[list[str] | None, typer.Option(metavar="REGEX", help="Modules that stay dense; may be given several times.")]
Sparsity = Annotated[str | None, typer.Option(help="2:4 (keep 2 of 4), or the share of the linear layers' weights to remove, as 0.7.  [default: none]")]
Pruner = Annotated[str | None, typer.Option(help="What chooses them: magnitude, wanda or sparsegpt.  [default: sparsegpt with --calibration, else magnitude]")]
Rates = Annotated[
    str, typer.Option(help="How a share is spread over the layers: uniform, arithmetic, rmi, owl, or FILE.json with {layer: share}.")
]


def build(*, skip: list[str] | None, lm_head: str, embeddings: str, sparsity: str | None, rates: str, **fields) -> Recipe:
    """A Recipe from option values; "none" is None."""
    from ..recipe import Recipe

    def stored(value: str) -> str | None:
        return None if value.lower() == "none" else value

    return Recipe(
        lm_head=stored(lm_head), embeddings=stored(embeddings), skip=tuple(skip or ()), sparsity=_sparsity(sparsity), rates=_rates(rates),
        **fields,
    )  # fmt: skip


def _rates(text: str) -> str | dict:
    """The name of a rule as it is, or the table in a JSON file."""
    if not text.endswith(".json"):
        return text
    try:
        table = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CaloraError(f"--rates {text} cannot be read as JSON: {error}") from None
    if not isinstance(table, dict):
        raise CaloraError(f"--rates {text} must hold an object {{layer: share}}")
    return table


def _sparsity(text: str | None) -> str | float | None:
    """A pattern as it is, a fraction as a number."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
