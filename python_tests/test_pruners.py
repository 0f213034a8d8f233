"""Pruners against the papers' formulas written out, exact counts, monotone masks; and the pruned model end to end."""

import weakref

import pytest
import torch
from formats_table import nearest_level
from zoo import ZOO, dense, logits

import calora_ext as cx
from calora_ext.compression import calibrate, gptq, obs, pruners
from calora_ext.compression.calibrate import Gram
from calora_ext.compression.pruners import sparsegpt, sparsegpt_rounded, wanda
from calora_ext.pruning import NofM, apportion, largest, magnitude, n_of_m, parse

N_OF_M = [NofM(2, 4), NofM(4, 8), NofM(2, 8), NofM(1, 4), NofM(3, 5)]
TARGETS = [*N_OF_M, 0.0, 0.3, 0.5, 0.7, 1.0]
each_target = pytest.mark.parametrize("target", TARGETS, ids=str)
FORMATS = [cx.WeightFormat("int4", 32, pattern="2:4"), cx.WeightFormat("int4", -1, pattern="2:4"), cx.WeightFormat("int8", pattern="2:4"),
           cx.WeightFormat("nf4", 32, pattern="2:4")]  # fmt: skip
UNSTRUCTURED = [cx.WeightFormat("int4", 64, pattern="unstructured"), cx.WeightFormat("int8", pattern="unstructured")]
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def layer(out=24, in_=100, tokens=400, seed=0):
    """A weight and correlated inputs (tokens, in): columns of very different size, many directions almost empty."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, in_ // 4, generator=gen) @ torch.randn(in_ // 4, in_, generator=gen)
    x += 0.3 * torch.randn(tokens, in_, generator=gen)
    return torch.randn(out, in_, generator=gen), x * torch.logspace(-1, 1, in_)[torch.randperm(in_, generator=gen)]


def count(target, weight):
    """A fraction as the number of weights that it means."""
    return target if isinstance(target, NofM) else round(target * weight.numel())


def output_error(weight, new, x):
    return float(((weight - new).double() @ x.double().t()).norm())


def masks(weight, x, target, allowed=None):
    """{pruner: mask} for one layer."""
    return {
        "magnitude": magnitude(weight, target, allowed),
        "wanda": wanda(weight, x.square().sum(0), target, allowed),
        "sparsegpt": sparsegpt(weight, x.t() @ x, target, allowed)[1],
    }


# --- exact counts ------------------------------------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize("shape", [(24, 100), (7, 129), (1, 64), (33, 5)], ids=str)
def test_sparsity_is_met_to_the_weight(target, shape):
    weight, x = layer(*shape) if shape[1] > 3 else layer(shape[0], 8)
    goal = count(target, weight)
    for name, mask in masks(weight, x, goal).items():
        assert mask.shape == weight.shape and mask.dtype == torch.bool
        if isinstance(goal, NofM):
            for begin in range(0, shape[1], goal.of):
                kept = mask[:, begin : begin + goal.of].sum(1)
                assert (kept == min(goal.keep, shape[1] - begin)).all(), name
        else:
            assert int((~mask).sum()) == goal, name


def test_equal_weights_are_kept_from_the_first_on():
    weight = torch.ones(2, 6)
    assert magnitude(weight, 5).flatten().tolist() == [True] * 7 + [False] * 5
    assert wanda(weight, torch.ones(6), 6).tolist() == [[True] * 3 + [False] * 3] * 2
    assert magnitude(weight, NofM(2, 4)).tolist() == [[True, True, False, False, True, True]] * 2


def test_wanda_shares_a_count_that_the_rows_do_not_divide():
    weight, x = layer(7, 10)
    pruned = (~wanda(weight, x.square().sum(0), 31)).sum(1)
    assert pruned.tolist() == [5, 5, 5, 4, 4, 4, 4]


def test_sparsegpt_prunes_every_stripe_of_columns_alike():
    weight, x = layer(9, 300)
    pruned = (~sparsegpt(weight, x.t() @ x, round(0.6 * weight.numel()))[1]).sum(0)
    by_stripe = [int(part.sum()) for part in pruned.split(128)]
    assert sum(by_stripe) == 1620 and all(abs(n - 0.6 * 9 * w) <= 1 for n, w in zip(by_stripe, (128, 128, 44), strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_apportioned_counts_add_up_and_are_as_near_as_bounds_allow(seed):
    gen = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 9, (1,), generator=gen))
    caps = torch.randint(1, 50, (n,), generator=gen)
    shares = caps * torch.rand(n, generator=gen, dtype=torch.float64)
    free = torch.zeros(n, dtype=torch.long)
    whole = apportion(round(float(shares.sum())), shares, free, caps)
    assert int(whole.sum()) == round(float(shares.sum())) and ((whole - shares).abs() < 1 + 1e-6).all()
    floors = (caps * torch.rand(n, generator=gen)).long()
    for total in (0, int(floors.sum()), int(caps.sum()) // 2, int(caps.sum()), 10**6):
        whole = apportion(total, shares, floors, caps)
        assert (whole >= floors).all() and (whole <= caps).all()
        assert int(whole.sum()) == min(max(total, int(floors.sum())), int(caps.sum()))
    assert apportion(21, 0.7 * torch.full((3,), 10.0), free[:1].expand(3), torch.full((3,), 10)).tolist() == [7, 7, 7]


def test_patterns_are_parsed_or_refused():
    assert parse("2:4") == NofM(2, 4) and str(NofM(4, 8)) == "4:8" and parse(1) == 1.0
    for bad in ("4:4", "0:4", "5:4", "2-4", "2:4:8", "half", "1:256", "", -0.1, 1.1, True, None, [2, 4]):
        with pytest.raises(cx.CaloraError, match="pattern such as '2:4'"):
            parse(bad)


# --- the papers' formulas ----------------------------------------------------------------------------------------------


def test_magnitude_keeps_the_largest_of_the_layer_and_of_every_group():
    weight, _ = layer()
    order = sorted(range(weight.numel()), key=lambda i: -abs(weight.flatten()[i].item()))
    kept = magnitude(weight, 1000).flatten()
    assert set(order[: weight.numel() - 1000]) == set(kept.nonzero().flatten().tolist())
    for pattern in N_OF_M:
        mask = magnitude(weight, pattern)
        for row in range(3):
            for begin in range(0, 100, pattern.of):
                group = weight[row, begin : begin + pattern.of].abs()
                want = sorted(range(len(group)), key=lambda i: -group[i].item())[: pattern.keep]
                assert mask[row, begin : begin + pattern.of].nonzero().flatten().tolist() == sorted(want)


@each_target
def test_wanda_is_weight_times_norm_row_by_row(target):
    weight, x = layer()
    goal = count(target, weight)
    score = weight.double().abs() * torch.stack([x[:, j].double().norm() for j in range(100)])
    mask = wanda(weight, x.square().sum(0), goal)
    for row in range(len(weight)):
        if isinstance(goal, NofM):
            groups = [range(begin, min(begin + goal.of, 100)) for begin in range(0, 100, goal.of)]
            want = [i for g in groups for i in sorted(g, key=lambda j: -score[row, j].item())[: goal.keep]]
        else:
            want = sorted(range(100), key=lambda j: score[row, j].item())[int((~mask[row]).sum()) :]
        assert mask[row].nonzero().flatten().tolist() == sorted(want)


def test_wanda_by_hand():
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0], [1.0, 1.0, -1.0, 9.0]])
    squares = torch.tensor([1.0, 4.0, 9.0, 0.25])  # scores 4 6 6 0.5 and 1 2 3 4.5
    assert wanda(weight, squares, 4).tolist() == [[False, True, True, False], [False, False, True, True]]
    assert wanda(weight, squares, NofM(1, 2)).tolist() == [[False, True, True, False], [False, True, False, True]]
    assert torch.equal(wanda(weight, torch.zeros(4), 4), wanda(weight, torch.ones(4), 4))  # nothing arrived: by weight


def surgery(weight, gram, target, fmt=None, plain=None, mask=None):
    """SparseGPT column by column in float64, inverting what is left of the damped Gram matrix each time."""
    h = gram.double() + obs.DAMPING * gram.double().diagonal().mean() * torch.eye(len(gram))
    columns = len(gram)
    if mask is None:
        # U's diagonal: 1 / U[j, j]² is what is left on the diagonal of the inverse of H[j:, j:].
        left = [torch.linalg.inv(h[j:, j:])[0, 0] for j in range(columns)]
        stripe = target.of if isinstance(target, NofM) else pruners.STRIPE
    w, kept = weight.double().clone(), torch.zeros_like(weight, dtype=torch.bool) if mask is None else mask
    for j in range(columns):
        if mask is None and j % stripe == 0:
            part = range(j, min(j + stripe, columns))
            scores = torch.stack([w[:, c] ** 2 / left[c] for c in part], dim=1)
            if isinstance(target, NofM):
                best = scores.argsort(dim=1, descending=True)[:, : target.keep]
                kept[:, j : j + stripe] = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
            else:
                flat, keep = scores.flatten(), scores.numel() - target  # one stripe
                best = flat.argsort(descending=True)[:keep]
                kept[:, j : j + stripe] = torch.zeros_like(flat, dtype=torch.bool).scatter_(0, best, True).view_as(scores)
        value = w[:, j].clone()
        if fmt is not None:
            scale = plain.scales()[:, j // fmt.geometry(columns, len(weight)).block_columns].double()
            _, value = nearest_level(value, fmt, scale)
        value = value * kept[:, j]
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j:] -= ((w[:, j] - value) / inverse[0, 0]).outer(inverse[0])
        w[:, j] = value
    return w, kept


@pytest.mark.parametrize("target", [NofM(2, 4), NofM(4, 8), NofM(2, 8), NofM(3, 5), 0.5, 0.7], ids=str)
def test_sparsegpt_is_the_column_by_column_solve(target):
    weight, x = layer(in_=70)
    gram, goal = x.t() @ x, count(target, weight)
    want, kept = surgery(weight, gram, goal)
    ours, mask = sparsegpt(weight, gram, goal)
    assert (mask == kept).float().mean() > 0.998  # float32 and float64 part ways where two scores are equal but for noise
    want, _ = surgery(weight, gram, goal, mask=mask)
    torch.testing.assert_close(ours.double(), want, rtol=1e-3, atol=1e-3)
    assert not ours[~mask].any()


@pytest.mark.parametrize("fmt", FORMATS + UNSTRUCTURED, ids=str)
def test_rounding_is_part_of_the_solve(fmt):
    weight, x = layer(in_=70)
    gram, target = x.t() @ x, NofM(2, 4) if fmt.pattern == "2:4" else 1000
    q = sparsegpt_rounded(weight, gram, fmt, target)
    moved, kept = surgery(weight, gram, target)
    torch.testing.assert_close(q.scale, fmt.quantize(moved.float(), kept).scale, rtol=0.02, atol=0)
    want, kept = surgery(weight, gram, target, fmt, q)
    assert (q.mask == kept).float().mean() > 0.995
    ours = fmt.decode(fmt.pack_quantized(q), 70, 24)
    want, _ = surgery(weight, gram, target, fmt, q, q.mask)
    assert ((ours - want).abs() < 1e-3).float().mean() > 0.98  # elsewhere a value lay on the edge between two codes
    assert not ours[~q.mask].any()


def test_one_pruned_weight_moves_the_later_columns_by_the_closed_form():
    weight, x = layer(out=1, in_=20)
    gram = x.t() @ x
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[0, 7] = False
    h = gram.double() + obs.DAMPING * gram.double().diagonal().mean() * torch.eye(20)
    inverse = torch.linalg.inv(h[7:, 7:])
    want = weight.double().clone()
    want[0, 7:] -= weight[0, 7].double() * inverse[:, 0] / inverse[0, 0]
    ours, kept = sparsegpt(weight, gram, mask)
    torch.testing.assert_close(ours.double(), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(kept, mask) and torch.equal(ours[:, :7], weight[:, :7])


def test_blocks_of_delayed_updates_change_nothing(monkeypatch):
    weight, x = layer(in_=150)
    gram, results = x.t() @ x, []
    mask = wanda(weight, x.square().sum(0), 1200)
    for lazy in (1, 32, 128, 150):
        monkeypatch.setattr(pruners, "sweep", lambda *a, lazy=lazy: obs.sweep(*a, lazy=lazy))
        results.append(sparsegpt(weight, gram, mask)[0])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-4)


def test_keeping_everything_is_rounding_alone():
    """With a mask that keeps all, and columns that GPTQ takes in the same order, the codes are GPTQ's."""
    weight, _ = layer(in_=64)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)) @ torch.eye(64).add(0.2)
    x *= torch.logspace(2, -2, 64)  # falling: act-order changes nothing
    gram = x.t() @ x
    assert gram.diagonal().argsort(descending=True).equal(torch.arange(64))
    fmt = cx.WeightFormat("int4", 32)
    everything, grid = torch.ones_like(weight, dtype=torch.bool), obs.Grid(fmt.quantize(weight), fmt)
    _, mask, codes = pruners._surgery(weight, obs.inverse_factor(gram), gram.diagonal() > 0, everything, None, grid)
    assert mask.all() and torch.equal(codes, gptq.quantize(weight, gram, fmt).codes)


def test_a_weight_that_lies_transposed_is_not_changed():
    """As a Conv1D's (GPT-2) does: read column by column it needs no copy, and was written to."""
    weight, x = layer()
    stored = weight.t().contiguous()
    gram, before = x.t() @ x, stored.clone()
    moved, mask = sparsegpt(stored.t(), gram, 1200)
    assert torch.equal(stored, before)
    assert all(map(torch.equal, (moved, mask), sparsegpt(weight, gram, 1200)))


@pytest.mark.parametrize("target", [NofM(2, 4), 1200])
def test_a_gram_gives_way_to_its_factor_for_all_who_share_it(target, monkeypatch):
    weight, x = layer()
    fmt, matrix, made = cx.WeightFormat("int4", 32, pattern="2:4" if isinstance(target, NofM) else "unstructured"), x.t() @ x, []
    factor = calibrate.inverse_factor
    monkeypatch.setattr(calibrate, "inverse_factor", lambda gram: made.append(weakref.ref(gram)) or factor(gram))
    gram = Gram(x.shape[1])
    gram.matrix.copy_(matrix)
    for _ in range(2):
        assert all(map(torch.equal, sparsegpt(weight, gram, target), sparsegpt(weight, matrix, target)))
        ours, want = (sparsegpt_rounded(weight, g, fmt, target) for g in (gram, matrix))
        assert torch.equal(ours.codes, want.codes) and torch.equal(ours.mask, want.mask) and torch.equal(ours.scale, want.scale)
    assert len(made) == 1 and made[0]() is None and torch.equal(gram.squares, matrix.diagonal())


def test_the_factor_takes_columns_in_any_order_and_one_matrix():
    x = torch.randn(400, 300, generator=torch.Generator().manual_seed(0)) @ torch.eye(300).add(0.1)
    gram, order = x.t() @ x, torch.randperm(300, generator=torch.Generator().manual_seed(1))
    before = gram.clone()
    assert torch.equal(obs.inverse_factor(gram, order), obs.inverse_factor(gram[order][:, order].contiguous()))
    assert torch.equal(gram, before)


# --- what calibration is worth ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [NofM(2, 4), NofM(4, 8), 0.5, 0.7], ids=str)
def test_calibrated_pruning_beats_magnitude_on_the_outputs(target):
    for seed in range(5):
        weight, x = layer(48, 96, seed=seed)
        goal, gram = count(target, weight), x.t() @ x
        plain = output_error(weight, weight * magnitude(weight, goal), x)
        by_norm = wanda(weight, x.square().sum(0), goal)
        moved, mask = sparsegpt(weight, gram, goal)
        assert output_error(weight, weight * by_norm, x) < 0.8 * plain
        assert output_error(weight, moved, x) < output_error(weight, weight * by_norm, x)
        assert output_error(weight, moved, x) < output_error(weight, weight * mask, x)
        assert output_error(weight, sparsegpt(weight, gram, by_norm)[0], x) < output_error(weight, weight * by_norm, x)


def test_wanda_keeps_what_outlier_inputs_need():
    gen = torch.Generator().manual_seed(0)
    x, weight = torch.randn(500, 200, generator=gen), torch.randn(64, 200, generator=gen)
    x[:, [17, 150]] *= 20
    for target in (NofM(2, 4), 6400):
        plain, ours = magnitude(weight, target), wanda(weight, x.square().sum(0), target)
        assert 3 * output_error(weight, weight * ours, x) ** 2 < output_error(weight, weight * plain, x) ** 2


@each_format
def test_rounding_jointly_beats_rounding_afterwards(fmt):
    joint = after = 0.0
    for seed in range(5):
        weight, x = layer(48, 128, seed=seed)
        gram = x.t() @ x
        joint += output_error(weight, fmt.decode(fmt.pack_quantized(sparsegpt_rounded(weight, gram, fmt, NofM(2, 4))), 128, 48), x)
        after += output_error(weight, fmt.decode(fmt.pack(*sparsegpt(weight, gram, NofM(2, 4))), 128, 48), x)
    assert joint < (after if fmt.values == "int4" else 1.01 * after)  # int8 has next to nothing to make up for


# --- masks that only grow -----------------------------------------------------------------------------------------------


def test_what_was_pruned_stays_pruned():
    weight, x = layer(16, 160)
    for name in ("magnitude", "wanda", "sparsegpt"):
        allowed, w = None, weight
        for share in (0.2, 0.45, 0.45, 0.6, 0.7):  # also at a rate that does not rise
            goal = round(share * weight.numel())
            if name == "sparsegpt":
                w, mask = sparsegpt(w, x.t() @ x, goal, allowed)
            else:
                mask = masks(w, x, goal, allowed)[name]
            assert int((~mask).sum()) == goal
            assert allowed is None or not (mask & ~allowed).any()
            allowed = mask
        fewer = masks(weight, x, round(0.5 * weight.numel()), allowed)[name]  # less than is pruned already
        assert torch.equal(fewer, allowed)
        pattern = masks(weight, x, NofM(2, 4), allowed)[name]
        assert not (pattern & ~allowed).any() and (pattern.view(16, -1, 4).sum(-1) <= 2).all()


def test_rows_with_more_zeros_than_their_share_leave_less_to_the_others():
    weight, x = layer(4, 10)
    allowed = torch.ones_like(weight, dtype=torch.bool)
    allowed[2, :9] = False
    mask = wanda(weight, x.square().sum(0), 20, allowed)
    assert (~mask).sum(1).tolist() == [4, 4, 9, 3] and not (mask & ~allowed).any()


def test_sparsegpt_may_revive_where_it_is_allowed():
    weight, x = layer()
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.4] = 0
    zero, goal = weight == 0, NofM(2, 4)  # some groups have but one weight left
    assert not masks(weight, x, goal)["magnitude"][zero].any() and not masks(weight, x, goal)["wanda"][zero].any()
    assert sparsegpt(weight, x.t() @ x, goal)[0][zero].any()
    assert not sparsegpt(weight, x.t() @ x, goal, ~zero)[0][zero].any()


# --- bad input ----------------------------------------------------------------------------------------------------------


def test_singular_inputs_and_dead_columns_give_finite_weights():
    weight, x = layer()
    x[:, 10:30] = 0
    for gram in (x.t() @ x, torch.ones(100, 100), torch.zeros(100, 100), x[:1].t() @ x[:1]):
        for target in (NofM(2, 4), 1200):
            new, mask = sparsegpt(weight, gram, target)
            assert torch.isfinite(new).all() and not new[~mask].any()
    dead = sparsegpt(weight, x.t() @ x, 600)[1][:, 10:30]
    assert not dead.any()  # what no input reaches goes first
    assert torch.equal(sparsegpt(weight, torch.zeros(100, 100), NofM(2, 4))[1], magnitude(weight, NofM(2, 4)))


def test_values_that_are_not_finite_are_refused():
    weight, x = layer()
    bad = weight.clone()
    bad[3, 4] = torch.nan
    for call in (
        lambda: magnitude(bad, 10), lambda: wanda(bad, x.square().sum(0), 10), lambda: sparsegpt(bad, x.t() @ x, 10),
        lambda: wanda(weight, torch.full((100,), torch.inf), 10), lambda: sparsegpt(weight, torch.full((100, 100), torch.nan), 10),
    ):  # fmt: skip
        with pytest.raises(cx.CaloraError, match="NaN or infinite"):
            call()


def test_ranking_in_pieces_changes_nothing(monkeypatch):
    weight, x = layer(31, 70)
    before = masks(weight, x, 1000), masks(weight, x, NofM(2, 4))
    monkeypatch.setattr("calora_ext.pruning.CHUNK", 200)
    for old, new in zip(before, (masks(weight, x, 1000), masks(weight, x, NofM(2, 4))), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_selection_of_nothing_and_of_everything():
    scores, everything = torch.rand(3, 8), torch.ones(3, 8, dtype=torch.bool)
    assert not largest(scores, torch.zeros(3, dtype=torch.long), everything).any()
    assert largest(scores, torch.full((3,), 8), everything).all()
    assert not n_of_m(scores, NofM(2, 4), ~everything).any()


# --- whole models -------------------------------------------------------------------------------------------------------


def data(sequences=20, length=64):
    gen = torch.Generator().manual_seed(5)
    return [torch.randint(2, 96, (length,), generator=gen).tolist() for _ in range(sequences)]


SPARSE = [
    cx.Recipe(sparsity="2:4", group_size=32), cx.Recipe(sparsity="2:4", weights="int8"), cx.Recipe(sparsity="2:4", weights="bf16"),
    cx.Recipe(sparsity="2:4", pruner="wanda"), cx.Recipe(sparsity="2:4", pruner="wanda", rounding="rtn", weights="int8"),
    cx.Recipe(sparsity="2:4", pruner="magnitude"), cx.Recipe(sparsity="2:4", pruner="sparsegpt", rounding="rtn"),
    cx.Recipe(sparsity="2:4", pruner="wanda", weights="bf16"), cx.Recipe(sparsity="4:8"), cx.Recipe(sparsity="2:8", weights="int8"),
    cx.Recipe(sparsity=0.7), cx.Recipe(sparsity=0.7, weights="int8", pruner="wanda"), cx.Recipe(sparsity=0.5, weights="bf16"),
    cx.Recipe(sparsity=0.5, pruner="magnitude"),
]  # fmt: skip


@pytest.mark.parametrize("recipe", SPARSE, ids=lambda r: f"{r.sparsity}-{r.pruner}-{r.rounding}-{r.weights}")
def test_a_pruned_model_survives_with_its_zeros(recipe, tmp_path):
    model = dense("llama")
    report = cx.compress(model, recipe, calibration=data())
    assert report.recipe.pruner == (recipe.pruner or "sparsegpt") and report.recipe.rounding == (recipe.rounding or ("rtn" if recipe.weights == "bf16" else "gptq"))
    model.save_pretrained(tmp_path)
    loaded = cx.load(tmp_path)
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    sparse = {name: m for name, m in model.named_modules() if isinstance(m, cx.CompressedLinear) and m.format.sparse}
    assert set(report.outcome.pruned) == set(sparse) and len(sparse) == 14 and not report.outcome.uncalibrated
    for name, module in sparse.items():
        ours, theirs = module.decode(), loaded.get_submodule(name).decode()
        goal = parse(recipe.sparsity)
        assert torch.equal(ours, theirs) and module.format.pattern == ("2:4" if recipe.sparsity == "2:4" else "unstructured")
        pruned, size = report.outcome.pruned[name]  # the counts of all layers together are rounded
        assert abs(pruned - (1 - recipe.density) * size) < 1 and size == ours.numel()
        assert int((ours == 0).sum()) >= report.outcome.pruned[name][0]
        if isinstance(goal, NofM):
            assert ((ours != 0).view(len(ours), -1, goal.of).sum(-1) <= goal.keep).all()
    assert f"{report.recipe.pruner}: {100 * (1 - recipe.density):.2f} % of" in str(report)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "t5", "bert"])
def test_a_calibrated_model_is_closer(name):
    want, distance = logits(dense(name), name), {}
    for pruner in ("magnitude", "sparsegpt"):
        model = dense(name)
        recipe = cx.Recipe(sparsity="2:4", pruner=pruner, weights="int8", lm_head=None, activations="exact")
        cx.compress(model, recipe, calibration=data() if pruner == "sparsegpt" else None)
        distance[pruner] = float((logits(model, name) - want).norm() / want.norm())
    assert distance["sparsegpt"] < distance["magnitude"]


def test_zeros_of_a_pruned_model_stay():
    model = dense("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.4)
    zero = weight == 0
    for calibration in (None, data()):
        small = dense("llama")
        small.load_state_dict(model.state_dict())
        report = cx.compress(small, cx.Recipe(sparsity="2:4", weights="bf16"), calibration=calibration)
        assert not small.model.layers[0].mlp.up_proj.decode()[zero].any()
        pruned, size = report.outcome.pruned["model.layers.0.mlp.up_proj"]
        assert pruned > size / 2


def test_a_choice_without_its_data_and_data_without_a_use_are_refused(tmp_path):
    for fields, message in (
        ({"pruner": "wanda"}, "pruner='wanda' needs calibration data"), ({"pruner": "sparsegpt"}, "pruner='sparsegpt' needs calibration data"),
        ({"rounding": "gptq"}, "rounding='gptq' needs calibration data"),
    ):  # fmt: skip
        with pytest.raises(cx.CaloraError, match=message):
            cx.compress(dense("llama"), cx.Recipe(sparsity="2:4", **fields))
    with pytest.raises(cx.CaloraError, match="no meaning for rounding='rtn' and pruner='magnitude'"):
        cx.compress(dense("llama"), cx.Recipe(sparsity="2:4", pruner="magnitude", rounding="rtn"), calibration=data())
    dense("llama").save_pretrained(tmp_path)
    with pytest.raises(cx.CaloraError, match="needs calibration data"):
        ZOO["llama"][1].from_pretrained(tmp_path, quantization_config=cx.CaloraConfig(cx.Recipe(sparsity="2:4", pruner="wanda")))


def test_layers_that_no_token_reaches_are_named():
    model = dense("bert")  # its pooler lies outside of the blocks
    report = cx.compress(model, cx.Recipe(sparsity="2:4"), calibration=data())
    assert report.outcome.uncalibrated == ["bert.pooler.dense"]
    assert "no calibration token reached bert.pooler.dense: pruned by magnitude and rounded to nearest" in str(report)
    assert report.to_dict()["uncalibrated"] == ["bert.pooler.dense"] and report.to_dict()["layer_sparsity"]["bert.pooler.dense"] == 0.5


def test_inputs_that_are_not_finite_name_the_layer():
    for recipe in (cx.Recipe(sparsity="2:4"), cx.Recipe(sparsity="2:4", pruner="wanda", rounding="rtn")):
        model = dense("llama")
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight[3] = torch.inf
        with pytest.raises(cx.CaloraError, match=r"layers\.1\.self_attn\.q_proj: .*NaN or infinite"):
            cx.compress(model, recipe, calibration=data())
