"""Blame: what each layer's restoration recovers is what a whole forward pass says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from quantkit import blame as blames
from quantkit import model as models
from quantkit.blame import find_blame
from quantkit.cli.main import run
from quantkit.errors import QuantkitError, UsageError
from quantkit.models.load import load_runtime
from quantkit.models.runtime import Runtime
from tests.run_helpers import arguments

DAMAGED = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, traffic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8-bit weights, but for one layer of 2 bits."""
    folder = tmp_path_factory.mktemp("blame")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "scheme: w8a16\nalgorithm: rtn\nkeep: [lm_head]\n"
        f"rules: [{{match: '{DAMAGED}', scheme: w3a16-g64}}]\n"
        "calibrate: {samples: 4, seq_len: 64}\n"
    )
    assert run(arguments(tiny, recipe, traffic, folder / "out")) == 0
    return folder / "out"


@pytest.fixture
def pair(checkpoint: Path, tiny: Path) -> tuple[Runtime, Runtime]:
    return load_runtime(checkpoint, kernels="modules"), load_runtime(tiny, kernels="modules")


def _sequences() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randint(3, 250, (n,), generator=draw).tolist() for n in (5, 17, 9, 16, 3, 8, 2, 11, 7)
    ]


def _divergence(runtime: Runtime, original: Runtime, sequences: list[list[int]]) -> float:
    """One sequence after another, whole forward passes, fp64."""
    total, count = 0.0, 0
    for ids in sequences:
        p, q = (r.logits(ids).double().log_softmax(-1) for r in (original, runtime))
        total += float((p.exp() * (p - q)).sum())
        count += len(ids)
    return total / count


def test_names_the_layer_that_is_damaged(pair: tuple[Runtime, Runtime]) -> None:
    found = find_blame(*pair, _sequences(), count=2)
    assert found.whole_blocks is None
    assert found.chosen[0].name == found.layers[0].name == DAMAGED
    assert found.chosen[0].kl < 0.5 * found.kl
    assert min(found.blocks, key=lambda r: r.kl).name == "model.layers.1"


def test_equals_whole_forward_passes(pair: tuple[Runtime, Runtime]) -> None:
    candidate, original = pair
    sequences = _sequences()
    found = find_blame(candidate, original, sequences, count=2)
    assert found.tokens == sum(map(len, sequences))
    assert found.kl == pytest.approx(_divergence(candidate, original, sequences), rel=0.05)
    for restored in (*found.blocks, *found.layers[:3], found.chosen[1]):
        saved = {name: candidate.model.get_submodule(name) for name in restored.layers}
        for name in saved:
            models.set_submodule(candidate.model, name, original.model.get_submodule(name))
        expected = _divergence(candidate, original, sequences)
        for name, module in saved.items():
            models.set_submodule(candidate.model, name, module)
        assert restored.kl == pytest.approx(expected, rel=0.05, abs=1e-5), restored.name


def test_leaves_the_candidate_as_it_was(pair: tuple[Runtime, Runtime]) -> None:
    candidate, original = pair
    before = dict(candidate.model.named_modules())
    find_blame(candidate, original, _sequences(), count=1)
    assert dict(candidate.model.named_modules()) == before


def test_moved_norms_leave_only_whole_blocks(pair: tuple[Runtime, Runtime]) -> None:
    candidate, original = pair
    norm = candidate.model.get_submodule("model.layers.0.input_layernorm")
    with torch.no_grad():
        norm.weight.mul_(1.5)  # type: ignore[operator,union-attr]
    found = find_blame(candidate, original, _sequences(), count=1)
    assert found.whole_blocks is not None
    assert "input_layernorm" in found.whole_blocks
    assert not found.layers
    assert found.chosen[0].name.startswith("model.layers.")


def test_rotated_layers_leave_only_whole_blocks(pair: tuple[Runtime, Runtime]) -> None:
    """Heads and MLPs are rotated inside of a block, which shows in quantized layers alone."""
    candidate, original = pair
    rotation = {"residual": False, "heads": True, "mlp": True}
    found = find_blame(
        replace(candidate, manifest={"rotation": rotation}), original, _sequences(), count=1
    )
    assert found.whole_blocks == "the layers of a block are rotated together"
    assert not found.layers
    assert found.chosen[0].name == "model.layers.1"


def test_refuses_a_stream_that_is_another(pair: tuple[Runtime, Runtime]) -> None:
    candidate, original = pair
    with torch.no_grad():
        candidate.model.get_submodule("model.norm").weight.mul_(2)  # type: ignore[operator,union-attr]
    with pytest.raises(UsageError, match="not rotated"):
        find_blame(candidate, original, _sequences())


def test_batches_do_not_matter(
    pair: tuple[Runtime, Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = find_blame(*pair, _sequences(), count=1)
    monkeypatch.setattr(blames, "BATCH", 2)
    monkeypatch.setattr(blames, "POSITIONS", 3)
    assert find_blame(*pair, _sequences(), count=1).kl == pytest.approx(whole.kl, rel=0.02)


def test_explain_from_the_command_line(
    checkpoint: Path,
    tiny: Path,
    traffic: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path, text: str) -> None:
        raise QuantkitError(f"{path}: the disk is full")

    results = tmp_path / "results.json"
    assert run(["eval", str(checkpoint), "--text", str(traffic), "--seq-len", "64",
                "--max-tokens", "64", "-o", str(results)]) == 0  # fmt: skip
    command = ["explain", str(results), "--checkpoint", str(checkpoint), "--reference", str(tiny),
               "--seq-len", "32", "--items", "3"]  # fmt: skip
    assert run(command) == 2  # nothing flipped, no text
    assert "give --text" in capsys.readouterr().err
    recipe = tmp_path / "mended.yaml"
    more = ["--text", str(traffic), "--layers", "1", "-o", str(recipe)]
    capsys.readouterr()
    assert run([*command, *more, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["keep"][-1] == document["chosen"][0]["name"] == DAMAGED
    assert yaml.safe_load(recipe.read_text())["keep"] == ["lm_head", DAMAGED]
    with monkeypatch.context() as patch:  # what was measured is shown all the same
        patch.setattr("quantkit.results.write_text", full)
        assert run([*command, *more]) == 4
    assert DAMAGED in capsys.readouterr().out
    assert run(["explain", str(results), "--checkpoint", str(checkpoint)]) == 2
    document = json.loads(results.read_text())
    document["fingerprint"]["model"] = "0" * 64
    results.write_text(json.dumps(document))
    assert run([*command, *more]) == 5
