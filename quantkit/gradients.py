"""What layers saw and made in a forward pass, and the gradients of their weights from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from quantkit.observers import HessianAccumulator

#: A layer's name, its input and its output, in the order in which they ran.
Calls = list[tuple[str, Tensor, Tensor]]


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
