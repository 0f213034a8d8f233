"""Compressing directory to directory: the bytes of the path in memory, bounded memory, nothing left of what fails."""

import filecmp
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import TIED, ZOO, dense, inputs

import calora_ext as cx
from calora_ext.integrations import streaming
from calora_ext.io.checkpoint import read_header

LENGTH = 64  # tokens in a calibration sequence, what the tiny models take


def sequences(count=12, seed=0):
    return torch.randint(2, 96, (count, LENGTH), generator=torch.Generator().manual_seed(seed)).tolist()


def in_memory(source, target, recipe, calibration=None):
    model = cx.load(source)
    report = cx.compress(model, recipe, calibration=calibration)
    model.save_pretrained(target)
    return report


def contents(path):
    """{tensor: (dtype, shape, bytes)} of a safetensors file whose packed tensors are aligned, in the order of the file."""
    header = read_header(path)
    assert not header.misaligned and header.metadata["format"] == "pt"
    data = path.read_bytes()
    return [(name, t.dtype, t.shape, data[t.begin : t.end]) for name, t in sorted(header.tensors.items(), key=lambda item: item[1].begin)]


def check_same(tmp_path, name, recipe, calibration=None, max_memory=None, shards="50GB", dtype=None):
    """dtype: what config.json says, whatever the files hold."""
    dense(name).save_pretrained(tmp_path / "dense", max_shard_size=shards)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {"dtype": dtype or config["dtype"]}))
    want = in_memory(tmp_path / "dense", tmp_path / "whole", recipe, calibration)
    got = cx.compress_directory(tmp_path / "dense", tmp_path / "streamed", recipe, calibration=calibration, max_memory=max_memory)
    drop = lambda report: {k: v for k, v in report.to_dict().items() if k != "seconds"}  # noqa: E731
    assert drop(got) == drop(want)
    files = {p.name for p in (tmp_path / "whole").iterdir()}
    assert {p.name for p in (tmp_path / "streamed").iterdir()} == files
    for file in files - {"README.md", "config.json", "model.safetensors"}:
        assert filecmp.cmp(tmp_path / "whole" / file, tmp_path / "streamed" / file, shallow=False), file
    assert contents(tmp_path / "streamed" / "model.safetensors") == contents(tmp_path / "whole" / "model.safetensors")
    configs = [json.loads((tmp_path / kind / "config.json").read_text()) for kind in ("whole", "streamed")]
    for config in configs:
        config["quantization_config"].pop("files")  # safetensors writes its metadata in any order
    assert configs[0] == configs[1]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    return got


@pytest.mark.parametrize("name", ZOO)
def test_uncalibrated(name, tmp_path):
    check_same(tmp_path, name, cx.Recipe(group_size=32, embeddings="int8" if name in TIED else None))


CALIBRATED = {
    "gptq": {}, "gptq asymmetric": {"symmetric": False}, "gptq nf4": {"weights": "nf4"},
    "sparsegpt": {"sparsity": 0.5}, "sparsegpt 2:4": {"sparsity": "2:4"}, "wanda": {"sparsity": 0.6, "pruner": "wanda", "rounding": "rtn"},
    "rmi": {"sparsity": 0.6, "rates": "rmi"}, "owl": {"sparsity": 0.5, "rates": "owl"},
    "owl alone": {"sparsity": 0.5, "rates": "owl", "pruner": "magnitude", "rounding": "rtn"}, "skip": {"skip": ["layers.0"]},
}  # fmt: skip


@pytest.mark.parametrize("recipe", CALIBRATED.values(), ids=CALIBRATED)
def test_calibrated(recipe, tmp_path):
    report = check_same(tmp_path, "llama", cx.Recipe(group_size=32, **recipe), sequences())
    assert not report.outcome.uncalibrated


@pytest.mark.parametrize("name", ["opt", "gpt2", "qwen2", "mixtral", "t5"])
def test_other_architectures_calibrated(name, tmp_path):
    check_same(tmp_path, name, cx.Recipe(group_size=32, sparsity=0.5), sequences(4))


@pytest.mark.parametrize(("name", "recipe"), [("llama", {"sparsity": 0.6, "rates": "rmi"}), ("gpt2", {}), ("t5", {"sparsity": "2:4"})])
def test_activations_on_disk_change_nothing(name, recipe, tmp_path, monkeypatch):
    moved = []
    move = streaming.ActivationSpool.move
    monkeypatch.setattr(streaming.ActivationSpool, "move", lambda self, tensor: (moved.append(tensor.nbytes), move(self, tensor)))
    check_same(tmp_path, name, cx.Recipe(group_size=32, **recipe), sequences(64), max_memory=0)
    assert sum(moved) > 2 * 64 * LENGTH * 64 * 4  # the embeddings, and what entered two blocks
    moved.clear()
    cx.compress_directory(tmp_path / "dense", tmp_path / "roomy", cx.Recipe(**recipe), calibration=sequences(64), max_memory=10**9)
    assert not moved


def test_files_in_another_dtype_and_in_shards(tmp_path):
    check_same(tmp_path, "llama", cx.Recipe(group_size=32), sequences(), shards="40KB", dtype="bfloat16")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2


def test_zeros_of_a_pruned_model_stay(tmp_path):
    model = dense("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, :50] = 0
    model.save_pretrained(tmp_path / "dense")
    recipe, name = cx.Recipe(sparsity=0.5, group_size=32), "model.layers.1.mlp.up_proj"
    want = in_memory(tmp_path / "dense", tmp_path / "whole", recipe)
    got = cx.compress_directory(tmp_path / "dense", tmp_path / "streamed", recipe)
    assert got.outcome.pruned == want.outcome.pruned
    assert not cx.load(tmp_path / "streamed").get_submodule(name).decode()[:, :50].any()


def test_the_result_may_be_several_files(tmp_path, monkeypatch):
    dense("llama").save_pretrained(tmp_path / "dense")
    in_memory(tmp_path / "dense", tmp_path / "whole", cx.Recipe(group_size=32))
    monkeypatch.setattr(streaming, "MAX_SHARD_SIZE", "20KB")
    cx.compress_directory(tmp_path / "dense", tmp_path / "streamed", cx.Recipe(group_size=32))
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 2
    models = [cx.load(tmp_path / kind) for kind in ("whole", "streamed")]
    with torch.no_grad():
        assert torch.equal(*(model(**inputs("llama")).logits for model in models))


# --- nothing is left of what fails ---------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path):
    dense("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def refuses(source, words, **kwargs):
    with pytest.raises(cx.CaloraError, match=words):
        cx.compress_directory(source, source.parent / "out", **kwargs)
    assert [p.name for p in source.parent.iterdir()] == [source.name]


def test_interrupted_runs_leave_nothing(llama, monkeypatch):
    leave = streaming.Streamed.leave

    def interrupted(self, block, finished):
        leave(self, block, finished)
        if block.endswith(".1"):
            raise KeyboardInterrupt

    monkeypatch.setattr(streaming.Streamed, "leave", interrupted)
    for calibration in (None, sequences()):
        with pytest.raises(KeyboardInterrupt):
            cx.compress_directory(llama, llama.parent / "out", calibration=calibration)
        assert [p.name for p in llama.parent.iterdir()] == ["dense"]


def test_bad_calibration_data(llama):
    refuses(llama, "has 0 tokens", calibration=[])
    refuses(llama, "has 63 tokens", calibration=[list(range(2, 65))])
    refuses(llama, "outside 0..96", calibration=[[97] * 64])
    refuses(llama, "no tokenizer", calibration=["words " * 100])
    refuses(llama, "needs calibration data", recipe=cx.Recipe(rounding="gptq"))
    refuses(llama, "max_memory must be", calibration=sequences(), max_memory=-1)


def test_weights_and_inputs_that_are_not_finite(llama):
    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    save_file(tensors | {f"{name}.weight": torch.full_like(tensors[f"{name}.weight"], torch.nan)}, llama / "model.safetensors", {"format": "pt"})
    refuses(llama, f"{name}: the weight holds NaN")
    norm = "model.layers.1.post_attention_layernorm.weight"
    save_file(tensors | {norm: torch.full_like(tensors[norm], torch.inf)}, llama / "model.safetensors", {"format": "pt"})
    refuses(llama, "layers.1.mlp.gate_proj: the inputs of this layer are NaN or infinite", calibration=sequences())


def test_damaged_directories(llama):
    tensors = load_file(llama / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.norm.weight"):
        save_file({k: v for k, v in tensors.items() if k != name}, llama / "model.safetensors", {"format": "pt"})
        refuses(llama, f"lacks {name}")
    narrow = tensors | {"model.layers.1.mlp.up_proj.weight": torch.zeros(96, 32)}
    save_file(narrow, llama / "model.safetensors", {"format": "pt"})
    refuses(llama, r"up_proj.weight as \(96, 32\), config.json asks for \(96, 64\)")
    (llama / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:-100])
    refuses(llama, "cut short")


def test_directories_that_are_in_the_way(llama, tmp_path):
    out = tmp_path / "out"
    cx.compress_directory(llama, out)
    with pytest.raises(cx.CaloraError, match="not empty"):
        cx.compress_directory(llama, out)
    with pytest.raises(cx.CaloraError, match="compressed already"):
        cx.compress_directory(out, tmp_path / "again")
    with pytest.raises(cx.CaloraError, match="holds an input"):
        cx.compress_directory(llama, llama, overwrite=True)
    cx.compress_directory(llama, out, cx.Recipe(weights="int8"), overwrite=True)
    assert cx.load(out).model.layers[0].mlp.up_proj.format.values == "int8"


def test_blocks_that_need_each_other_are_refused(llama, monkeypatch):
    """ALBERT and its like call one block several times; others tie weights between blocks."""
    build, models = streaming.build, []

    def nested(self, hidden, **kwargs):  # the second block calls the first one again
        out = forward(self, hidden, **kwargs)
        return models[-1].model.layers[0](out, **kwargs) if models and self.self_attn.layer_idx == 1 else out

    with monkeypatch.context() as patch:
        layer = type(dense("llama").model.layers[0])
        forward = layer.forward
        patch.setattr(layer, "forward", nested)
        patch.setattr(streaming, "build", lambda *a: (models.append(build(*a)), models[-1])[1])
        refuses(llama, "layers.0 runs twice in a forward pass", calibration=sequences())

    def tied(*arguments):
        model = build(*arguments)
        model.all_tied_weights_keys = {"model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"}
        return model

    monkeypatch.setattr(streaming, "build", tied)
    refuses(llama, "layers.1.mlp.up_proj.weight is tied")


# --- memory --------------------------------------------------------------------------------------------------------------

RUN = """
import json, sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
import calora_ext as cx

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key + ":"))

def make(directory, settings, dtype):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=128, tie_word_embeddings=False, max_position_embeddings=512, **settings))
    model = model.to(dtype).to_empty(device="cpu")
    row = torch.randn(1 << 16).mul_(0.02).to(dtype)
    for parameter in model.parameters():
        for piece in parameter.data.view(-1).split(len(row)):
            piece.copy_(row[: len(piece)])
    model.save_pretrained(directory)

root, settings, dtype, recipe, count, max_memory = Path(sys.argv[1]), *json.loads(sys.argv[2])
torch.set_num_threads(1)
tiny = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
make(root / "tiny", tiny, torch.float32)
make(root / "dense", settings, getattr(torch, dtype))
data = lambda n: [torch.randint(0, 128, (512,)).tolist() for _ in range(n)] or None
cx.compress_directory(root / "tiny", root / "warm", cx.Recipe(**recipe), calibration=data(count and 1))  # imports everything
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
cx.compress_directory(root / "dense", root / "out", cx.Recipe(**recipe), calibration=data(count), max_memory=max_memory)
print(status("VmHWM") - before)
"""
WORK = 25e6  # bytes: weights are rounded and compared a million at a time, whatever the layer's size


def peak(tmp_path, *arguments):
    """Bytes that compressing a random Llama took above what the process had before."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/status")
    run = [sys.executable, "-c", RUN, str(tmp_path), json.dumps(arguments)]
    return int(subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def shape(hidden, inner, layers):
    heads = hidden // 64
    return {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": heads, "num_hidden_layers": layers}


def test_memory_is_a_block(tmp_path):
    block, layers = 2 * (4 * 1024**2 + 3 * 1024 * 4096), 5
    assert peak(tmp_path, shape(1024, 4096, layers), "bfloat16", {}, 0, None) < 1.2 * block + WORK < 0.8 * layers * block


def test_memory_of_gptq_is_two_hessians(tmp_path):
    block, hessian = 2 * (4 * 256**2 + 3 * 256 * 3072), 4 * 3072**2
    assert peak(tmp_path, shape(256, 3072, 1), "bfloat16", {}, 1, None) < 1.2 * (block + 2 * hessian) + WORK < 5 * hessian


@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
def test_memory_of_sparsegpt_is_two_hessians(sparsity, tmp_path):
    block, hessian = 2 * (4 * 1024**2 + 3 * 1024 * 2816), 4 * 2816**2
    assert peak(tmp_path, shape(1024, 2816, 1), "bfloat16", {"sparsity": sparsity}, 1, None) < 1.2 * (block + 2 * hessian) + WORK


def test_memory_without_the_activations(tmp_path):
    """Where they wait on disk they are gone from the peak."""
    count, activations = 64, 64 * 512 * 1024 * 2
    found = [peak(tmp_path / name, shape(1024, 256, 1), "bfloat16", {"sparsity": "2:4"}, count, limit) for name, limit in (("kept", None), ("moved", 0))]
    assert found[0] - found[1] > 0.8 * activations
