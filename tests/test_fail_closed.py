"""The checks between export and promotion, broken on purpose: no checkpoint may come of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

import quantkit.ops
from quantkit.checkpoint import shards, write
from quantkit.cli.main import run
from quantkit.models import llama_family
from tests.run_helpers import RECIPE, arguments, contents, leftovers

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    """Breakage that a test can take back while it runs."""
    with pytest.MonkeyPatch.context() as context:
        yield context


def store_other_tensors(
    patch: pytest.MonkeyPatch, change: Callable[[dict[str, Tensor]], None]
) -> None:
    """The weights' file holds something else than what calibration made."""
    save = shards.save_file

    def save_changed(tensors: dict[str, Tensor], path: Path, **options: object) -> None:
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        change(changed)
        save(changed, path, **options)

    patch.setattr(shards, "save_file", save_changed)


def other_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.weight_scale"] *= 1.25


def other_codes(tensors: dict[str, Tensor]) -> None:
    packed = tensors[f"{LAYER}.weight_packed"]
    tensors[f"{LAYER}.weight_packed"] = packed.roll(1, 0)


def other_norm(tensors: dict[str, Tensor]) -> None:
    """A tensor that is copied, not quantized."""
    tensors["model.norm.weight"] *= 1.0078125


def no_number(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][7] = float("nan")


def no_number_of_a_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.weight_scale"][5, 3] = float("nan")


DIFFERENT = "the reloaded checkpoint's hidden states differ by"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_scale, DIFFERENT),
        (other_codes, DIFFERENT),
        (other_norm, DIFFERENT),
        (no_number, DIFFERENT),
        (no_number_of_a_scale, "holds NaN or infinity where scales belong"),
    ],
)
def test_a_reload_that_differs_from_memory(
    change: Callable[[dict[str, Tensor]], None],
    told: str,
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    store_other_tensors(patch, change)
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out)) == 4
    assert told in capfd.readouterr().err
    assert leftovers(out) == []


def test_a_reload_that_lacks_a_tensor(
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    store_other_tensors(patch, lambda tensors: tensors.pop("model.norm.weight"))
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out)) == 4
    assert "model.norm.weight: missing from the checkpoint" in capfd.readouterr().err
    assert leftovers(out) == []


def test_a_decoder_that_computes_something_else(
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Every layer's kernel is right, and the whole is wired wrongly."""
    honest = llama_family._rope_tables
    patch.setattr(
        llama_family,
        "_rope_tables",
        lambda *inputs: {kind: (sin, cos) for kind, (cos, sin) in honest(*inputs).items()},
    )
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out)) == 4
    message = capfd.readouterr().err
    assert re.search(r"the native decoder's hidden states differ by \d+\.\d+%", message)
    assert leftovers(out) == []


def test_a_kernel_that_computes_something_else(
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    honest = quantkit.ops.w4_linear
    patch.setattr(quantkit.ops, "w4_linear", lambda *inputs: honest(*inputs) * 1.03)
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out)) == 4
    assert re.search(
        r"model\.layers\.0\.self_attn\.q_proj: the native kernel's output differs by \d\.\d+% from "
        r"the reference; .*run with --kernels reference",
        capfd.readouterr().err,
    )
    assert leftovers(out) == []
    # The remedy works: the files are right, and nothing is left to recompute but forward passes.
    assert run(arguments(tiny, recipe, traffic, out, "--resume", "--kernels", "reference")) == 0
    assert sorted(leftovers(out)) == ["out", "out.run"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda stored: {**stored, "weight_scale": stored["weight_scale"].float()}, "larger"),
        (lambda stored: {k: v for k, v in stored.items() if k != "weight_scale"}, "smaller"),
    ],
    ids=["larger", "smaller"],
)
def test_an_export_whose_size_is_not_the_planned_one(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    why: str,
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Scales are 6 % of a 4-bit layer's bytes: in fp32 instead of bf16, or left out."""
    honest = write.to_disk
    patch.setattr(write, "to_disk", lambda *inputs: change(honest(*inputs)))
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out)) == 4
    words = capfd.readouterr().err.replace(",", "").split()
    held, theory = int(words[words.index("holds") + 1]), int(words[words.index("says") + 1][:-1])
    assert (held > 1.01 * theory) if why == "larger" else (held < 0.99 * theory)
    assert leftovers(out) == []


def test_a_failed_run_leaves_the_promoted_checkpoint_alone(
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out)) == 0
    promoted, scores = contents(out), contents(tmp_path / "out.run")
    store_other_tensors(patch, other_scale)
    assert run(arguments(tiny, recipe, traffic, out)) == 4
    assert contents(out) == promoted
    assert contents(tmp_path / "out.run") == scores
    assert sorted(leftovers(out)) == ["out", "out.run"]
    # The blocks were solved; with the defect gone, --resume gives the same bytes.
    patch.undo()
    assert run(arguments(tiny, recipe, traffic, out, "--resume")) == 0
    assert contents(out) == promoted
    assert not (tmp_path / "out.partial").exists()


def test_a_run_after_one_that_was_killed_while_it_promoted(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that was being replaced comes back, whatever becomes of the new run."""
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out)) == 0
    promoted = contents(out)
    out.rename(tmp_path / ".out.old")
    store_other_tensors(patch, other_scale)
    assert run(arguments(tiny, recipe, traffic, out)) == 4
    assert contents(out) == promoted
    assert sorted(leftovers(out)) == ["out", "out.run"]


def test_scores_that_are_not_numbers(
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A failure behind the reload check discards the export too."""
    from quantkit import scoring
    from quantkit.errors import QuantkitError

    def fail(*_: object, **__: object) -> None:
        raise QuantkitError("NaN in the logits")

    patch.setattr(scoring, "evaluate", fail)
    recipe.write_text(RECIPE + "gate: {kl.mean: {max: 0.5}}\n")
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("where is my parcel " * 200)
    out = tmp_path / "out"
    argv = arguments(tiny, recipe, traffic, out, "--text", str(held_out), gate=True)
    assert run(argv) == 4
    assert "NaN in the logits" in capfd.readouterr().err
    assert leftovers(out) == []


def test_tolerances_are_far_from_what_healthy_runs_measure(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    """With the tolerances at what the docstrings say a healthy run shows, it still passes."""
    from quantkit import reload

    patch.setattr(reload, "RELOAD_TOLERANCE", 1e-6)
    patch.setattr(reload, "KERNEL_TOLERANCE", 0.005)
    assert run(arguments(tiny, recipe, traffic, tmp_path / "out")) == 0


def test_a_decoder_that_differs_no_more_than_an_unsteady_model(
    tiny: Path,
    traffic: Path,
    recipe: Path,
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """How far the model moves by the last digit is asked where the decoder differs by more than the
    tolerance, and decides there."""
    from quantkit import reload

    moved = 0.0
    patch.setattr(reload, "DECODER_TOLERANCE", 1e-6)
    patch.setattr(reload, "unsteadiness", lambda *_: moved)
    out = tmp_path / "out"
    assert run(arguments(tiny, recipe, traffic, out)) == 4
    assert "by its last bf16 digit moves by 0.00%" in capfd.readouterr().err
    moved = 0.2
    assert run(arguments(tiny, recipe, traffic, out, "--resume")) == 0
