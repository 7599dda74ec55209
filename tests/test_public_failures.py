"""What users of quantization tools were hurt by, made on purpose: each stops the run.

Every test breaks one thing that other tools let pass, and shows the exit code and that nothing
was promoted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit import collector, numerics, quantize
from quantkit.algorithms import SOLVERS, gptq
from quantkit.algorithms.clip import mse_scales
from quantkit.checkpoint import shards, write
from quantkit.cli.main import run
from quantkit.errors import QuantkitError
from quantkit.integrity import not_finite
from quantkit.numerics import QTensor
from quantkit.rounding import Rounding
from tests.run_helpers import RECIPE, arguments, contents, leftovers


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as context:
        yield context


@pytest.fixture
def stopped(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs, and gives the message of a run that ended with exit code 4 and left nothing."""

    def attempt(*more: str, model: Path = tiny, data: Path = traffic, gate: bool = False) -> str:
        out = tmp_path / "out"
        assert run(arguments(model, recipe, data, out, *more, gate=gate)) == 4
        assert leftovers(out) == []
        return capfd.readouterr().err

    return attempt


def replace_solver(
    patch: pytest.MonkeyPatch, name: str, change: Callable[[QTensor, Tensor], QTensor]
) -> None:
    """The solver's answer becomes another."""
    honest = SOLVERS[name]
    patch.setitem(
        SOLVERS,
        name,
        replace(
            honest,
            solve=lambda weight, *rest: change(honest.solve(weight, *rest), weight),
        ),
    )


# --- "GPTQ turned into round-to-nearest on 154 of 154 layers" ---------------------------------


def test_gptq_that_became_round_to_nearest(
    stopped: Callable[..., str], patch: pytest.MonkeyPatch
) -> None:
    """A fallback somewhere in the solver, with good scales and no word of it."""

    def nearest(q: QTensor, weight: Tensor) -> QTensor:
        scale, zero, global_scale = mse_scales(weight.float(), q.spec)
        return numerics.quantize(weight.float(), scale, zero, q.spec, global_scale)

    replace_solver(patch, "gptq", nearest)
    assert "q_proj: gptq gave round-to-nearest: 0.00% of" in stopped()


def test_gptq_that_spreads_no_error(stopped: Callable[..., str], patch: pytest.MonkeyPatch) -> None:
    """The whole solver runs, on a factor that says that columns have nothing to do with
    each other."""
    honest = gptq.inverse_factor
    patch.setattr(gptq, "inverse_factor", lambda *inputs: honest(*inputs).diagonal().diag())
    patch.setitem(gptq.OPTIONS, "refine", 0)  # coordinate descent would mend it
    assert "gptq gave round-to-nearest" in stopped()


def test_a_solver_that_is_worse_than_rounding_to_nearest(
    stopped: Callable[..., str], patch: pytest.MonkeyPatch
) -> None:
    def worse(q: QTensor, weight: Tensor) -> QTensor:
        return replace(
            q, codes=(q.codes + (torch.arange(q.shape[1]) % 2).to(torch.int8)).clamp(-8, 7)
        )

    replace_solver(patch, "gptq", worse)
    message = stopped()
    assert "q_proj: gptq ended at a loss of" in message
    assert "and rounding to nearest has" in message


def test_another_solver_than_the_planned_one(
    stopped: Callable[..., str], patch: pytest.MonkeyPatch
) -> None:
    patch.setattr(quantize, "audit", lambda w, q, stats, *_: Rounding("rtn", stats.tokens))
    assert "q_proj: planned for gptq, and rtn rounded it" in stopped()


def test_the_manifest_says_who_rounded_each_layer(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path
) -> None:
    """And that it did better than rounding to nearest."""
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out)) == 0
    layers = json.loads((out / "quantkit.json").read_text())["layers"]
    assert len(layers) == 14
    for layer in layers.values():
        rounding = layer["rounding"]
        assert rounding["solver"] == layer["solver"] == "gptq"
        assert rounding["tokens"] == 4 * 64
        assert rounding["moved"] > 0.05
        assert 0 < rounding["loss"] < rounding["nearest_loss"]
    warnings = json.loads((tmp_path / "out.run" / "run.json").read_text())["warnings"]
    assert any("14 of 14 layers were calibrated on fewer tokens" in line for line in warnings)


# --- "a run that says OK while the score falls from 82 to 25" ---------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda q, _: replace(q, codes=-q.codes.clamp(min=-7)),
        lambda q, _: replace(q, codes=torch.zeros_like(q.codes)),
        lambda q, _: replace(q, codes=q.codes.roll(1, 1)),
        lambda q, _: replace(q, scale=q.scale * 2),
    ],
    ids=["sign", "zeros", "columns", "scale"],
)
def test_a_layer_that_computes_something_else(
    change: Callable[[QTensor, Tensor], QTensor],
    stopped: Callable[..., str],
    recipe: Path,
    patch: pytest.MonkeyPatch,
) -> None:
    recipe.write_text(RECIPE.replace("gptq", "rtn"))
    replace_solver(patch, "rtn", change)
    message = stopped()
    assert "q_proj: its output is off by" in message
    assert "w4a16-g64 may be off by 50%" in message


def test_a_layer_of_zeros_at_two_bits(
    stopped: Callable[..., str], recipe: Path, patch: pytest.MonkeyPatch
) -> None:
    recipe.write_text(RECIPE.replace("gptq", "rtn").replace("w4a16-g64", "w2a16-g32"))
    replace_solver(patch, "rtn", lambda q, _: replace(q, codes=torch.zeros_like(q.codes)))
    message = stopped()
    assert "its output is off by 100.0%, and w2a16-g32 may be off by 90%" in message


def test_a_layer_that_was_skipped(stopped: Callable[..., str], patch: pytest.MonkeyPatch) -> None:
    honest = collector.quantize_group

    def skip(*inputs: object) -> dict[str, object]:
        solved = honest(*inputs)  # type: ignore[arg-type]
        return {name: x for name, x in solved.items() if not name.endswith("0.mlp.up_proj")}

    patch.setattr(collector, "quantize_group", skip)
    message = stopped()
    assert "up_proj" in message or "not the planned ones" in message


def test_a_layer_that_saw_fewer_tokens(
    stopped: Callable[..., str], patch: pytest.MonkeyPatch
) -> None:
    honest = collector.Collector.update
    patch.setattr(
        collector.Collector, "update", lambda self, x, *more: honest(self, x[..., :-1, :], *more)
    )
    assert "q_proj: calibrated on 252 of 256 tokens" in stopped()


def test_nan_in_a_row_that_no_token_of_the_data_uses(
    stopped: Callable[..., str], tiny: Path, tmp_path: Path
) -> None:
    """Neither calibration nor the reload comes by; a user's prompt would."""
    import shutil

    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][200, 7] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "model.embed_tokens.weight: holds NaN or infinite values" in stopped(model=model)


def test_every_storage_format_shows_that_it_is_no_number() -> None:
    exponents = torch.full((2, 2), 127, dtype=torch.uint8)
    stored = {
        "a.weight_scale": exponents,
        "a.weight": torch.ones(4).to(torch.float8_e4m3fn),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "c.weight_packed": torch.full((2,), 255, dtype=torch.uint8),
    }
    assert list(not_finite(stored.items())) == []
    stored["a.weight_scale"] = exponents + 128
    stored["a.weight"] = torch.full((4,), float("nan")).to(torch.float8_e4m3fn)
    stored["b"] = torch.tensor([1.0, float("inf"), 1.0]).to(torch.bfloat16)
    assert list(not_finite(stored.items())) == ["a.weight_scale", "a.weight", "b"]


# --- "checkpoints bigger than their theory", "formats mislabelled" ----------------------------


def test_codes_that_are_stored_unpacked(
    stopped: Callable[..., str], patch: pytest.MonkeyPatch
) -> None:
    """4-bit codes in a byte each: twice the size, and it still loads elsewhere."""
    honest = write.to_disk

    def unpacked(q: QTensor, *rest: object) -> dict[str, Tensor]:
        stored = honest(q, *rest)  # type: ignore[arg-type]
        return {**stored, "weight_packed": q.codes}

    patch.setattr(write, "to_disk", unpacked)
    assert "bytes where theory says" in stopped()


def relabel(config: dict[str, object]) -> dict[str, object]:
    groups = {k: {**v, "format": "int-quantized"} for k, v in config["config_groups"].items()}  # type: ignore[attr-defined]
    return {**config, "format": "int-quantized", "config_groups": groups}


def test_a_format_under_another_label(
    stopped: Callable[..., str], patch: pytest.MonkeyPatch
) -> None:
    honest = write.build_config
    patch.setattr(write, "build_config", lambda *inputs, **more: relabel(honest(*inputs, **more)))
    message = stopped()
    assert "format 'int-quantized' for w4a16-g64, which is stored as pack-quantized" in message


def test_tensors_of_another_dtype_than_the_label_says() -> None:
    from quantkit.checkpoint.tensors import from_disk, to_disk
    from quantkit.schemes import SCHEMES

    scheme = SCHEMES["w8a8"]
    q = numerics.quantize_weight(torch.randn(8, 64), scheme.weight)
    stored = to_disk(q, scheme, None)
    stored["weight"] = stored["weight"].view(torch.float8_e4m3fn)
    with pytest.raises(QuantkitError, match=r"is torch\.float8_e4m3fn, not torch\.int8"):
        from_disk(stored, scheme, (8, 64), "layer")


# --- "which calibration data?", "short samples silently dropped" ------------------------------


@pytest.mark.parametrize("edited", [False, True], ids=["exact", "near"])
def test_held_out_text_that_was_calibrated_on(
    edited: bool, stopped: Callable[..., str], traffic: Path, recipe: Path, tmp_path: Path
) -> None:
    """Divergence on it would be too small. A word of each turn is another in ``near``."""
    recipe.write_text(RECIPE + "gate: {kl.mean: {max: 0.5}}\n")
    held_out = tmp_path / "held_out.jsonl"
    with held_out.open("w") as file:
        for line in traffic.read_text().splitlines():
            messages = json.loads(line)["messages"]
            for message in messages if edited else ():
                words = message["content"].split()
                message["content"] = " ".join(["certainly", *words[1:]])
            file.write(json.dumps({"messages": messages}) + "\n")
    message = stopped("--text", str(held_out), "--eval-seq-len", "64", gate=True)
    assert "of the held-out text is in the calibration data, too" in message


def test_no_short_sample_is_dropped_without_a_word(
    tiny: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Documents of two words count as any other; rows without words are counted and named."""
    rows = [{"text": f"item {i}"} for i in range(60)] + [{"text": " "}] * 3
    data = tmp_path / "short.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, data, out)) == 0
    assert "3 of 63 rows hold no words" in " ".join(capfd.readouterr().err.split())
    [source] = json.loads((out / "quantkit.json").read_text())["data"]["sources"]
    assert source["documents_held"] == 60
    assert source["rows_without_words"] == 3
    assert source["documents"] > 20  # of 8 tokens each, in 4 windows of 64
    assert source["tokens"] == 4 * 64
    warnings = json.loads((tmp_path / "out.run" / "run.json").read_text())["warnings"]
    assert any("3 of 63 rows hold no words and were left out" in line for line in warnings)


# --- "no provenance in the checkpoint" --------------------------------------------------------


def test_a_resumed_run_on_another_number_of_threads_is_refused(
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Half of its blocks would be of one arithmetic and half of another."""
    out = tmp_path / "out"
    save = shards.save_file

    def fail(*_: object, **__: object) -> None:
        raise QuantkitError("stopped here")

    patch.setattr(shards, "save_file", fail)
    argv = arguments(tiny, recipe, traffic, out)
    before = torch.get_num_threads()
    assert run([*argv, "--threads", str(before)]) == 4
    patch.setattr(shards, "save_file", save)
    capfd.readouterr()
    try:
        assert run([*argv, "--threads", str(before + 1), "--resume"]) == 2
    finally:
        torch.set_num_threads(before)
    message = capfd.readouterr().err
    assert f"was begun with threads {before} (now {before + 1})" in message
    assert run([*argv, "--resume"]) == 0
    assert "quantkit.json" in contents(out)
