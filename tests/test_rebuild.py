"""`quantkit verify --rebuild`: the manifest alone, and the named inputs, give the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit import model as models
from quantkit import rebuild
from quantkit.cli.main import run
from quantkit.data.card import Card, read_card
from tests.run_helpers import RECIPE, arguments


@dataclass(frozen=True)
class Made:
    """A checkpoint, and its inputs where the run that made it did not have them."""

    checkpoint: Path
    model: Path
    data: tuple[Path, Path]

    @property
    def argv(self) -> list[str]:
        first, second = map(str, self.data)
        given = ["--model", str(self.model), "--data", first, "--data", second]
        return ["verify", str(self.checkpoint), "--no-reload", "--rebuild", *given]


@pytest.fixture(scope="module")
def made(tiny: Path, traffic: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """From two sources, with options on the command line, then everything moved and renamed."""
    folder = tmp_path_factory.mktemp("rebuild")
    recipe = folder / "mine.yaml"
    recipe.write_bytes(RECIPE.replace("\n", "\r\n").encode())  # as some editors save it
    words = folder / "words.txt"
    words.write_text("where is my parcel and when will it come? " * 40)
    argv = arguments(tiny, recipe, traffic, folder / "out", "--data", str(words), "--seed", "7")
    assert run(argv) == 0
    recipe.unlink()
    shutil.rmtree(folder / "out.run")
    elsewhere = folder / "elsewhere"
    model = Path(shutil.copytree(tiny, elsewhere / "renamed"))
    data = (words.rename(elsewhere / "w.txt"), Path(shutil.copy(traffic, elsewhere / "t.jsonl")))
    return Made(folder / "out", model, data)


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Made:
    """One whose checkpoint a test may change."""
    checkpoint = Path(shutil.copytree(made.checkpoint, tmp_path / "out"))
    return Made(checkpoint, made.model, made.data)


def test_the_same_bytes_from_the_manifest_and_the_inputs(
    made: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever the inputs are called now, and in whatever order they are given."""
    before = torch.get_num_threads()
    assert run([*made.argv, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["ok"] is True
    assert document["environment"] == {}
    assert document["checks"][-1]["check"] == "rebuild"
    assert torch.get_num_threads() == before


def forge(checkpoint: Path) -> None:
    """One code of one layer changes, and the manifest's hashes with it: hashes all fit."""
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight_packed"][3, 4] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    edit(checkpoint, lambda manifest: manifest["files"].update({path.name: models.hash_file(path)}))


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = checkpoint / "quantkit.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_forged_weight_is_named(copy: Made, capfd: pytest.CaptureFixture[str]) -> None:
    forge(copy.checkpoint)
    assert run(["verify", str(copy.checkpoint), "--no-reload"]) == 0  # hashes cannot tell
    assert run(copy.argv) == 4
    captured = capfd.readouterr()
    line = "FAIL rebuild of model.safetensors: 1 of "
    assert line in captured.out
    assert "first model.layers.1.mlp.up_proj.weight_packed" in captured.out
    assert "was not made from what its manifest says" in captured.err


def test_a_difference_that_another_version_explains(
    copy: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    forge(copy.checkpoint)
    edit(copy.checkpoint, lambda manifest: manifest["versions"].update(numpy="1.0"))
    edit(copy.checkpoint, lambda manifest: manifest["machine"].update(isa="other"))
    assert run(copy.argv) == 5
    message = capfd.readouterr().err
    assert "numpy 1.0 (now " in message
    assert "isa other (now " in message


def test_other_inputs_are_refused(
    copy: Made, tiny_untied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["verify", str(copy.checkpoint), "--no-reload", "--rebuild", "--model", str(copy.model)]
    assert run(argv) == 2
    assert "calibration data traffic.jsonl (sha256" in capfd.readouterr().err
    other = [str(tiny_untied) if part == str(copy.model) else part for part in copy.argv]
    assert run(other) == 2
    assert "and the checkpoint was made from" in capfd.readouterr().err
    assert run(["verify", str(copy.checkpoint), "--model", "x"]) == 2
    assert "are of a rebuild; give --rebuild" in capfd.readouterr().err
    edit(copy.checkpoint, lambda manifest: manifest.pop("machine"))
    assert run(copy.argv) == 4
    assert "lacks 'machine'" in capfd.readouterr().err


def test_a_manifest_is_not_trusted_with_paths(copy: Made, tmp_path: Path) -> None:
    aimed = tmp_path / "written"
    edit(copy.checkpoint, lambda manifest: manifest["recipe"].update(name=str(aimed)))
    run(copy.argv)
    assert not aimed.with_suffix(".yaml").exists()


@pytest.mark.parametrize("text", ["[]", '{"files": null}', "{}"])
def test_something_else_than_a_manifest(
    text: str, copy: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    (copy.checkpoint / "quantkit.json").write_text(text)
    assert run(["inspect", str(copy.checkpoint), "--sbom", "-"]) == 4
    assert "is no manifest" in capfd.readouterr().err


@pytest.mark.parametrize("options", [(), ("--sbom", "-")])
def test_a_manifest_that_lacks_its_fields(
    options: tuple[str, ...], copy: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    (copy.checkpoint / "quantkit.json").write_text('{"files": {}}')
    assert run(["inspect", str(copy.checkpoint), *options]) == 4
    assert "quantkit.json: is damaged (KeyError" in capfd.readouterr().err


def test_files_that_only_one_of_the_two_has(copy: Made, tmp_path: Path) -> None:
    other = Path(shutil.copytree(copy.checkpoint, tmp_path / "other"))
    (other / "config.json").write_text((other / "config.json").read_text().replace("272", "273"))
    (other / "added.json").write_text("{}")
    (other / "generation_config.json").unlink()
    edit(other, lambda manifest: manifest.update(plan="0" * 64, verdict={"outcome": "PASS"}))
    files, differences = rebuild.compare(copy.checkpoint, other)
    found = {difference.file: difference.detail for difference in differences}
    assert files == len({p.name for f in (copy.checkpoint, other) for p in f.iterdir()})
    assert found.keys() == {
        *("added.json", "config.json", "generation_config.json", "quantkit.json")
    }
    assert found["added.json"] == "only the rebuild has it"
    assert found["generation_config.json"] == "the rebuild has no such file"
    assert found["config.json"].startswith("from byte ")
    assert found["quantkit.json"] == "plan differ"


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# Model\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3.1\n---\n", "llama3.1"),
        ("---\nlicense:\n- mit\n- cc-by-4.0\n---\n", "mit AND cc-by-4.0"),
        ("# Model\nlicense: mit\n", "unknown"),
        ("---\nlicense: [\n---\n", "unknown"),
        ("---\njust words\n---\n", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_licence_that_a_card_names(text: str | None, license: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    card = read_card(tmp_path)
    assert card == Card(license, None if license == "unknown" else "README.md")
