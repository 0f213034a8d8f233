"""The adapter calls and PEFT directories, held against PEFT itself on the dense model with the decoded weights."""

import copy
import json
import shutil

import pytest
import torch
import zoo
from _tiny import INT4, compressed, dense_equivalent, gpt2, ids, llama, logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import LlamaForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

import calora_ext as cx
from calora_ext import CaloraError, CompressedLinear, Recipe, WeightFormat, compress
from calora_ext.adapters import adapter_banks, add_adapter, base_only
from calora_ext.io.peft_adapter import KNOWN_KEYS, SEMANTIC_KEYS, LoraAdapter, is_target, read_adapter, write_adapter
from calora_ext.lowrank import Factors

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BF16, SPARSE = WeightFormat("bf16"), WeightFormat("int4", 32, pattern="2:4")


def peft_adapter(directory, model, seed=0, perturb=(), **config):
    """Save a random PEFT LoRA of a model; returns the directory. perturb: substrings of other parameters to change too."""
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "init_lora_weights": False, "inference_mode": False, **config}
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(**config))
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if p.requires_grad and any(s in name for s in perturb):
                p.add_(torch.randn_like(p) / 10)
    peft.save_pretrained(directory)
    return directory


def peft_logits(model, directory):
    return logits(PeftModel.from_pretrained(copy.deepcopy(model), directory))


def check_against_peft(dense, directory, fmt=INT4, skip=("lm_head", "score")):
    small = compressed(dense, fmt, skip)
    twin = dense_equivalent(small, dense)
    before = logits(small)
    cx.load_adapter(small, directory, "a")
    assert torch.equal(logits(small), before)  # loading does not activate
    cx.set_adapter(small, "a")
    want = peft_logits(twin, directory)
    assert (want - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(small), want, rtol=1e-6, atol=2e-6)
    cx.disable_adapters(small)
    assert torch.equal(logits(small), before)
    return small, twin


CONFIGS = {
    "plain": {},
    "patterns": {
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "v_proj": 6},
        "alpha_pattern": {"down_proj": 16, "q_proj": 3},
    },
    "rslora": {"use_rslora": True, "rank_pattern": {"down_proj": 9}},
    "regex": {"target_modules": r".*\.(q_proj|down_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "layers": {"layers_to_transform": [1], "target_modules": ["q_proj"]},
    "exclude": {"exclude_modules": ["v_proj"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
}


@pytest.mark.parametrize("fmt", [INT4, BF16, SPARSE], ids=str)
@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.filterwarnings("ignore:.lora_bias=True")
def test_llama_equals_peft(tmp_path, name, fmt):
    check_against_peft(llama(), peft_adapter(tmp_path / "a", llama(), **CONFIGS[name]), fmt)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_swapped_and_restored(tmp_path, bias):
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
    dense = Qwen2ForCausalLM(config).eval()
    directory = peft_adapter(tmp_path / "a", dense, perturb=["bias"], target_modules=["q_proj"], bias=bias)
    check_against_peft(dense, directory)


def test_modules_to_save_are_swapped_and_restored(tmp_path):
    dense = LlamaForSequenceClassification(llama().config.__class__(**{**llama().config.to_dict(), "num_labels": 3})).eval()
    directory = peft_adapter(tmp_path / "a", dense, perturb=["score"], task_type="SEQ_CLS")
    check_against_peft(dense, directory)
    check_against_peft(dense, directory, skip=())  # the head itself is compressed: replaced by a dense one


def test_an_adapter_on_a_layer_that_stayed_dense(tmp_path):
    directory = peft_adapter(tmp_path / "a", llama(), target_modules=["q_proj", "lm_head"])
    small, _ = check_against_peft(llama(), directory)
    assert type(small.lm_head) is nn.Linear


def test_a_plain_dense_model_and_its_copy(tmp_path):
    dense = llama()
    directory = peft_adapter(tmp_path / "a", dense, rank_pattern={"q_proj": 2})
    cx.load_adapter(dense, directory, "a")
    twin = copy.deepcopy(dense)
    cx.set_adapter(dense, "a")
    torch.testing.assert_close(logits(dense), peft_logits(llama(), directory), rtol=1e-6, atol=1e-6)
    assert torch.equal(logits(twin), logits(llama())) and cx.active_adapters(twin) == []
    half = llama().bfloat16()
    cx.load_adapter(half, directory, "a")
    cx.set_adapter(half, "a")
    torch.testing.assert_close(logits(half).float(), peft_logits(llama().bfloat16(), directory).float(), rtol=1e-2, atol=1e-2)


def test_gpt2_conv1d_dense_and_compressed(tmp_path):
    directory = peft_adapter(tmp_path / "a", gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    assert json.loads((directory / "adapter_config.json").read_text())["fan_in_fan_out"]
    check_against_peft(gpt2(), directory)
    dense = gpt2()
    cx.load_adapter(dense, directory, "a")
    cx.set_adapter(dense, "a")
    torch.testing.assert_close(logits(dense), peft_logits(gpt2(), directory), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen2", "opt", "t5", "bert"])
def test_other_architectures(tmp_path, name):
    dense = zoo.dense(name)
    torch.manual_seed(0)
    peft = get_peft_model(copy.deepcopy(dense), LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, bias="all"))
    peft.save_pretrained(tmp_path / "a")
    small = compressed(dense, skip=("lm_head", "classifier"))
    cx.load_adapter(small, tmp_path / "a", "a")
    cx.set_adapter(small, "a")
    twin = PeftModel.from_pretrained(dense_equivalent(small, dense), tmp_path / "a")
    torch.testing.assert_close(zoo.logits(small, name), zoo.logits(twin, name), rtol=1e-4, atol=1e-4)


def test_bfloat16_model(tmp_path):
    dense = llama().bfloat16()
    directory = peft_adapter(tmp_path / "a", dense)
    small = compressed(dense, BF16)
    cx.load_adapter(small, directory, "a")
    cx.set_adapter(small, "a")
    torch.testing.assert_close(logits(small).float(), peft_logits(dense, directory).float(), rtol=2e-2, atol=2e-2)


# -- several adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """A compressed model with adapters a (all layers, rank 4) and b (two kinds of layers, rank 6)."""
    a = peft_adapter(tmp_path / "a", llama(), 1)
    b = peft_adapter(tmp_path / "b", llama(), 2, r=6, target_modules=["q_proj", "up_proj"])
    small = compressed(llama())
    cx.load_adapter(small, a, "a")
    cx.load_adapter(small, b, adapter_name="b")
    return small, dense_equivalent(small, llama()), a, b


def test_switching_combining_deleting(two):
    small, twin, a, b = two
    base = logits(small)
    peft = PeftModel.from_pretrained(copy.deepcopy(twin), a, "a")
    peft.load_adapter(b, "b")
    for names in (["a"], ["b"], ["a", "b"], ["b"], ["a"]):
        cx.set_adapter(small, names[0] if len(names) == 1 else names)
        peft.base_model.set_adapter(names)
        torch.testing.assert_close(logits(small), logits(peft), rtol=1e-6, atol=1e-6)
        assert cx.active_adapters(small) == names
    cx.disable_adapters(small)
    assert torch.equal(logits(small), base) and cx.active_adapters(small) == []
    cx.enable_adapters(small)
    assert cx.active_adapters(small) == ["a"] and cx.list_adapters(small) == ["a", "b"]
    with base_only(small):
        assert torch.equal(logits(small), base)
    cx.set_adapter(small, ["a", "b"])
    cx.delete_adapter(small, "a")
    torch.testing.assert_close(logits(small), peft_logits(twin, b), rtol=1e-6, atol=1e-6)
    cx.delete_adapter(small, "b")
    assert torch.equal(logits(small), base) and cx.list_adapters(small) == []
    cx.load_adapter(small, a, "a")


def test_the_models_state_dict_never_holds_adapters(two):
    small = two[0]
    cx.set_adapter(small, ["a", "b"])
    assert set(small.state_dict()) == set(compressed(llama()).state_dict())


def test_hotswap_never_compiles_again(two, tmp_path):
    small, twin, a, b = two
    add_adapter(small, "r", recovery={"model.layers.1.mlp.up_proj": Factors(torch.randn(3, 32), torch.randn(64, 3), 0.5)})
    cx.set_adapter(small, "r")
    eager = logits(small)
    cx.enable_hotswap(small, target_rank=8)
    torch.testing.assert_close(logits(small), eager, rtol=1e-6, atol=1e-6)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: small(x, use_cache=False).logits, backend=counter, fullgraph=True)
    want = {"a": peft_logits(twin, a), "b": peft_logits(twin, b), "r": eager}
    with torch.no_grad():
        for name in ("a", "b", "r", "a", "r", "b"):
            cx.set_adapter(small, name)
            torch.testing.assert_close(compiled(ids()), want[name], rtol=1e-6, atol=1e-6)
        cx.disable_adapters(small)
        torch.testing.assert_close(compiled(ids()), logits(compressed(llama())), rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1
    cx.enable_adapters(small)
    with pytest.raises(CaloraError, match="10 for LoRA"):
        cx.set_adapter(small, ["a", "b"])
    torch.testing.assert_close(logits(small), want["b"], rtol=1e-6, atol=1e-6)  # what acted before goes on
    with pytest.raises(CaloraError, match="rank 9"):
        cx.load_adapter(small, peft_adapter(tmp_path / "big", llama(), r=9), "big")
    with pytest.raises(CaloraError, match="lm_head"):
        cx.load_adapter(small, peft_adapter(tmp_path / "head", llama(), target_modules=["lm_head"]), "head")
    assert cx.list_adapters(small) == ["a", "b", "r"]


# -- merging ---------------------------------------------------------------------------------------------------------------


def test_merge_requantises_and_reports_its_error(two):
    small = two[0]
    path = "model.layers.0.mlp.up_proj"
    lora, _ = adapter_banks(small, "a")[path].branches("a")
    delta = (lora.scale * lora.up.double() @ lora.down.double()).float()
    wanted = small.get_submodule(path).decode() + delta
    cx.set_adapter(small, ["a", "b"])
    report = cx.merge_adapter(small, "a")
    merged = small.get_submodule(path).decode()
    torch.testing.assert_close(merged, INT4.decode(INT4.pack(wanted), 32, 64))
    assert report.errors[path] == pytest.approx(float((merged - wanted).norm() / delta.norm()), rel=1e-4)
    assert len(report.errors) == 14 and "worst" in str(report)
    assert cx.list_adapters(small) == ["b"] and cx.active_adapters(small) == ["b"]


def test_a_merge_that_fails_changes_nothing(two):
    small, path = two[0], "model.layers.1.mlp.up_proj"
    huge = {"model.layers.0.mlp.up_proj": Factors(torch.ones(1, 32), torch.ones(64, 1), 1.0), path: Factors(torch.full((1, 32), 1e4), torch.full((64, 1), 1e4), 1.0)}
    add_adapter(small, "huge", lora=huge)
    before = logits(small)
    with pytest.raises(CaloraError, match="too large"):
        cx.merge_adapter(small, "huge")
    assert torch.equal(logits(small), before) and "huge" in cx.list_adapters(small)


@pytest.mark.parametrize("recipe", [Recipe(weights=w, sparsity=s) for w in ("int4", "nf4", "bf16") for s in ("2:4", 0.5)], ids=lambda r: f"{r.weights}-{r.sparsity}")
def test_a_merge_leaves_every_zero_of_a_sparse_layer(tmp_path, recipe):
    small = llama()
    compress(small, recipe)
    kept = lambda m: m.format.unpack(m.packed_tensors(), m.in_features, m.out_features).mask  # noqa: E731
    masks = {name: kept(m) for name, m in small.named_modules() if isinstance(m, CompressedLinear) and m.format.sparse}
    cx.load_adapter(small, peft_adapter(tmp_path / "a", llama()), "a")
    report = cx.merge_adapter(small, "a")
    assert len(masks) == 14 and 0.2 < report.mean < 1.5  # half of an adapter falls on weights that are not kept
    for name, mask in masks.items():
        layer = small.get_submodule(name)
        decoded = layer.decode()
        assert not decoded[~mask].any() and (decoded[mask] != 0).float().mean() > 0.8
        assert torch.equal(kept(layer), mask) and mask.float().mean() == 0.5


def test_merge_into_bf16_and_dense_layers_keeps_the_logits(tmp_path):
    dense = LlamaForSequenceClassification(llama().config.__class__(**{**llama().config.to_dict(), "num_labels": 3})).eval()
    directory = peft_adapter(tmp_path / "a", dense, perturb=["score"], task_type="SEQ_CLS")
    for model in (compressed(dense, BF16), copy.deepcopy(dense)):
        cx.load_adapter(model, directory, "a")
        cx.set_adapter(model, "a")
        want = logits(model)
        cx.merge_adapter(model, "a")
        torch.testing.assert_close(logits(model), want, rtol=1e-2, atol=1e-2)
        assert cx.list_adapters(model) == []


def test_recovery_is_not_merged_unless_asked(two):
    small, *_ = two
    path = "model.layers.0.mlp.up_proj"
    f = Factors(torch.randn(3, 32), torch.randn(64, 3), 0.5)
    add_adapter(small, "c", lora={path: f}, recovery={path: f})
    cx.set_adapter(small, "c")
    with pytest.raises(CaloraError, match="lora_only"):
        cx.merge_adapter(small, "c")
    cx.merge_adapter(small, "c", lora_only=True)
    assert cx.active_adapters(small) == ["c"]
    assert adapter_banks(small, "c")[path].branches("c") == (None, f)


def test_a_shared_matrix_is_not_merged_into(tmp_path):
    dense = llama(tie_word_embeddings=True)
    cx.load_adapter(dense, peft_adapter(tmp_path / "a", llama(), target_modules=["lm_head"]), "a")
    with pytest.raises(CaloraError, match="shares its weight"):
        cx.merge_adapter(dense, "a")


def test_a_packed_tied_head_is_not_merged_into(tmp_path):
    model = llama(tie_word_embeddings=True)
    cx.compress(model, cx.Recipe(embeddings="int8"))
    cx.load_adapter(model, peft_adapter(tmp_path / "a", llama(), target_modules=["lm_head"]), "a")
    with pytest.raises(CaloraError, match="shares its weight"):
        cx.merge_adapter(model, "a")
    cx.set_adapter(model, "a")
    assert logits(model).isfinite().all()


# -- saving ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.filterwarnings("ignore:.lora_bias=True")
def test_what_is_saved_is_what_was_loaded_and_peft_takes_it(tmp_path, name):
    directory = peft_adapter(tmp_path / "a", llama(), **CONFIGS[name])
    small = compressed(llama())
    cx.load_adapter(small, directory, "a")
    cx.save_adapter(small, "a", tmp_path / "b")
    old, new = (load_file(d / "adapter_model.safetensors") for d in (directory, tmp_path / "b"))
    assert old.keys() == new.keys() and all(torch.allclose(old[k], new[k], rtol=1e-6, atol=0) for k in old)
    assert all(torch.equal(old[k], new[k]) for k in old if not k.endswith("bias"))
    peft = PeftModel.from_pretrained(llama(), tmp_path / "b")
    result = peft.load_adapter(tmp_path / "b", "again")
    assert not result.unexpected_keys and not [k for k in result.missing_keys if "lora" in k]
    torch.testing.assert_close(logits(peft), peft_logits(llama(), directory), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.lora_bias=True")
def test_a_bias_that_alpha_0_took_away_is_not_saved_as_nan(tmp_path):
    directory = peft_adapter(tmp_path / "a", llama(), lora_alpha=0, lora_bias=True)
    small = compressed(llama())
    before = logits(small)
    cx.load_adapter(small, directory, "a")
    cx.set_adapter(small, "a")
    torch.testing.assert_close(logits(small), before)
    with pytest.raises(CaloraError, match=r"has lora_alpha 0 at model.layers.0.*lora_B.bias"):
        cx.save_adapter(small, "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_new_adapter_is_described_so_that_peft_rebuilds_it(tmp_path):
    small = compressed(llama())
    gen = torch.Generator().manual_seed(3)
    shape = {"model.layers.0.self_attn.q_proj": (32, 32, 4, 2.0), "model.layers.1.self_attn.q_proj": (32, 32, 5, 0.3),
             "model.layers.1.mlp.down_proj": (32, 64, 4, 0.125)}  # fmt: skip
    lora = {
        p: Factors(torch.randn(r, i, generator=gen), torch.randn(o, r, generator=gen), s) for p, (o, i, r, s) in shape.items()
    }
    add_adapter(small, "new", lora=lora, config={"task_type": "CAUSAL_LM"})
    cx.set_adapter(small, "new")
    cx.save_adapter(small, "new", tmp_path / "new")
    twin = dense_equivalent(small, llama())
    torch.testing.assert_close(peft_logits(twin, tmp_path / "new"), logits(small), rtol=1e-5, atol=1e-5)
    assert read_adapter(tmp_path / "new").factors.keys() == lora.keys()


def test_saving_with_modules_and_biases(tmp_path):
    dense = LlamaForSequenceClassification(llama().config.__class__(**{**llama().config.to_dict(), "num_labels": 3})).eval()
    directory = peft_adapter(tmp_path / "a", dense, perturb=["score"], task_type="SEQ_CLS")
    small = compressed(dense)
    cx.load_adapter(small, directory, "a")
    cx.save_adapter(small, "a", tmp_path / "b")
    torch.testing.assert_close(peft_logits(dense, tmp_path / "b"), peft_logits(dense, directory), rtol=1e-6, atol=1e-6)
    add_adapter(small, "head", lora={"model.layers.0.mlp.up_proj": Factors(torch.ones(2, 32), torch.ones(64, 2), 1.0)}, modules_to_save=["score"],
                config={"task_type": "SEQ_CLS"})  # fmt: skip
    cx.set_adapter(small, "head")
    small.score.weight.data += 1.0  # what training does
    cx.save_adapter(small, "head", tmp_path / "c")
    cx.disable_adapters(small)
    assert torch.equal(small.score.weight, dense.score.weight)
    assert torch.equal(
        load_file(tmp_path / "c" / "adapter_model.safetensors")["base_model.model.score.weight"], dense.score.weight + 1.0
    )


def test_save_pretrained_writes_the_base_only(tmp_path):
    """... although the active adapter has replaced the packed embeddings and head."""
    model = llama()
    cx.compress(model, cx.Recipe(embeddings="int8", activations="exact"))
    model.save_pretrained(tmp_path / "small")
    directory = peft_adapter(
        tmp_path / "a", llama(), modules_to_save=["embed_tokens", "lm_head"], perturb=["embed_tokens", "lm_head"]
    )
    cx.load_adapter(model, directory, "a")
    cx.set_adapter(model, "a")
    torch.testing.assert_close(logits(model), peft_logits(dense_equivalent(model, llama()), directory), rtol=1e-5, atol=1e-5)
    for bank in adapter_banks(model, "a").values():
        bank.train_adapter("a")
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in ("small", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert cx.active_adapters(model) == ["a"]


def test_saving_fails_cleanly(tmp_path, two, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CaloraError, match="cannot write"):
        cx.save_adapter(two[0], "a", tmp_path / "file" / "x")
    import calora_ext.io.files as module

    monkeypatch.setattr(module, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(CaloraError, match="no space left"):
        cx.save_adapter(two[0], "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- bad input -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return peft_adapter(tmp_path_factory.mktemp("good") / "a", llama(), rank_pattern={"q_proj": 2})


SEMANTIC = {"use_dora": True, "use_qalora": True, "layer_replication": [[0, 1]], "target_parameters": ["x"], "alora_invocation_tokens": [1],
            "velora_config": {"a": 1}, "arrow_config": {"a": 1}, "use_bdlora": {"a": 1}, "kasa_config": {"a": 1}, "monteclora_config": {"a": 1},
            "trainable_token_indices": [1]}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[({key: value}, key) for key, value in SEMANTIC.items()],
        ({"use_something_new": True}, "use_something_new, which this version does not know"),
        ({"something_new_config": {"a": 1}}, "something_new_config, which this version does not know"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"r": 0}, "positive integer"),
        ({"r": 5}, "says rank 5"),
        ({"r": "4"}, "positive integer"),
        ({"lora_alpha": float("nan")}, "expected a number"),
        ({"rank_pattern": {"(": 2}}, "not a regular expression"),
        ({"rank_pattern": {"(?i)q_proj": 2}}, "not a regular expression"),
        ({"rank_pattern": [2]}, "must be an object"),
        ({"lora_alpha": 10**400}, "expected a number"),
        ({"bias": "some"}, "expected none, all"),
        ({"target_modules": 3}, "must be a list"),
        ({"modules_to_save": ["("]}, "not a regular expression"),
        ({"target_modules": [*ALL, "lm_head"]}, "holds no tensors"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_configs_that_are_refused(tmp_path, good, change, message):
    shutil.copytree(good, tmp_path / "a")
    config = json.loads((good / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | change))
    small = compressed(llama())
    with pytest.raises(CaloraError, match=message):
        cx.load_adapter(small, tmp_path / "a", "a")
    assert cx.list_adapters(small) == []


def test_what_other_tools_note_in_the_config_is_said_and_kept(tmp_path, good):
    shutil.copytree(good, tmp_path / "a")
    config = json.loads((good / "adapter_config.json").read_text()) | {"from_the_future": {"x": 1}}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    small = compressed(llama())
    with pytest.warns(UserWarning, match="sets from_the_future, which is ignored"):
        cx.load_adapter(small, tmp_path / "a", "a")
    cx.save_adapter(small, "a", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["from_the_future"] == {"x": 1}


def test_what_peft_writes_is_known():
    written = set(LoraConfig().to_dict())
    assert written <= {*KNOWN_KEYS, *SEMANTIC_KEYS}


Q = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q + "lora_A.weight": None}, "lora_B only"),
        ({Q + "lora_A.weight": torch.full((2, 32), float("nan"))}, "NaN"),
        ({Q + "lora_A.weight": torch.zeros(2, 33)}, "another model"),
        ({Q + "lora_A.weight": torch.zeros(3, 32)}, "says rank 2"),
        ({Q + "lora_A.weight": torch.zeros(2, 32, dtype=torch.int32)}, "floating point"),
        ({Q + "lora_magnitude_vector": torch.zeros(32)}, "not supported"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 97)}, "embedding"),
        ({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(4, 32),
          "base_model.model.model.layers.7.mlp.up_proj.lora_B.weight": torch.zeros(64, 4)}, "layers.7.mlp.up_proj"),
        ({"base_model.model.model.norm.lora_A.weight": torch.zeros(4, 32),
          "base_model.model.model.norm.lora_B.weight": torch.zeros(32, 4)}, "only linear layers"),
        ({"base_model.model.model.embed_tokens.weight": torch.zeros(99, 32)}, "another model"),
        ({"base_model.model.model.nowhere.weight": torch.zeros(3)}, "nowhere"),
    ],
    ids=lambda v: str(v)[:40],
)  # fmt: skip
def test_weights_that_are_refused(tmp_path, good, change, message):
    shutil.copytree(good, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {k: v for k, v in {**load_file(file), **change}.items() if v is not None}
    save_file(tensors, file)
    small = compressed(llama())
    before = logits(small)
    with pytest.raises(CaloraError, match=message):
        cx.load_adapter(small, tmp_path / "a", "a")
    assert torch.equal(logits(small), before) and cx.list_adapters(small) == []
    assert not [n for m in small.modules() if hasattr(m, "bank") and m.bank is not None for n in m.bank.names()]


def test_files_that_are_refused(tmp_path, good):
    small = compressed(llama())
    with pytest.raises(CaloraError, match="not a directory"):
        cx.load_adapter(small, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CaloraError, match="holds no adapter_config"):
        cx.load_adapter(small, tmp_path / "empty")
    shutil.copytree(good, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    data = file.read_bytes()
    for cut in (0, 7, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:cut])
        with pytest.raises(CaloraError, match="not a whole safetensors file"):
            cx.load_adapter(small, tmp_path / "a")
    file.unlink()
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CaloraError, match="never unpickled"):
        cx.load_adapter(small, tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("[1]")
    with pytest.raises(CaloraError, match="JSON object"):
        cx.load_adapter(small, tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(CaloraError, match="not valid JSON"):
        cx.load_adapter(small, tmp_path / "a")


def test_calls_that_are_refused(two):
    small, _, a, _ = two
    with pytest.raises(CaloraError, match="loaded already"):
        cx.load_adapter(small, a, "a")
    with pytest.raises(CaloraError, match="loaded are: a, b"):
        cx.set_adapter(small, "c")
    with pytest.raises(CaloraError, match="non-empty"):
        cx.load_adapter(small, a, "")
    with pytest.raises(CaloraError, match="no adapter 'c'"):
        cx.delete_adapter(small, "c")


@pytest.mark.parametrize("name", ["plain", "regex", "layers", "exclude"])
def test_is_target_agrees_with_peft(tmp_path, name):
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(**{"target_modules": ALL, **CONFIGS[name]})
    for path, _ in llama().named_modules():
        assert is_target(config.to_dict() | {"target_modules": config.target_modules}, path) == bool(
            check_target_module_exists(config, path)
        ), path


def test_write_adapter_needs_a_module(tmp_path):
    with pytest.raises(CaloraError, match="at least one"):
        write_adapter(tmp_path / "x", LoraAdapter({}))
