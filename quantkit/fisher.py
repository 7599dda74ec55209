"""How much each calibration token's error in a layer's output costs the model.

GPTQ minimises the squared error of a layer's output, every token and layer alike. What the model
loses is another matter: to second order, a change δ of one output costs ½ δᵀ F δ nats of KL
divergence with F = E[g gᵀ], the Fisher information, g the gradient of −log p(y) with respect to it
and y drawn from the model's own prediction. Taking F to be ‖g‖²·I for each token turns
the layer's Hessian into Σ w x xᵀ with w = ‖g‖²: Kim et al., "GuidedQuant: Large Language Model
Quantization via Exploiting End Loss Guidance" (arXiv 2505.07004, §3), with one group of outputs a
layer. One pass through the unquantized model and back gives the weights of all tokens and layers.

The same gradients tell which outputs' errors belong together: with F taken to be a Kronecker
product, its other factor is G = Σ g gᵀ, each token's share flattened as its weight is (Tseng et
al., "Model-Preserving Adaptive Rounding", arXiv 2505.22988, §3, from one draw a token).

The weights of a few tokens are huge: nearly all that the keys and values of an attention sink
cost is in the first token. So they are flattened by an exponent, and every token keeps a floor,
without which H would have the rank of a hundred tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantkit import model as models
from quantkit.batches import Batch, model_inputs, token_ids
from quantkit.errors import QuantkitError, UsageError
from quantkit.gradients import gradient_of_draws, skip_draws
from quantkit.ops import get_backend
from quantkit.parallel import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Share of a token's weight that every token has, whatever its gradient.
FLOOR = 0.1

#: Outputs whose errors are looked at together, at most: 16 MB a block in fp32.
OUTPUT_BLOCK = 2048


@dataclass(frozen=True)
class Gradients:
    """What one pass through the model and back says of its layers.

    Attributes:
        squares: ‖g‖² of each layer's output at each token, fp32 ``[samples · seq_len]`` by name.
        outputs: diagonal blocks of G, its mean diagonal 1, bf16 ``[n, n]`` each, for the layers
            that were asked for.
    """

    squares: Mapping[str, Tensor]
    outputs: Mapping[str, tuple[Tensor, ...]]


def measure_gradients(
    model: PreTrainedModel,
    names: Sequence[str],
    windows: Sequence[Batch],
    *,
    coupled: Mapping[str, float] = MappingProxyType({}),
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
    together: World = ALONE,
) -> Gradients:
    """Second moments of the gradients of each layer's output.

    One window at a time goes forward and back, so that memory holds one window's activations.

    Args:
        model: unquantized, all of it in memory; unchanged afterwards.
        names: of the linear layers.
        windows: ``[1, T]`` each.
        coupled: layers whose G is wanted, with the exponent of their tokens' weights.
        seed: of the labels that are drawn.
        advance: called after each window.
        together: the processes that have the other windows. Squares are of this one's tokens;
            matrices of outputs are complete on the first alone.

    Raises:
        UsageError: part of the model is on disk.
        QuantkitError: a layer that does not see every token once, or a gradient that is NaN.
    """
    if any(p.is_meta for p in model.parameters()):
        raise UsageError(
            "Fisher weights go back through the whole model, and part of it is on disk",
            remedy="take `fisher` out of the recipe, or give it more memory",
        )
    linears = models.linear_layers(model)
    tokens = sum(token_ids(window).numel() for window in windows)
    seen = {name: _Moments(tokens, linears[name], coupled.get(name)) for name in names}
    generator = torch.Generator().manual_seed(seed)
    # Each window gets the labels that one process would draw for it.
    for _ in range(sum(together.agree(len(windows))[: together.rank])):
        skip_draws(token_ids(windows[0]).shape[1], generator)
    with torch.enable_grad(), frozen(model), _recorded(model, seen):
        for window in windows:
            logits = model(**model_inputs(model, window)).logits
            logits.backward(gradient_of_draws(logits.detach(), generator))
            advance()
    for name, moments in seen.items():
        if moments.count != tokens:
            raise QuantkitError(
                f"{name}: not every token meets this layer exactly once",
                remedy="take `fisher` out for layers that a router chooses",
            )
        if not bool(moments.squares.isfinite().all()):
            raise QuantkitError(
                f"{name}: a gradient of its output is NaN or infinite",
                remedy="take `fisher` out, or load the model in another dtype",
            )
    squares = {name: moments.squares for name, moments in seen.items()}
    # One layer after the other: a sum is gone when the next is rounded.
    outputs = {name: seen.pop(name).blocks(together) for name in names if name in coupled}
    return Gradients(squares, outputs)


def output_parts(width: int) -> list[range]:
    """``width`` outputs in blocks of nearly the same size, `OUTPUT_BLOCK` at most."""
    count = -(-width // OUTPUT_BLOCK)
    edges = [round(i * width / count) for i in range(count + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def token_weights(squares: Tensor, exponent: float) -> Tensor:
    """What each token counts in a layer's Hessian: mean 1, never below `FLOOR`.

    Args:
        squares: ‖g‖², fp32 ``[tokens]``.
        exponent: 1 takes them as they are, 0 makes all alike.
    """
    flat = (squares / squares.mean().clamp_min(torch.finfo(torch.float32).tiny)).pow(exponent)
    mean = flat.mean()
    if not float(mean) > 0:  # no gradient anywhere: nothing to tell tokens apart by
        return torch.ones_like(squares)
    return FLOOR + (1 - FLOOR) * flat / mean


class _Moments:
    """Of one layer's gradients, filled in as windows go back.

    Tensors of full size from the start: small ones that outlive a window would lie between its
    large ones and keep their memory from being used again.

    Args:
        tokens: of all windows.
        layer: whose sums are on its device.
        exponent: of its tokens' weights if its G is wanted, else None.
    """

    def __init__(self, tokens: int, layer: nn.Linear, exponent: float | None) -> None:
        self.squares = torch.zeros(tokens, dtype=torch.float32)
        self.count = 0
        self.exponent = exponent
        parts = [] if exponent is None else output_parts(layer.out_features)
        device = layer.weight.device
        self.sums = [
            torch.zeros(len(part), len(part), device=device, dtype=torch.float32) for part in parts
        ]

    def add(self, gradient: Tensor) -> None:
        flat = gradient.reshape(-1, gradient.shape[-1]).float()
        squares = flat.square().sum(-1)
        stop = self.count + len(squares)
        if stop <= len(self.squares):
            self.squares[self.count : stop] = squares
        self.count = stop
        if self.exponent is None:
            return
        tiny = torch.finfo(torch.float32).tiny
        shares = squares.clamp_min(tiny).pow((self.exponent - 1) / 2)
        rows = (flat * shares[:, None]).to(torch.bfloat16)
        solvers = get_backend("native" if rows.device.type == "cpu" else "reference")
        start = 0
        for total in self.sums:
            solvers.syrk_accumulate(total, rows[:, start : start + len(total)])
            start += len(total)

    def blocks(self, together: World) -> tuple[Tensor, ...]:
        """G of all processes, symmetric; the identity where no gradient ever came."""
        found = []
        for total in self.sums:
            together.add(total)
            whole = (total.tril() + total.tril(-1).t()).cpu()
            mean = float(whole.diagonal().mean())
            whole = whole / mean if mean > 0 else torch.eye(len(whole), dtype=torch.float32)
            found.append(whole.to(torch.bfloat16))
        return tuple(found)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient: only those of activations are computed."""
    asking = [p for p in model.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def _recorded(model: PreTrainedModel, seen: Mapping[str, _Moments]) -> Iterator[None]:
    """While active, each layer's gradient is added to its moments as it goes back."""

    def begin(_: nn.Module, __: object, out: Tensor) -> Tensor:
        return out.requires_grad_(True)

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, __: object, out: Tensor) -> None:
            out.register_hook(seen[name].add)

        return hook

    linears = models.linear_layers(model)
    hooks = [model.get_input_embeddings().register_forward_hook(begin)]
    hooks += [linears[name].register_forward_hook(watch(name)) for name in seen]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
