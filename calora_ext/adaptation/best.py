"""Which step of a run is kept: the one with the lowest loss on held-out data, the start included."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Best:
    """The trained parameters at the step with the lowest held-out loss so far.

    measure: that loss, nats, with the parameters as they are. step, loss: of the best; step 0 is what training started from, so
    that what is kept is never worse than it on the held-out data. A loss that is not finite is worse than any other.
    """

    def __init__(self, measure: Callable[[], float]) -> None:
        self.measure = measure
        self.step, self.loss = 0, math.inf
        self.tensors: dict[str, Tensor] = {}

    def offer(self, step: int, parameters: dict[str, nn.Parameter]) -> float:
        """Measure, and remember a copy if nothing was better (or as good and earlier); of the start in any case. Returns the loss."""
        loss = self.measure()
        if loss < self.loss or not self.tensors:
            self.step, self.loss = step, loss if math.isfinite(loss) else math.inf
            self.tensors = {name: p.detach().clone() for name, p in parameters.items()}
        return loss

    def put_back(self, parameters: dict[str, nn.Parameter]) -> None:
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                parameters[name].copy_(tensor)
