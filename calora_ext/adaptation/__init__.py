"""CA-LoRA: an adapter trained on the compressed model, inherited, with recovery modules, distilled from the dense one.

run        adapt() and cache_teacher()         config   Lora, Recovery, Distill      settings  of the optimisation
trainer    CaloraTrainer, for several processes         arm      what is trained, from where, taught by what
student    branches put on the model           teacher, cache   the targets          objective the loss
residual   recovery from what compression lost
loop       AdamW over a function of the step   checkpoint       to go on bit for bit presets   published settings
"""

from .config import TAUGHT_LOGITS, Distill, Lora, Recovery
from .presets import PRESETS, preset
from .result import AdaptResult
from .run import adapt, cache_teacher
from .settings import Settings

__all__ = ["PRESETS", "TAUGHT_LOGITS", "AdaptResult", "Distill", "Lora", "Recovery", "Settings", "adapt", "cache_teacher", "preset"]
