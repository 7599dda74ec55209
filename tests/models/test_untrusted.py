"""Model files that want more than to be read: `.gguf` headers that lie, folders that bring code."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from quantkit.errors import QuantkitError, UsageError
from quantkit.model.gguf import convert_gguf
from quantkit.model.gguf_header import check_header
from quantkit.models.load import load_runtime

HUGE = 2**60


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors: int, *fields: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, len(fields)) + b"".join(fields)


def field(kind: int, value: bytes, key: str = "a") -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text("t") + sizes + struct.pack("<IQ", kind, offset)


LIES = {
    "nothing": (b"", "empty"),
    "no magic": (b"PK\3\4" + bytes(40), "begins with"),
    "a version of nobody's": (header(0, version=9), "version 9"),
    "fields without end": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), "0 are left"),
    "tensors without end": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), "0 are left"),
    "a giant key": (header(0, struct.pack("<Q", HUGE)), f"a key of {HUGE} bytes"),
    "a giant string": (header(0, field(8, struct.pack("<Q", HUGE))), f"string of {HUGE} bytes"),
    "a giant array": (header(0, field(9, array(0, HUGE))), f"array of {HUGE} bytes"),
    "an array whose bytes overflow": (header(0, field(9, array(12, 2**63))), f"of {2**66} bytes"),
    "strings without end": (header(0, field(9, array(8, HUGE))), "a number of 8 bytes"),
    "arrays in arrays": (header(0, field(9, array(9, 1) * 50_000)), "nested more than"),
    "a type of nobody's": (header(0, field(77, b"")), "unknown type 77"),
    "a tensor of many dimensions": (header(1) + tensor([1] * 9), "9 dimensions"),
    "a tensor larger than the file": (header(1) + tensor([2**40, 2**40]), "where there are 0"),
    "a tensor far behind the end": (header(1) + tensor([1], offset=HUGE), "where there are 0"),
    "a tensor of no type": (header(1) + tensor([1], kind=4000), "unknown type 4000"),
}


@pytest.mark.parametrize(("data", "message"), LIES.values(), ids=LIES)
def test_a_gguf_file_that_lies_is_refused_before_it_is_read(
    data: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    monkeypatch.setattr("quantkit.model.gguf.CACHE", tmp_path / "cache")
    with pytest.raises(QuantkitError, match="not a sound GGUF file") as told:
        convert_gguf(path)
    assert message in told.value.message
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="module", params=[gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def honest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file by ggml's own writer, with a value of every kind and quantized tensors."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=request.param)
    writer.add_uint8("u8", 1)
    writer.add_bool("b", True)
    writer.add_float64("f", 0.5)
    writer.add_string("s", "some text")
    writer.add_array("words", ["a", "bc", ""])
    writer.add_array("numbers", [1, 2, 3])
    rows = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    writer.add_tensor("plain", rows)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blocks", gguf.quants.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_honest_gguf_file_passes(honest: Path) -> None:
    check_header(honest)


def test_one_cut_short_anywhere_is_refused(honest: Path, tmp_path: Path) -> None:
    data, path = honest.read_bytes(), tmp_path / "cut.gguf"
    rng = random.Random(0)
    for length in {0, 1, 4, 23, len(data) - 400, *rng.sample(range(len(data) - 400), 40)}:
        path.write_bytes(data[:length])
        with pytest.raises(QuantkitError):
            check_header(path)


def test_a_damaged_one_passes_or_is_refused_and_nothing_else(honest: Path, tmp_path: Path) -> None:
    data, path = honest.read_bytes(), tmp_path / "damaged.gguf"
    rng = random.Random(1)
    refused = 0
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(400)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            check_header(path)
        except QuantkitError:
            refused += 1
    assert 0 < refused < 200


EVIL = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
from transformers import PreTrainedTokenizerFast as Words
"""


@pytest.fixture
def with_code(tiny: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model whose folder names code of its own for config, model and tokenizer; and the file
    that this code would make."""
    folder, marker = tmp_path / "model", tmp_path / "it-ran"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words["auto_map"] = {"AutoTokenizer": ["evil.Words", "evil.Words"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder, marker


def test_code_beside_a_known_model_is_not_run(with_code: tuple[Path, Path]) -> None:
    folder, marker = with_code
    runtime = load_runtime(folder)
    assert type(runtime.model).__module__.startswith("transformers.")
    assert type(runtime.tokenizer).__module__.startswith("transformers.")
    assert not marker.exists()


def test_a_model_that_is_nothing_but_code_is_refused(with_code: tuple[Path, Path]) -> None:
    folder, marker = with_code
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(UsageError, match="unknown architecture"):
        load_runtime(folder)
    assert not marker.exists()
