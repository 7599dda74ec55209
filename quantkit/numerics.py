"""Scales, zero points, quantize and dequantize: the arithmetic oracle.

Every fast path is tested against this module, and this module is tested to the bit against
compressed-tensors' own reference (``compressed_tensors.quantization.lifecycle.forward``).
All arithmetic runs in the dtype of the tensor that is quantized, as that library does it:
a bf16 weight has bf16 scales, and ``w / scale`` is rounded to bf16 before it is rounded to
a code. Solvers that need more precision pass fp32 tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.schemes import DType, Granularity, QuantSpec, ScaleFormat

#: Values of the E2M1 codes 0..7; code 8 + i is −E2M1[i] (OCP MX specification v1.0, §5.3.3).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

#: Midpoints between E2M1 values. Ties go to the even code: below the midpoint at indices
#: 0, 2, 4, 6 (2.5 → 2), above it at 1, 3, 5 (1.75 → 2).
_E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


@dataclass(frozen=True)
class QTensor:
    """A quantized weight ``[N, K]``.

    Attributes:
        codes: int8 ``[N, K]`` signed integers; float8_e4m3fn ``[N, K]``; or uint8 ``[N, K]``
            E2M1 codes 0..15, one a byte.
        scale: shape `QuantSpec.scale_shape`; the model's dtype, uint8 E8M0 exponents, or
            float8_e4m3fn under ``global_scale``.
        zero: int8, the scale's shape; None when symmetric.
        spec: how it was quantized.
        global_scale: fp32 ``[1]``, for E4M3 scales: a weight is code · scale / global_scale.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: QuantSpec
    global_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, those that are None left out."""
        named = {
            "codes": self.codes,
            "scale": self.scale,
            "zero": self.zero,
            "global_scale": self.global_scale,
        }
        return {name: t for name, t in named.items() if t is not None}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], spec: QuantSpec) -> QTensor:
        """The inverse of `tensors`."""
        return QTensor(
            tensors["codes"],
            tensors["scale"],
            tensors.get("zero"),
            spec,
            tensors.get("global_scale"),
        )

    def rows(self, start: int, stop: int) -> QTensor:
        """The rows ``start:stop``. Scales of block granularity cannot be cut."""
        if self.spec.granularity is Granularity.TENSOR:
            return replace(self, codes=self.codes[start:stop])
        if self.spec.granularity is Granularity.BLOCK:
            raise QuantkitError("rows of a block-scaled tensor cannot be cut")
        zero = None if self.zero is None else self.zero[start:stop]
        return replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop], zero=zero)


def is_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    One fp32 sum answers for all of them, in a twentieth of the time of ``isfinite``; only a
    sum that overflows by itself is looked at again.
    """
    return bool(torch.isfinite(x.sum(dtype=torch.float32))) or bool(torch.isfinite(x).all())


def check_finite(weight: Tensor, name: str) -> None:
    """Raise QuantkitError when a weight holds NaN or infinity."""
    if not is_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        raise QuantkitError(
            f"{name}: the weight holds {bad} NaN or infinite values",
            remedy="the source checkpoint is damaged; check it or download it again",
        )


def to_groups(x: Tensor, spec: QuantSpec) -> Tensor:
    """View ``[N, K]`` so that the trailing dimensions share a scale.

    Returns ``[1, N·K]``, ``[N, 1, K]``, ``[N, K/g, g]`` or, padded with zeros,
    ``[Nb, Kb, rows·columns]``.
    """
    if spec.granularity is Granularity.TENSOR:
        return x.reshape(1, -1)
    if spec.granularity in (Granularity.CHANNEL, Granularity.TOKEN):
        return x.unsqueeze(-2)
    if spec.granularity is Granularity.GROUP:
        assert spec.group_size is not None
        return x.unflatten(-1, (-1, spec.group_size))
    assert spec.block is not None
    rows, cols = spec.block
    n, k = x.shape
    x = F.pad(x, (0, -k % cols, 0, -n % rows))
    nb, kb = x.shape[0] // rows, x.shape[1] // cols
    return x.reshape(nb, rows, kb, cols).transpose(1, 2).reshape(nb, kb, rows * cols)


def from_groups(x: Tensor, spec: QuantSpec, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of `to_groups` for a tensor of this shape."""
    if spec.granularity is not Granularity.BLOCK:
        return x.reshape(shape)
    assert spec.block is not None
    rows, cols = spec.block
    nb, kb, _ = x.shape
    x = x.reshape(nb, kb, rows, cols).transpose(1, 2).reshape(nb * rows, kb * cols)
    return x[: shape[0], : shape[1]]


def value_range(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of what shares a scale, each of the scale's shape."""
    groups = to_groups(x, spec)
    return groups.amin(-1), groups.amax(-1)


def global_scale_for(x: Tensor) -> Tensor:
    """NVFP4's fp32 ``[1]`` scale: 448 · 6 / absmax, so that E4M3 scales use their range."""
    absmax = x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
    scale = 448.0 * 6.0 / absmax
    return torch.nan_to_num(scale, nan=1.0, posinf=1.0, neginf=1.0).float().reshape(1)


def compute_scales(
    low: Tensor, high: Tensor, spec: QuantSpec, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for values in ``[low, high]``.

    Zero is always representable. Symmetric: ``absmax / ((qmax − qmin) / 2)``, so int4 spans
    absmax / 7.5. Asymmetric: ``(high − low) / (qmax − qmin)`` with an integer zero point.

    Args:
        low, high: any shape, one value a scale; their dtype is the dtype of the result.
        spec: what the scales are for.
        global_scale: fp32 ``[1]``, for E4M3 scales.

    Returns:
        scale: in float form (E8M0 and E4M3 scales already rounded to their formats);
            never zero.
        zero: int8, or None when symmetric.
    """
    low = torch.minimum(low, torch.zeros_like(low))
    high = torch.maximum(high, torch.zeros_like(high))
    steps = spec.qmax - spec.qmin
    zero = None
    if spec.symmetric:
        absmax = torch.maximum(low.abs(), high.abs())
        if spec.scale is ScaleFormat.E8M0:
            return exponents_to_scales(mx_exponents(absmax, spec), low.dtype), None
        scale = absmax / (torch.tensor(steps, dtype=absmax.dtype, device=absmax.device) / 2)
    else:
        scale = (high - low) / torch.tensor(steps, dtype=high.dtype, device=high.device)
        raw = torch.clamp(spec.qmin - low / scale, spec.qmin, spec.qmax)
        # 0 / 0 where the whole group is zero: any zero point decodes to zero, so take 0.
        zero = torch.round(torch.nan_to_num(raw, nan=0.0)).to(torch.int8)
    if global_scale is not None:
        scale = (global_scale * scale).clamp(-448.0, 448.0)
        scale = scale.to(torch.float8_e4m3fn).to(scale.dtype)
        eps = 0.125
    else:
        eps = torch.finfo(scale.dtype).eps
    return torch.where(scale == 0, torch.full_like(scale, eps), scale), zero


def mx_exponents(absmax: Tensor, spec: QuantSpec) -> Tensor:
    """Biased E8M0 exponents (uint8) of MXFP4 scales for these group maxima.

    OCP (MX v1.0 §6.3): floor(log2(absmax)) − 2. compressed-tensors: one more where absmax's
    significand is at least 1.75, which keeps the largest element from saturating.
    """
    significand, exponent = torch.frexp(absmax.float())  # absmax = significand · 2^exponent
    exponent = exponent - 1
    if not spec.ocp_rounding:
        exponent = exponent + (significand >= 0.875).to(exponent.dtype)
    biased = (exponent - 2 + 127).clamp(0, 255)
    return torch.where(absmax == 0, torch.zeros_like(biased), biased).to(torch.uint8)


def exponents_to_scales(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(e − 127) in this dtype."""
    return torch.exp2(exponents.float() - 127.0).to(dtype)


def scales_to_exponents(scale: Tensor) -> Tensor:
    """The inverse of `exponents_to_scales`."""
    _, exponent = torch.frexp(scale.float())
    return (exponent - 1 + 127).to(torch.uint8)


def round_to_codes(x: Tensor, spec: QuantSpec) -> Tensor:
    """Round scaled values to the nearest representable value; same shape and dtype."""
    x = x.clamp(spec.qmin, spec.qmax)
    if spec.dtype is DType.INT:
        return torch.round(x)
    if spec.bits == 8:
        return x.to(torch.float8_e4m3fn).to(x.dtype)
    magnitudes = torch.tensor(E2M1, dtype=x.dtype, device=x.device)
    return magnitudes[_e2m1_index(x.abs())] * torch.sign(x)


def _e2m1_index(magnitude: Tensor) -> Tensor:
    """E2M1 code 0..7 nearest to each magnitude, ties to the even code."""
    index = torch.zeros(magnitude.shape, dtype=torch.int64, device=magnitude.device)
    for i, midpoint in enumerate(_E2M1_MIDPOINTS):
        index += (magnitude > midpoint) if i % 2 == 0 else (magnitude >= midpoint)
    return index


def quantize(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    spec: QuantSpec,
    global_scale: Tensor | None = None,
) -> QTensor:
    """Round a weight to codes under these scales.

    Args:
        weight: ``[N, K]``, any float dtype.
        scale: float form, shape `QuantSpec.scale_shape`.
        zero: int8, the scale's shape, or None.
        spec: the format.
        global_scale: fp32 ``[1]``, for E4M3 scales.

    Raises:
        QuantkitError: the weight holds NaN or infinity.
    """
    check_finite(weight, f"weight {tuple(weight.shape)}")
    effective = scale if global_scale is None else scale / global_scale
    groups = to_groups(weight, spec)
    scaled = groups / effective.reshape(*groups.shape[:-1], 1)
    if zero is not None:
        scaled = scaled + zero.reshape(*groups.shape[:-1], 1).to(scaled.dtype)
    rounded = from_groups(round_to_codes(scaled, spec), spec, weight.shape)
    if spec.dtype is DType.INT:
        codes = rounded.to(torch.int8)
    elif spec.bits == 8:
        codes = rounded.to(torch.float8_e4m3fn)
    else:
        sign = torch.signbit(from_groups(scaled, spec, weight.shape)).to(torch.uint8)
        codes = _e2m1_index(rounded.abs()).to(torch.uint8) | (sign << 3)
    return QTensor(codes.contiguous(), store_scale(scale, spec), zero, spec, global_scale)


def store_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Scales in their storage format: the model's dtype, E8M0 exponents or E4M3."""
    if spec.scale is ScaleFormat.E8M0:
        return scales_to_exponents(scale)
    if spec.scale is ScaleFormat.E4M3:
        return scale.to(torch.float8_e4m3fn)
    return scale


def float_scale(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scales in float form, the global scale divided in; shape of ``q.scale``."""
    if q.spec.scale is ScaleFormat.E8M0:
        return exponents_to_scales(q.scale, dtype)
    scale = q.scale.to(dtype)
    return scale if q.global_scale is None else scale / q.global_scale


def code_values(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What each code stands for before scaling, ``[N, K]``."""
    if q.spec.dtype is DType.FLOAT and q.spec.bits == 4:
        table = torch.tensor(E2M1 + tuple(-v for v in E2M1), dtype=dtype, device=q.codes.device)
        return table[q.codes.long()]
    return q.codes.to(dtype)


def dequantize(q: QTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight that the codes stand for, ``[N, K]``.

    Computed in the scale's own dtype, as the serving engines' reference does, then cast.

    Args:
        dtype: of the result; the scale's dtype by default (bf16 for E8M0 and E4M3).
    """
    if q.spec.scale is ScaleFormat.MODEL:
        compute = q.scale.dtype
    else:
        compute = torch.bfloat16 if q.global_scale is None else torch.float32
    groups = to_groups(code_values(q, compute), q.spec)
    scale = float_scale(q, compute)
    if q.zero is not None:
        groups = groups - q.zero.reshape(*groups.shape[:-1], 1).to(compute)
    out = from_groups(groups * scale.reshape(*groups.shape[:-1], 1), q.spec, q.codes.shape)
    fallback = torch.bfloat16 if q.spec.scale is not ScaleFormat.MODEL else compute
    return out.to(dtype or fallback)


def quantize_weight(weight: Tensor, spec: QuantSpec) -> QTensor:
    """Round to nearest under min-max scales: `value_range` → `compute_scales` → `quantize`.

    Args:
        weight: ``[N, K]``; its dtype is the dtype of scales.
    """
    spec.scale_shape((weight.shape[0], weight.shape[1]))
    global_scale = global_scale_for(weight) if spec.scale is ScaleFormat.E4M3 else None
    scale, zero = compute_scales(*value_range(weight, spec), spec, global_scale)
    return quantize(weight, scale, zero, spec, global_scale)


def fake_quantize_input(x: Tensor, spec: QuantSpec, scale: Tensor | None = None) -> Tensor:
    """Quantize and dequantize activations ``[..., K]`` in their own dtype.

    Args:
        spec: token, tensor or group granularity, symmetric.
        scale: ``[1]``, for static specs; dynamic ones compute their own.

    Raises:
        QuantkitError: a static spec without a scale.
    """
    if spec.dynamic:
        groups = to_groups(x, spec)
        dynamic_scale, _ = compute_scales(groups.amin(-1), groups.amax(-1), spec)
        codes = round_to_codes(groups / dynamic_scale.unsqueeze(-1), spec)
        return (codes * dynamic_scale.unsqueeze(-1)).reshape(x.shape)
    if scale is None:
        raise QuantkitError(
            "static activation quantization without an input scale",
            remedy="calibrate with data, or use a dynamic scheme",
        )
    scale = scale.to(x.dtype)
    return round_to_codes(x / scale, spec) * scale


def fake_quantize_through(x: Tensor, spec: QuantSpec, scale: Tensor | None = None) -> Tensor:
    """`fake_quantize_input` whose gradient is the identity's: straight through the rounding (Bengio
    et al., "Estimating or Propagating Gradients Through Stochastic Neurons", arXiv 1308.3432)."""
    return x + (fake_quantize_input(x.detach(), spec, scale) - x).detach()
