"""``lm_eval --model local-completions`` on our server finds what lm-eval finds in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from serve_helpers import Live, serving

from quantkit.models.runtime import Runtime

pytestmark = pytest.mark.slow

ITEMS = 24

#: Nats on a continuation's sum: both add fp32 up in another order.
TOLERANCE = 2e-3

CHOICE = {
    "task": "animals",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "animals.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "The {{animal}} and the",
    "doc_to_choice": [" lazy dog", " brown fox", " user", " other characters"],
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
WORDS = ("quick", "lazy", "brown", "Größe", "naïve", "dog", "fox", "system", "assistant")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with the task and its rows."""
    rows = [
        {"animal": f"{WORDS[i % 9]} {WORDS[(3 * i + 1) % 9]} {i}", "gold": i % 4}
        for i in range(ITEMS)
    ]
    (tmp_path / "animals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "animals.yaml").write_text(yaml.safe_dump(CHOICE))
    return tmp_path


def ask_server(live: Live, tokenizer: Path, tasks: Path) -> tuple[dict[str, Any], list[Any]]:
    """lm-eval's own command line, as users run it; its results and its samples."""
    told = {
        "model": "tiny",
        "base_url": f"{live.url}/v1/completions",
        "tokenizer": str(tokenizer),
        "tokenizer_backend": "huggingface",
        "num_concurrent": 3,
        "max_length": 512,
    }
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in told.items())),
        *("--tasks", "animals", "--include_path", str(tasks), "--batch_size", "4"),
        *("--log_samples", "--output_path", str(tasks / "out")),
    ]
    done = subprocess.run(
        command,
        cwd=tasks,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tasks / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = (tasks / "out").rglob("results_*.json")
    [samples] = (tasks / "out").rglob("samples_animals_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text())["results"]["animals"], rows


def test_local_completions_gives_the_accuracies_of_this_process(
    runtime: Runtime, native: Runtime, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers in this process is the oracle; the server runs the native decoder."""
    runtime.tokenizer.save_pretrained(tasks / "tokenizer")
    with serving(native) as live:
        theirs, samples = ask_server(live, tasks / "tokenizer", tasks)
    monkeypatch.chdir(tasks)  # lm-eval looks for data where it is started
    answer = lm_eval.simple_evaluate(
        model=HFLM(pretrained=runtime.model, tokenizer=runtime.tokenizer, batch_size=4),
        tasks=["animals"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    ours = answer["results"]["animals"]
    for metric in ("acc,none", "acc_norm,none"):
        assert theirs[metric] == ours[metric]
    here = sorted(answer["samples"]["animals"], key=lambda sample: sample["doc_id"])
    there = sorted(samples, key=lambda sample: sample["doc_id"])
    assert len(here) == len(there) == ITEMS
    for mine, other in zip(here, there, strict=True):
        for (a, greedy), (b, same) in zip(
            mine["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert float(b) == pytest.approx(float(a), abs=TOLERANCE)
            assert str(same) == str(greedy)
    assert len({float(b) for sample in there for b, _ in sample["filtered_resps"]}) > ITEMS
