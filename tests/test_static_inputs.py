"""Static activation scales, from recipe to checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantkit import model as models
from quantkit.cli.main import run
from quantkit.errors import UsageError
from quantkit.plan import make_plan
from quantkit.recipe import parse_recipe
from quantkit.work import WorkFolder
from tests.run_helpers import arguments

RECIPE = """\
scheme: {scheme}
algorithm: {algorithm}
keep: [lm_head]
calibrate: {{samples: 4, seq_len: 64, observer: {observer}}}
"""


def write_recipe(folder: Path, **values: str) -> Path:
    given = {"scheme": "w8a8-static", "algorithm": "rtn", "observer": "auto", **values}
    path = folder / "static.yaml"
    path.write_text(RECIPE.format(**given))
    return path


@pytest.mark.parametrize(
    ("scheme", "algorithm"), [("w8a8-static", "{gptq: {feedback: 1.0}}"), ("fp8-static", "rtn")]
)
def test_a_run_records_which_observer_won(
    tiny: Path,
    traffic: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    scheme: str,
    algorithm: str,
) -> None:
    recipe, out = write_recipe(tmp_path, scheme=scheme, algorithm=algorithm), tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out)) == 0
    layers = json.loads((out / "quantkit.json").read_text())["layers"]
    assert len(layers) == 14
    for name, layer in layers.items():
        found = layer["input_range"]
        assert len(found["errors"]) == 9, name
        assert found["errors"][found["observer"]] == min(found["errors"].values())
        assert found["low"] < 0 < found["high"]
    block = "model.layers.1."
    for group in (("self_attn.q_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        assert layers[block + group[0]]["input_range"] == layers[block + group[1]]["input_range"]
    capfd.readouterr()
    assert run(["inspect", str(out)]) == 0
    assert "static range of" in capfd.readouterr().out
    page = tmp_path / "report.html"
    assert run(["report", str(out), "-o", str(page)]) == 0
    assert "Ranges of 8 inputs" in page.read_text()


def test_resumed_ranges_are_the_same(
    tiny: Path, traffic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    assert run(arguments(tiny, recipe, traffic, tmp_path / "whole")) == 0
    save, stop = WorkFolder.save, KeyboardInterrupt

    def once(self: WorkFolder, index: int, *rest: object) -> object:
        if index == 1:
            raise stop
        return save(self, index, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(WorkFolder, "save", once)
        assert run(arguments(tiny, recipe, traffic, tmp_path / "cut")) == 130
    assert run(arguments(tiny, recipe, traffic, tmp_path / "cut", "--resume")) == 0
    for file in ("model.safetensors", "quantkit.json"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_bad_candidates_are_refused_before_any_work(tiny: Path) -> None:
    recipe = parse_recipe(
        "scheme: w8a8-static\ncalibrate: {observer: {auto: {candidates: [maxmin]}}}\n"
    )
    with pytest.raises(UsageError, match="unknown observer 'maxmin'"):
        make_plan(recipe, models.load_source(str(tiny)).model, samples=4, seq_len=64)
