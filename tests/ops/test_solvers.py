"""Calibration kernels against their plain-torch forms, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantkit import numerics, ops
from quantkit.algorithms import clip
from quantkit.errors import KernelMissingError, QuantkitError
from quantkit.observers import HessianAccumulator
from quantkit.ops import reference_solvers as reference
from quantkit.ops.solvers import CODE_E2M1, CODE_E4M3, CODE_INT
from quantkit.schemes import SCHEMES

KINDS = {"int": (CODE_INT, -8.0, 7.0), "e4m3": (CODE_E4M3, -448.0, 448.0)}
KINDS |= {"e2m1": (CODE_E2M1, -6.0, 6.0), "uint8": (CODE_INT, -128.0, 127.0)}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factor(k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A Hessian of correlated inputs and the upper factor of its inverse."""
    x = randn(4 * k + 8, k, seed=seed) @ (torch.eye(k) + 0.3 * randn(k, k, seed=seed + 1) / k**0.5)
    hessian = (x.t() @ x / len(x)).double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    return hessian, upper.float()


def tables(weight: Tensor, group: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Scales and zeros that use the codes' range and clip a little."""
    _, _, qmax = KINDS[kind]
    groups = int(group.max()) + 1
    largest = torch.stack([weight[:, group == g].abs().amax(1) for g in range(groups)], 1)
    scale = largest.clamp(min=1e-6) / qmax * 0.9
    return scale, torch.round(randn(*scale.shape, seed=5) * qmax / 8)


def objective(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, group: Tensor,
              hessian: Tensor) -> float:  # fmt: skip
    values = codes.double() - (0 if zero is None else zero[:, group].double())
    delta = values * scale[:, group].double() - weight.double()
    return float((delta @ hessian * delta).sum())


# ---- codes -----------------------------------------------------------------------------------


def interesting(kind: str) -> Tensor:
    """Codes, midpoints, their neighbours in fp32, and values out of range: [n, 1]."""
    _, _, qmax = KINDS[kind]
    if kind == "e4m3":
        codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    elif kind == "e2m1":
        codes = torch.tensor(numerics.E2M1)
    else:
        codes = torch.arange(qmax + 1)
    points = torch.cat((codes, (codes[1:] + codes[:-1]) / 2, torch.tensor([qmax * 2, 1e30, 1e-30])))
    points = torch.cat((points, points.nextafter(torch.tensor(math.inf)),
                        points.nextafter(torch.tensor(-math.inf))))  # fmt: skip
    points = torch.cat((points, -points, torch.tensor([math.inf, -math.inf])))
    return points[:, None]


@EVERY_KIND
def test_codes_are_those_of_numerics(isa: str, kind: str) -> None:
    """With unit scales the code of a first column depends on nothing but its value."""
    x = interesting(kind)
    group = torch.zeros(1, dtype=torch.int32)
    codes = ops.gptq_round(x, torch.eye(1), torch.ones(len(x), 1), None, group, *KINDS[kind])
    spec = SCHEMES[{"e4m3": "fp8", "e2m1": "mxfp4a16", "int": "w4a16-g64"}.get(kind, "w8a16")]
    expected = numerics.round_to_codes(x, spec.weight)
    assert torch.equal(codes, expected)
    assert torch.equal(reference.round_codes(x, *KINDS[kind]), expected)
    if kind in ("e4m3", "e2m1"):  # zero keeps its sign
        assert torch.equal(codes.signbit(), x.signbit())


@EVERY_KIND
def test_nan_stays_in_its_row(isa: str, kind: str) -> None:
    _, upper = factor(40)
    w = randn(5, 40)
    w[1, 20] = math.nan
    group = torch.zeros(40, dtype=torch.int64)
    scale = torch.full((5, 1), 0.5)
    codes = ops.gptq_round(w, upper, scale, None, group, *KINDS[kind])
    assert codes[1, 20:].isnan().all()
    assert codes[1, :20].isfinite().all()
    assert codes[[0, 2, 3, 4]].isfinite().all()
    errors = ops.rounding_errors(w, scale[None], None, None, 40, *KINDS[kind])
    assert errors[0, :, 0].isnan().tolist() == [False, True, False, False, False]


# ---- gptq_round ------------------------------------------------------------------------------


@EVERY_KIND
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 7), (16, 8), (53, 130), (100, 77)])
def test_gptq_round(isa: str, kind: str, zeros: bool, n: int, k: int) -> None:
    weight, (hessian, upper) = randn(n, k, seed=n), factor(k)
    group = torch.arange(k) // 32
    scale, zero = tables(weight, group, kind)
    arguments = (weight, upper, scale, zero if zeros else None, group, *KINDS[kind])
    codes, expected = ops.gptq_round(*arguments), reference.gptq_round(*arguments)
    # A value on the edge between two codes falls to either side when sums round differently,
    # and then moves what follows in its row.
    assert float((codes != expected).float().mean()) <= (1e-3 if n * k > 5000 else 1e-2)
    ours, theirs = (
        objective(weight, c, scale, arguments[3], group, hessian) for c in (codes, expected)
    )
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-12)


def test_gptq_round_in_another_order(isa: str) -> None:
    """Columns out of order take the scales of their own groups; int32 groups and strides too."""
    weight, (_, upper) = randn(40, 96), factor(96)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    group = (order // 16).int()
    scale, zero = tables(weight, group, "int")
    wide = ops.gptq_round(weight, upper, scale, zero, group, *KINDS["int"])
    columns = torch.arange(96, dtype=torch.int64)
    own = ops.gptq_round(
        weight.t().contiguous().t(), upper, scale[:, group.long()], zero[:, group.long()], columns,
        *KINDS["int"],
    )  # fmt: skip
    assert torch.equal(wide, own)
    below = upper + torch.full((96, 96), math.nan).tril(-1)  # not read
    assert torch.equal(wide, ops.gptq_round(weight, below, scale, zero, group, *KINDS["int"]))


def test_gptq_round_depends_on_neither_threads_nor_other_rows(isa: str) -> None:
    weight, (_, upper) = randn(130, 70), factor(70)
    group = torch.arange(70) // 16
    scale, _ = tables(weight, group, "int")
    results = []
    for threads in (1, 2, 3, 7):
        ops.set_num_threads(threads)
        results.append(ops.gptq_round(weight, upper, scale, None, group, *KINDS["int"]))
    assert all(torch.equal(results[0], other) for other in results[1:])
    rows = slice(50, 61)
    alone = ops.gptq_round(weight[rows], upper, scale[rows], None, group, *KINDS["int"])
    assert torch.equal(alone, results[0][rows])


# ---- rounding_errors -------------------------------------------------------------------------


@EVERY_KIND
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("k", "group_size"), [(1, 1), (37, 5), (96, 32), (70, 64), (50, 1000)])
def test_rounding_errors(
    isa: str, kind: str, zeros: bool, weighted: bool, k: int, group_size: int
) -> None:
    weight = randn(9, k)
    group = torch.arange(k) // group_size
    scale, zero = tables(weight, group, kind)
    scales = torch.stack([scale * share for share in (1.0, 0.8, 0.5)])
    table = torch.stack([zero, zero + 1, zero - 1]) if zeros else None
    importance = randn(k, seed=2).square() if weighted else None
    for w in (weight, weight.bfloat16(), weight.half()):
        arguments = (w, scales, table, importance, group_size, *KINDS[kind])
        expected = reference.rounding_errors(*arguments)
        torch.testing.assert_close(ops.rounding_errors(*arguments), expected, rtol=2e-5, atol=1e-12)


def test_rounding_errors_do_not_count_lanes_beyond_a_group(isa: str) -> None:
    """A zero point far off would give the padding of a short group an error, or 0 / 0 a NaN."""
    weight, ones = torch.zeros(2, 3), torch.full((1, 2, 1), 1.0)
    errors = ops.rounding_errors(weight, ones, ones * 100, None, 3, CODE_INT, -8.0, 7.0)
    assert torch.equal(errors, torch.full((1, 2, 1), 3 * 93.0**2))
    errors = ops.rounding_errors(torch.ones(2, 3), ones * 0, None, None, 3, CODE_INT, -8.0, 7.0)
    assert torch.equal(errors, torch.full((1, 2, 1), 3.0))


def test_rounding_errors_do_not_depend_on_threads(isa: str) -> None:
    weight, scales = randn(200, 100), randn(4, 200, 7).abs() + 0.1
    results = []
    for threads in (1, 2, 5):
        ops.set_num_threads(threads)
        results.append(ops.rounding_errors(weight, scales, None, None, 16, *KINDS["int"]))
    assert all(torch.equal(results[0], other) for other in results[1:])


# ---- the search that uses them ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "w4a16-g32", "w4a16-channel", "w4a16-asym-g64", "w3a16-asym-g32", "w2a16-g64",
        "w2a16-asym-g32", "fp8", "nvfp4a16", "mxfp4a16",
    ],
)  # fmt: skip
def test_search_is_as_good_as_its_plain_form(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SCHEMES[name].weight
    weight, importance = randn(33, 192).to(dtype), randn(192, seed=1).square()
    scale, zero, global_scale = clip.mse_scales(weight, spec, importance)
    plain, plain_zero, plain_global = clip.dense_search(weight, spec, importance)
    assert (scale.dtype, scale.shape) == (plain.dtype, plain.shape)
    if dtype == torch.float32:  # in bf16 the plain form's errors are rounded, ours are not
        assert float((scale != plain).float().mean()) <= 0.01

    def error(s: Tensor, z: Tensor | None, g: Tensor | None) -> float:
        s = (s if g is None else s / g).float()[None]
        z = None if z is None else z.float()[None]
        size = spec.group_size or 192
        kind = (clip.code_kind(spec), spec.qmin, spec.qmax)
        found = reference.rounding_errors(weight.float(), s, z, importance, size, *kind)
        return float(found.sum())

    assert error(scale, zero, global_scale) <= error(plain, plain_zero, plain_global) * (1 + 1e-5)
    monkeypatch.setattr(clip, "_CANDIDATES", 1)  # a row at a time
    again, zero_again, _ = clip.mse_scales(weight, spec, importance)
    assert torch.equal(again, scale)
    assert zero is None or torch.equal(zero, zero_again)


def test_search_refuses_a_weight_that_is_not_finite() -> None:
    weight = randn(4, 64)
    weight[2, 5] = math.nan
    with pytest.raises(QuantkitError, match="holds 1 NaN or infinite values; the source"):
        clip.mse_scales(weight, SCHEMES["w4a16-g64"].weight)


# ---- syrk_accumulate -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("t", "k"), [(1, 1), (1, 33), (5, 7), (301, 48), (257, 130), (64, 200)])
def test_syrk(isa: str, dtype: torch.dtype, t: int, k: int) -> None:
    x = randn(t, k).to(dtype)
    start = randn(k, k, seed=1)
    acc = start.clone()
    ops.syrk_accumulate(acc, x)
    assert torch.equal(acc.triu(1), start.triu(1))
    exact = (start.double() + x.double().t() @ x.double()).tril()
    torch.testing.assert_close(acc.tril().double(), exact, rtol=1e-5, atol=1e-5 * t**0.5)
    expected = start.clone()
    reference.syrk_accumulate(expected, x)
    torch.testing.assert_close(acc, expected, rtol=1e-5, atol=1e-5 * t**0.5)
    wide = start.double()
    ops.syrk_accumulate(wide, x)
    assert torch.equal(wide.triu(1), start.double().triu(1))
    torch.testing.assert_close(wide.tril(), exact, rtol=1e-5, atol=1e-5 * t**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_syrk_takes_any_strides(isa: str, dtype: torch.dtype) -> None:
    x = randn(70, 50).to(dtype)
    expected = torch.zeros(50, 50)
    ops.syrk_accumulate(expected, x)
    rows = randn(140, 80).to(dtype)
    rows[::2, 7:57] = x
    for view in (rows[::2, 7:57], x.t().contiguous().t()):
        square = torch.zeros(50, 64)
        ops.syrk_accumulate(square[:, :50], view)
        assert torch.equal(square[:, :50], expected)
        assert not square[:, 50:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_syrk_in_parts_and_on_any_threads(isa: str, dtype: torch.dtype) -> None:
    """Parts of whole token blocks add up in the same order: the same bits."""
    x = randn(2048 + 77, 200).to(dtype)
    results = []
    for threads in (1, 2, 5):
        ops.set_num_threads(threads)
        results.append(torch.zeros(200, 200))
        ops.syrk_accumulate(results[-1], x)
    parts = torch.zeros(200, 200)
    for part in (x[:512], x[512:1024], x[1024:]):
        ops.syrk_accumulate(parts, part)
    assert all(torch.equal(results[0], other) for other in [*results[1:], parts])
    ragged = torch.zeros(200, 200)
    for part in x.split(301):
        ops.syrk_accumulate(ragged, part)
    torch.testing.assert_close(ragged, parts, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_syrk_keeps_nan_and_infinity_in_their_columns(isa: str, dtype: torch.dtype) -> None:
    x = randn(33, 60).to(dtype)
    x[32, 20], x[3, 50] = math.nan, math.inf
    acc = torch.zeros(60, 60)
    ops.syrk_accumulate(acc, x)
    bad = ~(acc + acc.tril(-1).t()).isfinite()
    expected = torch.zeros(60, 60, dtype=torch.bool)
    for column in (20, 50):
        expected[column, :] = expected[:, column] = True
    assert torch.equal(bad, expected)


def test_syrk_in_doubles_adds_up_in_any_order(isa: str) -> None:
    """Blocks of fp32 sums, which fp64 holds with digits to spare: the same fp32 value."""
    x = randn(4096, 130).bfloat16()
    forth, back = (torch.zeros(130, 130, dtype=torch.float64) for _ in range(2))
    plain = torch.zeros(130, 130)
    parts = x.split(512)
    for part in parts:
        ops.syrk_accumulate(forth, part)
    for part in reversed(parts):
        ops.syrk_accumulate(back, part)
        ops.syrk_accumulate(plain, part)
    assert torch.equal(forth.float(), back.float())
    assert not torch.equal(forth.float(), plain.tril())


def test_syrk_of_nothing(isa: str) -> None:
    acc = randn(20, 20)
    before = acc.clone()
    ops.syrk_accumulate(acc, torch.empty(0, 20))
    assert torch.equal(acc, before)
    ops.syrk_accumulate(torch.empty(0, 0), torch.empty(5, 0))


def test_hessian_kernels_agree() -> None:
    x = randn(3, 100, 65).bfloat16()
    native, plain = HessianAccumulator(65), HessianAccumulator(65, kernels="reference")
    for accumulator in (native, plain):
        accumulator.update(x)
        accumulator.update(x.double())
    torch.testing.assert_close(native.value(), plain.value(), rtol=1e-5, atol=1e-5)


# ---- what is refused -------------------------------------------------------------------------


def test_wrong_arguments_are_named() -> None:
    w, u, s = torch.ones(4, 8), torch.eye(8), torch.ones(4, 2)
    group, kind = torch.arange(8) // 4, KINDS["int"]
    cases = [
        ((w, u[:7], s, None, group, *kind), r"upper has shape \[7, 8\], must be \[8, 8\]"),
        ((w, u, s[:3], None, group, *kind), r"scale has shape \[3, 2\], must be \[4, 2\]"),
        ((w, u, s, s[:, :1], group, *kind), r"zero has shape \[4, 1\], must be \[4, 2\]"),
        ((w, u, s, None, group + 1, *kind), r"group\[4\] is 2, must be in 0\.\.1"),
        ((w, u, s, None, group.float(), *kind), "group has dtype Float, must be int32"),
        ((w.half(), u, s, None, group, *kind), "weight has dtype Half, must be float32"),
        ((w, u, s, None, group, 3, -1.0, 1.0), "kind 3 is unknown; use 0 for integers"),
        ((w, u, s, None, group, 2, -7.0, 7.0), r"codes of -7\.\.7 are not an ascending"),
    ]
    for arguments, message in cases:
        with pytest.raises(RuntimeError, match=message):
            ops.gptq_round(*arguments)
    with pytest.raises(RuntimeError, match=r"scales has shape \[1, 4, 2\], must be \[1, 4, 3\]"):
        ops.rounding_errors(w, s[None], None, None, 3, *kind)
    with pytest.raises(RuntimeError, match=r"acc has shape \[8, 8\], must be \[K, K\] for x"):
        ops.syrk_accumulate(u, torch.ones(3, 7))
    with pytest.raises(RuntimeError, match="x has dtype Double, must be float32"):
        ops.syrk_accumulate(u, torch.ones(3, 8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="acc must have neighbouring columns"):
        ops.syrk_accumulate(torch.ones(8, 8).t(), torch.ones(3, 8))
    with pytest.raises(KernelMissingError, match="syrk_accumulate has no META kernel"):
        ops.syrk_accumulate(u.to("meta"), w.to("meta"))


# ---- coordinate descent ------------------------------------------------------------------------


def coupling(n: int) -> Tensor:
    x = randn(3 * n + 4, n, seed=7)
    output = x.t() @ x / len(x)
    output.diagonal().add_(0.3)
    return output


def rounded(n: int, k: int, kind: str, zeros: bool) -> tuple[Tensor, ...]:
    """Weight, Hessian, scale, zero, group, and codes rounded to nearest."""
    code, qmin, qmax = KINDS[kind]
    weight, (hessian, _) = randn(n, k, seed=3), factor(k)
    group = torch.arange(k) // max(1, k // 3)
    scale, zero = tables(weight, group, kind)
    if not zeros:
        zero = torch.zeros_like(zero)
    codes = reference.round_codes(weight / scale[:, group] + zero[:, group], code, qmin, qmax)
    return weight, hessian, scale, zero, group, codes


def total(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, group: Tensor,
          hessian: Tensor, output: Tensor | None) -> float:  # fmt: skip
    """tr(G E H Eᵀ) in fp64."""
    error = weight.double() - ((codes - zero[:, group]) * scale[:, group]).double()
    coupled = error if output is None else output.double() @ error
    return float((coupled @ hessian * error).sum())


@EVERY_KIND
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 7), (17, 24), (40, 33)])
def test_descend_codes(isa: str, kind: str, zeros: bool, coupled: bool, n: int, k: int) -> None:
    code, qmin, qmax = KINDS[kind]
    weight, hessian, scale, zero, group, start = rounded(n, k, kind, zeros)
    output = coupling(n) if coupled else None
    before = total(weight, start, scale, zero, group, hessian, output)

    def run(solver: object, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        codes = start.to(dtype).clone()
        error = weight.to(dtype) - (codes - zero[:, group].to(dtype)) * scale[:, group].to(dtype)
        moment = (error @ hessian.to(dtype)).contiguous()
        solver.descend_codes(  # type: ignore[attr-defined]
            codes, moment, hessian.to(dtype), None if output is None else output.to(dtype),
            scale.to(dtype), zero.to(dtype) if zeros else None, group, code, qmin, qmax, 2,
        )  # fmt: skip
        return codes, moment

    expected, _ = run(reference, torch.float64)
    codes, moment = run(ops, torch.float32)
    after = total(weight, codes.double(), scale, zero, group, hessian, output)
    oracle = total(weight, expected, scale, zero, group, hessian, output)
    # A value within a rounding error of a tie may fall to either side, and others follow it.
    assert (codes.double() != expected).float().mean() <= 0.03 + 1 / codes.numel()
    assert after <= before * (1 + 1e-6)
    assert after == pytest.approx(oracle, rel=0.02, abs=1e-6 * before)
    error = weight - (codes - zero[:, group]) * scale[:, group]
    torch.testing.assert_close(moment, (error.double() @ hessian).float(), rtol=1e-3, atol=1e-3)
    assert bool(((codes >= qmin) & (codes <= qmax)).all())


@pytest.mark.parametrize("coupled", [False, True])
def test_descend_codes_does_not_depend_on_threads(isa: str, coupled: bool) -> None:
    code, qmin, qmax = KINDS["int"]
    weight, hessian, scale, zero, group, start = rounded(150, 70, "int", True)
    h, output = hessian.float(), coupling(150) if coupled else None
    found = []
    for threads in (1, 2):
        ops.set_num_threads(threads)
        codes = start.clone()
        moment = ((weight - (codes - zero[:, group]) * scale[:, group]) @ h).contiguous()
        ops.descend_codes(codes, moment, h, output, scale, zero, group, code, qmin, qmax, 3)
        found.append((codes, moment))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("coupled", [False, True])
def test_descend_codes_leaves_what_nothing_excites(isa: str, coupled: bool) -> None:
    code, qmin, qmax = KINDS["int"]
    weight, hessian, scale, zero, group, start = rounded(9, 12, "int", True)
    h, output = hessian.float(), coupling(9) if coupled else None
    h[4], h[:, 4] = 0, 0
    if output is not None:
        output[2], output[:, 2] = 0, 0
    codes = start.clone()
    codes[:, 4] = 3
    moment = ((weight - (codes - zero[:, group]) * scale[:, group]) @ h).contiguous()
    ops.descend_codes(codes, moment, h, output, scale, zero, group, code, qmin, qmax, 3)
    assert bool((codes[:, 4] == 3).all())
    assert bool(codes.isfinite().all())
    if coupled:
        keep = torch.arange(12) != 4
        assert torch.equal(codes[2, keep], start[2, keep])


def test_descend_codes_names_wrong_arguments() -> None:
    codes, moment, h = torch.zeros(2, 3), torch.zeros(2, 3), torch.eye(3)
    scale, group = torch.ones(2, 1), torch.zeros(3, dtype=torch.int32)
    bad = [
        ((codes, torch.zeros(3, 3), h, None, scale, None, group), "moment has shape"),
        ((codes, moment.double(), h, None, scale, None, group), "moment must be contiguous"),
        ((codes, moment, torch.eye(2), None, scale, None, group), "hessian"),
        ((codes, moment, h, torch.eye(3), scale, None, group), "output"),
        ((codes, moment, h, None, scale, None, group + 1), r"group\[0\] is 1"),
    ]
    for arguments, message in bad:
        with pytest.raises(RuntimeError, match=message):
            ops.descend_codes(*arguments, CODE_INT, -8, 7, 1)
