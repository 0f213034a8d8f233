"""``Recipe``: what a user asks of the compression, in one frozen object that is stored with the model."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor

from .errors import CaloraError
from .formats import LAYOUT_VERSION, WeightFormat
from .formats.values import VALUES
from .pruning import NofM, Target, magnitude, parse

DEFAULT_GROUP, DEFAULT_SPARSE_GROUP = 64, 128
PRUNERS = ("magnitude", "wanda", "sparsegpt")
RATES = {"uniform": False, "rmi": True, "owl": True, "arithmetic": False}  # rule: does it measure? compression.rates registers more
ROUNDINGS = ("rtn", "gptq")
ACTIVATIONS = ("int8", "exact")


@dataclass(frozen=True)
class Recipe:
    """How a model is compressed. Raises :class:`CaloraError` for a value, or a combination, without meaning.

    weights: how a kept weight is stored: ``"int4"``, ``"nf4"`` (the QLoRA code book), ``"int8"`` (one scale per row)
    or ``"bf16"``.
    group_size: columns that share an int4 or nf4 scale, a multiple of 32, or -1 for one scale per row; default 64, sparse 128.
    symmetric: False stores a zero point per int4 group of a dense weight.
    rounding: ``"rtn"`` (to nearest) or ``"gptq"`` (Frantar et al. 2022, needs calibration data), which also lets the kept
    weights of a sparse layer make up for the pruned ones; default gptq when calibration data is given, rtn otherwise.
    sparsity: which weights of the linear layers are kept: ``"2:4"``, two of every four along a row, or another n:m, which is stored
    like any mask; a number from 0 to 1, the share of the weights that is not kept; None keeps all. The head and the embeddings
    stay dense.
    pruner: what chooses them: ``"magnitude"`` keeps the largest; ``"wanda"`` (Sun et al. 2023) the largest times the norm of
    their input; ``"sparsegpt"`` (Frantar and Alistarh 2023) those that the others cannot make up for, which move to do so. The
    last two need calibration data; default sparsegpt where it is given, magnitude otherwise. A weight that is 0 stays 0.
    rates: how a share of the weights is spread over the layers, the total being met to the weight: ``"uniform"``; by block,
    ``"arithmetic"`` (rising evenly with depth), ``"rmi"`` (Huang et al. 2025: more where a block's input resembles that of the
    others) or ``"owl"`` (Yin et al. 2023: less where it has outliers), which need calibration data; a rule that was registered
    (``calora_ext.compression.rates.register``); or a table ``{layer or block: rate}``, what it does not name sharing the rest.
    activations: ``"int8"`` (inference rounds the inputs of a layer) or ``"exact"``.
    lm_head: how the output head is stored where it is not tied to the input embeddings; None keeps it dense.
    embeddings: how the input embeddings are stored (a tied head shares them); None keeps them dense.
    skip: regexes, searched in the dotted names of the modules that stay dense besides the ones the policy skips.
    """

    weights: str = "int4"
    group_size: int | None = None
    symmetric: bool = True
    rounding: str | None = None
    sparsity: str | float | None = None
    pruner: str | None = None
    rates: str | dict[str, float] = "uniform"
    activations: str = "int8"
    lm_head: str | None = "int8"
    embeddings: str | None = None
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_sparsity()
        for name in ("weights", "lm_head", "embeddings"):
            self._check_weights(name, getattr(self, name))
        if not isinstance(self.symmetric, bool):
            raise CaloraError(f"symmetric must be true or false, got {self.symmetric!r}")
        self._settle_group_size()
        if self.rounding is not None:
            _choose("rounding", self.rounding, ROUNDINGS)
            if self.rounding == "gptq" and self.weights == "bf16":
                raise CaloraError("rounding='gptq' has no meaning for bf16 weights; use rounding='rtn'")
        _choose("activations", self.activations, ACTIVATIONS)
        self._settle_skip()
        self.format()  # its own checks

    def _check_sparsity(self) -> None:
        if self.sparsity is None and self.pruner is not None:
            raise CaloraError(f"pruner={self.pruner!r} has no meaning without sparsity; leave pruner out")
        if self.sparsity is None and self.rates != "uniform":
            raise CaloraError(f"rates={self.rates!r} has no meaning without sparsity; leave rates out")
        self._settle_rates()
        if self.sparsity is None:
            return
        if self.pruner is not None:
            _choose("pruner", self.pruner, PRUNERS)
        parse(self.sparsity)  # its own checks
        if not isinstance(self.sparsity, str):
            object.__setattr__(self, "sparsity", float(self.sparsity))
        elif self.rates != "uniform":
            raise CaloraError(f"rates={self.rates!r} has no meaning for sparsity={self.sparsity!r}, the same everywhere; use a share such as 0.5")
        if self.symmetric is False:
            raise CaloraError("symmetric=False has no meaning for sparse weights, which have no zero points; leave it out")

    def _settle_rates(self) -> None:
        if not isinstance(self.rates, dict):
            _choose("rates", self.rates, tuple(RATES))
            return
        for name, rate in self.rates.items():
            number = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 <= rate <= 1
            if not isinstance(name, str) or not number:
                raise CaloraError(f"rates must be names of layers with shares from 0 to 1, got {name!r}: {rate!r}")
        if not self.rates:
            raise CaloraError("rates must be names of layers with shares from 0 to 1, got an empty table; leave rates out")
        object.__setattr__(self, "rates", {name: float(rate) for name, rate in self.rates.items()})

    def _check_weights(self, field: str, name: Any) -> None:
        if name is None and field != "weights":
            return
        _choose(field, name, tuple(sorted(VALUES)))

    def _settle_group_size(self) -> None:
        grouped = VALUES[self.weights].grouped
        if self.group_size is None:
            default = DEFAULT_GROUP if self.sparsity is None else DEFAULT_SPARSE_GROUP
            object.__setattr__(self, "group_size", default if grouped else -1)
        elif isinstance(self.group_size, bool) or not isinstance(self.group_size, int):
            raise CaloraError(f"group_size must be a whole number, got {self.group_size!r}")
        elif not grouped and self.group_size != -1:
            raise CaloraError(f"group_size={self.group_size} has no meaning for {self.weights} weights; leave it out")

    def _settle_skip(self) -> None:
        if isinstance(self.skip, str) or not all(isinstance(pattern, str) for pattern in self.skip):
            raise CaloraError(f"skip must be a list of regexes, got {self.skip!r}")
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise CaloraError(f"skip pattern {pattern!r} is not a valid regex: {error}") from None
        object.__setattr__(self, "skip", tuple(self.skip))

    def resolve(self, calibrated: bool) -> Recipe:
        """This recipe with ``rounding`` and ``pruner`` decided. Raises CaloraError for a choice that needs calibration data
        without it, and for calibration data that no choice needs."""
        pruner = self.pruner or (None if self.sparsity is None else "sparsegpt" if calibrated else "magnitude")
        rounding = self.rounding or ("gptq" if calibrated and self.weights != "bf16" else "rtn")
        resolved = replace(self, pruner=pruner, rounding=rounding)
        needs = resolved.calibrated_choices
        if needs and not calibrated:
            field, instead = needs[0], {"pruner": "magnitude", "rounding": "rtn", "rates": "uniform"}[needs[0]]
            raise CaloraError(f"{field}={getattr(resolved, field)!r} needs calibration data; pass calibration=, or use {field}={instead!r}")
        if calibrated and not needs:
            chosen = f"rounding={rounding!r}" + (f" and pruner={pruner!r}" if pruner else "")
            raise CaloraError(f"calibration data has no meaning for {chosen}; leave one of them out")
        return resolved

    @property
    def calibrated_choices(self) -> list[str]:
        """The fields whose values look at the inputs of layers; for a resolved recipe."""
        needing = {"pruner": ("wanda", "sparsegpt"), "rounding": ("gptq",), "rates": [rule for rule, measures in RATES.items() if measures]}
        return [field for field, values in needing.items() if getattr(self, field) in values]

    def format(self, role: str = "linear") -> WeightFormat | None:
        """The weight format of a ``"linear"``, the ``"lm_head"`` or the ``"embeddings"``; None: it stays dense."""
        if role == "linear":
            pattern = "dense" if self.sparsity is None else "2:4" if self.sparsity == "2:4" else "unstructured"
            return WeightFormat(self.weights, self.group_size, self.symmetric, pattern)
        values = self.lm_head if role == "lm_head" else self.embeddings
        if values is None:
            return None
        if not VALUES[values].grouped:
            return WeightFormat(values)
        symmetric = self.symmetric or not VALUES[values].zero_points
        return WeightFormat(values, self.group_size if VALUES[self.weights].grouped else DEFAULT_GROUP, symmetric)

    @property
    def density(self) -> float:
        """Share of the weights of a linear layer that are kept."""
        if self.sparsity is None:
            return 1.0
        parsed = parse(self.sparsity)
        return parsed.keep / parsed.of if isinstance(parsed, NofM) else 1 - parsed

    def mask(self, weight: Tensor) -> Tensor | None:
        """The weights (out, in) of a linear layer that pruning by magnitude keeps; None: all."""
        return None if self.sparsity is None else magnitude(weight, self.target(weight.numel()))

    def target(self, weights: int) -> Target:
        """How much is pruned of a linear layer with so many weights, where every layer is equally sparse."""
        parsed = parse(self.sparsity)
        return parsed if isinstance(parsed, NofM) else round(parsed * weights)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; carries the layout version of this package."""
        return {"layout_version": LAYOUT_VERSION, **asdict(self), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Inverse of :meth:`to_dict`. Raises CaloraError for an unknown key, or a layout newer than this package."""
        if not isinstance(values, dict):
            raise CaloraError(f"a recipe must be a dictionary, got {type(values).__name__}")
        values = dict(values)
        check_layout_version(values.pop("layout_version", LAYOUT_VERSION))
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise CaloraError(f"unknown recipe field {unknown[0]!r}; this version knows {', '.join(f.name for f in fields(cls))}")
        try:
            return cls(**values)
        except (TypeError, AttributeError) as error:
            raise CaloraError(f"the recipe holds a value of the wrong type: {error}") from None


def check_layout_version(version: Any) -> None:
    """Raises CaloraError unless this package reads that layout."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CaloraError(f"layout_version must be a positive whole number, got {version!r}; the config is damaged")
    if version > LAYOUT_VERSION:
        raise CaloraError(
            f"the model was saved with layout {version}, this calora_ext reads up to {LAYOUT_VERSION}; upgrade calora_ext"
        )


def _choose(field: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise CaloraError(f"unknown {field} {value!r}; choose one of {', '.join(choices)}")
