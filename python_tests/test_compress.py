"""What is compressed and why not, the report's numbers against the formulas, estimate, load, set_activations."""

import json

import pytest
import torch
from formats_table import FORMATS, mask_for
from torch import nn
from transformers import AutoModelForMaskedLM, BertConfig
from zoo import TIED, ZOO, dense, logits

import calora_ext as cx
from calora_ext.adapters import add_adapter
from calora_ext.lowrank import Factors
from calora_ext.policy import plan

each_model = pytest.mark.parametrize("name", ZOO)


@each_model
@pytest.mark.parametrize("embeddings", [None, "int8"])
def test_coverage_accounts_for_every_byte(name, embeddings):
    model = dense(name)
    stored = {p.data_ptr(): p for p in model.parameters()}.values()
    coverage = plan(model, cx.Recipe(embeddings=embeddings))
    assert coverage.parameters == sum(p.numel() for p in stored)
    assert coverage.dense_nbytes == sum(p.nbytes for p in stored)
    cx.compress(model, cx.Recipe(embeddings=embeddings))
    buffers = sum(b.nbytes for b in model.buffers() if b.dtype == torch.uint8)
    assert coverage.nbytes == sum(p.nbytes for p in model.parameters()) + buffers
    for entry in coverage.entries:
        assert (entry.format is not None) == (entry.nbytes != entry.dense_nbytes or (entry.role == "tied" and embeddings is not None))
    rows = coverage.rows()
    assert sum(r["bytes"] for r in rows) == coverage.nbytes and sum(r["parameters"] for r in rows) == coverage.parameters
    text = str(coverage)
    assert all(r["modules"].replace("|", "") in text for r in rows) and f"{coverage.nbytes:,}" in text


def test_an_adapter_on_the_dense_layers_is_not_dropped_silently():
    model, path = dense("llama"), "model.layers.0.mlp.up_proj"
    out_features, in_features = model.get_submodule(path).weight.shape
    add_adapter(model, "a", lora={path: Factors(torch.randn(2, in_features), torch.randn(out_features, 2), 1.0)})
    with pytest.raises(cx.CaloraError, match="delete_adapter"):
        cx.compress(model)
    cx.delete_adapter(model, "a")
    cx.compress(model)


def test_every_reason_is_given():
    reasons = lambda model, recipe=None: {r["modules"]: r["reason"] for r in plan(model, recipe or cx.Recipe()).rows()}  # noqa: E731
    mixtral = reasons(dense("mixtral"))
    assert mixtral["model.layers.*.mlp.experts.gate_up_proj"] == "fused experts: not covered"
    assert mixtral["model.layers.*.self_attn.q_proj"] == "" and mixtral["model.norm.weight"] == "vector"
    assert reasons(dense("bert"))["classifier"] == "head or router"
    assert reasons(dense("qwen2"))["lm_head"] == "tied to model.embed_tokens"
    assert reasons(dense("llama"), cx.Recipe(lm_head=None))["lm_head"] == "lm_head=None"
    assert reasons(dense("llama"), cx.Recipe(skip=["down"]))["model.layers.*.mlp.down_proj"] == "skip='down'"

    model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "shared_expert_gate": nn.Linear(64, 1), "gate_proj": nn.Linear(64, 64)})
    found = reasons(model)
    assert found["attention.out_proj"] == "NonDynamicallyQuantizableLinear is not a plain nn.Linear"
    assert found["shared_expert_gate"] == "head or router" and found["gate_proj"] == ""


def test_linear_layers_that_share_a_weight_stay_dense():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    coverage = plan(model, cx.Recipe())
    assert list(coverage.formats) == ["c"] and coverage.parameters == sum(p.numel() for p in model.parameters())


def test_what_cannot_be_done_is_refused():
    with pytest.raises(cx.CaloraError, match="'nothing' matches no layer"):
        cx.compress(dense("llama"), cx.Recipe(skip=["nothing"]))
    with pytest.raises(cx.CaloraError, match="nothing to compress"):
        cx.compress(dense("llama"), cx.Recipe(skip=["."]))
    with pytest.raises(cx.CaloraError, match="expected a transformers model"):
        cx.compress(nn.Linear(3, 4))

    class Scaled(nn.Embedding):
        pass

    model = dense("llama")
    model.model.embed_tokens = Scaled(97, 64)
    with pytest.raises(cx.CaloraError, match="Scaled that does more"):
        cx.compress(model, cx.Recipe(embeddings="int8"))


def test_report_holds_the_errors_of_the_formula():
    model, original = dense("gpt2"), dense("gpt2")
    report = cx.compress(model, cx.Recipe(group_size=32))
    assert set(report.errors) == set(report.coverage.formats)
    for name, error in report.errors.items():
        weight = original.get_submodule(name).weight.detach().double()
        weight = weight.t() if type(original.get_submodule(name)).__name__ == "Conv1D" else weight
        want = (weight - model.get_submodule(name).decode().double()).norm() / weight.norm()
        assert error == pytest.approx(want.item(), rel=1e-5) and 0.01 < error < 0.2
    assert report.bytes_after == report.coverage.nbytes < report.bytes_before / 3
    json.dumps(report.to_dict())
    assert "times smaller" in str(report) and "transformer.h.*.attn.c_attn" in str(report)


@each_model
def test_estimate_is_what_compress_does(name, tmp_path):
    model = dense(name)
    model.save_pretrained(tmp_path)
    recipe = cx.Recipe(group_size=32, embeddings="int8" if name in TIED else None)
    guess = cx.estimate(tmp_path, recipe)
    assert guess.to_dict() == cx.compress(model, recipe).coverage.to_dict()


def test_estimate_reads_the_dtype_and_refuses_what_it_cannot_build(tmp_path):
    dense("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert cx.estimate(tmp_path).dense_nbytes == sum(2 * p.numel() for p in dense("llama").parameters())
    with pytest.raises(cx.CaloraError, match=r"not a model directory|cannot be read"):
        cx.estimate(tmp_path / "nowhere")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(cx.CaloraError, match="cannot build"):
        cx.estimate(tmp_path)


def test_load_takes_dense_directories_and_names_what_it_does_not_know(tmp_path):
    model = dense("bert")
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(cx.load(tmp_path / "dense"), "bert"), logits(model, "bert"))
    config = BertConfig(**{k: getattr(ZOO["bert"][0], k) for k in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")}, num_attention_heads=4)
    masked = AutoModelForMaskedLM.from_config(config)
    masked.save_pretrained(tmp_path / "masked")
    with pytest.raises(cx.CaloraError, match="'BertForMaskedLM'"):
        cx.load(tmp_path / "masked")


def test_masked_lm_head_with_a_tied_matrix_and_a_bias(tmp_path):
    """BERT's decoder shares the word embeddings and has a bias of its own, which is tied too."""
    config = BertConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4)
    model = AutoModelForMaskedLM.from_config(config).eval()
    nn.init.normal_(model.cls.predictions.bias)
    for embeddings in (None, "int8"):
        small = AutoModelForMaskedLM.from_config(config).eval()
        small.load_state_dict(model.state_dict())
        cx.compress(small, cx.Recipe(embeddings=embeddings))
        small.save_pretrained(tmp_path / str(embeddings))
        loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path / str(embeddings), output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(logits(loaded, "bert"), logits(small, "bert"))


def test_set_activations_is_felt_and_saved(tmp_path):
    model = dense("llama")
    cx.compress(model)
    rounded = logits(model, "llama")
    cx.set_activations(model, "exact")
    exact = logits(model, "llama")
    assert not torch.equal(rounded, exact)
    model.save_pretrained(tmp_path)
    loaded = cx.load(tmp_path)
    assert torch.equal(logits(loaded, "llama"), exact)
    cx.set_activations(loaded, "int8")
    assert torch.equal(logits(loaded, "llama"), rounded)
    with pytest.raises(cx.CaloraError, match="unknown activations"):
        cx.set_activations(model, "fp8")
    with pytest.raises(cx.CaloraError, match="no compressed layer"):
        cx.set_activations(dense("llama"), "int8")


def test_exact_activations_equal_the_dense_model_with_decoded_weights():
    model, twin = dense("opt"), dense("opt")
    cx.compress(model, cx.Recipe(activations="exact"))
    for name, module in model.named_modules():
        if isinstance(module, cx.CompressedLinear):
            twin.get_submodule(name).weight.data = module.decode()
    torch.testing.assert_close(logits(model, "opt"), logits(twin, "opt"), rtol=1e-4, atol=1e-4)


def test_one_layer_by_recipe():
    linear = nn.Linear(96, 40)
    layer = cx.CompressedLinear.from_linear(linear, cx.Recipe(weights="int8", activations="exact"))
    assert layer.format == cx.WeightFormat("int8") and layer.activations == "exact"
    assert torch.equal(layer.packed, cx.CompressedLinear.from_linear(linear, cx.WeightFormat("int8")).packed)
    with pytest.raises(cx.CaloraError, match="needs calibration"):
        cx.CompressedLinear.from_linear(linear, cx.Recipe(rounding="gptq"))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rounding_in_pieces_changes_nothing(fmt, monkeypatch):
    weight = torch.randn(100, 150)
    mask = mask_for(fmt, weight.shape)
    whole = fmt.pack(weight, mask)
    monkeypatch.setattr("calora_ext.formats.layout.CHUNK", 1000)
    assert all(torch.equal(t, whole[name]) for name, t in fmt.pack(weight, mask).items())
