"""How good a model is: perplexity, accuracy, and how far it is from another model.

All losses are in nats per predicted token. Models and tokenizers are transformers objects; none is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from .errors import CaloraError
from .io.batches import IGNORED, Batch, Sample, collate, token_stream
from .loss import summed_cross_entropy
from .progress import progress

LONGEST_DEFAULT_WINDOW = 2048  # the usual one in the literature; a 128k context would need 60 GB of logits


class Perplexity(float):
    """exp(loss), and what it was measured on: ``loss`` (nats per token), ``tokens`` predicted, ``window`` (tokens)."""

    loss: float
    tokens: int
    window: int

    def __new__(cls, loss: float, tokens: int, window: int) -> Perplexity:
        self = super().__new__(cls, perplexity_of(loss))
        self.loss, self.tokens, self.window = loss, tokens, window
        return self

    def __getnewargs__(self):
        return self.loss, self.tokens, self.window

    def to_dict(self) -> dict:
        return {"perplexity": float(self), "loss": self.loss, "tokens": self.tokens, "window": self.window}


def perplexity_of(loss: float) -> float:
    """exp of a loss in nats; infinite beyond what a float holds."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class Divergence:
    """Of a model from a reference: mean KL(reference || model) in nats, share of positions with the same most likely token."""

    kl: float
    top1_agreement: float
    positions: int


def perplexity(model: nn.Module, tokenizer, text: str | list[str] | Tensor, max_length: int | None = None) -> Perplexity:
    """Perplexity of a causal LM on text, in non-overlapping windows.

    text: one text, several (joined, each ended by eos), or token ids (tokens,). max_length: tokens per window, default the
    model's context but at most 2048; the first token of each window is not predicted. The result is a float that also
    knows its ``loss``, ``tokens`` and ``window``. Raises CaloraError where there is nothing to predict.
    """
    ids = text if isinstance(text, Tensor) else token_stream([text] if isinstance(text, str) else list(text), tokenizer)
    if getattr(model.config, "is_encoder_decoder", False) or type(model).__name__.endswith("ForSequenceClassification"):
        raise CaloraError(f"a {type(model).__name__} is no causal language model; name its task, seq2seq-lm or sequence-classification")
    window = window_of(model, max_length)
    total, tokens = 0.0, 0
    with evaluating(model), torch.inference_mode():
        for blocks in progress(list(_windows(ids, window)), "Evaluating", "batch"):
            logits = _forward(model, {"input_ids": blocks}).logits[:, :-1].float()
            total += cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten().to(logits.device), reduction="sum").item()
            tokens += blocks[:, 1:].numel()
    if tokens == 0:
        raise CaloraError("perplexity needs a text of at least 2 tokens")
    return Perplexity(total / tokens, tokens, min(window, len(ids)))


def _windows(ids: Tensor, window: int) -> Iterator[Tensor]:
    """(windows, tokens) pieces of ids, at most 2048 tokens at a time; the shorter last window comes alone, a single token not at all."""
    whole = len(ids) // window * window
    if whole:
        yield from ids[:whole].view(-1, window).split(max(1, LONGEST_DEFAULT_WINDOW // window))
    if len(ids) - whole > 1:
        yield ids[None, whole:]


def window_of(model: nn.Module, max_length: int | None = None) -> int:
    """Tokens per window: max_length, else the model's context capped at 2048. Raises CaloraError where it exceeds the context."""
    context = context_of(model)
    if max_length is None:
        return min(context or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW)
    if max_length < 2:
        raise CaloraError(f"max_length must be at least 2 tokens, got {max_length}")
    if context is not None and max_length > context:
        raise CaloraError(f"max_length={max_length} is more than the {context} tokens of the model's context")
    return max_length


def context_of(model: nn.Module) -> int | None:
    """Tokens the model can attend to, or None where it has no limit (T5's relative positions)."""
    config = model.config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(getattr(config, name, None), int) and not hasattr(config, "relative_attention_num_buckets"):
            return getattr(config, name)
    return None


def accuracy(model: nn.Module, samples: list[Sample], pad_id: int, batch_size: int = 16) -> float:
    """Share of samples (``io.batches.tokenize``) that a sequence-classification model gets right."""
    right = 0
    with evaluating(model), torch.inference_mode():
        for batch in batches(samples, pad_id, batch_size):
            labels = batch.pop("labels")
            right += (_forward(model, batch).logits.argmax(-1).cpu() == labels).sum().item()
    return right / len(samples)


def divergence(
    model: nn.Module, reference: nn.Module, tokenizer, text: str | list[str] | Tensor, max_length: int | None = None
) -> Divergence:
    """How far a causal LM is from a reference (the dense model) on a text, over every position of non-overlapping windows."""
    ids = text if isinstance(text, Tensor) else token_stream([text] if isinstance(text, str) else list(text), tokenizer)
    kl, same, positions = 0.0, 0, 0
    with evaluating(model), evaluating(reference), torch.inference_mode():
        for blocks in progress(list(_windows(ids, window_of(model, max_length))), "Comparing", "batch"):
            p = _forward(reference, {"input_ids": blocks}).logits.float().log_softmax(-1).cpu()
            q = _forward(model, {"input_ids": blocks}).logits.float().log_softmax(-1).cpu()
            if p.shape != q.shape:
                raise CaloraError(
                    f"the models have {q.shape[-1]} and {p.shape[-1]} tokens in their vocabularies and cannot be compared"
                )
            kl += (p.exp() * (p - q)).sum().item()
            same += (p.argmax(-1) == q.argmax(-1)).sum().item()
            positions += blocks.numel()
    if positions == 0:
        raise CaloraError("a comparison needs a text of at least 1 token")
    return Divergence(kl / positions, same / positions, positions)


def mean_loss(model: nn.Module, samples: list[Sample], task: str, pad_id: int, batch_size: int = 8) -> float:
    """Mean cross-entropy of a task over its samples (``io.batches.tokenize``): per predicted token, or per text for classification."""
    total, count = 0.0, 0
    with evaluating(model), torch.inference_mode():
        for batch in batches(samples, pad_id, batch_size):
            loss, n = task_loss(model, batch, task)[:2]
            total, count = total + loss.item(), count + n
    return total / count


def task_loss(model: nn.Module, batch: Batch, task: str, **options) -> tuple[Tensor, int, object]:
    """(summed cross-entropy, how many predictions were summed, the model's output). options go to the model."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = batch["labels"]
    if task == "seq2seq-lm":
        inputs["decoder_input_ids"] = _unwrapped(model).prepare_decoder_input_ids_from_labels(labels=labels)
    output = _forward(model, inputs, **options)
    logits = output.logits
    labels = labels.to(logits.device)
    if task == "causal-lm":  # labels move, not logits: nothing follows the last position
        labels = pad(labels[:, 1:], (0, 1), value=IGNORED)
    loss = summed_cross_entropy(logits.flatten(0, -2), labels.flatten(), IGNORED)
    return loss, int((labels != IGNORED).sum()), output


def batches(samples: list[Sample], pad_id: int, batch_size: int) -> Iterator[Batch]:
    for start in progress(range(0, len(samples), batch_size), "Evaluating", "batch"):
        yield collate(samples[start : start + batch_size], pad_id)


def pad_id_of(model: nn.Module, tokenizer) -> int:
    """What fills a batch: the model's pad token (a decoder's classifier finds the last token by it), else the tokenizer's, else 0."""
    for owner in (model.config.get_text_config(), tokenizer):
        pad = getattr(owner, "pad_token_id", None)
        if pad is not None and pad >= 0:
            return pad
    return 0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) for the time being; each module gets its own mode back."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_ids(model: nn.Module, ids: Tensor) -> None:
    """Raises CaloraError for token ids that the model has no embedding for: the tokenizer is another model's."""
    known = getattr(_unwrapped(model).get_input_embeddings(), "num_embeddings", None)
    if known is not None and ids.numel() and int(ids.max()) >= known:
        raise CaloraError(f"the tokenizer gives token {int(ids.max())}, the model knows {known}; it belongs to another model")


def _forward(model: nn.Module, inputs: Batch, **options):
    check_ids(model, inputs["input_ids"])
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return model(**{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False, **options)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model, also where it takes part in distributed training."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
