"""Where the weights of a model and what flows between its blocks are while the blocks are worked on one by one.

This one leaves everything where it is, in memory; :mod:`calora_ext.integrations.streaming` has the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor


class Residency:
    """What is told of every step. A block is a module whose weights come and go together, by its dotted name."""

    departs = False  # whether a block is gone once it was left

    def begin(self, blocks: Iterable[str], passes: int) -> None:
        """A run through these blocks starts, of so many forward passes; other blocks may be called at any time."""

    def enter(self, block: str) -> None:
        """The weights of a block will be read."""

    def leave(self, block: str, finished: bool) -> None:
        """They will not be read again in this run; finished: they are as they will be saved."""

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """These wait while other passes run."""

    def rest(self) -> None:
        """What was held and read may go back to where it waits, and free memory to the system."""

    def grouped(self, names: Iterable[str], finished: bool) -> Iterator[list[str]]:
        """Modules in groups, whose blocks are entered before the group is worked on and left after it; finished: as in :meth:`leave`."""
        yield list(names)


RESIDENT = Residency()
