"""Whole models on a GPU, for gpu_check.py: a tiny Llama through every door that transformers and torch have. Each stage returns
{"failed": [...]} and takes a device; on "cpu" it is the same code, so that a dry run tries every line."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import calora_ext as cx
from calora_ext.adaptation import Settings
from calora_ext.adapters import add_adapter
from calora_ext.lowrank import Factors

SHAPE = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 255}  # fmt: skip
CLOSE = 2e-2  # relative, of bf16 logits


def small_model() -> LlamaForCausalLM:
    """A random compressed Llama on the CPU, exact activations as on a GPU."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    cx.compress(model, cx.Recipe(group_size=64, activations="exact"))
    return model


def tokens(device: str) -> Tensor:
    return torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)


def logits(model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float().cpu()


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def compiler(device: str) -> dict:
    """How torch.compile is called: on a GPU its graphs are captured as CUDA graphs."""
    return {"backend": "inductor", "mode": "reduce-overhead"} if device == "cuda" else {"backend": "eager"}


def saved_and_loaded(device: str) -> dict:
    """The model on the device, the bytes it saves, what device_map loads of them, over several GPUs where there are some."""
    failed = []
    model = small_model()
    packed = {name: t.clone() for name, t in model.state_dict().items()}
    want, ids = logits(model, tokens("cpu")), tokens(device)
    model.to(device)
    if not apart(logits(model, ids), want) < 1e-4:
        failed.append(f"another result after .to({device!r})")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        maps: list = [device, {"": 0 if device == "cuda" else "cpu"}]
        if device == "cuda" and torch.cuda.device_count() > 1:
            maps.append("balanced")
        for device_map in maps:
            loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, dtype=torch.float32)
            if not apart(logits(loaded, ids), want) < 1e-4:
                failed.append(f"another result with device_map={device_map!r}")
            if not all(torch.equal(t.cpu(), packed[name]) for name, t in loaded.state_dict().items()):
                failed.append(f"other bytes with device_map={device_map!r}")
    return {"failed": failed}


def compiled_and_cast(device: str) -> dict:
    """autocast, torch.compile without a break in the graph, and generation with a static cache, on a GPU in CUDA graphs."""
    failed = []
    model = small_model().to(device)
    ids, want = tokens(device), logits(model, tokens(device))
    with torch.autocast(device, torch.bfloat16):
        if not apart(logits(model, ids), want) < CLOSE:
            failed.append("another result under autocast")
    twin = copy.deepcopy(model)
    twin.forward = torch.compile(twin.forward, fullgraph=True, **compiler(device))
    for _ in range(3):  # CUDA graphs are recorded in the second call and replayed in the third
        if not apart(logits(twin, ids), want) < 1e-3:
            failed.append("another result compiled")
            break
    settings = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(ids, **settings)
    compiling = {} if device == "cuda" else {"disable_compile": True}  # transformers compiles static-cache decoding on a GPU
    if not torch.equal(plain, model.generate(ids, cache_implementation="static", **compiling, **settings)):
        failed.append("a static cache generates other tokens")
    return {"failed": failed}


def trained(device: str) -> dict:
    """cx.adapt on the device: LoRA and recovery learn a text by heart, and stay where the model is."""
    words = [f"w{i}" for i in range(200)]
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(["<unk>", "<s>", *words])}, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", pad_token="<unk>", bos_token="<s>")
    model, text = small_model().to(device), " ".join(words[7 * i % 200] for i in range(400))
    ids = torch.tensor([tokenizer(text)["input_ids"][:64]], device=device)

    def loss() -> float:
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    before = loss()
    settings = Settings(max_steps=20, per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant", warmup_steps=0, disable_tqdm=True)
    cx.adapt(model, data=[text], tokenizer=tokenizer, distill=None, max_length=64, args=settings)
    after = loss()
    failed = [] if after < before - 0.5 else [f"training took the loss from {before:.2f} to {after:.2f}"]
    elsewhere = [name for name, p in model.named_parameters() if p.device.type != device]
    return {"failed": failed + [f"{name} is not on the {device}" for name in elsewhere[:1]]}


def switched(device: str) -> dict:
    """Adapters of several ranks that take turns in one compiled model, which must not be compiled again."""
    model, ids, failed = small_model().to(device), tokens(device), []
    paths = [path for path, layer in model.named_modules() if isinstance(layer, cx.CompressedLinear) and path.endswith(("q_proj", "down_proj"))]
    for name, rank in (("a", 4), ("b", 8)):
        factors = {path: Factors(torch.randn(rank, layer.in_features) / 16, torch.randn(layer.out_features, rank), 0.5)
                   for path in paths for layer in [model.get_submodule(path)]}  # fmt: skip
        add_adapter(model, name, lora=factors, recovery=factors)
    want = {}
    for name in ("a", "b"):
        cx.set_adapter(model, name)
        want[name] = logits(model, ids)
    cx.enable_hotswap(model, target_rank=8)
    torch._dynamo.reset()
    forward = torch.compile(lambda x: model(x, use_cache=False).logits, fullgraph=True, **compiler(device))
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for turn, name in enumerate("aabbab"):  # CUDA graphs are recorded in the second call
            cx.set_adapter(model, name)
            difference = apart(forward(ids).float().cpu(), want[name])
            if not difference < 1e-3:
                failed.append(f"adapter {name!r}, call {turn}: {difference:.1e} from the model that is not compiled")
    if not apart(want["a"], want["b"]) > 0.1:
        failed.append("the two adapters do the same")
    return {"failed": failed}


STAGES: dict[str, Callable[[str], dict]] = {"models": saved_and_loaded, "compiled": compiled_and_cast, "training": trained, "adapters of a model": switched}
