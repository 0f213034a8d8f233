"""Model cards: the README.md of a saved model or adapter. Every figure in it is measured by the caller."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from .tables import table

_LOAD_MODEL = """\
import calora_ext as cx
from transformers import AutoTokenizer

model = cx.load("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""

_LOAD_ADAPTER = """\
import calora_ext as cx

model = cx.load("the-compressed-model")
cx.load_adapter(model, "{name}", adapter_name="task")
cx.set_adapter(model, "task")"""


def model_card(name: str, recipe: Mapping[str, object], sizes: Sequence[tuple[str, str]], results: str = "") -> str:
    """The card of a compressed model.

    name: the directory's name. recipe: what was applied, as JSON values. sizes: (quantity, value with its unit) as
    measured on the saved model. results: further measured tables, as Markdown.
    """
    return _card(
        name, f"Compressed with calora_ext: {_summary(recipe)}.", sizes, results, _LOAD_MODEL,
        "Recipe", recipe, ("calora", str(recipe.get("weights", "")), "compressed"),
    )  # fmt: skip


def adapter_card(name: str, settings: Mapping[str, object], sizes: Sequence[tuple[str, str]], results: str = "") -> str:
    """The card of an adapter directory: a LoRA, perhaps with its recovery half. Arguments as in :func:`model_card`."""
    text = (
        "A CA-LoRA adapter for a compressed model. Its LoRA half is a PEFT adapter and loads on the dense model too; "
        "the recovery half (`recovery_*.json`, `recovery_*.safetensors`), where there is one, belongs to the compressed model."
    )
    return _card(name, text, sizes, results, _LOAD_ADAPTER, "Settings", settings, ("calora", "lora", "adapter"))


def _card(
    name: str, intro: str, sizes: Sequence[tuple[str, str]], results: str, snippet: str,
    heading: str, settings: Mapping[str, object], tags: Sequence[str],
) -> str:  # fmt: skip
    parts = [
        "---\nlibrary_name: calora_ext\ntags:\n" + "".join(f"- {tag}\n" for tag in tags if tag) + "---",
        f"# {name}",
        intro,
        table(("", "measured"), sizes) if sizes else "",
        results,
        f"```python\n{snippet.format(name=name)}\n```",
        f"## {heading}\n```json\n{json.dumps(settings, indent=2, ensure_ascii=False, default=str)}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(recipe: Mapping[str, object]) -> str:
    group = recipe.get("group_size")
    grouped = {None: "", -1: ", one scale per row"}.get(group, f", groups of {group}")
    sparsity = f", sparsity {recipe['sparsity']}" if recipe.get("sparsity") is not None else ""
    return f"{recipe.get('weights', 'packed')} weights{grouped}{sparsity}"
