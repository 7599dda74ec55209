"""QuantLinear: a linear layer on packed weights, one kernel call a forward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit import hadamard as hadamards
from quantkit import numerics, ops
from quantkit.numerics import QTensor
from quantkit.schemes import DType, Granularity, QuantSpec, Scheme

#: How a layer computes; the names are part of every results file's fingerprint.
KERNELS = ("native", "reference")


class QuantLinear(nn.Module):
    """``y = x Ŵᵀ + b`` with Ŵ ``[N, K]`` held in the kernels' packed layout.

    Numerics: activations that the scheme leaves at 16 bits enter as they are; products are
    accumulated in fp32 (int8 × int8 exactly, in int32) and scales applied in fp32. The
    reference path instead dequantizes to the activations' dtype and calls torch.

    Args:
        q: the weight.
        scheme: the layer's scheme.
        bias: ``[N]`` or None.
        input_scale: ``[1]``, for static activations.
        kernels: ``native`` or ``reference``.
        order: int64 ``[K]``: column j of the weight multiplies input ``order[j]``; None where
            columns lie as the inputs do.
        hadamard: order of the Hadamard matrix by which inputs are multiplied before all else, run
            by run (`quantkit.hadamard.multiply`); 0 for none. Computed in fp32, rounded once.
    """

    # Buffers are registered by name, so their types are told to the checker here.
    codes: Tensor
    packed: Tensor
    table: Tensor
    scale: Tensor
    zero: Tensor | None
    global_scale: Tensor | None
    input_scale: Tensor | None
    order: Tensor | None
    factor: Tensor | None
    signs: Tensor | None

    #: T5's feed-forward layers ask for its dtype, and take no tensor for an answer.
    weight = None

    def __init__(
        self,
        q: QTensor,
        scheme: Scheme,
        bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        *,
        kernels: str = "native",
        order: Tensor | None = None,
        hadamard: int = 0,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.scheme = scheme
        self.spec = q.spec
        self.kernels = kernels
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._keep("input_scale", input_scale)
        self._keep("order", order)
        self.hadamard = hadamard
        factor = hadamards.factor(hadamard) if hadamard else None
        self._keep("factor", factor)
        signs = ops.pack_hadamard(factor) if factor is not None and kernels == "native" else None
        self._keep("signs", signs)
        if kernels == "reference":
            for name in ("codes", "scale", "zero", "global_scale"):
                self._keep(name, getattr(q, name))
            self.kind = "reference"
            return
        self.kind, self.group = _kernel_for(scheme, q.shape)
        scale = _rows(numerics.float_scale(q), q.spec, q.shape)
        zero = None if q.zero is None else _rows(q.zero.float(), q.spec, q.shape)
        self._keep("scale", ops.pack_scale(scale))
        self._keep("zero", None if zero is None else ops.pack_scale(zero))
        if self.kind == "w4":
            codes, table = nibbles(q)
            self._keep("packed", ops.pack_w4(codes))
            self._keep("table", table)
        else:
            self._keep("packed", ops.pack_w8(q.codes))

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` → ``[..., N]`` in x's dtype."""
        if self.factor is not None:
            x = self._turned(x, self.factor)
        if self.order is not None:
            x = x.index_select(-1, self.order)
        if self.kind == "w8a8":
            return self._int8(x)
        spec = self.scheme.input
        if spec is not None:
            x = _quantized_input(x, spec, self.input_scale, native=self.kernels == "native")
        if self.kind == "reference":
            q = QTensor(self.codes, self.scale, self.zero, self.spec, self.global_scale)
            return F.linear(x, numerics.dequantize(q, x.dtype), self.bias)
        if self.kind == "w4":
            return ops.w4_linear(
                x, self.packed, self.scale, self.zero, self.table, self.bias,
                self.out_features, self.group,
            )  # fmt: skip
        kind = "int8" if self.spec.dtype is DType.INT else "fp8"
        return ops.w8_linear(x, self.packed, self.scale, self.zero, self.bias, kind, self.group)

    def _turned(self, x: Tensor, factor: Tensor) -> Tensor:
        """The input times its Hadamard matrix, by the kernel of the device."""
        if x.is_cuda and self.signs is not None:
            return ops.hadamard_mma(x, self.signs, factor.shape[0], self.hadamard)
        return ops.get_backend(self.kernels).hadamard(x, factor, self.hadamard)

    def _int8(self, x: Tensor) -> Tensor:
        spec = self.scheme.input
        assert spec is not None
        flat = x.reshape(-1, self.in_features)
        if spec.dynamic:
            codes, scale = ops.quantize_int8_per_token(flat)
        else:
            assert self.input_scale is not None
            scale = self.input_scale
            codes = ops.quantize_int8_static(flat, scale)
        y = ops.w8a8_linear(codes, scale, self.packed, self.scale, self.bias, x.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme.name}, kernels={self.kernels}/{self.kind}"
            + (f", hadamard={self.hadamard}" if self.hadamard else "")
        )


def _kernel_for(scheme: Scheme, shape: tuple[int, int]) -> tuple[str, int]:
    """(kernel, columns that share a scale) for a scheme."""
    weight, inputs = scheme.weight, scheme.input
    group = shape[1]
    if weight.granularity is Granularity.GROUP:
        assert weight.group_size is not None
        group = weight.group_size
    elif weight.granularity is Granularity.BLOCK:
        assert weight.block is not None
        group = weight.block[1]
    if weight.bits <= 4:
        return "w4", group
    exact = (
        inputs is not None
        and inputs.dtype is DType.INT
        and inputs.granularity in (Granularity.TOKEN, Granularity.TENSOR)
        and weight.dtype is DType.INT
        and weight.symmetric
        and group == shape[1]
    )
    return ("w8a8" if exact else "w8"), group


def _rows(scale: Tensor, spec: QuantSpec, shape: tuple[int, int]) -> Tensor:
    """Scales as ``[N, groups]``, whatever their granularity."""
    if spec.granularity is Granularity.TENSOR:
        return scale.reshape(1, 1).expand(shape[0], 1).contiguous()
    if spec.granularity is Granularity.BLOCK:
        assert spec.block is not None
        return scale.repeat_interleave(spec.block[0], 0)[: shape[0]].contiguous()
    return scale.reshape(shape[0], -1).contiguous()


def nibbles(q: QTensor) -> tuple[Tensor, Tensor]:
    """Codes of at most 4 bits as uint8 0..15, and the fp32 ``[16]`` value of each."""
    if q.spec.dtype is DType.FLOAT:
        values = numerics.E2M1 + tuple(-v for v in numerics.E2M1)
        return q.codes, torch.tensor(values, dtype=torch.float32)
    offset = 2 ** (q.spec.bits - 1)
    table = (torch.arange(16) - offset).clamp(max=int(q.spec.qmax)).float()
    return (q.codes + offset).to(torch.uint8), table


def _quantized_input(x: Tensor, spec: QuantSpec, scale: Tensor | None, *, native: bool) -> Tensor:
    if native and spec.dtype is DType.FLOAT and spec.granularity is Granularity.TOKEN:
        codes, token_scale = ops.quantize_fp8_per_token(x)
        return codes.to(x.dtype) * token_scale.to(x.dtype)
    return numerics.fake_quantize_input(x, spec, scale)
