"""Stages that cannot cost each other anything: a run is kept in a JSON file and worked off by processes that may die.

A fault in a kernel ends the CUDA context of its process, and a kernel that never ends holds it for good. So a worker notes each
stage in the file before it begins it; where it dies, hangs or loses the GPU, the next worker goes on behind that stage.
"""

from __future__ import annotations

import faulthandler
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

STAGE_SECONDS = 180  # a stage that takes longer hangs
LOST = 3  # exit status of a worker that can use the GPU no more


def said(error: BaseException) -> str:
    """Its type and the first line of its message, if it has one."""
    first, _, _ = str(error).partition("\n")
    return f"{type(error).__name__}: {first[:200]}"


def gpu_works() -> bool:
    """False after a fault: from then on every call reports it."""
    import torch  # here only: who watches the workers needs none

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class Run:
    """What a worker has done and still may do. results: what the file holds."""

    def __init__(self, file: Path, seconds: float) -> None:
        self.file, self.start, self.seconds = file, time.monotonic(), seconds
        self.results: dict = read(file) or {"begun": [], "speed": []}

    def left(self) -> float:
        return self.start + self.seconds - time.monotonic()

    def write(self) -> None:
        beside = self.file.with_suffix(".part")
        beside.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.file)

    def stage(self, name: str, work: Callable[[], dict | None], least: float = 10) -> None:
        """Run one that no worker has begun yet, unless fewer than `least` seconds are left. Its result is what it returns, if anything."""
        if name in self.results["begun"]:
            return
        if self.left() < least:
            self.results[name] = {"failed": [], "skipped": "out of time"}
            return
        self.results["begun"].append(name)
        self.results[name] = {"failed": ["its process died, or it did not end"]}
        self.write()
        faulthandler.dump_traceback_later(min(STAGE_SECONDS, self.left() + 5), exit=True, file=sys.__stderr__)
        try:
            result = work()
            failed = bool(result and result.get("failed"))
            self.results.pop(name) if result is None else self.results.update({name: result})
        except Exception as error:
            failed = True
            self.results[name] = {"failed": [said(error)]}
        finally:
            faulthandler.cancel_dump_traceback_later()
        print(f"[{self.left():5.0f} s left] {name}: {self.results.get(name, 'measured')}", flush=True)
        self.write()
        if failed and not gpu_works():
            sys.exit(LOST)

    def finish(self) -> bool:
        """True if anything failed."""
        self.results["finished"] = True
        self.write()
        return any(part.get("failed") for part in self.results.values() if isinstance(part, dict))


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def work_off(worker: list[str], file: Path, seconds: float) -> int:
    """Start workers until one finishes, whose exit status it returns. One that begins no stage is the last."""
    end, begun = time.monotonic() + seconds, 0
    file.unlink(missing_ok=True)
    while True:
        left = max(0.0, end - time.monotonic())
        try:
            status = subprocess.run([*worker, "--seconds", f"{left:.1f}"], timeout=left + 60).returncode
        except subprocess.TimeoutExpired:
            print("The run did not end in time; what it wrote is there.", file=sys.stderr)
            return 1
        results = read(file)
        if results.get("finished") or len(results.get("begun", [])) == begun:
            return status if results.get("finished") else status or 1
        begun = len(results["begun"])
        print(f"The process ended in {results['begun'][-1]} (status {status}); another one goes on behind it.", flush=True)
