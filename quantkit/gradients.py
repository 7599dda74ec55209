"""Gradients of a model's own predictions, what layers saw, and what they make of the two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quantkit.observers import HessianAccumulator

#: A layer's name, its input and its output, in the order in which they ran.
Calls = list[tuple[str, Tensor, Tensor]]

#: Tokens whose predictions are in memory at once in fp32: 4 · vocabulary bytes each.
PREDICTED_TOKENS = 64


def gradient_of_draws(logits: Tensor, generator: torch.Generator) -> Tensor:
    """∂(−log p(y))/∂logits = p − onehot(y), y drawn from p at each position.

    Its second moments are the Fisher information of the prediction.

    Args:
        logits: ``[..., V]``.
        generator: of the draws, on the CPU.

    Returns:
        the logits' shape and dtype.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    out = torch.empty_like(rows)
    for start in range(0, len(rows), PREDICTED_TOKENS):
        p = rows[start : start + PREDICTED_TOKENS].float().softmax(-1)
        threshold = torch.rand(len(p), 1, generator=generator, dtype=torch.float32).to(p.device)
        # The inverse of the distribution function; its last value may fall short of 1.
        labels = torch.searchsorted(p.cumsum(-1), threshold).clamp_(max=p.shape[1] - 1)
        p.scatter_add_(1, labels, torch.full_like(threshold, -1.0))
        out[start : start + PREDICTED_TOKENS] = p.to(out.dtype)
    return out.view_as(logits)


def skip_draws(tokens: int, generator: torch.Generator) -> None:
    """Leave a generator where `gradient_of_draws` of so many tokens would leave it."""
    for start in range(0, tokens, PREDICTED_TOKENS):
        torch.rand(
            min(PREDICTED_TOKENS, tokens - start), 1, generator=generator, dtype=torch.float32
        )


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[Calls]:
    """While active, lists every run of these layers."""
    seen: Calls = []
    hooks = [
        module.register_forward_hook(
            lambda _, inputs, out, name=name: seen.append((name, inputs[0].detach(), out))
        )
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def observed(
    modules: Mapping[str, nn.Module], hessians: Mapping[str, HessianAccumulator]
) -> Iterator[None]:
    """While active, the inputs of these layers enter their Hessians."""
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: hessians[name].update(inputs[0])
        )
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def weight_gradients(seen: Calls, grads: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gᵀ X of each layer over all of a window's tokens, fp32 ``[N · K]``."""
    found: dict[str, Tensor] = {}
    for (name, x, _), grad in zip(seen, grads, strict=True):
        wide = grad.reshape(-1, grad.shape[-1]).float()
        product = (wide.T @ x.reshape(-1, x.shape[-1]).float()).flatten()
        found[name] = found[name] + product if name in found else product
    return found
