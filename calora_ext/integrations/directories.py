"""Model directories as the commands see them: a model with its tokenizer and, switched on, an adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging

from ..adapters import load_adapter, set_adapter
from ..errors import CaloraError
from .models import load

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
ADAPTER = "adapter"  # the name under which commands load one


def open_model(directory: str | os.PathLike, adapter: str | os.PathLike | None = None) -> tuple[nn.Module, object]:
    """The model of a directory, with the adapter switched on, and its tokenizer."""
    model = load(directory)
    tokenizer = open_tokenizer(directory)
    if adapter is not None:
        load_adapter(model, adapter, ADAPTER)
        set_adapter(model, ADAPTER)
    return model.eval(), tokenizer


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars of transformers for the time being: for models that load at once."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def has_tokenizer(directory: str | os.PathLike) -> bool:
    return any((Path(directory) / name).is_file() for name in TOKENIZER_FILES)


def open_tokenizer(directory: str | os.PathLike):
    """The tokenizer that lies beside a model. Raises CaloraError where there is none, or a damaged one."""
    if not has_tokenizer(directory):
        raise CaloraError(f"{directory} has no tokenizer; copy the tokenizer files of the dense model into it")
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # transformers, tokenizers and json each raise their own
        raise CaloraError(f"the tokenizer of {directory} cannot be loaded: {str(error).splitlines()[0]}") from error
