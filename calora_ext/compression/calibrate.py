"""Calibration: text to token batches, and a model run block by block with every block compressed before the next one runs.

No architecture is known by name. Blocks are the elements of the outermost ModuleLists that hold layers to compress
(``model.layers``, ``transformer.h``, an encoder's and a decoder's ``block``), in the order in which the forward pass
calls them. What happens between blocks (masks, positions, the encoder's output) is the model's own code: every batch is
one forward pass in a thread of its own that pauses at and inside each block. One thread runs at a time, so the result does not
depend on scheduling, and only hidden states are alive between blocks.
"""

from __future__ import annotations

import inspect
import reprlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaloraError
from .obs import inverse_factor
from .residency import RESIDENT, Residency

PIECE = 512  # tokens; the stream is cut into sequences of this length
BATCH = 2048  # tokens in a forward pass
BATCHES = 32  # forward passes at most: each is a thread
MIN_TOKENS = 64


def token_batches(calibration: Sequence, tokenizer: Any, config: Any) -> list[Tensor]:
    """Texts or sequences of token ids -> batches of token ids (sequences, length), all of one length.

    The ids are joined and cut into pieces; an incomplete last piece is dropped. Raises CaloraError for data that is
    empty, shorter than 64 tokens, text without a tokenizer, neither text nor ids, or ids outside the vocabulary.
    """
    if isinstance(calibration, str) or not isinstance(calibration, Iterable):
        raise CaloraError("calibration must be a list of texts or of token id sequences")
    stream = torch.cat([torch.empty(0, dtype=torch.long), *(_ids(i, item, tokenizer) for i, item in enumerate(calibration))])
    if len(stream) < MIN_TOKENS:
        raise CaloraError(f"calibration data has {len(stream)} tokens, at least {MIN_TOKENS} are needed (some ten thousand are good)")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if vocabulary is not None and not 0 <= int(stream.min()) <= int(stream.max()) < vocabulary:
        raise CaloraError(f"calibration data has token ids outside 0..{vocabulary - 1}; is it the right tokenizer?")
    length = min(PIECE, len(stream), getattr(text, "max_position_embeddings", None) or PIECE)
    pieces = stream[: len(stream) // length * length].view(-1, length)
    return list(pieces.split(max(1, BATCH // length, -(-len(pieces) // BATCHES))))


def _ids(number: int, item: Any, tokenizer: Any) -> Tensor:
    if isinstance(item, str):
        if tokenizer is None:
            raise CaloraError("calibration data is text; pass the tokenizer too")
        if not callable(tokenizer):
            raise CaloraError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}; load it with AutoTokenizer.from_pretrained")
        item = tokenizer(item)["input_ids"]
    try:
        ids = torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError):
        ids = None
    if ids is None or (ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
        raise CaloraError(f"calibration data must be texts or sequences of token ids; item {number} is {' '.join(reprlib.repr(item).split())}")
    return ids.reshape(-1).long()


def find_blocks(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """{block: the modules among `names` that lie in it}; modules outside every block are in none of the lists."""
    names = list(names)
    lists: list[str] = []
    for prefix, module in model.named_modules():
        inside = any(prefix.startswith(f"{chosen}.") for chosen in lists)
        if isinstance(module, nn.ModuleList) and not inside and any(name.startswith(f"{prefix}.") for name in names):
            lists.append(prefix)
    blocks: dict[str, list[str]] = {}
    for prefix in lists:
        for i in range(len(model.get_submodule(prefix))):
            members = [name for name in names if name.startswith(f"{prefix}.{i}.")]
            if members:
                blocks[f"{prefix}.{i}"] = members
    return blocks


class Statistic:
    """Something added up over everything that entered a layer; layers that are given the same tensor share it."""

    def __init__(self, in_features: int) -> None:
        self.tokens = 0
        self.last: Tensor | None = None

    def add(self, x: Tensor) -> None:
        if x is self.last:  # q, k and v, or gate and up: counted once
            return
        self.last = x
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.add_rows(rows)
        self.tokens += len(rows)

    def add_rows(self, rows: Tensor) -> None:
        """rows: (tokens, in) float32."""
        raise NotImplementedError


class Gram(Statistic):
    """X Xᵀ of a layer's inputs: ``matrix`` (in, in) float32, until ``give_way`` was called."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.matrix: Tensor | None = torch.zeros(in_features, in_features)
        self._left: tuple[Tensor, Tensor] | None = None

    def add_rows(self, rows: Tensor) -> None:
        self.matrix.addmm_(rows.t(), rows)

    def give_way(self) -> Tensor:
        """``inverse_factor`` of the matrix, which is given up for it: the two are the largest there is in memory. Made once for all who share it."""
        if self._left is None:
            self._left = inverse_factor(self.matrix), self.squares.clone()
            self.matrix = None
        return self._left[0]

    @property
    def squares(self) -> Tensor:
        return self.matrix.diagonal() if self._left is None else self._left[1]


class SquaredNorms(Statistic):
    """||X[j]||² of every input of a layer: ``squares`` (in,) float32, the diagonal of its Gram matrix."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.squares = torch.zeros(in_features)

    def add_rows(self, rows: Tensor) -> None:
        self.squares += rows.square().sum(0)


class Statistics:
    """Forward hooks that collect a :class:`Statistic` per module while they are attached."""

    def __init__(self, modules: dict[str, nn.Module], kind: type[Statistic] = Gram) -> None:
        self.kind = kind
        self.of: dict[str, Statistic] = {}
        self.latest: Statistic | None = None
        self.handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in modules.items()]

    def _hook(self, name: str) -> Callable:
        def collect(module: nn.Module, args: tuple) -> None:
            x = args[0]
            if name not in self.of:
                shared = self.latest is not None and self.latest.last is x
                self.of[name] = self.latest if shared else self.kind(x.shape[-1])
            self.latest = self.of[name]
            self.latest.add(x)

        return collect

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for statistic in self.of.values():
            statistic.last = None  # the activations of a forward pass


class _Stop(Exception):
    """Ends a forward pass that is not needed any further."""


class _Pass(threading.Thread):
    """A forward pass that runs when resumed, until it pauses or ends."""

    def __init__(self, forward: Callable[[], Any], rest: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.forward, self.rest = forward, rest  # rest: called whenever it pauses
        self.go, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.at: str | None = None  # the block it pauses in; None once it ended
        self.error: BaseException | None = None
        self.stopping = False
        self.start()

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.stopping:
                with torch.no_grad():  # thread-local
                    self.forward()
        except _Stop:
            pass
        except BaseException as error:  # handed to the thread that resumes
            self.error = error
        self.at = None
        self.paused.release()

    def pause(self, block: str) -> None:
        self.at = block
        self.rest()
        self.paused.release()
        self.go.acquire()
        if self.stopping:
            raise _Stop

    def resume(self) -> None:
        self.go.release()
        self.paused.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        if self.is_alive():
            self.stopping = True
            self.go.release()
            self.join()


def run_blocks(
    model: nn.Module, blocks: dict[str, list[str]], batches: list[Tensor], visit: Callable[[str, dict[str, Any]], None],
    statistic: type[Statistic] | None = Gram, changes: bool = True, residency: Residency = RESIDENT,
    observe: Callable[[str, Tensor], None] | None = None,
) -> None:  # fmt: skip
    """Run all batches through the model, pausing at and in each block: ``visit(block, {module: statistic})`` is called once every
    batch has gone through it. With `changes` they go on from the block's output as it is after the visit.

    residency: told which block is needed, and what waits. observe: ``observe(block, hidden states)`` for every batch that enters one.
    Raises CaloraError if a block is never reached; what the model itself raises on the data becomes one too.
    """
    left, gone = set(blocks), set()
    forwards = {name: model.get_submodule(name).forward for name in blocks}

    def paused_forward(name: str) -> Callable:
        def forward(*args, **kwargs):
            if name in left:  # a second call of a shared block runs it as compressed
                entering = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
                residency.hold(entering)
                threading.current_thread().pause(name)  # until its turn comes, every pass waits here
                if observe is not None:
                    observe(name, entering[0])
                output = forwards[name](*args, **kwargs)
                if changes:
                    output = None  # not held while the other batches run
                else:
                    residency.hold(t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor))
                threading.current_thread().pause(name)
                if not left:
                    raise _Stop
                if not changes:
                    return output
            if residency.departs and name in gone:
                raise CaloraError(f"{name} runs twice in a forward pass, which needs the whole model in memory; load it and use cx.compress")
            return forwards[name](*args, **kwargs)

        return forward

    inputs = [inputs_of(model, ids) for ids in batches]
    passes = [_Pass(lambda kwargs=kwargs: model(**kwargs), residency.rest) for kwargs in inputs]
    training, statistics, done = model.training, None, None
    model.eval()
    try:
        residency.begin(blocks, len(passes))
        for name in blocks:
            model.get_submodule(name).forward = paused_forward(name)
        while left:
            _resume(passes)  # out of the block that was visited last
            reached = {p.at for p in passes}
            if len(reached) != 1 or None in reached:
                raise CaloraError(f"the forward pass on the calibration data does not reach {sorted(left)[0]}; leave calibration out")
            if done is not None:
                residency.leave(done, finished=changes)
                gone.add(done)
            (name,) = reached
            residency.enter(name)
            members = blocks[name] if statistic is not None else []
            statistics = Statistics({member: model.get_submodule(member) for member in members}, statistic)
            _resume(passes)
            statistics.remove()
            found, statistics = statistics.of, None
            visit(name, found)
            del found
            left.remove(name)
            done = name
    finally:
        for name in blocks:
            del model.get_submodule(name).forward
        if statistics is not None:
            statistics.remove()
        for p in passes:
            p.stop()
        model.train(training)
    residency.leave(done, finished=changes)


def _resume(passes: list[_Pass]) -> None:
    try:
        for p in passes:
            p.resume()
    except Exception as error:  # the model's own, of any kind
        raise CaloraError(f"the model fails on the calibration data: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def inputs_of(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Keyword arguments for a forward pass. No cache: a block runs twice and would fill it twice."""
    kwargs: dict[str, Any] = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = ids
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs["use_cache"] = False
    return kwargs
