"""Forward passes that stop at a layer's input and go on when the layer has been quantized.

Calibrating block by block needs the input of every layer under its quantized predecessors.
The usual ways pay for that with a forward pass for each group of layers, or give up the
predecessors inside the block. Here each batch's forward pass is a greenlet: a hook in front
of a layer switches out of it, all batches gather there, the layer is solved and replaced,
and every pass goes on from where it stood. So each linear layer runs once, after its
quantization, on any architecture, and only one block's intermediate tensors are alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import greenlet
import torch
from torch import Tensor, nn

from quantkit import model as models
from quantkit.batches import Batch, model_inputs, rows
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Stop(Exception):
    """Ends a forward pass that has given what was wanted of it."""


@dataclass(frozen=True)
class _Call:
    """What the model passes to a block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Spine:
    """A list of blocks that can be run one at a time.

    Args:
        model: has one such list, or an encoder's and a decoder's.
        before: the spine of the encoder, for the decoder's; see `find_spines`.
        alike: what blocks are passed besides hidden states depends on nothing but the number of
            rows of a batch; not so where batches have positions of their own.
    """

    def __init__(
        self, model: PreTrainedModel, before: Spine | None = None, *, alike: bool = True
    ) -> None:
        stacks = models.find_stacks(model)
        self.model = model
        self.before = before
        #: Index of the first block, counted through all lists.
        self.first: int = 0 if before is None else before.first + len(before.blocks)
        self.prefix: str
        self.blocks: nn.ModuleList
        self.prefix, self.blocks = stacks[0 if before is None else 1]
        # A decoder's blocks are passed what the encoder made of a batch: calls are a batch's own.
        self._alike = alike and len(stacks) == 1
        self._calls: dict[tuple[int, int], _Call] = {}  # (block, rows or batch) → call
        self._returns_tuple = False
        self._extras = 0  # what blocks return beside hidden states
        self._learned = False

    def embed(
        self, batches: Sequence[Batch], encoded: Sequence[Tensor] = (), *, begin: int = 0
    ) -> list[Tensor]:
        """Hidden states in front of block 0.

        Args:
            batches: token ids int64 ``[B, T]``, or a model's inputs by name.
            encoded: for each batch the hidden states behind the last block of ``before``.
            begin: number of the first batch among all.

        Returns:
            one ``[B, T, hidden]`` a batch, in the model's dtype.
        """
        hidden: list[Tensor] = []
        for number, batch in enumerate(batches, begin):
            key = rows(batch) if self._alike else number
            first = (0, key) not in self._calls
            # What the first block makes beside hidden states, later ones are passed (T5's biases).
            extras: list[Any] = [None] * self._extras
            run_first = self.blocks[0].forward

            def record(
                index: int,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                first: bool = first,
                key: int = key,
                extras: list[Any] = extras,
                run_first: Callable[..., Any] = run_first,
            ) -> Any:
                rest = dict(kwargs)
                x = args[0] if args else rest.pop("hidden_states")
                if index == 0:
                    hidden.append(x)
                if not first:
                    raise _Stop
                self._calls[index, key] = _Call(tuple(args[1:]), rest)
                if index == len(self.blocks) - 1:
                    raise _Stop
                if index == 0 and self._extras:
                    extras[:] = run_first(*args, **kwargs)[1:]
                return self._made(x, extras)

            with self._encoder_skipped(encoded[number - begin] if encoded else None):
                if not self._learned:
                    self._learn_return_type(batch)
                    extras[:] = [None] * self._extras
                with self._replaced_blocks(record):
                    self._forward(batch)
        return hidden

    def calls(self, block: int, hidden: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
        """For each batch, a function that runs the block on it."""
        module = self.blocks[block]

        def bind(number: int, x: Tensor) -> Callable[[], Tensor]:
            call = self._calls[block, x.shape[0] if self._alike else number]

            def run() -> Tensor:
                out = module(x, *call.args, **call.kwargs)
                return out[0] if isinstance(out, tuple) else out

            return run

        return [bind(i, x) for i, x in enumerate(hidden)]

    def head_inputs(self, batches: Sequence[Batch], hidden: Sequence[Tensor]) -> Iterator[Tensor]:
        """What `head_input` gives, from the hidden states behind the last block."""
        for batch, x in zip(batches, hidden, strict=True):
            with self._skipped(x):
                yield head_input(self.model, batch)

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The model's logits ``[B, T, vocab]`` from the hidden states behind the last block.

        Differentiable in ``hidden`` where autograd is enabled.

        Args:
            ids: token ids int64 ``[B, T]``; only their shape matters.
            hidden: ``[B, T, hidden]``.
        """
        with self._skipped(hidden):
            logits: Tensor = self.model(input_ids=ids.to(self.model.device), use_cache=False).logits
        return logits

    def _made(self, x: Tensor, extras: Sequence[Any]) -> Any:
        """Hidden states in the form in which a block returns them."""
        return (x, *extras) if self._returns_tuple else x

    def _forward(self, batch: Batch) -> None:
        try:
            with torch.no_grad():
                self.model(**model_inputs(self.model, batch))
        except _Stop:
            pass

    def _learn_return_type(self, batch: Batch) -> None:
        def look(_: nn.Module, __: Any, out: Any) -> None:
            self._returns_tuple = isinstance(out, tuple)
            self._extras = len(out) - 1 if isinstance(out, tuple) else 0
            self._learned = True
            raise _Stop

        if isinstance(batch, Tensor) and self._alike:
            batch = batch[:1, : min(batch.shape[1], 8)]
        hook = self.blocks[0].register_forward_hook(look)
        try:
            self._forward(batch)
        finally:
            hook.remove()

    @contextmanager
    def _skipped(self, hidden: Tensor | None) -> Iterator[None]:
        """While active, every block, the encoder's included, gives these hidden states, or its
        own input back."""

        def skip(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = hidden if hidden is not None else args[0] if args else kwargs["hidden_states"]
            return self._made(x, [None] * self._extras)

        with self._encoder_skipped(None), self._replaced_blocks(skip):
            yield

    def _encoder_skipped(self, hidden: Tensor | None) -> AbstractContextManager[None]:
        return nullcontext() if self.before is None else self.before._skipped(hidden)

    @contextmanager
    def _replaced_blocks(
        self, run: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
    ) -> Iterator[None]:
        def bind(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: run(index, args, kwargs)

        saved = [block.__dict__.get("forward") for block in self.blocks]
        for i, block in enumerate(self.blocks):
            block.forward = bind(i)
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, saved, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward


def find_spines(model: PreTrainedModel, *, alike: bool = True) -> list[Spine]:
    """A model's lists of blocks in the order in which they run; ``alike`` as in `Spine`."""
    spines = [Spine(model, alike=alike)]
    if len(models.find_stacks(model)) == 2:
        spines.append(Spine(model, spines[0]))
    return spines


def head_input(model: PreTrainedModel, batch: Batch, *, graph: bool = False) -> Tensor:
    """The hidden states ``[B, T, hidden]`` that the output head sees for a batch.

    An encoder's are its last ones. With ``graph``, gradients go back from there to whatever asks
    for them.
    """
    inputs = model_inputs(model, batch)
    if models.family_of(model.config) is models.FAMILIES["encoder"]:
        with torch.set_grad_enabled(graph):
            states: Tensor = model.base_model(**inputs).last_hidden_state
        return states
    caught: list[Tensor] = []

    def catch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0])
        raise _Stop

    hook = model.get_output_embeddings().register_forward_pre_hook(catch)
    try:
        with torch.set_grad_enabled(graph):
            model(**inputs)
    except _Stop:
        pass
    finally:
        hook.remove()
    return caught[0]


@contextmanager
def watched_inputs(
    layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While active, ``see`` is called with a layer's name and its input ``[..., K]`` before it
    runs; what it raises ends the pass."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: see(name, inputs[0])

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def trace_groups(run: Callable[[], Tensor], layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """Which layers read the same tensor, in the order in which they run.

    Args:
        run: a forward pass through all of them.
        layers: linear layers by name.

    Returns:
        groups of names, such as ``[[q, k, v], [o], [gate, up], [down]]``.

    Raises:
        QuantkitError: a layer that does not run.
    """
    seen: list[tuple[str, Tensor]] = []
    with torch.no_grad(), watched_inputs(layers, lambda name, x: seen.append((name, x))):
        run()
    groups: dict[tuple[int, torch.Size], list[str]] = {}
    for name, x in seen:  # the tensors are alive, so equal addresses mean one tensor
        group = groups.setdefault((x.data_ptr(), x.shape), [])
        if name not in group:
            group.append(name)
    missing = set(layers) - {name for name, _ in seen}
    if missing:
        raise QuantkitError(
            f"{min(missing)}: no calibration token reached this layer",
            remedy="keep it (`keep: [...]`) or calibrate on more varied data",
        )
    return list(groups.values())


def run_paused(
    runs: Sequence[Callable[[], Tensor]],
    leaders: Sequence[tuple[str, nn.Module]],
    observe: Callable[[int, str, Tensor], None],
    solve: Callable[[str], None],
    finished: Callable[[int, Tensor], None],
) -> None:
    """Run forward passes side by side, stopping each in front of every leader.

    Args:
        runs: one forward pass a batch; they meet the leaders in the same order.
        leaders: the first layer of each group, in order.
        observe: called with a pass's index, a leader's name and its input ``[B, T, K]``; for
            each leader in the order of ``runs``.
        solve: called once every batch has been observed; replaces the group's layers.
        finished: called with a pass's index and output; the output is not kept.
    """
    driver = greenlet.getcurrent()

    def stop(name: str, x: Tensor) -> None:
        driver.switch((name, x))

    order = {name: i for i, (name, _) in enumerate(leaders)}
    waiting: dict[int, tuple[greenlet.greenlet, str]] = {}

    def advance(index: int, task: greenlet.greenlet) -> None:
        result = task.switch()
        if task.dead:
            finished(index, result)
        else:
            name, x = result
            observe(index, name, x)
            waiting[index] = (task, name)

    try:
        with torch.no_grad(), watched_inputs(dict(leaders), stop):
            for i, run in enumerate(runs):
                advance(i, greenlet.greenlet(run))
            while waiting:
                name = min((name for _, name in waiting.values()), key=order.__getitem__)
                solve(name)
                here = [(i, task) for i, (task, at) in sorted(waiting.items()) if at == name]
                for i, task in here:
                    del waiting[i]
                    advance(i, task)
    finally:
        for task, _ in waiting.values():
            task.throw(greenlet.GreenletExit)


def run_repeated(
    runs: Sequence[Callable[[], Tensor]],
    leaders: Sequence[tuple[str, nn.Module]],
    observe: Callable[[int, str, Tensor], None],
    solve: Callable[[str], None],
    finished: Callable[[int, Tensor], None],
) -> None:
    """`run_paused` in the memory of a single pass: up to each leader, every pass starts again.

    A layer runs once for every leader behind it and once at the end, so that calibration takes two
    to three times as many products; what is observed is the same to the bit. Arguments as there.
    """

    unsolved = dict(leaders)
    order = {name: i for i, name in enumerate(unsolved)}
    unfinished = dict(enumerate(runs))
    observed: set[tuple[int, str]] = set()
    met: dict[int, str] = {}

    def stop(name: str, x: Tensor) -> None:
        met[index] = name
        if (index, name) not in observed:
            observed.add((index, name))
            observe(index, name, x)
        raise _Stop

    with torch.no_grad():
        while unfinished:
            met.clear()
            with watched_inputs(unsolved, stop):
                for index, run in list(unfinished.items()):
                    try:
                        # A pass may set context variables, as in a greenlet of its own.
                        out = copy_context().run(run)
                    except _Stop:
                        continue
                    del unfinished[index]
                    finished(index, out)
            if met:
                name = min(met.values(), key=order.__getitem__)
                solve(name)
                del unsolved[name]
