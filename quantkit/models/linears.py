"""A model's linear layers as the native decoder runs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit import ops
from quantkit.layers import QuantLinear
from quantkit.ops.decoder import Linear
from quantkit.schemes import DType, Granularity, QuantSpec

#: Columns that share an int8 activation scale where a weight's group is longer.
INT8_GROUP = 64

#: Bytes of weights that are copied into huge pages at a time: what loading needs beside the model.
_PLACED_TOGETHER = 64 << 20


class Linears:
    """Linear modules as the decoder runs them, side by side in memory in the order of use."""

    def __init__(self, precision: str, activations: str) -> None:
        self.precision = precision
        self.activations = activations
        self._made: dict[nn.Module, Linear] = {}
        self._waiting: list[nn.Module] = []
        self._bytes = 0

    def __getitem__(self, module: nn.Module) -> Linear:
        return self._made[module]

    def add(self, module: nn.Module) -> None:
        linear = self._quantized(module) if isinstance(module, QuantLinear) else self._plain(module)
        self._made[module] = linear
        self._waiting.append(module)
        self._bytes += linear.packed.nbytes
        if self._bytes >= _PLACED_TOGETHER:
            self.place()

    def place(self) -> None:
        """Move what waits into huge pages, and let the modules share it or let go of theirs."""
        tensors = []
        for module in self._waiting:
            tensors += [self._made[module].packed, self._made[module].scale.t()]
        placed = iter(ops.consolidate(tensors))
        for module in self._waiting:
            packed, scale = next(placed), next(placed).t()
            self._made[module] = replace(self._made[module], packed=packed, scale=scale)
            if isinstance(module, QuantLinear):
                module.packed = packed
            else:
                weight: Any = module.weight
                module.weight = nn.Parameter(weight.detach().to("meta"), False)
        self._waiting, self._bytes = [], 0

    def numerics(self) -> str:
        """Each weight format with what its activations are."""
        seen = set()
        for linear in self._made.values():
            group = "" if linear.act_group in (0, linear.k) else f"g{linear.act_group}"
            kind = self.precision if linear.activation == "float" else linear.activation + group
            seen.add(f"{linear.format}-{kind}")
        return "+".join(sorted(seen))

    def _plain(self, module: Any) -> Linear:
        weight = module.weight.detach()
        n, k = weight.shape
        keep = weight.dtype == torch.bfloat16
        return Linear(
            format="bf16" if keep else "fp32",
            n=n,
            k=k,
            # Two bf16 values, or one fp32 value, are the four bytes of a row of a chunk.
            packed=ops.pack_w8((weight if keep else weight.float()).contiguous().view(torch.uint8)),
            scale=ops.pack_scale(torch.ones(n, 1, dtype=torch.float32)),
            group_size=k,
            bias=None if module.bias is None else module.bias.detach().float(),
        )

    def _quantized(self, module: QuantLinear) -> Linear:
        n, k = module.out_features, module.in_features
        spec = module.spec
        formats = {"w4": "w4", "w8": "int8" if spec.dtype is DType.INT else "fp8", "w8a8": "int8"}
        scale = _narrow(module.scale) if module.zero is None else module.scale
        linear = Linear(
            format=formats[module.kind],
            n=n,
            k=k,
            packed=module.packed,
            scale=scale,
            group_size=module.group,
            lut=module.table if module.kind == "w4" else None,
            zero=module.zero,
            bias=None if module.bias is None else module.bias.detach().float(),
        )
        inputs = module.scheme.input
        if inputs is None:
            return self._weight_only(linear)
        act_scale = 0.0 if module.input_scale is None else float(module.input_scale)
        kind = "int8" if inputs.dtype is DType.INT else "fp8"
        group = inputs.group_size if inputs.granularity is Granularity.GROUP else k
        return replace(
            linear,
            activation=kind if inputs.dynamic else f"{kind}-static",
            act_group=group or k,
            act_scale=act_scale,
        )

    def _weight_only(self, linear: Linear) -> Linear:
        if self.activations != "int8" or not _integer_codes(linear):
            return linear
        group = min(linear.group_size, INT8_GROUP)
        if linear.group_size < linear.k and linear.group_size % group:
            group = linear.group_size
        return replace(linear, activation="int8", act_group=min(group, linear.k))


def _integer_codes(linear: Linear) -> bool:
    """Whether the integer kernels multiply these weights exactly."""
    if linear.format == "int8":
        return True
    if linear.format != "w4" or linear.lut is None:
        return False
    doubled = linear.lut * 2
    return bool((doubled == doubled.round()).all() and (doubled.max() - doubled.min()) <= 127)


def _narrow(scale: Tensor) -> Tensor:
    """Scales in bf16 where that loses nothing: half the bytes to read beside the codes."""
    half = scale.t().to(torch.bfloat16).contiguous().t()
    return half if torch.equal(half.float(), scale) else scale


def unknown_input(module: QuantLinear) -> str | None:
    """What the native decoder cannot do to a layer's input, or None."""
    if module.order is not None:
        return "its inputs are gathered in activation order, which is not native"
    spec: QuantSpec | None = module.scheme.input
    if spec is None:
        return None
    if spec.bits != 8:
        return f"{spec.bits}-bit activations are not native"
    if not spec.symmetric:
        return "asymmetric activations are not native"
    if spec.dtype is DType.INT and module.spec.dtype is not DType.INT and module.kind != "w4":
        return "int8 activations need integer weights"
    return None
