"""What callers hand in, told by what it has: transformers is not imported here."""

from __future__ import annotations

from typing import Any

from .errors import CaloraError


def require_model(what: str, model: Any) -> None:
    """Raises CaloraError unless it is a transformers model, or PEFT's wrapper of one. what: the argument's name."""
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise CaloraError(f"{what} must be a transformers model, got {type(model).__name__}; load it with from_pretrained first")


def require_tokenizer(tokenizer: Any) -> None:
    """Raises CaloraError unless it is a tokenizer."""
    if not (callable(tokenizer) and hasattr(tokenizer, "get_vocab")):
        raise CaloraError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}; load it with AutoTokenizer.from_pretrained")


def require_kind(what: str, value: Any, kind: type, otherwise: str = "None") -> None:
    """Raises CaloraError unless it is a ``kind`` or None. otherwise: what may stand instead of one, in words."""
    if not (value is None or isinstance(value, kind)):
        raise CaloraError(f"{what} must be {otherwise} or a calora_ext.adaptation.{kind.__name__}, got {value!r:.60}")
