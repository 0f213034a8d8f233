"""Prints, after pytest-benchmark's tables, which targets were met. A missed target is a fact, not a failure."""

import pytest

RESULTS = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[RESULTS] = []


@pytest.fixture
def record_target(request):
    """record_target(group, row, what, measured, at_least)"""

    def record(*target):
        request.config.stash[RESULTS].append(target)

    return record


def pytest_terminal_summary(terminalreporter, config):
    if not config.stash[RESULTS]:
        return
    terminalreporter.section("targets")
    for group, row, what, measured, at_least in config.stash[RESULTS]:
        verdict = "OK  " if measured >= at_least else "MISS"
        terminalreporter.write_line(f"{verdict} {group:32s} {row:42s} {measured:7.2f} (>= {at_least:.2f}) {what}")
