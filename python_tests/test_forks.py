"""csrc/cpu/forks.h: when a region is kept on the calling thread, and for how long; compiled and driven by a clock of its own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
HEADER = Path(__file__).parents[1] / "csrc" / "cpu" / "forks.h"
MS = 1_000_000  # ns
MAIN = """
#include <cstdio>
#include "%s"
int main() {
  calora::Forks forks;
  char what;
  long long a, b, c, d;
  while (std::scanf(" %%c %%lld %%lld %%lld %%lld", &what, &a, &b, &c, &d) == 5) {
    if (what == '?') std::printf("%%d%%d\\n", forks.pay(a), forks.watch());
    else forks.ended(a, b, c, d);
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler was found")
    folder = tmp_path_factory.mktemp("forks")
    (folder / "main.cpp").write_text(MAIN % HEADER)
    subprocess.run([COMPILER, "-std=c++17", "-Wall", "-Werror", str(folder / "main.cpp"), "-o", str(folder / "main")], check=True)
    return folder / "main"


def asked(program, *events):
    """events: a time to ask at, or (ended, threads, wall, worked). The answers (pay, watch)."""
    lines = [f"? {e} 0 0 0" if isinstance(e, int) else "e " + " ".join(map(str, e)) for e in events]
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    return [(line[0] == "1", line[1] == "1") for line in done.stdout.split()]


def test_quick_regions_are_shared_and_not_watched(program):
    assert asked(program, 0, (MS, 2, 100_000, -1), MS, (2 * MS, 2, 400_000, -1), 2 * MS) == [(True, False)] * 3


def test_a_stall_is_watched_and_the_next_one_is_answered(program):
    stall = (100 * MS, 2, 8 * MS, -1)
    assert asked(program, stall, 100 * MS) == [(True, True)]  # it may have been work
    lost = 8 * MS - 2 * 100_000
    second = (110 * MS, 2, 8 * MS, 100_000)
    until = 110 * MS + 20 * lost
    assert asked(program, stall, second, 111 * MS, until - 1, until) == [(False, True), (False, True), (True, True)]


def test_long_regions_that_several_threads_shorten_stay_shared(program):
    assert asked(program, (0, 2, 40 * MS, 39 * MS), 0, (0, 8, 40 * MS, 6 * MS), 0) == [(True, True)] * 2


def test_one_thread_of_eight_is_late_by_less_than_the_others_save(program):
    assert asked(program, (0, 8, 20 * MS, 4 * MS), 0) == [(True, True)]
    assert asked(program, (0, 8, 40 * MS, 4 * MS), 0) == [(False, True)]


def test_the_pause_has_an_end(program):
    assert asked(program, (0, 2, 10_000 * MS, 0), 999 * MS, 1000 * MS) == [(False, True), (True, True)]


def test_a_quick_region_ends_the_watch(program):
    assert asked(program, (0, 2, 9 * MS, -1), 0, (0, 2, MS // 10, 1000), 0) == [(True, True), (True, False)]
