"""Perplexity, accuracy and divergence against the formulas, computed window by window."""

import math

import pytest
import torch
from adapt_helpers import make_bert, make_classifier, make_llama, make_t5, make_tokenizer, text_of

from calora_ext import CaloraError, loss
from calora_ext.evaluate import accuracy, divergence, mean_loss, perplexity
from calora_ext.io.batches import IGNORED, tokenize
from calora_ext.io.data import Record


def windows_of(ids, length):
    return [ids[i : i + length] for i in range(0, len(ids), length)]


@pytest.mark.parametrize("max_length", [None, 17])
def test_perplexity_equals_transformers_loss(max_length):
    model, tokenizer, text = make_llama(), make_tokenizer(), text_of(300)
    model.train()
    got = perplexity(model, tokenizer, text, max_length)
    assert model.training  # the mode is given back
    window = max_length or 64
    total = tokens = 0
    with torch.no_grad():
        for ids in windows_of(tokenizer(text)["input_ids"], window):
            if len(ids) > 1:
                x = torch.tensor([ids])
                total += model.double()(input_ids=x, labels=x).loss.item() * (len(ids) - 1)
                tokens += len(ids) - 1
    assert got.tokens == tokens and got.window == window
    assert float(got) == pytest.approx(math.exp(total / tokens), rel=1e-5) and got.loss == pytest.approx(total / tokens, rel=1e-5)


def test_perplexity_of_bad_input():
    model, tokenizer = make_llama(), make_tokenizer()
    with pytest.raises(CaloraError, match="at least 2 tokens"):
        perplexity(model, tokenizer, torch.tensor([4]))
    with pytest.raises(CaloraError, match="more than the 64 tokens"):
        perplexity(model, tokenizer, "a b c", max_length=65)
    assert perplexity(model, tokenizer, "a b c").window == 4  # shorter than the context
    for make in (make_classifier, make_t5, make_bert):
        with pytest.raises(CaloraError, match="no causal language model; name its task"):
            perplexity(make(), tokenizer, "a b c")


@pytest.mark.parametrize("make", [make_classifier, make_bert])
def test_accuracy(make):
    model, tokenizer = make(), make_tokenizer()
    records = [Record(text_of(3 + i % 5, seed=i), label=i % 2) for i in range(21)] + [Record("a", label=-1)]
    right = 0
    for record in records[:-1]:
        with torch.no_grad():
            right += model(torch.tensor([tokenizer(record.text)["input_ids"]])).logits.argmax().item() == record.label
    samples, _ = tokenize(records, tokenizer, "sequence-classification", 64, model.config.label2id, model.config.num_labels)
    assert accuracy(model, samples, tokenizer.pad_token_id, batch_size=4) == right / 21


def test_long_evaluations_show_a_bar(monkeypatch, capsys):
    model, tokenizer, text = make_llama(), make_tokenizer(), text_of(3000)
    monkeypatch.setattr("calora_ext.progress.BAR_AFTER", 0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    perplexity(model, tokenizer, text)
    assert "Evaluating" in capsys.readouterr().err
    monkeypatch.setattr("calora_ext.progress.BAR_AFTER", 60)
    perplexity(model, tokenizer, text)
    assert not capsys.readouterr().err


def test_divergence():
    model, other, tokenizer, text = make_llama(), make_llama(1), make_tokenizer(), text_of(150)
    same = divergence(model, model, tokenizer, text)
    assert same.kl == 0 and same.top1_agreement == 1 and same.positions == 151
    got = divergence(model, other, tokenizer, text, max_length=20)
    kl = agree = 0
    with torch.no_grad():
        for ids in windows_of(tokenizer(text)["input_ids"], 20):
            x = torch.tensor([ids])
            p, q = other(x).logits.double().softmax(-1), model(x).logits.double().softmax(-1)
            if len(ids) > 1:
                kl += (p * (p / q).log()).sum().item()
                agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
    assert got.kl == pytest.approx(kl / got.positions, rel=1e-4) and got.top1_agreement == agree / got.positions


def test_mean_loss_of_responses_and_seq2seq():
    tokenizer = make_tokenizer("</s>")
    records = [Record("question ?", completion="yes ."), Record("the cat sat on ?", completion="a mat")]
    for task, model in (("causal-lm", make_llama()), ("seq2seq-lm", make_t5())):
        samples, _ = tokenize(records, tokenizer, task, 32)
        total = count = 0
        for sample in samples:
            n = int((sample["labels"][task == "causal-lm" :] != -100).sum())
            with torch.no_grad():
                total += model(input_ids=sample["input_ids"][None], labels=sample["labels"][None]).loss.item() * n
            count += n
        assert mean_loss(model, samples, task, 0, batch_size=2) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_summed_cross_entropy_is_that_of_torch(dtype, monkeypatch):
    """In pieces that do not divide the rows, with ignored rows, and its gradient."""
    monkeypatch.setattr(loss, "_PIECE", 1000)
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(37, 301, generator=draw)).to(dtype).requires_grad_()
    labels = torch.randint(0, 301, (37,), generator=draw)
    labels[[0, 5, 36]] = IGNORED
    found = loss.summed_cross_entropy(logits, labels, IGNORED)
    (gradient,) = torch.autograd.grad(0.3 * found, logits)
    exact = logits.detach().double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact, labels, ignore_index=IGNORED, reduction="sum")
    (want_gradient,) = torch.autograd.grad(0.3 * want, exact)
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=1e-5 if dtype == torch.float32 else 5e-3, atol=1e-7)
