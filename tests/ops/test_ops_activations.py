"""Activation quantizers against compressed-tensors itself, bit for bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import activations, same_bits

from quantkit import ops
from quantkit.ops import reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
QUANTIZERS = {"int8": ops.quantize_int8_per_token, "fp8": ops.quantize_fp8_per_token}
ARGS = {"int8": INT8, "fp8": FP8}
CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def peer_dynamic(x: torch.Tensor, kind: str, group_size: int | None = None):
    """Codes and scale of x [B, T, K] as compressed-tensors computes them."""
    strategy = QuantizationStrategy.GROUP if group_size else QuantizationStrategy.TOKEN
    args = QuantizationArgs(**ARGS[kind], strategy=strategy, group_size=group_size, dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    return quantize(x, scale, zero, args, dtype=CODE_DTYPES[kind]), scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_per_token_matches_compressed_tensors(isa: str, kind: str, dtype: torch.dtype) -> None:
    for seed in range(4):
        x = activations(dtype, seed)
        codes, scale = QUANTIZERS[kind](x)
        expected_codes, expected_scale = peer_dynamic(x, kind)
        assert same_bits(scale, expected_scale)
        assert codes.dtype == CODE_DTYPES[kind]
        assert same_bits(codes, expected_codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_per_block_matches_compressed_tensors(isa: str, dtype: torch.dtype) -> None:
    x = activations(dtype, 7, k=384)
    codes, scale = ops.quantize_fp8_per_block(x, 128)
    expected_codes, expected_scale = peer_dynamic(x, "fp8", 128)
    assert same_bits(scale, expected_scale)
    assert same_bits(codes, expected_codes)


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_static_matches_compressed_tensors(
    isa: str, kind: str, dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    x = activations(dtype, 11)
    scale = torch.tensor([0.037], dtype=scale_dtype)
    args = QuantizationArgs(**ARGS[kind], strategy=QuantizationStrategy.TENSOR)
    expected = quantize(x, scale, torch.zeros(1), args, dtype=CODE_DTYPES[kind])
    native = {"int8": ops.quantize_int8_static, "fp8": ops.quantize_fp8_static}[kind]
    assert same_bits(native(x, scale), expected)


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 700),
    block=st.sampled_from([16, 100, 128]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_width_matches_the_reference(k: int, block: int, dtype: torch.dtype, seed: int) -> None:
    x = activations(dtype, seed, k=max(k, 2))[..., :k]
    for name in ("quantize_int8_per_token", "quantize_fp8_per_token"):
        codes, scale = getattr(ops, name)(x)
        expected_codes, expected_scale = getattr(reference, name)(x)
        assert same_bits(codes, expected_codes)
        assert same_bits(scale, expected_scale)
    codes, scale = ops.quantize_fp8_per_block(x, block)
    expected_codes, expected_scale = reference.quantize_fp8_per_block(x, block)
    assert same_bits(codes, expected_codes)
    assert same_bits(scale, expected_scale)


def test_every_bf16_value_to_fp8_and_int8(isa: str) -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()].reshape(1, -1)
    one = torch.ones(1, dtype=torch.bfloat16)
    assert same_bits(ops.quantize_fp8_static(x, one), reference.quantize_fp8_static(x, one))
    assert same_bits(ops.quantize_int8_static(x, one), reference.quantize_int8_static(x, one))


def test_dequantized_error_is_within_half_a_step() -> None:
    x = activations(torch.float32, 3)
    codes, scale = ops.quantize_int8_per_token(x)
    error = (codes.float() * scale - x).abs()
    # absmax / 127.5 puts the largest value half a step past 127.
    assert bool((error <= 0.501 * scale).all())


def test_nan_and_inf_show_in_the_scale_of_their_row(isa: str) -> None:
    x = torch.randn(4, 64)
    x[1, 3] = torch.nan
    x[2, 3] = torch.inf
    for quantizer in QUANTIZERS.values():
        clean_codes, clean_scale = quantizer(x[[0, 3]])
        codes, scale = quantizer(x)
        assert bool(scale[1].isnan().all())
        assert bool(scale[2].isinf().all())
        assert same_bits(scale[[0, 3]], clean_scale)
        assert same_bits(codes.view(torch.uint8)[[0, 3]], clean_codes.view(torch.uint8))


def test_strided_inputs_and_no_rows() -> None:
    wide = torch.randn(6, 100).bfloat16()
    for x in (wide[::2, 10:60], wide.t(), wide[:0], wide[:, ::2]):
        codes, scale = ops.quantize_int8_per_token(x)
        expected_codes, expected_scale = ops.quantize_int8_per_token(x.contiguous())
        assert codes.shape == x.shape
        assert scale.shape == (x.shape[0], 1)
        assert same_bits(codes, expected_codes)
        assert same_bits(scale, expected_scale)


def test_errors_name_value_rule_and_remedy() -> None:
    with pytest.raises(RuntimeError, match="x has dtype Double, must be float32, float16"):
        ops.quantize_int8_per_token(torch.randn(2, 8).double())
    with pytest.raises(RuntimeError, match=r"scale has shape \[2\], a static .* one value"):
        ops.quantize_fp8_static(torch.randn(2, 8), torch.ones(2))
    with pytest.raises(RuntimeError, match="block 0 must be positive; 128 is usual"):
        ops.quantize_fp8_per_block(torch.randn(2, 8), 0)
    with pytest.raises(RuntimeError, match="its last dimension must not be empty"):
        ops.quantize_int8_per_token(torch.empty(2, 0))
