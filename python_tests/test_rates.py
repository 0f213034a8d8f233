"""Rates per block: the rules against their formulas and the plain definition of what they measure, the budget to the weight, whole models."""

import itertools
import json
import math

import pytest
import torch
from torch import nn
from zoo import dense, logits

import calora_ext as cx
from calora_ext.compression import rates
from calora_ext.compression.calibrate import find_blocks, token_batches
from calora_ext.policy import plan
from calora_ext.pruning import NofM
from calora_ext.recipe import RATES

SPARSITIES = [0.02, 0.3, 0.5, 0.6, 0.7, 0.95, 0.99]


def sizes(*values):
    return torch.tensor(values, dtype=torch.float64)


def data(sequences=20, length=64):
    gen = torch.Generator().manual_seed(5)
    return [torch.randint(2, 96, (length,), generator=gen).tolist() for _ in range(sequences)]


def random_similarity(n, seed):
    x = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x + x.t()) / 2


# --- rules --------------------------------------------------------------------------------------------------------------


def test_arithmetic_rates_rise_evenly_around_the_sparsity():
    found = rates.arithmetic(0.7, sizes(*[10] * 8), None)
    steps = found.diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 0.04))
    assert found.mean() == pytest.approx(0.7) and found[0] == pytest.approx(0.56)
    for sparsity in SPARSITIES:
        found = rates.arithmetic(sparsity, sizes(*[10] * 8), None)
        assert found.min() >= 0 and found.max() <= 1 and found.mean() == pytest.approx(sparsity)
    assert rates.arithmetic(0.7, sizes(10), None).tolist() == [0.7]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_rmi_is_the_optimum_of_the_linear_programme(sparsity, count):
    """minimise sum I x with x within delta of the sparsity and the mean given: the best vertex, by trying all of them."""
    similarity = random_similarity(count, count)
    delta = 0.01 if sparsity <= 0.5 else 0.02 if sparsity <= 0.6 else 0.03
    delta = min(delta, sparsity, 1 - sparsity)
    h = torch.tensor([sum(similarity[i, j].item() for j in range(count) if j != i) for i in range(count)], dtype=torch.float64)
    cost = torch.exp(-h / h.sum()) if count > 1 else torch.ones(1, dtype=torch.float64)
    best = math.inf
    for middle in range(count):  # a vertex has at most one coordinate off its bounds
        for signs in itertools.product((-1, 1), repeat=count - 1):
            rest = -delta * sum(signs)
            if abs(rest) <= delta + 1e-12:
                x = [sparsity + s * delta for s in signs]
                x.insert(middle, sparsity + rest)
                best = min(best, sum(c * v for c, v in zip(cost.tolist(), x, strict=True)))
    found = rates.rmi(sparsity, sizes(*[10] * count), similarity)
    assert float((cost * found).sum()) == pytest.approx(best, abs=1e-12)
    assert found.mean() == pytest.approx(sparsity) and (found - sparsity).abs().max() <= delta + 1e-12
    if count > 1:
        assert found[h.argmax()] == found.max()  # what resembles the others is redundant


def test_rmi_meets_the_weighted_mean_of_blocks_of_different_size():
    weights = sizes(10, 30, 5, 70, 20)
    found = rates.rmi(0.7, weights, random_similarity(5, 0))
    assert float((found * weights).sum() / weights.sum()) == pytest.approx(0.7)


def test_owl_is_the_published_formula():
    outliers = torch.tensor([0.02, 0.08, 0.05, 0.01], dtype=torch.float64)
    density = (outliers - 0.01) / 0.07 * 0.16
    want = 1 - (density - density.mean() + (1 - 0.7))
    found = rates.owl(0.7, sizes(*[10] * 4), outliers)
    torch.testing.assert_close(found, want)
    assert found.max() - found.min() == pytest.approx(0.16) and found.argmin() == 1
    assert rates.owl(0.6, sizes(1, 2), torch.tensor([0.3, 0.3], dtype=torch.float64)).tolist() == [0.6, 0.6]


# --- what is measured ---------------------------------------------------------------------------------------------------


class Watch:
    """The inputs of modules in plain forward passes, one list of tensors per name."""

    def __init__(self, model, names, batches):
        self.inputs = {name: [] for name in names}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(lambda m, args, kwargs, name=name: self.inputs[name].append(next(iter((*args, *kwargs.values())))), with_kwargs=True)
            for name in names
        ]  # fmt: skip
        with torch.no_grad():
            for ids in batches:
                model(input_ids=ids)
        for handle in handles:
            handle.remove()


@pytest.fixture
def measured():
    model = dense("llama")
    formats = plan(model, cx.Recipe(sparsity=0.5)).formats
    blocks = find_blocks(model, [name for name, fmt in formats.items() if fmt.sparse])
    return model, blocks, token_batches(data(), None, model.config)


def test_similarity_is_linear_cka_of_the_block_inputs(measured):
    model, blocks, batches = measured
    seen = []
    found = rates.block_similarity(model, blocks, batches, lambda: seen.append(1))
    inputs = Watch(model, blocks, batches).inputs
    features = [torch.cat(x).double().flatten(1) for x in inputs.values()]  # (sequences, length * hidden)
    features = [x - x.mean(0) for x in features]
    for i, x in enumerate(features):
        for j, y in enumerate(features):  # in feature space, as Kornblith et al. define it
            want = (x.t() @ y).norm() ** 2 / ((x.t() @ x).norm() * (y.t() @ y).norm())
            assert float(found[i, j]) == pytest.approx(float(want), abs=1e-6)
    assert len(seen) == len(blocks) and not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_outliers_are_counted_over_the_scores_of_a_block(measured):
    model, blocks, batches = measured
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3:5] *= 50
    found = rates.block_outliers(model, blocks, batches, lambda: None)
    for i, members in enumerate(blocks.values()):
        inputs = Watch(model, members, batches).inputs
        scores = torch.cat([
            (model.get_submodule(name).weight.double().abs() * torch.cat([x.flatten(0, 1) for x in inputs[name]]).double().norm(dim=0)).flatten()
            for name in members
        ])  # fmt: skip
        assert float(found[i]) == pytest.approx(float((scores > 5 * scores.mean()).double().mean()), abs=1e-4)
    assert found[1] > found[0]


def test_similarity_needs_sequences(measured):
    model, blocks, batches = measured
    with pytest.raises(cx.CaloraError, match="8 calibration sequences or more"):
        rates.block_similarity(model, blocks, batches[:1] if len(batches[0]) < 8 else [batches[0][:7]], lambda: None)


@pytest.mark.parametrize(("rule", "says"), [("rmi", "layers.1: the inputs of this block"), ("owl", "layers.0: its weights or their inputs")])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_name_the_block(rule, says, value):
    """Nothing after the rates looks at them."""
    model = dense("llama")
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[3] = value
    with pytest.raises(cx.CaloraError, match=f"{says}.* NaN or infinite"):
        cx.compress(model, cx.Recipe(sparsity=0.5, rates=rule, pruner="magnitude", rounding="rtn"), calibration=data())


# --- the budget ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("rule", ["uniform", "arithmetic", "rmi", "owl"])
def test_every_rule_meets_the_sparsity_to_the_weight(rule, sparsity):
    layers = {f"b.{i}.{name}": size for i in range(5) for name, size in (("q", 64 * 61), ("up", 97 * 33))} | {"outside": 1234}
    blocks = {f"b.{i}": [f"b.{i}.q", f"b.{i}.up"] for i in range(5)}
    found = {"rmi": random_similarity(5, 1), "owl": torch.rand(5, dtype=torch.float64)}.get(rule)
    wanted = rates.block_rates(rates.RULES[rule], sparsity, layers, blocks, found)
    pruned = rates.counts(wanted, sparsity, layers, {})
    assert sum(pruned.values()) == round(sparsity * sum(layers.values()))
    assert all(0 <= pruned[name] <= layers[name] for name in layers)
    if 0.2 < sparsity < 0.8:  # elsewhere OWL asks for more than there is
        assert all(abs(pruned[name] / layers[name] - wanted[name]) < 0.02 for name in layers)
    if rule == "uniform":
        assert all(abs(pruned[name] - sparsity * layers[name]) < 1 for name in layers)


def test_what_is_pruned_already_counts_and_stays():
    layers = {"a": 100, "b": 100, "c": 100}
    even = dict.fromkeys(layers, 0.5)
    assert rates.counts(even, 0.5, layers, {"a": 90}) == {"a": 90, "b": 30, "c": 30}
    assert rates.counts(even, 0.5, layers, {"a": 90, "b": 80}) == {"a": 90, "b": 80, "c": 0}


def test_a_table_pins_what_it_names():
    layers = {"model.layers.1.q": 100, "model.layers.1.up": 300, "model.layers.10.q": 100}
    assert rates.table_rates({"model.layers.1": 0.2, "model.layers.1.up": 0.4}, 0.48, layers) == pytest.approx(
        {"model.layers.1.q": 0.2, "model.layers.1.up": 0.4, "model.layers.10.q": 1.0}
    )
    assert rates.table_rates({"model": 0.5}, 0.5, layers) == dict.fromkeys(layers, 0.5)
    with pytest.raises(cx.CaloraError, match=r"names 'model\.layers\.2'"):
        rates.table_rates({"model.layers.2": 0.5}, 0.5, layers)
    with pytest.raises(cx.CaloraError, match=r"come to 0\.4000, sparsity is 0\.5"):
        rates.table_rates({"model": 0.4}, 0.5, layers)
    with pytest.raises(cx.CaloraError, match=r"would need 1\.3000"):
        rates.table_rates({"model.layers.1": 0.3}, 0.5, layers)


# --- whole models -------------------------------------------------------------------------------------------------------

RECIPES = [
    cx.Recipe(sparsity=0.7), cx.Recipe(sparsity=0.7, weights="int8", rates="rmi"), cx.Recipe(sparsity=0.6, rates="owl", pruner="wanda", rounding="rtn"),
    cx.Recipe(sparsity=0.5, rates="arithmetic", weights="bf16"), cx.Recipe(sparsity=0.5, rates={"model.layers.0": 0.4, "model.layers.1.mlp.down_proj": 0.55}),
    cx.Recipe(sparsity=0.7, pruner="magnitude", rates="rmi", rounding="rtn"),
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.sparsity}-{r.pruner}-{r.weights}-{r.rates}")
def test_a_model_is_pruned_to_the_weight_and_survives(recipe, tmp_path):
    model = dense("llama")
    report = cx.compress(model, recipe, calibration=data())
    pruned = report.outcome.pruned
    total = sum(size for _, size in pruned.values())
    assert len(pruned) == 14 and sum(n for n, _ in pruned.values()) == round(recipe.sparsity * total)
    model.save_pretrained(tmp_path)
    loaded = cx.load(tmp_path)
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    for name, (count, size) in pruned.items():
        module = loaded.get_submodule(name)
        assert module.format.pattern == "unstructured" and torch.equal(module.decode(), model.get_submodule(name).decode())
        assert int((module.decode() == 0).sum()) >= count
        if recipe.rates == "arithmetic":
            assert count / size == pytest.approx(0.36 if "layers.0" in name else 0.64, abs=1e-3)
    if isinstance(recipe.rates, dict):
        assert abs(pruned["model.layers.1.mlp.down_proj"][0] - 0.55 * 96 * 64) < 1
    assert loaded.config.quantization_config.recipe.rates == recipe.rates
    assert f"{100 * recipe.sparsity:.2f} % of" in str(report)


@pytest.mark.parametrize("chosen", ["uniform", "arithmetic", {"model.layers.1": 0.8}], ids=str)
def test_compressing_while_loading_prunes_the_same(chosen, tmp_path):
    model = dense("llama")
    model.save_pretrained(tmp_path)
    recipe = cx.Recipe(sparsity=0.63, rates=chosen)
    report = cx.compress(model, recipe)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=cx.CaloraConfig(recipe))
    for name in report.outcome.pruned:
        assert torch.equal(loaded.get_submodule(name).decode(), model.get_submodule(name).decode())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rates": "owl"}, "rates='owl' has no meaning without sparsity"),
        ({"rates": {"a": 0.5}}, "has no meaning without sparsity"),
        ({"sparsity": "2:4", "rates": "rmi"}, "no meaning for sparsity='2:4'"),
        ({"sparsity": 0.5, "rates": "best"}, "unknown rates 'best'"),
        ({"sparsity": 0.5, "rates": {}}, "rates must be"),
        ({"sparsity": 0.5, "rates": {"a": 1.5}}, "rates must be"),
        ({"sparsity": 0.5, "rates": {"a": True}}, "rates must be"),
        ({"sparsity": 0.5, "rates": {3: 0.5}}, "rates must be"),
        ({"sparsity": 0.5, "rates": {"a": float("nan")}}, "rates must be"),
        ({"sparsity": 0.5, "rates": ["owl"]}, "unknown rates"),
    ],
    ids=str,
)
def test_rates_without_meaning_are_refused(fields, message):
    with pytest.raises(cx.CaloraError, match=message):
        cx.Recipe(**fields)


def test_rates_that_the_model_or_the_data_do_not_fit_are_refused():
    for rule in ("rmi", "owl"):
        with pytest.raises(cx.CaloraError, match=f"rates='{rule}' needs calibration data"):
            cx.compress(dense("llama"), cx.Recipe(sparsity=0.5, rates=rule))
    with pytest.raises(cx.CaloraError, match=r"names 'model\.layers\.7'"):
        cx.compress(dense("llama"), cx.Recipe(sparsity=0.5, rates={"model.layers.7": 0.5}))
    flat = nn.ModuleDict({"up": nn.Linear(64, 32)})
    with pytest.raises(cx.CaloraError, match="list of blocks"):
        rates.targets(flat, {"up": cx.Recipe(sparsity=0.5).format()}, cx.Recipe(sparsity=0.5, rates="arithmetic"))


def test_a_recipe_knows_every_rule():
    assert {name: rule.measure is not None for name, rule in rates.RULES.items()} == RATES


def falling(sparsity, sizes, measured):
    return sparsity + torch.linspace(0.1, -0.1, len(sizes), dtype=sizes.dtype)


def by_width(sparsity, sizes, widths):
    return sparsity + 0.1 * (widths - widths.mean()).sign()


def widths(model, blocks, batches, done, residency):
    assert len(batches) and all(ids.dtype == torch.long for ids in batches)
    return torch.arange(len(blocks), dtype=torch.float64)


@pytest.mark.parametrize(("rule", "first"), [(rates.Rule(falling), 0.6), (rates.Rule(by_width, widths), 0.4)], ids=["by depth", "measured"])
def test_a_rule_from_elsewhere(rule, first, tmp_path):
    remove = rates.register("ours", rule)
    try:
        recipe = cx.Recipe(sparsity=0.5, rates="ours", pruner="magnitude", rounding="rtn")
        assert cx.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
        if rule.measure is not None:
            with pytest.raises(cx.CaloraError, match="rates='ours' needs calibration data"):
                cx.compress(dense("llama"), recipe)
        model = dense("llama")
        pruned = cx.compress(model, recipe, calibration=data() if rule.measure else None).outcome.pruned
        for name, (count, size) in pruned.items():
            assert abs(count - (first if "layers.0" in name else 1 - first) * size) < 1
        model.save_pretrained(tmp_path)
        assert cx.load(tmp_path).config.quantization_config.recipe.rates == "ours"
        with pytest.raises(cx.CaloraError, match="called 'ours' already"):
            rates.register("ours", rule)
    finally:
        remove()
    test_a_recipe_knows_every_rule()
    with pytest.raises(cx.CaloraError, match="unknown rates 'ours'; choose one of uniform, rmi, owl, arithmetic"):
        cx.Recipe(sparsity=0.5, rates="ours")


def test_a_pattern_is_the_same_target_everywhere():
    model, recipe = dense("llama"), cx.Recipe(sparsity="2:4")
    assert set(rates.targets(model, plan(model, recipe).formats, recipe).values()) == {NofM(2, 4)}


def test_a_pruned_model_is_pruned_further_and_never_less():
    model = dense("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.1)
    zeros, zero = int((weight == 0).sum()), weight == 0
    report = cx.compress(model, cx.Recipe(sparsity=0.5, weights="bf16"), calibration=data())
    pruned = report.outcome.pruned
    assert pruned["model.layers.0.mlp.up_proj"][0] == zeros and not model.model.layers[0].mlp.up_proj.decode()[zero].any()
    assert sum(n for n, _ in pruned.values()) == round(0.5 * sum(size for _, size in pruned.values()))
