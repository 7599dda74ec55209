"""The arithmetic oracle, to the bit against compressed-tensors' own reference."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as ct_fake_quantize
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from compressed_tensors.quantization.quant_args import QuantizationArgs
from compressed_tensors.quantization.utils.helpers import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
    generate_gparam,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import numerics
from quantkit.checkpoint.config import to_args
from quantkit.errors import QuantkitError
from quantkit.schemes import SCHEMES, QuantSpec, ScaleFormat, parse_scheme

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WEIGHT_SPECS = {
    **{s.name: s.weight for s in SCHEMES.values()},
    "int5-g32-asym": parse_scheme(
        {"weight": {"bits": 5, "group_size": 32, "symmetric": False}}
    ).weight,
    "int2-g16": parse_scheme({"weight": {"bits": 2, "group_size": 16}}).weight,
    "int6-tensor": parse_scheme({"weight": {"bits": 6, "granularity": "tensor"}}).weight,
}


def theirs(weight: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, ...]:
    """compressed-tensors' codes (as values), scale, zero point, global scale, dequantized."""
    args: QuantizationArgs = to_args(spec)
    low, high = numerics.value_range(weight, spec)
    gparam = None
    if spec.scale is ScaleFormat.E4M3:
        gparam = generate_gparam(weight.amin(), weight.amax())
    scale, zero = calculate_qparams(low, high, args, global_scale=gparam)
    zero_arg = None if spec.symmetric else zero
    codes = ct_quantize(weight, scale, zero_arg, args, global_scale=gparam)
    deq = ct_dequantize(codes, scale, zero_arg, args, global_scale=gparam, dtype=weight.dtype)
    return codes, scale, zero, gparam, deq


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WEIGHT_SPECS)
def test_weights_match_compressed_tensors_to_the_bit(name: str, dtype: torch.dtype) -> None:
    spec = WEIGHT_SPECS[name]
    gen = torch.Generator().manual_seed(7)
    weight = torch.randn(48, 384, generator=gen).mul(0.05).to(dtype)
    weight[3] *= 40  # an outlier row
    if dtype is not torch.float16 or spec.scale is not ScaleFormat.E8M0:
        weight[5, :64] = 0  # whole groups of zeros
    codes, scale, zero, _, deq = theirs(weight, spec)
    q = numerics.quantize_weight(weight, spec)
    assert torch.equal(numerics.code_values(q, dtype).float(), codes.float())
    stored = numerics.float_scale(numerics.QTensor(q.codes, q.scale, None, spec), dtype=scale.dtype)
    assert torch.equal(stored.float().reshape(-1), scale.float().reshape(-1))
    if q.zero is not None:
        live = numerics.to_groups(weight, spec).abs().amax(-1) > 0
        assert torch.equal(q.zero[live], zero.reshape(q.zero.shape)[live])
    ours = numerics.dequantize(q, dtype)
    if spec.scale is ScaleFormat.E8M0:  # theirs multiplies in the weight's dtype
        torch.testing.assert_close(ours, deq, rtol=2**-7, atol=0)
    else:
        assert torch.equal(ours, deq)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [s.name for s in SCHEMES.values() if s.input])
def test_inputs_match_compressed_tensors_to_the_bit(name: str, dtype: torch.dtype) -> None:
    spec = SCHEMES[name].input
    assert spec is not None
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(2, 9, 256, generator=gen).to(dtype)
    x[0, 0, 5] = 200.0
    x[1, 2] = 0
    args = to_args(spec)
    if spec.dynamic:
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
        ours = numerics.fake_quantize_input(x, spec)
    else:
        scale, zero = calculate_qparams(x.amin(), x.amax(), args)
        ours = numerics.fake_quantize_input(x, spec, scale)
    assert torch.equal(ours, ct_fake_quantize(x, scale, zero, args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mx_exponents_round_as_specified(dtype: torch.dtype) -> None:
    absmax = torch.tensor([1.0, 1.5, 1.74, 1.75, 1.99, 6.0, 7.0, 0.0], dtype=dtype)
    library = SCHEMES["mxfp4a16"].weight
    ocp = parse_scheme(
        {"weight": {"bits": 4, "dtype": "float", "group_size": 32, "scale": "e8m0",
                    "ocp_rounding": True}}
    ).weight  # fmt: skip
    assert numerics.mx_exponents(absmax, library).tolist() == [125, 125, 125, 126, 126, 127, 128, 0]
    assert numerics.mx_exponents(absmax, ocp).tolist() == [125, 125, 125, 125, 125, 127, 127, 0]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(WEIGHT_SPECS)),
    st.integers(0, 2**31 - 1),
    st.floats(1e-4, 1e3),
)
def test_quantizing_the_dequantized_weight_changes_nothing(
    name: str, seed: int, size: float
) -> None:
    """fp32: a grid point rounds to itself, under the same scales."""
    spec = WEIGHT_SPECS[name]
    gen = torch.Generator().manual_seed(seed)
    q = numerics.quantize_weight(torch.randn(8, 384, generator=gen) * size, spec)
    scale = numerics.float_scale(numerics.QTensor(q.codes, q.scale, None, spec))
    again = numerics.quantize(
        numerics.dequantize(q, torch.float32), scale, q.zero, spec, q.global_scale
    )
    assert torch.equal(numerics.code_values(again), numerics.code_values(q))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(WEIGHT_SPECS)), st.integers(0, 2**31 - 1))
def test_error_is_at_most_half_a_step(name: str, seed: int) -> None:
    spec = WEIGHT_SPECS[name]
    gen = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 384, generator=gen)
    q = numerics.quantize_weight(weight, spec)
    error = numerics.to_groups((numerics.dequantize(q, torch.float32) - weight).abs(), spec)
    scale = numerics.float_scale(q).reshape(*error.shape[:-1], 1)
    # The largest gap between neighbours: 1 (int), 2 (E2M1), 32 (E4M3); MX may saturate from
    # 7 to 6, and symmetric integers from +qmax + ½ to qmax.
    gap = {"int": 1.0, "float": 2.0 if spec.bits == 4 else 32.0}[spec.dtype]
    slack = 2**-7 * 448
    assert bool((error <= scale * (gap / 2 + (0.001 if gap == 1 else slack * 2**-4)) + 1e-7).all())


def test_nan_weights_are_refused() -> None:
    weight = torch.ones(4, 64)
    weight[1, 2] = float("nan")
    with pytest.raises(QuantkitError, match="holds 1 NaN or infinite"):
        numerics.quantize_weight(weight, SCHEMES["w4a16-g64"].weight)


def test_static_input_needs_a_scale() -> None:
    spec = SCHEMES["fp8-static"].input
    assert spec is not None
    with pytest.raises(QuantkitError, match="without an input scale"):
        numerics.fake_quantize_input(torch.ones(1, 8), spec)
