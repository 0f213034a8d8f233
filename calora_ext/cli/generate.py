"""``calora generate`` and ``calora chat``: text from a model, shown as it is made."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from ..errors import CaloraError
from .common import Adapter, Json, Model, emit

MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
Temperature = Annotated[float | None, typer.Option(min=0, help="Randomness; 0 takes the likeliest token.  [default: the model's]")]
TopP = Annotated[float | None, typer.Option(min=0, max=1, help="Sample among the likeliest tokens of this total probability.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Makes sampling repeatable.")]


def register(app: typer.Typer) -> None:
    app.command()(generate)
    app.command()(chat)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from standard input.")],
    adapter: Adapter = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    json_file: Json = None,
) -> None:
    """Continue a prompt."""
    from ..integrations import directories, generation

    if prompt == "-":
        prompt = _read(sys.stdin.read)
    loaded, tokenizer = directories.open_model(model, adapter)
    print(prompt, end="", flush=True)
    made = generation.generate(loaded, tokenizer, prompt, max_new_tokens, temperature, top_p, seed, on_text=_show)
    print("\n")
    result = {"prompt": prompt, "text": made.text, "tokens": made.tokens, "seconds": made.seconds, "tokens_per_second": made.tokens_per_second}
    rows = [(made.tokens, f"{made.seconds:.2f}", f"{made.tokens_per_second:.1f}")]
    emit(("tokens", "seconds", "tokens per second"), rows, result, json_file)


def chat(
    model: Model,
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    json_file: Json = None,
) -> None:
    """Talk to a model through its chat template; an empty line or end of input ends it."""
    from ..integrations import directories, generation

    loaded, tokenizer = directories.open_model(model, adapter)
    if tokenizer.chat_template is None:
        raise CaloraError(f"the tokenizer of {model} has no chat template, so the model was not made to chat; use `calora generate`")
    messages = [{"role": "system", "content": system}] if system else []
    tokens, seconds = 0, 0.0
    while said := _ask():
        messages.append({"role": "user", "content": said})
        made = generation.generate(loaded, tokenizer, messages, max_new_tokens, temperature, top_p, seed, on_text=_show)
        print()
        messages.append({"role": "assistant", "content": made.text})
        tokens, seconds = tokens + made.tokens, seconds + made.seconds
    rate = tokens / seconds if seconds else 0.0
    result = {"messages": messages, "tokens": tokens, "seconds": seconds, "tokens_per_second": rate}
    emit(("tokens", "seconds", "tokens per second"), [(tokens, f"{seconds:.2f}", f"{rate:.1f}")], result, json_file)


def _ask() -> str:
    print("> ", end="", flush=True)
    return _read(sys.stdin.readline).strip()


def _read(read: Callable[[], str]) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise CaloraError(f"standard input is not UTF-8 text (byte {error.object[error.start]:#04x}); convert it to UTF-8") from None


def _show(text: str) -> None:
    print(text, end="", flush=True)
