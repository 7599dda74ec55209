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
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import greenlet
import torch
from torch import Tensor, nn

from quantkit import model as models
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
    """A decoder as a sequence of blocks that can be run one at a time.

    Args:
        model: a causal language model whose decoder is a list of blocks.
        prefix: the name of that list, where it is known; found among plain linear layers else.
    """

    def __init__(self, model: PreTrainedModel, prefix: str | None = None) -> None:
        self.model = model
        if prefix is None:
            self.prefix, self.blocks = models.find_blocks(model)
        else:
            blocks = model.get_submodule(prefix)
            assert isinstance(blocks, nn.ModuleList)
            self.prefix, self.blocks = prefix, blocks
        self._calls: dict[tuple[int, int], _Call] = {}  # (block, batch size) → call
        self._returns_tuple = False

    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Hidden states in front of block 0.

        Args:
            batches: token ids int64 ``[B, T]``.

        Returns:
            one ``[B, T, hidden]`` a batch, in the model's dtype.
        """
        hidden: list[Tensor] = []
        for ids in batches:
            first = (0, ids.shape[0]) not in self._calls

            def record(
                index: int,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                first: bool = first,
                rows: int = ids.shape[0],
            ) -> Any:
                rest = dict(kwargs)
                x = args[0] if args else rest.pop("hidden_states")
                if index == 0:
                    hidden.append(x)
                if not first:
                    raise _Stop
                self._calls[index, rows] = _Call(tuple(args[1:]), rest)
                if index == len(self.blocks) - 1:
                    raise _Stop
                return (x,) if self._returns_tuple else x

            if not self._calls:
                self._learn_return_type(ids[:1, : min(ids.shape[1], 8)])
            with self._replaced_blocks(record):
                self._forward(ids)
        return hidden

    def calls(self, block: int, hidden: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
        """For each batch, a function that runs the block on it."""
        module = self.blocks[block]

        def bind(x: Tensor) -> Callable[[], Tensor]:
            call = self._calls[block, x.shape[0]]

            def run() -> Tensor:
                out = module(x, *call.args, **call.kwargs)
                return out[0] if isinstance(out, tuple) else out

            return run

        return [bind(x) for x in hidden]

    def head_inputs(self, batches: Sequence[Tensor], hidden: Sequence[Tensor]) -> Iterator[Tensor]:
        """What the output head sees, from the hidden states behind the last block."""
        for ids, x in zip(batches, hidden, strict=True):

            def skip(
                index: int, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor = x
            ) -> Any:
                return (x,) if self._returns_tuple else x

            with self._replaced_blocks(skip):
                yield head_input(self.model, ids)

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The model's logits ``[B, T, vocab]`` from the hidden states behind the last block.

        Differentiable in ``hidden`` where autograd is enabled.

        Args:
            ids: token ids int64 ``[B, T]``; only their shape matters.
            hidden: ``[B, T, hidden]``.
        """

        def skip(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return (hidden,) if self._returns_tuple else hidden

        with self._replaced_blocks(skip):
            logits: Tensor = self.model(input_ids=ids.to(self.model.device), use_cache=False).logits
        return logits

    def _forward(self, ids: Tensor) -> None:
        try:
            with torch.no_grad():
                self.model(input_ids=ids.to(self.model.device), use_cache=False)
        except _Stop:
            pass

    def _learn_return_type(self, ids: Tensor) -> None:
        def look(_: nn.Module, __: Any, out: Any) -> None:
            self._returns_tuple = isinstance(out, tuple)
            raise _Stop

        hook = self.blocks[0].register_forward_hook(look)
        try:
            self._forward(ids)
        finally:
            hook.remove()

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


def head_input(model: PreTrainedModel, ids: Tensor, *, graph: bool = False) -> Tensor:
    """The hidden states ``[B, T, hidden]`` that the output head sees for token ids ``[B, T]``.

    With ``graph``, gradients go back from there to whatever asks for them.
    """
    caught: list[Tensor] = []

    def catch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0])
        raise _Stop

    hook = model.get_output_embeddings().register_forward_pre_hook(catch)
    try:
        with torch.set_grad_enabled(graph):
            model(input_ids=ids.to(model.device), use_cache=False)
    except _Stop:
        pass
    finally:
        hook.remove()
    return caught[0]


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
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.append((name, inputs[0]))
        )
        for name, module in layers.items()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
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

    def stop_at(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            driver.switch((name, inputs[0]))

        return hook

    order = {name: i for i, (name, _) in enumerate(leaders)}
    hooks = [module.register_forward_pre_hook(stop_at(name)) for name, module in leaders]
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
        with torch.no_grad():
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
        for hook in hooks:
            hook.remove()
        for task, _ in waiting.values():
            task.throw(greenlet.GreenletExit)
