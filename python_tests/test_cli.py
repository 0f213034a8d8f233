"""The calora command as a user meets it: what it prints, writes, refuses, and with which exit code."""

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from adapt_helpers import make_llama, make_lora, make_tokenizer, text_of
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

import calora_ext as cx
from calora_ext import plots
from calora_ext.adapters import add_adapter
from calora_ext.cli import main
from calora_ext.cli.common import write_text
from calora_ext.io.outputs import output_directory
from calora_ext.lowrank import Factors


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dense model with tokenizer and LoRA, texts, and the model compressed by the command itself."""
    root = tmp_path_factory.mktemp("cli")
    model = make_llama()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    for name in ("dense", "teacher"):
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    make_lora(root / "lora", make_llama())
    (root / "train.txt").write_text(text_of(2000))
    (root / "test.txt").write_text(text_of(500, seed=1))
    main_quietly("compress", root / "dense", "-o", root / "small", "--group-size", 32)
    return root


def main_quietly(*arguments) -> int:
    try:
        main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture
def calora(capsys, tmp_path):
    """calora(*arguments) -> exit code, stdout, stderr, and the JSON result where it succeeded."""

    def run(*arguments, with_json=True):
        file = tmp_path / "result.json"
        file.unlink(missing_ok=True)
        extra = ("--json", file) if with_json else ()
        code = main_quietly(*arguments, *extra)
        captured = capsys.readouterr()
        result = json.loads(file.read_text()) if file.exists() else None
        return SimpleNamespace(code=code, out=captured.out, err=captured.err, json=result)

    return run


def refused(done, *words):
    """One sentence on stderr, exit code 2, nothing printed or written as a result."""
    last = done.err.strip().splitlines()[-1]
    assert done.code == 2 and last.startswith("calora: ") and "Traceback" not in done.err and done.json is None, done.err
    for word in words:
        assert str(word) in last, last


def test_info(calora):
    done = calora("info")
    assert done.code == 0 and done.json["rung chosen"] in done.json["rungs"] and done.json["torch"] == torch.__version__
    assert done.json["processor"] in done.out


def test_info_of_directories(calora, world):
    small, dense, lora = (calora("info", world / name).json for name in ("small", "dense", "lora"))
    assert small["recipe weights"] == "int4" and small["packed layers"] == 15 and small["weight bytes"] < dense["weight bytes"]
    assert dense["kind"] == "dense model" and lora["kind"] == "adapter" and lora["rank"] == 4
    refused(calora("info", world), "neither config.json nor adapter_config.json")


def test_estimate_is_what_compress_writes(calora, world):
    estimated = calora("estimate", world / "dense", "--group-size", 32)
    report = calora("info", world / "small")
    assert estimated.json["bytes"] == report.json["weight bytes"]
    assert estimated.json["recipe"]["group_size"] == 32 and "lm_head" in estimated.out


def test_compressed_directory_is_complete(world):
    small = world / "small"
    model = cx.load(small)
    dense = make_llama()
    ids = torch.randint(4, 20, (1, 16))
    assert AutoTokenizer.from_pretrained(small).bos_token == "<s>" and model.generation_config.eos_token_id == 2
    assert 0 < (model(ids).logits - dense(ids).logits).norm() / dense(ids).logits.norm() < 0.5
    card = (small / "README.md").read_text()
    assert "library_name: calora_ext" in card and '"weights": "int4"' in card and 'cx.load("small")' in card and str(world) not in card
    assert not [p for p in world.iterdir() if "partial" in p.name]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weights", "int5"], ["int5", "int4"]),
        (["--sparsity", "4:4"], ["4:4", "2:4"]),
        (["--sparsity", "7"], ["7.0", "from 0 to 1"]),
        (["--sparsity", "2:4", "--pruner", "wanda"], ["pruner='wanda' needs calibration data"]),
        (["--sparsity", "2:4", "--pruner", "random"], ["random", "sparsegpt"]),
        (["--pruner", "wanda"], ["pruner"]),
        (["--sparsity", "0.5", "--rates", "owl"], ["rates='owl' needs calibration data"]),
        (["--sparsity", "2:4", "--rates", "arithmetic"], ["no meaning for sparsity='2:4'"]),
        (["--sparsity", "0.5", "--rates", "missing.json"], ["missing.json"]),
        (["--group-size", "48"], ["group_size", "48"]),
        (["--weights", "nf4", "--no-symmetric"], ["nf4 has no zero points"]),
        (["--skip", "("], ["regex"]),
        (["--rounding", "gptq"], ["calibration"]),
        (["--calibration", "nothing.txt"], ["nothing.txt"]),
    ],
)
def test_compress_refuses(calora, world, tmp_path, options, words):
    refused(calora("compress", world / "dense", "-o", tmp_path / "out", *options), *words)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_compress_refuses_directories(calora, world, tmp_path):
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "thesis.txt").write_text("two years")
    refused(calora("compress", world / "dense", "-o", keep), "not empty", "--overwrite")
    refused(calora("compress", world / "dense", "-o", keep, "--overwrite"), "not a model or adapter directory")
    refused(calora("compress", world / "dense", "-o", world / "dense", "--overwrite"), "holds an input")
    refused(calora("compress", world / "dense", "-o", world, "--overwrite"), "holds an input")
    refused(calora("compress", tmp_path / "no", "-o", tmp_path / "out"), tmp_path / "no")
    refused(calora("compress", world / "small", "-o", tmp_path / "out"), "compressed already")
    refused(calora("compress", world / "dense", "-o", keep / "thesis.txt"), "is a file")
    assert (keep / "thesis.txt").read_text() == "two years" and (world / "dense" / "config.json").exists()


def test_overwrite_replaces(calora, world, tmp_path):
    out = tmp_path / "out"
    assert calora("compress", world / "dense", "-o", out, "--weights", "int8").code == 0
    assert calora("compress", world / "dense", "-o", out, "--overwrite").code == 0
    assert calora("info", out).json["recipe weights"] == "int4" and sorted(p.name for p in tmp_path.iterdir()) == ["out", "result.json"]


def test_full_disk(calora, world, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as a full disk, but for this process alone
    try:
        done = calora("compress", world / "dense", "-o", tmp_path / "out", with_json=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(done, "File too large")
    assert not list(tmp_path.iterdir())


def test_eval(calora, world):
    done = calora("eval", world / "small", "--data", world / "test.txt", "--against", world / "dense")
    assert done.json["perplexity"] == pytest.approx(math.exp(done.json["loss"])) and f"{done.json['loss']:.4f}" in done.out
    assert 0 < done.json["kl"] < 1 and 0 < done.json["top1_agreement"] <= 1
    same = calora("eval", world / "dense", "--data", world / "test.txt", "--against", world / "dense").json
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["top1_agreement"] == 1
    with_lora = calora("eval", world / "small", "--data", world / "test.txt", "--adapter", world / "lora").json
    assert with_lora["loss"] != done.json["loss"]


def test_eval_of_prompts_with_completions(calora, world, tmp_path):
    rows = [{"prompt": "the cat", "completion": " sat on the mat ."}, {"prompt": "the dog", "completion": " ran ."}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rows.txt").write_text("".join(r["prompt"] + r["completion"] for r in rows[:1]))
    done = calora("eval", world / "small", "--data", tmp_path / "rows.jsonl", "--against", world / "dense")
    assert done.json["samples"] == 2 and done.json["perplexity"] == pytest.approx(math.exp(done.json["loss"]))
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    one = [calora("eval", world / "small", "--data", tmp_path / name, "--against", world / "dense").json for name in ("rows.jsonl", "rows.txt")]
    assert one[0]["kl"] == pytest.approx(one[1]["kl"])  # of the whole text, not of the prompt alone
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"text": "the cat", "text_pair": "the dog"}))
    refused(calora("eval", world / "small", "--data", tmp_path / "pairs.jsonl"), "pairs")


def test_eval_refuses(calora, world, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    refused(calora("eval", world / "small", "--data", tmp_path / "empty.txt"), "holds no text")
    refused(calora("eval", world / "small", "--data", tmp_path / "no.txt"), "no.txt")
    refused(calora("eval", world / "small", "--data", world / "test.txt", "--task", "juggling"), "juggling")
    refused(calora("eval", world / "lora", "--data", world / "test.txt"), "config.json")
    refused(calora("eval", world / "small", "--data", world / "test.txt", "--adapter", world / "small"), "adapter_config.json")


def test_generate(calora, world):
    arguments = ("generate", world / "small", "--prompt", "the cat", "--max-new-tokens", 8, "--temperature", 0)
    done = calora(*arguments)
    assert done.out.startswith("the cat") and 1 <= done.json["tokens"] <= 8
    assert done.json["text"].strip() in done.out and calora(*arguments).json["text"] == done.json["text"]
    adapted = calora(*arguments, "--adapter", world / "lora")
    assert adapted.code == 0
    refused_usage = calora(*arguments, "--seed", -1, with_json=False)
    assert refused_usage.code == 2 and "--seed" in refused_usage.err
    long = "the " * 70
    refused(calora("generate", world / "small", "--prompt", long), "context of 64")


def test_a_model_that_searches_with_beams_generates(calora, world, tmp_path):
    import shutil

    shutil.copytree(world / "small", tmp_path / "beams")
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, num_beams=3).save_pretrained(tmp_path / "beams")
    done = calora("generate", tmp_path / "beams", "--prompt", "the cat", "--max-new-tokens", 8)
    model, tokenizer = cx.load(tmp_path / "beams"), AutoTokenizer.from_pretrained(tmp_path / "beams")
    ids = tokenizer("the cat", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=8)[0, ids["input_ids"].shape[1] :]
    assert done.json["text"] == tokenizer.decode(expected, skip_special_tokens=True) and done.json["tokens"] == len(expected)
    assert done.out.startswith("the cat" + done.json["text"])


def test_a_prompt_that_is_not_text(calora, world, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the \xff"), encoding="utf-8"))
    refused(calora("generate", world / "small", "--prompt", "-"), "standard input is not UTF-8", "0xff")


def test_the_tokenizer_of_another_model(calora, world, tmp_path):
    import shutil

    shutil.copytree(world / "small", tmp_path / "mixed")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(tmp_path / "mixed")
    (tmp_path / "x.txt").write_text("the cat unheard of")
    for command in (("generate", "--prompt", "unheard"), ("eval", "--data", tmp_path / "x.txt")):
        refused(calora(command[0], tmp_path / "mixed", *command[1:]), "belongs to another model")


def test_chat_needs_a_template(calora, world):
    refused(calora("chat", world / "small"), "no chat template", "calora generate")


def test_chat(calora, world, tmp_path, monkeypatch):
    import io
    import shutil

    model = tmp_path / "chatty"
    shutil.copytree(world / "small", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(model)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\nthe dog\n"))
    done = calora("chat", model, "--max-new-tokens", 4, "--temperature", 0)
    assert [m["role"] for m in done.json["messages"]] == ["user", "assistant"] * 2 and done.json["tokens"] >= 2


def test_adapt(calora, world, tmp_path):
    out = tmp_path / "adapter"
    done = calora(
        "adapt", world / "small", "--teacher", world / "teacher", "--inherit", world / "lora", "--data", world / "train.txt",
        "--eval-data", world / "test.txt", "-o", out, "--steps", 6, "--batch-size", 4, "--max-length", 32, "--recovery-rank", 8, "--seed", 1,
    )  # fmt: skip
    assert done.json["arm"] == "i-rc-d" and done.json["steps"] == 6 and done.json["parameters"]["recovery"] > 0
    assert done.json["eval_after"]["loss"] < done.json["eval_before"]["loss"]
    assert AutoTokenizer.from_pretrained(out) is not None and "library_name: calora_ext" in (out / "README.md").read_text()
    assert done.json["eval_after"]["loss"] == pytest.approx(loss_with(calora, world, out), abs=0.02)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "result.json"]  # no checkpoints left behind


def test_adapt_keeps_the_best_step(calora, world, tmp_path):
    command = ("adapt", world / "small", "--inherit", world / "lora", "--data", world / "train.txt", "--eval-data", world / "test.txt", "--no-recovery",
               "-o", tmp_path / "a", "--steps", 4, "--lr", 5, "--batch-size", 2, "--max-length", 32, "--keep-best")  # fmt: skip
    done = calora(*command)  # at this rate nothing gets better
    assert done.json["kept_step"] == 0 and done.json["eval_after"] == done.json["eval_before"] and "step 0" in done.out


def loss_with(calora, world, adapter):
    return calora("eval", world / "small", "--data", world / "test.txt", "--adapter", adapter, "--max-length", 32).json["loss"]


def test_recovery_saved_in_int8(calora, world, tmp_path):
    command = ("adapt", world / "small", "--data", world / "train.txt", "--steps", 2, "--batch-size", 2, "--max-length", 16, "--recovery-rank", 8)
    files = {}
    for dtype in ("float32", "int8"):
        done = calora(*command, "-o", tmp_path / dtype, "--recovery-dtype", dtype)
        assert done.code == 0, done.err
        files[dtype] = load_file(tmp_path / dtype / "recovery_model.safetensors")
    assert {t.dtype for name, t in files["int8"].items() if not name.endswith("scales")} == {torch.int8}
    assert {t.dtype for t in files["float32"].values()} == {torch.float32}
    assert loss_with(calora, world, tmp_path / "int8") == pytest.approx(loss_with(calora, world, tmp_path / "float32"), abs=0.01)


def test_recovery_without_training(calora, world, tmp_path):
    cache = tmp_path / "cache"  # its targets are not used, but the weights of the teacher are
    done = calora(
        "adapt", world / "small", "--teacher", world / "teacher", "--inherit", world / "lora", "--data", world / "train.txt", "--max-length", 32,
        "--eval-data", world / "test.txt", "-o", tmp_path / "adapter", "--steps", 0, "--recovery-init", "residual", "--cache-teacher", cache,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["steps"] == 0 and done.json["eval_after"] != done.json["eval_before"]


@pytest.mark.parametrize(
    ("options", "arm"),
    [
        (["--no-recovery"], "rd"),
        (["--lora-rank", "0"], "rc"),
        (["--inherit", "lora", "--no-recovery"], "i"),
        (["--inherit", "lora", "--init", "random", "--no-recovery"], "rd"),
        (["--inherit", "lora", "--teacher", "teacher", "--distill", "logits", "--no-recovery"], "i-d"),
        (["--inherit", "lora", "--teacher", "teacher", "--distill", "hidden,logits"], "i-rc-d"),
    ],
)
def test_arms_of_adapt(calora, world, tmp_path, options, arm):
    options = [world / o if o in ("lora", "teacher") and options[i - 1] != "--init" else o for i, o in enumerate(options)]
    done = calora("adapt", world / "small", "--data", world / "train.txt", "-o", tmp_path / "a", "--steps", 1, "--batch-size", 2,
                  "--max-length", 16, *options)  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["arm"] == arm


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--distill", "logits"], ["teacher"]),
        (["--distill", "dreams"], ["dreams"]),
        (["--init", "inherit"], ["--inherit"]),
        (["--init", "lucky"], ["lucky"]),
        (["--lora-rank", "0", "--no-recovery"], ["nothing to train"]),
        (["--preset", "gpt-9"], ["gpt-9", "t5-3b"]),
        (["--recovery-init", "svd"], ["svd", "residual"]),
        (["--recovery-init", "residual"], ["teacher"]),
        (["--recovery-dtype", "int4"], ["int4", "int8"]),
        (["--recovery-dtype", "int8", "--no-recovery"], ["--no-recovery"]),
        (["--keep-best"], ["--keep-best", "--eval-data"]),
    ],
)
def test_adapt_refuses(calora, world, tmp_path, options, words):
    refused(calora("adapt", world / "small", "--data", world / "train.txt", "-o", tmp_path / "a", "--steps", 1, *options), *words)
    assert not list(tmp_path.iterdir())


def test_options_of_adapt_win_over_the_preset_and_leave_the_rest_of_it():
    from calora_ext.adaptation import TAUGHT_LOGITS
    from calora_ext.cli.adapt import _arguments

    published = cx.adaptation.preset("llama-13b")
    chosen = _arguments(True, None, None, 8, 32, None, True, None, "llama-13b")
    assert chosen["lora"] == dataclasses.replace(published["lora"], rank=8) and chosen["recovery"] == dataclasses.replace(published["recovery"], rank=32)
    assert chosen["distill"] == published["distill"] and chosen["task"] == "causal-lm"
    assert _arguments(True, None, None, None, None, None, True, None, "t5-3b")["task"] == "seq2seq-lm"
    asked = _arguments(True, None, None, None, None, None, True, "hidden,logits", None)["distill"]
    assert asked.logits == TAUGHT_LOGITS and asked.hidden == {-1: 0.05}


def test_the_teacher_is_gone_once_its_targets_are_cached(calora, world, tmp_path, monkeypatch):
    teachers, adapt = [], cx.adapt
    monkeypatch.setattr(cx, "adapt", lambda *a, **k: teachers.append(k["teacher"]) or adapt(*a, **k))
    command = ("adapt", world / "small", "--inherit", world / "lora", "--data", world / "train.txt", "--steps", 1, "--batch-size", 2,
               "--max-length", 16, "--cache-teacher", tmp_path / "cache")  # fmt: skip
    first = calora(*command, "--teacher", world / "teacher", "-o", tmp_path / "a")
    again = calora(*command, "-o", tmp_path / "b")
    assert first.json["arm"] == "i-rc-d" and first.json["history"] == again.json["history"] and teachers == [None, None]


def test_inputs_in_the_output_directory_are_kept(calora, world, tmp_path):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(world / "lora", out)
    shutil.copy(world / "train.txt", out)
    refused(calora("adapt", world / "small", "--data", out / "train.txt", "-o", out, "--overwrite"), "holds an input")
    refused(calora("compress", world / "dense", "--calibration", out / "train.txt", "-o", out, "--overwrite"), "holds an input")
    assert (out / "train.txt").exists()


def test_resume(calora, world, tmp_path):
    """A run that stops half-way and goes on gives the adapter of a run in one piece."""
    command = ["adapt", world / "small", "--data", world / "train.txt", "--no-recovery", "--batch-size", 2, "--max-length", 16, "--steps", 4]
    assert calora(*command, "-o", tmp_path / "whole").code == 0

    class Stop(Exception):
        pass

    from calora_ext.adaptation import loop

    step, seen = loop._step, []

    def stopping(*arguments):
        if len(seen) == 2:
            raise Stop
        seen.append(step(*arguments))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop, "_step", stopping)
        main([str(a) for a in (*command, "-o", tmp_path / "halved")])
    assert not (tmp_path / "halved").exists() and (tmp_path / "halved.checkpoints").exists()
    assert calora(*command, "-o", tmp_path / "halved", "--resume").json["resumed_at"] == 2
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "halved")]
    assert files[0] == files[1] and not (tmp_path / "halved.checkpoints").exists()


def test_sparse_from_estimate_to_inspect(calora, world, tmp_path):
    options = ("--sparsity", "2:4", "--pruner", "magnitude", "--group-size", 32)
    data = ("--calibration", world / "train.txt")
    refused(calora("compress", world / "dense", "-o", tmp_path / "sparse", *options, *data, "--rounding", "rtn"), "calibration")
    estimated = calora("estimate", world / "dense", *options).json
    done = calora("compress", world / "dense", "-o", tmp_path / "sparse", *options)
    assert done.json["recipe"]["sparsity"] == "2:4" and "int4 g32 2:4" in done.out
    assert done.json["coverage"]["bytes"] == estimated["bytes"]
    done = calora("inspect", tmp_path / "sparse")
    rows = {row["name"]: row for row in done.json}
    q = rows["model.layers.0.self_attn.q_proj.packed"]
    assert q["format"] == "int4 g32 2:4" and q["sparsity"] == 0.5 and q["bits_per_weight"] == 3.5 and "3.50" in done.out
    assert rows["lm_head.packed"]["format"] == "int8" and rows["lm_head.packed"]["sparsity"] == 0.0
    assert "format" not in rows["model.norm.weight"]
    assert calora("generate", tmp_path / "sparse", "--prompt", "the cat", "--max-new-tokens", 2).code == 0
    assert calora("eval", tmp_path / "sparse", "--data", world / "test.txt").json["perplexity"] > 1


def test_nf4_from_estimate_to_inspect(calora, world, tmp_path):
    options = ("--weights", "nf4", "--lm-head", "nf4")
    estimated = calora("estimate", world / "dense", *options).json
    done = calora("compress", world / "dense", "-o", tmp_path / "nf4", *options)
    assert done.json["recipe"]["weights"] == "nf4" and "nf4 g64" in done.out and done.json["coverage"]["bytes"] == estimated["bytes"]
    rows = {row["name"]: row for row in calora("inspect", tmp_path / "nf4").json}
    q = "model.layers.0.self_attn.q_proj"
    stored = rows[f"{q}.packed"]["bytes"] + rows[f"{q}.scales"]["bytes"]
    assert rows[f"{q}.packed"]["format"] == "nf4 g64" and rows["lm_head.packed"]["format"] == "nf4 g64"
    assert rows[f"{q}.packed"]["bits_per_weight"] == 8 * stored / cx.load(tmp_path / "nf4").get_submodule(q).weight.numel()
    assert calora("generate", tmp_path / "nf4", "--prompt", "the cat", "--max-new-tokens", 2).code == 0
    assert calora("eval", tmp_path / "nf4", "--data", world / "test.txt").json["perplexity"] > 1


def test_unstructured_from_compress_to_inspect(calora, world, tmp_path):
    done = calora("compress", world / "dense", "-o", tmp_path / "sparse", "--sparsity", 0.7, "--weights", "int8")
    assert done.json["recipe"]["sparsity"] == 0.7 and done.json["recipe"]["pruner"] == "magnitude"
    assert sum(row["bytes"] for row in done.json["coverage"]["modules"]) == done.json["coverage"]["bytes"] == done.json["bytes_after"]
    rows = {row["name"]: row for row in calora("inspect", tmp_path / "sparse").json}
    q = rows["model.layers.0.self_attn.q_proj.packed"]
    assert q["format"] == "int8 unstructured" and q["sparsity"] == pytest.approx(0.7, abs=1e-3)
    stored = sum(rows[f"model.layers.0.self_attn.q_proj.{name}"]["bytes"] for name in ("packed", "offsets", "kept"))
    assert q["bits_per_weight"] == 8 * stored / cx.load(tmp_path / "sparse").model.layers[0].self_attn.q_proj.weight.numel()
    assert calora("eval", tmp_path / "sparse", "--data", world / "test.txt").json["perplexity"] > 1


def test_rates_by_rule_and_by_table(calora, world, tmp_path):
    (tmp_path / "rates.json").write_text(json.dumps({"model.layers.0": 0.4}))
    for rates in ("rmi", "owl", "arithmetic", tmp_path / "rates.json"):
        data = ("--calibration", world / "train.txt") if rates in ("rmi", "owl") else ()
        done = calora("compress", world / "dense", "-o", tmp_path / "out", "--overwrite", "--sparsity", 0.6, "--rates", rates, *data)
        assert done.json["sparsity"] == pytest.approx(0.6, abs=1e-5)
        first = done.json["layer_sparsity"]["model.layers.0.self_attn.q_proj"]
        assert first == pytest.approx({"arithmetic": 0.46, "rmi": 0.62, "owl": first}.get(rates, 0.4), abs=1e-3)
        assert ", rates " in done.out and calora("inspect", tmp_path / "out").code == 0


@pytest.mark.parametrize("options", [(), ("--pruner", "wanda"), ("--pruner", "wanda", "--rounding", "rtn"), ("--weights", "bf16"), ("--sparsity", "0.5")], ids=str)
def test_pruned_by_calibration(calora, world, tmp_path, options):
    done = calora("compress", world / "dense", "-o", tmp_path / "out", "--sparsity", "2:4", "--calibration", world / "train.txt", *options)
    recipe = done.json["recipe"]
    assert recipe["pruner"] == ("wanda" if "wanda" in options else "sparsegpt") and recipe["rounding"] == ("gptq" if len(options) < 3 and "bf16" not in options else "rtn")
    assert done.json["sparsity"] == 0.5 and set(done.json["layer_sparsity"].values()) == {0.5} and done.json["uncalibrated"] == []
    assert f"{recipe['pruner']}: 50.00 % of" in done.out
    assert calora("eval", tmp_path / "out", "--data", world / "test.txt").json["perplexity"] > 1


def test_inspect(calora, world, tmp_path):
    import shutil

    done = calora("inspect", world / "small")
    packed = [t for t in done.json if t["name"].endswith(".packed")]
    assert len(packed) == 15 and all(t["bytes"] % 64 == 0 for t in packed)
    assert calora("inspect", world / "small", "--verify").json == {"model.safetensors": "ok"}
    copy = tmp_path / "copy"
    shutil.copytree(world / "small", copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert calora("inspect", copy).code == 0  # a flipped code is valid data
    done = calora("inspect", copy, "--verify", with_json=False)
    refused(done, "model.safetensors", "content differs")
    (copy / "model.safetensors").write_bytes(data[:-1])
    refused(calora("inspect", copy), "cut short")
    refused(calora("inspect", world / "dense", "--verify"), "no hashes")
    data[-2:] = b"\xff\x7f"  # a scale
    (copy / "model.safetensors").write_bytes(data)
    refused(calora("inspect", copy), "not finite")


def test_inspect_and_info_of_adapters(calora, world, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(world / "lora", copy)
    assert len(calora("inspect", copy).json) == len(load_file(copy / "adapter_model.safetensors"))
    refused(calora("inspect", copy, "--verify"), "no hashes")
    refused(calora("inspect", tmp_path), "neither a model nor an adapter")
    (copy / "adapter_config.json").unlink()
    refused(calora("inspect", copy), "adapter_config.json")
    model = cx.load(world / "small")
    path = "model.layers.0.mlp.up_proj"
    add_adapter(model, "r", recovery={path: Factors(torch.zeros(2, 32), torch.zeros(64, 2), 1.0)})
    cx.save_adapter(model, "r", tmp_path / "recovery")
    assert calora("info", tmp_path / "recovery").json["kind"] == "adapter with recovery modules"
    assert len(calora("inspect", tmp_path / "recovery").json) == 2


def test_bench(calora, tmp_path):
    done = calora("bench", "--shapes", "96x64", "--rank", 4, "--seconds", 0.01, "--isa", "reference")
    ours = [row for row in done.json if row["isa"] == "reference"]
    assert {row["rank"] for row in ours} == {0, 4} and all(row["seconds"] > 0 for row in done.json)
    assert {row["recovery_rank"] for row in done.json} == {0}
    assert any(row["peer"] == "torch fp32" for row in done.json) and "96x64" in done.out
    assert "of the read bandwidth" in done.out
    refused(calora("bench", "--shapes", "96x64", "--plot", tmp_path / "roof.svg"), "ends in .png")
    refused(calora("bench", "--shapes", "96"), "OUTxIN")
    refused(calora("bench", "--shapes", "96x200000"), "131072")
    refused(calora("bench", "--shapes", "96x64", "--isa", "reference,z80"), "z80")
    refused(calora("bench", "--shapes", "96x64", "--threads", "1,two"), "number of threads")
    refused(calora("bench", "--shapes", "96x64", "--threads", "1,1", "--plot", tmp_path / "roof.png"), "one number of threads")
    refused(calora("bench", "--shapes", "96x64", "--threads", "9999"), "processors of this machine")


def test_bench_times_recovery_modules_and_numbers_of_threads(calora, tmp_path):
    before, counts = torch.get_num_threads(), {1, min(2, os.cpu_count())}
    done = calora("bench", "--shapes", "64x64", "--rank", 4, "--recovery-rank", 2, "--threads", ",".join(map(str, counts)), "--seconds", 0.01, "--isa", "reference")
    assert torch.get_num_threads() == before
    ours = [row for row in done.json if row["isa"]]
    assert {(row["threads"], row["rank"], row["recovery_rank"]) for row in ours} == {(n, *bank) for n in counts for bank in ((0, 0), (4, 0), (4, 2))}
    assert {(row["threads"], row["rank"], row["recovery_rank"]) for row in done.json if not row["isa"]} == {(n, r, 0) for n in counts for r in (0, 4)}
    assert "4 + 2" in done.out


@pytest.mark.skipif(not plots.available(), reason="needs matplotlib")
def test_bench_draws_a_roofline(calora, tmp_path, monkeypatch):
    drawn, draw = {}, plots.roofline
    monkeypatch.setattr(plots, "roofline", lambda path, title, points, *roof: drawn.update(points=points, roof=roof) or draw(path, title, points, *roof))
    done = calora("bench", "--shapes", "96x64,64x96", "--rank", 0, "--seconds", 0.01, "--plot", tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes()[:4] == b"\x89PNG" and [p.name for p in tmp_path.glob("*.png")] == ["roof.png"]
    assert {row["peer"] for row in done.json} == set(drawn["points"]) and all(value > 0 for value in drawn["roof"][:2])
    for row in done.json:
        work = 2 * row["in_features"] * row["out_features"]
        assert (work / row["nbytes"], work / row["seconds"]) in drawn["points"][row["peer"]]


def test_usage_errors(calora, tmp_path):
    done = calora("compress", with_json=False)
    assert done.code == 2 and "Missing argument" in done.err and not done.out
    done = calora("info", "--json", tmp_path / "no" / "x.json", with_json=False)
    assert done.code == 2 and "cannot be written" in done.err and not done.out


def test_output_directory_is_whole_or_absent(tmp_path):
    with pytest.raises(KeyboardInterrupt), output_directory(tmp_path / "out", overwrite=False) as directory:
        (directory / "half").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_sigterm_leaves_nothing_half_written(world, tmp_path):
    """As a process of its own, stopped while it trains: the checkpoints to go on from stay, the output's parts do not."""
    out = tmp_path / "out"
    command = ("adapt", world / "small", "--data", world / "train.txt", "-o", out, "--steps", 4000, "--batch-size", 2, "--max-length", 16)
    with subprocess.Popen([sys.executable, "-m", "calora_ext", *map(str, command)]) as process:
        while not (tmp_path / "out.checkpoints").exists():
            assert process.poll() is None
            time.sleep(0.05)
        assert any(p.name.startswith(".out.") for p in tmp_path.iterdir())
        process.terminate()
        assert process.wait() == 143
    assert [p.name for p in tmp_path.iterdir()] == ["out.checkpoints"]


def test_write_text_replaces_or_leaves(tmp_path):
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two" and len(list(tmp_path.iterdir())) == 1
