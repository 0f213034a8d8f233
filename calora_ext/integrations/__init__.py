"""Bridges to transformers and PEFT. Importing this package imports neither: a bridge waits for its library.

Each bridge is a module that registers when it is imported: its last line calls its ``register()``, which may be called
again. (A bridge that is imported first imports its library itself, half-way through its own import.)
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder


class _AfterImport(MetaPathFinder):
    """Runs a callback once, right after a given module was imported for the first time."""

    def __init__(self) -> None:
        self.waiting: dict[str, Callable[[], None]] = {}

    def find_spec(self, name, path, target=None):
        if name not in self.waiting:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if callback := self.waiting.pop(name, None):  # not before: a module may be looked up without being imported
                callback()

        spec.loader.exec_module = exec_module
        return spec


_finder = _AfterImport()


def when_imported(library_module: str, bridge: str) -> None:
    """Import `bridge`, which registers, as soon as `library_module` is imported: now, if it already is."""

    def register() -> None:
        try:
            import_module(bridge)
        except Exception as error:  # another library's import must not fail because of us
            warnings.warn(f"calora_ext could not register with {library_module}: {error!r}", stacklevel=2)

    if library_module in sys.modules:
        register()
        return
    _finder.waiting[library_module] = register
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
