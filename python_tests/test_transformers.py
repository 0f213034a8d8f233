"""The transformers quantizer on tiny random models of eight architectures: round trips, compress while loading, copies."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertForSequenceClassification
from zoo import TIED, ZOO, dense, inputs, logits

import calora_ext as cx
from calora_ext.compression.replace import compressed_modules
from calora_ext.embedding import TiedLinear
from calora_ext.integrations.transformers import METHOD, CaloraQuantizer
from calora_ext.io.checkpoint import read_header

each_model = pytest.mark.parametrize("name", ZOO)
each_head = pytest.mark.parametrize("embeddings", [None, "int8", "int4"])


def same_packed(a, b):
    ours, theirs = compressed_modules(a), compressed_modules(b)
    assert ours.keys() == theirs.keys() and ours
    for name, module in ours.items():
        for tensor, value in module.packed_tensors().items():
            assert torch.equal(value, theirs[name].packed_tensors()[tensor]), f"{name}.{tensor}"


@each_head
@each_model
def test_round_trip_is_bit_exact(name, embeddings, tmp_path):
    model = dense(name)
    before = model.get_memory_footprint()
    report = cx.compress(model, cx.Recipe(embeddings=embeddings))
    assert model.get_memory_footprint() < before
    want = logits(model, name)
    model.save_pretrained(tmp_path)
    assert not read_header(tmp_path / "model.safetensors").misaligned
    loaded, info = ZOO[name][1].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    same_packed(model, loaded)
    assert torch.equal(logits(loaded, name), want)
    assert loaded.get_memory_footprint() == model.get_memory_footprint()
    assert report.bytes_after <= model.get_memory_footprint() <= report.bytes_after + 2048  # rotary tables and the like
    assert torch.equal(logits(cx.load(tmp_path), name), want)


@each_head
@each_model
def test_compressing_while_loading_equals_compressing(name, embeddings, tmp_path):
    recipe = cx.Recipe(embeddings=embeddings, skip=["k_proj|k$|query"] if name in ("llama", "t5", "bert") else [])
    model = dense(name)
    model.save_pretrained(tmp_path / "dense")
    config = cx.CaloraConfig(recipe)
    loaded, info = ZOO[name][1].from_pretrained(tmp_path / "dense", quantization_config=config, output_loading_info=True)
    assert not any(info.values()), info
    cx.compress(model, recipe)
    same_packed(model, loaded)
    assert torch.equal(logits(loaded, name), logits(model, name))
    loaded.save_pretrained(tmp_path / "small")
    assert torch.equal(logits(cx.load(tmp_path / "small"), name), logits(model, name))
    assert loaded.config.quantization_config.recipe == model.config.quantization_config.recipe
    assert not config.modules, "the caller's config was changed"


@pytest.mark.parametrize(
    "recipe",
    [
        cx.Recipe(symmetric=False, group_size=32), cx.Recipe(group_size=-1, lm_head=None), cx.Recipe(weights="int8", lm_head="int4"),
        cx.Recipe(weights="bf16", lm_head="bf16"), cx.Recipe(weights="nf4", lm_head="nf4", embeddings="nf4"), cx.Recipe(symmetric=False, lm_head="nf4"),
        cx.Recipe(weights="nf4", sparsity="2:4"), cx.Recipe(weights="nf4", sparsity=0.5), cx.Recipe(symmetric=False, embeddings="int4", activations="exact"),
        cx.Recipe(sparsity="2:4"), cx.Recipe(weights="int8", sparsity="2:4", activations="exact"), cx.Recipe(weights="bf16", sparsity="2:4"),
        cx.Recipe(sparsity=0.6), cx.Recipe(weights="int8", sparsity=0.7), cx.Recipe(weights="bf16", sparsity=0.5, skip=["down"]),
    ],
    ids=lambda r: f"{r.weights}-{r.group_size}-{r.symmetric}-{r.lm_head}-{r.sparsity}",
)  # fmt: skip
def test_every_format_survives(recipe, tmp_path):
    model = dense("llama")
    model.save_pretrained(tmp_path / "dense")
    report = cx.compress(model, recipe)
    packed_while_loading = ZOO["llama"][1].from_pretrained(tmp_path / "dense", quantization_config=cx.CaloraConfig(recipe))
    same_packed(model, packed_while_loading)
    estimated = cx.estimate(tmp_path / "dense", recipe)
    if recipe.sparsity in (None, "2:4"):
        assert estimated.to_dict() == report.coverage.to_dict()
    assert estimated.nbytes == pytest.approx(report.coverage.nbytes, rel=0.03)
    model.save_pretrained(tmp_path)
    loaded = cx.load(tmp_path)
    same_packed(model, loaded)
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    assert loaded.config.quantization_config.recipe == recipe.resolve(calibrated=False)
    assert isinstance(loaded.lm_head, cx.CompressedLinear) == (recipe.lm_head is not None)


@each_model
def test_bf16_load_keeps_the_packed_bytes(name, tmp_path):
    model = dense(name)
    cx.compress(model, cx.Recipe(embeddings="int8"))
    model.save_pretrained(tmp_path)
    loaded = ZOO[name][1].from_pretrained(tmp_path, dtype=torch.bfloat16)
    same_packed(model, loaded)
    layer = next(m for m in loaded.modules() if isinstance(m, cx.CompressedLinear))
    assert layer.weight.dtype == torch.bfloat16 and (layer.bias is None or layer.bias.dtype == torch.bfloat16)
    ours = logits(loaded, name)
    assert ours.dtype == torch.bfloat16
    buffers = {key: value for key, value in model.named_buffers() if value.is_floating_point()}
    model.to(torch.bfloat16)
    for key, value in buffers.items():  # rotary tables, which loading keeps in float32
        module, _, leaf = key.rpartition(".")
        model.get_submodule(module)._buffers[leaf] = value
    assert torch.equal(ours, logits(model, name))


def test_config_json_says_what_was_done(tmp_path):
    model = dense("llama")
    cx.compress(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == METHOD and written["layout_version"] == 1
    assert written["weights"] == "int4" and written["rounding"] == "rtn"
    assert written["modules"] == {"lm_head": {"values": "int8", "group_size": -1, "symmetric": True, "pattern": "dense"}}
    size = (tmp_path / "model.safetensors").stat().st_size
    assert written["files"]["model.safetensors"]["size"] == size and len(written["files"]["model.safetensors"]["blake2b"]) == 64
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_flags_that_trainer_and_generate_read():
    model = dense("llama")
    cx.compress(model)
    assert model.is_quantized and model.quantization_method == METHOD
    quantizer = model.hf_quantizer
    assert quantizer.is_trainable and quantizer.is_qat_trainable and quantizer.is_compileable and quantizer.is_serializable()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "opt"])
def test_generation_is_the_same_with_every_cache(name):
    model = dense(name)
    cx.compress(model, cx.Recipe(embeddings="int8" if name in TIED else None))
    ids = inputs(name)["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False}
    dynamic = model.generate(ids, **settings)
    assert torch.equal(dynamic, model.generate(ids, cache_implementation="static", disable_compile=True, **settings))
    assert torch.equal(dynamic, model.generate(ids, use_cache=False, **settings))
    assert model.generate(ids, num_beams=2, **settings).shape[0] == 2


def test_a_tied_matrix_is_packed_once(tmp_path):
    model = dense("qwen2")
    cx.compress(model, cx.Recipe(embeddings="int8"))
    model.save_pretrained(tmp_path)
    assert isinstance(model.lm_head, TiedLinear) and model.lm_head.packed is model.model.embed_tokens.packed
    names = read_header(tmp_path / "model.safetensors").tensors
    assert "model.embed_tokens.packed" in names and not any(name.startswith("lm_head") for name in names)
    loaded = cx.load(tmp_path)
    assert loaded.lm_head.packed.data_ptr() == loaded.model.embed_tokens.packed.data_ptr()
    loaded.tie_weights()  # what other libraries call at will
    assert torch.equal(logits(loaded, "qwen2"), logits(model, "qwen2"))


@pytest.mark.parametrize("name", ["llama", "qwen2", "t5"])
def test_copies(name):
    model = dense(name)
    cx.compress(model, cx.Recipe(embeddings="int8"))
    want = logits(model, name)
    twin = copy.deepcopy(model)
    same_packed(model, twin)
    assert torch.equal(logits(twin, name), want)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), name), want)


def test_half_is_refused_by_transformers_and_to_is_not():
    model = dense("llama")
    cx.compress(model)
    with pytest.raises(ValueError, match="not supported for quantized"):
        model.half()
    assert logits(model.to(torch.float16), "llama").dtype == torch.float16


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_resized_embeddings_become_dense_and_survive(name, tmp_path):
    model = dense(name)
    cx.compress(model, cx.Recipe(activations="exact"))
    want = logits(model, name)
    model.resize_token_embeddings(120)
    got = logits(model, name)
    assert got.shape[-1] == 120
    torch.testing.assert_close(got[..., :97], want, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(cx.load(tmp_path), name), got)


def test_compressed_embeddings_cannot_be_resized():
    model = dense("qwen2")
    cx.compress(model, cx.Recipe(embeddings="int8"))
    want = logits(model, "qwen2")
    with pytest.raises(cx.CaloraError, match="embeddings=None"):
        model.resize_token_embeddings(120)
    assert torch.equal(logits(model, "qwen2"), want)


def test_other_heads_on_one_backbone(tmp_path):
    model = dense("llama")
    cx.compress(model, cx.Recipe(embeddings="int4"))
    model.save_pretrained(tmp_path)
    backbone, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == {"lm_head.packed"}
    with torch.no_grad():
        hidden = backbone(**inputs("llama")).last_hidden_state
        assert torch.equal(hidden, model.model(**inputs("llama")).last_hidden_state)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"} and type(classifier.score) is torch.nn.Linear
    backbone.save_pretrained(tmp_path / "backbone")
    restored, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "backbone", output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"} and not info["unexpected_keys"]
    same_packed(backbone, restored.model)


def test_bert_classifier_stays_dense_and_t5_wo_does_not():
    bert, t5 = dense("bert"), dense("t5")
    cx.compress(bert), cx.compress(t5)
    assert isinstance(bert, BertForSequenceClassification) and type(bert.classifier) is torch.nn.Linear
    assert isinstance(bert.bert.pooler.dense, cx.CompressedLinear)
    assert isinstance(t5.encoder.block[0].layer[1].DenseReluDense.wo, cx.CompressedLinear)


def test_shards_are_aligned_and_replace_each_other(tmp_path):
    model = dense("llama")
    cx.compress(model)
    want = logits(model, "llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and not any(read_header(path).misaligned for path in shards)
    loaded = cx.load(tmp_path)
    assert torch.equal(logits(loaded, "llama"), want)
    # Over the very files that it is mapped from, in one shard: nothing of the old save may stay.
    loaded.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]
    assert torch.equal(logits(loaded, "llama"), want)
    assert torch.equal(logits(cx.load(tmp_path), "llama"), want)


@pytest.mark.skipif("avx2" not in cx.ops.native.available(), reason="needs a rung that runs sparse weights as dense ones")
@pytest.mark.parametrize("recipe", [{"sparsity": 0.6}, {"weights": "nf4", "sparsity": "2:4"}], ids=str)
def test_sparse_layers_that_run_as_dense_ones_are_announced(recipe, tmp_path, caplog):
    model = dense("llama")
    cx.compress(model, cx.Recipe(**recipe, lm_head=None, activations="exact"))
    model.save_pretrained(tmp_path)
    before = cx.ops.native.isa()
    cx.ops.native.set_isa("avx2")
    try:
        loaded = cx.load(tmp_path)
        assert "14 sparse layers run as dense weights, which are faster on avx2" in caplog.text
        on_avx2 = logits(loaded, "llama")
        loaded.save_pretrained(tmp_path / "again")
    finally:
        cx.ops.native.set_isa(before)
    torch.testing.assert_close(on_avx2, logits(model, "llama"), rtol=1e-4, atol=1e-4)
    same_packed(model, cx.load(tmp_path / "again"))


def test_a_file_without_alignment_is_copied(tmp_path, caplog):
    model = dense("llama")
    cx.compress(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :])
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["files"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_header(path).misaligned
    loaded = cx.load(tmp_path)
    assert "not aligned" in caplog.text
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    loaded.save_pretrained(tmp_path)
    assert not read_header(path).misaligned


def test_compressing_twice_is_refused(tmp_path):
    model = dense("llama")
    cx.compress(model)
    with pytest.raises(cx.CaloraError, match="already"):
        cx.compress(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(cx.CaloraError, match="already"):
        cx.estimate(tmp_path)


def test_nan_in_the_dense_model_is_one_sentence(tmp_path):
    model = dense("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(cx.CaloraError, match=r"layers\.1\.mlp\.up_proj: .*NaN"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=cx.CaloraConfig())
    with pytest.raises(cx.CaloraError, match=r"layers\.1\.mlp\.up_proj: .*NaN"):
        cx.compress(model)


def test_gptq_and_other_devices_are_refused_while_loading(tmp_path):
    dense("llama").save_pretrained(tmp_path)
    with pytest.raises(cx.CaloraError, match="needs calibration"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=cx.CaloraConfig(rounding="gptq"))
    with pytest.raises(cx.CaloraError, match="packed on the CPU"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=cx.CaloraConfig(), device_map="cuda:0")


@pytest.mark.parametrize("built_with_cuda", [False, True])
def test_where_packed_models_may_be_loaded(built_with_cuda, monkeypatch):
    monkeypatch.setattr(cx.ops.native, "cuda_architectures", lambda: "90" if built_with_cuda else "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: built_with_cuda)
    quantizer = CaloraQuantizer(cx.CaloraConfig(), pre_quantized=True)
    for fine in (None, "auto", "balanced", "cpu", {"": "cpu"}):
        quantizer.validate_environment(device_map=fine)
    for device_map in (0, "cuda:1", torch.device("cuda"), {"a": 0, "b": 1, "c": "cuda:0"}):
        if built_with_cuda:
            quantizer.validate_environment(device_map=device_map)
            assert quantizer.update_device_map(device_map) == device_map
        else:
            with pytest.raises(cx.CaloraError, match="no CUDA kernels"):
                quantizer.validate_environment(device_map=device_map)
    with pytest.raises(cx.CaloraError, match="another place" if built_with_cuda else "no CUDA kernels"):
        quantizer.validate_environment(device_map={"a": "cpu", "b": "disk"})
    with pytest.raises(cx.CaloraError, match="not on both" if built_with_cuda else "no CUDA kernels"):
        quantizer.validate_environment(device_map={"a": 0, "b": "cpu"})
    assert quantizer.update_device_map("auto") == ("auto" if built_with_cuda else {"": "cpu"})


def test_bad_configs_are_refused():
    for fields in ({"quant_method": "gptq"}, {"colour": 1}, {"layout_version": 99}, {"modules": [1]}, {"modules": {"a": {"values": "x"}}}):
        with pytest.raises(cx.CaloraError):
            cx.CaloraConfig(**fields)
    with pytest.raises(cx.CaloraError, match="one Recipe"):
        cx.CaloraConfig({"weights": "int4"})
    config = cx.CaloraConfig(cx.Recipe(group_size=32), modules={"lm_head": cx.WeightFormat("int8")})
    assert cx.CaloraConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "imports",
    [
        "import calora_ext; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import calora_ext",
        "import transformers.modeling_utils; import calora_ext; from transformers import AutoModelForCausalLM",
    ],
)
def test_either_import_order_registers(imports, tmp_path):
    model = dense("llama")
    cx.compress(model)
    model.save_pretrained(tmp_path)
    code = f"{imports}\nm = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\nprint(type(m.model.layers[0].mlp.up_proj).__name__)"
    assert run(code).split()[-1] == "CompressedLinear"


def test_importing_the_package_imports_neither_library():
    out = run(
        "import sys, time, torch\nstarted = time.perf_counter()\nimport calora_ext\n"
        "print([m for m in ('transformers', 'peft', 'accelerate') if m in sys.modules], calora_ext.Recipe().weights)\n"
        "print([m for m in ('transformers', 'peft', 'accelerate') if m in sys.modules])"
    )
    assert out.splitlines() == ["[] int4", "[]"]


def test_compiled_without_graph_breaks():
    model = dense("qwen2")
    cx.compress(model, cx.Recipe(embeddings="int8"))
    ids = inputs("qwen2")["input_ids"]
    forward = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(forward(ids), model(ids, use_cache=False).logits)


def test_trainer_accepts_the_model_and_hub_uploads_go_through_the_same_save(tmp_path, monkeypatch):
    from transformers.trainer_utils import validate_quantization_for_training

    model = dense("llama")
    cx.compress(model)
    validate_quantization_for_training(model)
    asked = []
    monkeypatch.setattr(type(model), "push_to_hub", lambda self, **kwargs: asked.append(kwargs))
    model.save_pretrained(tmp_path / "name", push_to_hub=True, commit_message="first")
    assert asked == [{"repo_id": "name", "commit_message": "first"}] and (tmp_path / "name" / "config.json").exists()


def test_dense_models_save_as_ever(tmp_path):
    model = dense("llama")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), "llama"), logits(model, "llama"))
