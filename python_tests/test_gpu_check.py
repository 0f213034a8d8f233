"""benchmarks/gpu_check.sh as far as a machine without a GPU can tell: its arguments, its dry run, its table."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import gpu_check
import gpu_speed
import gpu_stages
import pytest
import torch

from calora_ext.formats.cuda_order import in_cuda_order

ROOT = Path(__file__).parents[1]


def script(*arguments: str, out: str | None = None) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "OUT"} | {"PYTHON": sys.executable} | ({"OUT": out} if out else {})
    return subprocess.run([ROOT / "benchmarks" / "gpu_check.sh", *arguments], capture_output=True, text=True, env=environment)


def test_a_folder_is_asked_for():
    result = script()
    assert result.returncode == 2 and "Name a folder" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    result = script(out=str(tmp_path / "out"))
    assert result.returncode == 2 and "No GPU" in result.stderr and not (tmp_path / "out").exists()


def test_dry_run_checks_the_cases_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry-run"])
    assert gpu_check.main() == 0
    printed = capsys.readouterr().out
    assert "no GPU is used" in printed and "correctness" in printed and "us" not in printed.split()
    assert not list(tmp_path.iterdir())


def test_random_weights_have_the_shapes_of_the_gpu():
    """By which the operators tell CUDA order from the CPU's; made on the CPU here."""
    for fmt in gpu_speed.SPEED_FORMATS:
        tensors = dict(zip(fmt.tensors(256, 64), gpu_speed.random_weight(fmt, 256, 64, "cpu"), strict=True))
        for name, tensor in gpu_speed.in_words(tensors, 64).items():
            assert in_cuda_order(name, tensor) == (name != "offsets"), (fmt, name)


def test_timing_on_a_pretended_gpu(monkeypatch):
    """The lines that no dry run reaches: what they ask of torch.cuda, and how the numbers are put together."""
    now, log = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            self.timed = enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            assert self.timed

        def elapsed_time(self, other):
            return other.at - self.at

    class Graph:
        def replay(self):
            log.append("replay")
            now[0] += 64.0  # ms

    stream = SimpleNamespace(wait_stream=lambda other: log.append("wait"))
    fakes = {"Event": Event, "CUDAGraph": Graph, "Stream": lambda: stream, "current_stream": lambda: stream,
             "stream": lambda s: contextlib.nullcontext(), "graph": lambda g: contextlib.nullcontext()}  # fmt: skip
    for name, fake in fakes.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, fake)
    seconds = gpu_speed.timed([lambda: log.append("call")] * 3, rounds=5)
    assert log.count("call") == 4 * 3 + 2 * 33 and log.count("replay") == 8 and log.count("wait") == 2
    assert seconds == pytest.approx(0.064 / 33)

    def long() -> None:  # of 1 ms: its graph needs no company, and ten rounds will do
        log.append("long")
        now[0] += 1.0

    log.clear()
    assert gpu_speed.timed([long] * 3) == pytest.approx(0.064 / 3)
    assert log.count("long") == 4 * 3 + 2 * 3 and log.count("replay") == 13


def test_peers_that_are_there_are_timed_and_others_named(monkeypatch, capsys):
    """Stand-ins with the arguments of the real ones, which need a GPU: a misspelt call would leave a peer out in silence."""
    rows, dense = [], torch.randn(64, 256).bfloat16()

    def linear4bit(in_, out, *, bias, compute_dtype, quant_type, device):
        return torch.nn.Linear(in_, out, bias=bias, dtype=compute_dtype, device=device)

    def by_scales(x, weight, group_size, scales):
        assert scales.shape == (x.shape[1] // group_size, weight.shape[0], 2)
        return x @ dense.t()

    def sparse(weight):
        assert int((weight.view(-1, 4) != 0).sum(1).max()) == 2
        return weight

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", SimpleNamespace(Linear4bit=linear4bit))
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", lambda codes, inner_k_tiles: codes)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", by_scales)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", sparse)
    gpu_speed.speed_rows(256, 64, 64, rows, 4e12, "cpu")
    names = [row["what"] for row in rows]
    assert {gpu_speed.INT4, gpu_speed.BANK, gpu_speed.CUBLAS, gpu_speed.PEFT, gpu_speed.INT4PACK, gpu_speed.BITSANDBYTES, gpu_speed.SEMI_STRUCTURED} <= set(names)
    assert "left out" not in capsys.readouterr().out and len(names) == len(set(names))
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    gpu_speed.speed_rows(256, 64, 1, rows, 4e12, "cpu")
    assert "bitsandbytes nf4: left out (ModuleNotFoundError" in capsys.readouterr().out and rows[-1]["what"] == gpu_speed.INT4PACK


def test_an_adapter_for_each_row_is_judged(monkeypatch):
    """The CPU has no kernel for it: a slow layer in its place, right and wrong."""

    def layer(shift):
        def linear(x, packed, fmt, in_, out, bias, down, up, identity_rank, activations, rows):
            dense = fmt.decode(dict(zip(fmt.tensors(in_, out), packed, strict=True)), in_, out)
            rows = torch.where(rows >= 0, (rows + shift) % 3, rows)
            return torch.ops.calora.dense_linear(x.float(), dense, bias.float(), down.float(), up.float(), identity_rank, rows).to(x.dtype)

        return linear

    monkeypatch.setattr(gpu_check.ops, "linear", layer(0))
    assert not gpu_check.adapters_by_row("cpu")["failed"]
    monkeypatch.setattr(gpu_check.ops, "linear", layer(1))
    assert len(gpu_check.adapters_by_row("cpu")["failed"]) == 3


def test_the_checkers_are_asked(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\n[ "$2" = racecheck ] && echo "Device not supported" || echo "ERROR SUMMARY: $5 ${6##*/}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = gpu_check.checkers(20)
    assert said["memcheck"].startswith("exit 0: ERROR SUMMARY") and said["memcheck"].endswith("gpu_check.py")
    assert said["racecheck"] == "the tool refuses this device" and not said["failed"]
    tool.write_text('#!/bin/sh\n[ "$2" = synccheck ] && sleep 60 & wait; echo "ERROR SUMMARY: 1 error"; exit 99\n')
    said = gpu_check.checkers(2)
    assert [text.split(":")[0] for text in said["failed"]] == ["memcheck", "racecheck"] and said["synccheck"] == "not finished in time"
    assert "memcheck: exit 99" in gpu_check.summary({"checkers": said})


def test_a_broken_stage_does_not_cost_the_others(tmp_path, monkeypatch):
    """A whole worker, its stages replaced: what is written, what the tables say of it, and the exit status."""
    for name in ("correctness", "backward", "adapters_by_row", "adapter_switch", "module_moves", "graphs_and_streams", "checkers"):
        monkeypatch.setattr(gpu_check, name, lambda *args, **options: {"failed": []})
    monkeypatch.setattr(gpu_check, "with_models", lambda name, device: {"failed": []})
    monkeypatch.setattr(gpu_stages, "gpu_works", lambda: True)
    monkeypatch.setattr(gpu_check, "opcheck", lambda device: torch.zeros(2) + torch.zeros(3))
    monkeypatch.setattr(gpu_check, "ceilings", lambda: {"read_bytes_per_s": 4e12})
    monkeypatch.setattr(gpu_check, "speed_rows", lambda in_, out, m, rows, read: rows.append(
        {"in": in_, "out": out, "m": m, "what": gpu_check.INT4, "seconds": 1e-5, "bytes": 4, "of_read_ceiling": 4 / 1e-5 / read}))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a pretended GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--worker", "--out", str(tmp_path)])
    assert gpu_check.main()
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert len(written["speed"]) == 7 * len(gpu_check.SPEED_SHAPES) and written["opcheck"]["failed"][0].startswith("RuntimeError") and not written["models"]["failed"]
    printed = gpu_check.summary(written)
    assert "1 FAILED: RuntimeError" in printed and printed.splitlines()[-1].startswith("| 28672 x 8192")


WORKER = """
    import os, sys, time
    from pathlib import Path
    import gpu_stages
    gpu_stages.STAGE_SECONDS, gpu_stages.gpu_works = 1, lambda: False
    run = gpu_stages.Run(Path(sys.argv[1]), float(sys.argv[3]))
    run.stage("good", lambda: {"failed": [], "pid": os.getpid()})
    run.stage("killed", lambda: os.kill(os.getpid(), 9))
    run.stage("hangs", lambda: time.sleep(60))
    run.stage("GPU lost", lambda: 1 / 0)
    run.stage("rows", lambda: run.results["speed"].append(1))
    run.stage("late", lambda: {"failed": []}, least=1e6)
    sys.exit(run.finish())
"""


def test_a_stage_that_dies_hangs_or_loses_the_gpu_is_left_behind(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
    file = tmp_path / "results.json"
    file.write_text('{"begun": ["good"], "finished": true}')  # of an earlier run
    assert gpu_stages.work_off([sys.executable, "-c", textwrap.dedent(WORKER), str(file)], file, 50) == 1
    results = json.loads(file.read_text())
    assert results["good"].pop("pid") and results["good"] == {"failed": []} and results["speed"] == [1] and "rows" not in results
    assert results["killed"] == results["hangs"] == {"failed": ["its process died, or it did not end"]}
    assert results["GPU lost"] == {"failed": ["ZeroDivisionError: division by zero"]} and results["late"]["skipped"] == "out of time"
    printed = capfd.readouterr()
    assert [line.split()[4] for line in printed.out.splitlines() if line.startswith("The process ended")] == ["killed", "hangs", "GPU"]
    assert "Timeout" in printed.err and "out of time" in gpu_check.summary(results | {"speed": []})


def test_workers_that_get_nowhere_are_not_started_for_ever(tmp_path):
    assert gpu_stages.work_off([sys.executable, "-c", "import sys; sys.exit(7)"], tmp_path / "results.json", 50) == 7
    assert gpu_stages.said(AssertionError()) == "AssertionError: "


def test_tables_come_last_even_of_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "work_off", lambda worker, file, seconds: 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "out")])
    assert gpu_check.main() == 7 and "result" in capsys.readouterr().out.splitlines()[0]


def test_the_stages_of_models_are_the_ones_that_run():
    assert tuple(importlib.import_module("gpu_models").STAGES) == gpu_check.MODELS


def test_a_wrong_result_fails_the_dry_run(monkeypatch):
    right = gpu_check.Case.run
    monkeypatch.setattr(gpu_check.Case, "run", lambda self, x=None, up=None: right(self, x, up) * 1.02)
    assert gpu_check.correctness("cpu", small=True)["failed"]


def test_the_table_names_failures_first_hand():
    rows = [{"in": 64, "out": 32, "m": 1, "what": what, "seconds": s, "bytes": 10, "of_read_ceiling": 0.5} for what, s in (("int4 g128", 1e-5), ("cuBLAS bf16", 3e-5))]
    text = gpu_check.summary({"correctness": {"failed": ["int4: 1 > 0"]}, "graphs": {"failed": []}, "checkers": {"failed": [], "skipped": "not found"}, "speed": rows})
    assert "1 FAILED: int4: 1 > 0" in text and "3.00" in text and "not found" in text


def test_targets_are_judged():
    square, tall = (8192, 8192), (8192, 28672)
    by = {(*square, 1, gpu_check.INT4): 12e-6, (*square, 1, gpu_check.BANK): 14e-6, (*square, 1, gpu_check.CUBLAS): 36e-6, (*square, 16, gpu_check.INT4): 18e-6,
          (*square, 16, gpu_check.CUBLAS): 36e-6, (*tall, 8, gpu_check.INT4): 35e-6, (*square, 2048, gpu_check.BANK): 400e-6, (*square, 2048, gpu_check.CUBLAS): 360e-6}  # fmt: skip
    judged = {(row[0], row[1], row[2].split(" / ")[-1]): (row[3], row[5]) for row in gpu_check.goals(by)}
    assert judged == {
        ("8192 x 8192", "1", "int4 g128, us at most"): ("12.00", ""), ("28672 x 8192", "8", "int4 g128, us at most"): ("35.00", "MISS"),
        ("8192 x 8192", "1", "int4 g128"): ("0.86", "MISS"), ("8192 x 8192", "2048", "cuBLAS bf16"): ("0.90", ""),
        ("8192 x 8192", "16", "cuBLAS bf16, of that at M = 1"): ("0.67", "MISS"),
    }  # fmt: skip
