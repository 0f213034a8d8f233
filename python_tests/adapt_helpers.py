"""Tiny models and a tokenizer made on the spot: nothing is downloaded."""

import torch
from formats_table import compress_linear
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from calora_ext import WeightFormat

TEXT = "a b c d e f g h the cat dog sat ran on mat good bad film yes no question answer ? ."
WORDS = TEXT.split()
VOCABULARY = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}


def make_tokenizer(end="", begin="<s>"):
    """Words to ids; begin and end are the special tokens put around every text."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    around = f"{begin} $A {end}".strip()
    specials = [(t, VOCABULARY[t]) for t in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, pair=f"{around} $B {end}".strip(), special_tokens=specials
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def text_of(words, seed=0):
    picks = torch.randint(0, len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in picks)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
IDS = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make_llama(seed=0, cls=LlamaForCausalLM, layers=2, **options):
    torch.manual_seed(seed)
    return cls(LlamaConfig(**SIZES | {"num_hidden_layers": layers}, **IDS, max_position_embeddings=64, initializer_range=0.2, **options)).eval()


def make_classifier(seed=0, labels=2):
    return make_llama(seed, LlamaForSequenceClassification, num_labels=labels)


def make_bert(seed=0, labels=2):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(**sizes, vocab_size=len(VOCABULARY), pad_token_id=0, max_position_embeddings=64, num_labels=labels)
    ).eval()


def make_t5(seed=0, dropout=0.0, decoder_layers=2):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(VOCABULARY), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=decoder_layers, num_heads=2, dropout_rate=dropout,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def compress(model, fmt=None):
    """The model with every linear layer packed, heads and the output matrix left dense."""
    fmt = fmt or WeightFormat("int4", 32)
    for path, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and not {"lm_head", "score", "classifier"} & set(path.split(".")):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, compress_linear(layer, fmt))
    return model


def make_gradients_infinite(model):
    """The loss stays finite; its gradient is inf or NaN everywhere."""

    def explode(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda grad: grad * float("inf"))

    model.get_output_embeddings().register_forward_hook(explode)
    return model


def make_lora(directory, model, seed=3, scale=0.05, **options):
    """A PEFT adapter directory for a model, with values that are not zero, and PEFT's own model of it."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", **options}
    adapted = get_peft_model(model, LoraConfig(**options))
    torch.manual_seed(seed)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            p.data = torch.randn_like(p) * scale
    adapted.save_pretrained(directory)
    return adapted.eval()
