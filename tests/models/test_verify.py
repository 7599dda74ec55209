"""`quantkit verify` and loading: numbers that are none, damaged files, missing devices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from quantkit import model as models
from quantkit.checkpoint.write import write_manifest
from quantkit.cli.main import run
from quantkit.errors import QuantkitError, UsageError
from quantkit.model import gguf
from quantkit.models.load import check_target, load_runtime
from quantkit.models.tokenizer import load_tokenizer
from quantkit.models.verify import verify_files
from tests.checkpoint.format_writers import gptq, quantize, write


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize(
    ("tensor", "ok"),
    [
        (torch.tensor([127, 254], dtype=torch.uint8), True),
        (torch.tensor([127, 255], dtype=torch.uint8), False),  # E8M0's NaN
        (torch.tensor([1.0, float("inf")], dtype=torch.bfloat16), False),
        (torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn), False),
    ],
)
def test_numbers_in_every_storage_format(
    tensor: torch.Tensor, ok: bool, manifest: bool, tmp_path: Path, capsys: Any
) -> None:
    """With and without a manifest, and before anything is loaded."""
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a.weight_scale": tensor}, tmp_path / "model.safetensors")
    if manifest:
        write_manifest(tmp_path, {"files": models.hash_folder(tmp_path)})
    [found] = [f for f in verify_files(tmp_path) if f.check == "numbers"]
    assert found.ok is ok
    assert run(["verify", str(tmp_path), "--no-reload"]) == (0 if ok else 4)
    shown = capsys.readouterr().out
    assert ("NaN or infinity in a.weight_scale" in shown) is not ok
    assert "values" not in shown


def test_a_weight_file_that_is_cut_short_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "model.safetensors"
    save_file({"a.weight_scale": torch.ones(99)}, path)
    path.write_bytes(path.read_bytes()[:200])
    assert run(["verify", str(tmp_path), "--no-reload", "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert not document["ok"]
    assert "truncated" in document["checks"][-1]["detail"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in GPTQ's format."""
    from tests.checkpoint.conftest import merging_tokenizer, small_llama

    folder = tmp_path_factory.mktemp("packed")
    small_llama(torch.float16).save_pretrained(folder / "small")
    merging_tokenizer().save_pretrained(folder / "small")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    write(
        folder / "small", folder / "gptq", config, gptq,
        lambda _, weight: quantize(weight, 4, 32, symmetric=True),
    )  # fmt: skip
    return folder / "gptq"


@pytest.mark.parametrize(
    ("file", "content", "kind", "message"),
    [
        ("tokenizer.json", "{}", QuantkitError, "has no tokenizer that can be loaded"),
        ("tokenizer.json", None, QuantkitError, "has no tokenizer that can be loaded"),
        (
            "generation_config.json",
            "[]",
            QuantkitError,
            r"generation_config\.json: cannot be loaded",
        ),
        (
            "generation_config.json",
            "{",
            QuantkitError,
            r"generation_config\.json: cannot be loaded",
        ),
        ("quantkit.json", "[]", QuantkitError, r"quantkit\.json: is no manifest"),
        ("quantkit.json", "{", QuantkitError, r"quantkit\.json:1: not JSON"),
    ],
)
def test_a_quantized_folder_whose_other_files_are_damaged(
    file: str,
    content: str | None,
    kind: type[QuantkitError],
    message: str,
    packed: Path,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(QuantkitError, match=message) as caught:
        load_runtime(folder, kernels="reference")
    assert type(caught.value) is kind


def test_a_tokenizer_that_fails_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(UsageError, match=r"some/model: no tokenizer and config \(ValueError\)"):
        load_tokenizer("some/model")


@pytest.mark.parametrize("device", ["gpu", "mps", "cpu:0", "cuda:x", "cuda:-1", "cuda:", ""])
def test_a_device_that_is_none(device: str) -> None:
    with pytest.raises(UsageError, match=f"device {device}: not one that quantkit runs on"):
        check_target("native", device)


def test_a_cuda_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="torch sees no CUDA device"):
        check_target("native", "cuda:9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match="device cuda:9: torch sees 2 CUDA devices"):
        check_target("native", "cuda:9")
    for device in ("cpu", "cuda", "cuda:1"):
        check_target("native", device)


def test_an_interrupted_conversion_waits_for_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it goes on writing in the folder that is being removed."""
    calls = []

    class Child:
        def __init__(self, **_: object) -> None: ...

        def start(self) -> None:
            calls.append("start")

        def join(self) -> None:
            calls.append("join")
            if calls.count("join") == 1:
                raise KeyboardInterrupt

        def terminate(self) -> None:
            calls.append("terminate")

    context = SimpleNamespace(Process=Child)
    monkeypatch.setattr(gguf.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(gguf, "CACHE", tmp_path / "cache")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3" + bytes(19))
    with pytest.raises(KeyboardInterrupt):
        gguf.convert_gguf(tmp_path / "model.gguf")
    assert calls == ["start", "join", "terminate", "join"]
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []
