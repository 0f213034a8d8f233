"""CaloraTrainer: in one process it is cx.adapt; in two it is one; what FSDP2 shards; what a killed worker costs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trainer_worker as worker
from adapt_helpers import (
    compress,
    make_classifier,
    make_gradients_infinite,
    make_llama,
    make_lora,
    make_t5,
    make_tokenizer,
    text_of,
)
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

import calora_ext as cx
from calora_ext import CaloraError
from calora_ext.adaptation import Distill, Lora, Recovery, Settings

TEXTS = [text_of(400)]
LABELLED = [{"text": text_of(5, seed=i), "label": i % 2} for i in range(12)]
PROMPTS = [{"prompt": text_of(2 + i % 4, seed=i), "completion": text_of(1 + i % 5, seed=50 + i)} for i in range(12)]
STEPS = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "weight_decay": 0.1}


def arguments(directory, **options):
    return TrainingArguments(
        str(directory), **{**STEPS, "save_strategy": "no", **options}, report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1
    )


def make(model, args, **options):
    options = {"train_dataset": TEXTS, "processing_class": make_tokenizer(), "max_length": 16, "distill": None, **options}
    return cx.CaloraTrainer(model, args, **options)


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def tensors(directory):
    """Of an adapter directory: LoRA and recovery."""
    return {**load_file(directory / "adapter_model.safetensors"), **load_file(directory / "recovery_model.safetensors")}


def assert_close(one, other, **tolerances):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerances)


# -- one process is adapt ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "model", "data", "options"),
    [
        ("causal-lm", make_llama, TEXTS, {"gradient_accumulation_steps": 2}),
        ("causal-lm", make_llama, PROMPTS, {"bf16": True}),
        ("causal-lm", make_llama, PROMPTS, {"activation_checkpointing": True}),
        ("seq2seq-lm", make_t5, PROMPTS, {"gradient_accumulation_steps": 2}),
        ("sequence-classification", make_classifier, LABELLED, {"data_seed": 3}),
    ],
    ids=["packed", "bf16", "checkpointed", "seq2seq", "labelled"],
)
def test_one_process_takes_the_steps_of_adapt(task, model, data, options, tmp_path):
    arm = {
        "task": task, "teacher": model(1), "distill": Distill({-1: 0.3}, 0.5), "lora": Lora(rank=4, dropout=0.2),
        "recovery": Recovery(rank=3, dropout=0.2), "eval_data": data[:3], "max_length": 16,
    }  # fmt: skip
    ours, theirs = compress(model()), compress(model())
    own = {"gradient_checkpointing" if k == "activation_checkpointing" else k: v for k, v in options.items()}
    result = cx.adapt(ours, data=data, tokenizer=make_tokenizer(), args=Settings(**STEPS, **own, warmup_steps=0, disable_tqdm=True), **arm)
    arm["eval_dataset"] = arm.pop("eval_data")
    trainer = make(theirs, arguments(tmp_path, warmup_steps=0, **options), train_dataset=data, **arm)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(result.eval_before["loss"], rel=2e-2 if options.get("bf16") else 1e-4)
    trainer.train()
    assert losses(trainer) == pytest.approx(result.losses, rel=1e-4 if not options.get("bf16") else 1e-2)
    cx.save_adapter(ours, "default", tmp_path / "adapt")
    trainer.save_model(tmp_path / "trainer")
    if not options.get("bf16"):  # Trainer hands the model's output over in fp32, so that the sum of its gradients is rounded elsewhere
        assert_close(tmp_path / "adapt", tmp_path / "trainer", rtol=1e-3, atol=1e-5)
    assert cx.active_adapters(theirs) == ["default"] and not theirs.is_activation_checkpointing and not theirs.training


def test_inherits_reads_a_cache_and_trains_again(tmp_path):
    make_lora(tmp_path / "lora", make_llama())
    model, teacher = compress(make_llama()), make_llama()
    options = {"inherit": tmp_path / "lora", "distill": Distill(logits=1.0), "teacher_cache": tmp_path / "cache"}
    trainer = make(model, arguments(tmp_path), teacher=teacher, **options)
    trainer.train()
    other = make(compress(make_llama()), arguments(tmp_path), **options)  # the cache alone
    other.train()
    assert losses(other) == losses(trainer) and cx.list_adapters(teacher) == []
    before = losses(trainer)
    trainer.train()
    assert len(losses(trainer)) == 3 and losses(trainer)[0] < before[0]
    cx.delete_adapter(model, "default")
    assert make(model, arguments(tmp_path), lora=False).arm.name == "rc"


def test_metrics_see_logits_and_labels(tmp_path):
    def accuracy(predicted):
        return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}

    model = compress(make_classifier())
    options = {"task": "sequence-classification", "train_dataset": LABELLED, "eval_dataset": LABELLED[:7], "compute_metrics": accuracy}
    trainer = make(model, arguments(tmp_path, per_device_eval_batch_size=7), **options)
    result = trainer.evaluate()
    ids = make_tokenizer()([row["text"] for row in LABELLED[:7]], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits
    labels = torch.tensor([row["label"] for row in LABELLED[:7]])
    assert result["eval_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert result["eval_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)


# -- checkpoints --------------------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def saving(directory, **options):
    return arguments(directory, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=2, **options)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
def test_interrupted_and_resumed_is_the_uninterrupted_run(optim, tmp_path):
    options = {"lora": Lora(rank=4, dropout=0.3), "recovery": Recovery(rank=3, dropout=0.3)}
    whole = make(compress(make_llama()), saving(tmp_path / "a", optim=optim), **options)
    whole.train(resume_from_checkpoint=True)  # nothing to go on from
    model = compress(make_llama())
    with pytest.raises(KeyboardInterrupt):
        make(model, saving(tmp_path / "b", optim=optim), callbacks=[Stop(5)], **options).train()
    assert cx.list_adapters(model) == ["default"] and not model.training
    (tmp_path / "b" / "checkpoint-6").mkdir()  # a checkpoint whose writing was interrupted
    (tmp_path / "b" / "checkpoint-6" / "trainer_state.json").write_text("{")
    torch.manual_seed(12345)
    resumed = make(compress(make_llama()), saving(tmp_path / "b", optim=optim), **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    for trainer, name in ((whole, "a"), (resumed, "b")):
        trainer.save_model(tmp_path / name / "last")
        assert sorted(p.name for p in (tmp_path / name).glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert_close(tmp_path / "a" / "last", tmp_path / "b" / "last", rtol=0, atol=0)


def test_a_checkpoint_is_an_adapter_and_holds_nothing_pickled(tmp_path):
    model = compress(make_llama())
    trainer = make(model, saving(tmp_path))
    trainer.train()
    files = {p.suffix for p in (tmp_path / "checkpoint-6").rglob("*") if p.is_file()}
    assert files == {".json", ".safetensors"}
    cx.load_adapter(model, tmp_path / "checkpoint-6", "saved")
    trainer.save_model(tmp_path / "last")
    cx.save_adapter(model, "saved", tmp_path / "saved")
    assert_close(tmp_path / "last", tmp_path / "saved", rtol=0, atol=0)
    with pytest.raises(CaloraError, match="learning_rate changed"):
        make(compress(make_llama()), saving(tmp_path, learning_rate=0.5)).train(resume_from_checkpoint=True)
    with pytest.raises(CaloraError, match="not a whole checkpoint"):
        make(compress(make_llama()), saving(tmp_path)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model = compress(make_llama())
    args = saving(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, learning_rate=0.5)
    trainer = make(model, args, eval_dataset=TEXTS)
    trainer.train()
    trainer.save_model(tmp_path / "last")
    assert_close(tmp_path / "last", Path(trainer.state.best_model_checkpoint), rtol=0, atol=0)


# -- bad input ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        ({"fp16": True}, {}, "bf16=True"),
        ({"train_sampling_strategy": "group_by_length"}, {}, "train_sampling_strategy"),
        ({"fsdp": True}, {}, "torchrun"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, {}, "fsdp_config"),
        ({}, {"data_collator": print}, "its own data_collator"),
        ({}, {"optimizers": (None, None)}, "its own optimizers"),
        ({}, {"args": Settings()}, "TrainingArguments"),
        ({}, {"distill": Distill()}, "teacher"),
        ({}, {"inherit": "no-such-directory"}, "no adapter directory"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(given, options, says, tmp_path):
    model = compress(make_llama())
    args = options.pop("args", None) or arguments(tmp_path, **given)
    with pytest.raises(CaloraError, match=says):
        make(model, args, **options)
    assert cx.list_adapters(model) == []


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    model = compress(make_llama())
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(CaloraError, match="the loss is nan at step 1"):
        make(model, arguments(tmp_path)).train()


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_takes_no_step(max_grad_norm, tmp_path):
    trainer = make(make_gradients_infinite(compress(make_llama())), arguments(tmp_path, max_grad_norm=max_grad_norm))
    start = {name: p.clone() for name, p in tensors_of(trainer, tmp_path / "start").items()}
    with pytest.raises(CaloraError, match=r"the norm of the gradient is (inf|nan) at step 1; lower learning_rate \(0\.01\)"):
        trainer.train()
    assert all(torch.equal(p, start[name]) for name, p in tensors_of(trainer, tmp_path / "end").items())


def tensors_of(trainer, directory):
    trainer.save_model(directory)
    return tensors(directory)


# -- two processes ----------------------------------------------------------------------------------------------------------------

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch was built without gloo"
)


def torchrun(mode, directory, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HF_HUB_OFFLINE": "1"}
    # torch 2.13's agent keeps one store for all restarts, and a restarted worker that finds the dead one's gloo address there waits for it
    # for ever (half of the restarts here did): a store for each
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    script = str(Path(worker.__file__))
    done = subprocess.run([*command, script, mode, str(directory)], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]


def found(directory, name):
    return [json.loads((directory / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """What two processes made of several runs."""
    directory = tmp_path_factory.mktemp("processes")
    make_llama(1).save_pretrained(directory / "dense")
    model = make_llama()
    cx.compress(model, cx.Recipe(weights="int4", group_size=32))
    model.save_pretrained(directory / "small")
    torchrun("all", directory)
    return directory


@needs_gloo
@pytest.mark.processes
def test_two_processes_equal_one(directory, tmp_path):
    """Prompts of different lengths; 2 processes x 2 micro-batches x 2 samples against one batch of 8."""
    one = worker.plain(directory, per_device_train_batch_size=8)
    one.train()
    for process in found(directory, "plain"):
        assert process["losses"] == pytest.approx(losses(one), rel=1e-5)
    one.save_model(tmp_path)
    assert_close(directory / "plain", tmp_path, rtol=1e-4, atol=1e-6)


@needs_gloo
@pytest.mark.processes
def test_fsdp_shards_adapters_and_optimiser(directory):
    ddp, fsdp = found(directory, "ddp"), found(directory, "fsdp")
    assert [f["losses"] for f in fsdp] == [pytest.approx(d["losses"], rel=1e-5) for d in ddp]
    assert_close(directory / "ddp", directory / "fsdp", rtol=1e-3, atol=2e-5)
    whole = fsdp[0]["whole"]
    parameters, moments = zip(*(f["here"] for f in fsdp), strict=True)
    assert parameters == moments and sum(parameters) == whole and max(parameters) < 0.6 * whole


@needs_gloo
@pytest.mark.processes
def test_a_checkpoint_resumes_however_it_was_sharded(directory):
    for ddp, resharded in zip(found(directory, "ddp"), found(directory, "resharded"), strict=True):
        assert resharded["resumed_at"] == 2
        assert resharded["losses"] == pytest.approx(ddp["losses"], rel=1e-5)


@needs_gloo
@pytest.mark.processes
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_gradient_that_is_not_finite_in_one_process_is_an_error_in_both(directory, name):
    for process in found(directory, f"{name}-diverged"):
        assert "the norm of the gradient is" in process["error"] and process["step"] == 0


@needs_gloo
@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc/self/smaps")
@pytest.mark.parametrize("name", ["plain", "ddp", "fsdp"])
def test_packed_weights_stay_one_mapping_of_their_file(directory, name):
    assert [process["private"] for process in found(directory, name)] == [0, 0]


@needs_gloo
@pytest.mark.processes
def test_a_killed_worker_costs_the_steps_since_the_checkpoint(directory):
    torchrun("killed", directory, "--max-restarts", "3")
    for killed, whole in zip(found(directory, "killed"), found(directory, "whole"), strict=True):
        assert killed["resumed_at"] == 4 and killed["losses"] == whole["losses"]
    assert_close(directory / "killed", directory / "whole", rtol=0, atol=0)
