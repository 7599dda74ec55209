"""What the plan says of memory, against what the system counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit import peak
from quantkit.plan import make_plan
from quantkit.recipe import Recipe, Step
from quantkit.schemes import SCHEMES
from tests.conftest import byte_tokenizer, tiny_llama

GPTQ = Recipe(SCHEMES["w4a16-g64"], algorithm=(Step("gptq"),), keep=("lm_head",))
COUPLED = replace(GPTQ, algorithm=(Step("gptq", {"fisher": 0.5, "outputs": "coupled"}),))


def phases(
    recipe: Recipe, *, data: bool = True, spilled: bool = False, samples: int = 64
) -> dict[str, int]:
    model = tiny_llama()
    plan = make_plan(recipe, model, samples=samples, seq_len=512)
    return dict(peak.peak_memory(plan, model, data=data, spilled=spilled).phases)


def test_phases_stand_on_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "resident", lambda: 10**9)
    monkeypatch.setattr(peak, "peak_resident", lambda: 2 * 10**9)
    found = phases(GPTQ)
    assert found["prepare"] == 2 * 10**9
    assert set(found) == {"prepare", "blocks", "export", "reload"}
    assert min(found.values()) > 10**9
    assert "head" in phases(replace(GPTQ, keep=()))
    assert "fisher" in phases(COUPLED)


def test_activations_are_counted_once_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held: the block's input, the sum after attention, its norm, the widest input, in bf16."""
    monkeypatch.setattr(peak, "resident", lambda: 0)
    more = phases(GPTQ, samples=128)["blocks"] - phases(GPTQ, samples=64)["blocks"]
    assert more == 64 * 512 * 2 * (3 * 384 + 768)
    spilled, also = (phases(GPTQ, spilled=True, samples=n)["blocks"] for n in (64, 128))
    assert spilled == also < phases(GPTQ)["blocks"]
    nearest = replace(GPTQ, algorithm=(Step("rtn"),))
    measured = phases(nearest)["blocks"]
    assert measured == phases(nearest, samples=128)["blocks"]
    assert measured > phases(nearest, data=False)["blocks"]


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


#: algorithm, command-line options.
RUNS = {
    "gptq": ("gptq", ()),
    "rtn": ("rtn", ()),
    "spilled": ("gptq", ("--activation-memory", "0.2")),
    "coupled": ("{gptq: {fisher: 0.5, outputs: coupled}}", ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_stated_peak_is_the_measured_one(
    name: str, wide: Path, traffic: Path, tmp_path: Path
) -> None:
    algorithm, options = RUNS[name]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"scheme: w4a16-g64\nalgorithm: {algorithm}\nkeep: [lm_head]\n")
    text = tmp_path / "text.txt"
    text.write_text(traffic.read_text() * 200)
    command = [
        sys.executable, "-m", "quantkit.cli.main", "calibrate", str(wide), "-r", str(recipe),
        "--data", str(text), "--samples", "64", "--seq-len", "512", "--no-gate", "--json",
        "-o", str(tmp_path / "out"), *options,
    ]  # fmt: skip
    dry = subprocess.run([*command, "--dry-run"], check=True, capture_output=True, text=True)
    stated = json.loads(dry.stdout)["peak"]["bytes"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert stated == pytest.approx(used.ru_maxrss * 1024, rel=0.1)
