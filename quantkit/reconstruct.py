"""Training the rounding of one block on the error of its output, once its layers are solved.

See `quantkit.algorithms.signround` for what is trained and why. The block sees what the quantized
blocks before it make, and is to give what the unquantized model gives there (§3 of the paper), so
that it makes up for its predecessors, too. A block that ends no better than it began, on all
windows, keeps what the solvers gave it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit import numerics
from quantkit.algorithms.refine import damped_outputs
from quantkit.algorithms.signround import Rounding, step_size, window_losses
from quantkit.batches import Batch
from quantkit.collector import SAMPLE_TOKENS
from quantkit.errors import QuantkitError, UsageError
from quantkit.fisher import frozen
from quantkit.numerics import QTensor
from quantkit.paused import watched_inputs
from quantkit.plan import PlannedLayer
from quantkit.quantize import QuantizedLayer, Reconstruction, measured

if TYPE_CHECKING:
    from quantkit.importance import Importance


@dataclass(frozen=True)
class Block:
    """A block whose layers are solved.

    Attributes:
        module: the block.
        run: its output ``[B, T, H]`` for hidden states of the same shape.
        linears: its planned layers' modules; their weights are dequantized.
        planned: what is planned for each.
        solved: what the solvers made of each.
        originals: weights ``[N, K]`` from before, of the layers that are to be trained.
    """

    module: nn.Module
    run: Callable[[Tensor], Tensor]
    linears: Mapping[str, nn.Linear]
    planned: Mapping[str, PlannedLayer]
    solved: Mapping[str, QuantizedLayer]
    originals: Mapping[str, Tensor]


@dataclass(frozen=True)
class Windows:
    """What a block is trained on.

    Attributes:
        inputs: hidden states ``[B, T, H]`` in front of the block, a batch each.
        targets: what the unquantized model has behind it.
        weights: what each token's error counts, fp32 ``[samples, T]``; None for all alike.
        metric: how errors of different channels count together; see `window_losses`.
    """

    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    weights: Tensor | None = None
    metric: Sequence[Tensor] = ()

    @staticmethod
    def of(
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        writer: str,
        importance: Importance | None,
    ) -> Windows:
        """Weighed as the errors of the layer that writes the block's output, if that is known.

        Args:
            inputs, targets: as above.
            writer: the layer's name; errors of its outputs are errors of the block's.
            importance: of tokens and outputs, by layer.
        """
        counts = None if importance is None else importance.weights.get(writer)
        if importance is None or counts is None:
            return Windows(inputs, targets)
        metric = [
            block.to(inputs[0].device) for block in damped_outputs(importance.outputs(writer))
        ]
        return Windows(inputs, targets, counts.reshape(-1, inputs[0].shape[1]), metric)

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.inputs)

    def losses(self, run: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss of every window, fp32 ``[samples]``, on the CPU."""
        found, start = [], 0
        for x, target in zip(self.inputs, self.targets, strict=True):
            rows = slice(start, start + len(x))
            found.append(self._losses(run(x), target, rows).cpu())
            start = rows.stop
        return torch.cat(found)

    def loss(self, run: Callable[[Tensor], Tensor], chosen: Tensor) -> Tensor:
        """The losses ``[B]`` of some windows, given by their numbers; differentiable."""
        inputs = [window for batch in self.inputs for window in batch]
        targets = [window for batch in self.targets for window in batch]
        numbers = chosen.tolist()
        out = run(torch.stack([inputs[i] for i in numbers]))
        return self._losses(out, torch.stack([targets[i] for i in numbers]), chosen)

    def _losses(self, out: Tensor, target: Tensor, rows: Any) -> Tensor:
        weights = None if self.weights is None else self.weights[rows].to(out.device)
        return window_losses(out, target, weights, self.metric)


def check_windows(batches: Sequence[Batch]) -> None:
    """Refuse what cannot be cut into windows and mixed.

    Raises:
        UsageError: a batch that is not of tokens alone.
    """
    if not all(isinstance(batch, Tensor) for batch in batches):
        raise UsageError(
            "signround trains on windows of tokens, and this data has more beside them",
            remedy="calibrate on text, or take signround out of the algorithm list",
        )


def reconstruct(
    block: Block,
    windows: Windows,
    options: Mapping[str, Any],
    *,
    seed: int,
    advance: Callable[[str], None] = lambda _: None,
) -> dict[str, QuantizedLayer]:
    """Train the block's offsets and clip ranges.

    Args:
        block: its weights are those of the result afterwards.
        windows: of calibration.
        options: see `quantkit.algorithms.signround.OPTIONS`.
        seed: of the order of windows.
        advance: called with what to tell people, once a step.

    Returns:
        every layer of ``block.solved``; the trained ones with new codes and scales, their errors
        measured again.

    Raises:
        QuantkitError: the loss is NaN or infinite.
    """
    training = _Training(block, options)
    with torch.no_grad(), frozen(block.module), training.active():
        start = _finite(windows.losses(block.run))
        best = training.train(windows, start, seed, advance)
        found, least = training.start, float(start.mean())
        # Losses of single steps are of a few windows: what is kept is the least on all of them.
        for candidate in (best, training.quantized()):
            training.use(candidate)
            loss = float(_finite(windows.losses(block.run)).mean())
            if loss < least:
                found, least = candidate, loss
        training.use(found)
        inputs = _layer_inputs(block, windows.inputs[0])
    done = Reconstruction(float(start.mean()), least, training.steps)
    result = dict(block.solved)
    for name, q in found.items():
        old = block.solved[name]
        spec = block.planned[name].scheme.input
        new = measured(q, block.originals[name], spec, old.input_scale, inputs[name])
        result[name] = replace(
            new, input_range=old.input_range, rounding=old.rounding, reconstruction=done
        )
        module = block.linears[name]
        weight = numerics.dequantize(q, module.weight.dtype)
        module.weight = nn.Parameter(weight, requires_grad=False)
    return result


class _Training:
    """The trained layers of a block, and the weights that it computes with meanwhile."""

    def __init__(self, block: Block, options: Mapping[str, Any]) -> None:
        self.block = block
        self.options = options
        self.start = {name: block.solved[name].qtensor for name in block.originals}
        self.rounding = {
            name: Rounding(weight, self.start[name]) for name, weight in block.originals.items()
        }
        self.weights: dict[str, Tensor] = {}
        self.steps = 0
        self.use(self.start)

    def quantized(self) -> dict[str, QTensor]:
        """The layers as they would be stored now."""
        return {name: rounding.quantized() for name, rounding in self.rounding.items()}

    def use(self, layers: Mapping[str, QTensor]) -> None:
        """Compute with these from now on."""
        for name, q in layers.items():
            self.weights[name] = numerics.dequantize(q, self.block.originals[name].dtype)

    def train(
        self, windows: Windows, start: Tensor, seed: int, advance: Callable[[str], None]
    ) -> dict[str, QTensor]:
        """Take the steps.

        Windows differ far more in their losses than steps do: what is compared is the loss as a
        share of the start's on the same windows, fp32 ``[samples]``.

        Returns:
            the layers at the step of the least share.
        """
        best, least, waited = self.start, 1.0, 0
        total = int(self.options["steps"])
        for chosen in _minibatches(len(windows), int(self.options["windows"]), total, seed):
            now = self.quantized()
            self.use(now)
            leaves = {name: weight.requires_grad_() for name, weight in self.weights.items()}
            with torch.enable_grad():
                losses = windows.loss(self.block.run, chosen)
                gradients = torch.autograd.grad(losses.mean(), list(leaves.values()))
            share = float(_finite(losses.detach().cpu()).sum() / _floored(start[chosen].sum()))
            waited += 1
            if share < least:
                best, least, waited = now, share, 0
            self._descend(dict(zip(leaves, gradients, strict=True)), total)
            self.steps += 1
            advance(f"signround, error {share:.3f} of the start's")
            if waited == self.options["patience"] > 0:
                break
        return best

    def _descend(self, gradients: Mapping[str, Tensor], total: int) -> None:
        first, first_range = (
            1.0 / total if self.options[key] == "auto" else float(self.options[key])
            for key in ("lr", "range_lr")
        )
        for name, gradient in gradients.items():
            self.rounding[name].descend(
                gradient,
                step_size(first, self.steps, total),
                step_size(first_range, self.steps, total),
            )

    @contextmanager
    def active(self) -> Iterator[None]:
        """While active, the block's planned layers compute with `weights`, if they are trained,
        and gradients pass the rounding of inputs unchanged."""
        for name, module in self.block.linears.items():
            module.__dict__["forward"] = self._forward(name, module)
        try:
            yield
        finally:
            for module in self.block.linears.values():
                del module.__dict__["forward"]

    def _forward(self, name: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        spec, scale = self.block.planned[name].scheme.input, self.block.solved[name].input_scale

        def forward(x: Tensor) -> Tensor:
            if spec is not None:
                x = numerics.fake_quantize_through(x, spec, scale)
            return F.linear(x, self.weights.get(name, module.weight), module.bias)

        return forward


def _minibatches(windows: int, count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Numbers of the windows of each step, int64 ``[min(count, windows)]``: all windows once, in
    random order, then again in another."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    count = min(count, windows)
    for _ in range(steps):
        if len(waiting) < count:
            waiting = torch.cat([waiting, torch.randperm(windows, generator=generator)])
        yield waiting[:count]
        waiting = waiting[count:]


def _layer_inputs(block: Block, x: Tensor) -> dict[str, Tensor]:
    """The first inputs ``[tokens, K]`` of each trained layer, for measuring its errors."""
    found: dict[str, Tensor] = {}

    def keep(name: str, inputs: Tensor) -> None:
        found[name] = inputs.reshape(-1, inputs.shape[-1])[:SAMPLE_TOKENS].clone()

    with watched_inputs({name: block.linears[name] for name in block.originals}, keep):
        block.run(x)
    return found


def _finite(losses: Tensor) -> Tensor:
    if not bool(losses.isfinite().all()):
        raise QuantkitError(
            "signround: the block's error is NaN or infinite",
            remedy="lower `lr` and `range_lr`, or load the model in bfloat16",
        )
    return losses


def _floored(total: Tensor) -> Tensor:
    """A block without an error has nothing to compare with."""
    return total.clamp_min(torch.finfo(total.dtype).tiny)
