"""`quantkit export`: what is written is the checkpoint's codes and scales, by others' rules."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit import numerics
from quantkit.checkpoint.export_gptq import to_gptq
from quantkit.checkpoint.gguf_blocks import block_type, to_blocks
from quantkit.checkpoint.gguf_tokenizer import name_rules
from quantkit.checkpoint.half import to_half
from quantkit.checkpoint.layer import StoredLayer
from quantkit.cli.main import run
from quantkit.errors import UsageError
from quantkit.models.load import load_runtime
from quantkit.numerics import QTensor
from quantkit.schemes import SCHEMES, QuantSpec, parse_scheme
from tests.checkpoint.conftest import merging_tokenizer, small_llama
from tests.checkpoint.format_writers import Codes, gptq, quantize, write
from tests.checkpoint.test_every_scheme import export as calibrated
from tests.run_helpers import contents, leftovers

BLOCKS = {
    "w8a16": "Q8_0",
    "w8a8": "Q8_0",
    "w8a16-g32": "Q8_0",
    "w8a16-g128": "Q8_0",
    "w4a16-g32": "Q4_0",
    "w4a16-g96": "Q4_0",
    "w4a16-channel": "Q4_0",
    "w3a16-g64": "Q4_0",
    "w2a16-g32": "Q4_0",
    "w3a16-asym-g64": "Q4_1",
    "w2a16-asym-g32": "Q4_1",
    "w4a16-asym-g32": "Q4_1",
    "w4a16-asym-g128": "Q4_1",
    "mxfp4a16": "MXFP4",
}
IDS = list(range(5, 38))


def random_weight(spec: QuantSpec, dtype: torch.dtype = torch.bfloat16) -> QTensor:
    weight = torch.randn(24, 384, generator=torch.Generator().manual_seed(7)) * 0.05
    return numerics.quantize_weight(weight.to(dtype), spec)


def in_fp32(q: QTensor) -> torch.Tensor:
    """codes × scales without any rounding of the product."""
    return numerics.dequantize(
        QTensor(q.codes, numerics.float_scale(q), q.zero, q.spec) if q.spec.scale == "model" else q,
        torch.float32,
    )


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_codes_times_scales(name: str) -> None:
    q = random_weight(SCHEMES[name].weight)
    assert block_type(q.spec, q.shape, "a") == BLOCKS[name]
    data, rounding = to_blocks(q, "a")
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[BLOCKS[name]])
    ours = in_fp32(q).numpy()
    if BLOCKS[name] != "Q4_1":
        assert rounding.changed == 0
        assert np.array_equal(theirs, ours)
        return
    # An offset is a product of 8 and 4 bits, and fp16 has 11: half a unit in the last place.
    # Fewer bits fit, as do the wide groups' zero points, which are all near the middle.
    assert (rounding.changed > 0) == (name == "w4a16-asym-g32")
    assert rounding.worst <= 2**-11
    assert q.zero is not None
    offset = numerics.float_scale(q) * (q.zero.float() + 2 ** (q.spec.bits - 1))
    bound = offset.repeat_interleave(q.shape[1] // offset.shape[1], 1).numpy() * 2**-11
    assert (np.abs(theirs - ours) <= bound * (1 + 1e-5)).all()


def test_asymmetric_blocks_are_exact_where_offsets_fit() -> None:
    q = random_weight(SCHEMES["w4a16-asym-g32"].weight)
    q = QTensor(q.codes, torch.full_like(q.scale, 0.0625), q.zero, q.spec)
    data, rounding = to_blocks(q, "a")
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_1)
    assert rounding.changed == 0
    assert np.array_equal(theirs, in_fp32(q).numpy())


def test_scales_in_fp16() -> None:
    x = torch.tensor([1.0, 2.0**-17, 65280.0], dtype=torch.bfloat16)
    assert to_half(x, "a")[1].changed == 0
    _, rounding = to_half(torch.tensor([0.1, 1.0, 3e-8]), "a")
    assert (rounding.total, rounding.changed) == (3, 2)
    assert rounding.worst == pytest.approx(1.0, abs=0.02)  # 2^-24 stands for 3e-8, or so
    with pytest.raises(UsageError, match="above fp16's 65504"):
        to_half(torch.tensor([1e5], dtype=torch.bfloat16), "a")


@pytest.mark.parametrize(
    ("spec", "columns", "message"),
    [
        ("fp8", 64, "no GGUF type holds fp8 channel"),
        ("nvfp4a16", 64, "groups of 16"),
        ("fp8-block", 256, "block \\(128, 128\\)"),
        ({"weight": {"bits": 8, "symmetric": False}}, 64, "no GGUF type holds int8 asym"),
        ("w8a16", 48, "in_features 48 is not divisible by 32"),
    ],
)
def test_weights_that_no_block_holds(spec: Any, columns: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        block_type(parse_scheme(spec).weight, (64, columns), "a")


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_tensors_are_those_of_the_literal_packer(
    bits: int, symmetric: bool, scattered: bool
) -> None:
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(1)).half()
    layer = quantize(weight, bits, 32, symmetric=symmetric, scattered=scattered)
    for version in (1, 2):
        tensors, rounding = to_gptq(stored(layer, symmetric), version, "a")
        expected = gptq(layer, version=version)
        assert rounding.changed == 0
        assert tensors.keys() == expected.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, expected[key]), key


def stored(layer: Codes, symmetric: bool) -> StoredLayer:
    middle = 2 ** (layer.bits - 1)
    order = torch.argsort(layer.group, stable=True)
    codes = (layer.codes - middle).to(torch.int8)[:, order]
    zero = None if symmetric else (layer.zero - middle).to(torch.int8)
    spec = parse_scheme(
        {"weight": {"bits": layer.bits, "group_size": 32, "symmetric": symmetric}}
    ).weight
    plain = torch.equal(order, torch.arange(len(order)))
    return StoredLayer(QTensor(codes, layer.scale, zero, spec), order=None if plain else order)


@pytest.fixture(scope="module")
def packed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in GPTQ's format, 4 bits but for one layer of 8."""
    folder = tmp_path_factory.mktemp("packed") / "gptq"
    config = {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True,
        "dynamic": {r"+:.*down_proj": {"bits": 8}},
    }  # fmt: skip
    write(
        small, folder, config, gptq,
        lambda name, weight: quantize(weight, 8 if "down" in name else 4, 32, symmetric=True),
    )  # fmt: skip
    return folder


def test_gptq_there_and_back(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    assert run(["export", str(packed), "--format", "gptq", "-o", str(out)]) == 0
    before, after = (load_file(x / "model.safetensors") for x in (packed, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(load_runtime(packed).logits(IDS), load_runtime(out).logits(IDS))
    assert run(["verify", str(out)]) == 0
    kept = contents(out)
    assert run(["export", str(packed), "--format", "gptq", "-o", str(out)]) == 2
    assert contents(out) == kept
    assert leftovers(out) == [out.name]


def test_a_zero_point_of_zero_makes_version_2(small: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "awq-like", tmp_path / "out"

    def lowest(name: str, weight: torch.Tensor) -> Codes:
        layer = quantize(weight, 4, 32, symmetric=False)
        layer.zero[0, 0] = 0
        return layer

    config = {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False,
        "checkpoint_format": "gptq_v2",
    }  # fmt: skip
    write(small, folder, config, lambda layer: gptq(layer, version=2), lowest)
    assert run(["export", str(folder), "--format", "gptq", "-o", str(out)]) == 0
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    assert written["checkpoint_format"] == "gptq_v2"
    assert torch.equal(load_runtime(folder).logits(IDS), load_runtime(out).logits(IDS))


def test_gguf_file(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.gguf"
    assert run(["export", str(packed), "--format", "gguf", "-o", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tensors"] == {"Q4_0": 6, "Q8_0": 1, "F16": 1, "F32": 3}
    assert document["rounding"]["changed"] == 0
    assert document["size_bytes"] == out.stat().st_size
    assert leftovers(out) == [out.name]
    reader = gguf.GGUFReader(out)
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    dense = load_file(packed.with_name("gptq-plain") / "model.safetensors")
    at = "model.layers.0"
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.attn_norm.weight": f"{at}.input_layernorm.weight",
        "blk.0.ffn_norm.weight": f"{at}.post_attention_layernorm.weight",
        "blk.0.attn_v.weight": f"{at}.self_attn.v_proj.weight",
        "blk.0.attn_output.weight": f"{at}.self_attn.o_proj.weight",
        "blk.0.ffn_gate.weight": f"{at}.mlp.gate_proj.weight",
        "blk.0.ffn_up.weight": f"{at}.mlp.up_proj.weight",
        "blk.0.ffn_down.weight": f"{at}.mlp.down_proj.weight",
        "blk.0.attn_q.weight": f"{at}.self_attn.q_proj.weight",
        "blk.0.attn_k.weight": f"{at}.self_attn.k_proj.weight",
    }
    assert found.keys() == names.keys()
    for name, key in names.items():
        theirs, ours = torch.from_numpy(found[name].copy()), dense[key].float()
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            # llama.cpp's row 2i + j of a head is row 8j + i of ours (16 rows a head).
            heads = [ours[start : start + 16] for start in range(0, len(ours), 16)]
            ours = torch.cat([h[[8 * j + i for i in range(8) for j in range(2)]] for h in heads])
        # The plain model's weights went through fp16; the file's product has fp32.
        assert torch.equal(theirs.half().float().reshape(ours.shape), ours), name
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert not fields["tokenizer.ggml.add_bos_token"]
    assert fields["llama.rope.freq_base"] == 10000.0
    assert len(fields["tokenizer.ggml.tokens"]) == 272
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD271]"
    assert fields["tokenizer.chat_template"] == merging_tokenizer().chat_template


def test_a_gguf_file_that_the_disk_cannot_hold(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever the room ends: in the header, inside a large tensor, one byte before the end."""
    out = tmp_path / "model.gguf"
    assert run(["export", str(packed), "--format", "gguf", "-o", str(out)]) == 0
    size = out.stat().st_size
    out.unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (100, size // 2, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            code = run(["export", str(packed), "--format", "gguf", "-o", str(out)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert code == 4, room
        assert "cannot be written (File too large); free some space" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_two_bits_take_four_in_gguf_and_two_in_gptq(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out, again = tmp_path / "ckpt", tmp_path / "model.gguf", tmp_path / "gptq"
    calibrated(small, SCHEMES["w2a16-asym-g32"], folder)
    assert run(["export", str(folder), "--format", "gguf", "-o", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tensors"]["Q4_1"] == 7
    assert document["notes"] == [
        "codes of fewer than 4 bits take 4: GGUF's own types of them round scales, too"
    ]
    assert run(["export", str(folder), "--format", "gptq", "-o", str(again), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"]["int2"] == 7
    assert torch.equal(load_runtime(folder).logits(IDS), load_runtime(again).logits(IDS))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16"])
def test_the_gguf_loader_reads_back_the_same_model(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.model.gguf.CACHE", tmp_path / "cache")
    source, folder, out = tmp_path / "source", tmp_path / "ckpt", tmp_path / "model.gguf"
    small_llama(torch.bfloat16).save_pretrained(source)
    merging_tokenizer().save_pretrained(source)
    calibrated(source, SCHEMES[scheme], folder)
    assert run(["export", str(folder), "--format", "gguf", "-o", str(out)]) == 0
    ours = load_runtime(folder, kernels="reference")
    theirs = load_runtime(out, kernels="reference")
    assert torch.equal(ours.logits(IDS), theirs.logits(IDS))
    text = "the order is late: 12 parcels"
    assert theirs.tokenizer(text).input_ids == ours.tokenizer(text).input_ids


def changed(source: Path, folder: Path, **values: Any) -> Path:
    """A copy whose config says something else."""
    import shutil

    shutil.copytree(source, folder)
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | values))
    return folder


def test_what_is_refused(
    small: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaled = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    tensors = load_file(packed / "model.safetensors")
    scattered = changed(packed, tmp_path / "scattered", quantization_config=config)
    key = "model.layers.0.mlp.up_proj.g_idx"
    tensors[key] = tensors[key].roll(5)
    save_file(tensors, scattered / "model.safetensors", metadata={"format": "pt"})
    cases = [
        (tmp_path / "nowhere", "gguf", "no such folder"),
        (small, "gguf", "is not quantized"),
        (scattered, "gguf", "activation order"),
        (changed(packed, tmp_path / "dynamic", rope_parameters=scaled), "gguf", "rotary scaling"),
        (changed(packed, tmp_path / "gelu", hidden_act="gelu"), "gguf", "activation 'gelu'"),
    ]
    for folder, fmt, message in cases:
        out = tmp_path / "out.gguf"
        assert run(["export", str(folder), "--format", fmt, "-o", str(out)]) == 2
        assert message in capsys.readouterr().err
        assert leftovers(out) == []
    # GPTQ's format can hold what a GGUF file cannot.
    out = tmp_path / "out"
    assert run(["export", str(scattered), "--format", "gptq", "-o", str(out)]) == 0
    assert torch.equal(load_file(out / "model.safetensors")[key], tensors[key])


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.mark.parametrize(
    ("pre_tokenizer", "whole_words", "name"),
    [
        ({**BYTES, "use_regex": True}, False, "gpt-2"),
        (sequence({"type": "Digits", "individual_digits": True}, BYTES), False, "smollm"),
        (sequence(split(GPT4 % "{1,3}"), {**BYTES, "use_regex": False}), True, "llama-bpe"),
        (sequence(split(GPT4 % ""), {**BYTES, "use_regex": False}), False, "qwen2"),
    ],
)
def test_rules_of_tokenizers(pre_tokenizer: dict[str, Any], whole_words: bool, name: str) -> None:
    tokenizer: dict[str, Any] = {
        "model": {"type": "BPE", "ignore_merges": whole_words},
        "pre_tokenizer": pre_tokenizer,
    }
    assert name_rules(tokenizer, Path("t")) == name
    tokenizer["model"]["ignore_merges"] = not whole_words
    with pytest.raises(UsageError, match="ignore_merges"):
        name_rules(tokenizer, Path("t"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
        ({"pre_tokenizer": {**BYTES, "add_prefix_space": True}}, "add_prefix_space"),
        ({"pre_tokenizer": split("a+")}, "Split"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizes by Lowercase"),
        ({"model": {"type": "Unigram"}}, "a Unigram tokenizer"),
    ],
)
def test_rules_that_have_no_name(change: dict[str, Any], message: str) -> None:
    tokenizer = {"model": {"type": "BPE"}, "pre_tokenizer": {**BYTES, "use_regex": True}}
    with pytest.raises(UsageError, match=message):
        name_rules(tokenizer | change, Path("t"))
