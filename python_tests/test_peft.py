"""Stock PEFT on compressed layers, held against stock PEFT on the dense model with the decoded weights."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from _tiny import INT4, compressed, dense_equivalent, gpt2, ids, llama, logits
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import calora_ext as cx
from calora_ext import CaloraError, CompressedEmbedding, CompressedLinear, WeightFormat
from calora_ext.integrations.peft import CaloraLoraLinear
from calora_ext.io.recovery import fingerprint

sparse_too = pytest.mark.parametrize("pair", [INT4, WeightFormat("int4", 32, pattern="2:4")], ids=str, indirect=True)
Q = "model.layers.0.self_attn.q_proj"


def config(**kwargs):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **kwargs})


@pytest.fixture
def pair(request):
    """A compressed model and its dense equivalent."""
    small = compressed(llama(), getattr(request, "param", INT4))
    return small, dense_equivalent(small, llama())


@pytest.fixture
def adapters(tmp_path):
    """Two adapters made by stock PEFT on the dense model."""
    for seed, (name, kwargs) in enumerate({"a": {"use_rslora": True, "rank_pattern": {"down_proj": 2}}, "b": {"r": 6}}.items()):
        torch.manual_seed(seed)
        get_peft_model(llama(), config(**kwargs)).save_pretrained(tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def same_adapter(small, dense, **kwargs):
    """get_peft_model on both, with equal random adapters."""
    models = []
    for model in (small, dense):
        torch.manual_seed(7)
        models.append(get_peft_model(model, config(**kwargs)).eval())
    lora = {k: v for k, v in models[1].state_dict().items() if "lora_" in k}
    assert lora.keys() == {k for k in models[0].state_dict() if "lora_" in k}
    models[0].load_state_dict(lora, strict=False)
    return models


@sparse_too
@pytest.mark.parametrize("route", ["from_pretrained", "load_adapter"])
def test_loading_an_adapter_of_the_dense_model(pair, adapters, route):
    small, dense = pair
    want = logits(PeftModel.from_pretrained(copy.deepcopy(dense), adapters[0]))
    base = logits(small)
    if route == "from_pretrained":
        model = PeftModel.from_pretrained(small, adapters[0])
        layer = model.get_submodule("base_model.model." + Q)
    else:
        model = small
        model.load_adapter(adapters[0])
        layer = model.get_submodule(Q)
    assert type(layer) is CaloraLoraLinear and type(layer.base_layer) is CompressedLinear
    close(logits(model), want)
    if route == "from_pretrained":
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
    else:
        model.disable_adapters()
        assert torch.equal(logits(model), base)
        model.enable_adapters()
        close(logits(model), want)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"target_modules": "all-linear"}, {"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.1}, {"target_modules": ["q_proj", "lm_head"]}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.lora_bias=True")
def test_get_peft_model_equals_the_dense_one(pair, kwargs):
    small, dense = same_adapter(*pair, **kwargs)
    close(logits(small), logits(dense))
    small.train(), dense.train()
    if "lora_dropout" not in kwargs:
        grads = []
        for model in (small, dense):
            model(ids(), labels=ids()).loss.backward()
            grads.append({n: p.grad for n, p in model.named_parameters() if "lora_" in n and p.grad is not None})
        assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 3
        for name, grad in grads[1].items():
            close(grads[0][name], grad, 1e-4)


def test_plain_lora_runs_as_one_fused_operator(pair, adapters, monkeypatch):
    from peft.tuners import lora

    monkeypatch.setattr(lora.Linear, "forward", lambda *a, **k: pytest.fail("fell back to separate matrix products"))
    model = PeftModel.from_pretrained(pair[0], adapters[0], is_trainable=True)
    logits(model)
    model.train()
    model(ids(), labels=ids()).loss.backward()


def test_several_adapters(pair, adapters):
    models = []
    for model in pair:
        peft = PeftModel.from_pretrained(model, adapters[0], "a")
        peft.load_adapter(adapters[1], "b")
        models.append(peft)
    small, dense = models
    for names in ("a", "b", ["a", "b"], "a"):
        for model in models:
            model.base_model.set_adapter(names)
        close(logits(small), logits(dense))
    mixed = {"adapter_names": ["a", "b"]}
    with torch.no_grad():
        close(small(ids(), **mixed).logits, dense(ids(), **mixed).logits)
    for model in models:
        model.delete_adapter("a")
        model.set_adapter("b")
    close(logits(small), logits(dense))


def test_prepared_operands_follow_the_weights(pair):
    small, dense = same_adapter(*pair)
    close(logits(small), logits(dense))
    for model in (small, dense):
        layer = model.get_submodule("base_model.model." + Q)
        with torch.no_grad():
            layer.lora_B["default"].weight.mul_(2)
    close(logits(small), logits(dense))
    for model in (small, dense):
        model.get_submodule("base_model.model." + Q).set_scale("default", 3.0)
    close(logits(small), logits(dense))


@pytest.mark.parametrize("route", ["get_peft_model", "add_adapter"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_lowers_the_loss_and_stock_peft_loads_the_result_on_the_dense_model(tmp_path, route, dropout):
    small = compressed(llama(), exact=False)
    settings = config(init_lora_weights=True, lora_dropout=dropout, target_modules="all-linear")
    if route == "get_peft_model":
        model = get_peft_model(small, settings)
    else:
        model = small
        model.add_adapter(settings)
    packed = {k: v.clone() for k, v in small.state_dict().items() if k.endswith("packed")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    torch.manual_seed(0)
    losses = []
    for _ in range(10):
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert packed and all(torch.equal(v, small.state_dict()[k]) for k, v in packed.items())
    model.save_pretrained(tmp_path / "trained")
    tensors = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    dense = PeftModel.from_pretrained(llama(), tmp_path / "trained")
    state = dense.state_dict()
    assert len(tensors) == 28 and all(torch.equal(v, state[k.replace(".weight", ".default.weight")]) for k, v in tensors.items())
    native = compressed(llama(), exact=False)
    cx.load_adapter(native, tmp_path / "trained", "a")
    cx.set_adapter(native, "a")
    model.eval()
    close(logits(native), logits(model), 1e-6)


@sparse_too
def test_merge_rounds_with_a_warning_and_unmerge_is_exact(pair):
    small, _ = same_adapter(*pair)
    before = logits(small)
    layer = small.get_submodule("base_model.model." + Q)
    wanted = layer.base_layer.decode() + layer.get_delta_weight("default")
    fmt = layer.base_layer.format
    mask = fmt.unpack(layer.base_layer.packed_tensors(), 32, 32).mask
    with pytest.warns(UserWarning, match=f"{fmt} weights rounds it"):
        small.merge_adapter()
    torch.testing.assert_close(layer.base_layer.decode(), INT4.decode(INT4.pack(wanted if mask is None else wanted * mask), 32, 32))
    delta = layer.get_delta_weight("default")
    assert layer.merge_error == pytest.approx(float((layer.base_layer.decode() - wanted).norm() / delta.norm()), rel=1e-4)
    merged = logits(small)
    assert not torch.equal(merged, before)
    small.unmerge_adapter()
    assert torch.equal(logits(small), before)
    small.merge_adapter()
    with small.disable_adapter():  # PEFT unmerges for that
        base = logits(small)
    assert torch.equal(base, logits(compressed(llama(), fmt)))


def test_merging_two_adapters_rounds_once(pair, adapters):
    small = compressed(llama(), WeightFormat("bf16"))
    peft = PeftModel.from_pretrained(small, adapters[0], "a")
    peft.load_adapter(adapters[1], "b")
    layer = peft.get_submodule("base_model.model." + Q)
    wanted = layer.base_layer.decode() + layer.get_delta_weight("a") + layer.get_delta_weight("b")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="merging LoRA into")  # bf16 loses too little to mention
        warnings.filterwarnings("ignore", message="Already following")
        peft.merge_adapter(["a"])
        peft.merge_adapter(["b"])
    assert torch.equal(layer.base_layer.decode(), wanted.bfloat16().float())


@pytest.mark.filterwarnings("ignore:merging LoRA")
def test_merge_and_unload_and_unload(pair, adapters):
    base = logits(pair[0])
    bare = PeftModel.from_pretrained(copy.deepcopy(pair[0]), adapters[0]).unload()
    assert torch.equal(logits(bare), base) and type(bare.get_submodule(Q)) is CompressedLinear
    small = PeftModel.from_pretrained(compressed(llama(), WeightFormat("bf16")), adapters[0])
    want = logits(small)
    merged = small.merge_and_unload(safe_merge=True)
    assert type(merged.get_submodule(Q)) is CompressedLinear
    close(logits(merged), want, 1e-2)


@pytest.mark.filterwarnings("ignore:merging LoRA")
def test_a_merge_that_fails_keeps_what_was_merged(pair, adapters):
    peft = PeftModel.from_pretrained(pair[0], adapters[0], "a")
    peft.load_adapter(adapters[1], "b")
    peft.merge_adapter(["a"])
    layer = peft.get_submodule("base_model.model." + Q)
    before = layer.base_layer.decode()
    with torch.no_grad():
        layer.lora_B["b"].weight.fill_(1e8)
    with pytest.raises(CaloraError, match="too large"):
        layer.merge(adapter_names=["b"])
    assert torch.equal(layer.base_layer.decode(), before) and layer.merged_adapters == ["a"]


@pytest.mark.filterwarnings("ignore:merging LoRA")
def test_a_merged_model_is_not_the_one_on_disk(tmp_path):
    model = llama()
    cx.compress(model, cx.Recipe(group_size=32))
    model.save_pretrained(tmp_path / "small")
    assert fingerprint(model)["quantization"]["files"]
    peft = get_peft_model(model, config())
    peft.merge_adapter()
    assert fingerprint(model)["quantization"]["files"] == {}
    peft.unmerge_adapter()
    assert fingerprint(model)["quantization"]["files"]
    merged = peft.merge_and_unload()
    assert fingerprint(merged)["quantization"]["files"] == {}
    merged.save_pretrained(tmp_path / "merged")
    assert fingerprint(merged) == fingerprint(cx.load(tmp_path / "merged"))


@pytest.mark.filterwarnings("ignore:.save_embedding_layers")
def test_a_packed_tied_head_is_not_merged_into():
    model = llama(tie_word_embeddings=True)
    cx.compress(model, cx.Recipe(embeddings="int8"))
    peft = get_peft_model(model, config(target_modules=["lm_head"]))
    before = logits(peft)
    with pytest.raises(CaloraError, match="shares its weight"):
        peft.merge_adapter()
    assert torch.equal(logits(peft), before)


@pytest.mark.filterwarnings("ignore:.lora_bias=True")
def test_merges_that_are_refused(pair):
    dora, _ = same_adapter(copy.deepcopy(pair[0]), pair[1], use_dora=True)
    with pytest.raises(CaloraError, match="variant"):
        dora.merge_adapter()
    bias = get_peft_model(pair[0], config(lora_bias=True))
    with pytest.raises(CaloraError, match="without bias"):
        bias.merge_adapter()


@pytest.mark.parametrize("init", ["pissa", "olora", "corda"])
def test_initialisations_that_rewrite_the_base_are_refused(pair, init):
    before = logits(pair[0])
    with pytest.raises(CaloraError, match="rewrites the base"):
        get_peft_model(pair[0], config(init_lora_weights=init))
    assert torch.equal(logits(pair[0]), before)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", True])
def test_initialisations_that_leave_the_base_work(pair, init):
    assert logits(get_peft_model(pair[0], config(init_lora_weights=init))).isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [
        IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
        LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False),
        AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_lora_weights=False),
    ],
    ids=lambda c: c.peft_type.value,
)
def test_other_methods_run_and_refuse_to_merge(pair, settings):
    models = []
    for model in pair:
        torch.manual_seed(0)
        models.append(get_peft_model(model, copy.deepcopy(settings)).eval())
    own = {k: v for k, v in models[1].state_dict().items() if any(s in k for s in ("lora_", "hada_", "ia3_"))}
    models[0].load_state_dict(own, strict=False)
    close(logits(models[0]), logits(models[1]))
    with pytest.raises(CaloraError, match="read-only"):
        models[0].merge_adapter()


def test_lora_on_compressed_embeddings(pair):
    small, dense = pair
    small.model.embed_tokens = CompressedEmbedding.from_embedding(small.model.embed_tokens, WeightFormat("int8"))
    dense.model.embed_tokens.weight.data = small.model.embed_tokens.decode()
    small, dense = same_adapter(small, dense, target_modules=["q_proj", "embed_tokens"])
    close(logits(small), logits(dense))
    with pytest.raises(CaloraError, match="cannot be changed"):
        small.merge_adapter()
    assert type(small.unload().model.embed_tokens) is CompressedEmbedding


def test_modules_to_save_of_packed_heads_and_embeddings(tmp_path):
    dense = llama()
    small = compressed(dense, skip=())
    small.model.embed_tokens = CompressedEmbedding.from_embedding(small.model.embed_tokens, WeightFormat("int8"))
    base = logits(small)
    model = get_peft_model(small, config(modules_to_save=["lm_head", "embed_tokens"], init_lora_weights=True))
    assert torch.equal(logits(model), base) or (logits(model) - base).abs().max() < 1e-5
    model(ids(), labels=ids()).loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.sub_(p.grad)
    assert (logits(model) - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.save_pretrained(tmp_path / "a")
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert saved["base_model.model.lm_head.weight"].shape == (97, 32) and not [k for k in saved if "packed" in k]
    for other in (compressed(dense, skip=()), compressed(dense)):
        close(logits(PeftModel.from_pretrained(other, tmp_path / "a")), logits(model))


def test_gpt2_conv1d(tmp_path):
    dense = gpt2()
    torch.manual_seed(0)
    get_peft_model(copy.deepcopy(dense), config(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)).save_pretrained(tmp_path / "a")
    small = compressed(dense, WeightFormat("bf16"))
    want = logits(PeftModel.from_pretrained(dense_equivalent(small, dense), tmp_path / "a"))
    model = PeftModel.from_pretrained(small, tmp_path / "a")
    close(logits(model), want)
    model.merge_adapter()
    close(logits(model), want, 3e-2)
    model.save_pretrained(tmp_path / "b")
    close(logits(PeftModel.from_pretrained(dense_equivalent(compressed(dense, WeightFormat("bf16")), dense), tmp_path / "b")), want)


def test_native_and_peft_adapters_do_not_mix(pair, adapters):
    small = pair[0]
    cx.load_adapter(small, adapters[0], "a")
    with pytest.raises(CaloraError, match="native adapters"):
        get_peft_model(copy.deepcopy(small), config())
    cx.delete_adapter(small, "a")
    model = get_peft_model(small, config())
    with pytest.raises(CaloraError, match="carries an adapter of PEFT"):
        cx.load_adapter(model.base_model.model, adapters[0], "a")


def test_bfloat16_copies_and_compilation(adapters):
    small = compressed(llama().bfloat16(), WeightFormat("bf16"))
    want = logits(PeftModel.from_pretrained(llama().bfloat16(), adapters[0]))
    model = copy.deepcopy(PeftModel.from_pretrained(small, adapters[0]))
    torch.testing.assert_close(logits(model).float(), want.float(), rtol=2e-2, atol=2e-2)
    fp32 = PeftModel.from_pretrained(compressed(llama()), adapters[0])
    compiled = torch.compile(lambda x: fp32(x, use_cache=False).logits, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(ids()), logits(fp32))


def test_a_model_saved_and_loaded_by_transformers(tmp_path, adapters):
    model = llama()
    cx.compress(model, cx.Recipe(weights="int4", group_size=32, activations="exact"))
    model.save_pretrained(tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    want = logits(PeftModel.from_pretrained(dense_equivalent(small, llama()), adapters[0]))
    peft = PeftModel.from_pretrained(small, adapters[0])
    close(logits(peft), want)
    peft.save_pretrained(tmp_path / "again")
    assert sorted(load_file(tmp_path / "again" / "adapter_model.safetensors")) == sorted(load_file(adapters[0] / "adapter_model.safetensors"))
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    bare.load_adapter(adapters[0])
    close(logits(bare), want)
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    cx.load_adapter(native, adapters[0], "a")
    cx.set_adapter(native, "a")
    close(logits(native), want)
    native.save_pretrained(tmp_path / "again-small")
    keys = [set(load_file(tmp_path / d / "model.safetensors")) for d in ("small", "again-small")]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("order", ["import peft, calora_ext", "import calora_ext, peft", "import peft.tuners.lora.model, calora_ext"])
def test_registration_does_not_depend_on_the_order_of_imports(order):
    code = f"{order}\nimport peft.tuners.lora.model as m\nprint(m.dispatch_default._calora)"
    done = subprocess.run([sys.executable, "-W", "error:calora_ext", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    assert "could not register" not in done.stderr


def test_calora_ext_alone_imports_no_peft():
    code = "import sys, calora_ext, calora_ext.adapters\nprint([m for m in ('peft', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
