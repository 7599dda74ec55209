"""Norms, gates and embeddings: rows in their dtype, fp32 inside, rounded once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import same_bits
from torch import Tensor

from quantkit import ops
from quantkit.ops import reference_parts

ROWS = [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HALF_STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def close(y: Tensor, exact: Tensor, slack: float) -> bool:
    """Rounded once to the dtype of y, from a value with a relative error of ``slack``."""
    # Halves below 2^-14 and bf16 below 2^-126 are spaced evenly.
    allowed = (HALF_STEP[y.dtype] + slack) * exact.abs() + 2.0**-25
    return bool(((y.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_matches_the_oracle(
    isa: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    for n in (1, 2, 15, 16, 17, 31, 576, 1000):
        for m in (1, 2, 3, 19, 70):
            residual, weight = torch.randn(m, n) * 3, torch.randn(n)
            branch = torch.randn(m, n).to(dtype)
            exact = residual.double()
            expected = reference_parts.add_rms_norm(exact, branch, weight, 1e-5, torch.float64)
            y = ops.add_rms_norm(residual, branch, weight, 1e-5, out_dtype)
            assert y.dtype == out_dtype
            assert same_bits(residual, (exact).float()), (m, n)  # one addition, rounded once
            assert close(y, expected, 2e-6), (m, n)


def test_add_rms_norm_without_a_branch_leaves_the_residual(isa: str) -> None:
    x, weight = torch.randn(5, 70), torch.rand(70)
    before = x.clone()
    y = ops.add_rms_norm(x, None, weight, 1e-6)
    assert same_bits(x, before)
    assert close(
        y, reference_parts.add_rms_norm(x.double(), None, weight, 1e-6, torch.float64), 2e-6
    )
    zeros = torch.zeros(3, 70)
    assert not ops.add_rms_norm(zeros, None, weight, 1e-6).any()


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_activation_matches_the_oracle(isa: str, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for n in (1, 15, 16, 17, 33, 1000):
        for m in (1, 3, 19):
            x = (torch.randn(m, 2 * n) * 4).to(dtype)
            exact = reference_parts.gated_activation(x.double(), kind)
            y = ops.gated_activation(x, kind)
            assert y.shape == (m, n)
            assert y.dtype == dtype
            # tanh of a large negative number cancels: what is left is an error of the input's size.
            gate, up = x.double().abs().chunk(2, dim=1)
            error = (y.double() - exact).abs()
            allowed = (HALF_STEP[dtype] + 2e-6) * exact.abs() + 3e-7 * gate * up + 2.0**-25
            assert bool((error <= allowed).all()), (m, n)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gates_of_every_size(isa: str, kind: str) -> None:
    """From far below to far above where the exponential saturates; ends stay finite and right."""
    gate = torch.cat((-torch.logspace(-30, 6, 200), torch.zeros(1), torch.logspace(-30, 6, 200)))
    x = torch.cat((gate, torch.ones(401))).reshape(1, -1)
    y = ops.gated_activation(x, kind)
    exact = reference_parts.gated_activation(x.double(), kind)
    assert bool(y.isfinite().all())
    assert bool(((y.double() - exact).abs() <= 1e-6 * gate.abs() + 1e-37).all())
    assert torch.equal(y[0, -20:], gate[-20:])
    assert float(y[0, 185:200].abs().max()) < 1e-29  # -3e3 to -1e6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embed_is_exact(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    table = torch.randn(90, 75).to(dtype)
    for shape in ((1,), (2,), (70,), (3, 5), ()):
        for id_dtype in (torch.int32, torch.int64):
            tokens = torch.randint(0, 90, shape, dtype=id_dtype)
            y = ops.embed(tokens, table)
            assert y.dtype == torch.float32
            assert same_bits(y, table[tokens.long()].float())
            assert same_bits(ops.embed(tokens, table, 8.5), table[tokens.long()].float() * 8.5)
            assert same_bits(ops.embed(tokens, table[:, 3:40]), table[tokens.long(), 3:40].float())


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["silu", "gelu_tanh"]),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_matches_the_reference(
    m: int, n: int, dtype: torch.dtype, kind: str, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(m, 2 * n) * scale).to(dtype)
    y = ops.gated_activation(x, kind)
    exact = reference_parts.gated_activation(x.double(), kind)
    gate, up = x.double().abs().chunk(2, dim=1)
    allowed = (HALF_STEP[dtype] + 2e-6) * exact.abs() + 3e-7 * gate * up + 2.0**-25
    finite = exact.abs() < 6e4  # past that a half overflows, as it should
    assert bool(((y.double() - exact).abs() <= allowed)[finite].all())
    residual = torch.randn(m, 2 * n)
    expected = reference_parts.add_rms_norm(
        residual.double(), x, torch.ones(2 * n), 1e-5, torch.float64
    )
    assert close(ops.add_rms_norm(residual, x, torch.ones(2 * n), 1e-5), expected, 4e-6)


def test_rows_have_the_same_bits_whatever_m_is(isa: str) -> None:
    torch.manual_seed(3)
    residual, branch, weight = torch.randn(300, 203), torch.randn(300, 203), torch.rand(203)
    gates = torch.randn(300, 206).bfloat16()
    after = residual.clone()
    y = ops.add_rms_norm(after, branch, weight, 1e-6)
    z = ops.gated_activation(gates, "silu")
    for m in ROWS:
        part = residual[:m].clone()
        assert same_bits(ops.add_rms_norm(part, branch[:m], weight, 1e-6), y[:m]), m
        assert same_bits(part, after[:m])
        assert same_bits(ops.gated_activation(gates[:m], "silu"), z[:m]), m


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(4)
    residual, branch, weight = torch.randn(50, 203), torch.randn(50, 203), torch.rand(203)
    ops.set_num_threads(1)
    after = residual.clone()
    y = ops.add_rms_norm(after, branch, weight, 1e-6)
    z = ops.gated_activation(branch[:, :202], "gelu_tanh")
    for threads in (2, 3, 7):
        ops.set_num_threads(threads)
        part = residual.clone()
        assert same_bits(ops.add_rms_norm(part, branch, weight, 1e-6), y)
        assert same_bits(part, after)
        assert same_bits(ops.gated_activation(branch[:, :202], "gelu_tanh"), z)


def test_nan_and_inf_reach_their_own_row_only(isa: str) -> None:
    torch.manual_seed(5)
    x, weight = torch.randn(5, 70), torch.rand(70) + 0.1
    clean = ops.add_rms_norm(x.clone(), None, weight, 1e-6)
    poisoned = x.clone()
    poisoned[1, 3], poisoned[3, 9] = torch.nan, torch.inf
    y = ops.add_rms_norm(poisoned, None, weight, 1e-6)
    assert bool(y[1].isnan().all())
    assert bool(y[3, 9].isnan())
    assert same_bits(y[[0, 2, 4]], clean[[0, 2, 4]])
    for kind in ("silu", "gelu_tanh"):
        clean = ops.gated_activation(x, kind)
        y = ops.gated_activation(poisoned, kind)
        assert bool(y[1, 3].isnan())
        assert not bool(y[3, 9].isfinite())
        touched = torch.zeros(5, 35, dtype=torch.bool)
        touched[1, 3] = touched[3, 9] = True
        assert same_bits(y[~touched], clean[~touched])


def test_strided_batched_and_empty_inputs(isa: str) -> None:
    wide = torch.randn(5, 7, 200).bfloat16()
    for x in (wide[..., :96], wide[:, ::2, 4:100], wide.transpose(0, 1), wide[0, 0], wide[:0]):
        y = ops.gated_activation(x, "silu")
        assert y.shape == (*x.shape[:-1], x.shape[-1] // 2)
        assert same_bits(y, ops.gated_activation(x.contiguous(), "silu"))
        residual = torch.randn(x.shape)
        same = residual.clone()
        weight = torch.rand(2 * x.shape[-1])[::2]
        y = ops.add_rms_norm(residual, x, weight, 1e-6)
        assert y.shape == x.shape
        assert same_bits(y, ops.add_rms_norm(same, x.contiguous(), weight.contiguous(), 1e-6))
        assert same_bits(residual, same)
    assert ops.embed(torch.empty(0, 3, dtype=torch.int64), wide[0]).shape == (0, 3, 200)


def test_torch_compile_keeps_the_mutation() -> None:
    weight = torch.rand(64)

    def forward(residual: Tensor, branch: Tensor) -> Tensor:
        y = ops.add_rms_norm(residual, branch * 2, weight, 1e-6)
        return y + residual

    branch, residual = torch.randn(3, 64), torch.randn(3, 64)
    twin = residual.clone()
    expected = forward(residual, branch)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(twin, branch), expected)
    assert same_bits(twin, residual)


def test_errors_name_value_rule_and_remedy() -> None:
    x, weight = torch.randn(2, 64), torch.ones(64)
    cases = [
        (lambda: ops.add_rms_norm(x.half(), None, weight, 1e-6), "residual has dtype Half, must"),
        (lambda: ops.add_rms_norm(x[:, ::2], None, weight[:32], 1e-6), "residual must be contig"),
        (lambda: ops.add_rms_norm(x, x[:1], weight, 1e-6), r"branch has shape \[1, 64\], must be"),
        (
            lambda: ops.add_rms_norm(x, None, weight[:3], 1e-6),
            r"weight has shape \[3\], must be \[",
        ),
        (lambda: ops.add_rms_norm(x, x.double(), weight, 1e-6), "branch has dtype Double, must be"),
        (lambda: ops.gated_activation(x[:, :63], "silu"), "its last dimension must be even"),
        (lambda: ops.gated_activation(x.double(), "silu"), "gate_up has dtype Double, must be"),
        (
            lambda: ops.embed(torch.tensor([1, 2]), x),
            r"tokens hold 2 at place 1, must be in 0\.\.1",
        ),
        (lambda: ops.embed(torch.tensor([-1]), x), r"tokens hold -1 at place 0"),
        (lambda: ops.embed(torch.tensor([2**32]), x), r"tokens hold 4294967296 at place 0"),
        (lambda: ops.embed(x[0], x), "tokens have dtype Float, must be int32 or int64"),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(ValueError, match="gate 'relu' is unknown; use 'silu' or 'gelu_tanh'"):
        ops.gated_activation(x, "relu")
    with pytest.raises(ValueError, match=r"output dtype torch\.int8 is not supported"):
        ops.add_rms_norm(x, None, weight, 1e-6, torch.int8)
