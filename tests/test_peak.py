"""What the plan says of memory, against what the system counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit import model as models
from quantkit import peak
from quantkit.calibrate import CalibrationData, calibrate
from quantkit.cli.main import run
from quantkit.evals.forward import CHUNK_ELEMENTS
from quantkit.plan import PlannedLayer, make_plan
from quantkit.recipe import Recipe, Step
from quantkit.schemes import SCHEMES
from tests.conftest import byte_tokenizer, save_model, tiny_llama
from tests.run_helpers import RECIPE, arguments

GPTQ = Recipe(SCHEMES["w4a16-g64"], algorithm=(Step("gptq"),), keep=("lm_head",))
COUPLED = replace(GPTQ, algorithm=(Step("gptq", {"fisher": 0.5, "outputs": "coupled"}),))


NEAREST = replace(GPTQ, algorithm=(Step("rtn"),))
WITH_HEAD = replace(GPTQ, keep=())
DISTILLED = replace(NEAREST, algorithm=(Step("rtn"), Step("distill")))
SIGNROUND = replace(NEAREST, algorithm=(Step("rtn"), Step("signround")))
BLOCKDISTILL = replace(NEAREST, algorithm=(Step("rtn"), Step("blockdistill")))
AWQ = replace(NEAREST, algorithm=(Step("awq"), Step("rtn")))

#: Of `tiny_llama`: the embedding, and all weights.
TABLE = 2 * 272 * 384
WEIGHTS = TABLE + 2 * (2 * (2 * 384**2 + 2 * 384 * 192 + 3 * 384 * 768) + 5 * 384)


@pytest.fixture
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases are then what is counted, and no more."""
    monkeypatch.setattr(peak, "resident", lambda: 0)


def phases(
    recipe: Recipe,
    *,
    data: bool = True,
    spilled: bool = False,
    gated: bool = False,
    samples: int = 64,
) -> dict[str, int]:
    model = tiny_llama()
    plan = make_plan(recipe, model, samples=samples, seq_len=512)
    return dict(peak.peak_memory(plan, model, data=data, spilled=spilled, gated=gated).phases)


def test_phases_stand_on_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "resident", lambda: 10**9)
    monkeypatch.setattr(peak, "peak_resident", lambda: 2 * 10**9)
    found = phases(GPTQ)
    assert found["prepare"] == 2 * 10**9
    assert set(found) == {"prepare", "blocks", "export", "reload"}
    assert min(found.values()) > 10**9
    for recipe, phase in (
        (WITH_HEAD, "head"),
        (COUPLED, "fisher"),
        (AWQ, "rescale"),
        (SIGNROUND, "signround"),
        (BLOCKDISTILL, "blockdistill"),
        (DISTILLED, "distill"),
    ):
        assert set(phases(recipe)) == {"prepare", "blocks", phase, "export", "reload"}
    assert "evals" in phases(GPTQ, gated=True)


@pytest.mark.usefixtures("nothing_held")
def test_activations_are_counted_once_by_tokens() -> None:
    """Held: the block's input, the sum after attention, its norm, the widest input, in bf16."""
    more = phases(GPTQ, samples=128)["blocks"] - phases(GPTQ, samples=64)["blocks"]
    assert more == 64 * 512 * 2 * (3 * 384 + 768)
    spilled, also = (phases(GPTQ, spilled=True, samples=n)["blocks"] for n in (64, 128))
    assert spilled == also < phases(GPTQ)["blocks"]
    measured = phases(NEAREST)["blocks"]
    assert measured == phases(NEAREST, samples=128)["blocks"]
    assert measured > phases(NEAREST, data=False)["blocks"]


@pytest.mark.usefixtures("nothing_held")
def test_a_quantized_head_is_a_copy_and_reads_every_window() -> None:
    assert phases(WITH_HEAD)["blocks"] - phases(GPTQ)["blocks"] == TABLE
    one = 64 * 512 * 2 * 384
    feedback = replace(WITH_HEAD, algorithm=(Step("gptq", {"feedback": 1.0, "refine": 0}),))
    for recipe, streams in ((WITH_HEAD, 1), (feedback, 2)):
        more = phases(recipe, samples=128)["head"] - phases(recipe)["head"]
        assert more == streams * one
        assert phases(recipe, spilled=True)["head"] == phases(recipe)["head"] - streams * one
    nearest = replace(NEAREST, keep=())
    assert phases(nearest, samples=8)["head"] == phases(nearest, samples=128)["head"]
    assert phases(nearest)["head"] - phases(nearest, data=False)["head"] == one // 8


def test_rescalers_keep_a_sample_of_every_input() -> None:
    """512 tokens, or 2,048 where they have costs, and never more than there are."""
    model = tiny_llama()
    columns = 3 * 384 + 768

    def found(samples: int, cost: str) -> int:
        steps = (Step("outliers", {"cost": cost}), Step("rtn"))
        recipe = replace(NEAREST, scheme=SCHEMES["w8a8-static"], algorithm=steps)
        plan = make_plan(recipe, model, samples=samples, seq_len=128)
        return peak._rescale_bytes(plan, 0, 2, passing=0)

    for samples, alike, costed in ((1, 128, 128), (8, 512, 1024), (64, 512, 2048)):
        fixed = found(1, "output") - 128 * 2 * columns
        assert found(samples, "output") - fixed == alike * 2 * columns
        assert found(samples, "fisher") - fixed == costed * 2 * columns


@pytest.mark.usefixtures("nothing_held")
def test_distillation_keeps_the_whole_model_and_the_targets() -> None:
    # The same recipe without training holds one block; its windows are eight.
    found, plain = phases(DISTILLED), phases(NEAREST)
    block, targets = (WEIGHTS - TABLE - 2 * 384) // 2, 64 * 512 * 2 * 384
    rows = 2 * (3 * 384 + 768)
    waiting = (64 - 8) * 512 * rows
    assert found["blocks"] - plain["blocks"] == WEIGHTS - TABLE - block + targets + waiting
    # Training stands on the same model, and on what the loop still has: hidden states.
    assert found["distill"] > WEIGHTS + 2 * targets
    codes = (WEIGHTS - TABLE - 5 * 2 * 384) // 2
    model = tiny_llama()
    size = make_plan(NEAREST, model, samples=64, seq_len=512).size_bytes
    assert found["export"] - plain["export"] == WEIGHTS - TABLE + max(codes - size, 0)


@pytest.mark.usefixtures("nothing_held")
def test_spilled_windows_of_signround_are_read_all_the_same() -> None:
    for spilled in (False, True):
        more = phases(SIGNROUND, spilled=spilled, samples=128)["signround"]
        more -= phases(SIGNROUND, spilled=spilled)["signround"]
        assert more == 2 * 64 * 512 * 2 * 384


@pytest.mark.usefixtures("nothing_held")
def test_codes_that_move_are_counted_with_what_moves_them() -> None:
    """Positions, their gradients and Adam's two moments, in fp32, of one block."""
    moving = Step("blockdistill", {"weight_lr": 0.01})
    found = [
        phases(replace(NEAREST, algorithm=(Step("rtn"), step)))["blockdistill"]
        for step in (moving, Step("blockdistill"))
    ]
    assert found[0] - found[1] == 16 * (2 * 384**2 + 2 * 384 * 192 + 3 * 384 * 768)


@pytest.mark.usefixtures("nothing_held")
def test_both_models_are_there_when_a_gate_scores() -> None:
    plan = make_plan(GPTQ, tiny_llama(), samples=64, seq_len=512)
    found = phases(GPTQ, gated=True)["evals"]
    both = 2 * WEIGHTS + 2 * plan.size_bytes + TABLE
    assert found == peak.FIRST_USE + both + 4 * 4 * CHUNK_ELEMENTS


@pytest.mark.usefixtures("nothing_held")
@pytest.mark.parametrize("scheme", ["w4a16-g64", "w3a16-g64", "w4a16-asym-g64", "w8a8"])
def test_what_is_loaded_again_is_packed(scheme: str) -> None:
    """Codes of 4 or 8 bits, scales twice, and pages of layers below 1 MB in both loaders; a kept
    head as it was read and packed, and what works beside it."""
    recipe = replace(NEAREST, scheme=SCHEMES[scheme])
    weight = SCHEMES[scheme].weight
    weights = (WEIGHTS - TABLE - 2 * 5 * 384) // 2
    rows = 2 * (2 * 384 + 2 * 192 + 2 * 768 + 384)
    scales = rows if weight.group_size is None else weights // weight.group_size
    packed = weights // (1 if weight.bits == 8 else 2) + scales * (8 if weight.symmetric else 12)
    pages, again = 2 * weights * weight.bits // 8, 8 * 384 * 768
    expected = packed + pages + max(3 * TABLE, 2 * TABLE + again)
    assert phases(recipe)["reload"] == peak.FIRST_USE + expected


def test_layers_with_fisher_weights_have_sums_of_their_own() -> None:
    """And are solved one by one; beside all sums counts the larger of a solver and a pass."""

    def attention(recipe: Recipe) -> list[PlannedLayer]:
        layers = make_plan(recipe, tiny_llama(), samples=64, seq_len=512).layers
        return [x for x in layers if x.block == 0 and "self_attn" in x.name]

    fisher = replace(GPTQ, algorithm=(Step("gptq", {"fisher": 0.5}),))
    alike, apart, coupled = (attention(recipe) for recipe in (GPTQ, fisher, COUPLED))
    square, passing = 384**2, 1 << 40
    assert peak._group_bytes(alike, 2, passing) == passing + 8 * square
    assert peak._group_bytes(apart, 2, passing) == passing + 4 * 8 * square
    together, alone = peak._group_bytes(alike, 2, 0), peak._group_bytes(apart, 2, 0)
    assert together == 8 * square + peak._solver_bytes(alike, 2)
    assert alone == 4 * 8 * square + max(peak._solver_bytes([x], 2) for x in apart)
    assert alone < together + 3 * 8 * square
    weights = apart[0].weights
    more = peak._rounding_bytes(coupled[0], weights) - peak._rounding_bytes(apart[0], weights)
    assert more == 6 * square  # in bf16 as on disk, and damped in fp32


@pytest.mark.parametrize("name", ["feedback", "signround"])
def test_blocks_that_are_done_leave_memory(name: str, tmp_path: Path) -> None:
    """The unquantized pass and training read original weights again, behind their layers."""
    source = save_model(tiny_llama(), tmp_path / "model")
    recipe = {
        "feedback": replace(GPTQ, algorithm=(Step("gptq", {"feedback": 1.0, "refine": 0}),)),
        "signround": replace(SIGNROUND, algorithm=(Step("rtn"), Step("signround", {"steps": 2}))),
    }[name]
    loaded = models.load_source(str(source))
    plan = make_plan(recipe, loaded.model, samples=4, seq_len=32)
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    calibrate(loaded, plan, CalibrationData(ids, "hash"), tmp_path / "work", release=True)
    assert _mapped(source / "model.safetensors") < WEIGHTS // 2


def _mapped(path: Path) -> int:
    """Resident bytes of this file's mappings in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_the_dry_run_states_the_phases_of_a_gated_run(
    tiny: Path, traffic: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(RECIPE + "gate: {kl.mean: {max: 0.5}}\n")
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("where is my parcel " * 400)
    command = arguments(
        tiny, recipe, traffic, tmp_path / "out", "--text", str(held_out), "--dry-run", gate=True
    )
    assert run([*command, "--json"]) == 0
    assert "evals" in json.loads(capsys.readouterr().out)["peak"]["phases"]
    assert run(command) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "without keys and values of the texts that are scored" in told


def test_the_largest_phase_is_the_peak() -> None:
    found = peak.Peak({"prepare": 5, "blocks": 9, "export": 7})
    assert (found.bytes, found.phase) == (9, "blocks")
    assert found.to_json() == {"bytes": 9, "phases": {"prepare": 5, "blocks": 9, "export": 7}}


def test_resident_memory_is_the_process_own() -> None:
    before = peak.resident()
    held = bytearray(os.urandom(1 << 20) * 64)
    assert peak.resident() - before > 60 << 20
    assert peak.peak_resident() >= peak.resident() - (1 << 20)
    del held


def test_large_buffers_leave_memory_between_small_ones() -> None:
    """In a process of its own, whose heap is new: a buffer of 31 MB that is freed raises glibc's
    threshold for the next ones, and what is freed between buffers that stay then stays, too."""

    def left(bounded: bool) -> int:
        script = f"""
from contextlib import nullcontext
import torch
from quantkit import memory
from quantkit.peak import resident
with memory.bounded_heap() if {bounded} else nullcontext():
    torch.ones(31 << 20, dtype=torch.uint8)
    before = resident()
    pairs = [(torch.ones(10 << 20, dtype=torch.uint8), torch.ones(1 << 16)) for _ in range(16)]
    small = [pair[1] for pair in pairs]
    del pairs
    print(resident() - before)
"""
        command = [sys.executable, "-c", script]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    held = 16 * 4 << 16
    assert left(bounded=True) < held + (8 << 20)
    assert left(bounded=False) > held + (120 << 20)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama whose blocks, head and hidden states are tens to hundreds of MB."""
    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=1024,
        tie_word_embeddings=True, eos_token_id=256, bos_token_id=256,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


#: What follows the scheme in a recipe, and command-line options.
RUNS = {
    "gptq": ("algorithm: gptq\nkeep: [lm_head]\n", ("--no-gate",)),
    "rtn": ("algorithm: rtn\nkeep: [lm_head]\n", ("--no-gate",)),
    "spilled": (
        "algorithm: gptq\nkeep: [lm_head]\n",
        ("--no-gate", "--activation-memory", "0.2"),
    ),
    "coupled": (
        "algorithm: {gptq: {fisher: 0.5, outputs: coupled}}\nkeep: [lm_head]\n",
        ("--no-gate",),
    ),
    "head": ("algorithm: gptq\nkeep: []\n", ("--no-gate",)),
    "awq": ("algorithm: [{awq: {grid: 2}}, rtn]\nkeep: [lm_head]\n", ("--no-gate",)),
    "signround": (
        "algorithm: [rtn, {signround: {steps: 4, lr: 0.005, range_lr: 0.005}}]\nkeep: [lm_head]\n",
        ("--no-gate",),
    ),
    "blockdistill": (
        "algorithm: [rtn, {blockdistill: {steps: 4, windows: 8, weight_lr: 0.01}}]\n"
        "keep: [lm_head]\n",
        ("--no-gate",),
    ),
    "distill": (
        "algorithm: [rtn, {distill: {steps: 2}}]\nkeep: [lm_head]\n",
        ("--no-gate",),
    ),
    "codes": (
        "algorithm: [rtn, {distill: {steps: 2, weight_lr: 0.01}}]\nkeep: [lm_head]\n",
        ("--no-gate",),
    ),
    "evals": (
        "algorithm: rtn\nkeep: [lm_head]\ngate: {kl.mean: {max: 100}}\n",
        ("--text", "{held_out}", "--eval-seq-len", "256", "--eval-tokens", "512"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_stated_peak_is_the_measured_one(
    name: str, wide: Path, traffic: Path, tmp_path: Path
) -> None:
    lines, options = RUNS[name]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"scheme: w4a16-g64\n{lines}")
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("where is my parcel " * 400)
    text = tmp_path / "text.txt"
    text.write_text(traffic.read_text() * 200)
    command = [
        sys.executable, "-m", "quantkit.cli.main", "calibrate", str(wide), "-r", str(recipe),
        "--data", str(text), "--samples", "64", "--seq-len", "512", "--json",
        "-o", str(tmp_path / "out"), *(option.format(held_out=held_out) for option in options),
    ]  # fmt: skip
    dry = subprocess.run([*command, "--dry-run"], check=True, capture_output=True, text=True)
    stated = json.loads(dry.stdout)["peak"]["bytes"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert stated == pytest.approx(used.ru_maxrss * 1024, rel=0.1)
