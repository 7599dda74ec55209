"""The unquantized model's pass through a block, beside the quantized one's.

A solver that makes up for its predecessors' errors must see, for every token, the input a layer
has and the one it would have had. Both passes run through the same modules, paused together
(`quantkit.paused`): one of them computes with the weights from before the block was solved. That
costs one more forward pass in all, the hidden states once more, and one block's original
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch.nn.functional as F
from torch import Tensor, nn

#: Whether this is the unquantized pass. Each greenlet has a context of its own, so that a value
#: set inside of one is seen by it alone, however often it is paused.
_UNQUANTIZED: ContextVar[bool] = ContextVar("unquantized", default=False)


def unquantized(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The pass as the original weights compute it; to be started as a greenlet."""

    def marked() -> Tensor:
        _UNQUANTIZED.set(True)
        return run()

    return marked


def in_unquantized_pass() -> bool:
    """Whether this code runs inside of a pass made by `unquantized`."""
    return _UNQUANTIZED.get()


@contextmanager
def original_weights(linears: Mapping[str, nn.Linear]) -> Iterator[None]:
    """While active, passes made by `unquantized` use these layers' weights of this moment.

    Enter it inside of `quantkit.quantize.quantized_inputs`: such passes must not meet quantized
    inputs either.
    """

    def wrap(module: nn.Linear, weight: Tensor) -> Callable[[Tensor], Tensor]:
        quantized = module.forward

        def forward(x: Tensor) -> Tensor:
            return F.linear(x, weight, module.bias) if _UNQUANTIZED.get() else quantized(x)

        return forward

    saved = {name: module.__dict__.get("forward") for name, module in linears.items()}
    for module in linears.values():
        module.__dict__["forward"] = wrap(module, module.weight)
    try:
        yield
    finally:
        for name, module in linears.items():
            del module.__dict__["forward"]
            if saved[name] is not None:
                module.__dict__["forward"] = saved[name]
