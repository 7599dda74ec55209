"""Configs and manifests that hold other types than they should: a message, and no traceback."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit import model as models
from quantkit.checkpoint.describe import describe
from quantkit.checkpoint.fields import as_integer
from quantkit.checkpoint.formats import open_format
from quantkit.checkpoint.gguf_tokenizer import add_tokenizer
from quantkit.checkpoint.read import read_quantization_config
from quantkit.checkpoint.write import read_manifest
from quantkit.engines.artifact import read_artifact
from quantkit.errors import EXIT_RUNTIME, QuantkitError, UsageError
from quantkit.models.verify import verify_files

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AUTO_ROUND = {**GPTQ, "quant_method": "auto-round"}
WEIGHTS = {"num_bits": 4, "type": "int", "group_size": 32}
OURS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"g": {"targets": ["Linear"], "weights": WEIGHTS}},
}


def read(config: dict[str, Any]) -> None:
    """What loading asks of a config, in its order."""
    reader = open_format(config)
    reader.cache_spec()
    reader.schemes(["a"], {"a.qweight"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": ["a"]}, r"quant_method \['a'\]"),
        ({**GPTQ, "bits": "x"}, "bits: 'x' is not an integer"),
        ({**GPTQ, "bits": 4.5}, "bits: 4.5 is not an integer"),
        ({**GPTQ, "group_size": [32]}, r"group_size: \[32\] is not an integer"),
        ({**GPTQ, "dynamic": {"+:a": 3}}, "dynamic '.:a': 3 where an object"),
        ({**GPTQ, "dynamic": {"+:a": {"bits": "x"}}}, "bits: 'x' is not an integer"),
        ({**GPTQ, "dynamic": [1]}, r"dynamic: \[1\] where an object"),
        ({**GPTQ, "checkpoint_format": ["a"]}, r"checkpoint_format \['a'\]"),
        ({**AUTO_ROUND, "packing_format": ["a"]}, r"packing_format \['a'\]"),
        ({**AUTO_ROUND, "act_bits": "x"}, "act_bits: 'x' is not an integer"),
        ({**AUTO_ROUND, "extra_config": [1]}, r"extra_config: \[1\] where an object"),
        ({**AUTO_ROUND, "extra_config": {"a": 3}}, "extra_config 'a': 3 where an object"),
        ({**AUTO_ROUND, "extra_config": {"a": {"bits": "x"}}}, "bits: 'x' is not an integer"),
        ({**OURS, "config_groups": [1]}, r"config_groups: \[1\] where an object"),
        ({**OURS, "config_groups": {"g": 1}}, "quantization_config cannot be read"),
        ({**OURS, "sparsity_config": [1]}, r"sparsity_config: \[1\] where an object"),
        ({**OURS, "ignore": ["re:("]}, "'re:.' is no regular expression"),
        ({**OURS, "kv_cache_scheme": "fp8"}, "kv_cache_scheme: 'fp8' where an object"),
        ({**OURS, "kv_cache_scheme": {"num_bits": "x"}}, "kv_cache_scheme cannot be read"),
    ],
)
def test_values_of_another_type(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(config)


def test_integers() -> None:
    assert [as_integer(x, "bits") for x in (4, 4.0, "4", -1)] == [4, 4, 4, -1]
    for wrong in (True, None, float("inf"), float("nan"), "4.5", {}):
        with pytest.raises(UsageError, match=r"bits: .* is not an integer"):
            as_integer(wrong, "bits")


#: What reads a checkpoint's config or manifest before anything else of it.
CONFIG: tuple[Callable[[Path], Any], ...] = (
    read_quantization_config,
    verify_files,
    describe,
    lambda folder: read_artifact(str(folder)),
    lambda folder: models.load_config(folder, "model"),
)


@pytest.mark.parametrize("content", [b"[]", b"7", b"{", b'\xff\xfe"', b"\x00"])
@pytest.mark.parametrize("read", CONFIG)
def test_a_config_that_is_no_object(
    read: Callable[[Path], Any], content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"config\.json"):
        read(tmp_path)


@pytest.mark.parametrize("read", CONFIG[:-1])
def test_a_quantization_config_that_is_no_object(
    read: Callable[[Path], Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": [1]}))
    with pytest.raises(UsageError, match=r"quantization_config: \[1\] where an object"):
        read(tmp_path)


def test_a_value_that_transformers_refuses(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": "x"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"damaged config\.json"):
        models.load_config(tmp_path, "model")


@pytest.mark.parametrize("content", ["[]", '{"files": 3}', "{}", "{", ""])
def test_a_manifest_that_is_none(content: str, tmp_path: Path) -> None:
    """The checkpoint is damaged, not the command: exit 4 from whoever reads it."""
    (tmp_path / "quantkit.json").write_text(content)
    (tmp_path / "config.json").write_text("{}")
    for read in (verify_files, describe, read_artifact):
        with pytest.raises(
            QuantkitError, match=r"quantkit\.json(: is no manifest|:1: not JSON)"
        ) as e:
            read(tmp_path)  # type: ignore[operator]
        assert e.value.exit_code == EXIT_RUNTIME


def test_a_manifest_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the checkpoint would not help."""

    def refuse(self: Path, *_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    (tmp_path / "quantkit.json").write_text('{"files": {}}')
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(
        UsageError, match=r"quantkit\.json: cannot be read \(.*Permission denied"
    ) as e:
        read_manifest(tmp_path)
    assert e.value.remedy is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{"}, r"tokenizer\.json:1: not JSON"),
        ({"tokenizer.json": "[]"}, r"tokenizer\.json: \[\] where an object"),
        ({"tokenizer.json": "{}"}, r"tokenizer\.json: no tokenizer"),
        ({"tokenizer_config.json": "[]"}, r"tokenizer_config\.json: \[\] where an object"),
    ],
)
def test_a_tokenizer_that_is_none(
    files: dict[str, str], message: str, small: Path, tmp_path: Path
) -> None:
    from gguf import GGUFWriter

    given = {"tokenizer.json": (small / "tokenizer.json").read_text()} | files
    for name, text in given.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        add_tokenizer(GGUFWriter(tmp_path / "out.gguf", "llama"), tmp_path, 272)
