"""LoSA's formulas on small cases: schedule, budgets, the masked product and its gradients, pruning again and again, errors of blocks."""

import copy
import gc
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from adapt_helpers import make_llama
from formats_table import SPARSE, mask_for, nearest_level
from torch import nn
from torch.nn.functional import linear

from calora_ext import CaloraError, CompressedLinear, WeightFormat
from calora_ext.adaptation.residual import DAMPING, root
from calora_ext.compression.calibrate import Gram, find_blocks
from calora_ext.losa import reconstruction
from calora_ext.losa.masked import MaskedLinear, _MaskedProduct, as_dense, merged
from calora_ext.losa.phases import SCALE
from calora_ext.losa.prune import prune_layers
from calora_ext.losa.rounding import Rounding
from calora_ext.losa.schedule import check, rank_at, sparsity_at, steps_at
from calora_ext.losa.start import SKETCH, Start
from calora_ext.pruning import NofM


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def parts(out, columns, rank, dtype=torch.float64, seed=0):
    """base (0 outside the mask), mask (30 % kept), down, up."""
    g = generator(seed)
    mask = torch.rand(out, columns, generator=g) < 0.3
    base = torch.randn(out, columns, generator=g, dtype=dtype) * mask
    return base, mask, *(torch.randn(s, generator=g, dtype=dtype) for s in ((rank, columns), (out, rank)))


def attached(model):
    names = [name for name, m in model.named_modules() if type(m) is nn.Linear and name != "lm_head"]
    layers = {name: MaskedLinear(model.get_submodule(name)) for name in names}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def batches(count=3, length=24):
    return [torch.randint(4, 28, (2, length), generator=generator(i)) for i in range(count)]


def nothing():
    pass


# -- schedule and budgets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("final", "published"),
    [(0.5, [0.2440, 0.3920, 0.4680, 0.4960, 0.5]), (0.6, [0.2928, 0.4704, 0.5616, 0.5952, 0.6]), (0.7, [0.3416, 0.5488, 0.6552, 0.6944, 0.7])],
)
def test_cubic_schedule_is_the_published_table(final, published):
    assert [sparsity_at(final, t, 5) for t in range(1, 6)] == pytest.approx(published, abs=1e-12)


def test_other_schedules():
    assert [sparsity_at(0.6, t, 3, "linear") for t in (1, 2, 3)] == pytest.approx([0.2, 0.4, 0.6])
    assert sparsity_at(0.7, 1, 1) == 0.7
    assert [sparsity_at("2:4", t, 5) for t in range(1, 6)] == ["3:4", "2:4", "2:4", "2:4", "2:4"]
    assert [sparsity_at("2:8", t, 5) for t in range(1, 6)] == ["5:8", "3:8", "2:8", "2:8", "2:8"]
    assert sparsity_at("7:8", 1, 10, "linear") == 0.0  # nothing yet to prune


@pytest.mark.parametrize("prunings", [1, 2, 5, 7])
@pytest.mark.parametrize("steps", [0, 1, 4, 37, 1250])
def test_steps_are_all_used(steps, prunings):
    found = [steps_at(steps, t, prunings) for t in range(1, prunings + 1)]
    assert sum(found) == steps and min(found) >= 0
    assert prunings == 1 or max(found[:-1]) - min(found[:-1]) <= 1


def test_published_steps_and_ranks():
    assert [steps_at(1250, t, 5) for t in range(1, 6)] == [125, 125, 125, 125, 750]
    assert [rank_at(8, 1, t, 5) for t in range(1, 6)] == [6, 7, 8, 9, 10]
    assert rank_at(8, 1, 1, 1) == 8 and rank_at(2, 3, 1, 5) == 1


@pytest.mark.parametrize("growth", [1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("mean", [6.0, 9.5, 10.0])
def test_ranks_meet_the_budget(growth, mean):
    """Errors that grow with depth over 32 blocks: the released code misses the sum by up to a third."""
    errors = growth ** torch.linspace(0, 1, 32, dtype=torch.float64)
    caps = torch.full((32,), 16)
    found = torch.tensor(reconstruction.ranks(errors, mean, caps))
    assert found.sum() == round(32 * mean) and found.min() >= 1 and found.max() <= 16
    assert found.max() - found.min() <= 1 if growth == 1.0 else (found.diff() >= 0).all()


def test_ranks_are_the_published_proportion_where_nothing_is_clipped():
    errors = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert reconstruction.ranks(errors, 5.0, torch.full((4,), 16)) == [2, 4, 6, 8]
    assert reconstruction.ranks(torch.zeros(4), 5.0, torch.full((4,), 16)) == [5, 5, 5, 5]
    assert sum(reconstruction.ranks(errors, 5.0, torch.tensor([16, 16, 3, 3]))) == 20


@pytest.mark.parametrize(
    ("settings", "words"),
    [((0, "cubic", 8, 1), "prunings"), ((5, "cubic", 0, 1), "rank"), ((5, "square", 8, 1), "square"), ((5, "cubic", 8, -1), "rank_growth"),
     ((2.5, "cubic", 8, 1), "prunings"), ((5, "cubic", True, 1), "rank")],
)  # fmt: skip
def test_settings_are_checked(settings, words):
    with pytest.raises(CaloraError, match=words):
        check(*settings)


# -- the masked product ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "columns", "rank"), [(7, 13, 3), (1, 33, 1), (24, 5, 5), (40, 40, 16)])
def test_product_and_gradients_are_exact(out, columns, rank):
    """Against autograd through the two-product form, in float64."""
    base, mask, down, up = parts(out, columns, rank)
    x = torch.randn(4, 3, columns, generator=generator(9), dtype=torch.float64)
    ours = [t.clone().requires_grad_() for t in (x, down, up)]
    theirs = [t.clone().requires_grad_() for t in (x, down, up)]
    y = _MaskedProduct.apply(ours[0], base, mask, ours[1], ours[2], 2.0)
    want = linear(theirs[0], base) + 2.0 * linear(theirs[0], (theirs[2] @ theirs[1]) * mask)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-10)
    weights = torch.randn(y.shape, generator=generator(8), dtype=torch.float64)
    (y * weights).sum().backward()
    (want * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    base, mask, down, up = parts(6, 9, 2)
    x = torch.randn(5, 9, generator=generator(3), dtype=torch.float64)
    inputs = (x.requires_grad_(), base, mask, down.requires_grad_(), up.requires_grad_(), 1.5)
    assert torch.autograd.gradcheck(_MaskedProduct.apply, inputs)


def test_gradients_are_the_closed_form_and_leave_pruned_weights_alone():
    base, mask, down, up = parts(8, 12, 3)
    x = torch.randn(10, 12, generator=generator(4), dtype=torch.float64)
    grad = torch.randn(10, 8, generator=generator(5), dtype=torch.float64)
    d, u = down.clone().requires_grad_(), up.clone().requires_grad_()
    _MaskedProduct.apply(x, base, mask, d, u, 2.0).backward(grad)
    g = 2.0 * (grad.t() @ x) * mask
    torch.testing.assert_close(d.grad, up.t() @ g)
    torch.testing.assert_close(u.grad, g @ down.t())
    assert torch.linalg.matrix_rank((up @ down) * mask) > 3  # masking makes more of a rank than it is


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_in_float_and_under_autocast(dtype):
    dense = nn.Linear(40, 24)
    layer = MaskedLinear(dense)
    base, mask, down, up = parts(24, 40, 3, torch.float32)
    layer.keep(base, mask)
    layer.adapt(3, 2.0, generator())
    with torch.no_grad():
        layer.lora_A.copy_(down), layer.lora_B.copy_(up)
    x = torch.randn(7, 40, generator=generator(1))
    with torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else nullcontext():
        y = layer(x)
    want = x.double() @ merged(base.double(), mask, down.double(), up.double(), 2.0).t() + dense.bias.double()
    assert y.dtype == dtype
    assert (y.double() - want).norm() / want.norm() < (1e-6 if dtype == torch.float32 else 1e-2)
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


def test_folding_and_any_new_rank_change_nothing():
    layer = MaskedLinear(nn.Linear(30, 20))
    base, mask, _, up = parts(20, 30, 4, torch.float32)
    layer.keep(base, mask)
    layer.adapt(4, 2.0, generator())
    with torch.no_grad():
        layer.lora_B.copy_(up)
    x = torch.randn(5, 30, generator=generator(2))
    before = layer(x)
    for rank in (9, 2, 16):
        layer.fold()
        assert torch.equal(layer(x), before) and layer.rank == 0
        layer.adapt(rank, 2.0, generator(rank))
        torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-6)
        assert layer.rank == rank and torch.equal(layer.weight != 0, mask)


@pytest.mark.parametrize("rounded", [False, True])
def test_single_weights_train_beside_the_adapter(rounded):
    """mask * (W + s U D) + S, gradients of D, U and S against autograd through a dense S; folding keeps it, bit for bit."""
    base, mask, down, up = parts(11, 17, 3, torch.float32 if rounded else torch.float64)
    at = mask.flatten().nonzero().flatten()[::3]
    values = torch.randn(len(at), generator=generator(6), dtype=base.dtype)
    x = torch.randn(5, 17, generator=generator(1), dtype=base.dtype)
    rounding = Rounding(WeightFormat("int8", pattern="unstructured"), base, mask) if rounded else None
    ours, theirs = ([t.clone().requires_grad_() for t in (x, down, up, values)] for _ in range(2))
    y = _MaskedProduct.apply(ours[0], base, mask, *ours[1:3], 2.0, rounding, ours[3], at)
    master = (base + 2.0 * theirs[2] @ theirs[1]) * mask + torch.zeros_like(base).put(at, theirs[3], accumulate=True)
    want = linear(theirs[0], master if rounding is None else master + (rounding(master) - master).detach())
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if rounded else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y, want, **tolerance)
    weights = torch.randn(y.shape, generator=generator(8), dtype=base.dtype)
    (y * weights).sum().backward()
    (want * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **tolerance)
    layer = MaskedLinear(nn.Linear(17, 11))
    layer.keep(base.float(), mask)
    layer.prepared = {"at": at}
    layer.adapt(3, 2.0, generator())
    assert torch.equal(layer.weight, layer.base)
    layer.branch.data.copy_(values)
    before, moved = layer.weight, layer.weight != layer.base
    assert torch.equal(moved.flatten().nonzero().flatten(), at) and not before[~mask].any()
    layer.fold()
    assert torch.equal(layer.base, before) and layer.branch is None and layer.at is None


# -- where adapters start ----------------------------------------------------------------------------------------------------


def lossy_layer(out, columns, tokens=400):
    """(lost, mask, Gram): random weights under a mask of 40 %, inputs of which some directions are much stronger."""
    g = generator(7)
    weight, mask = torch.randn(out, columns, generator=g), torch.rand(out, columns, generator=g) < 0.4
    gram = Gram(columns)
    gram.add(torch.randn(tokens, columns // 4, generator=g) @ torch.randn(columns // 4, columns, generator=g) + 0.1 * torch.randn(tokens, columns, generator=g))
    return weight * ~mask, mask, gram


def distance(lost, mask, gram, down, up):
    """What the inputs see of what is still lost, relative to all of it; float64."""
    left = lost.double() - SCALE * (up.double() @ down.double()) * mask
    moment = gram.matrix.double() / gram.tokens
    return ((left @ moment * left).sum() / (lost.double() @ moment * lost.double()).sum()).item()


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_start_is_least_squares_under_the_mask(rank):
    """Each row of U against float64 normal equations of its own, for any rank up to the largest."""
    lost, mask, gram = lossy_layer(19, 48)
    down, up = Start(lost, mask, gram, 6, generator()).factors(rank, SCALE)
    assert down.shape == (rank, 48) and up.shape == (19, rank)
    torch.testing.assert_close(down.square().mean(1), torch.full((rank,), 1 / (3 * 48)))  # as a D that is drawn
    lower = root(gram.matrix / gram.tokens).double()
    for i in range(19):
        terms = (down.double() * mask[i]) @ lower
        left = terms @ terms.t()
        left.diagonal().add_(DAMPING * left.diagonal().mean())
        want = torch.linalg.solve(left, terms @ (lost[i].double() @ lower)) / SCALE
        torch.testing.assert_close(up[i].double(), want, rtol=1e-3, atol=1e-4)


def test_a_start_brings_some_of_the_loss_back():
    """Also where the inputs are only sketched; a D that is drawn brings less."""
    lost, mask, gram = lossy_layer(40, 3 * SKETCH)
    left = [distance(lost, mask, gram, *Start(lost, mask, gram, 16, generator()).factors(rank, SCALE)) for rank in (1, 4, 16)]
    assert 1 > left[0] > left[1] > left[2]
    start = Start(lost, mask, gram, 16, generator())
    lower = root(gram.matrix / gram.tokens)
    rows = [torch.linalg.lstsq(((start.down * m) @ lower).t(), (w @ lower).unsqueeze(1)).solution.squeeze(1) for w, m in zip(lost, mask, strict=True)]
    best = distance(lost, mask, gram, start.down, torch.stack(rows) / SCALE)
    assert best <= left[2] < best + 0.1 * (1 - best)


def test_a_start_where_nothing_was_lost_or_kept():
    lost, mask, gram = lossy_layer(9, 32)
    mask[0] = False
    down, up = Start(lost, mask, gram, 4, generator()).factors(4, SCALE)
    assert torch.isfinite(down).all() and torch.isfinite(up).all() and not up[0].any()
    down, up = Start(torch.zeros_like(lost), mask, gram, 4, generator()).factors(4, SCALE)
    assert torch.isfinite(down).all() and not up.any()


def test_running_dense_is_the_layer_as_it_was():
    model = make_llama()
    ids = batches(1)[0]
    want = model(ids).logits
    layers = attached(model)
    torch.testing.assert_close(model(ids).logits, want)
    for layer in layers.values():
        layer.keep(layer.base, torch.rand(layer.base.shape, generator=generator()) < 0.5)
    sparse = model(ids).logits
    assert not torch.allclose(sparse, want)
    with as_dense(layers.values()):
        assert torch.equal(model(ids).logits, want)
    assert torch.equal(model(ids).logits, sparse)


# -- on the packed grid ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", SPARSE, ids=str)
def test_what_trained_on_the_grid_is_what_is_packed(fmt):
    """The scales stay those of the weight before training; every kept weight is at the nearest value they allow."""
    out, columns = 37, 200
    mask = mask_for(fmt, (out, columns))
    before = torch.randn(out, columns, generator=generator()) * mask
    dense = nn.Linear(columns, out, bias=False)
    layer = MaskedLinear(dense)
    layer.keep(before, mask)
    layer.round_to(fmt)
    first = fmt.decode(fmt.pack(before, mask), columns, out)
    x = torch.randn(5, columns, generator=generator(2))
    assert torch.equal(layer.weight, first) and torch.equal(layer(x), linear(x, first))
    layer.adapt(4, 2.0, generator(1))
    layer.lora_B.data.normal_(0, 0.05, generator=generator(3))
    trained, y = layer.weight, layer(x)
    assert not torch.equal(trained, first) and torch.equal(y, linear(x, trained))
    layer.fold()
    assert torch.equal(layer.weight, trained) and torch.equal(layer(x), y) and not torch.equal(layer.base, trained)
    codes = layer.rounding.quantized(layer.base)
    packed = CompressedLinear.from_linear(layer, fmt, fmt.pack_quantized(codes))
    assert torch.equal(packed.decode(), trained) and torch.equal(linear(x, packed.decode()), y)
    assert not trained[~mask].any() and torch.equal(fmt.unpack(packed.packed_tensors(), columns, out).mask, mask)
    if fmt.values == "bf16":
        assert torch.equal(trained, layer.base.bfloat16().float())
        return
    scales = codes.scales().repeat_interleave(fmt.geometry(columns, out).block_columns, 1)[:, :columns]
    assert torch.equal(codes.scales(), fmt.quantize(before, mask).scales())
    want = nearest_level(layer.base[mask].double(), fmt, scales[mask].double())[1]
    torch.testing.assert_close((trained[mask].double() - layer.base[mask]).abs(), (want - layer.base[mask]).abs(), rtol=1e-5, atol=1e-6)


def test_gradients_on_the_grid_are_straight_through():
    """Those of W_master + (Q(W_master) - W_master).detach(), by autograd; x sees the rounded weight."""
    fmt = WeightFormat("int4", 32, pattern="unstructured")
    base, mask, down, up = parts(24, 40, 3, torch.float32)
    rounding = Rounding(fmt, base, mask)
    x = torch.randn(6, 40, generator=generator(1))
    ours, theirs = ([t.clone().requires_grad_() for t in (x, down, up)] for _ in range(2))
    y = _MaskedProduct.apply(ours[0], base, mask, ours[1], ours[2], 2.0, rounding)
    master = (base + 2.0 * theirs[2] @ theirs[1]) * mask
    want = linear(theirs[0], master + (rounding(master) - master).detach())
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    weights = torch.randn(y.shape, generator=generator(8))
    (y * weights).sum().backward()
    (want * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-4)
    assert (rounding(master.detach()) - master.detach()).abs().max() > 0.1  # clipped codes are among them


# -- pruning again ---------------------------------------------------------------------------------------------------------


def pruned_repeatedly(pruner, revive, shares=(0.3, 0.5, 0.7)):
    """The masks after each pruning; between them every kept weight moves."""
    model = make_llama()
    layers = attached(model)
    blocks = find_blocks(model, layers)
    masks = []
    for share in shares:
        targets = {name: round(share * layer.mask.numel()) for name, layer in layers.items()}
        prune_layers(model, layers, blocks, batches(), pruner, targets, revive, nothing)
        for name, layer in layers.items():
            assert int((~layer.mask).sum()) == targets[name]
            assert not layer.base[~layer.mask].any()
        masks.append({name: layer.mask for name, layer in layers.items()})
        for i, layer in enumerate(layers.values()):
            noise = torch.randn(layer.base.shape, generator=generator(i)) * layer.base.std()
            layer.keep(layer.base + noise, layer.mask)
    return masks


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_masks_are_nested_and_counts_exact(pruner):
    masks = pruned_repeatedly(pruner, revive=False)
    for before, after in pairwise(masks):
        assert all(not (after[name] & ~before[name]).any() for name in before)


def test_sparsegpt_may_revive():
    before, after = pruned_repeatedly("sparsegpt", revive=True, shares=(0.5, 0.3))
    assert all((after[name] & ~before[name]).any() for name in before)


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
def test_patterns_keep_n_of_m(pruner):
    model = make_llama()
    layers = attached(model)
    prune_layers(model, layers, find_blocks(model, layers), batches(), pruner, dict.fromkeys(layers, NofM(3, 8)), False, nothing)
    for layer in layers.values():
        assert (layer.mask.view(len(layer.mask), -1, 8).sum(-1) == 3).all()


def test_pruning_names_the_layer_that_is_not_finite():
    model = make_llama()
    layers = attached(model)
    layers["model.layers.1.mlp.up_proj"].base[0, 0] = float("nan")
    with pytest.raises(CaloraError, match=r"layers.1.mlp.up_proj: the weight holds NaN"):
        prune_layers(model, layers, find_blocks(model, layers), batches(), "sparsegpt", dict.fromkeys(layers, 4), False, nothing)


def test_reconstruction_errors_are_the_formula():
    """mean over channels of sum over tokens of ((D - Y) / ||D||)^2, the sums over all batches."""
    model = make_llama()
    dense = copy.deepcopy(model)
    layers = attached(model)
    for i, layer in enumerate(layers.values()):
        layer.keep(layer.base, torch.rand(layer.base.shape, generator=generator(i)) < 0.6)
    blocks = list(find_blocks(model, layers))

    def outputs(of):
        found = []
        last = []
        handle = of.model.norm.register_forward_pre_hook(lambda m, args: last.append(args[0]))
        with torch.no_grad():
            for ids in batches():
                found.append([*of(ids, output_hidden_states=True).hidden_states[1:-1], last[-1]])
        handle.remove()
        return [torch.cat([b[i].flatten(0, 1) for b in found]).double() for i in range(2)]

    want = [(((d - y) / d.norm(dim=0)) ** 2).sum(0).mean() for d, y in zip(outputs(dense), outputs(model), strict=True)]
    found = reconstruction.errors(model, layers, blocks, batches(), nothing)
    torch.testing.assert_close(found, torch.stack(want), rtol=1e-5, atol=0)
    assert found[1] > found[0] > 0  # it adds up with depth


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_errors_of_outputs_that_are_not_finite_are_refused(value):
    """Also where only one of the models has them, and where the dense one gives 0."""
    model = make_llama()
    layers = attached(model)
    blocks = list(find_blocks(model, layers))
    model.model.layers[1].post_attention_layernorm.weight.data[3] = value
    with pytest.raises(CaloraError, match=r"layers\.1: what this block returns is NaN or infinite"):
        reconstruction.errors(model, layers, blocks, batches(), nothing)
    model = make_llama()
    layers = attached(model)
    layers["model.layers.0.mlp.down_proj"].base[2] = value
    with pytest.raises(CaloraError, match=r"layers\.0: what this block returns is NaN or infinite"):
        reconstruction.errors(model, layers, blocks, batches(), nothing)


def test_errors_hold_the_outputs_of_one_model():
    """Those of the dense one for a batch; the sparse one's are compared as they come."""
    model = make_llama()
    layers = attached(model)
    kept = lambda: sum(type(o) is torch.Tensor and o.shape == (2 * 24, model.config.hidden_size) for o in gc.get_objects())  # noqa: E731
    counts = []
    model.model.norm.register_forward_hook(lambda *_: counts.append(kept()))
    reconstruction.errors(model, layers, list(find_blocks(model, layers)), batches(2), nothing)
    assert counts == [2, 0, 2, 0]
