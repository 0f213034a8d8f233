"""The ``calora`` command. One file per group of commands; what all of them share is in ``common``.

Nothing heavy is imported before a command runs, so that ``calora --help`` and usage errors come at once.
"""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ..errors import CaloraError, NotBuiltError
from . import adapt, bench, compress, demo, evaluate, generate, info, sparse_adapt

app = typer.Typer(
    name="calora",
    help="Compress transformers models, carry their LoRA adapters over, and run both through fused kernels.",
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for module in (demo, info, compress, adapt, sparse_adapt, evaluate, generate, bench):
    module.register(app)


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0, or 2 with one sentence on stderr for bad input."""
    try:
        with _terminable():
            app(arguments, prog_name="calora")
    except (CaloraError, NotBuiltError) as error:
        _fail(str(error))
    except OSError as error:
        if error.errno is None:  # not from the operating system: libraries raise OSError for other things
            raise
        name = f" {error.filename}" if error.filename else ""
        advice = {errno.ENOSPC: "free some space and run the command again", errno.EACCES: "check its permissions"}
        _fail(f"{error.strerror}:{name}; {advice.get(error.errno, 'check the path')}")


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that nothing half-written stays behind: a process that it kills cleans up nothing."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str) -> None:
    print(f"calora: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
