"""What the comparison of quality computes and keeps. No peer needed."""

from __future__ import annotations

import argparse
import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import quality_gguf, quality_mixture
from benchmarks import vs_peers_quality as vs
from benchmarks.quality_recipes import BUDGETS, INGREDIENTS, Ours, describe
from quantkit.algorithms import KNOWN
from quantkit.mixture import candidate
from quantkit.recipe import parse_recipe
from quantkit.schemes import SCHEMES
from quantkit.sensitivity import Cost, Layer, Sensitivity

ROW = {
    "seconds": 12.4,
    "peak_rss_bytes": 1.5e9,
    "bits": 4.25,
    "texts": {"wiki": {"kl": 0.1, "kl_error": 0.002, "ppl": 20.0, "top1": 0.8}},
}


def test_standard_error_is_that_of_a_mean_when_windows_are_alike() -> None:
    sums = [8.0, 12.0, 10.0, 14.0]
    mean = sum(sums) / 4
    spread = math.sqrt(sum((s - mean) ** 2 for s in sums) / 3)
    expected = spread / math.sqrt(4) / 10
    assert vs.standard_error([(10, s) for s in sums]) == pytest.approx(expected)
    assert math.isnan(vs.standard_error([(10, 1.0)]))


def test_rows_that_are_there_are_kept_and_other_inputs_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    facts = {"model": {"name": "m"}, "versions": {"torch": "1"}}
    document = vs.unfinished(path, facts)
    document["rows"]["one"] = ROW
    vs.save(path, document)
    assert vs.unfinished(path, facts)["rows"] == {"one": ROW}
    with pytest.raises(SystemExit, match="was measured with another versions; give another -o"):
        vs.unfinished(path, {**facts, "versions": {"torch": "2"}})
    assert json.loads(path.read_text())["rows"] == {"one": ROW}


def test_a_file_that_does_not_name_its_seed_is_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    facts = {"calibration": {"tokens_sha256": "a"}}
    vs.save(path, {**facts, "rows": {"one": ROW}})
    document = vs.unfinished(path, {**facts, "seed": 0})
    assert document == {**facts, "seed": 0, "rows": {"one": ROW}}
    vs.save(path, document)
    with pytest.raises(SystemExit, match="another seed"):
        vs.unfinished(path, {**facts, "seed": 1})


def ask(
    only: list[str] | None,
    peer: str | None = None,
    scheme: str = "w8a8",
    gguf: tuple[tuple[str, str], ...] = (),
) -> list[str]:
    args = argparse.Namespace(only=only, peer_python=peer, scheme=scheme, gguf=list(gguf))
    return vs.wanted(args)


def test_only_known_rows_are_asked_for() -> None:
    assert ask(None) == list(vs.RECIPES["w8a8"])
    assert ask(None, "python") == [*vs.RECIPES["w8a8"], *vs.PEERS["w8a8"]]
    assert ask(["quantkit GPTQ"]) == ["quantkit GPTQ"]
    with pytest.raises(SystemExit, match="known here"):
        ask(["AutoRound"], "python")
    assert ask(["AutoRound"], "python", "w4a16-g64") == ["AutoRound"]


def test_gguf_files_are_rows_of_their_names() -> None:
    file = ("Q4_K_M", "m.gguf")
    assert ask(None, "python", "mixed-4.5", (file,)) == [*vs.RECIPES["mixed-4.5"], "Q4_K_M"]
    assert ask(["Q4_K_M"], None, "mixed-4.5", (file,)) == ["Q4_K_M"]
    for twice in ((file, file), (("quantkit RTN", "m.gguf"),)):
        with pytest.raises(SystemExit, match="choose another"):
            ask(None, gguf=twice)


def test_a_row_of_another_gguf_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    vs.check_files([("Q4", str(path))], {})
    with pytest.raises(SystemExit, match="the row is of another file"):
        vs.check_files([("Q4", str(path))], {"Q4": {**ROW, "sha256": "0"}})


@pytest.mark.parametrize("scheme", vs.PEERS)
def test_what_peers_run_is_python(scheme: str) -> None:
    for write in vs.PEERS[scheme].values():
        ast.parse(write(SCHEMES[scheme]))


@pytest.mark.parametrize("scheme", vs.RECIPES)
def test_recipes_are_recipes(scheme: str) -> None:
    assert scheme in describe(scheme)
    for row in vs.RECIPES[scheme].values():
        if not row.mixed:
            recipe = parse_recipe(row.recipe(), known_algorithms=KNOWN)
            assert recipe.algorithm
            assert recipe.keep == ("lm_head",)


@pytest.mark.parametrize("scheme", BUDGETS)
def test_a_budget_has_each_algorithm_uniform_and_mixed(scheme: str) -> None:
    """Uniform rows keep within the budget, and one of them uses it up."""
    shape, rows = (64, 768), vs.RECIPES[scheme].values()
    uniform = [row for row in rows if not row.mixed]
    recipes = [parse_recipe(row.recipe(), known_algorithms=KNOWN) for row in uniform]
    bits = [r.scheme.weight.stored_bits(shape) / (shape[0] * shape[1]) for r in recipes]
    assert max(bits) == BUDGETS[scheme]
    full = {row.algorithm for row, b in zip(uniform, bits, strict=True) if b == BUDGETS[scheme]}
    assert {row.algorithm for row in rows if row.mixed} <= full


def test_bits_count_scales_of_the_blocks_layers(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.zeros(8, 128),
        "model.layers.0.input_layernorm.weight": torch.zeros(128),
        "model.embed_tokens.weight": torch.zeros(50, 128),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert vs.bits_per_weight(SCHEMES["w4a16-g64"].weight, tmp_path) == 4.25
    assert vs.bits_per_weight(SCHEMES["w8a8"].weight, tmp_path) == 8 + 16 / 128


# --- mixtures --------------------------------------------------------------------------------


def test_one_line_of_a_mixtures_recipe_is_replaced() -> None:
    recipe = "# algorithm: none\nscheme: w4a16-g64\nalgorithm: gptq\nkeep: [lm_head]\n"
    changed = quality_mixture.with_algorithm(recipe, r"[rotate, gptq]  # \1")
    assert changed == recipe.replace("algorithm: gptq", r"algorithm: [rotate, gptq]  # \1")
    for wrong in ("scheme: w4a16-g64\n", recipe + "algorithm: rtn\n"):
        with pytest.raises(SystemExit, match="lines `algorithm:`"):
            quality_mixture.with_algorithm(wrong, "rtn")


def test_a_process_is_measured_and_must_succeed() -> None:
    held = "x = bytearray(200_000_000); x[::4096] = b'1' * len(x[::4096])"
    seconds, peak = quality_mixture.run_measured([sys.executable, "-c", held])
    assert seconds > 0
    assert peak > 200_000_000
    with pytest.raises(subprocess.CalledProcessError):
        quality_mixture.run_measured([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_sensitivity_file_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "s.json"
    args = argparse.Namespace(
        sensitivity=file,
        data="c4",
        sensitivity_samples=4,
        sensitivity_seq_len=8,
        seed=3,
        scheme="mixed-4.5",
    )
    commands: list[list[str]] = []

    def inspect(command: list[str]) -> tuple[float, int]:
        commands.append(command)
        file.write_text("costs")
        return 7.0, 10

    monkeypatch.setattr(quality_mixture, "run_measured", inspect)
    first = quality_mixture.measure_once(args, tmp_path, None)
    assert (first["seconds"], first["peak_rss_bytes"]) == (7.0, 10)
    assert quality_mixture.measure_once(args, tmp_path, first) == first
    shared = quality_mixture.measure_once(args, tmp_path, None)  # by another budget
    assert (shared["seconds"], shared["sha256"]) == (None, first["sha256"])
    # The file is held against the model, data and settings by the command itself, every time.
    assert len(commands) == 3
    assert all(" ".join(c).endswith("--samples 4 --seq-len 8 --seed 3") for c in commands)
    args.scheme = "mixed-3.25"
    quality_mixture.measure_once(args, tmp_path, first)
    assert commands[-1][-2:] == ["--schemes", ",".join(INGREDIENTS["mixed-3.25"])]
    with pytest.raises(SystemExit, match="another sensitivity file"):
        quality_mixture.measure_once(args, tmp_path, {**first, "sha256": "0"})


def test_the_mixture_of_a_sensitivity_file_becomes_a_recipe(tmp_path: Path) -> None:
    """Two layers, of which one suffers at 4 bits and the other does not."""
    layers = {}
    for index, kl in enumerate((1e-6, 1e-1)):
        name = f"model.layers.{index}.mlp.down_proj"
        costs = {
            "w4a16-g64": Cost(bits=4096 * 17 // 4, kl=kl, error=0.0, direct=kl),
            "w6a16-g64": Cost(bits=4096 * 25 // 4, kl=kl / 100, error=0.0, direct=kl / 100),
        }
        layers[name] = Layer((64, 64), name, costs)
    file, recipe = tmp_path / "s.json", tmp_path / "mixed.yaml"
    Sensitivity(
        origin={"weights": "w", "data": "d", "solver": "gptq"},
        source="m",
        data=("c4.jsonl",),
        samples=4,
        seq_len=8,
        head="lm_head",
        schemes={label: candidate(label)[1] for label in ("w4a16-g64", "w6a16-g64")},
        layers=layers,
    ).save(file)
    facts = quality_mixture.write_mixture(file, Ours("mixed-5.5", "{gptq: {fisher: 0.5}}"), recipe)
    assert facts["layers"] == {"w4a16-g64": 1, "w6a16-g64": 1}
    assert facts["predicted_kl"] == pytest.approx(1e-6 + 1e-3)
    parsed = parse_recipe(recipe.read_text(), known_algorithms=KNOWN)
    assert parsed.algorithm[0].options["fisher"] == 0.5
    assert len(parsed.rules) == 1


# --- GGUF files ------------------------------------------------------------------------------


def write_gguf(path: Path, blocks: dict[str, gguf.GGMLQuantizationType]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for name, kind in blocks.items():
        data = gguf.quants.quantize(np.ones((4, 256), np.float32), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_bits_of_a_gguf_file_are_its_blocks(tmp_path: Path) -> None:
    path, types = tmp_path / "m.gguf", gguf.GGMLQuantizationType
    write_gguf(
        path,
        {
            "blk.0.ffn_up.weight": types.Q4_0,  # 16 bits of scale for 32 weights: 4.5
            "blk.0.ffn_down.weight": types.Q8_0,  # 8.5
            "token_embd.weight": types.F16,
        },
    )
    assert quality_gguf.block_bits(path) == 6.5
    write_gguf(path, {"token_embd.weight": types.F16})
    with pytest.raises(SystemExit, match="no blk"):
        quality_gguf.block_bits(path)


def test_a_grafted_model_has_the_files_matrices_and_nothing_else_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up, norm, embedding = (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
    )
    shapes = {up: (8, 32), norm: (32,), embedding: (10, 32)}
    ours, theirs = tmp_path / "original", tmp_path / "dequantized"
    for folder, value in ((ours, 1.0), (theirs, 2.0)):
        folder.mkdir()
        tensors = {k: torch.full(s, value, dtype=torch.bfloat16) for k, s in shapes.items()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"value": value}))
    monkeypatch.setattr("quantkit.model.resolve", lambda source: theirs)
    quality_gguf.graft(Path("m.gguf"), ours, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: float(t.flatten()[0]) for key, t in found.items()} == {
        up: 2.0, norm: 1.0, embedding: 1.0,
    }  # fmt: skip
    assert (tmp_path / "out" / "config.json").read_text() == (ours / "config.json").read_text()

    save_file({up: torch.zeros(8, 16, dtype=torch.bfloat16)}, theirs / "model.safetensors")
    with pytest.raises(SystemExit, match=r"\[8, 16\] where .* has \[8, 32\]"):
        quality_gguf.graft(Path("m.gguf"), ours, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("levels", "grid"), [(16, True), (17, False)])
def test_an_original_that_was_4_bit_blocks_is_known(
    tmp_path: Path, levels: int, grid: bool
) -> None:
    weight = torch.arange(32).remainder(levels).float().repeat(4, 2)  # [4, 64]
    weight[:, 32:] += 100  # another block, other values
    save_file({"model.layers.0.mlp.up_proj.weight": weight}, tmp_path / "model.safetensors")
    assert quality_gguf.on_a_grid(tmp_path) is grid
