"""What the comparison of quality computes and keeps. No peer needed."""

from __future__ import annotations

import argparse
import ast
import json
import math
from pathlib import Path

import pytest
import torch
from benchmark_scripts import load_script
from safetensors.torch import save_file

from quantkit.algorithms import KNOWN
from quantkit.recipe import parse_recipe
from quantkit.schemes import SCHEMES

vs = load_script("vs_peers_quality")

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


def test_the_table_has_a_line_a_text() -> None:
    two = {**ROW, "texts": {**ROW["texts"], "books": ROW["texts"]["wiki"]}}
    lines = vs.table({"one": ROW, "two": two}).splitlines()
    assert len(lines) == 4
    assert "0.1000 ± 0.0020" in lines[1]
    assert "80.0%" in lines[1]


def test_only_known_rows_are_asked_for() -> None:
    def ask(only: list[str] | None, peer: str | None = None, scheme: str = "w8a8") -> list[str]:
        args = argparse.Namespace(only=only, peer_python=peer, scheme=scheme)
        names: list[str] = vs.wanted(args)
        return names

    assert ask(None) == list(vs.RECIPES["w8a8"])
    assert ask(None, "python") == [*vs.RECIPES["w8a8"], *vs.PEERS["w8a8"]]
    assert ask(["quantkit GPTQ"]) == ["quantkit GPTQ"]
    with pytest.raises(SystemExit, match="known here"):
        ask(["AutoRound"], "python")
    assert ask(["AutoRound"], "python", "w4a16-g64") == ["AutoRound"]


@pytest.mark.parametrize("scheme", vs.PEERS)
def test_what_peers_run_is_python(scheme: str) -> None:
    for write in vs.PEERS[scheme].values():
        ast.parse(write(SCHEMES[scheme]))


@pytest.mark.parametrize("scheme", vs.RECIPES)
def test_recipes_are_recipes(scheme: str) -> None:
    for algorithm in vs.RECIPES[scheme].values():
        text = f"scheme: {scheme}\nalgorithm: {algorithm}\nkeep: [lm_head]\n"
        assert parse_recipe(text, known_algorithms=KNOWN).algorithm


def test_bits_count_scales_of_the_blocks_layers(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.zeros(8, 128),
        "model.layers.0.input_layernorm.weight": torch.zeros(128),
        "model.embed_tokens.weight": torch.zeros(50, 128),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert vs.bits_per_weight(SCHEMES["w4a16-g64"].weight, tmp_path) == 4.25
    assert vs.bits_per_weight(SCHEMES["w8a8"].weight, tmp_path) == 8 + 16 / 128
