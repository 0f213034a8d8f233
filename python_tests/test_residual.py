"""Recovery that starts from the residual of the compression, against the optimum by float64 SVD and against the dense model."""

import dataclasses

import pytest
import torch
import zoo
from adapt_helpers import compress, make_bert, make_llama, make_lora, make_t5, make_tokenizer, text_of

import calora_ext as cx
from calora_ext import CaloraError
from calora_ext.adaptation import Distill, Lora, Recovery, Settings
from calora_ext.adaptation.residual import TOKENS, residual, root, sample_batches, truncated
from calora_ext.adapters import adapter_banks

TEXTS = [text_of(400)]
NO_STEPS = Settings(max_steps=0, disable_tqdm=True)


def run(model, **options):
    options = {"data": TEXTS, "tokenizer": make_tokenizer(), "max_length": 16, "args": NO_STEPS, "distill": None, **options}
    return cx.adapt(model, **options)


def logits(model):
    ids = torch.randint(4, 28, (4, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(("out_features", "in_features", "rank"), [(24, 40, 4), (40, 24, 9), (33, 17, 17), (5, 64, 5)])
def test_the_product_is_the_best_of_its_rank_for_the_inputs(out_features, in_features, rank):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(out_features, in_features, generator=generator)
    x = torch.randn(500, in_features, generator=generator) @ torch.randn(in_features, in_features, generator=generator)
    lower = root(x.t() @ x / len(x))
    down, up = truncated(matrix, lower, rank, generator)
    assert down.shape == (rank, in_features) and up.shape == (out_features, rank)
    missed = (x @ (matrix - up @ down).t()).double().square().sum()
    # Eckart and Young: what no product of this rank can give of the outputs themselves.
    singular = torch.linalg.svdvals((x @ matrix.t()).double())
    assert missed <= 1.01 * singular[rank:].square().sum() + 1e-4 * singular.square().sum()
    z = x @ down.t()
    torch.testing.assert_close(z.t() @ z / len(z), torch.eye(rank), atol=0.03, rtol=0)


def test_a_recovery_of_full_rank_gives_the_dense_model_back_untrained():
    dense, model = make_llama(), compress(make_llama())
    lost = (logits(model) - logits(dense)).norm()
    result = run(model, teacher=dense, recovery=Recovery(rank=40, init="residual"), lora=Lora(rank=2))
    assert result.steps == 0 and result.history == []
    assert (logits(model) - logits(dense)).norm() < 0.3 * lost
    cx.disable_adapters(model)
    assert torch.equal((logits(model) - logits(dense)).norm(), lost)


def test_layers_outside_the_blocks_are_recovered_too():
    """BERT's pooler, seen by the first token of every text."""
    dense, model = make_bert(), compress(make_bert())
    ids = torch.randint(4, 28, (8, 9), generator=torch.Generator().manual_seed(5))
    ids[:, 0] = 1  # as every text of the tokenizer begins

    def pooled(m):
        with torch.no_grad():
            return m.bert.pooler(hidden)

    with torch.no_grad():
        hidden = dense.bert(input_ids=ids).last_hidden_state
    lost = (pooled(model) - pooled(dense)).norm()
    data = [{"text": text_of(8, seed), "label": seed % 2} for seed in range(60)]
    run(model, data=data, task="sequence-classification", teacher=dense, recovery=Recovery(rank=40, init="residual"), lora=Lora(rank=2))
    assert (pooled(model) - pooled(dense)).norm() < 0.3 * lost


def test_samples_are_run_as_they_begin_and_without_padding():
    lengths = [5, 40, 7, 300, 6, 41, 600, 5] * 20
    samples = [{"input_ids": 1000 * i + torch.arange(n)} for i, n in enumerate(lengths)]
    batches = sample_batches(samples)
    rows = {int(row[0]) // 1000: row for batch in batches for row in batch}
    assert sum(map(len, batches)) == len(rows) and list(rows) != sorted(rows)
    first = next(i for i in range(len(lengths)) if sum(lengths[:i]) >= TOKENS)
    assert sorted(rows) == list(range(first))
    for i, row in rows.items():
        assert torch.equal(row, samples[i]["input_ids"][: len(row)])
    assert sum(map(len, rows.values())) > 0.9 * sum(lengths[:first])


def test_more_rank_leaves_less_of_the_residual():
    dense = make_llama()
    lost = [
        float((logits(m) - logits(dense)).norm())
        for rank in (2, 8, 32)
        for m in [compress(make_llama())]
        if run(m, teacher=dense, recovery=Recovery(rank=rank, init="residual"), lora=Lora(rank=2))
    ]
    assert lost[0] > lost[1] > lost[2]


def test_every_row_can_be_trained_also_beyond_the_rank_of_the_layer():
    model = compress(make_llama())
    run(model, teacher=make_llama(), recovery=Recovery(rank=40, init="residual", alpha=20), lora=Lora(rank=2))
    for path, bank in adapter_banks(model, "default").items():
        branch = bank.branches("default")[1]
        assert branch.scale == 0.5 and branch.down.norm(dim=1).min() > 0, path


def test_a_lossless_base_starts_as_without_recovery():
    model = make_llama()
    before = logits(model)
    run(model, teacher=make_llama(), recovery=Recovery(rank=4, init="residual"), lora=Lora(rank=2))
    assert torch.equal(logits(model), before)


def test_the_inherited_lora_stays_and_the_same_seed_gives_the_same_start(tmp_path):
    make_lora(tmp_path / "lora", make_llama())
    found = []
    for _ in range(2):
        model = compress(make_llama())
        run(model, teacher=make_llama(), inherit=tmp_path / "lora", recovery=Recovery(rank=4, init="residual"))
        found.append({path: bank.branches("default") for path, bank in adapter_banks(model, "default").items()})
    inherited = compress(make_llama())
    cx.load_adapter(inherited, tmp_path / "lora", "default")
    for path, bank in adapter_banks(inherited, "default").items():
        ours, again = found[0][path], found[1][path]
        assert torch.equal(ours[0].up @ ours[0].down, bank.branches("default")[0].up @ bank.branches("default")[0].down)
        assert torch.equal(ours[1].down, again[1].down) and torch.equal(ours[1].up, again[1].up)


def test_inherited_recovery_is_gone_on_with(tmp_path):
    model = compress(make_llama())
    run(model, teacher=make_llama(), recovery=Recovery(rank=4, init="residual"), lora=Lora(rank=2))
    cx.save_adapter(model, "default", tmp_path)
    again = compress(make_llama(seed=0))
    run(again, teacher=make_llama(seed=1), inherit=tmp_path, recovery=Recovery(rank=4, init="residual"))
    for path, bank in adapter_banks(again, "default").items():
        assert torch.equal(bank.branches("default")[1].up, adapter_banks(model, "default")[path].branches("default")[1].up)


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_every_architecture(name):
    dense, model = zoo.dense(name), zoo.dense(name)
    cx.compress(model, cx.Recipe(group_size=32))
    task = {"t5": "seq2seq-lm", "bert": "sequence-classification"}.get(name, "causal-lm")
    data = {
        "t5": [{"prompt": " ".join("abcdefgh"), "completion": "d e"}] * 20,
        "bert": [{"text": " ".join("abcdefgh"), "label": i % 2} for i in range(20)],
    }.get(name, TEXTS)
    before = zoo.logits(model, name)
    run(model, data=data, task=task, teacher=dense, recovery=Recovery(rank=8, init="residual"), lora=Lora(rank=2))
    want = zoo.logits(dense, name)
    if task != "sequence-classification":
        assert (zoo.logits(model, name) - want).norm() < (before - want).norm()


def test_training_goes_on_from_there():
    settings = dataclasses.replace(NO_STEPS, max_steps=3, per_device_train_batch_size=2)
    result = run(compress(make_llama()), teacher=make_llama(), args=settings, distill=Distill(), recovery=Recovery(rank=8, init="residual"))
    fresh = run(compress(make_llama()), teacher=make_llama(), args=settings, distill=Distill(), recovery=Recovery(rank=8))
    assert result.history[0]["hidden"] < fresh.history[0]["hidden"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "compares weights"),
        ({"teacher": make_llama(), "data": [text_of(30)]}, "needs 64 tokens"),
    ],
    ids=["no teacher", "little data"],
)
def test_what_does_not_fit_leaves_the_model_as_it_was(options, says):
    model = compress(make_llama())
    with pytest.raises(CaloraError, match=says):
        run(model, recovery=Recovery(rank=2, init="residual"), **options)
    assert cx.list_adapters(model) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(value):
    dense, model = make_llama(), compress(make_llama())
    dense.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(CaloraError, match=r"layers\.1\.mlp\.up_proj: the weight of the teacher or the student holds NaN"):
        run(model, teacher=dense, recovery=Recovery(rank=2, init="residual"))
    assert cx.list_adapters(model) == []


def test_the_residual_is_what_was_rounded_away():
    dense, model = make_llama(), compress(make_llama())
    path = "model.layers.0.mlp.down_proj"
    want = dense.get_submodule(path).weight - model.get_submodule(path).decode()
    assert torch.equal(residual(model, dense, path), want) and want.any()


def test_the_residual_needs_the_layer_in_the_teacher():
    for teacher, says in [(make_t5(), "the teacher has no layer"), (zoo.dense("llama"), "in the teacher")]:
        with pytest.raises(CaloraError, match=says):
            residual(make_llama(), teacher, "model.layers.0.mlp.down_proj")
