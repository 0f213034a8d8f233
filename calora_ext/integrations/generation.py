"""Text out of a causal language model, piece by piece as it is generated."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import TextStreamer, set_seed

from ..errors import CaloraError
from ..evaluate import check_ids


@dataclass(frozen=True)
class Generated:
    """What was generated. seconds: from the prompt to the last token, the prompt's own pass included."""

    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class _Stream(TextStreamer):
    """Hands finished pieces of text to a callback instead of printing them."""

    def __init__(self, tokenizer, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


def generate(
    model: nn.Module,
    tokenizer,
    prompt: str | list[dict],
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generated:
    """Continue a prompt, or answer a conversation.

    prompt: a text, or messages ``{"role", "content"}`` for the tokenizer's chat template. temperature, top_p: default the
    model's generation config; temperature 0 takes the most likely token. seed: makes sampling repeatable. on_text:
    called with each piece of text. Raises CaloraError for a model that does not generate, a tokenizer without a chat
    template, or a prompt that leaves no room in the context.
    """
    if not hasattr(model, "generate") or not getattr(model, "can_generate", bool)():
        raise CaloraError(f"a {type(model).__name__} does not generate text; evaluate it with `calora eval`")
    inputs = _encode(tokenizer, prompt)
    check_ids(model, inputs["input_ids"])
    length = inputs["input_ids"].shape[1]
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    room = max_new_tokens if context is None or model.config.is_encoder_decoder else min(max_new_tokens, context - length)
    if room < 1:
        raise CaloraError(f"the prompt has {length} tokens and fills the model's context of {context}; shorten it")
    if seed is not None:
        set_seed(seed)
    beams = model.generation_config.num_beams or 1  # of the models that translate or summarise, often 4
    streamer = _Stream(tokenizer, on_text) if on_text and beams == 1 else None  # beams have no text before they end
    begin = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            **inputs.to(model.device), **_sampling(temperature, top_p), max_new_tokens=room, streamer=streamer,
        )[0]  # fmt: skip
    seconds = time.perf_counter() - begin
    new = output[1 if model.config.is_encoder_decoder else length :]  # a decoder begins with its start token
    text = tokenizer.decode(new, skip_special_tokens=True)
    if on_text and streamer is None:
        on_text(text)
    return Generated(text, len(new), seconds)


def _encode(tokenizer, prompt: str | list[dict]):
    if isinstance(prompt, str):
        return tokenizer(prompt, return_tensors="pt")
    if tokenizer.chat_template is None:
        raise CaloraError("this tokenizer has no chat template, so the model was not made to chat; use `calora generate --prompt`")
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _sampling(temperature: float | None, top_p: float | None) -> dict:
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None}
    given = {"temperature": temperature, "top_p": top_p}
    chosen = {name: value for name, value in given.items() if value is not None}
    return {"do_sample": True, **chosen} if chosen else {}
