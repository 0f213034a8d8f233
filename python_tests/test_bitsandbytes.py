"""NF4 checkpoints that transformers saved with bitsandbytes: read without it, compared with what it dequantises."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner
from zoo import dense, inputs, logits

import calora_ext as cx
from calora_ext.cli import app
from calora_ext.formats.nf4 import BOOK

functional = pytest.importorskip("bitsandbytes.functional")
LAYER = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module", params=[True, False], ids=["double", "single"])
def checkpoint(request, tmp_path_factory):
    """(directory, {module: the weight that bitsandbytes dequantises}); hidden size 64, so that rows of most matrices are whole blocks."""
    directory = tmp_path_factory.mktemp("bitsandbytes")
    dense("llama").save_pretrained(directory / "dense")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=request.param)
    model = AutoModelForCausalLM.from_pretrained(directory / "dense", quantization_config=four_bits, device_map="cpu")
    model.save_pretrained(directory / "nf4")
    layers = {name: m.weight for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(layers) == 14 and all(w.quant_state.nested == request.param for w in layers.values())
    return directory / "nf4", {name: dequantised(w) for name, w in layers.items()}


def dequantised(weight):
    """By bitsandbytes, block by block: its CPU kernel (0.50) takes the wrong scales where a row is no multiple of a block."""
    state, shape = weight.quant_state, weight.quant_state.shape
    state.shape = torch.Size((shape.numel() // 64, 64))
    return functional.dequantize_4bit(weight.data, state).float().view(shape)


def test_matrices_are_repacked_with_their_codes(checkpoint, tmp_path, caplog):
    directory, theirs = checkpoint
    with caplog.at_level(logging.WARNING):
        model = cx.load(directory)
    assert "12 NF4 matrices of bitsandbytes are repacked" in caplog.text and "2 more stay dense" in caplog.text
    assert not isinstance(model.lm_head, cx.CompressedLinear)  # as bitsandbytes left it
    for name, want in theirs.items():
        layer = model.get_submodule(name)
        if want.shape[1] % 64:  # blocks lie across rows
            torch.testing.assert_close(layer.weight.float(), want, rtol=1e-6, atol=1e-7)
            continue
        got = layer.decode()
        assert str(layer.format) == "nf4 g64"
        torch.testing.assert_close(got, want, rtol=1 / 63, atol=0)
        assert (got - want).norm() < 0.01 * want.norm()
        book = torch.tensor(BOOK)
        theirs_codes = want.view(-1, 64) / want.view(-1, 64).abs().amax(1, keepdim=True)  # the largest has the code of 1 or -1
        assert torch.equal(theirs_codes.unsqueeze(-1).sub(book).abs().argmin(-1).view(want.shape), ours_codes(layer))
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(cx.load(tmp_path / "ours"), "llama"), logits(model, "llama"))


def ours_codes(layer):
    packed = {name: getattr(layer, name) for name in layer.format.tensors(layer.in_features, layer.out_features)}
    return layer.format.unpack(packed, layer.in_features, layer.out_features).codes.long()


def test_it_loads_dense_when_asked(checkpoint):
    directory, theirs = checkpoint
    model = cx.load(directory, quantization_config=None)
    assert not hasattr(model.config, "quantization_config")
    for name, want in theirs.items():
        torch.testing.assert_close(model.get_submodule(name).weight.float(), want, rtol=1e-6, atol=1e-7)
    other = cx.load(directory, quantization_config=cx.CaloraConfig(cx.Recipe(weights="int8")))
    assert str(other.get_submodule(LAYER).format) == "int8"
    with torch.no_grad():
        assert torch.isfinite(model(**inputs("llama")).logits).all()


def test_the_command_compresses_it(checkpoint, tmp_path):
    directory, _ = checkpoint
    result = CliRunner().invoke(app, ["compress", str(directory), "-o", str(tmp_path / "out"), "--weights", "nf4"])
    assert result.exit_code == 0, result.output
    made, loaded = cx.load(tmp_path / "out"), cx.load(directory)
    assert str(made.lm_head.format) == "int8"
    assert torch.equal(made.get_submodule(LAYER).decode(), loaded.get_submodule(LAYER).decode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.weight.absmax"), "absmax is missing"),
        (lambda t: t.pop(f"{LAYER}.weight"), "is missing"),
        (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:-1].clone()}), "a 64 x 64 matrix in blocks of 64 has 2048"),
        (lambda t: t[f"{LAYER}.weight.quant_map"].mul_(0.9), "not the code book"),
        (lambda t: t[f"{LAYER}.weight.quant_state.bitsandbytes__nf4"].fill_(123), "quant_state.bitsandbytes__nf4 is damaged"),
        (lambda t: [t[k].fill_(torch.inf) for k in (f"{LAYER}.weight.absmax", f"{LAYER}.weight.nested_absmax") if t.get(k, torch.zeros(1, dtype=torch.uint8)).is_floating_point()], "not finite"),
        (lambda t: t.update({f"{LAYER}.weight.quant_state.bitsandbytes__fp4": t.pop(f"{LAYER}.weight.quant_state.bitsandbytes__nf4")}), "fp4, which is not read"),
        (lambda t: t.update({f"{LAYER}.SCB": torch.zeros(64)}), "int8, which is not read"),
        (lambda t: [t.pop(k) for k in list(t) if "quant_state" in k], "no weight has the quantisation state"),
    ],
    ids=["absmax", "weight", "short", "book", "state", "infinite", "fp4", "int8", "none"],
)  # fmt: skip
def test_what_does_not_fit_together_is_one_sentence(checkpoint, change, message, tmp_path):
    directory = tmp_path / "bad"
    shutil.copytree(checkpoint[0], directory)
    tensors = {name: t.clone() for name, t in load_file(directory / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(cx.CaloraError, match=message):
        cx.load(directory)


@pytest.mark.parametrize("state", [{"shape": [64, 1 << 60]}, {"shape": [-64, 64]}, {"shape": [64]}, {"blocksize": 0}, {"blocksize": "64"}, {"blocksize": 48}], ids=str)
def test_a_state_that_lies_about_sizes_is_refused(checkpoint, state, tmp_path):
    directory = tmp_path / "bad"
    shutil.copytree(checkpoint[0], directory)
    tensors = {name: t.clone() for name, t in load_file(directory / "model.safetensors").items()}
    key = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
    said = json.loads(bytes(tensors[key].tolist())) | state
    tensors[key] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(cx.CaloraError, match="is damaged"):
        cx.load(directory)
