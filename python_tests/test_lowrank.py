"""LowRankBank against the closed form in float64: one and several adapters, training, dropout, slots, dtype and device moves."""

import copy
import math

import pytest
import torch
from torch import nn

from calora_ext import CaloraError, CompressedLinear, WeightFormat, ops
from calora_ext.lowrank import Factors, LowRankBank

IN, OUT = 100, 70
BF16 = WeightFormat("bf16")


def factors(rank, seed, scale=0.5):
    gen = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, IN, generator=gen) / 10, torch.randn(OUT, rank, generator=gen), scale)


def term(x, lora=None, recovery=None):
    """scale * B A x + scale * U gelu(D x) in float64."""
    x, y = x.double(), 0.0
    if lora is not None:
        y = y + lora.scale * (x @ lora.down.double().t()) @ lora.up.double().t()
    if recovery is not None:
        t = x @ recovery.down.double().t()
        y = y + recovery.scale * (0.5 * t * (1 + torch.erf(t / math.sqrt(2)))) @ recovery.up.double().t()
    return y


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = CompressedLinear.from_linear(nn.Linear(IN, OUT), BF16)
    layer.bank = LowRankBank(IN, OUT)
    return layer


@pytest.fixture
def x():
    return torch.randn(3, IN, generator=torch.Generator().manual_seed(9))


def base(layer, x):
    return x.double() @ layer.decode().double().t() + layer.bias.double()


ADAPTERS = {"both": (factors(4, 1, 2.0), factors(6, 2)), "lora": (factors(3, 3), None), "recovery": (None, factors(5, 4))}


@pytest.mark.parametrize("names", [["both"], ["lora"], ["recovery"], ["lora", "both", "recovery"], []])
@torch.no_grad()
def test_forward_is_the_closed_form(layer, x, names):
    for name, branches in ADAPTERS.items():
        layer.bank.add(name, *branches)
    torch.testing.assert_close(layer(x).double(), base(layer, x), rtol=1e-5, atol=1e-5)  # resident is not active
    layer.bank.activate(names)
    want = base(layer, x) + sum(term(x, *ADAPTERS[n]) for n in names)
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_bank_beside_a_dense_layer_gives_the_same_term(x):
    bank = LowRankBank(IN, OUT, tiled=False)
    assert bank(x) is None
    for name, branches in ADAPTERS.items():
        bank.add(name, *branches)
    bank.activate(["both", "recovery"])
    torch.testing.assert_close(bank(x).double(), term(x, *ADAPTERS["both"]) + term(x, *ADAPTERS["recovery"]), rtol=1e-5, atol=1e-5)


def test_one_name_is_activated_by_reference(layer):
    for name, branches in ADAPTERS.items():
        layer.bank.add(name, *branches)
    layer.bank.activate(["both"])
    down, up, _ = layer.bank.factors()
    layer.bank.activate(["lora"])
    layer.bank.activate(["both", "absent"])
    assert layer.bank.factors()[0] is down and layer.bank.factors()[1] is up


def test_add_replaces_and_remove_deactivates(layer, x):
    layer.bank.add("a", *ADAPTERS["lora"])
    layer.bank.activate(["a"])
    layer.bank.add("a", *ADAPTERS["both"])
    torch.testing.assert_close(layer(x).double(), base(layer, x) + term(x, *ADAPTERS["both"]), rtol=1e-5, atol=1e-5)
    layer.bank.remove("a")
    assert layer.bank.names() == [] and layer.bank.active == ()
    torch.testing.assert_close(layer(x).double(), base(layer, x), rtol=1e-5, atol=1e-5)


def test_the_scale_is_folded_in_float32_before_the_cast():
    bank = LowRankBank(IN, OUT, torch.bfloat16, tiled=False)
    f = factors(4, 1, 1 / 3)
    bank.add("a", f, None)
    bank.activate(["a"])
    assert torch.equal(bank.factors()[1], (f.up * f.scale).bfloat16()) and torch.equal(bank.factors()[0], f.down.bfloat16())


@torch.no_grad()
def test_dtype_moves_recast_from_float32(layer, x):
    layer.bank.add("both", *ADAPTERS["both"])
    layer.bank.activate(["both"])
    before = layer(x)
    layer.to(torch.bfloat16)
    assert layer.bank.factors()[0].dtype == torch.bfloat16 and layer(x.bfloat16()).dtype == torch.bfloat16
    layer.to(torch.float16)
    assert layer.bank.factors()[0].dtype == torch.float32
    layer.to(torch.float32)
    layer.bias.data.copy_(layer.bias.data)
    assert torch.equal(layer.bank.branches("both")[0].down, ADAPTERS["both"][0].down)
    torch.testing.assert_close(layer(x), before, rtol=2e-3, atol=2e-3)  # the bias went through bfloat16


def test_the_state_dict_is_that_of_the_base(layer):
    keys = set(layer.state_dict())
    layer.bank.add("both", *ADAPTERS["both"])
    layer.bank.activate(["both"])
    assert set(layer.state_dict()) == keys
    layer.bank.train_adapter("both")
    assert set(layer.state_dict()) == keys
    layer.load_state_dict(layer.state_dict())
    layer.bank.finish_training("both")
    clone = copy.deepcopy(layer)
    clone.bank.activate([])
    assert layer.bank.active == ("both",)


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_training_gradients_are_those_of_the_formula(layer, x, name):
    layer.bank.add(name, *ADAPTERS[name])
    parameters = layer.bank.train_adapter(name)
    assert {n.split(".")[-1] for n, p in layer.named_parameters() if p.requires_grad} == {
        f"{kind}_{s}" for kind, f in zip(("lora", "recovery"), ADAPTERS[name], strict=True) if f for s in "AB"
    }
    weights = torch.randn(3, OUT, generator=torch.Generator().manual_seed(5))
    ours = torch.autograd.grad((layer(x) * weights).sum(), parameters)
    double = [Factors.__new__(Factors) if f else None for f in ADAPTERS[name]]
    for d, f in zip(double, ADAPTERS[name], strict=True):
        if d is not None:
            for key, value in (("down", f.down.double().requires_grad_()), ("up", f.up.double().requires_grad_()), ("scale", f.scale)):
                object.__setattr__(d, key, value)
    want = torch.autograd.grad(((base(layer, x) + term(x, *double)) * weights.double()).sum(), [t for d in double if d for t in (d.down, d.up)])
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_finish_training_keeps_what_was_learnt(layer, x):
    layer.bank.add("both", *ADAPTERS["both"])
    parameters = layer.bank.train_adapter("both")
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1)
        trained = layer(x)
    with pytest.raises(CaloraError, match="is being trained"):
        layer.bank.add("both", *ADAPTERS["both"])
    snapshot = layer.bank.branches("both")
    layer.bank.finish_training("both")
    assert not [n for n, p in layer.named_parameters() if p.requires_grad]
    assert torch.equal(layer.bank.branches("both")[1].up, ADAPTERS["both"][1].up + 0.1)
    assert torch.equal(snapshot[0].down, layer.bank.branches("both")[0].down)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), trained, rtol=1e-5, atol=1e-5)


def test_dropout_masks_the_branches_independently(layer):
    eye = torch.eye(IN)[:OUT]
    f = Factors(eye, torch.eye(OUT), 1.0)
    x = torch.full((1, IN), 3.0)
    layer.bank.add("a", f, f)
    layer.bank.train_adapter("a", dropout=(0.5, 0.25))
    layer.train()
    y = layer(x) - base(layer, x).float()
    keep = lambda v: float(v * 0.5 * (1 + math.erf(v / math.sqrt(2))))  # noqa: E731
    lora, recovery = (0.0, 6.0), (0.0, keep(4.0))  # kept values are divided by 1 - p
    nearest = torch.tensor([a + b for a in lora for b in recovery])
    seen = (y.view(-1, 1) - nearest).abs().min(1)
    assert seen.values.max() < 1e-4 and set(seen.indices.tolist()) == {0, 1, 2, 3}
    y.sum().backward()
    assert layer.bank.lora_A.grad.abs().sum() > 0 and layer.bank.recovery_B.grad.abs().sum() > 0
    layer.eval()
    torch.testing.assert_close(layer(x).double(), base(layer, x) + term(x, f, f), rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_an_active_frozen_adapter(layer, x):
    layer.bank.add("both", *ADAPTERS["both"])
    layer.bank.activate(["both"])
    x.requires_grad_()
    (ours,) = torch.autograd.grad(layer(x).sum(), x)
    x64 = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad((base(layer, x64) + term(x64, *ADAPTERS["both"])).sum(), x64)
    torch.testing.assert_close(ours.double(), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_slots_give_the_same_result_and_keep_their_storage(layer, x):
    for name, branches in ADAPTERS.items():
        layer.bank.add(name, *branches)
    layer.bank.activate(["both"])
    layer.bank.reserve(16, 8)
    pointers = [t.data_ptr() for t in layer.bank.factors()[:2]]
    for names in (["lora"], ["both"], ["recovery"], [], ["lora", "both"], ["lora"]):
        layer.bank.activate(names)
        want = base(layer, x) + sum(term(x, *ADAPTERS[n]) for n in names)
        torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-5)
        assert [t.data_ptr() for t in layer.bank.factors()[:2]] == pointers and layer.bank.factors()[2] == 16
    with pytest.raises(CaloraError, match="8 are reserved"):
        layer.bank.activate(["both", "recovery"])
    with pytest.raises(CaloraError, match="17 for LoRA"):
        layer.bank.add("big", factors(17, 0), None)


def test_bad_branches_are_refused(layer):
    with pytest.raises(CaloraError, match="rank, in"):
        Factors(torch.zeros(3, IN), torch.zeros(OUT, 4), 1.0)
    with pytest.raises(CaloraError, match="float32"):
        Factors(torch.zeros(3, IN).half(), torch.zeros(OUT, 3).half(), 1.0)
    with pytest.raises(CaloraError, match="another model"):
        layer.bank.add("a", Factors(torch.zeros(3, IN + 1), torch.zeros(OUT, 3), 1.0), None)
    with pytest.raises(CaloraError, match="neither"):
        layer.bank.add("a", None, None)
    with pytest.raises(CaloraError, match="add it before"):
        layer.bank.train_adapter("a")


def test_an_adapter_in_training_is_held_once():
    """The factors that it started from leave no copy behind, in fp32 or as operands of inference, and come back at the end."""
    bank = LowRankBank(40, 24)
    bank.add("a", Factors(torch.randn(4, 40), torch.randn(24, 4), 2.0), None)
    bank.activate(["a"])
    bank.train_adapter("a")
    entry = bank._resident["a"]
    assert entry.ready is None and bank._bank == (None, None, 0)
    assert [t.untyped_storage().nbytes() for t in (entry.lora.down, entry.lora.up)] == [4, 4] and entry.lora.rank == 4
    with torch.no_grad():
        bank.lora_B.add_(1.0)
        want = 2.0 * bank.lora_B.clone()
    bank.finish_training("a")
    torch.testing.assert_close(ops.untile_up(bank.factors()[1], 24), want)
