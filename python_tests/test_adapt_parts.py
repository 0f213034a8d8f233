"""The parts of cx.adapt: the loss, the teacher and its cache, checkpoints, settings and schedules."""

import json
import shutil

import pytest
import torch
from adapt_helpers import (
    compress,
    make_bert,
    make_classifier,
    make_gradients_infinite,
    make_llama,
    make_lora,
    make_t5,
    make_tokenizer,
    text_of,
)
from transformers import TrainingArguments, get_scheduler

import calora_ext as cx
from calora_ext import CaloraError, WeightFormat
from calora_ext.adaptation import Distill, Lora, Recovery, Settings, cache_teacher, checkpoint, student
from calora_ext.adaptation.best import Best
from calora_ext.adaptation.loop import DataOrder
from calora_ext.adaptation.objective import Objective, Targets, hidden_state
from calora_ext.adaptation.teacher import LiveTeacher
from calora_ext.adapters import adapter_banks
from calora_ext.io.batches import collate

TEXTS = [text_of(400)]
ROWS = [{"prompt": text_of(2 + i, seed=i), "completion": text_of(1 + 2 * i, seed=9 + i)} for i in range(6)]


def run(model, **options):
    args = Settings(max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, disable_tqdm=True)
    options = {
        "data": TEXTS,
        "tokenizer": make_tokenizer(),
        "max_length": 16,
        "args": args,
        "distill": None,
        "recovery": Recovery(rank=4),
        **options,
    }
    return cx.adapt(model, **options)


def factors(model):
    return [
        f
        for bank in adapter_banks(model, "default").values()
        for pair in bank.branches("default")
        if pair
        for f in (pair.down, pair.up)
    ]


# -- the loss -------------------------------------------------------------------------------------------------------------


def padded_batch():
    samples = [{"input_ids": torch.tensor(ids), "labels": torch.tensor([-100, *ids[1:]])} for ids in ([5, 6, 7, 8], [9, 10])]
    return samples, collate(samples, pad_id=0)


def test_loss_equals_the_formula_sample_by_sample():
    """CE + sum lambda MSE + lambda T^2 KL, computed without any padding in float64."""
    distill = Distill({-1: 0.3, 0: 2.0}, logits=0.7, temperature=2.0)
    ours, theirs = make_llama(0), make_llama(1)
    samples, batch = padded_batch()
    objective = Objective("causal-lm", distill)
    terms = objective.loss(
        ours, batch, LiveTeacher(theirs, "causal-lm", distill).targets(samples, batch), objective.counts([batch])
    )
    ce, mse, kl = 0.0, {0: 0.0, -1: 0.0}, 0.0
    with torch.no_grad():
        for sample in samples:
            a, b = (m.double()(sample["input_ids"][None], output_hidden_states=True) for m in (ours, theirs))
            ce -= a.logits[0, :-1].log_softmax(-1).gather(1, sample["labels"][1:, None]).sum().item()
            for i in mse:
                mse[i] += (a.hidden_states[i] - b.hidden_states[i]).square().mean(-1).sum().item()
            p, q = ((m.logits[0, :-1] / 2).softmax(-1) for m in (b, a))
            kl += (p * (p / q).log()).sum().item()
    predictions, positions = 4, 6
    assert terms["task"].item() == pytest.approx(ce / predictions, rel=1e-5)
    assert terms["hidden"].item() == pytest.approx(0.3 * mse[-1] / positions + 2.0 * mse[0] / positions, rel=1e-5)
    assert terms["logits"].item() == pytest.approx(0.7 * 4 * kl / predictions, rel=1e-4)


def test_padding_does_not_count_unless_asked_to():
    samples, batch = padded_batch()
    more = {k: torch.nn.functional.pad(v, (0, 5), value=-100 if k == "labels" else 0) for k, v in batch.items()}
    ours, theirs = make_llama(0), make_llama(1)

    def hidden(batch, **options):
        distill = Distill({-1: 1.0}, **options)
        objective = Objective("causal-lm", distill)
        return objective.loss(
            ours, batch, LiveTeacher(theirs, "causal-lm", distill).targets(samples, batch), objective.counts([batch])
        )["hidden"].item()

    assert hidden(more) == pytest.approx(hidden(batch), rel=1e-5)
    assert hidden(batch, mask_padding=False) != pytest.approx(hidden(batch), rel=1e-3)
    assert hidden(more, mask_padding=False) != pytest.approx(hidden(batch, mask_padding=False), rel=1e-3)


def test_distillation_vanishes_when_student_and_teacher_agree():
    model, dense = make_llama(), make_llama()
    for p in [*model.parameters(), *dense.parameters()]:
        p.data = p.data.bfloat16().float()
    row = run(compress(model, WeightFormat("bf16")), teacher=dense, distill=Distill({-1: 1.0, -2: 1.0}, logits=1.0)).history[0]
    assert row["hidden"] < 1e-9 and abs(row["logits"]) < 1e-6 and row["task"] > 1


def test_hidden_states_are_those_of_the_blocks():
    """-1 is after the final norm; -2 is the input of the last block, in the encoder and in the decoder of a T5."""
    seen = {}

    def keep(name):
        return lambda module, args, kwargs: seen.update({name: args[0] if args else kwargs["hidden_states"]})

    llama, t5, ids = make_llama(), make_t5(), torch.tensor([[5, 6, 7]])
    llama.model.layers[-1].register_forward_pre_hook(keep("decoder"), with_kwargs=True)
    output = llama(ids, output_hidden_states=True)
    assert torch.equal(hidden_state(output, "decoder", -2), seen["decoder"])
    assert torch.equal(llama.lm_head(hidden_state(output, "decoder", -1)), output.logits)
    t5.encoder.block[-1].register_forward_pre_hook(keep("encoder"), with_kwargs=True)
    t5.decoder.block[-1].register_forward_pre_hook(keep("decoder"), with_kwargs=True)
    output = t5(ids, decoder_input_ids=ids, output_hidden_states=True)
    assert all(torch.equal(hidden_state(output, stack, -2), seen[stack]) for stack in ("encoder", "decoder"))


def test_teacher_has_no_gradient_and_no_dropout():
    teacher, distill = make_t5(dropout=0.5), Distill({"encoder:-1": 1.0, "decoder:-1": 1.0}, logits=1.0)
    teacher.train()
    samples = [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([8, 9])}]
    batch = collate(samples, 0)
    live = LiveTeacher(teacher, "seq2seq-lm", distill)
    one, two = live.targets(samples, batch), live.targets(samples, batch)
    assert torch.equal(one.logits, two.logits) and all(torch.equal(one.hidden[k], two.hidden[k]) for k in one.hidden)
    assert not one.logits.requires_grad and teacher.training
    objective = Objective("seq2seq-lm", distill)
    sum(objective.loss(make_t5(1), batch, one, objective.counts([batch])).values()).backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("make, ids", [(lambda: make_t5(dropout=0.5), {"decoder_input_ids": torch.tensor([[8, 9]])}), (make_bert, {})], ids=["t5", "bert"])
def test_a_distilled_student_has_no_dropout_of_its_own(make, ids):
    """T5 has it in modules and as a number that its attention hands to a function; BERT's is 0.1 by default."""
    model, inputs = make(), {"input_ids": torch.tensor([[5, 6, 7]]), **ids}
    recovery = Recovery(rank=4)
    task = "seq2seq-lm" if ids else "sequence-classification"
    plan = student.plan(model, task, Lora(rank=4), recovery)
    student.attach(model, "x", plan, Lora(rank=4), recovery, None, task, seed=0)
    want = model(**inputs).logits.detach()

    def distances():
        with torch.no_grad():
            return [float((model(**inputs).logits - want).norm() / want.norm()) for _ in range(3)]

    with student.training(model, "x", plan, None, recovery, distilled=True):
        assert model.training and max(distances()) < 1e-5
    assert not model.training
    with student.training(model, "x", plan, None, recovery, distilled=False):  # put back
        assert min(distances()) > 1e-3 and len(set(distances())) == 3


def test_teacher_has_the_inherited_lora_or_its_own(tmp_path):
    peft = make_lora(tmp_path, make_llama())
    bare, loaded = make_llama(), make_llama()
    cx.load_adapter(loaded, tmp_path, "mine")
    cx.set_adapter(loaded, "mine")
    histories = [
        run(compress(make_llama()), inherit=tmp_path, teacher=t, distill=Distill()).history for t in (bare, loaded, peft)
    ]
    for history in histories[1:]:
        assert [r["hidden"] for r in history] == pytest.approx([r["hidden"] for r in histories[0]], rel=1e-4)
    assert all(
        "logits" in row for history in histories for row in history
    )  # by default the teacher's logits count where it knows the task
    without = run(compress(make_llama()), teacher=make_llama(), distill=Distill(), lora=False).history
    assert "logits" not in without[0] and without[0]["hidden"] != pytest.approx(histories[0][0]["hidden"], rel=1e-3)
    assert cx.list_adapters(bare) == [] and cx.active_adapters(loaded) == ["mine"]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_takes_no_step(max_grad_norm, tmp_path):
    model = make_gradients_infinite(compress(make_llama()))
    args = checkpointed(tmp_path, warmup_steps=0, max_grad_norm=max_grad_norm)
    with pytest.raises(CaloraError, match=r"the norm of the gradient is (inf|nan) at step 1; lower learning_rate \(0\.01\)"):
        run(model, args=args)
    assert cx.list_adapters(model) == [] and checkpoint.found_in(tmp_path) == []


def test_a_head_keeps_no_gradient_of_a_step_that_failed():
    model = compress(make_classifier())
    model.score.register_forward_hook(lambda module, args, output: output.register_hook(lambda grad: grad * float("inf")) and None)
    with pytest.raises(CaloraError, match="norm of the gradient"):
        run(model, data=[{"text": "a b", "label": 1}], task="sequence-classification")
    assert all(p.grad is None for p in model.parameters())


# -- the teacher's cache --------------------------------------------------------------------------------------------------

DISTILL = Distill({-1: 0.3, -2: 0.1}, logits=0.5, temperature=1.5)


@pytest.mark.parametrize(
    ("task", "make", "data", "end"),
    [
        ("causal-lm", make_llama, ROWS, ""),
        ("seq2seq-lm", make_t5, ROWS, "</s>"),
        ("sequence-classification", make_classifier, None, ""),
    ],
)
def test_training_from_the_cache_equals_training_with_the_teacher(task, make, data, end, tmp_path):
    data = data or [{"text": text_of(2 + i, seed=i), "label": i % 2} for i in range(6)]
    options = {"data": data, "task": task, "tokenizer": make_tokenizer(end), "max_length": 32, "distill": DISTILL}
    cache_teacher(tmp_path / "full", make(1), **{k: v for k, v in options.items()}, dtype="float32", top_k=None, batch_size=4)
    cache_teacher(tmp_path / "top", make(1), **options, top_k=8)
    histories = {}
    for name, teaching in {
        "live": {"teacher": make(1)},
        "full": {"teacher_cache": tmp_path / "full"},
        "top": {"teacher_cache": tmp_path / "top"},
    }.items():
        histories[name] = run(compress(make()), **options, **teaching).history
    for live, full, top in zip(*histories.values(), strict=True):
        assert full == pytest.approx(live, rel=1e-4)
        assert top["hidden"] == pytest.approx(live["hidden"], rel=0.02)  # bf16, and other gradients from the second step on
        assert task == "sequence-classification" or 0 < top["logits"] < live["logits"]


def test_top_k_of_the_whole_vocabulary_is_the_full_divergence():
    objective = Objective("causal-lm", Distill({}, logits=1.0, temperature=1.5))
    _, batch = padded_batch()
    model, logits = make_llama(), torch.randn(2, 4, 28)
    top = (logits / 1.5).log_softmax(-1).topk(28)
    few = (logits / 1.5).log_softmax(-1).topk(5)
    full, all_of_them, five = (
        objective.loss(model, batch, t, objective.counts([batch]))["logits"].item()
        for t in (Targets({}, logits), Targets({}, top=(top.values, top.indices)), Targets({}, top=(few.values, few.indices)))
    )
    assert all_of_them == pytest.approx(full, rel=1e-4)
    assert 0 < five < full  # merging outcomes loses information, never adds any


def test_cache_of_another_run_is_refused(tmp_path):
    path, dense = tmp_path / "cache", make_llama()
    run(compress(make_llama()), teacher=dense, teacher_cache=path, distill=Distill())  # made on the way
    assert run(compress(make_llama()), teacher=dense, teacher_cache=path, distill=Distill()).arm == "rd-rc-d"
    for options, says in [
        ({"teacher": make_llama(1)}, "another teacher"),
        ({"data": [text_of(300, seed=1)]}, "another data"),
        ({"max_length": 8}, "another max_length"),
        ({"tokenizer": make_tokenizer_with_one_more_word()}, "another tokenizer"),
        ({"distill": Distill({0: 1.0})}, "another hidden states"),
        ({"distill": Distill(logits=1.0)}, "another logits"),
    ]:
        with pytest.raises(CaloraError, match=says):
            run(compress(make_llama()), **{"teacher_cache": path, "distill": Distill(), **options})
    make_lora(tmp_path / "lora", make_llama())
    with pytest.raises(CaloraError, match="another inherited adapter"):
        run(compress(make_llama()), inherit=tmp_path / "lora", teacher_cache=path, distill=Distill())
    with pytest.raises(CaloraError, match=r"no teacher\.json"):
        run(compress(make_llama()), teacher_cache=tmp_path / "none", distill=Distill())
    with pytest.raises(CaloraError, match="exists already"):
        cache_teacher(path, dense, data=TEXTS, tokenizer=make_tokenizer())
    with pytest.raises(CaloraError, match="distill must be a "):
        cache_teacher(tmp_path / "none", dense, data=TEXTS, tokenizer=make_tokenizer(), distill=None)
    manifest = json.loads((path / "teacher.json").read_text())
    for damage in ({"shards": []}, {"about": None}, {"shards": dict.fromkeys(manifest["shards"], 3)}):
        (path / "teacher.json").write_text(json.dumps(manifest | damage))
        with pytest.raises(CaloraError, match=r"make (it|the cache) again"):
            run(compress(make_llama()), teacher_cache=path, distill=Distill())
    (path / "teacher.json").write_text(json.dumps(manifest))
    shard = next(path.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CaloraError, match="damaged"):
        run(compress(make_llama()), teacher_cache=path, distill=Distill())


def make_tokenizer_with_one_more_word():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["more"])
    return tokenizer


def test_an_interrupted_cache_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(LiveTeacher, "targets", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(tmp_path / "cache", make_llama(), data=TEXTS, tokenizer=make_tokenizer())
    assert list(tmp_path.iterdir()) == []


# -- checkpoints ----------------------------------------------------------------------------------------------------------


def checkpointed(path, **options):
    return Settings(
        max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, weight_decay=0.1,
        output_dir=str(path), save_steps=2, disable_tqdm=True, **options,
    )  # fmt: skip


def test_interrupted_and_resumed_is_bit_for_bit_the_uninterrupted_run(tmp_path, monkeypatch):
    options = {
        "recovery": Recovery(rank=4, dropout=0.3),
        "lora": Lora(rank=4, dropout=0.2),
        "teacher": make_llama(1),
        "distill": Distill(),
    }
    whole, broken = compress(make_llama()), compress(make_llama())
    want = run(whole, args=checkpointed(tmp_path / "a"), **options)
    save = checkpoint.save

    def save_and_die(directory, step, *rest):
        save(directory, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(broken, args=checkpointed(tmp_path / "b"), **options)
    assert cx.list_adapters(broken) == [] and not broken.training
    monkeypatch.undo()
    torch.manual_seed(12345)  # nothing may depend on it
    got = run(broken, args=checkpointed(tmp_path / "b", resume_from_checkpoint=True), **options)
    assert got.resumed_at == 4 and got.history == want.history
    assert all(torch.equal(a, b) for a, b in zip(factors(whole), factors(broken), strict=True))


def test_checkpoints_hold_the_adapter_alone_and_are_thinned(tmp_path):
    result = run(compress(make_llama()), args=checkpointed(tmp_path, save_total_limit=2))
    assert [p.name for p in checkpoint.found_in(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    size = (tmp_path / "checkpoint-6" / "trained.safetensors").stat().st_size
    assert result.adapter_bytes < size < 1.3 * result.adapter_bytes
    assert sorted(p.suffix for p in (tmp_path / "checkpoint-6").iterdir()) == [".json", ".safetensors", ".safetensors"]


def test_checkpoints_of_an_earlier_run_do_not_displace_new_ones(tmp_path):
    (tmp_path / "checkpoint-90").mkdir()
    (tmp_path / "checkpoint-90" / "state.json").write_text("{}")
    run(compress(make_llama()), args=checkpointed(tmp_path, save_total_limit=1))
    assert [p.name for p in checkpoint.found_in(tmp_path)] == ["checkpoint-6"]


def test_checkpoint_of_another_run_is_refused(tmp_path):
    run(compress(make_llama()), args=checkpointed(tmp_path))
    model = compress(make_llama())
    for options, says in [
        ({"args": checkpointed(tmp_path, seed=7, resume_from_checkpoint=True)}, "seed changed"),
        ({"data": [text_of(300, seed=1)]}, "data changed"),
        ({"recovery": Recovery(rank=5)}, "recovery changed"),
        ({"args": checkpointed(tmp_path, resume_from_checkpoint=str(tmp_path / "x"))}, "not a checkpoint"),
    ]:
        with pytest.raises(CaloraError, match=says):
            run(model, **{"args": checkpointed(tmp_path, resume_from_checkpoint=True), **options})
    newest = tmp_path / "checkpoint-6"
    shutil.copy(newest / "trained.safetensors", newest / "optimizer.safetensors")
    with pytest.raises(CaloraError, match="other parameters"):
        run(model, args=checkpointed(tmp_path, resume_from_checkpoint=True))
    (newest / "trained.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CaloraError, match="damaged"):
        run(model, args=checkpointed(tmp_path, resume_from_checkpoint=True))
    (newest / "state.json").write_text("[]")
    with pytest.raises(CaloraError):
        run(model, args=checkpointed(tmp_path, resume_from_checkpoint=True))
    assert cx.list_adapters(model) == []


def test_nothing_to_resume_starts_afresh(tmp_path):
    assert run(compress(make_llama()), args=checkpointed(tmp_path, resume_from_checkpoint=True)).resumed_at == 0
    state = json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())
    assert state["step"] == 2 and len(state["history"]) == 2


# -- the best step ---------------------------------------------------------------------------------------------------------


HELD_OUT = [text_of(60, seed=3)]


def keeping(steps, **options):
    plain = {"lr_scheduler_type": "constant", "per_device_train_batch_size": 2, "disable_tqdm": True, "warmup_steps": 0}
    return Settings(max_steps=steps, **{"learning_rate": 2e-2, "load_best_model_at_end": True, "eval_steps": 1, **plain, **options})


def test_the_step_with_the_lowest_held_out_loss_is_kept():
    model = compress(make_llama())
    result = run(model, args=keeping(12), eval_data=HELD_OUT)
    measured = [result.eval_before["loss"], *(row["eval_loss"] for row in result.history)]
    assert 0 < result.kept_step < 12 and len(measured) == 13  # it learns first, then learns by heart
    assert result.kept_step == measured.index(min(measured)) and result.eval_after["loss"] == pytest.approx(min(measured), rel=1e-6)
    assert f"step {result.kept_step}" in str(result)
    shorter = compress(make_llama())
    last = run(shorter, args=keeping(result.kept_step, load_best_model_at_end=False))  # a constant rate: the same steps
    assert last.kept_step is None and "eval_loss" not in last.history[0]
    assert all(torch.equal(a, b) for a, b in zip(factors(model), factors(shorter), strict=True))


def test_training_that_only_harms_leaves_the_adapter_as_it_was(tmp_path):
    make_lora(tmp_path / "lora", make_llama())
    model, inherited, ids = compress(make_llama()), compress(make_llama()), torch.arange(4, 20)[None]
    cx.load_adapter(inherited, tmp_path / "lora", "default")
    cx.set_adapter(inherited, "default")
    other = ["yes no question answer " * 20]  # words that the training data lacks
    result = run(model, inherit=tmp_path / "lora", recovery=None, args=keeping(3), data=["a b c d " * 80], eval_data=other)
    assert all(row["eval_loss"] > result.eval_before["loss"] for row in result.history)
    assert result.kept_step == 0 and result.eval_after == result.eval_before
    assert torch.equal(model(ids).logits, inherited(ids).logits)


def test_a_resumed_run_keeps_the_same_step(tmp_path, monkeypatch):
    options = {"eval_data": HELD_OUT}
    whole, broken = compress(make_llama()), compress(make_llama())
    want = run(whole, args=keeping(12), **options)
    checkpoints = {"output_dir": str(tmp_path), "save_steps": want.kept_step + 2}
    save = checkpoint.save

    def save_and_die(*rest):
        save(*rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_die)  # after the best step
    with pytest.raises(KeyboardInterrupt):
        run(broken, args=keeping(12, **checkpoints), **options)
    monkeypatch.undo()
    got = run(broken, args=keeping(12, **checkpoints, resume_from_checkpoint=True), **options)
    assert got.resumed_at == want.kept_step + 2 and got.kept_step == want.kept_step and got.history == want.history
    assert all(torch.equal(a, b) for a, b in zip(factors(whole), factors(broken), strict=True))
    cx.delete_adapter(broken, "default")
    with pytest.raises(CaloraError, match="eval_data"):
        run(broken, args=keeping(12, **checkpoints, resume_from_checkpoint=True), eval_data=[text_of(60, seed=4)])
    for path in checkpoint.found_in(tmp_path):
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({k: v for k, v in state.items() if k != "best"}))
    with pytest.raises(CaloraError, match="holds no best step"):
        run(broken, args=keeping(12, **checkpoints, resume_from_checkpoint=True), **options)


def test_a_held_out_loss_that_is_never_finite_keeps_the_start():
    parameters, losses = {"p": torch.nn.Parameter(torch.zeros(2))}, iter([float("nan"), float("inf"), 3.0, float("nan"), 2.0])
    best = Best(lambda: next(losses))
    kept = []
    for step in range(5):
        parameters["p"].data.fill_(step)
        best.offer(step, parameters)
        kept.append((best.step, float(best.tensors["p"][0])))
    assert kept == [(0, 0), (0, 0), (2, 2), (2, 2), (4, 4)] and best.loss == 2.0


def test_keeping_the_best_refuses_what_it_cannot_do(tmp_path):
    model = compress(make_llama())
    with pytest.raises(CaloraError, match="needs eval_data"):
        run(model, args=keeping(2))
    with pytest.raises(CaloraError, match="load_best_model_at_end"):
        cx.sparse_adapt(model, data=TEXTS, tokenizer=make_tokenizer(), sparsity=0.5, args=keeping(2))
    with pytest.raises(CaloraError, match="eval_steps"):
        keeping(2, eval_steps=0)
    same = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 4, "eval_steps": 2}
    got = Settings.of(arguments(tmp_path, **same))
    assert got.load_best_model_at_end and got.eval_steps == 2
    with pytest.raises(CaloraError, match="metric_for_best_model"):
        Settings.of(arguments(tmp_path, **same, metric_for_best_model="accuracy"))
    with pytest.raises(CaloraError, match="greater_is_better"):
        Settings.of(arguments(tmp_path, **same, greater_is_better=True))
    with pytest.raises(CaloraError, match="eval_strategy"):
        Settings.of(arguments(tmp_path, load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch"))


# -- settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_schedules_are_those_of_transformers(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=20)
    settings = Settings(learning_rate=0.1, lr_scheduler_type=name, warmup_steps=0.25)
    for step in range(20):
        assert settings.rate(step, 20) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_noam_is_that_of_bmtrain():
    settings = Settings(learning_rate=1e-3, lr_scheduler_type="noam", warmup_steps=100)
    assert settings.rate(99, 500) == pytest.approx(1e-4) == max(settings.rate(t, 500) for t in range(500))
    assert settings.rate(49, 500) == pytest.approx(5e-5) and settings.rate(399, 500) == pytest.approx(1e-3 / 20)


def arguments(tmp_path, **options):
    return TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)


def test_training_arguments_are_honoured_or_refused_by_name(tmp_path):
    fields = {
        "learning_rate": 3e-4, "max_steps": 7, "num_train_epochs": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4,
        "seed": 9, "data_seed": 8, "warmup_steps": 5, "lr_scheduler_type": "cosine", "weight_decay": 0.2, "max_grad_norm": 0.5,
        "save_steps": 11, "save_total_limit": 2, "adam_beta2": 0.95, "bf16": True,
    }  # fmt: skip
    got = Settings.of(arguments(tmp_path, **fields))
    assert {k: getattr(got, k) for k in fields} == fields and got.output_dir == str(tmp_path)
    assert Settings.of(arguments(tmp_path, save_strategy="no")).save_steps == 0
    for options, name in [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"), ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"group_by_length": True} if hasattr(TrainingArguments, "group_by_length") else {"train_sampling_strategy": "sequential"}, "group_by_length|train_sampling_strategy"),
        ({"optim": "adafactor"}, "optim"), ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type"),
    ]:  # fmt: skip
        with pytest.raises(CaloraError, match=name):
            Settings.of(arguments(tmp_path, **options))


def test_settings_count_steps_and_refuse_nonsense():
    assert Settings(num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=2).steps(17) == 5
    assert Settings(max_steps=3).steps(1000) == 3 and Settings(save_steps=0.25, output_dir="x").save_every(10) == 3
    for options in (
        {"learning_rate": 0},
        {"per_device_train_batch_size": 0},
        {"lr_scheduler_type": "x"},
        {"save_steps": 5},
        {"num_train_epochs": 0},
    ):
        with pytest.raises(CaloraError):
            Settings(**options)
    for name, value, kind in [
        ("warmup_steps", float("nan"), "a finite number"), ("num_train_epochs", float("inf"), "a finite number"), ("weight_decay", "0.1", "a finite number"),
        ("max_grad_norm", float("nan"), "a finite number"), ("learning_rate", None, "a finite number"), ("max_steps", 1.5, "a whole number"),
        ("per_device_train_batch_size", 2.5, "a whole number"), ("seed", True, "a whole number"), ("save_total_limit", 0.5, "a whole number"),
    ]:  # fmt: skip
        with pytest.raises(CaloraError, match=f"^{name} must be {kind}, got {value!r}$"):
            Settings(**{name: value})
    assert Settings(max_grad_norm=float("inf"), data_seed=None, learning_rate=1).learning_rate == 1


def test_data_order_visits_everything_once_an_epoch():
    order = DataOrder(7, seed=1)
    epochs = [[order[i] for i in range(e * 7, e * 7 + 7)] for e in range(3)]
    assert all(sorted(e) == list(range(7)) for e in epochs) and epochs[0] != epochs[1]
    again = DataOrder(7, seed=1)
    assert [again[i] for i in range(10, 14)] == [*epochs[1][3:7]]  # from the middle, as a resumed run starts


def test_head_in_bf16_is_trained_in_fp32():
    model = compress(make_classifier().bfloat16())
    rows = [{"text": text_of(4, seed=i), "label": i % 2} for i in range(4)]
    before = model.score.weight.clone()
    run(model, data=rows, task="sequence-classification")
    assert model.score.weight.dtype == torch.bfloat16 and not torch.equal(model.score.weight, before)
    plan = student.plan(model, "sequence-classification", Lora(), None)
    assert plan.head == "score"
