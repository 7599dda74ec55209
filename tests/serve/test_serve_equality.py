"""`benchmarks/serve_equality.py`: a busy server says what transformers says, or it is found out."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from serve_helpers import always_guess
from transformers import LlamaForCausalLM

from benchmarks import serve_equality as equality
from quantkit.layers import QuantLinear
from quantkit.models.runtime import Runtime
from quantkit.numerics import QTensor, quantize_weight
from quantkit.schemes import SCHEMES
from quantkit.serve.counters import Counters

TEXT = "The quick brown fox sleeps, and the lazy dog jumps over it. "
PROMPT = (7, 80, 300, 41, 5)


def test_a_tiny_model_behind_http_says_what_transformers_says(
    runtime: Runtime, native: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_guess(monkeypatch)
    ids = [i * 37 % 379 + 5 for i in range(900)]
    prompts = equality.draw_prompts(ids, 24, 160, seed=0)
    answers, counters = equality.serve(native, prompts, 12, 12)
    differences = equality.judge(copy.deepcopy(runtime.model), prompts, answers)
    found = equality.summarize(differences, counters)
    assert found["equal"] + found["allowed"] == found["prompts"] == 24
    assert found["failed"] == 0
    # This model is too fast for requests to queue up for long; `test_equality` stops some for sure.
    assert found["missing"] in ([], ["no request was stopped for another"])


def test_prompts_are_of_all_lengths_and_share_what_they_should() -> None:
    prompts = equality.draw_prompts(range(5000), 200, 100, seed=1)
    assert prompts == equality.draw_prompts(range(5000), 200, 100, seed=1)
    assert min(map(len, prompts)) < 10 < 90 < max(map(len, prompts)) <= 100
    beginnings = {prompt[:50] for prompt in prompts[1::2]}
    assert len(beginnings) == equality.BEGINNINGS
    with pytest.raises(SystemExit, match="fewer than one prompt"):
        equality.draw_prompts(range(99), 1, 100, seed=0)


def said(model: LlamaForCausalLM, tokens: int = 8) -> list[int]:
    return equality.generate(model, PROMPT, tokens)[0]


def test_a_wrong_token_fails(runtime: Runtime) -> None:
    model = copy.deepcopy(runtime.model)
    answer = said(model)
    assert equality.find_differences(model, PROMPT, answer) == []
    answer[3] = (answer[3] + 1) % 384
    [wrong] = equality.find_differences(model, PROMPT, answer)
    assert (wrong.at, wrong.ours, wrong.allowed) == (3, answer[3], False)
    found = equality.summarize([[], [wrong]], Counters(1, 1, 1, 1, 1, 1))
    assert (found["equal"], found["allowed"], found["failed"]) == (1, 0, 1)


@pytest.mark.parametrize(("shift", "allowed"), [(0.0, True), (1e-2, False)])
def test_a_tie_is_allowed_and_what_follows_it_is_compared(
    runtime: Runtime, shift: float, allowed: bool
) -> None:
    """Two tokens have one row of the head, or nearly; the answer takes the second of them."""
    model = copy.deepcopy(runtime.model)
    first = said(model, 1)[0]
    twin = max(first + 1, 5) % 384
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[first] * (1 - shift)
        assert said(model, 1) == [min(first, twin)] if not shift else [first]
    other = twin if said(model, 1)[0] == first else first
    rest = equality.generate(model, [*PROMPT, other], 7)[0]
    differences = equality.find_differences(model, PROMPT, [other, *rest])
    assert (differences[0].at, differences[0].allowed) == (0, allowed)
    if allowed:
        # Ties go on being ties: there may be more of them, and nothing else.
        assert all(d.gap == 0 and {d.ours, d.theirs} == {first, twin} for d in differences)
        rest[-1] = next(i for i in range(5, 384) if i not in (first, twin, rest[-1]))
        assert not equality.find_differences(model, PROMPT, [other, *rest])[-1].allowed


def test_a_gap_that_is_no_number_is_not_allowed() -> None:
    assert not equality.Difference(0, 1, 2, float("nan")).allowed


def test_what_did_not_happen_is_not_shown() -> None:
    assert len(equality.missing(Counters())) == 3
    assert equality.missing(Counters(prefix_hits=1, draft_tokens=1, preemptions=1)) == []


@pytest.mark.parametrize("order", [None, torch.tensor([3, 0, 2, 1, *range(4, 128)])])
@pytest.mark.parametrize("scheme", ["w4a16-g64", "w4a16-asym-g64", "w8a16", "nvfp4a16"])
def test_a_dequantized_layer_multiplies_as_the_kernels_do(
    scheme: str, order: torch.Tensor | None
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(32, 128), torch.randn(3, 128)
    q = quantize_weight(weight.bfloat16(), SCHEMES[scheme].weight)
    model = torch.nn.Sequential(layer(q, scheme, order, "reference"))
    equality.dequantize(model, "it")
    assert isinstance(model[0], torch.nn.Linear)
    torch.testing.assert_close(
        model[0](x), layer(q, scheme, order, "native")(x), atol=1e-4, rtol=1e-5
    )


def layer(q: QTensor, scheme: str, order: torch.Tensor | None, kernels: str) -> QuantLinear:
    return QuantLinear(q, SCHEMES[scheme], torch.ones(32), kernels=kernels, order=order)


def test_what_has_no_reference_is_refused(native: Runtime, runtime: Runtime) -> None:
    q = quantize_weight(torch.randn(32, 128), SCHEMES["w8a8"].weight)
    rounding = torch.nn.Sequential(QuantLinear(q, SCHEMES["w8a8"], kernels="reference"))
    with pytest.raises(SystemExit, match="0 rounds its input"):
        equality.dequantize(rounding, "it")
    with pytest.raises(SystemExit, match="does not run this: modules"):
        equality.serve(replace(runtime, fallback="modules"), [PROMPT], 1, 1)


@pytest.mark.slow
def test_a_whole_run(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a bf16 model of another family of sizes, from its folder, in fp32."""
    always_guess(monkeypatch)
    text, output = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(TEXT * 40)
    options = [
        *(str(tiny), "--text", str(text), "-o", str(output), "--threads", "1"),
        *("--prompts", "16", "--clients", "8", "--tokens", "12", "--longest", "140"),
    ]
    monkeypatch.setattr(sys, "argv", ["serve_equality", *options])
    with pytest.raises(SystemExit) as ended:
        equality.main()
    assert ended.value.code == 0, capsys.readouterr().out
    found = json.loads(output.read_text())
    assert found["equal"] + found["allowed"] == 16
    assert found["fingerprint"]["kernels"].startswith("decoder/fp32")
    assert "of 16 answers are equal" in capsys.readouterr().out
