"""Tiny random models of every architecture that the tests cover."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    T5Config,
)

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 96}
_LLAMA = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, **_IDS,
}  # fmt: skip
_BERT = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}

ZOO = {
    "llama": (LlamaConfig(**_LLAMA), AutoModelForCausalLM),
    "qwen2": (Qwen2Config(**_LLAMA, tie_word_embeddings=True), AutoModelForCausalLM),
    "mistral": (MistralConfig(**_LLAMA), AutoModelForCausalLM),
    "mixtral": (MixtralConfig(**_LLAMA, num_local_experts=4), AutoModelForCausalLM),
    "opt": (
        OPTConfig(vocab_size=97, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64,
                  max_position_embeddings=64, **_IDS),
        AutoModelForCausalLM,
    ),
    "gpt2": (GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64, **_IDS), AutoModelForCausalLM),
    "t5": (T5Config(vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0), AutoModelForSeq2SeqLM),
    "bert": (BertConfig(**_BERT), AutoModelForSequenceClassification),
}  # fmt: skip
TIED = {"qwen2", "opt", "gpt2", "t5"}  # the output head is the input embedding


def dense(name: str, seed: int = 0):
    """A random model of that architecture, eval mode, weights large enough that logits differ."""
    config, auto = ZOO[name]
    torch.manual_seed(seed)
    model = auto.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(name: str, length: int = 7) -> dict:
    ids = torch.randint(2, 96, (2, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}


def logits(model, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(name)).logits
