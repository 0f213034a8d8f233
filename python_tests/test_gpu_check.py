"""benchmarks/gpu_check.sh as far as a machine without a GPU can tell: its arguments, its dry run, its table."""

import os
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
import torch

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


def test_a_wrong_result_fails_the_dry_run(monkeypatch):
    right = gpu_check.Case.run
    monkeypatch.setattr(gpu_check.Case, "run", lambda self, x=None, up=None: right(self, x, up) * 1.02)
    assert gpu_check.correctness("cpu", small=True)["failed"]


def test_the_table_names_failures_first_hand():
    rows = [{"in": 64, "out": 32, "m": 1, "what": what, "seconds": s, "bytes": 10, "of_read_ceiling": 0.5} for what, s in (("int4 g128", 1e-5), ("cuBLAS bf16", 3e-5))]
    text = gpu_check.summary({"correctness": {"failed": ["int4: 1 > 0"]}, "graphs": {"failed": []}, "checkers": {"skipped": "not found"}, "speed": rows})
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
