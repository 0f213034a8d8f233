"""What we are timed beside computes what we do: every peer that is installed, against the dense weight."""

import importlib.machinery
import sys

import pytest
import torch

from calora_ext import peers

SHAPE = (256, 96)  # in, out: what every peer takes
ERROR = {"torch fp32": 1e-5, "torch bf16": 1e-2, "torch dynamic int8": 0.03, "llama.cpp Q8_0": 0.02}  # of the norm; 4-bit weights: 0.15


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", peers.installed(*SHAPE))
def test_computes_the_layer(name, rows):
    in_features, out_features = SHAPE
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features)
    peer = peers.installed(*SHAPE)[name](weight.clone())
    down, up, other = (torch.randn(*size).to(peer.dtype) / 8 for size in ((4, in_features), (out_features, 4), (rows, in_features)))
    first, second = peer.copy(), peer.copy()
    with torch.inference_mode():
        for x in (torch.randn(rows, in_features).to(peer.dtype), other):
            want = x.double() @ weight.double().t()
            for forward in (first, second):
                assert (forward(x).double() - want).norm() <= ERROR.get(name, 0.15) * want.norm()
            want = want + x.double() @ down.double().t() @ up.double().t()
            adapted = peer.with_lora(first, down, up)
            y = adapted(x)
            assert y.shape == (rows, out_features) and (y.double() - want).norm() <= ERROR.get(name, 0.15) * want.norm()
    assert weight.numel() // 2 <= peer.nbytes <= 4 * weight.numel()


def test_peers_that_cannot_take_a_shape_are_left_out():
    assert set(peers.installed(100, 30)) == {"torch fp32", "torch bf16", "torch dynamic int8"}


def test_a_library_that_cannot_be_used_is_left_out_with_a_warning(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libggml.so").write_text("no library")
    spec = importlib.machinery.ModuleSpec("llama_cpp", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(peers.ggml, "find_spec", lambda name: spec)
    forget = lambda: [made.cache_clear() for made in (peers.ggml._library, peers.ggml._cpu)]  # noqa: E731
    forget()
    with pytest.warns(UserWarning, match="llama.cpp is left out"):
        assert not any(name.startswith("llama.cpp") for name in peers.installed(*SHAPE))
    forget()
    assert "llama_cpp" not in sys.modules
