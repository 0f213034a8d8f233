"""cx.sparse_adapt and `calora sparse-adapt` on tiny models: what is kept through training, packing, saving; resuming; bad input."""

import json

import pytest
import torch
from _tiny import gpt2
from adapt_helpers import make_classifier, make_llama, make_lora, make_t5, make_tokenizer, text_of
from torch import nn
from transformers import TrainingArguments

import calora_ext as cx
from calora_ext import CaloraError, CompressedLinear, Recipe
from calora_ext.adaptation import Distill, Settings, loop
from calora_ext.adaptation.objective import Objective
from calora_ext.adaptation.teacher import LiveTeacher
from calora_ext.cli import main
from calora_ext.losa import phases as losa_phases
from calora_ext.losa import run as losa_run
from calora_ext.losa.masked import MaskedLinear
from calora_ext.losa.schedule import sparsity_at

TEXTS = [text_of(800)]
QUICK = {"max_steps": 10, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "disable_tqdm": True}
IDS = torch.randint(4, 28, (2, 12), generator=torch.Generator().manual_seed(5))


def adapt(model, settings=None, **options):
    options = {"data": TEXTS, "tokenizer": make_tokenizer(), "max_length": 16, "prunings": 3, "rank": 4, **options}
    return cx.sparse_adapt(model, args=Settings(**QUICK | (settings or {})), **options)


def sparse_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, CompressedLinear) and m.format.sparse}


def dies_after(steps, monkeypatch):
    """The training is interrupted after so many optimiser steps."""
    step, left = loop._step, steps

    def dies(*arguments):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", dies)


def mask_of(layer):
    return layer.format.unpack(layer.packed_tensors(), layer.in_features, layer.out_features).mask


def packed(model):
    return {f"{name}.{key}": t.clone() for name, layer in sparse_layers(model).items() for key, t in layer.packed_tensors().items()}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def trained(monkeypatch):
    """{layer: (merged weight in fp32, mask)} of the run that follows, as they were before packing."""
    seen = {}
    pack = losa_run._pack

    def spy(model, coverage, recipe, layers, batches):
        assert all(layer.rank for layer in layers.values())  # still apart
        seen.update({name: (layer.weight.clone(), layer.mask.clone()) for name, layer in layers.items()})
        return pack(model, coverage, recipe, layers, batches)

    monkeypatch.setattr(losa_run, "_pack", spy)
    return seen


# -- what is kept ----------------------------------------------------------------------------------------------------------


RECIPES = [
    Recipe(weights="bf16", sparsity=0.7, rates="arithmetic"), Recipe(weights="bf16", sparsity="2:4", pruner="wanda"),
    Recipe(weights="int8", sparsity=0.5, pruner="magnitude", rounding="rtn"), Recipe(weights="int8", sparsity="2:4"),
    Recipe(weights="int4", sparsity=0.6, group_size=32), Recipe(weights="int4", sparsity="3:8", group_size=-1, rounding="rtn"),
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.weights} {r.sparsity} {r.pruner} {r.rounding}")
def test_zero_pattern_from_training_to_the_loaded_model(recipe, trained, tmp_path):
    model = make_llama()
    result = adapt(model, recipe=recipe)
    layers = sparse_layers(model)
    assert layers.keys() == trained.keys() and result.phases[-1]["pruned"] == sum(int((~m).sum()) for _, m in trained.values())
    for name, layer in layers.items():
        weight, mask = trained[name]
        assert not weight[~mask].any() and torch.equal(mask_of(layer), mask) and not layer.decode()[~mask].any()
        if recipe.weights == "bf16":
            assert torch.equal(layer.decode(), weight.bfloat16().float())  # rounded once, from fp32
            assert torch.equal(layer.decode() != 0, mask)
        error = (layer.decode() - weight).norm() / weight.norm()
        assert result.errors[name] == pytest.approx(float(error), rel=1e-4) and error < {"bf16": 2**-8, "int8": 0.05, "int4": 0.5}[recipe.weights]
    model.save_pretrained(tmp_path / "out")
    again = cx.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    for name, layer in sparse_layers(again).items():
        assert torch.equal(mask_of(layer), trained[name][1]) and layer.bank is None
    assert again.config.quantization_config.recipe == result.recipe


@pytest.mark.parametrize("recipe", [
    Recipe(weights="int4", sparsity=0.6, group_size=32), Recipe(weights="int8", sparsity="2:4"), Recipe(weights="nf4", sparsity=0.5, pruner="wanda"),
    Recipe(weights="bf16", sparsity=0.7),
], ids=lambda r: f"{r.weights} {r.sparsity}")  # fmt: skip
def test_on_the_grid_packing_changes_nothing(recipe, trained, tmp_path):
    model = make_llama()
    result = adapt(model, recipe=recipe, on_grid=True)
    assert result.recipe.rounding == "rtn" and result.run["on_grid"] is True
    layers = sparse_layers(model)
    dense = make_llama()
    for name, layer in layers.items():
        weight, mask = trained[name]
        assert result.errors[name] == 0.0 and torch.equal(layer.decode(), weight) and torch.equal(mask_of(layer), mask)
        dense.get_submodule(name).weight.data = weight
    dense_again = make_llama()
    model.save_pretrained(tmp_path / "out")
    for name, layer in sparse_layers(cx.load(tmp_path / "out")).items():
        dense_again.get_submodule(name).weight.data = layer.decode()
    assert torch.equal(logits(dense_again), logits(dense))  # by the same arithmetic
    cx.set_activations(model, "exact")
    model.lm_head = dense.lm_head
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-3 if recipe.weights != "bf16" else 0.05)


def test_training_on_the_grid_makes_the_packed_model_better():
    """One scale per row, where rounding takes most."""
    options = {"recipe": Recipe(weights="int4", group_size=-1, sparsity=0.5, rates="uniform"), "eval_data": TEXTS, "prunings": 1, "on_grid": True}
    untrained, trained = (adapt(make_llama(), {"max_steps": steps}, **options) for steps in (0, 40))
    assert trained.eval_packed["loss"] < untrained.eval_packed["loss"] - 0.1
    for result in (untrained, trained):
        assert result.eval_packed["loss"] == pytest.approx(result.eval_merged["loss"], abs=0.01)


@pytest.mark.parametrize("rates", ["uniform", "arithmetic", "rmi", {"model.layers.0": 0.6}])
def test_counts_are_exact_at_every_pruning(rates):
    model = make_llama()
    result = adapt(model, recipe=Recipe(weights="bf16", sparsity=0.73, rates=rates), prunings=4)
    weights = sum(layer.in_features * layer.out_features for layer in sparse_layers(model).values())
    assert [row["weights"] for row in result.phases] == [weights] * 4
    assert [row["pruned"] for row in result.phases] == [round(sparsity_at(0.73, t, 4) * weights) for t in (1, 2, 3, 4)]
    assert result.sparsity == result.phases[-1]["sparsity"] and [row["mean_rank"] for row in result.phases] == [2.5, 3.5, 4.5, 5.5]
    assert [row["steps"] for row in result.phases] == [1, 1, 2, 6] and len(result.history) == 10
    assert [row["step"] for row in result.history] == list(range(1, 11))
    if isinstance(rates, dict):
        assert result.phases[-1]["rates"]["model.layers.0"] == pytest.approx(0.6, abs=1e-3)


def test_training_helps_and_the_result_is_measured():
    results = [adapt(make_llama(), {"max_steps": steps}, eval_data=[text_of(300, seed=4)], sparsity=0.7) for steps in (0, 60)]
    untrained, trained = results
    assert trained.eval_merged["loss"] < untrained.eval_merged["loss"] and trained.eval_dense == untrained.eval_dense
    assert trained.eval_packed["loss"] == pytest.approx(trained.eval_merged["loss"], abs=0.02)
    table = str(trained)
    assert "70.00 %" in table and "mean rank" in table and trained.bytes_after < trained.bytes_before
    json.dumps(trained.to_dict())


@pytest.mark.parametrize("distill", [None, Distill(logits=1.0)], ids=["alone", "distilled"])
def test_the_models_own_dropout_is_off_where_it_is_distilled(monkeypatch, distill):
    """GPT-2 has 0.1 of it."""
    model, still, train = gpt2(), [], losa_phases.train

    def spy(model, *args, **options):
        assert model.training
        still.append(torch.equal(model(IDS).logits, model(IDS).logits))
        return train(model, *args, **options)

    monkeypatch.setattr(losa_phases, "train", spy)
    adapt(model, sparsity=0.5, distill=distill)
    assert still == [distill is not None] * 3
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1} and not model.training


def test_other_architectures(trained):
    """GPT-2's transposed layers, an encoder-decoder, a classifier, bf16 weights."""
    model = gpt2()
    adapt(model, sparsity=0.5)
    assert len(trained) == 8 and all(torch.equal(mask_of(layer), trained[name][1]) for name, layer in sparse_layers(model).items())
    uniform = Recipe(weights="bf16", sparsity=0.5)  # too little text to compare blocks
    pairs = [{"prompt": text_of(8, i), "completion": text_of(5, i + 50)} for i in range(24)]
    adapt(make_t5(), data=pairs, tokenizer=make_tokenizer(end="</s>", begin=""), task="seq2seq-lm", recipe=uniform)
    rows = [{"text": text_of(8, i), "label": i % 2} for i in range(24)]
    result = adapt(make_classifier(), data=rows, eval_data=rows, task="sequence-classification", recipe=uniform)
    assert 0 <= result.eval_packed["accuracy"] <= 1
    model = make_llama().bfloat16()
    adapt(model, sparsity=0.5)
    assert {layer.weight.dtype for layer in sparse_layers(model).values()} == {torch.bfloat16} and logits(model).dtype == torch.bfloat16


def test_nothing_pruned_and_everything_pruned():
    model, dense = make_llama(), make_llama()
    adapt(model, {"max_steps": 0}, sparsity=0.0)
    cx.set_activations(model, "exact")
    torch.testing.assert_close(logits(model), logits(dense), rtol=0.05, atol=0.05)
    result = adapt(model := make_llama(), {"max_steps": 2}, sparsity=1.0)
    assert result.sparsity == 1.0 and not any(layer.decode().any() for layer in sparse_layers(model).values())


@pytest.mark.parametrize(("sparsity", "times"), [(0.6, 5), (0.5, 1), ("2:4", 1)])
def test_a_large_share_is_approached_and_half_or_a_pattern_pruned_at_once(sparsity, times):
    assert len(adapt(make_llama(), sparsity=sparsity, prunings=None).phases) == times


@pytest.mark.parametrize(("pruner", "init"), [("sparsegpt", "residual"), ("wanda", "zero"), ("magnitude", "zero")])
def test_adapters_start_from_the_residual_where_its_statistics_are_at_hand(pruner, init):
    recipe = Recipe(weights="bf16", sparsity=0.5, pruner=pruner)
    assert adapt(make_llama(), {"max_steps": 1}, recipe=recipe, prunings=1).run["init"] == init


def test_distillation_is_from_the_model_as_it_came():
    """Nothing pruned: student and teacher agree at the first step, and no longer once trained."""
    both = Distill(hidden={-1: 0.05}, logits=2.0)
    result = adapt(make_llama(), sparsity=0.0, prunings=1, distill=both)
    assert abs(result.history[0]["logits"]) < 1e-5 and result.history[0]["hidden"] < 1e-8
    assert result.history[-1]["logits"] > 1e-4 and result.history[-1]["hidden"] > 1e-6
    pruned = adapt(make_llama(), sparsity=0.5, prunings=1, distill=both)
    assert pruned.history[0]["logits"] > 1e-3


def test_ways_to_train_that_change_nothing(tmp_path):
    """Activations formed again, a batch in two halves, settings of transformers: the same losses."""
    options = {"recipe": Recipe(weights="bf16", sparsity=0.5), "prunings": 2, "distill": Distill(hidden={-1: 1.0}, logits=1.0)}
    want = adapt(make_llama(), {"per_device_train_batch_size": 4}, **options).losses
    for settings in ({"gradient_checkpointing": True, "per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 2}):
        assert adapt(make_llama(), settings, **options).losses == pytest.approx(want, rel=1e-4)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=10, per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=0.05, save_strategy="no"
    )
    theirs = cx.sparse_adapt(make_llama(), data=TEXTS, tokenizer=make_tokenizer(), max_length=16, rank=4, args=arguments, **options)
    assert theirs.losses == pytest.approx(want, rel=1e-4) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", [Recipe(weights="bf16", sparsity="2:4"), Recipe(weights="bf16", sparsity=0.7, pruner="wanda")], ids=str)
def test_a_start_from_the_residual_loses_less(recipe):
    """Without any training; the zeros are as many."""
    losses = {}
    for init in ("zero", "residual"):
        result = adapt(model := make_llama(), {"max_steps": 0}, recipe=recipe, init=init, prunings=1, eval_data=TEXTS[:20])
        losses[init] = reconstruction_of(model)
        assert result.sparsity == pytest.approx(0.5 if recipe.sparsity == "2:4" else 0.7, abs=1e-3)
    assert losses["residual"] < losses["zero"]


def reconstruction_of(model):
    """How far the last hidden states are from the dense model's on the training text."""
    dense, tokenizer = make_llama(), make_tokenizer()
    ids = tokenizer(TEXTS[:16], return_tensors="pt", padding=True).input_ids
    with torch.no_grad():
        cx.set_activations(model, "exact")
        a, b = (m.model(ids).last_hidden_state for m in (dense, model))
    return ((a - b).norm() / a.norm()).item()


def test_a_sparse_branch_moves_what_has_the_largest_gradient(monkeypatch):
    """By backpropagation through a plain model with the pruned weights; as many as asked for, at every pruning anew."""
    seen, choose = [], losa_phases.Run._chosen

    def choose_and_check(run, phase, samples):
        plain = make_llama()
        for name, layer in run.layers.items():
            plain.get_submodule(name).weight.data.copy_(layer.base)
        order, size = loop.DataOrder(len(samples), run.settings.seed), QUICK["per_device_train_batch_size"]
        first = size * sum(row["steps"] for row in run.phases[:-1])
        for begin in range(first, first + losa_phases.PROBES * size, size):
            ids = torch.stack([samples[order[i]]["input_ids"] for i in range(begin, begin + size)])
            plain(input_ids=ids, labels=ids).loss.backward()
        chosen = choose(run, phase, samples)
        for name, at in chosen.items():
            mask, size_of = run.layers[name].mask.flatten(), plain.get_submodule(name).weight.grad.abs().flatten()
            others = mask.clone()
            others[at] = False
            assert len(at) == round(0.1 * int(mask.sum())) and mask[at].all() and (at.diff() > 0).all()
            assert size_of[at].min() >= size_of[others].max() * (1 - 1e-4), name
            seen.append(len(at))
        return chosen

    monkeypatch.setattr(losa_phases.Run, "_chosen", choose_and_check)
    adapted, begin = [], MaskedLinear.adapt

    def adapt_and_look(layer, *arguments):
        begin(layer, *arguments)
        if layer.at is not None and len(layer.at) < int(layer.mask.sum()):
            adapted.append(len(layer.at))

    monkeypatch.setattr(MaskedLinear, "adapt", adapt_and_look)
    model = make_llama()
    result = adapt(model, {"max_steps": 20}, recipe=Recipe(weights="bf16", sparsity=0.6), prunings=2, sparse_branch=0.1)
    assert len(seen) == 2 * len(sparse_layers(model)) and sorted(adapted) == sorted(seen)
    assert result.sparsity == pytest.approx(0.6, abs=1e-4)


def test_the_result_carries_adapters(tmp_path):
    model = make_llama()
    adapt(model, sparsity=0.5)
    plain = logits(model)
    make_lora(tmp_path / "lora", make_llama())
    cx.load_adapter(model, tmp_path / "lora", adapter_name="chat")
    cx.set_adapter(model, "chat")
    assert not torch.equal(logits(model), plain)
    cx.disable_adapters(model)
    assert torch.equal(logits(model), plain)
    result = cx.adapt(model, data=TEXTS, tokenizer=make_tokenizer(), max_length=16, distill=None, adapter_name="more", args=Settings(**QUICK))
    assert result.steps == 10
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(cx.load(tmp_path / "out")), plain)


# -- the head of a classifier ----------------------------------------------------------------------------------------------

ROWS = [{"text": text_of(8, i), "label": i % 2} for i in range(24)]
CLASSIFY = {"data": ROWS, "task": "sequence-classification", "recipe": Recipe(weights="bf16", sparsity=0.5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_classifiers_head_trains_in_fp32(dtype, tmp_path, monkeypatch):
    model, dtypes, step = make_classifier().to(dtype), [], loop._step
    monkeypatch.setattr(loop, "_step", lambda model, parameters, *rest: dtypes.append(parameters["head.weight"].dtype) or step(model, parameters, *rest))
    before = model.score.weight.clone()
    adapt(model, sparse_branch=0.1, **CLASSIFY)
    assert set(dtypes) == {torch.float32} and (model.score.weight - before).abs().max() > 1e-3
    assert model.score.weight.dtype == dtype and model.score.weight.requires_grad and not model.score._forward_pre_hooks
    model.save_pretrained(tmp_path)
    assert torch.equal(cx.load(tmp_path).score.weight, model.score.weight)


def test_a_classifier_is_distilled_with_the_head_it_came_with(monkeypatch):
    model, heads, targets = make_classifier(), [], LiveTeacher.targets
    before = model.score.weight.clone()
    monkeypatch.setattr(LiveTeacher, "targets", lambda self, *rest: heads.append(self.model.score.weight.clone()) or targets(self, *rest))
    adapt(model, distill=Distill(hidden={}, logits=1.0), **CLASSIFY)
    assert len(heads) == 10 and all(torch.equal(head, before) for head in heads) and not torch.equal(model.score.weight, before)


@pytest.mark.parametrize("after", [0, 2, 3, 9])
def test_a_classifier_resumes_bit_for_bit(after, tmp_path, monkeypatch):
    """Also where a pruning had just been saved, and no step after it."""
    settings, step = {"output_dir": str(tmp_path), "save_steps": 1}, loop._step
    adapt(want := make_classifier(), sparse_branch=0.1, **CLASSIFY)
    dies_after(after, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        adapt(model := make_classifier(), settings, sparse_branch=0.1, **CLASSIFY)
    assert torch.equal(model.score.weight, make_classifier().score.weight)
    monkeypatch.setattr(loop, "_step", step)
    adapt(model := make_classifier(), {**settings, "resume_from_checkpoint": True}, sparse_branch=0.1, **CLASSIFY)
    assert torch.equal(model.score.weight, want.score.weight) and torch.equal(logits(model), logits(want))


def test_a_head_stays_as_it_came_where_packing_fails(monkeypatch):
    def fails(*arguments):
        raise CaloraError("no more")

    monkeypatch.setattr(losa_run, "_pack", fails)
    model = make_classifier()
    with pytest.raises(CaloraError, match="no more"):
        adapt(model, **CLASSIFY)
    assert torch.equal(model.score.weight, make_classifier().score.weight)


def test_heads_that_cannot_train_are_refused():
    model = make_classifier()
    model.twin = nn.Linear(model.config.hidden_size, 2, bias=False)
    model.twin.weight = model.score.weight
    with pytest.raises(CaloraError, match=r"head score shares its weight with twin\.weight"):
        adapt(model, **CLASSIFY)
    with pytest.raises(CaloraError, match="has no head called score or classifier"):
        adapt(make_llama(), **CLASSIFY)


# -- interruptions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("after", "on_grid"), [(0, False), (3, False), (4, False), (9, False), (3, True), (9, True)])
@pytest.mark.parametrize("more", [{}, {"init": "residual", "sparse_branch": 0.1}], ids=["plain", "prepared"])
def test_resume_is_bit_identical(after, on_grid, more, tmp_path, monkeypatch):
    """Killed after so many steps of 2 + 2 + 6, wherever that is; then resumed, against a run without interruption."""
    settings = {"output_dir": str(tmp_path / "run"), "save_steps": 1, "save_total_limit": 1}
    options = {"recipe": Recipe(weights="int4", sparsity=0.6, group_size=32), "on_grid": on_grid, "distill": Distill(hidden={}, logits=1.0), **more}
    whole = adapt(want := make_llama(), **options)
    step = loop._step
    dies_after(after, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        adapt(make_llama(), settings, **options)
    monkeypatch.setattr(loop, "_step", step)
    resumed = adapt(model := make_llama(), {**settings, "resume_from_checkpoint": True}, **options)
    assert resumed.resumed_at == after and resumed.history == whole.history and resumed.phases == whole.phases
    assert all(torch.equal(t, packed(want)[name]) for name, t in packed(model).items())
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["pruning-3"]


def test_another_run_is_not_resumed(tmp_path):
    settings = {"output_dir": str(tmp_path), "save_steps": 1}
    adapt(make_llama(), settings, sparsity=0.5)
    settings["resume_from_checkpoint"] = True
    with pytest.raises(CaloraError, match="recipe changed"):
        adapt(make_llama(), settings, sparsity=0.6)
    with pytest.raises(CaloraError, match="model changed"):
        adapt(make_llama(seed=1), settings, sparsity=0.5)
    layers = tmp_path / "pruning-3" / "layers.safetensors"
    layers.write_bytes(layers.read_bytes()[:-100])
    with pytest.raises(CaloraError, match="damaged"):
        adapt(make_llama(), settings, sparsity=0.5)
    with pytest.raises(CaloraError, match="instead of a path"):
        adapt(make_llama(), {**settings, "resume_from_checkpoint": str(tmp_path / "pruning-3")}, sparsity=0.5)
    del settings["resume_from_checkpoint"]
    adapt(make_llama(), settings, sparsity=0.6)  # a fresh run displaces the old one
    assert json.loads((tmp_path / "pruning-3" / "state.json").read_text())["run"]["recipe"]["sparsity"] == 0.6


@pytest.mark.parametrize("where", ["training", "packing"])
def test_a_failure_leaves_the_model_as_it_was(where, monkeypatch):
    model = make_llama().train()
    model.model.layers[0].eval()
    before, dense = logits(model), {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    states = {name: (m.training, [p.requires_grad for p in m.parameters()]) for name, m in model.named_modules()}
    if where == "packing":
        real, calls = losa_run.apply, []

        def fails(*arguments):
            done = arguments[-1]

            def count():
                done()
                calls.append(1)
                if len(calls) == 5:
                    raise CaloraError("no more")

            return real(*arguments[:-1], count)

        monkeypatch.setattr(losa_run, "apply", fails)
    else:
        monkeypatch.setattr(Objective, "loss", lambda *arguments: {"task": torch.tensor(float("nan"), requires_grad=True)})
    with pytest.raises(CaloraError, match="no more" if where == "packing" else "the loss is nan"):
        adapt(model, sparsity=0.5)
    assert all(model.get_submodule(name) is m for name, m in dense.items()) and not any(isinstance(m, MaskedLinear) for m in model.modules())
    assert torch.equal(logits(model), before)
    assert states == {name: (m.training, [p.requires_grad for p in m.parameters()]) for name, m in model.named_modules()}


# -- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.5}, "from 0 to 1"), ({"sparsity": -0.1}, "from 0 to 1"), ({"sparsity": "4:2"}, "2:4"),
        ({"rank": 40}, "rank 41 is above the size of model.layers.0.self_attn.q_proj, which is 32"), ({"rank": 0}, "rank must be"),
        ({"prunings": 0}, "prunings must be"), ({"schedule": "square"}, "choose one of cubic, linear"), ({"ranks": "svd"}, "choose one of error, uniform"),
        ({"init": "svd"}, "choose one of zero, residual"), ({"sparse_branch": 1.5}, "from 0 to 1"),
        ({"data": []}, "no text"), ({"data": [" "]}, "no text"), ({"data": ["a b c"]}, "calibration data has 4 tokens"), ({"data": [text_of(200)]}, "8 calibration sequences or more"),
        ({"calibration": []}, "calibration data has 0 tokens"), ({"max_length": 1000}, "more than the 64 tokens"),
        ({"sparsity": 0.5, "recipe": Recipe(sparsity=0.5)}, "not both"), ({"recipe": Recipe()}, "keeps every weight"),
        ({"recipe": Recipe(sparsity=0.5, pruner="wanda"), "revive": True}, "revive=True has no meaning for pruner='wanda'"),
        ({"recipe": Recipe(sparsity=0.5, rates={"model.layers.9": 0.5})}, "rates names 'model.layers.9'"),
        ({"recipe": Recipe(weights="int4", sparsity=0.5, rounding="gptq"), "on_grid": True}, "leave one of them out"),
        ({"tokenizer": None}, "tokenizer must be a transformers tokenizer, got NoneType"), ({"distill": 0.5}, "distill must be None or"),
        ({"task": "translation"}, "not a task"), ({"distill": Distill(hidden={9: 1.0})}, "no hidden state 9"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(options, words):
    model = make_llama()
    before = logits(model)
    with pytest.raises(CaloraError, match=words) as error:
        adapt(model, **options)
    assert "\n" not in str(error.value) and torch.equal(logits(model), before)
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))


def test_models_that_do_not_fit(tmp_path):
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(CaloraError, match="NaN"):
        adapt(model)
    model = make_llama()
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")
    with pytest.raises(CaloraError, match=r"pruning 1 of 3: model\.layers\.1: what this block returns is NaN"):
        adapt(model, recipe=Recipe(weights="bf16", sparsity=0.5, pruner="magnitude"))
    cx.compress(model := make_llama())
    with pytest.raises(CaloraError, match="compressed already"):
        adapt(model)
    make_lora(tmp_path / "lora", make_llama())
    cx.load_adapter(model := make_llama(), tmp_path / "lora", adapter_name="chat")
    with pytest.raises(CaloraError, match="adapter 'chat' is loaded"):
        adapt(model)


# -- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("losa")
    make_llama().save_pretrained(root / "dense")
    make_tokenizer().save_pretrained(root / "dense")
    (root / "train.txt").write_text(text_of(800))
    (root / "empty.txt").write_text("")
    return root


def calora(world, *arguments):
    basics = ("sparse-adapt", world / "dense", "--data", world / "train.txt", "--max-length", 16, "--batch-size", 2, "--rank", 4)
    try:
        main([str(a) for a in (*basics, *arguments)])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_command(world, tmp_path, capsys):
    out = tmp_path / "sparse"
    options = ("--sparsity", 0.6, "--steps", 6, "--weights", "int4", "--group-size", 32, "--distill", "logits", "--eval-data", world / "train.txt",
               "--init", "residual", "--sparse-branch", 0.05)  # fmt: skip
    assert calora(world, "-o", out, *options, "--json", tmp_path / "r.json") == 0
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert "60.00 %" in printed and "mean rank" in printed and "held-out loss" in printed
    assert len(result["phases"]) == 5 and len(result["history"]) == 6 and result["recipe"]["weights"] == "int4" and "logits" in result["history"][0]
    model = cx.load(out)
    masks = [mask_of(layer) for layer in sparse_layers(model).values()]
    assert sum(int((~m).sum()) for m in masks) == round(0.6 * sum(m.numel() for m in masks))
    card = (out / "README.md").read_text()
    assert '"sparsity": 0.6' in card and "mean rank" in card and str(world) not in card and (out / "tokenizer.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "sparse"]  # no checkpoints are left
    assert calora(world, "-o", out, *options) == 2 and "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--sparsity", 7), "from 0 to 1"), (("--sparsity", "2:4", "--rates", "rmi"), "no meaning for sparsity='2:4'"), (("--rank", 99), "above the size"),
     (("--data", "{}/empty.txt"), "no text"), (("--data", "{}/none.txt"), "no file"), (("--distill", "all"), "--distill is hidden"),
     (("--pruner", "wanda", "--revive"), "revive"), (("--steps", 20, "--lr", 1e30), "after training at learning_rate 1e+30")],
)  # fmt: skip
def test_command_refuses(world, tmp_path, capsys, options, words):
    arguments = [str(option).format(world) for option in options]
    assert calora(world, "-o", tmp_path / "out", "--steps", 2, *arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("calora: ") and words in last and not (tmp_path / "out").exists()
