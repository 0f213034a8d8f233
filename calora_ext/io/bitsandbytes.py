"""Reading the NF4 checkpoints of bitsandbytes (what ``load_in_4bit`` saves), without bitsandbytes.

A matrix (out, in) is cut into blocks of 64 weights along its flattened rows. Beside ``weight``, uint8, two codes a byte and the
first in the high nibble, lie
  weight.absmax                            a scale per block: fp32, or uint8 where it is quantised itself ("double"); then
  weight.nested_absmax, .nested_quant_map  scale = nested_quant_map[absmax] * nested_absmax of every 256 + nested_offset
  weight.quant_map                         the book, 16 fp32
  weight.quant_state.bitsandbytes__nf4     JSON, as bytes: shape, blocksize, nested_blocksize, nested_offset
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import CaloraError
from ..formats import nf4
from .checkpoint import DTYPES, MAX_ELEMENTS, Header

STATE = ".weight.quant_state.bitsandbytes__"


class Lazy:
    """A tensor of a file, made when it is indexed: what transformers asks of the values of a state dict."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = make

    def __getitem__(self, _: Any) -> Tensor:
        return self.make()


def is_checkpoint(config: dict[str, Any]) -> bool:
    """Whether a config.json says that bitsandbytes quantised the model."""
    recorded = config.get("quantization_config")
    return isinstance(recorded, dict) and recorded.get("quant_method") == "bitsandbytes"


def state_dict(headers: dict[str, Header]) -> tuple[dict[str, Lazy], dict[str, int]]:
    """The dense tensors of a checkpoint by name, made one by one as they are asked for (quantised ones in float32), and the block
    size of each module that it holds in NF4.

    Raises CaloraError where the parts of a matrix are missing or do not fit together, and for fp4 and 8-bit weights.
    """
    tensors, blocks, parts = {}, {}, set()
    for key in headers:
        name, found, kind = key.partition(STATE)
        if key.endswith(".SCB"):
            raise CaloraError(f"{key.removesuffix('.SCB')} is stored in bitsandbytes' int8, which is not read; of its checkpoints, nf4 ones are")
        if not found:
            continue
        if kind != "nf4":
            raise CaloraError(f"{name} is stored in bitsandbytes' {kind}, which is not read; quantise the model with bnb_4bit_quant_type='nf4'")
        matrix = Matrix(name, headers)
        tensors[f"{name}.weight"], blocks[name] = Lazy(matrix.decode), matrix.block
        parts |= {k for k in headers if k.startswith(f"{name}.weight")}
    if not blocks:
        raise CaloraError("config.json names bitsandbytes, but no weight has the quantisation state that its 4-bit checkpoints hold; save the model again with it")
    return tensors | {key: Lazy(lambda key=key: _read(key, headers)) for key in headers if key not in parts}, blocks


class Matrix:
    """The parts of one matrix, checked: nothing in a damaged file leads to an index outside of another part."""

    def __init__(self, name: str, headers: dict[str, Header]) -> None:
        self.name, self.headers = name, headers
        try:
            state = json.loads(bytes(_read(f"{name}{STATE}nf4", headers).tolist()))
            self.shape, self.block = tuple(state["shape"]), state["blocksize"]
            whole = [*self.shape, self.block]
            if len(self.shape) != 2 or any(type(n) is not int or not 1 <= n <= MAX_ELEMENTS for n in whole) or self.block % 32:
                raise ValueError
            n = math.prod(self.shape)
            self.blocks = -(-n // self.block)
            self.nested = state.get("nested_blocksize")
            if self.nested is not None:
                self.offset = float(state["nested_offset"])
                if type(self.nested) is not int or self.nested < 1:
                    raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise CaloraError(f"{self._where('quant_state.bitsandbytes__nf4')} is damaged; copy the model again") from None
        self._expect("", None, -(-n // 2))
        self._expect("quant_map", "F32", 4 * len(nf4.BOOK))
        if not torch.allclose(self._part("quant_map"), torch.tensor(nf4.BOOK), rtol=0, atol=1e-6):
            raise CaloraError(f"{self._where('quant_map')} is not the code book of NF4; the file is damaged or of another format")
        if self.nested is None:
            self._expect("absmax", "F32", 4 * self.blocks)
        else:
            self._expect("absmax", "U8", self.blocks)
            self._expect("nested_absmax", "F32", 4 * -(-self.blocks // self.nested))
            self._expect("nested_quant_map", "F32", 4 * 256)
        if not torch.isfinite(self.scales()).all():
            raise CaloraError(f"{self._where('absmax')} holds scales that are not finite; the file is damaged")

    def scales(self) -> Tensor:
        """(blocks,) float32."""
        absmax = self._part("absmax")
        if self.nested is None:
            return absmax
        outer = self._part("nested_absmax").repeat_interleave(self.nested)[: self.blocks]
        return self._part("nested_quant_map")[absmax.int()] * outer + self.offset

    def decode(self) -> Tensor:
        """(out, in) float32, as bitsandbytes dequantises it."""
        codes = self.headers[f"{self.name}.weight"].read(f"{self.name}.weight")
        codes = torch.stack((codes >> 4, codes & 15), dim=-1).flatten()
        values = torch.tensor(nf4.BOOK)[codes.int()][: math.prod(self.shape)]
        scales = self.scales()
        for i in range(0, self.blocks, 1 << 16):  # temporaries stay small
            part = values[i * self.block : (i + (1 << 16)) * self.block]
            part *= scales[i : i + (1 << 16)].repeat_interleave(self.block)[: len(part)]
        return values.view(self.shape)

    def _where(self, part: str) -> str:
        return f"{self.name}.weight{'.' if part else ''}{part}"

    def _part(self, part: str) -> Tensor:
        return _read(self._where(part), self.headers)

    def _expect(self, part: str, dtype: str | None, nbytes: int) -> None:
        key = self._where(part)
        if key not in self.headers:
            raise CaloraError(f"{key} is missing from the checkpoint; copy the model again")
        t = self.headers[key].tensors[key]
        if (dtype is not None and t.dtype != dtype) or t.end - t.begin != nbytes:
            raise CaloraError(
                f"{key} has {t.end - t.begin} bytes of {t.dtype}, a {self.shape[0]} x {self.shape[1]} matrix in blocks of {self.block} has "
                f"{nbytes}{f' of {dtype}' if dtype else ''}; the file is damaged"
            )


def _read(key: str, headers: dict[str, Header]) -> Tensor:
    t = headers[key].tensors[key]
    return headers[key].read(key).clone().view(DTYPES[t.dtype]).view(t.shape)  # a copy: files align to 8 bytes at best
