"""Rotations: what an outlier channel holds is spread over all channels, before anything is rounded.

Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman: "QuaRot: Outlier-Free
4-Bit Inference in Rotated LLMs", arXiv 2404.00456, §4, stages 1a, 1c and 1d; Liu et al.:
"SpinQuant: LLM quantization with learned rotations", arXiv 2405.16406, §3.1 (R1, R2 and R4, not
learned here).

A rotation is Q = diag(s) · H / √n with random signs s and a Hadamard matrix H. Layers that read a
rotated tensor x Q have W Q for W; layers that write it have Qᵀ W.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit import hadamard
from quantkit.errors import UsageError

#: residual: rotate the residual stream (R1); unties the head.
#: heads: rotate what each attention head takes from its values, between v_proj and o_proj (R2).
#: mlp: rotate the input of every quantized down_proj (R4); its Hadamard matrix runs at inference.
#: seed: of the signs.
OPTIONS: dict[str, Any] = {"residual": True, "heads": True, "mlp": False, "seed": 0}

#: Rows, or columns, that are rotated together.
ROWS = 4096


@dataclass(frozen=True)
class Rotation:
    """Q = diag(signs) · H / √n on each run of n columns.

    Attributes:
        signs: fp64 ``[n]``, 1 and −1.
        order: of the Hadamard matrix. Where none of order n is built, the largest that divides
            n, and Q is block-diagonal.
    """

    signs: Tensor
    order: int

    @staticmethod
    def random(size: int, seed: int, place: str) -> Rotation:
        """The rotation of one place of a model: the same for the same seed and name.

        Raises:
            UsageError: the size is odd, so that no Hadamard matrix divides it.
        """
        order = hadamard.largest_order(size)
        if order == 1:
            raise UsageError(
                f"{place}: no Hadamard matrix has an order that divides its {size} channels",
                remedy="leave this rotation out",
            )
        # A number of its own for each place, whatever else is rotated.
        digest = hashlib.sha256(f"{seed} {place}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        bits = torch.randint(0, 2, (size,), generator=generator)
        return Rotation((2 * bits - 1).double(), order)

    def turn(self, x: Tensor) -> Tensor:
        """x Q for fp64 ``[..., K]``, K a multiple of n."""
        runs = x.unflatten(-1, (-1, len(self.signs))) * self.signs.to(x.device)
        return hadamard.multiply(runs, self.order).reshape(x.shape)


def turned(
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    inputs: Rotation | None = None,
    outputs: Rotation | None = None,
) -> Tensor:
    """The weight of a layer that reads and writes rotated tensors, rounded once.

    Args:
        weight: ``[N, K]``.
        scale: fp64 ``[K]``, what the layer's input is no longer multiplied by.
        inputs, outputs: how its input and output are rotated, or None.

    Returns:
        ``[N, K]`` in the weight's dtype.
    """
    if outputs is not None and inputs is None and scale is None:
        return turned(weight.t(), inputs=outputs).t().contiguous()
    result = torch.empty_like(weight)
    # What is independent is done in parts: an embedding in fp64 would be large. Layers that read
    # and write rotated tensors are two of a block at most, and smaller.
    step = ROWS if outputs is None else len(weight)
    for first in range(0, len(weight), step):
        part = weight[first : first + step].double()
        if scale is not None:
            part = part * scale
        if inputs is not None:
            part = inputs.turn(part)
        if outputs is not None:
            part = outputs.turn(part.t()).t()
        result[first : first + step] = part
    return result


def filled_in(options: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's options with the defaults of `OPTIONS`.

    Raises:
        UsageError: an unknown option, or a value that it does not take.
    """
    unknown = set(options) - set(OPTIONS)
    if unknown:
        raise UsageError(
            f"rotate: unknown option {min(unknown)!r}", remedy=f"known: {', '.join(OPTIONS)}"
        )
    given = {**OPTIONS, **options}
    for key in ("residual", "heads", "mlp"):
        if not isinstance(given[key], bool):
            raise UsageError(f"rotate: {key} {given[key]!r}: is true or false")
    seed = given["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"rotate: seed {seed!r}: is a whole number from 0")
    if not (given["residual"] or given["heads"] or given["mlp"]):
        raise UsageError(
            "rotate: residual, heads and mlp are all false: nothing is rotated",
            remedy="take rotate out of the algorithm list",
        )
    return given
