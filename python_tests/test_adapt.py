"""cx.adapt: what is trained, from where it starts, every arm, every task."""

from collections import Counter

import pytest
import torch
import zoo
from adapt_helpers import (
    compress,
    make_bert,
    make_classifier,
    make_llama,
    make_lora,
    make_t5,
    make_tokenizer,
    text_of,
)
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, T5Config, TrainingArguments

import calora_ext as cx
from calora_ext import CaloraError, WeightFormat
from calora_ext.adaptation import Distill, Lora, Recovery, Settings, cache_teacher, preset, student
from calora_ext.adapters import adapter_banks

EXACT = WeightFormat("bf16")
TEXTS = [text_of(400)]
QUICK = Settings(max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant", disable_tqdm=True)


def bf16_values(model):
    """fp32 weights that bf16 represents: packing them as bf16 loses nothing."""
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    return model


def run(model, **options):
    options = {"data": TEXTS, "tokenizer": make_tokenizer(), "max_length": 16, "args": QUICK, "distill": None, **options}
    return cx.adapt(model, **options)


@pytest.fixture
def ids():
    return torch.randint(4, 28, (2, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def lora_dir(tmp_path):
    make_lora(tmp_path / "lora", make_llama())
    return tmp_path / "lora"


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


# -- the layer and the number of parameters -----------------------------------------------------------------------------


def test_layer_equals_the_closed_form():
    """y = W x + s_l (x A^T) B^T + s_r GELU(x D^T) U^T, in float64 on the decoded weight; gradients on A, B, D, U alone."""
    layer = cx.CompressedLinear.from_linear(torch.nn.Linear(40, 24), WeightFormat("int4", 32))
    model = torch.nn.Sequential(layer)
    plan = student.plan(model, "causal-lm", Lora(rank=5, alpha=10), Recovery(rank=3, alpha=4.5))
    student.attach(model, "x", plan, Lora(rank=5, alpha=10), Recovery(rank=3, alpha=4.5), None, "causal-lm", seed=0)
    (bank,) = adapter_banks(model, "x").values()
    x = torch.randn(7, 40)
    with student.training(model, "x", plan, None, Recovery(rank=3), distilled=False) as parameters:
        for p in parameters.values():
            p.data.normal_()
        y = model(x)
        y.square().sum().backward()
        assert {k.rpartition(".")[2] for k in parameters} == {"lora_A", "lora_B", "recovery_A", "recovery_B"}
        assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in parameters.values()}
        a, b, d, u = (getattr(bank, k).detach().double() for k in ("lora_A", "lora_B", "recovery_A", "recovery_B"))
    x64 = x.double()
    t = x64 @ d.t()
    gelu = 0.5 * t * (1 + torch.erf(t / 2**0.5))
    want = x64 @ layer.decode().double().t() + layer.bias.double() + 10 / 5 * (x64 @ a.t()) @ b.t() + 4.5 / 3 * gelu @ u.t()
    assert ((y.double() - want).norm() / want.norm()) < 1e-6


def counts(cls, config, name):
    with torch.device("meta"):
        model = cls.from_config(config)
    arms = preset(name)
    return student.plan(model, arms["task"], arms["lora"], arms["recovery"]).parameters(model)


@pytest.mark.parametrize("name", ["llama-13b", "llama-2-13b"])
def test_presets_have_the_published_number_of_parameters(name):
    config = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=100)
    got = counts(AutoModelForCausalLM, config, name)
    want = {"llama-13b": (26.2, 62.6), "llama-2-13b": (250.3, 250.3)}[name]
    assert (round(got["lora"] / 1e6, 1), round(got["recovery"] / 1e6, 1)) == want


def test_preset_of_t5_3b():
    config = T5Config(vocab_size=100, d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32)
    got = counts(AutoModelForSeq2SeqLM, config, "t5-3b")
    assert (round(got["lora"] / 1e6, 2), round(got["recovery"] / 1e6, 2)) == (23.59, 100.66)
    scales = {
        n: (preset(n)["lora"].alpha / preset(n)["lora"].rank, preset(n)["recovery"].scale)
        for n in ("t5-3b", "llama-13b", "llama-2-13b")
    }
    assert scales == {"t5-3b": (0.5, 0.5), "llama-13b": (1, 1), "llama-2-13b": (0.25, 0.25)}
    recovery = preset("llama-13b")["recovery"]
    assert [recovery.dropout_at(f"model.layers.0.{p}") for p in ("self_attn.q_proj", "mlp.up_proj")] == [0.0, 0.05]
    with pytest.raises(CaloraError, match="t5-3b, llama-13b"):
        preset("gpt")


def test_sites():
    model = compress(make_llama())
    assert len(student.sites(model, "all", "x")) == 14  # 2 layers of 7
    assert student.sites(model, ["q_proj", "0.mlp.up_proj"], "x") == [
        "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj",
    ]  # fmt: skip
    assert student.sites(model, r".*\.1\.mlp\..*_proj", "x") == [f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")]
    for which in (["q_proj", "query"], "q_proj", []):
        with pytest.raises(CaloraError, match="no linear layer"):
            student.sites(model, which, "Lora(targets=...)")


# -- where it starts ------------------------------------------------------------------------------------------------------


def start(model, lora_dir, **options):
    """The model at step 0."""
    run(model, inherit=lora_dir, args=Settings(max_steps=0, disable_tqdm=True), **options)
    return model


def test_inheriting_on_a_lossless_base_is_the_dense_model_with_its_lora(tmp_path, ids):
    peft = make_lora(tmp_path, bf16_values(make_llama()), rank_pattern={"down_proj": 2}, use_rslora=True)
    model = start(compress(bf16_values(make_llama()), EXACT), tmp_path)
    torch.testing.assert_close(logits(model, ids), logits(peft, ids), rtol=1e-4, atol=1e-5)


def test_fresh_recovery_and_larger_lora_change_nothing_at_step_0(lora_dir, ids):
    inherited = logits(start(compress(make_llama()), lora_dir, recovery=None), ids)
    for options in (
        {"recovery": Recovery(rank=8)},
        {"recovery": None, "lora": Lora(rank=9)},
        {"recovery": None, "lora": Lora(rank=9, alpha=5)},
    ):
        torch.testing.assert_close(
            logits(start(compress(make_llama()), lora_dir, **options), ids), inherited, rtol=1e-4, atol=1e-5
        )
    assert (logits(compress(make_llama()), ids) - inherited).abs().max() > 1e-2


def test_larger_lora_matches_the_parameters_of_recovery(lora_dir):
    with_recovery = run(compress(make_llama()), inherit=lora_dir, recovery=Recovery(rank=6), lora=Lora(rank=4))
    larger = run(compress(make_llama()), inherit=lora_dir, recovery=None, lora=Lora(rank=10))
    assert sum(with_recovery.parameters.values()) == sum(larger.parameters.values())
    with pytest.raises(CaloraError, match="inherited LoRA has rank 4"):
        run(compress(make_llama()), inherit=lora_dir, lora=Lora(rank=3))


def test_a_lora_above_the_size_of_its_layer_is_refused_unless_inherited(tmp_path):
    """Its product has no more than the layer's rank; recovery, which is not linear, may have more."""
    with pytest.raises(CaloraError, match=r"Lora\(rank=33\) is above the size of model\.layers\.0\.self_attn\.q_proj, which is 32"):
        run(compress(make_llama()), lora=Lora(rank=33))
    make_lora(tmp_path, make_llama(), r=40, target_modules=["q_proj"])
    for lora in (None, Lora(rank=40, targets=["q_proj"])):
        model = compress(make_llama())
        run(model, inherit=tmp_path, lora=lora, recovery=Recovery(rank=40))
        assert {bank.branches("default")[0].rank for bank in adapter_banks(model, "default").values() if bank.branches("default")[0]} == {40}
    with pytest.raises(CaloraError, match=r"Lora\(rank=41\) is above"):
        run(compress(make_llama()), inherit=tmp_path, lora=Lora(rank=41, targets=["q_proj"]))


# -- training -------------------------------------------------------------------------------------------------------------

ARMS = [
    (init, rc, d, lora)
    for init in ("rd", "i")
    for rc in (False, True)
    for d in (False, True)
    for lora in (True, False)
    if (lora or rc) and (lora or init == "rd")
]


@pytest.mark.parametrize(("init", "rc", "d", "lora"), ARMS)
def test_every_arm_of_the_grid(init, rc, d, lora, lora_dir):
    model, dense = compress(make_llama()), make_llama()
    packed = {k: v.clone() for k, v in model.state_dict().items()}
    recording = {k for k, p in model.named_parameters() if p.requires_grad}
    result = run(
        model,
        inherit=lora_dir if init == "i" else None,
        recovery=Recovery(rank=4) if rc else None,
        distill=Distill({-1: 0.05}, logits=0.5) if d else None,
        teacher=dense if d else None,
        lora=None if lora else False,
    )
    assert result.arm == "-".join([init] * lora + ["rc"] * rc + ["d"] * d)
    assert len(result.losses) == 2 and ("hidden" in result.history[0]) == ("logits" in result.history[0]) == d
    assert cx.active_adapters(model) == ["default"] and cx.list_adapters(dense) == []
    branches = [bank.branches("default") for bank in adapter_banks(model, "default").values()]
    assert all((f.up != 0).any() for pair in branches for f in pair if f is not None)
    assert sum(pair[0] is not None for pair in branches) == (0 if not lora else 6 if init == "i" else 14)
    assert sum(pair[1] is not None for pair in branches) == 14 * rc
    now = model.state_dict()
    assert now.keys() == packed.keys() and all(torch.equal(now[k], v) for k, v in packed.items())
    assert {k for k, p in model.named_parameters() if p.requires_grad} == recording and not model.training
    assert all(p.grad is None for p in [*model.parameters(), *dense.parameters()])


@pytest.mark.parametrize("fmt", [WeightFormat("int4", 32), WeightFormat("int4", 32, pattern="2:4")], ids=str)
def test_training_lowers_the_loss(fmt):
    model, dense = compress(make_llama(), fmt), make_llama()
    args = Settings(max_steps=25, per_device_train_batch_size=4, learning_rate=1e-2, disable_tqdm=True)
    text = ["the cat sat on the mat . the dog ran . " * 20]
    result = run(model, data=text, eval_data=text, teacher=dense, distill=Distill(), recovery=Recovery(rank=4), args=args)
    assert result.eval_after["loss"] < result.eval_before["loss"] - 0.5
    assert result.losses[-1] < result.losses[0] - 0.5
    assert "rd-rc-d" in str(result) and result.to_dict()["steps"] == 25
    assert result.adapter_bytes == 4 * sum(result.parameters.values()) and result.peak_rss_bytes > 1e7


def test_adapter_trained_here_loads_in_peft_on_the_dense_model(tmp_path, ids):
    model = compress(bf16_values(make_llama()), EXACT)
    run(model, recovery=None, lora=Lora(rank=4, targets=["q_proj", "up_proj"]))
    cx.save_adapter(model, "default", tmp_path)
    peft = PeftModel.from_pretrained(bf16_values(make_llama()), tmp_path).eval()
    torch.testing.assert_close(logits(model, ids), logits(peft, ids), rtol=1e-4, atol=1e-5)


def test_same_seed_same_adapter_and_other_seed_another():
    def factors(seed):
        model = compress(make_llama())
        run(model, recovery=Recovery(rank=4, dropout=0.2), args=Settings(max_steps=2, seed=seed, disable_tqdm=True))
        return [f for b in adapter_banks(model, "default").values() for f in b.branches("default")]

    one, two, other = factors(1), factors(1), factors(2)
    assert all(torch.equal(a.up, b.up) and torch.equal(a.down, b.down) for a, b in zip(one, two, strict=True))
    assert not any(torch.equal(a.up, b.up) for a, b in zip(one, other, strict=True))


def test_the_global_random_state_is_left_alone():
    model = compress(make_llama())
    state = torch.get_rng_state()
    run(model, recovery=Recovery(rank=4, dropout=0.2))
    assert torch.equal(torch.get_rng_state(), state)


def test_accumulated_micro_batches_equal_one_batch():
    """Prompts of different lengths: the mean is over the tokens of the step, not over micro-batches."""
    rows = [{"prompt": text_of(2 + i, seed=i), "completion": text_of(1 + 3 * i, seed=9 + i)} for i in range(4)]

    def history(size, steps):
        args = Settings(
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            learning_rate=1e-2,
            disable_tqdm=True,
        )
        return run(
            compress(make_llama()), data=rows, max_length=32, teacher=make_llama(1), distill=Distill({-1: 0.3}, 0.5), args=args
        ).history

    for one, many in zip(history(4, 1), history(1, 4), strict=True):
        assert many == pytest.approx(one, rel=2e-3)


def test_gradient_checkpointing_changes_nothing():
    plain, saved = (
        run(
            compress(make_llama()),
            args=Settings(max_steps=2, per_device_train_batch_size=2, gradient_checkpointing=g, disable_tqdm=True),
        )
        for g in (0, 1)
    )
    assert plain.losses == pytest.approx(saved.losses, rel=1e-6)


def test_gradient_checkpointing_leaves_the_last_layer_of_a_block_out():
    """Of seven layers six are computed again: with the inputs of the seventh everything is there that the gradients need."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[func] += 1
            return func(*args, **(kwargs or {}))

    counts = Counter()
    with Calls():
        run(compress(make_llama()), args=Settings(max_steps=1, per_device_train_batch_size=2, gradient_checkpointing=True, disable_tqdm=True))
    assert counts[torch.ops.calora.linear_inference.default] == 2 * (7 + 6)  # two blocks; the head is dense
    assert counts[torch.ops.calora.linear_dx.default] == 2 * 7


def test_bf16_autocast_is_near_fp32():
    plain, half = (
        run(compress(make_llama()), args=Settings(max_steps=2, per_device_train_batch_size=2, bf16=b, disable_tqdm=True))
        for b in (False, True)
    )
    assert half.losses == pytest.approx(plain.losses, rel=2e-2) and half.losses != plain.losses


def test_dense_model_can_be_the_student(lora_dir):
    model = make_llama()
    result = run(model, inherit=lora_dir, recovery=None)
    assert result.arm == "i" and result.parameters["lora"] == sum(4 * (32 + o) for o in (32, 32)) * 2 + 2 * 4 * (64 + 32)


def test_transformers_training_arguments(tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        report_to="none",
        use_cpu=True,
    )
    result = run(compress(make_llama()), args=args)
    assert result.steps == 3 and result.history[0]["learning_rate"] == 1e-3


# -- tasks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_classifier, make_bert])
def test_classification_trains_the_head_and_saves_it(make, tmp_path, ids):
    rows = [{"text": f"the {'good' if i % 2 else 'bad'} {text_of(2 + i % 4, seed=i)}", "label": i % 2} for i in range(24)] + [
        {"text": "a", "label": -1}
    ]
    model = compress(make())
    before = logits(model, ids)
    args = Settings(max_steps=30, per_device_train_batch_size=8, learning_rate=1e-2, disable_tqdm=True)
    result = run(
        model,
        data=rows,
        eval_data=rows,
        task="SEQ_CLS",
        teacher=make(),
        distill=Distill({-1: 0.01}, logits=0.1),
        recovery=Recovery(rank=2),
        args=args,
    )
    assert result.eval_after["accuracy"] > 0.9 > result.eval_before["accuracy"] and "1 dropped" in result.data
    assert result.parameters["head"] == sum(p.numel() for p in model.get_submodule(student.head_of(model)).parameters())
    trained = logits(model, ids)
    cx.save_adapter(model, "default", tmp_path)
    cx.disable_adapters(model)
    assert torch.equal(logits(model, ids), before)  # the base's own head is back
    again = compress(make())
    cx.load_adapter(again, tmp_path)
    cx.set_adapter(again, "default")
    assert torch.equal(logits(again, ids), trained)


def test_seq2seq():
    rows = [{"prompt": f"question {w} ?", "completion": f"{w} yes"} for w in ("cat", "dog", "mat", "film")] * 2
    args = Settings(max_steps=25, per_device_train_batch_size=8, learning_rate=1e-2, disable_tqdm=True)
    distill = Distill({"encoder:-2": 0.005, "decoder:-2": 0.05}, logits=0.1)
    result = run(
        compress(make_t5()), data=rows, eval_data=rows, tokenizer=make_tokenizer("</s>", ""), task="seq2seq-lm", teacher=make_t5(),
        distill=distill, recovery=Recovery(rank=4), lora=Lora(rank=4, targets=["q", "k"]), args=args,
    )  # fmt: skip
    assert result.eval_after["loss"] < result.eval_before["loss"] - 0.5


@pytest.mark.parametrize(
    ("name", "dtype"), [*((n, torch.float32) for n in zoo.ZOO), ("llama", torch.bfloat16), ("t5", torch.bfloat16)], ids=str
)
def test_every_architecture_compressed_saved_loaded_and_adapted(name, dtype, tmp_path):
    dense = zoo.dense(name).to(dtype)
    model = zoo.dense(name).to(dtype)
    cx.compress(model, cx.Recipe(group_size=32))
    model.save_pretrained(tmp_path)
    model = cx.load(tmp_path)
    task = {"t5": "seq2seq-lm", "bert": "sequence-classification"}.get(name, "causal-lm")
    data = {
        "t5": [{"prompt": "a b c", "completion": "d e"}] * 2,
        "bert": [{"text": "a b", "label": 0}, {"text": "c", "label": 1}],
    }.get(name, TEXTS)
    result = run(
        model, data=data, task=task, teacher=dense, distill=Distill(logits=0.5), recovery=Recovery(rank=2), lora=Lora(rank=2)
    )
    assert result.arm == "rd-rc-d" and result.history[0]["hidden"] > 0 and result.losses[1] != result.losses[0]
    before = zoo.logits(model, name)
    cx.save_adapter(model, "default", tmp_path / "adapter")
    again = cx.load(tmp_path)
    cx.load_adapter(again, tmp_path / "adapter")
    cx.set_adapter(again, "default")
    assert torch.equal(zoo.logits(again, name), before)


# -- what does not fit together -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"distill": Distill()}, "needs teacher"),
        ({"teacher": "dense"}, "distill=None"),
        ({"lora": False, "inherit": "lora"}, "inherits nothing"),
        ({"lora": False, "recovery": None}, "nothing to train"),
        ({"lora": True}, "must be None, False"),
        ({"lora": 3}, "lora must be None, False or a calora_ext.adaptation.Lora, got 3"),
        ({"recovery": 8}, "recovery must be None or a calora_ext.adaptation.Recovery, got 8"),
        ({"distill": 0.5}, "distill must be None or a calora_ext.adaptation.Distill, got 0.5"),
        ({"tokenizer": None}, "tokenizer must be a transformers tokenizer, got NoneType"),
        ({"tokenizer": "x"}, "tokenizer must be a transformers tokenizer, got str"),
        ({"task": "ner"}, "not a task"),
        ({"args": 3}, "TrainingArguments"),
        ({"inherit": "missing"}, "missing"),
        ({"data": "missing.txt"}, "no file"),
        ({"max_length": 65}, "context"),
        ({"task": "sequence-classification", "data": [{"text": "a", "label": 0}]}, "no head"),
        ({"recovery": Recovery(sites=["nothing"])}, "no linear layer"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(options, says, lora_dir):
    model = compress(make_llama())
    options = {
        **options,
        **({"inherit": lora_dir} if options.get("inherit") == "lora" else {}),
        **({"teacher": make_llama()} if "teacher" in options else {}),
    }
    with pytest.raises(CaloraError, match=says):
        run(model, **options)
    assert cx.list_adapters(model) == [] and not model.training


@pytest.mark.parametrize("model", [None, "dense", torch.nn.Linear(32, 32)], ids=["none", "directory", "module"])
def test_what_is_no_transformers_model_is_refused(model):
    kind = type(model).__name__
    with pytest.raises(CaloraError, match=f"^model must be a transformers model, got {kind}; load it"):
        run(model)
    with pytest.raises(CaloraError, match=f"^model must be a transformers model, got {kind}; load it"):
        cx.sparse_adapt(model, data=TEXTS, tokenizer=make_tokenizer(), sparsity=0.5)
    with pytest.raises(CaloraError, match=f"^teacher must be a transformers model, got {kind}; load it"):
        cache_teacher("cache", model, data=TEXTS, tokenizer=make_tokenizer())


TEACHERS = {
    "encoder-decoder": (make_llama, make_t5, "the teacher has model_type t5, the student llama"),
    "classifier": (make_llama, make_bert, "the teacher has model_type bert, the student llama"),
    "same width": (lambda: zoo.dense("llama"), lambda: zoo.dense("gpt2"), "the teacher has model_type gpt2, the student llama"),
    "depth": (make_llama, lambda: make_llama(layers=5), "the teacher has num_hidden_layers 5, the student 2"),
    "width": (make_llama, lambda: zoo.dense("llama"), "the teacher has hidden_size 64, the student 32"),
    "decoder": (make_t5, lambda: make_t5(decoder_layers=3), "the teacher has num_decoder_layers 3, the student 2"),
    "head": (make_llama, make_classifier, "the teacher is a LlamaForSequenceClassification, the student a LlamaForCausalLM, with another head"),
    "labels": (make_classifier, lambda: make_classifier(labels=3), "the teacher has num_labels 3, the student 2"),
    "directory": (make_llama, lambda: "dense", "teacher must be a transformers model, got str"),
}


@pytest.mark.parametrize("options", [{"distill": Distill()}, {"recovery": Recovery(init="residual")}], ids=["distilled", "residual"])
@pytest.mark.parametrize(("make", "teacher", "says"), TEACHERS.values(), ids=TEACHERS)
def test_a_teacher_of_another_architecture_is_refused(make, teacher, says, options):
    model = compress(make())
    task = {make_t5: "seq2seq-lm", make_classifier: "sequence-classification"}.get(make, "causal-lm")
    with pytest.raises(CaloraError, match=says):
        run(model, teacher=teacher(), task=task, **options)
    assert cx.list_adapters(model) == []


OTHER_MODELS = {
    "architecture": (make_t5, "seq2seq-lm", r"targets model\.layers\.0\.\S+, which this model does not have"),
    "fewer layers": (lambda: make_llama(layers=1), "causal-lm", r"targets model\.layers\.1\.\S+, which this model does not have"),
    "width": (lambda: zoo.dense("llama"), "causal-lm", r"for a 32 x \d+ layer; this one is 64 x"),
}


@pytest.mark.parametrize(("make", "task", "says"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_an_inherited_adapter_of_another_model_is_refused(make, task, says, lora_dir, tmp_path):
    source, model = compress(make_llama()), compress(make())
    run(source, lora=False, recovery=Recovery(rank=2))
    cx.save_adapter(source, "default", tmp_path / "recovery")
    for directory in (lora_dir, tmp_path / "recovery"):
        with pytest.raises(CaloraError, match=says):
            run(model, inherit=directory, task=task, recovery=Recovery(rank=2))
    assert cx.list_adapters(model) == []


def test_an_inherited_lora_that_lacks_a_layer_is_refused(lora_dir):
    with pytest.raises(CaloraError, match=r"targets model\.layers\.2\.\S+ but holds no tensors for it"):
        run(compress(make_llama(layers=3)), inherit=lora_dir)


def test_config_errors():
    for make in (
        lambda: Lora(rank=0), lambda: Lora(alpha=-1), lambda: Recovery(dropout=1.0), lambda: Recovery(init="svd"), lambda: Distill({"mid:3": 1}),
        lambda: Distill({-1: -1}), lambda: Distill({}, 0), lambda: Distill(temperature=0), lambda: Distill({-1: float("nan")}),
    ):  # fmt: skip
        with pytest.raises(CaloraError):
            make()
    model = compress(make_llama())
    with pytest.raises(CaloraError, match="has 3"):
        run(model, teacher=make_llama(), distill=Distill({7: 1.0}))
    with pytest.raises(CaloraError, match="no encoder"):
        run(model, teacher=make_llama(), distill=Distill({"encoder:-1": 1.0}))
    with pytest.raises(CaloraError, match="same model"):
        run(model, teacher=model, distill=Distill())
    with pytest.raises(CaloraError, match="learning_rate"):
        run(model, args=Settings(max_steps=40, learning_rate=1e30, warmup_steps=0, disable_tqdm=True))
    assert cx.list_adapters(model) == [] and all(p.grad is None for p in model.parameters())


def test_a_failed_run_gives_the_previous_adapter_back(lora_dir):
    model = compress(make_llama())
    cx.load_adapter(model, lora_dir, "before")
    cx.set_adapter(model, "before")
    with pytest.raises(CaloraError, match="learning_rate"):
        run(model, args=Settings(max_steps=40, learning_rate=1e30, warmup_steps=0, disable_tqdm=True))
    assert cx.list_adapters(model) == cx.active_adapters(model) == ["before"]
    with pytest.raises(CaloraError, match="loaded already"):
        run(model, adapter_name="before")
