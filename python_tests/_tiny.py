"""Tiny random models for tests, compressed by hand, and the dense models that compute exactly what they compute."""

from __future__ import annotations

import copy

import torch
from formats_table import compress_linear
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from calora_ext import CompressedLinear, WeightFormat

INT4 = WeightFormat("int4", 32)


def llama(layers: int = 2, **kwargs) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | kwargs)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def ids(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def compressed(model: nn.Module, fmt: WeightFormat = INT4, skip: tuple[str, ...] = ("lm_head", "score"), exact: bool = True) -> nn.Module:
    """A copy with every linear layer packed. exact: no int8 activations, so that it can be compared with a dense model."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if (type(module) is nn.Linear or type(module).__name__ == "Conv1D") and path not in skip:
            layer = compress_linear(module, fmt)
            layer.activations = "exact" if exact else "int8"
            model.set_submodule(path, layer)
    return model


def dense_equivalent(small: nn.Module, original: nn.Module) -> nn.Module:
    """The original with the decoded weights of its compressed copy."""
    model = copy.deepcopy(original)
    for path, module in small.named_modules():
        if isinstance(module, CompressedLinear):
            twin = model.get_submodule(path)
            weight = module.decode().to(twin.weight.dtype)
            twin.weight.data = weight if isinstance(twin, nn.Linear) else weight.t().contiguous()
    return model


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor | None = None) -> torch.Tensor:
    return model(ids() if tokens is None else tokens).logits
