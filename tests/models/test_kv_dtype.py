"""A model whose caches hold another type, and what that costs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.cli.kernels import KvDtype
from quantkit.cli.main import run
from quantkit.errors import UsageError
from quantkit.models.kv_dtype import with_kv_dtype
from quantkit.models.load import load_runtime
from quantkit.models.runtime import Runtime
from quantkit.ops.page_store import KV_DTYPES
from quantkit.results import Results

IDS = list(range(10, 150))


@pytest.fixture(scope="module")
def runtime(tiny: Path) -> Runtime:
    return load_runtime(tiny)


def test_every_type(runtime: Runtime) -> None:
    """bf16 is the model's own; int8 is nearer to it than fp8 is."""
    assert runtime.decoder is not None
    exact = runtime.logits(IDS).double()
    errors = {}
    for dtype in ("bf16", "int8", "fp8"):
        other = with_kv_dtype(runtime, dtype)
        errors[dtype] = float((other.logits(IDS).double() - exact).abs().max() / exact.std())
        assert other.fingerprint["kernels"] == f"{runtime.fingerprint['kernels']}+kv-{dtype}"
        assert other.decoder is not None
        shape, width = other.decoder.shape, 2 if dtype == "bf16" else 1
        of_scale = 0 if dtype == "bf16" else 4  # fp32, of a key or a value of a head
        each = shape.kv_heads * (shape.head_dim * width + of_scale)
        assert other.decoder.token_nbytes() == 2 * runtime.model.config.num_hidden_layers * each
    assert 0 == errors["bf16"] < errors["int8"] < errors["fp8"] < 1, errors
    assert torch.equal(runtime.logits(IDS).double(), exact)  # the model itself is as it was
    assert with_kv_dtype(runtime, "auto") is runtime


def test_what_cannot_be(runtime: Runtime, tiny: Path) -> None:
    with pytest.raises(UsageError, match="'int4' is not auto, fp32, bf16, int8, fp8"):
        with_kv_dtype(runtime, "int4")
    with pytest.raises(UsageError, match="fp32 is for a model that computes in fp32"):
        with_kv_dtype(runtime, "fp32")
    with pytest.raises(UsageError, match="needs the native decoder"):
        with_kv_dtype(load_runtime(tiny, kernels="modules"), "int8")


def test_eval_tells_what_it_costs(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "held.txt"
    text.write_text("The order is late and the invoice never came. " * 20)
    kl = {}
    for dtype in ("auto", "int8", "fp8"):
        out = tmp_path / f"{dtype}.json"
        options = ["--text", str(text), "--seq-len", "64", "--kv-cache-dtype", dtype]
        assert run(["eval", str(tiny), "--reference", str(tiny), *options, "-o", str(out)]) == 0
        results = Results.load(out)
        assert results.text is not None
        assert results.text.kl_mean is not None
        kl[dtype] = results.text.kl_mean
        kernels = results.fingerprint["kernels"]
        assert kernels.endswith(f"+kv-{dtype}") == (dtype != "auto")
    assert kl["auto"] < kl["int8"] < kl["fp8"]
    options = ["--kernels", "modules", "--kv-cache-dtype", "int8"]
    assert run(["eval", str(tiny), "--text", str(text), *options]) == 2


@pytest.mark.parametrize("command", [["eval"], ["serve"], ["bench", "decode"]])
def test_a_wrong_name_costs_no_loading(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "nowhere", "--kv-cache-dtype", "int4"]) == 2
    said = capsys.readouterr().err
    assert "'int4'" in said
    assert "nowhere" not in said


def test_the_option_names_every_type() -> None:
    assert set(KvDtype) == {"auto", *KV_DTYPES}
