"""Agreement with ``lm_eval --model hf``, item by item, in fp32.

Both score the same task files (``agreement/``): quantkit as `quantkit eval` does, lm-eval by its
own entry point, with its own reading of the files and its own model class. By default a tiny model
answers made-up items; with ``--eval-data FOLDER`` SmolLM2-135M answers 300 drawn items of each of
the real benchmarks, whose files are not part of this project.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from eval_builders import tiny_runtime
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from scipy.stats import fisher_exact

from quantkit.evals.language_model import QuantkitLM
from quantkit.evals.run_suite import run_suite
from quantkit.evals.suites import load_suite
from quantkit.models.llama_family import build_decoder
from quantkit.models.load import load_runtime
from quantkit.models.runtime import Runtime

logger = logging.getLogger(__name__)

TASKS = sorted((Path(__file__).parent / "agreement").glob("*.yaml"))
ITEMS = 300

#: Nats, on a sum over a continuation's tokens: fp32 sums in another order. Piqa's long ones, some
#: hundred nats each, differ by 2.1e-3 at worst.
TOLERANCE = 4e-3

#: Made-up items of the two shapes that the files have: topics and things to say of them.
TOPICS = ("the late order", "a refund", "an invoice", "paris", "rome and the order", "nothing")
CHOICES = (" it is late", "refund", "the invoice and the order", "no", "yes, and no", "rome")


@pytest.fixture(scope="module")
def tiny_pair() -> tuple[Runtime, HFLM]:
    """One tiny model in the native decoder, and in transformers for lm-eval."""
    runtime = tiny_runtime()
    theirs = HFLM(pretrained=tiny_runtime().model, tokenizer=runtime.tokenizer, batch_size=4)
    return replace(runtime, decoder=build_decoder(runtime.model)), theirs


@pytest.fixture(scope="module")
def real_pair(smollm2: str) -> tuple[Runtime, HFLM]:
    """SmolLM2-135M in fp32, in both."""
    runtime = load_runtime(smollm2, dtype=torch.float32)
    assert runtime.decoder is not None
    model = load_runtime(smollm2, dtype=torch.float32, kernels="modules").model
    return runtime, HFLM(pretrained=model, tokenizer=runtime.tokenizer, batch_size=8)


@pytest.mark.parametrize("task", TASKS, ids=lambda path: path.stem)
def test_a_tiny_model_scores_made_up_items_as_lm_eval_does(
    task: Path,
    tiny_pair: tuple[Runtime, HFLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare(task, made_up(task), *tiny_pair, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("task", TASKS, ids=lambda path: path.stem)
def test_smollm2_scores_benchmarks_as_lm_eval_does(
    task: Path,
    eval_data: Path,
    real_pair: tuple[Runtime, HFLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = compare(task, draw(eval_data / data_file(task)), *real_pair, tmp_path, monkeypatch)
    assert rows == ITEMS


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("task", TASKS, ids=lambda path: path.stem)
def test_in_bf16_lm_eval_differs_no_more_than_our_own_kernels_do(
    task: Path, eval_data: Path, smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise floor: bf16 rounds apart in kernels that compute the same thing."""
    native = load_runtime(smollm2, dtype=torch.bfloat16)
    modules = load_runtime(smollm2, dtype=torch.bfloat16, kernels="modules")
    theirs = HFLM(pretrained=modules.model, tokenizer=native.tokenizer, batch_size=8)
    write(task, draw(eval_data / data_file(task)), tmp_path, monkeypatch)
    suite = load_suite(task.name)
    scores = [row.score for row in run_suite(QuantkitLM(native), suite).rows]
    again = [row.score for row in run_suite(QuantkitLM(modules), suite).rows]
    samples, _ = ask_lm_eval(task, theirs)
    floor = sum(a != b for a, b in zip(scores, again, strict=True))
    flips = sum(a != s["acc"] for a, s in zip(scores, samples, strict=True))
    n = len(scores)
    more = fisher_exact([[flips, n - flips], [floor, n - floor]], alternative="greater").pvalue
    logger.info("%s: %d of %d flip, %d between our own kernels", task.stem, flips, n, floor)
    assert more > 0.01


def write(
    task: Path, rows: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task and its rows in a folder, which becomes the one that both read from."""
    shutil.copy(task, folder)
    (folder / data_file(task)).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(folder)  # lm-eval looks for data where it is started


def ask_lm_eval(task: Path, model: HFLM) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """lm-eval's samples of a task in the folder, in its rows' order, and its whole answer."""
    answer = lm_eval.simple_evaluate(
        model=model,
        tasks=[task.stem],
        task_manager=TaskManager(include_path=".", include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    return sorted(answer["samples"][task.stem], key=lambda s: s["doc_id"]), answer


def compare(
    task: Path,
    rows: list[dict[str, Any]],
    runtime: Runtime,
    theirs: HFLM,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> int:
    """Hold every item's log-probabilities and score against lm-eval's; returns their number."""
    write(task, rows, folder, monkeypatch)
    ours = run_suite(QuantkitLM(runtime), load_suite(task.name))
    samples, answer = ask_lm_eval(task, theirs)
    assert len(samples) == ours.n == len(rows)
    worst = 0.0
    for row, sample in zip(ours.rows, samples, strict=True):
        assert row.hash == sample["doc_hash"]
        assert row.prompt == sample["arguments"][0][0]
        wanted = [float(value) for value, _ in sample["filtered_resps"]]
        details = row.details
        got = details.get("loglikelihoods") or [details["loglikelihood"]]
        worst = max([worst, *(abs(a - b) for a, b in zip(got, wanted, strict=True))])
        assert row.score == sample["acc"], f"item {row.id}: {got} against {wanted}"
    # Shown by `pytest -o log_cli=true --log-cli-level=INFO`.
    logger.info("%s: %d items, largest difference %.1e nats", task.stem, ours.n, worst)
    assert worst < TOLERANCE
    assert ours.value == pytest.approx(answer["results"][task.stem]["acc,none"], abs=1e-12)
    return ours.n


def data_file(task: Path) -> str:
    """The name of a task's rows."""
    name: str = yaml.safe_load(task.read_text())["dataset_kwargs"]["data_files"]["test"]
    return name


def draw(path: Path) -> list[dict[str, Any]]:
    """A seeded subset of a benchmark, without the few items that have a choice twice: quantkit
    refuses those."""
    if not path.is_file():
        pytest.skip(f"--eval-data holds no {path.name}")
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    rows = [r for r in rows if len(set(r.get("choices", ()))) == len(r.get("choices", ()))]
    return random.Random(0).sample(rows, ITEMS)


def made_up(task: Path) -> list[dict[str, Any]]:
    """Items of the shape of a task's rows."""
    rng = random.Random(task.stem)
    if "lambada" in task.stem:
        return [{"context": f"word {t}", "continuation": rng.choice(CHOICES)} for t in TOPICS]
    return [
        {"query": f"Question: {t}?", "choices": rng.sample(CHOICES, 4), "gold": rng.randrange(4)}
        for t in TOPICS
    ]
