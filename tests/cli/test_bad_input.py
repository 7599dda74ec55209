"""Bad input: a clear message, the documented exit code, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from quantkit.cli.main import run
from tests.run_helpers import arguments, leftovers


def edited(source: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a model folder with one thing broken."""
    shutil.copytree(source, folder)
    change(folder)
    return folder


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def poison(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def rename_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "perceptron9000"
    (folder / "config.json").write_text(json.dumps(config))


def quantize_already(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (truncate, 4, "truncated or not a safetensors file"),
        (poison, 4, "model.layers.1.mlp.down_proj: the weight holds 1 NaN"),
        (rename_architecture, 2, "unknown architecture"),
        (quantize_already, 2, "is quantized already"),
        (drop_config, 2, "no config.json"),
    ],
)
def test_broken_models(
    change: Callable[[Path], None],
    code: int,
    message: str,
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = edited(tiny, tmp_path / "model", change)
    out = tmp_path / "out"
    assert run(arguments(model, recipe, traffic, out)) == code
    assert message in capfd.readouterr().err
    assert leftovers(out) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheme: w4a16-g64\nalgoritm: gptq\n", "recipe.yaml:2 unknown key 'algoritm'; did you"),
        ("scheme: w4a16-g60\n", "unknown scheme 'w4a16-g60'; did you mean"),
        ("scheme: {weight: {bits: 4, group_size: 100}}\nkeep: [lm_head]\n",
         "in_features 384 is not divisible by group 100; try"),
        ("scheme: w4a16-g64\nalgorithm: {gptq: {dampp: 0.1}}\n", "'dampp'"),
        ("scheme: [w8a16\n", "recipe.yaml:"),
        ("", "recipe.yaml:1 is empty"),
        ("keep: [lm_head]\n", "no scheme"),
    ],
)  # fmt: skip
def test_broken_recipes(
    text: str,
    message: str,
    tiny: Path,
    traffic: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    out = tmp_path / "out"
    assert run(arguments(tiny, path, traffic, out)) == 2
    assert message in capfd.readouterr().err
    assert leftovers(out) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such"),
        ("", "hold"),
        ('{"text": "hi"}\n', "do not fill one window"),
        ('{"text": "hi"}\n{"text": \n', "data.jsonl:2"),
        ('{"banana": 1}\n', "data.jsonl:1"),
    ],
)
def test_broken_data(
    content: str | None,
    message: str,
    tiny: Path,
    recipe: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, data, out)) == 2
    assert message in capfd.readouterr().err.replace("does not exist", "no such")
    assert leftovers(out) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["calibrate", "no/such/model", "-r", "w8a16", "-o", "x"], "no such folder"),
        (["calibrate", "my models/tiny", "-r", "w8a16", "-o", "x"], "nor a hub id"),
        (["calibrate", "missing.gguf", "-r", "w8a16", "-o", "x"], "no such file"),
        (["calibrate", "m", "-r", "w8a61", "-o", "x"], "did you mean 'w8a16'"),
        (["calibrate", "m", "-r", "w8a16"], "no output folder; give -o OUT"),
        (["calibrate", "m", "--no-such-option"], "No such option"),
        (["calibrate", "m", "--seed", "-1"], "--seed"),
        (["calibrate", "m", "--samples", "0"], "--samples"),
        (["calibrate", "m", "--eval-seq-len", "1"], "--eval-seq-len"),
        (
            ["calibrate", "m", "--kernels", "nativ"],
            "'nativ' is not one of 'native', 'native-float'",
        ),
        (["eval"], "no CKPT"),
        (["eval", "m", "--suite", "nothing/here"], "no such suite"),
        (["gate", "missing.json", "--baseline", "missing.json"], "missing.json"),
        (["verify", "nowhere"], "no such folder"),
        (["inspect", "nowhere"], "no such folder"),
        (["serve", "nowhere/at/all"], "no such folder"),
        (["frobnicate"], "No such command"),
    ],
)
def test_wrong_arguments(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(argv) == 2
    assert message in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nan_from_overflow_stops_the_run(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def inflate(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"model.layers.0.mlp.{name}.weight"] *= 1e18
        save_file(tensors, path, metadata={"format": "pt"})

    model = edited(tiny, tmp_path / "model", inflate)
    out = tmp_path / "out"
    assert run(arguments(model, recipe, traffic, out)) == 4
    err = capfd.readouterr().err
    assert "NaN" in err or "not positive definite" in err
    assert leftovers(out) == []


def test_missing_library_names_the_build_command(
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from quantkit.errors import KernelMissingError

    def missing(*_: object) -> None:
        raise KernelMissingError("native kernels are not built", remedy="run `make native`")

    monkeypatch.setattr("quantkit.ops.pack_w4", missing)
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out)) == 4
    assert "make native" in capfd.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("option", ["--baseline", "--text", "--suite"])
def test_what_a_run_without_a_gate_would_not_read_is_refused(
    tiny: Path, traffic: Path, recipe: Path, option: str, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["calibrate", str(tiny), "--recipe", str(recipe), "--data", str(traffic)]
    assert run([*argv, "--no-gate", "--dry-run", option, str(recipe)]) == 2
    assert f"{option}: nothing is scored with --no-gate" in capfd.readouterr().err
