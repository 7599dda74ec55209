"""Training one block on the error of its output, once its layers are solved.

What is trained, and how it steps, is the reconstructor's (`quantkit.algorithms.signround`,
`quantkit.algorithms.blockdistill`). The block sees what the quantized blocks before it make, and is
to give what the unquantized model gives there (SignRound, arXiv 2309.05516, §3), so that it makes
up for its predecessors, too. A block that ends no better than it began, on all windows or on those
that were held back, keeps what the solvers gave it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit import numerics
from quantkit.algorithms import RECONSTRUCTORS
from quantkit.algorithms.refine import damped_outputs
from quantkit.algorithms.training import Solved, Trained, Training, window_losses
from quantkit.batches import Batch, held_back, rows
from quantkit.collector import SAMPLE_TOKENS
from quantkit.errors import QuantkitError, UsageError
from quantkit.fisher import frozen
from quantkit.paused import watched_inputs
from quantkit.plan import PlannedLayer
from quantkit.quantize import QuantizedLayer, Reconstruction, measured
from quantkit.recipe import Step

if TYPE_CHECKING:
    from quantkit.importance import Importance


#: States on the way that are judged on windows held back, the last among them.
CHECKS = 5


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
        norms: its norms' modules, by names unlike the layers'.
        norm_offset: what these add to their weight before they multiply: 1 for Gemma's.
    """

    module: nn.Module
    run: Callable[[Tensor], Tensor]
    linears: Mapping[str, nn.Linear]
    planned: Mapping[str, PlannedLayer]
    solved: Mapping[str, QuantizedLayer]
    originals: Mapping[str, Tensor]
    norms: Mapping[str, nn.Module] = field(default_factory=dict)
    norm_offset: float = 0.0


@dataclass(frozen=True)
class Reconstructed:
    """A block behind its training.

    Attributes:
        layers: every one of `Block.solved`; the trained ones with new codes and scales, their
            errors measured again.
        norms: weights of the trained norms by name, the model's dtype.
    """

    layers: dict[str, QuantizedLayer]
    norms: Mapping[str, Tensor]


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

    def judge(self, run: Callable[[Tensor], Tensor], chosen: Tensor) -> Tensor:
        """The losses of some windows in their order, fp32; of one at a time unless it is all."""
        if len(chosen) == len(self):
            return self.losses(run)[chosen]
        return torch.cat([self.loss(run, number).cpu() for number in chosen.split(1)])

    def _losses(self, out: Tensor, target: Tensor, rows: Any) -> Tensor:
        weights = None if self.weights is None else self.weights[rows].to(out.device)
        return window_losses(out, target, weights, self.metric)


def check_windows(step: Step, batches: Sequence[Batch]) -> None:
    """Refuse what cannot be cut into windows and mixed.

    Args:
        step: the reconstructor.
        batches: of calibration.

    Raises:
        UsageError: a batch that is not of tokens alone, or a single window where some are held
            back.
    """
    if not all(isinstance(batch, Tensor) for batch in batches):
        raise UsageError(
            f"{step.name} trains on windows of tokens, and this data has more beside them",
            remedy=f"calibrate on text with calibrate.apart 0, or take {step.name} out of the "
            "algorithm list",
        )
    if RECONSTRUCTORS[step.name].holds_back and sum(rows(batch) for batch in batches) < 2:
        raise UsageError(
            f"{step.name} holds windows back that it does not train on, and there is one in all",
            remedy="give --samples 2 or more",
        )


def rows_at_once(step: Step, windows: int) -> tuple[int, ...]:
    """Of how many windows a block's passes are while it is trained, beside those of batches.

    Args:
        step: the reconstructor.
        windows: of calibration.
    """
    judged, trained = _shares(step, windows)
    count = min(int(step.options["windows"]), len(trained))
    return (count,) if len(judged) == windows else (1, count)


def _shares(step: Step, windows: int) -> tuple[Tensor, Tensor]:
    """Numbers of the windows that training is judged on, and of those that it is trained on."""
    if RECONSTRUCTORS[step.name].holds_back:
        return held_back(windows, int(step.options["seed"]))
    every = torch.arange(windows)
    return every, every


def reconstruct(
    block: Block,
    windows: Windows,
    step: Step,
    *,
    seed: int,
    advance: Callable[[str], None] = lambda _: None,
) -> Reconstructed:
    """Train a block.

    Args:
        block: its weights and norms are those of the result afterwards.
        windows: of calibration.
        step: a row of `quantkit.algorithms.RECONSTRUCTORS`, all of its options filled in.
        seed: of the order of windows.
        advance: called with what to tell people, once a step.

    Raises:
        QuantkitError: the loss is NaN or infinite.
    """
    first = Solved(
        block.originals,
        {name: block.solved[name].qtensor for name in block.originals},
        {name: _weight(module).detach().clone() for name, module in block.norms.items()},
        block.norm_offset,
    )
    training = RECONSTRUCTORS[step.name].start(first, step.options)
    running = _Running(block)
    judged, trained = _shares(step, len(windows))
    with torch.no_grad(), frozen(block.module), running.active():
        found = training.trained()
        running.use(found)
        start = _finite(step, windows.losses(block.run))
        least = before = float(start[judged].mean())
        order = _minibatches(
            trained, int(step.options["windows"]), int(step.options["steps"]), seed
        )
        for candidate in _candidates(training, running, windows, order, start, step, advance):
            # Losses of single steps are of a few windows: what is kept is the least on these.
            running.use(candidate)
            loss = float(_finite(step, windows.judge(block.run, judged)).mean())
            if loss < least:
                found, least = candidate, loss
        running.use(found)
        inputs = _layer_inputs(block, windows.inputs[0])
    done = Reconstruction(before, least, running.steps)
    result = dict(block.solved)
    for name, q in found.layers.items():
        old = block.solved[name]
        spec = block.planned[name].scheme.input
        new = measured(q, block.originals[name], spec, old.input_scale, inputs[name])
        result[name] = replace(
            new, input_range=old.input_range, rounding=old.rounding, reconstruction=done
        )
        module = block.linears[name]
        weight = numerics.dequantize(q, module.weight.dtype)
        module.weight = nn.Parameter(weight, requires_grad=False)
    return Reconstructed(result, found.norms)


def _candidates(
    training: Training,
    running: _Running,
    windows: Windows,
    order: Iterator[Tensor],
    start: Tensor,
    step: Step,
    advance: Callable[[str], None],
) -> Iterator[Trained]:
    """Take the steps, and give what may be kept.

    With windows held back that is a few states on the way and the last, which are judged on those;
    else the state before the step of the least loss, and the last. Windows differ far more in their
    losses than steps do: what is compared is the loss as a share of the start's on the same
    windows, fp32 ``[samples]``.
    """
    holds_back = RECONSTRUCTORS[step.name].holds_back
    total, patience = int(step.options["steps"]), int(step.options.get("patience", 0))
    every = -(-total // CHECKS)
    best, least, waited = training.trained(), 1.0, 0
    for number, chosen in enumerate(order, start=1):
        now = training.trained()
        losses, gradients = running.differentiate(now, windows, chosen)
        share = float(_finite(step, losses).sum() / _floored(start[chosen].sum()))
        waited += 1
        if share < least:
            best, least, waited = now, share, 0
        training.descend(gradients, number - 1)
        advance(f"{step.name}, error {share:.3f} of the start's")
        if holds_back and number % every == 0 and number < total:
            yield training.trained()
        if waited == patience > 0:
            break
    if not holds_back:
        yield best
    yield training.trained()


class _Running:
    """A block as it computes while it is trained."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.weights: dict[str, Tensor] = {}
        self.norms: dict[str, nn.Parameter] = {}
        self.steps = 0

    def use(self, trained: Trained) -> None:
        """Compute with these weights and norms from now on."""
        for name, q in trained.layers.items():
            self.weights[name] = numerics.dequantize(q, self.block.originals[name].dtype)
        for name, value in trained.norms.items():
            self.norms[name] = nn.Parameter(value, requires_grad=False)
            self.block.norms[name].weight = self.norms[name]

    def differentiate(
        self, now: Trained, windows: Windows, chosen: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[B]`` of some windows, and the gradient of their mean by weights and norms."""
        self.use(now)
        self.steps += 1
        leaves = {name: weight.requires_grad_() for name, weight in self.weights.items()}
        leaves |= {name: norm.requires_grad_() for name, norm in self.norms.items()}
        with torch.enable_grad():
            losses = windows.loss(self.block.run, chosen)
            gradients = torch.autograd.grad(losses.mean(), list(leaves.values()))
        return losses.detach().cpu(), dict(zip(leaves, gradients, strict=True))

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


def _minibatches(windows: Tensor, count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """The windows of each step, int64 ``[count]`` or all of them: each once, in random order, then
    again in another."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    count = min(count, len(windows))
    for _ in range(steps):
        if len(waiting) < count:
            shuffled = windows[torch.randperm(len(windows), generator=generator)]
            waiting = torch.cat([waiting, shuffled])
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


def _finite(step: Step, losses: Tensor) -> Tensor:
    if not bool(losses.isfinite().all()):
        rates = " and ".join(f"`{key}`" for key in step.options if key.endswith("lr"))
        raise QuantkitError(
            f"{step.name}: the block's error is NaN or infinite",
            remedy=f"lower {rates}, or load the model in bfloat16",
        )
    return losses


def _weight(norm: nn.Module) -> Tensor:
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight


def _floored(total: Tensor) -> Tensor:
    """A block without an error has nothing to compare with."""
    return total.clamp_min(torch.finfo(total.dtype).tiny)
