"""GPTQ against the closed form it factorises, against rounding to nearest, and the block-by-block runner."""

import threading

import pytest
import torch
from formats_table import nearest_level
from torch import nn
from zoo import ZOO, dense, logits

import calora_ext as cx
from calora_ext.compression import gptq, obs
from calora_ext.compression.calibrate import Statistics, find_blocks, run_blocks, token_batches

FORMATS = [
    cx.WeightFormat("int4", 64), cx.WeightFormat("int4", -1), cx.WeightFormat("int4", 32, symmetric=False), cx.WeightFormat("int8"),
    cx.WeightFormat("nf4", 64),
]  # fmt: skip
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def layer(out=24, in_=100, tokens=400, seed=0):
    """A weight and correlated inputs (tokens, in): columns of very different size, many directions almost empty."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, in_ // 4, generator=gen) @ torch.randn(in_ // 4, in_, generator=gen)
    x += 0.1 * torch.randn(tokens, in_, generator=gen)
    return torch.randn(out, in_, generator=gen), x * torch.logspace(-1, 1, in_)[torch.randperm(in_, generator=gen)]


def decoded(q, fmt):
    out, in_ = q.codes.shape
    return fmt.decode(fmt.pack_quantized(q), in_, out)


def closed_form(weight, gram, fmt):
    """Optimal brain surgery, one column after the other, inverting what is left of the damped Gram matrix each time."""
    plain = fmt.quantize(weight)
    block = fmt.geometry(weight.shape[1], weight.shape[0]).block_columns
    h = gram.double() + obs.DAMPING * gram.double().diagonal().mean() * torch.eye(len(gram))
    w, left = weight.double().clone(), torch.argsort(gram.diagonal(), descending=True).tolist()
    codes = torch.empty_like(w)
    while left:
        c = left[0]
        zero = None if plain.zero is None else plain.zero[:, c // block].double()
        codes[:, c], values = nearest_level(w[:, c], fmt, plain.scales()[:, c // block].double(), zero)
        inverse = torch.linalg.inv(h[left][:, left])
        error = (w[:, c] - values) / inverse[0, 0]
        w[:, left] -= error.outer(inverse[0])
        left = left[1:]
    return codes


@each_format
def test_codes_are_those_of_the_closed_form(fmt):
    weight, x = layer(in_=70)
    gram = x.t() @ x
    agree = (gptq.quantize(weight, gram, fmt).codes == closed_form(weight, gram, fmt)).float().mean()
    assert agree > 0.98  # float32 and float64 part ways where a value lies on the edge between two codes


@each_format
@pytest.mark.parametrize("in_", [33, 100, 300])
def test_output_error_beats_rounding_to_nearest(fmt, in_):
    weight, x = layer(in_=in_)
    ours = decoded(gptq.quantize(weight, x.t() @ x, fmt), fmt)
    nearest = decoded(fmt.quantize(weight), fmt)
    error = lambda w: torch.linalg.norm((weight - w) @ x.t())  # noqa: E731
    assert error(ours) < 0.8 * error(nearest)


@each_format
def test_independent_inputs_leave_nothing_to_spread(fmt):
    weight, _ = layer()
    for gram in (torch.eye(100), torch.zeros(100, 100), torch.diag(torch.rand(100))):
        assert torch.equal(gptq.quantize(weight, gram, fmt).codes, fmt.quantize(weight).codes)


def test_columns_without_input_are_rounded_to_nearest():
    weight, x = layer()
    x[:, 10:20] = 0
    fmt = FORMATS[0]
    codes = gptq.quantize(weight, x.t() @ x, fmt).codes
    assert torch.equal(codes[:, 10:20], fmt.quantize(weight).codes[:, 10:20])


def test_factor_is_that_of_the_damped_inverse():
    _, x = layer(in_=40)
    gram = x.t() @ x
    upper = obs.inverse_factor(gram).double()
    damped = gram.double() + obs.DAMPING * gram.double().diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(upper.t() @ upper @ damped, torch.eye(40, dtype=torch.double), atol=1e-3, rtol=0)
    assert torch.equal(upper, upper.triu())


def test_damping_escalates_instead_of_failing():
    x = torch.randn(1, 50)
    rank_one = x.t() @ x
    indefinite = rank_one - 0.5 * rank_one.diagonal().mean() * torch.eye(50)  # what rounding can do to a Gram matrix, and worse
    weight = torch.randn(8, 50)
    for gram in (rank_one, indefinite):
        assert torch.isfinite(obs.inverse_factor(gram)).all()
        assert torch.isfinite(decoded(gptq.quantize(weight, gram, FORMATS[0]), FORMATS[0])).all()


def test_a_gram_matrix_that_is_not_finite_is_refused():
    with pytest.raises(cx.CaloraError, match="NaN or infinite"):
        gptq.quantize(torch.randn(4, 8), torch.full((8, 8), torch.nan), FORMATS[0])


# --- calibration -------------------------------------------------------------------------------------------------------


def data(sequences=20, length=64):
    gen = torch.Generator().manual_seed(5)
    return [torch.randint(2, 96, (length,), generator=gen).tolist() for _ in range(sequences)]


class Words:
    """A tokenizer as far as calibration is concerned."""

    def __call__(self, text):
        return {"input_ids": [len(word) for word in text.split()]}


@pytest.mark.parametrize(
    ("calibration", "tokenizer", "message"),
    [
        ([], None, "0 tokens"), ([""], Words(), "0 tokens"), ([[3] * 63], None, "63 tokens"), (["a b c"], Words(), "3 tokens"),
        (["some text"], None, "pass the tokenizer"), (["some text"], "x", "tokenizer must be"), ("some text", Words(), "list of texts"), (7, None, "list of texts"),
        ([[3, 97] * 50], None, r"outside 0\.\.96"), ([[-1] * 100], None, r"outside 0\.\.96"), ([[0.5] * 100], None, "token ids"),
        ([None], None, "token ids"), ([{"a": 1}], None, "token ids"), ([[5] * 64, [[1, 2, 3], [4]]], None, r"item 1 is \[\[1, 2, 3\], \[4\]\]"),
        ([[5] * 64, ["bad"] * 50], None, r"item 1 is \['bad', .*\.\.\.\]"), ([[5] * 64, [5] * 64, [None] * 64], None, "item 2 is"), ([[5] * 64, [1 << 70]], None, "item 1 is"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_calibration_is_one_sentence(calibration, tokenizer, message):
    model = dense("llama")
    with pytest.raises(cx.CaloraError, match=message):
        cx.compress(model, calibration=calibration, tokenizer=tokenizer)
    assert not any(isinstance(m, cx.CompressedLinear) for m in model.modules())


def test_calibration_without_use_is_refused():
    with pytest.raises(cx.CaloraError, match="no meaning for rounding='rtn'"):
        cx.compress(dense("llama"), cx.Recipe(rounding="rtn"), calibration=data())
    with pytest.raises(cx.CaloraError, match="needs calibration"):
        cx.compress(dense("llama"), cx.Recipe(rounding="gptq"))


def test_batches_hold_the_stream_in_order():
    config = dense("llama").config
    stream = torch.arange(1000) % 97
    batches = token_batches([stream[:300].tolist(), stream[300:], "x " * 5], Words(), config)
    joined = torch.cat([b.reshape(-1) for b in batches])
    assert torch.equal(joined[:1000], stream[: len(joined)][:1000]) and all(b.shape[1] == 64 for b in batches)
    assert len(token_batches([stream.repeat(1000)], None, config)) <= 32


def test_activations_that_are_not_finite_name_the_layer():
    model = dense("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.inf
    with pytest.raises(cx.CaloraError, match=r"layers\.1\.self_attn\.q_proj: .*NaN or infinite"):
        cx.compress(model, calibration=data())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "bert", "mixtral"])
def test_blocks_see_what_the_compressed_blocks_before_them_give(name):
    """The Gram matrix of every layer equals that of a plain forward pass with only the earlier blocks compressed."""
    model, twin = dense(name), dense(name)
    recipe = cx.Recipe(activations="exact")
    formats = {n: f for n, f in cx.policy.plan(model, recipe).formats.items()}
    blocks = find_blocks(model, formats)
    batches = token_batches(data(4), None, model.config)
    order = []

    def compress(block, grams):
        order.append(block)
        assert set(grams) == set(blocks[block])
        plain = Statistics({n: twin.get_submodule(n) for n in blocks[block]})
        with torch.no_grad():
            for ids in batches:
                twin(input_ids=ids, **({"decoder_input_ids": ids} if name == "t5" else {}))
        plain.remove()
        for member in blocks[block]:
            assert grams[member].tokens == sum(b.numel() for b in batches)
            torch.testing.assert_close(grams[member].matrix, plain.of[member].matrix, rtol=1e-4, atol=1e-2)
            for m in (model, twin):
                small = cx.CompressedLinear.from_linear(m.get_submodule(member), formats[member])
                small.activations = "exact"
                m.set_submodule(member, small)

    threads = threading.active_count()
    run_blocks(model, blocks, batches, compress)
    assert order == list(blocks) and len(order) == (4 if name == "t5" else 2)
    assert threading.active_count() == threads
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ZOO)
def test_a_calibrated_model_is_closer_and_survives(name, tmp_path):
    want = logits(dense(name), name)
    distance = {}
    for calibration in (None, data()):
        model = dense(name)
        recipe = cx.Recipe(group_size=-1, lm_head=None, activations="exact")
        report = cx.compress(model, recipe, calibration=calibration)
        assert report.recipe.rounding == ("gptq" if calibration else "rtn")
        distance[report.recipe.rounding] = float((logits(model, name) - want).norm() / want.norm())
    assert distance["gptq"] < distance["rtn"]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(cx.load(tmp_path), name), logits(model, name))


def test_a_model_that_fails_on_the_data_ends_in_one_sentence():
    model = dense("llama")

    def broken(self, *args, **kwargs):
        raise RuntimeError("first line\nsecond line")

    model.model.layers[1].mlp.act_fn.forward = broken.__get__(model)
    threads = threading.active_count()
    with pytest.raises(cx.CaloraError, match=r"fails on the calibration data: first line$"):
        cx.compress(model, calibration=data())
    assert threading.active_count() == threads
    assert isinstance(model.model.layers[1].mlp.up_proj, nn.Linear)
