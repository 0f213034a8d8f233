"""The published settings of CA-LoRA, by name: keyword arguments for ``calora_ext.adapt``.

From the scripts of thunlp/CA-LoRA (ba59789). alpha is 16 whatever the rank, hence scales 0.5, 1 and 0.25. The released code of
llama-2-13b leaves the GELU out of its recovery modules; here, as in the paper, they have it.
"""

from __future__ import annotations

from ..errors import CaloraError
from .config import Distill, Lora, Recovery
from .settings import Settings

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")

_PRESETS = {
    # T5-3B on SuperGLUE: LoRA on q and k alone, recovery on every linear; the hidden states are the inputs of the last blocks.
    "t5-3b": {
        "lora": Lora(rank=32, alpha=16, targets=("q", "k")),
        "recovery": Recovery(rank=32, alpha=16, sites="all"),
        "distill": Distill(hidden={"encoder:-2": 0.005, "decoder:-2": 0.05}, logits=0.0, mask_padding=False),
        "args": Settings(
            learning_rate=1e-3, lr_scheduler_type="noam", warmup_steps=100, num_train_epochs=20, per_device_train_batch_size=16,
            gradient_accumulation_steps=4, weight_decay=1e-2, max_grad_norm=10.0, seed=1234,
        ),
        "task": "seq2seq-lm",
    },
    # LLaMA-13B on Alpaca: the inherited Alpaca-LoRA is on the attention, recovery also on the MLP, where it has dropout.
    "llama-13b": {
        "lora": Lora(rank=16, alpha=16, targets=_ATTENTION),
        "recovery": Recovery(rank=16, alpha=16, sites=(*_ATTENTION, *_MLP), dropout=dict.fromkeys(_MLP, 0.05)),
        "distill": Distill(hidden={-1: 1.0}, logits=0.0, mask_padding=False),
        "args": Settings(
            learning_rate=1e-4, lr_scheduler_type="constant", warmup_steps=0, max_steps=2000, per_device_train_batch_size=4,
            gradient_accumulation_steps=16, max_grad_norm=0.3,
        ),
        "task": "causal-lm",
    },
    # LLaMA-2-13B on CodeAlpaca.
    "llama-2-13b": {
        "lora": Lora(rank=64, alpha=16, targets=(*_ATTENTION, *_MLP), dropout=0.1),
        "recovery": Recovery(rank=64, alpha=16, sites=(*_ATTENTION, *_MLP), dropout=0.1),
        "distill": Distill(hidden={-1: 0.055}, logits=0.0, mask_padding=False),
        "args": Settings(
            learning_rate=2e-4, lr_scheduler_type="constant", warmup_steps=0, num_train_epochs=5, per_device_train_batch_size=6,
            gradient_accumulation_steps=2, max_grad_norm=0.3,
        ),
        "task": "causal-lm",
    },
}  # fmt: skip

PRESETS = tuple(_PRESETS)


def preset(name: str) -> dict:
    """lora, recovery, distill, args and task of a published experiment: ``cx.adapt(model, **preset("llama-13b"), ...)``."""
    if name not in _PRESETS:
        raise CaloraError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    return dict(_PRESETS[name])
