"""Schemas, fake implementations, torch.compile, and what happens when a library is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ops_cases import random_layer, same_bits

from quantkit import ops
from quantkit.errors import KernelMissingError, UsageError
from quantkit.hadamard import factor
from quantkit.ops import library, reference, schema


class Dtype(int):
    """The code of a dtype, where the Python function takes the dtype itself."""


def example_arguments() -> dict[str, tuple]:
    w4 = random_layer("int4", 20, 64, 32, zero=True, bias=True)
    w8 = random_layer("int8", 20, 64, 32, zero=True)
    x = torch.randn(3, 64)
    xq = torch.randint(-128, 128, (3, 64), dtype=torch.int8)
    floats = ops.pack_float(torch.randn(20, 64).bfloat16())
    kv, kv_scale = ops.new_kv_pages(4, 1, 16, "int8")
    # Two sequences of two and one new tokens; four query heads on one key-value head.
    batch = (
        torch.tensor([0, 2, 3], dtype=torch.int32),
        torch.tensor([63, 0], dtype=torch.int32),
        torch.tensor([[2, 0], [3, 1]], dtype=torch.int32),
    )
    angles = torch.randn(65, 8)
    kv_rows, row_scale = ops.new_kv_rows(4, 1, 64, "int8", "cpu")
    return {
        "pack_w4": (w4.codes,),
        "pack_w8": (w8.codes,),
        "pack_float": (x,),
        "w4_linear": (x, w4.packed, w4.scale, w4.zero, w4.lut, w4.bias, 20, 32),
        "w8_linear": (x, w8.packed, w8.scale, w8.zero, None, 1, 32),
        "w8a8_linear": (xq, torch.ones(3, 1), w8.packed, torch.ones(20), None, 2),
        "int8_linear": (
            xq,
            torch.ones(3, 2),
            w4.packed,
            w4.scale,
            w4.zero,
            w4.lut,
            w4.bias,
            20,
            32,
            2,
            32,
        ),
        "float_linear": (x, floats, w4.bias, 20),
        "w4a16_linear": (
            x.bfloat16(),
            ops.pack_w4a16(w4.codes),
            ops.pack_w4a16_table(w4.scale.bfloat16()),
            None,
            None,
            ops.new_w4a16_counters(20, "cpu"),
            20,
            32,
        ),
        "w8a16_linear": (
            x.bfloat16(),
            ops.pack_w8_mma(w8.codes),
            ops.pack_w4a16_table(w8.scale.bfloat16()),
            None,
            ops.new_w4a16_counters(20, "cpu"),
            20,
            1,
            32,
        ),
        "w8a8_mma_linear": (
            xq,
            torch.ones(3, 1),
            ops.pack_w8_mma(w8.codes),
            torch.ones(20),
            None,
            ops.new_w4a16_counters(20, "cpu"),
            20,
            -1,
            Dtype(2),
        ),
        "fp4a16_linear": (
            x.bfloat16(),
            ops.pack_fp4_mma(w4.codes),
            ops.pack_fp4_scales(torch.rand(20, 4).to(torch.float8_e4m3fn)),
            torch.ones(1),
            None,
            ops.new_w4a16_counters(20, "cpu"),
            20,
            0,
            16,
        ),
        "dequantize_w4": (w4.packed, w4.scale, w4.zero, w4.lut, 20, 64, 32, 2),
        "dequantize_w8": (w8.packed, w8.scale, w8.zero, 20, 64, 1, 32, 0),
        "quantize_int8_per_token": (x,),
        "quantize_int8_per_group": (x, 24),
        "quantize_int8_static": (x, torch.ones(1)),
        "quantize_fp8_per_token": (x,),
        "quantize_fp8_per_block": (x, 32),
        "quantize_fp8_static": (x, torch.ones(1)),
        "add_rms_norm": (x.clone(), x.bfloat16(), torch.ones(64), 1e-6, 2),
        "add_rms_norm_quantize": (x.clone(), x.bfloat16(), torch.ones(64), 1e-6, Dtype(2), 2, -1),
        "gated_activation": (x, 1),
        "gated_activation_quantize": (x.half(), 0, 1, -1),
        "hadamard": (x, factor(32), 32),
        "hadamard_mma": (x.half(), ops.pack_hadamard(factor(32)), 16, 32),
        "hadamard_mma_quantize": (x.half(), ops.pack_hadamard(factor(32)), 16, 32, 1, -1),
        "gated_hadamard_mma_quantize": (x.half(), ops.pack_hadamard(factor(32)), 16, 32, 0, 2, -1),
        "embed": (torch.tensor([[1, 2, 0]]), x, 2.0),
        "rope_store_kv": (
            torch.randn(3, 96),
            torch.ones(16),
            None,
            angles.cos(),
            angles.sin(),
            *batch,
            kv,
            kv_scale,
            2,
            1e-6,
        ),
        "paged_attention": (torch.randn(3, 4, 16), *batch, kv, kv_scale, 2, 0.25, 0.0, 0),
        "rope_store_kv_rows": (
            torch.randn(3, 6 * 64).bfloat16(),
            torch.ones(64),
            None,
            angles.cos(),
            angles.sin(),
            *batch,
            kv_rows,
            row_scale,
            None,
            2,
            1e-6,
        ),
        "paged_decode_attention": (
            torch.randn(2, 4, 64).bfloat16(),
            torch.tensor([65, 1], dtype=torch.int32),
            batch[2],
            kv_rows,
            row_scale,
            2,
            0.25,
            0.0,
            0,
        ),
        "gptq_round": (
            x,
            torch.eye(64),
            torch.ones(3, 1),
            None,
            torch.zeros(64, dtype=torch.int64),
            0,
            -8.0,
            7.0,
        ),
        "descend_codes": (
            torch.zeros(3, 64),
            x.clone(),
            torch.eye(64),
            torch.eye(3),
            torch.ones(3, 1),
            None,
            torch.zeros(64, dtype=torch.int64),
            0,
            -8.0,
            7.0,
            1,
        ),
        "rounding_errors": (x, torch.ones(2, 3, 4), None, torch.ones(64), 16, 0, -8.0, 7.0),
        "syrk_accumulate": (torch.zeros(64, 64), x),
    }


@pytest.mark.parametrize("name", [n for n in schema.SCHEMAS if n not in schema.CUDA_ONLY])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.quantkit, name).default, example_arguments()[name])


@pytest.mark.parametrize("name", sorted(schema.CUDA_ONLY))
def test_an_operator_without_a_cpu_kernel(name: str) -> None:
    arguments = example_arguments()[name]
    public = [schema.CODE_DTYPES[a] if isinstance(a, Dtype) else a for a in arguments]
    with pytest.raises(KernelMissingError, match=f"{name} has no CPU kernel"):
        getattr(ops, name)(*public)
    expected = getattr(ops.get_backend("reference"), name)(*public)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    shapes = getattr(torch.ops.quantkit, name).default(*meta)
    assert torch.utils._pytree.tree_map(lambda t: (t.shape, t.dtype), shapes) == (
        torch.utils._pytree.tree_map(lambda t: (t.shape, t.dtype), expected)
    )


@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_both_backends_have_every_operator(name: str) -> None:
    assert callable(getattr(ops.get_backend("native"), name))
    assert callable(getattr(ops.get_backend("reference"), name))
    assert callable(getattr(ops, name))


def test_torch_compile_traces_without_a_graph_break() -> None:
    layer = random_layer("int4", 32, 64, 32)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(layer(x)) + 1

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    assert same_bits(compiled(x), forward(x))


def test_unknown_backend_and_operator() -> None:
    with pytest.raises(UsageError, match="kernels 'cuda' is unknown; use one of native, reference"):
        ops.get_backend("cuda")
    with pytest.raises(AttributeError, match="'w5_linear' is not an operator"):
        _ = ops.get_backend("native").w5_linear


def test_a_missing_library_names_the_build_command(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = library.NativeLibrary("libquantkit_nowhere.so", "qk_abi_version")
    assert not missing.load()
    with pytest.raises(KernelMissingError, match=r"is not built .* build it with `make native`"):
        missing.require()
    monkeypatch.setattr(library, "CPU", missing)
    with pytest.raises(KernelMissingError, match="make native"):
        ops.pack_w4(torch.zeros(4, 4, dtype=torch.uint8))


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI_VERSION", -1)
    stale = library.NativeLibrary(library.CPU.file_name, "qk_abi_version")
    with pytest.raises(KernelMissingError, match=r"has ABI version \d+, this package needs -1"):
        stale.require()


def test_operators_without_a_kernel_for_a_device_say_so() -> None:
    with pytest.raises(KernelMissingError, match="w8a8_linear has no CUDA kernel"):
        library.require_cpu_kernel("w8a8_linear", SimpleNamespace(device=torch.device("cuda")))


def test_status_reports_what_is_built_and_in_use() -> None:
    ops.set_num_threads(0)
    status = ops.kernel_status()
    cpu = status["cpu"]
    assert cpu["built"]
    assert cpu["loaded"]
    assert cpu["problem"] is None
    assert cpu["isa"] == cpu["isas"][-1]
    assert cpu["threads"] == torch.get_num_threads()
    assert set(status["cuda"]) == {"path", "built", "loaded", "problem", "available"}
    if not torch.cuda.is_available():
        assert not status["cuda"]["loaded"]
        assert status["cuda"]["problem"]


def test_forcing_an_unknown_isa_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"isa 'sse9' .* use one of generic.*auto"):
        ops.set_isa("sse9")


def test_importing_needs_only_torch_and_touches_no_gpu() -> None:
    code = (
        "import sys, quantkit.ops, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "extra = {'transformers', 'compressed_tensors', 'pydantic', 'scipy'} & set(sys.modules)\n"
        "assert not extra, extra\n"
    )
    root = str(Path(ops.__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=120)


def test_reference_runs_in_float64() -> None:
    layer = random_layer("uint4", 20, 64, 32, zero=True)
    x = torch.randn(3, 64, dtype=torch.float64)
    n = layer.codes.shape[0]
    y = reference.w4_linear(x, layer.packed, layer.scale, layer.zero, layer.lut, None, n, 32)
    weight = (layer.codes.double() - layer.zero.double().repeat_interleave(32, 1)) * (
        layer.scale.double().repeat_interleave(32, 1)
    )
    torch.testing.assert_close(y, x @ weight.t(), rtol=1e-12, atol=1e-12)
