"""Which modules of a model are compressed, which stay dense and why; the coverage report of that decision.

Works on any nn.Module, also on the meta device; transformers' conventions (``get_output_embeddings``,
``all_tied_weights_keys``) are used where present, nothing of transformers is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from .errors import CaloraError
from .formats import WeightFormat
from .linear import CompressedLinear
from .recipe import Recipe
from .tables import table

# Heads and routers: tiny, and an error there costs more than anywhere else.
SENSITIVE = re.compile(r"(^|[._])(classifier|score|qa_outputs|router)([._]|$)|gate$")


@dataclass(frozen=True)
class Entry:
    """One module, or one parameter that belongs to none of them.

    role: ``"linear"``, ``"lm_head"``, ``"embeddings"``, ``"tied"`` (reads the matrix of another entry) or ``"other"``.
    format: None where it stays dense. nbytes, dense_nbytes: after and before; 0 for ``"tied"``. reason: why it is dense.
    """

    name: str
    role: str
    parameters: int
    dense_nbytes: int
    nbytes: int
    format: WeightFormat | None = None
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """What a recipe does to a model, module by module; ``str()`` gives the table."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def formats(self) -> dict[str, WeightFormat]:
        """The modules to compress, by dotted name; those that share another's matrix are not among them."""
        return {e.name: e.format for e in self.entries if e.format is not None and e.role != "tied"}

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self.entries)

    @property
    def dense_nbytes(self) -> int:
        return sum(e.dense_nbytes for e in self.entries)

    @property
    def parameters(self) -> int:
        return sum(e.parameters for e in self.entries)

    @property
    def compressed_parameters(self) -> int:
        return sum(e.parameters for e in self.entries if e.format is not None)

    def with_sizes(self, model: nn.Module) -> Coverage:
        """The same with the bytes that the compressed modules of a model take: those of unstructured weights were expected."""
        sizes = {name: sum(t.nbytes for t in m.state_dict().values()) for name, m in model.named_modules() if name in self.formats}
        return Coverage([replace(e, nbytes=sizes[e.name]) if e.name in sizes else e for e in self.entries])

    def rows(self) -> list[dict]:
        """The entries grouped over the layers (``model.layers.*.mlp.up_proj``), as table rows."""
        groups: dict[tuple, dict] = {}
        for e in self.entries:
            name = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", e.name)
            row = groups.setdefault(
                (name, e.role, e.format, e.reason),
                {"modules": name, "count": 0, "parameters": 0, "format": str(e.format or "dense"), "bytes": 0, "reason": e.reason},
            )
            row["count"] += 1
            row["parameters"] += e.parameters
            row["bytes"] += e.nbytes
        for row in groups.values():
            row["bits_per_weight"] = round(8 * row["bytes"] / row["parameters"], 2) if row["parameters"] else 0.0
        return list(groups.values())

    def to_dict(self) -> dict:
        return {
            "parameters": self.parameters, "compressed_parameters": self.compressed_parameters,
            "dense_bytes": self.dense_nbytes, "bytes": self.nbytes, "modules": self.rows(),
        }  # fmt: skip

    def __str__(self) -> str:
        columns = ("modules", "count", "parameters", "format", "bytes", "bits per weight", "why dense")
        rows = [
            (r["modules"], r["count"], f"{r['parameters']:,}", r["format"], f"{r['bytes']:,}", f"{r['bits_per_weight']:.2f}", r["reason"])
            for r in self.rows()
        ]
        share = 100 * self.compressed_parameters / max(self.parameters, 1)
        bits = 8 * self.nbytes / max(self.parameters, 1)
        rows.append(("total", None, f"{self.parameters:,}", f"{share:.1f} % compressed", f"{self.nbytes:,}", f"{bits:.2f}", None))
        return table(columns, rows)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer with a transposed weight."""
    return type(module).__name__ == "Conv1D" and getattr(module, "weight", None) is not None and module.weight.dim() == 2


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer; of an embedding (embedding_dim, num_embeddings)."""
    rows, columns = module.weight.shape
    return (rows, columns) if is_conv1d(module) else (columns, rows)


def tied_modules(model: nn.Module) -> dict[str, str]:
    """{module: the module whose matrix it shares}, from transformers' declaration or from shared parameters."""
    tied = {}
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if target.endswith(".weight") and source.endswith(".weight"):
            tied[target.removesuffix(".weight")] = source.removesuffix(".weight")
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        # On the meta device tied weights are still apart: there the declaration alone counts.
        if weight is not None and not weight.is_meta and owners.setdefault(id(weight), name) != name and name not in tied:
            tied[name] = owners[id(weight)]
    return {
        target: source
        for target, source in tied.items()
        if _module(model, target) is not None and _module(model, source) is not None
        and _is_tied(_module(model, target), _module(model, source))
    }  # fmt: skip


def _is_tied(target: nn.Module, source: nn.Module) -> bool:
    a, b = target._parameters.get("weight"), source._parameters.get("weight")
    return a is not None and b is not None and (a is b or a.is_meta)


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def plan(model: nn.Module, recipe: Recipe) -> Coverage:
    """Decide for every module of a dense model. Raises CaloraError if the model is compressed already, if a skip
    pattern matches nothing, or if the embeddings were asked for and are of an unknown kind."""
    if any(isinstance(m, CompressedLinear) for m in model.modules()):
        raise CaloraError("the model is compressed already; start from the dense one")
    entries, covered = [], set()
    for entry, parameters in _modules(model, recipe):
        entries.append(entry)
        covered.update(parameters)
    for name, parameter in model.named_parameters():
        if id(parameter) not in covered:
            nbytes = parameter.numel() * parameter.element_size()
            entries.append(Entry(name, "other", parameter.numel(), nbytes, nbytes, None, _why_other(name, parameter)))
    for pattern in recipe.skip:
        if not any(e.reason == f"skip={pattern!r}" for e in entries):
            raise CaloraError(f"skip pattern {pattern!r} matches no layer of this model; see model.named_modules() for the names")
    return Coverage(entries)


def _modules(model: nn.Module, recipe: Recipe) -> Iterator[tuple[Entry, list[int]]]:
    """The linear layers and the input embeddings: (entry, ids of its parameters)."""
    tied = tied_modules(model)
    head = _call(model, "get_output_embeddings")
    embeddings = _call(model, "get_input_embeddings")
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or not (isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)):
            continue
        role = "lm_head" if module is head else "embeddings" if isinstance(module, nn.Embedding) else "linear"
        shared = tied.get(name)
        if shared is not None:
            fmt = recipe.format("embeddings") if _module(model, shared) is embeddings else None
            # Counted where the matrix is; on the meta device the target still has a parameter of its own.
            own = [id(weight)] if weight is not _module(model, shared).weight else []
            yield Entry(name, "tied", 0, 0, 0, fmt, "" if fmt else f"tied to {shared}"), own
            continue
        if isinstance(module, nn.Embedding):
            if module is not embeddings or recipe.embeddings is None:
                continue  # counted among the other parameters
            if type(module) is not nn.Embedding or module.max_norm is not None:
                raise CaloraError(f"{name} is a {type(module).__name__} that does more than look rows up; leave embeddings=None")
        sharing = next((target for target, source in tied.items() if source == name and module is not embeddings), "")
        reason = f"shared with {sharing}" if sharing else _why_dense(name, module, role, recipe)
        yield _entry(name, module, role, recipe, reason), [id(p) for p in module.parameters(recurse=False)]


def _entry(name: str, module: nn.Module, role: str, recipe: Recipe, reason: str) -> Entry:
    dense = sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
    parameters = sum(p.numel() for p in module.parameters(recurse=False))
    if reason:
        return Entry(name, role, parameters, dense, dense, None, reason)
    fmt = recipe.format(role)
    bias = getattr(module, "bias", None)
    nbytes = fmt.nbytes(*features(module), recipe.density) + (bias.numel() * bias.element_size() if bias is not None else 0)
    return Entry(name, role, parameters, dense, nbytes, fmt)


def _why_dense(name: str, module: nn.Module, role: str, recipe: Recipe) -> str:
    """The reason a module stays dense, or an empty string."""
    for pattern in recipe.skip:
        if re.search(pattern, name):
            return f"skip={pattern!r}"
    if recipe.format(role) is None:
        return f"{role}=None"
    if role == "linear" and SENSITIVE.search(name):
        return "head or router"
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        return f"{type(module).__name__} is not a plain nn.Linear"
    return ""


def _why_other(name: str, parameter: nn.Parameter) -> str:
    if parameter.dim() == 3:
        return "fused experts: not covered"
    return "" if parameter.dim() == 2 else "vector"


def _call(model: nn.Module, method: str) -> nn.Module | None:
    """model.method(), or None where the model has none."""
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
