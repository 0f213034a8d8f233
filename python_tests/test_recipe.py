"""Recipe: defaults, meaningless combinations, JSON."""

import json

import pytest

from calora_ext import CaloraError, Recipe, WeightFormat


def test_defaults_are_the_stated_ones():
    recipe = Recipe()
    assert recipe.format() == WeightFormat("int4", 64)
    assert recipe.format("lm_head") == WeightFormat("int8") and recipe.format("embeddings") is None
    assert recipe.resolve(calibrated=False).rounding == "rtn" and recipe.resolve(calibrated=True).rounding == "gptq"
    assert Recipe(weights="int8").group_size == -1
    assert Recipe(weights="int8", embeddings="int4").format("embeddings") == WeightFormat("int4", 64)
    assert Recipe(weights="nf4").format() == WeightFormat("nf4", 64) and Recipe(weights="nf4", lm_head="nf4").format("lm_head") == WeightFormat("nf4", 64)
    assert Recipe(symmetric=False, lm_head="nf4").format("lm_head") == WeightFormat("nf4", 64)
    assert Recipe(weights="nf4").resolve(calibrated=True).rounding == "gptq" and Recipe(weights="nf4", sparsity=0.5).group_size == 128
    assert Recipe(group_size=128, embeddings="int4").format("embeddings") == WeightFormat("int4", 128)
    sparse = Recipe(sparsity="2:4")
    assert sparse.format() == WeightFormat("int4", 128, pattern="2:4") and sparse.format("lm_head") == WeightFormat("int8")
    assert sparse.resolve(calibrated=False).pruner == "magnitude" and sparse.resolve(calibrated=False).rounding == "rtn"
    assert Recipe(sparsity=0.7).format() == WeightFormat("int4", 128, pattern="unstructured") and Recipe(sparsity=0.75).density == 0.25
    assert Recipe(sparsity="2:8").format().pattern == "unstructured" and Recipe(sparsity="2:8").density == 0.25
    calibrated = sparse.resolve(calibrated=True)
    assert (calibrated.pruner, calibrated.rounding) == ("sparsegpt", "gptq")
    assert Recipe(weights="bf16", sparsity="2:4").resolve(calibrated=True).rounding == "rtn"
    assert Recipe(sparsity="2:4", group_size=64).format() == WeightFormat("int4", 64, pattern="2:4")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "int3"}, "unknown weights 'int3'"),
        ({"weights": "nf4", "symmetric": False}, "nf4 has no zero points"),
        ({"weights": "nf4", "group_size": 100}, "multiple of 32"),
        ({"weights": None}, "unknown weights None"),
        ({"weights": ["int4"]}, "unknown weights"),
        ({"sparsity": "4:4"}, "sparsity must be a pattern such as '2:4'.* got '4:4'"),
        ({"sparsity": 1.5}, "from 0 to 1; got 1.5"),
        ({"sparsity": float("nan")}, "from 0 to 1; got nan"),
        ({"sparsity": True}, "from 0 to 1; got True"),
        ({"sparsity": ["2:4"]}, "sparsity must be"),
        ({"sparsity": "2:4", "pruner": "random"}, "unknown pruner 'random'"),
        ({"sparsity": "2:4", "symmetric": False}, "symmetric=False has no meaning for sparse"),
        ({"sparsity": "2:4", "rounding": "gptq", "weights": "bf16"}, "no meaning for bf16"),
        ({"pruner": "wanda"}, "without sparsity"),
        ({"rates": "owl"}, "rates='owl' has no meaning without sparsity"),
        ({"group_size": 48}, "multiple of 32"),
        ({"group_size": "64"}, "whole number"),
        ({"group_size": 64, "weights": "int8"}, "no meaning for int8"),
        ({"symmetric": False, "weights": "int8"}, "zero points"),
        ({"symmetric": 1}, "true or false"),
        ({"rounding": "awq"}, "unknown rounding"),
        ({"rounding": "gptq", "weights": "bf16"}, "no meaning for bf16"),
        ({"activations": "fp8"}, "unknown activations"),
        ({"lm_head": "fp8"}, "unknown lm_head"),
        ({"embeddings": "nf3"}, "unknown embeddings 'nf3'"),
        ({"skip": ["("]}, "not a valid regex"),
        ({"skip": "lm_head"}, "list of regexes"),
    ],
    ids=str,
)
def test_meaningless_fields_are_refused_by_name(fields, message):
    with pytest.raises(CaloraError, match=message):
        Recipe(**fields)


def test_choices_that_need_calibration_and_calibration_that_needs_a_choice():
    for fields in ({"rounding": "gptq"}, {"sparsity": "2:4", "pruner": "wanda"}, {"sparsity": "2:4", "pruner": "sparsegpt"}):
        with pytest.raises(CaloraError, match="needs calibration"):
            Recipe(**fields).resolve(calibrated=False)
    for fields in ({"rounding": "rtn"}, {"weights": "bf16"}, {"weights": "bf16", "sparsity": "2:4", "pruner": "magnitude"}):
        with pytest.raises(CaloraError, match="calibration data has no meaning"):
            Recipe(**fields).resolve(calibrated=True)


def test_json_round_trip():
    for recipe in (
        Recipe(group_size=128, symmetric=False, rounding="gptq", embeddings="int8", skip=["down_proj"]),
        Recipe(weights="int8", sparsity="2:4", pruner="magnitude"), Recipe(weights="int8", sparsity=1), Recipe(sparsity=0.5, rates={"model.layers.0": 0.3}),
    ):
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_bad_json_is_refused():
    with pytest.raises(CaloraError, match="'colour'"):
        Recipe.from_dict({"colour": "red"})
    with pytest.raises(CaloraError, match="upgrade"):
        Recipe.from_dict({"layout_version": 99})
    with pytest.raises(CaloraError, match="layout_version"):
        Recipe.from_dict({"layout_version": "1"})
    with pytest.raises(CaloraError, match="wrong type"):
        Recipe.from_dict({"skip": 3})
    with pytest.raises(CaloraError, match="dictionary"):
        Recipe.from_dict([1])
