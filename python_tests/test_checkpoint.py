"""Checkpoint directories: mapping, alignment, hashes, and what damaged or hostile files get."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from zoo import dense, logits

import calora_ext as cx
from calora_ext.compression.replace import empty
from calora_ext.io import checkpoint
from calora_ext.policy import plan

SMAPS = """
import sys, torch, transformers, calora_ext as cx
from calora_ext.compression.replace import compressed_modules
small, large = sys.argv[1:]
cx.load(small)  # whatever is imported and cached on the first load

def regions():
    found, now = [], None
    for line in open("/proc/self/smaps"):
        first = line.split()[0]
        if not first.endswith(":"):
            begin, end = (int(x, 16) for x in first.split("-"))
            now = {"begin": begin, "end": end, "file": line.split(None, 5)[5].strip() if len(line.split()) > 5 else "", "anonymous": 0}
            found.append(now)
        elif first == "Anonymous:":
            now["anonymous"] = 1024 * int(line.split()[1])
    return found

before = sum(r["anonymous"] for r in regions())
model = transformers.AutoModelForCausalLM.from_pretrained(large)
after = regions()
bad = 0
for module in compressed_modules(model).values():
    for t in module.packed_tensors().values():
        home = [r for r in after if r["begin"] <= t.data_ptr() < r["end"]]
        bad += not home or not home[0]["file"].endswith(".safetensors") or home[0]["anonymous"] > 0 or t.data_ptr() % 64 != 0
dense = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers() if b.dtype != torch.uint8)
print(sum(r["anonymous"] for r in after) - before, dense, bad, len(compressed_modules(model)))
"""


def write_large_model(directory: Path) -> int:
    """A Llama of zeros, packed, over 200 MB; returns the bytes of its file."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=2048, intermediate_size=8192, num_hidden_layers=6, num_attention_heads=16, dtype="bfloat16",
        architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    coverage = plan(model, cx.Recipe())
    for name, fmt in coverage.formats.items():
        model.set_submodule(name, empty(model.get_submodule(name), fmt))
    state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in model.state_dict().items()}
    directory.mkdir()
    save_file(state, directory / "model.safetensors", metadata=checkpoint.alignment_metadata(state, {"format": "pt"}))
    config.quantization_config = cx.CaloraConfig(cx.Recipe(rounding="rtn"), modules={"lm_head": cx.WeightFormat("int8")})
    config.save_pretrained(directory)
    return (directory / "model.safetensors").stat().st_size


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc/self/smaps")
def test_loading_maps_the_packed_weights(tmp_path, saved):
    size = write_large_model(tmp_path / "large")
    assert size > 200e6
    done = subprocess.run([sys.executable, "-c", SMAPS, saved, tmp_path / "large"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    growth, dense_bytes, misplaced, modules = map(int, done.stdout.split()[-4:])
    assert modules == 43 and misplaced == 0
    assert growth <= 0.05 * size + dense_bytes


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A compressed tiny Llama on disk; tests copy it before they damage it."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    model = dense("llama")
    cx.compress(model)
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def damaged(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def forget_record(directory: Path) -> None:
    """Without recorded sizes and hashes the other checks must catch the damage."""
    edit_json(directory / "config.json", lambda c: c["quantization_config"].update(files={}))


def edit_header(path: Path, change) -> None:
    """Apply `change` to the parsed header and keep everything else."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_header_agrees_with_safetensors(saved):
    path = saved / "model.safetensors"
    header = checkpoint.read_header(path)
    tensors = load_file(path)
    assert header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert header.tensors[name].shape == tuple(tensor.shape)
        assert torch.equal(header.read(name), tensor.reshape(-1).view(torch.uint8))


def test_one_file_needs_no_rewriting(tmp_path, monkeypatch):
    """The predicted header length is the one safetensors writes, so `align` finds nothing to do."""
    for name in ("llama", "qwen2", "gpt2", "t5", "bert"):
        model = dense(name)
        cx.compress(model)
        monkeypatch.setattr(checkpoint, "align", lambda path: None)
        model.save_pretrained(tmp_path / name)
        assert not checkpoint.read_header(tmp_path / name / "model.safetensors").misaligned


def test_verify_finds_a_flipped_code(damaged):
    assert checkpoint.verify(damaged) == {"model.safetensors": "ok"}
    path = damaged / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[checkpoint.read_header(path).tensors["model.layers.0.mlp.up_proj.packed"].begin + 5] ^= 1
    path.write_bytes(data)
    cx.load(damaged)  # valid data: only the hash knows
    assert checkpoint.verify(damaged) == {"model.safetensors": "content differs"}
    path.write_bytes(data[:-64])
    assert checkpoint.verify(damaged) == {"model.safetensors": "size differs"}
    path.unlink()
    assert checkpoint.verify(damaged) == {"model.safetensors": "missing"}
    forget_record(damaged)
    with pytest.raises(cx.CaloraError, match="records no hashes"):
        checkpoint.verify(damaged)


def test_what_a_damaged_directory_says(damaged, tmp_path):
    def says(match):
        with pytest.raises(cx.CaloraError, match=match) as caught:
            cx.load(damaged)
        assert "\n" not in str(caught.value)

    path, config = damaged / "model.safetensors", damaged / "config.json"
    good, good_config = path.read_bytes(), config.read_bytes()

    path.write_bytes(good[:-100])
    says("cut short")
    path.write_bytes(good[:4])
    says("cut short or not a safetensors file")
    path.write_bytes((1 << 60).to_bytes(8, "little") + good[8:])
    says("cut short or not a safetensors file")
    path.write_bytes(b"")
    says("cut short")
    path.unlink()
    says("holds no weights")
    (damaged / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    says("weight_map")
    (damaged / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    says("is missing")
    (damaged / "model.safetensors.index.json").unlink()

    name = "model.layers.0.mlp.up_proj.packed"
    path.write_bytes(good)
    forget_record(damaged)
    for change, message in (
        (lambda h: h[name].update(dtype="I8"), "I8"),
        (lambda h: h[name].update(dtype="F128"), "damaged at tensor"),
        (lambda h: h[name].update(shape=[1, 2]), "damaged at tensor"),
        (lambda h: h[name].update(shape=h[name]["shape"][::-1]), "another config or is damaged"),
        (lambda h: h[name].update(data_offsets=[0, 1 << 62]), "damaged at tensor"),
        (lambda h: h[name].update(data_offsets=[-64, 0]), "damaged at tensor"),
        (lambda h: h[name].update(data_offsets=[n + 64 for n in h[name]["data_offsets"]]), "starts at byte|ends? at byte"),
        (lambda h: h.update({"another": h[name]}), "starts at byte"),
        (lambda h: h.pop(name), "starts at byte|end at byte"),
        (lambda h: h.update({"__metadata__": {"format": 3}}), "metadata is not text"),
        (lambda h: h.update({"x.packed": h.pop(name)}), r"lacks model.layers.0.mlp.up_proj.weight"),
    ):
        edit_header(path, change)
        says(message)
        path.write_bytes(good)

    data = bytearray(good)
    stored = checkpoint.read_header(path).tensors[name]
    data[stored.end - 2 : stored.end] = b"\xff\x7f"
    path.write_bytes(data)
    says("scale that is not finite")
    data = bytearray(good)
    norm = checkpoint.read_header(path).tensors["model.norm.weight"]
    data = bytearray(good)
    data[norm.begin : norm.begin + 4] = b"\x00\x00\xc0\x7f"
    path.write_bytes(data)
    says("NaN")
    path.write_bytes(good)

    for text, message in (
        (b"{", "not valid JSON"), (b"[]", "not a JSON object"), (b"\xff\xfe", "not valid JSON"), (b"[" * 100_000, "not valid JSON"),
    ):  # fmt: skip
        config.write_bytes(text)
        says(message)
    for change, message in (
        (lambda c: c.update(architectures=["Nothing"]), "architecture 'Nothing'"),
        (lambda c: c.update(architectures=None), "architecture None"),
        (lambda c: c.update(hidden_size=128), "config or is damaged|cannot be loaded"),
        (lambda c: c.update(hidden_size="many"), "cannot be loaded"),
        (lambda c: c.update(num_hidden_layers=10**9), "asks for num_hidden_layers"),
        (lambda c: c.update(num_hidden_layers=3), "lacks model.layers.2"),
        (lambda c: c["quantization_config"].update(layout_version=7), "upgrade"),
        (lambda c: c["quantization_config"].update(group_size=32), "another config or is damaged"),
        (lambda c: c["quantization_config"].update(weights="int3"), "unknown weights"),
        (lambda c: c["quantization_config"].update(modules={}), "another config or is damaged"),
        (lambda c: c["quantization_config"].update(files={"/etc/passwd": {}}), "recorded file sizes"),
        (lambda c: c["quantization_config"].update(surprise=1), "surprise"),
    ):
        config.write_bytes(good_config)
        edit_json(config, change)
        says(message)
    config.unlink()
    says("cannot be read")
    shutil.rmtree(damaged)
    says("cannot be read|not a model directory")


def test_recorded_sizes_are_checked_by_plain_transformers_too(damaged):
    edit_json(damaged / "config.json", lambda c: c["quantization_config"]["files"]["model.safetensors"].update(size=1))
    with pytest.raises(cx.CaloraError, match="1 were saved"):
        AutoModelForCausalLM.from_pretrained(damaged)
    edit_json(damaged / "config.json", lambda c: c["quantization_config"].update(files={"model-00001-of-00002.safetensors": {"size": 1, "blake2b": ""}}))
    with pytest.raises(cx.CaloraError, match="does not belong"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_a_save_that_fails_leaves_the_old_model(saved, damaged, monkeypatch):
    model = cx.load(damaged)
    before = {p.name: p.read_bytes() for p in damaged.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "finish_save", full)
    with pytest.raises(cx.CaloraError, match="No space left"):
        model.save_pretrained(damaged)
    with pytest.raises(cx.CaloraError, match="No space left"):
        model.save_pretrained(damaged / "new")
    assert {p.name: p.read_bytes() for p in damaged.iterdir()} == before


def test_where_a_model_cannot_be_saved(saved, tmp_path):
    model = cx.load(saved)
    (tmp_path / "file").write_text("")
    with pytest.raises(cx.CaloraError, match=r"cannot be saved to .*Not a directory"):
        model.save_pretrained(tmp_path / "file" / "model")
    # Its files would be neither aligned nor recorded in the config.json that both variants share.
    with pytest.raises(cx.CaloraError, match="no variants"):
        model.save_pretrained(tmp_path / "model", variant="v2")
    assert not (tmp_path / "model").exists()


# --- fuzz --------------------------------------------------------------------------------------------------------------


def flip_bits(rng, directory, region):
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    low, high = {"length": (0, 8), "header": (8, header), "data": (header, len(data))}[region]
    for _ in range(rng.choice([1, 1, 2, 16])):
        data[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(rng, directory):
    path = directory / rng.choice(["model.safetensors", "config.json"])
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def grow(rng, directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice([1, 64, 4096])))


def mutate_header(rng, directory):
    def change(header):
        names = [name for name in header if name != "__metadata__"]
        a, b = rng.sample(names, 2)
        rng.choice([
            lambda: header[a].update(shape=header[b]["shape"]),
            lambda: header[a].update(shape=[-1]),
            lambda: header[a].update(shape=header[a]["shape"][::-1]),
            lambda: header[a].update(shape=[1 << 40, 1 << 40]),
            lambda: header[a].update(shape="x"),
            lambda: header[a].update(dtype=rng.choice(["U8", "F32", "BF16", "I64", "F4", "?", None])),
            lambda: header[a].update(data_offsets=header[b]["data_offsets"]),
            lambda: header[a].update(data_offsets=[0, 1 << 63]),
            lambda: header[a].update(data_offsets=[1.5, None]),
            lambda: header.update({a: header[b], b: header[a]}),
            lambda: header.pop(a),
            lambda: header.update({a: 3}),
            lambda: header.update({f"{a}.more": header.pop(a)}),
            lambda: header.update({"__metadata__": rng.choice([None, [], {"a": 1}])}),
        ])()  # fmt: skip

    edit_header(directory / "model.safetensors", change)


def damage_scales(rng, directory):
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    packed = {name: t for name, t in checkpoint.read_header(path).tensors.items() if t.dtype == "U8"}
    name = rng.choice([name for name in packed if name.endswith(".scales")] or list(packed))
    t = packed[name]
    if name.endswith(".scales"):  # fp32, that of the first tile; before it, a byte for every 64 codes of 4 bits
        codes = packed[name.removesuffix("scales") + "packed"]
        at = t.begin + (codes.end - codes.begin) // 32
        data[at : at + 4] = rng.choice([b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\x01\x00\xc0\x7f"])
    else:
        at = t.end - 2 * rng.randrange(1, 33)  # one of the 32 scales that end the last block
        data[at : at + 2] = rng.choice([b"\x00\x7c", b"\x00\xfc", b"\x01\x7e", b"\xff\xff"])
    path.write_bytes(data)


def mutate_config(rng, directory):
    def change(config):
        target = rng.choice([config, config, config["quantization_config"]])
        key = rng.choice([k for k in target if k not in ("transformers_version",)])
        values = [None, -1, 0, 1, 3, 0.5, 1 << 20, "x", [], {}, True, "int8", [None], {"a": 1}, float("1e308")]
        rng.choice([lambda: target.update({key: rng.choice(values)}), lambda: target.pop(key), lambda: target.update({"new": 1})])()

    edit_json(directory / "config.json", change)


MUTATIONS = [
    lambda rng, d: flip_bits(rng, d, "length"), lambda rng, d: flip_bits(rng, d, "header"), lambda rng, d: flip_bits(rng, d, "data"),
    truncate, grow, mutate_header, mutate_header, damage_scales, mutate_config, mutate_config, mutate_config,
]  # fmt: skip


MOST_DAMAGED = {("int4", None): 330, ("int4", "2:4"): 110, ("int4", 0.6): 110, ("nf4", None): 110}
RECIPES = [cx.Recipe(weights=weights, sparsity=sparsity) for weights in ("int4", "nf4", "int8", "bf16") for sparsity in (None, "2:4", 0.6)]


@pytest.mark.parametrize(("recipe", "mutations"), [(r, MOST_DAMAGED.get((r.weights, r.sparsity), 55)) for r in RECIPES],
                         ids=[f"{r.weights}-{r.sparsity}" for r in RECIPES])  # fmt: skip
def test_mutated_directories_end_in_one_sentence_or_in_valid_data(recipe, mutations, tmp_path):
    """CaloraError in one sentence, or a model whose weights are all there and finite, and that runs."""
    saved = tmp_path / "saved"
    model = dense("llama")
    cx.compress(model, recipe)
    model.save_pretrained(saved)
    refused = loaded = 0
    for seed in range(mutations):
        rng = random.Random(seed)
        directory = tmp_path / str(seed)
        shutil.copytree(saved, directory)
        if seed % 2:
            forget_record(directory)
        MUTATIONS[seed % len(MUTATIONS)](rng, directory)
        try:
            model = cx.load(directory)
        except cx.CaloraError as error:
            refused += 1
            assert str(error) and "\n" not in str(error), f"seed {seed}: {error}"
        else:
            loaded += 1
            for module in model.modules():
                if isinstance(module, cx.CompressedLinear):
                    assert torch.isfinite(module.decode()).all(), f"seed {seed}"
            assert not any(torch.isnan(p).any() for p in model.parameters()), f"seed {seed}"
            logits(model, "llama")
        shutil.rmtree(directory)
    assert refused > 0.6 * mutations and loaded > 0.06 * mutations, (refused, loaded)


def test_an_undamaged_copy_still_loads(damaged):
    assert torch.equal(logits(cx.load(damaged), "llama"), logits(cx.load(damaged), "llama"))
