"""`quantkit export --format gptq`: names as on disk, files beside the weights, a failing disk."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit import model as models
from quantkit.checkpoint.export import export
from quantkit.checkpoint.write import guarded_disk, write_manifest
from quantkit.cli.main import run
from quantkit.errors import QuantkitError, UsageError
from quantkit.models.load import load_runtime
from tests.architectures import save
from tests.checkpoint.format_writers import gptq, quantize, write
from tests.conftest import byte_tokenizer
from tests.run_helpers import leftovers

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}


@pytest.fixture(scope="module")
def packed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in GPTQ's format, and what embedding models and old exports have beside."""
    folder = tmp_path_factory.mktemp("packed") / "gptq"
    write(small, folder, CONFIG, gptq, lambda _, w: quantize(w, 4, 32, symmetric=True))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (folder / "modules.json").write_text("[]")
    (folder / "quant_config.json").write_text("{}")
    return folder


def test_an_export_has_the_names_of_the_files_it_came_from(tmp_path: Path) -> None:
    """Mixtral's experts are called otherwise in memory; rules of layers name both."""
    folder, out = save("mixtral", tmp_path / "mixtral"), tmp_path / "out"
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or not ("_proj" in layer or ".experts." in layer):
            tensors[name] = tensor
            continue
        bits = 8 if layer.endswith("w2") else 4
        codes = gptq(quantize(tensor, bits, 32, symmetric=True))
        tensors |= {f"{layer}.{key}": value for key, value in codes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    wide = {r"+:.*\.w2$": {"bits": 8}}
    config["quantization_config"] = CONFIG | {"dynamic": wide}
    (folder / "config.json").write_text(json.dumps(config))

    assert run(["export", str(folder), "--format", "gptq", "-o", str(out)]) == 0
    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    rules = json.loads((out / "config.json").read_text())["quantization_config"]["dynamic"]
    assert len(rules) == 2 * 2 * 4
    stem = r"+:model\.layers\.0"
    for rule in (
        rf"{stem}\.block_sparse_moe\.experts\.3\.w2$",
        rf"{stem}\.mlp\.experts\.3\.w2$",
    ):
        assert rules[rule]["bits"] == 8
    ids = list(range(5, 38))
    logits = [load_runtime(x, kernels="reference").logits(ids) for x in (folder, out)]
    assert torch.equal(*logits)


def test_files_beside_the_weights(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(["export", str(packed), "--format", "gptq", "-o", str(out)]) == 0
    pooling = out / "1_Pooling" / "config.json"
    assert pooling.read_text() == (packed / "1_Pooling" / "config.json").read_text()
    assert (out / "modules.json").exists()
    assert not (out / "quant_config.json").exists()


def test_pooling_is_hashed_and_is_no_weight(packed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    before = models.hash_folder(copy)
    assert "1_Pooling/config.json" in before
    write_manifest(copy, {"files": before})
    assert run(["verify", str(copy), "--no-reload"]) == 0
    (copy / "1_Pooling" / "config.json").write_text("{}")
    assert run(["verify", str(copy), "--no-reload"]) == 4
    shutil.rmtree(copy / "1_Pooling")
    assert run(["verify", str(copy), "--no-reload"]) == 4
    (copy / "quantkit.json").unlink()
    after = models.hash_folder(copy)
    assert models.weight_hash(after) == models.weight_hash(before)
    assert before.keys() - after.keys() == {"1_Pooling/config.json"}


@pytest.mark.parametrize(("side", "message"), [(0, "cannot be read"), (1, "cannot be written")])
def test_a_copy_that_fails_names_the_file_that_failed(
    side: int,
    message: str,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*paths: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(paths[side]))

    monkeypatch.setattr("quantkit.checkpoint.export_gptq.shutil.copyfile", fail)
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=message) as caught:
        export(packed, "gptq", out)
    assert str(caught.value).startswith(f"{(packed, tmp_path)[side]}/")
    assert leftovers(out) == []


def test_a_folder_whose_parent_cannot_be_made(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    folder = blocker / "deep" / "out"
    with pytest.raises(UsageError, match=f"{folder}: cannot be written"), guarded_disk(folder):
        folder.mkdir(parents=True)


def test_a_limit_that_other_libraries_meet(tmp_path: Path) -> None:
    """safetensors and tokenizers raise errors of their own, and no OSError."""
    tokenizer = byte_tokenizer()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    folder = tmp_path / "out"

    def save_tensors() -> None:
        with guarded_disk(folder):
            folder.mkdir()
            save_file({"x": torch.zeros(1 << 16)}, folder / "model.safetensors")

    def save_tokenizer() -> None:
        with guarded_disk(folder):
            folder.mkdir()
            tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))

    for save_part in (save_tensors, save_tokenizer):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, before[1]))
        try:
            with pytest.raises(QuantkitError) as caught:
                save_part()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert re.search(r"/out: cannot be written \(.*File too large", str(caught.value))
        assert caught.value.exit_code == 4
        assert not folder.exists()


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, QuantkitError, "the disk is full; free some space"),
        (errno.EDQUOT, QuantkitError, "the disk is full; free some space"),
        (errno.EROFS, UsageError, "cannot be written"),
    ],
)
def test_a_manifest_that_cannot_be_written(
    number: int,
    kind: type[QuantkitError],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It names the file, and leaves what was there."""
    write_manifest(tmp_path, {"schema": 1})
    before = (tmp_path / "quantkit.json").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("quantkit.results.os.replace", fail)
    with pytest.raises(QuantkitError, match=rf"quantkit\.json: {message}") as caught:
        write_manifest(tmp_path, {"schema": 2})
    assert type(caught.value) is kind
    assert [p.name for p in tmp_path.iterdir()] == ["quantkit.json"]
    assert (tmp_path / "quantkit.json").read_bytes() == before
