"""The recovery half of an adapter on disk: round trip, what stock PEFT sees of it, the base it remembers, damaged files."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from _tiny import INT4, compressed, dense_equivalent, ids, llama, logits
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

import calora_ext as cx
from calora_ext import CaloraError, WeightFormat
from calora_ext.adapters import adapter_banks, add_adapter
from calora_ext.io.recovery import compare_bases, fingerprint, read_recovery
from calora_ext.lowrank import Factors, Int8Factors

SITES = {
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.0.mlp.down_proj": (32, 64),
    "model.layers.1.mlp.up_proj": (64, 32),
}


def random_factors(sites, rank, scale, seed):
    gen = torch.Generator().manual_seed(seed)
    return {
        p: Factors(torch.randn(rank, i, generator=gen) / 3, torch.randn(o, rank, generator=gen) / 3, scale)
        for p, (o, i) in sites.items()
    }


def student(fmt=INT4):
    model = compressed(llama(), fmt)
    model.config.quantization_config = {"quant_method": "calora", "weights": fmt.values, "files": {}}
    return model


@pytest.fixture
def saved(tmp_path):
    model = student()
    lora = random_factors(dict(list(SITES.items())[:2]), 4, 2.0, 1)
    add_adapter(model, "chat", lora=lora, recovery=random_factors(SITES, 3, 0.5, 2), config={"task_type": "CAUSAL_LM"})
    cx.set_adapter(model, "chat")
    cx.save_adapter(model, "chat", tmp_path / "chat")
    return model, tmp_path / "chat"


def test_round_trip_is_exact(saved):
    model, directory = saved
    again = student()
    cx.load_adapter(again, directory, "chat")
    cx.set_adapter(again, "chat")
    assert torch.equal(logits(again), logits(model))
    assert sorted(p.name for p in directory.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "recovery_config.json", "recovery_model.safetensors",
    ]  # fmt: skip


def test_stock_peft_loads_the_lora_half_bit_exactly_after_training_on_the_compressed_model(saved, tmp_path):
    model, _ = saved
    banks = adapter_banks(model, "chat").values()
    parameters = [p for bank in banks for p in bank.train_adapter("chat", dropout=(0.1, 0.1))]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    losses = []
    for _ in range(8):
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.eval()
    cx.save_adapter(model, "chat", tmp_path / "early")
    for bank in banks:
        bank.finish_training("chat")
    cx.save_adapter(model, "chat", tmp_path / "trained")
    files = [load_file(tmp_path / d / "adapter_model.safetensors") for d in ("early", "trained")]
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[1])
    dense = PeftModel.from_pretrained(llama(), tmp_path / "trained")
    state = dense.state_dict()
    assert len(files[1]) == 4 and all(torch.equal(v, state[k.replace(".weight", ".default.weight")]) for k, v in files[1].items())
    again = student()
    cx.load_adapter(again, tmp_path / "trained", "chat")
    cx.set_adapter(again, "chat")
    assert torch.equal(logits(again), logits(model))


def test_recovery_alone_and_its_head(tmp_path):
    dense = LlamaForSequenceClassification(llama().config.__class__(**{**llama().config.to_dict(), "num_labels": 3})).eval()
    model = compressed(dense)
    add_adapter(model, "r", recovery=random_factors(SITES, 3, 0.5, 2), modules_to_save=["score"])
    cx.set_adapter(model, "r")
    model.score.weight.data += 1.0
    want = logits(model)
    cx.save_adapter(model, "r", tmp_path / "r")
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["recovery_config.json", "recovery_model.safetensors"]
    again = compressed(dense)
    cx.load_adapter(again, tmp_path / "r", "r")
    cx.set_adapter(again, "r")
    assert torch.equal(logits(again), want)


def test_saving_over_an_adapter_removes_its_other_half(saved):
    model, directory = saved
    cx.merge_adapter(model, "chat", lora_only=True)
    cx.save_adapter(model, "chat", directory)
    assert sorted(p.name for p in directory.iterdir()) == ["recovery_config.json", "recovery_model.safetensors"]


def test_a_merged_model_forgets_its_hashes(saved):
    model, _ = saved
    recorded = {"quant_method": "calora", "files": {"model.safetensors": {}}}
    model.config.quantization_config = SimpleNamespace(to_dict=lambda: recorded)
    assert fingerprint(model)["quantization"] == recorded
    cx.merge_adapter(model, "chat", lora_only=True)
    assert fingerprint(model)["quantization"]["files"] == {}


def test_another_compression_warns_and_the_base_is_remembered(saved, tmp_path):
    other = student(WeightFormat("int8"))
    with pytest.warns(UserWarning, match="weights='int4' \\(here 'int8'\\)"):
        cx.load_adapter(other, saved[1], "chat")
    cx.save_adapter(other, "chat", tmp_path / "again")
    assert read_recovery(tmp_path / "again").base == fingerprint(saved[0])
    with pytest.warns(UserWarning, match="this is a dense model"):
        cx.load_adapter(llama(), saved[1], "chat")


def test_the_fingerprint_of_a_saved_model(tmp_path):
    model = llama()
    cx.compress(model, cx.Recipe(group_size=32))
    assert fingerprint(model)["quantization"]["files"] == {}
    model.save_pretrained(tmp_path / "small")
    add_adapter(model, "r", recovery=random_factors(SITES, 3, 0.5, 2))
    cx.save_adapter(model, "r", tmp_path / "r")
    base = read_recovery(tmp_path / "r").base
    assert (
        base["model_type"] == "llama"
        and base["quantization"]["group_size"] == 32
        and base["quantization"]["files"]["model.safetensors"]["blake2b"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cx.load_adapter(cx.load(tmp_path / "small"), tmp_path / "r", "r")
    other = llama()
    other.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    cx.compress(other, cx.Recipe(group_size=32))
    other.save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="files differ"):
        cx.load_adapter(cx.load(tmp_path / "other"), tmp_path / "r", "r")


def test_comparing_bases():
    q = {"quant_method": "calora", "weights": "int4", "files": {"model.safetensors": {"size": 1, "blake2b": "a"}}}
    base = {"model_type": "llama", "quantization": q}
    assert compare_bases(base, base) is None
    assert compare_bases(base, {"model_type": "llama", "quantization": q | {"files": {}}}) is None  # not saved yet: unknown
    other = q | {"files": {"model.safetensors": {"size": 1, "blake2b": "b"}}}
    assert "files differ" in compare_bases(base, {"model_type": "llama", "quantization": other})
    assert "dense" in compare_bases(base, {"model_type": "llama", "quantization": None})
    with pytest.raises(CaloraError, match="llama model, this is a qwen2"):
        compare_bases(base, {"model_type": "qwen2", "quantization": q})


def test_another_architecture_or_shape_is_an_error(saved):
    wide = compressed(llama(hidden_size=64))
    with pytest.raises(CaloraError, match="another model"):
        cx.load_adapter(wide, saved[1], "chat")
    shallow = compressed(llama(layers=1))
    with pytest.raises(CaloraError, match=r"layers\.1\.mlp\.up_proj, which this model does not have"):
        cx.load_adapter(shallow, saved[1], "chat")
    assert cx.list_adapters(wide) == cx.list_adapters(shallow) == []
    other = student()
    other.config.model_type = "mistral"
    with pytest.raises(CaloraError, match="mistral"):
        cx.load_adapter(other, saved[1], "chat")


A = "model.layers.1.mlp.up_proj.recovery_A.weight"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"format_version": 3}, {}, "update calora_ext"),
        ({"format_version": 2}, {}, "do not belong"),
        ({"activation": "relu"}, {}, "'relu' is not supported"),
        ({"scales": {}}, {}, "lacks the scales"),
        ({"scales": {"model.layers.1.mlp.up_proj": float("inf")}}, {}, "lacks the scales"),
        ({"scales": {"model.layers.1.mlp.up_proj": 1.0}}, {}, "incomplete"),
        ({"base": None}, {}, "lacks the base"),
        ({"parameters": ["score.weight"]}, {}, "lacks replaced parameters"),
        ({"scales": {A.removesuffix(".recovery_A.weight"): 10**400}}, {}, "lacks the scales"),
        ({}, {A: None}, "incomplete"),
        ({}, {A: torch.full((3, 32), float("inf"))}, "NaN or infinite"),
        ({}, {A: torch.zeros(4, 32)}, "rank, in"),
        ({}, {A: torch.zeros(3, 31)}, "another model"),
        ({}, {"stray": torch.zeros(3)}, "no part of a recovery"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_damaged_files_are_refused(saved, config, tensors, message):
    directory = saved[1]
    settings = json.loads((directory / "recovery_config.json").read_text())
    (directory / "recovery_config.json").write_text(json.dumps(settings | config))
    file = directory / "recovery_model.safetensors"
    save_file({k: v for k, v in {**load_file(file), **tensors}.items() if v is not None}, file)
    model = student()
    with pytest.raises(CaloraError, match=message):
        cx.load_adapter(model, directory, "chat")
    assert cx.list_adapters(model) == []


# -- int8 --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(saved, tmp_path):
    """The directory of the adapter with its recovery half in int8."""
    cx.save_adapter(saved[0], "chat", tmp_path / "small", dtype=torch.bfloat16, recovery_dtype=torch.int8)
    return tmp_path / "small"


def rounded(f):
    """By numbers: each row of D and each column of U to 127 steps of its largest magnitude."""

    def rows(m):
        step = m.double().abs().amax(1, keepdim=True) / 127
        return (m.double() / step).round() * step

    return rows(f.down), rows(f.up.t()).t()


def test_int8_is_rounding_to_nearest_and_takes_a_byte_a_parameter(saved, small):
    halves = read_recovery(saved[1]).factors, read_recovery(small).factors
    for path, wide in halves[0].items():
        narrow = halves[1][path]
        assert isinstance(narrow, Int8Factors) and narrow.scale == wide.scale and narrow.rank == wide.rank
        for ours, want in zip((narrow.down, narrow.up), rounded(wide), strict=True):
            torch.testing.assert_close(ours.double(), want, rtol=1e-6, atol=1e-6)
    stored = load_file(small / "recovery_model.safetensors")
    ranks = [(3, o + i) for o, i in SITES.values()]
    assert sum(t.numel() * t.element_size() for t in stored.values()) == sum(r * n + 2 * 4 * r for r, n in ranks)
    assert {t.dtype for t in load_file(small / "adapter_model.safetensors").values()} == {torch.bfloat16}
    PeftModel.from_pretrained(llama(), small)  # the LoRA half, as ever


def test_an_int8_adapter_comes_back_bit_for_bit_without_being_asked_to(small, tmp_path):
    model = student()
    cx.load_adapter(model, small, "chat")
    cx.save_adapter(model, "chat", tmp_path / "again", dtype=torch.bfloat16)
    for name in ("recovery_model.safetensors", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (small / name).read_bytes()
    cx.save_adapter(model, "chat", tmp_path / "wide", recovery_dtype=torch.float32)
    again = student()
    cx.load_adapter(again, tmp_path / "wide", "chat")
    for m in (model, again):
        cx.set_adapter(m, "chat")
    assert torch.equal(logits(again), logits(model)) and not isinstance(read_recovery(tmp_path / "wide").factors[SITE], Int8Factors)


def held(model, name):
    """Bytes that the recovery half of an adapter takes in memory, operands of inference included."""
    total = 0
    for bank in adapter_banks(model, name).values():
        entry = bank._resident[name]
        parts = [t for t in vars(entry.recovery).values() if isinstance(t, torch.Tensor)] + [t for t in entry.ready or () if isinstance(t, torch.Tensor)]
        total += sum(t.numel() * t.element_size() for t in parts)
    return total


def test_int8_stays_int8_in_memory_until_it_acts(saved, small):
    model = student()
    cx.load_adapter(model, small, "chat")
    cx.load_adapter(model, saved[1], "wide")
    want = sum(3 * (o + i) + 2 * 4 * 3 for o, i in SITES.values())
    plain = logits(model)
    assert held(model, "chat") == want < held(model, "wide") / 4
    for leave in (lambda: cx.set_adapter(model, "wide"), lambda: cx.disable_adapters(model), lambda: cx.set_adapter(model, ["chat", "wide"])):
        cx.set_adapter(model, "chat")
        assert held(model, "chat") > want and not torch.equal(logits(model), plain)
        leave()
        assert held(model, "chat") == want
    cx.delete_adapter(model, "chat")


def test_an_int8_adapter_trains_on_in_float(small):
    model = student()
    cx.load_adapter(model, small, "chat")
    cx.set_adapter(model, "chat")
    before = logits(model)
    for bank in adapter_banks(model, "chat").values():
        assert all(p.dtype == torch.float32 for p in bank.train_adapter("chat"))
    torch.testing.assert_close(logits(model), before)
    for bank in adapter_banks(model, "chat").values():
        bank.finish_training("chat")
        assert isinstance(bank.branches("chat")[1], Factors)
    model.double().float()
    torch.testing.assert_close(logits(model), before)


def test_a_row_of_zeros_and_a_single_outlier():
    down = torch.tensor([[0.0, 0.0, 0.0], [1e-30, 0.0, 2e-30], [5.0, -0.01, 0.03]])
    f = Int8Factors.of(Factors(down, torch.ones(2, 3), 1.0))
    assert not f.down[0].any() and f.down_codes[2].tolist() == [127, 0, 1] and torch.allclose(f.down[1], down[1], rtol=0.01)
    assert torch.equal(Int8Factors.of(f).down_codes, f.down_codes)


SITE = A.removesuffix(".recovery_A.weight")
SCALES = f"{SITE}.recovery_scales"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"weights": None}, {}, "do not belong to format_version 2"),
        ({"weights": ["int8"]}, {}, "do not belong to format_version 2"),
        ({"weights": "int4"}, {}, "do not belong to format_version 2"),
        ({"format_version": 3}, {}, "update calora_ext"),
        ({"weights": None, "format_version": 1}, {}, "expected floating point"),
        ({}, {SCALES: None}, "incomplete"),
        ({}, {SCALES: torch.ones(2, 4)}, "needs"),
        ({}, {SCALES: torch.ones(2, 3, dtype=torch.float16)}, "float32 scales"),
        ({}, {SCALES: torch.full((2, 3), float("nan"))}, "NaN or infinite"),
        ({}, {SCALES: torch.full((2, 3), 3e38)}, "too large"),
        ({}, {A: torch.zeros(3, 32)}, "int8 codes"),
        ({}, {A: torch.zeros(4, 32, dtype=torch.int8)}, "needs"),
        ({}, {A: torch.zeros(3, 31, dtype=torch.int8)}, "another model"),
        ({}, {A: torch.zeros(3, 32, dtype=torch.uint8)}, "or int8"),
        ({"parameters": [A]}, {}, "lacks replaced parameters"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_damaged_int8_files_are_refused(small, config, tensors, message):
    test_damaged_files_are_refused((None, small), config, tensors, message)


@pytest.mark.parametrize("dtypes", [{"dtype": torch.int8}, {"recovery_dtype": torch.int32}, {"dtype": torch.uint8, "recovery_dtype": torch.int8}])
def test_other_dtypes_are_refused(saved, tmp_path, dtypes):
    with pytest.raises(CaloraError, match="cannot be stored in torch"):
        cx.save_adapter(saved[0], "chat", tmp_path / "no", **dtypes)
    assert not (tmp_path / "no").exists()


def test_missing_and_truncated_files_are_refused(saved):
    directory = saved[1]
    file = directory / "recovery_model.safetensors"
    data = file.read_bytes()
    for cut in (0, 9, len(data) - 1):
        file.write_bytes(data[:cut])
        with pytest.raises(CaloraError, match="not a whole"):
            cx.load_adapter(student(), directory)
    file.unlink()
    with pytest.raises(CaloraError, match="is missing"):
        cx.load_adapter(student(), directory)
    file.write_bytes(data)
    (directory / "recovery_config.json").unlink()
    with pytest.raises(CaloraError, match="cannot be read"):
        cx.load_adapter(student(), directory)


def test_the_lora_half_equals_peft_on_the_decoded_base(saved):
    model, directory = saved
    for bank in adapter_banks(model, "chat").values():
        lora, _ = bank.branches("chat")
        bank.remove("chat")
        if lora:
            bank.add("chat", lora, None)
            bank.activate(["chat"])
    want = logits(PeftModel.from_pretrained(dense_equivalent(model, llama()), directory))
    torch.testing.assert_close(logits(model), want, rtol=1e-6, atol=1e-6)
