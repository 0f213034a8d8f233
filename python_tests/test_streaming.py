"""Compressing directory to directory: the bytes of the path in memory, bounded memory, nothing left of what fails."""

import filecmp
import json

import pytest
import torch
from zoo import TIED, ZOO, dense

import calora_ext as cx
from calora_ext.io.checkpoint import read_header

LENGTH = 64  # tokens in a calibration sequence, what the tiny models take


def sequences(count=12, seed=0):
    return torch.randint(2, 96, (count, LENGTH), generator=torch.Generator().manual_seed(seed)).tolist()


def in_memory(source, target, recipe, calibration=None):
    model = cx.load(source)
    report = cx.compress(model, recipe, calibration=calibration)
    model.save_pretrained(target)
    return report


def contents(path):
    """{tensor: (dtype, shape, bytes)} of a safetensors file whose packed tensors are aligned, in the order of the file."""
    header = read_header(path)
    assert not header.misaligned and header.metadata["format"] == "pt"
    data = path.read_bytes()
    return [(name, t.dtype, t.shape, data[t.begin : t.end]) for name, t in sorted(header.tensors.items(), key=lambda item: item[1].begin)]


def check_same(tmp_path, name, recipe, calibration=None, max_memory=None, **changes):
    model = dense(name)
    for key, value in changes.items():
        setattr(model.config, key, value)
    model.save_pretrained(tmp_path / "dense")
    want = in_memory(tmp_path / "dense", tmp_path / "whole", recipe, calibration)
    got = cx.compress_directory(tmp_path / "dense", tmp_path / "streamed", recipe, calibration=calibration, max_memory=max_memory)
    drop = lambda report: {k: v for k, v in report.to_dict().items() if k != "seconds"}  # noqa: E731
    assert drop(got) == drop(want)
    files = {p.name for p in (tmp_path / "whole").iterdir()}
    assert {p.name for p in (tmp_path / "streamed").iterdir()} == files
    for file in files - {"README.md", "config.json", "model.safetensors"}:
        assert filecmp.cmp(tmp_path / "whole" / file, tmp_path / "streamed" / file, shallow=False), file
    assert contents(tmp_path / "streamed" / "model.safetensors") == contents(tmp_path / "whole" / "model.safetensors")
    configs = [json.loads((tmp_path / kind / "config.json").read_text()) for kind in ("whole", "streamed")]
    for config in configs:
        config["quantization_config"].pop("files")  # safetensors writes its metadata in any order
    assert configs[0] == configs[1]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    return got


@pytest.mark.parametrize("name", ZOO)
def test_uncalibrated(name, tmp_path):
    check_same(tmp_path, name, cx.Recipe(group_size=32, embeddings="int8" if name in TIED else None))


CALIBRATED = {
    "gptq": {}, "gptq asymmetric": {"symmetric": False}, "gptq nf4": {"weights": "nf4"},
    "sparsegpt": {"sparsity": 0.5}, "sparsegpt 2:4": {"sparsity": "2:4"}, "wanda": {"sparsity": 0.6, "pruner": "wanda", "rounding": "rtn"},
    "rmi": {"sparsity": 0.6, "rates": "rmi"}, "owl": {"sparsity": 0.5, "rates": "owl"},
    "owl alone": {"sparsity": 0.5, "rates": "owl", "pruner": "magnitude", "rounding": "rtn"}, "skip": {"skip": ["layers.0"]},
}  # fmt: skip


@pytest.mark.parametrize("recipe", CALIBRATED.values(), ids=CALIBRATED)
def test_calibrated(recipe, tmp_path):
    report = check_same(tmp_path, "llama", cx.Recipe(group_size=32, **recipe), sequences())
    assert not report.outcome.uncalibrated


@pytest.mark.parametrize("name", ["opt", "gpt2", "qwen2", "mixtral", "t5"])
def test_other_architectures_calibrated(name, tmp_path):
    check_same(tmp_path, name, cx.Recipe(group_size=32, sparsity=0.5), sequences(4))
