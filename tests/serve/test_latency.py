"""Latencies of two models: what is timed, how it interleaves, and what the gate makes of it."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quantkit.cli.main import run as cli
from quantkit.errors import UsageError
from quantkit.models.runtime import Runtime
from quantkit.results import Results
from quantkit.serve import latency
from quantkit.serve.engine import Engine
from quantkit.serve.latency import measure_pair
from quantkit.timings import PairedTimings

HOST = {"machine": "x86_64", "cpu": "one", "threads": 1}
PROMPTS = {f"p{i}": [1 + i, 2, 3, 4 + i] for i in range(4)}


def pair(runtime: Runtime, **changes: Any) -> Any:
    options = {"new_tokens": 3, "concurrency": 2, "repeats": 2, "host": HOST, **changes}
    return measure_pair(runtime, runtime, (PROMPTS, PROMPTS), **options)


def test_every_repeat_of_every_prompt_is_timed(runtime: Runtime) -> None:
    for side in pair(runtime):
        assert (side.host, side.concurrency) == (HOST, 2)
        for table in (side.ttft, side.tpot):
            assert list(table) == list(PROMPTS)
            assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in table.values())


def test_groups_alternate_between_the_models(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A, B and B, A in turn, the same prompts next to each other, one round ahead to warm up."""
    seen: list[tuple[str, tuple[str, ...]]] = []
    engines: list[Any] = []
    answer = latency._answer

    def watch(engine: Any, prompts: Any, new_tokens: int) -> Any:
        if engine not in engines:
            engines.append(engine)
        assert engine.live == 0  # the other model is idle, and so is this one
        seen.append(("ab"[engines.index(engine)], tuple(prompts)))
        return answer(engine, prompts, new_tokens)

    monkeypatch.setattr(latency, "_answer", watch)
    pair(runtime, repeats=1)
    first, second = ("p0", "p1"), ("p2", "p3")
    assert seen == [
        *(("a", first), ("b", first), ("b", second), ("a", second)),
        *(("b", first), ("a", first), ("a", second), ("b", second)),
    ]


def test_answers_go_past_the_end_of_text(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token ends a text here; the answers have their full length all the same."""
    monkeypatch.setattr(Runtime, "eos_ids", property(lambda _: frozenset(range(100_000))))
    assert len(pair(runtime, repeats=1)[0].tpot) == len(PROMPTS)


def test_every_round_reads_its_prompts(native: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt found in the prefix cache would time the cache. A page holds 64 tokens."""
    engines: list[Engine] = []

    def make(*options: Any) -> Engine:
        engines.append(Engine(*options))
        return engines[-1]

    monkeypatch.setattr(latency, "Engine", make)
    prompts = {name: [*ids, *range(2, 72)] for name, ids in PROMPTS.items()}
    options = {"new_tokens": 2, "concurrency": 2, "repeats": 1, "host": HOST}
    measure_pair(native, native, (prompts, prompts), **options)
    assert [engine.counters.prefix_hits for engine in engines] == [0, 0]
    read = sum(map(len, prompts.values())) * 2  # one round ahead to warm up
    for engine in engines:
        assert f"quantkit_prompt_tokens_total {read:.1f}" in engine.metrics.render().decode()


def test_a_baseline_that_does_not_start_leaves_no_thread(runtime: Runtime) -> None:
    before = threading.enumerate()
    long = {name: [1] * 10_000 for name in PROMPTS}
    with pytest.raises(UsageError, match="more than the model's context"):
        measure_pair(
            runtime, runtime, (PROMPTS, long), new_tokens=3, concurrency=2, repeats=1, host=HOST
        )
    assert threading.enumerate() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_tokens": 1}, "no time per output token"),
        ({"concurrency": 3}, "no whole number of groups of 3"),
        ({"new_tokens": 100_000}, "more than the model's context"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    runtime: Runtime, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        pair(runtime, **changes)


@pytest.fixture
def folder(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of a checkpoint and its original, and a loader that gives both."""
    loader = ModuleType("quantkit.models.load")
    loader.load_runtime = lambda path, **_: replace(  # type: ignore[attr-defined]
        runtime, name=path, fingerprint={**runtime.fingerprint, "model": path}
    )
    monkeypatch.setitem(sys.modules, "quantkit.models.load", loader)
    monkeypatch.chdir(tmp_path)
    shared = {**runtime.fingerprint, "tokenizer": "t", "chat_template": "c"}
    for name in ("ours", "theirs"):
        Results({**shared, "model": name}).save(f"{name}.json")
    Path("gate.yaml").write_text("latency.ttft: {max: 100}\nlatency.tpot: {max: 100}\n")
    return tmp_path


BENCH = (
    *("bench", "decode", "ours", "--reference", "theirs", "--timings", "timings.json"),
    *("--prompts", "8", "--prompt-tokens", "6", "--new-tokens", "2", "--repeats", "1"),
)
GATE = (
    *("gate", "ours.json", "--baseline", "theirs.json", "--timings", "timings.json"),
    *("--policy", "gate.yaml"),
)


def test_from_bench_to_gate(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli([*BENCH, "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["prompts"] == 8
    assert said["ttft"]["lower"] <= said["ttft"]["ratio"] <= said["ttft"]["upper"]
    document = json.loads(Path("timings.json").read_text())
    assert PairedTimings.from_json(document).to_json() == document
    assert cli([*GATE, "--json"]) == 0
    verdict = json.loads(capfd.readouterr().out)
    assert [check["name"] for check in verdict["checks"]] == ["latency.ttft", "latency.tpot"]
    assert verdict["checks"][0]["value"] == pytest.approx(said["ttft"]["ratio"])

    Path("gate.yaml").write_text("latency.tpot: {max: 0.001}\n")
    assert cli([*GATE]) == 1

    def refused(change: Any, message: str) -> None:
        changed = json.loads(json.dumps(document))
        change(changed)
        Path("timings.json").write_text(json.dumps(changed))
        assert cli([*GATE]) == 5
        assert message in capfd.readouterr().err

    refused(lambda d: d["candidate"].update(model="another"), "timed the candidate with model")
    refused(lambda d: d["baseline"].update(kernels="another"), "timed the baseline with kernels")
    refused(lambda d: d["baseline"]["timings"]["host"].update(cpu="another"), "host cpu differs")
    scored = json.loads(Path("ours.json").read_text())
    scored["fingerprint"]["host"] = {"machine": "x86_64", "cpu": "another", "threads": 1}
    Path("ours.json").write_text(json.dumps(scored))
    refused(lambda d: None, "scored on another")
    Path("timings.json").write_text("{}")
    assert cli([*GATE]) == 2


def test_prompts_from_documents(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [json.dumps({"text": f"the order {i} is late and nobody answers"}) for i in range(8)]
    Path("traffic.jsonl").write_text("\n".join(rows))
    assert cli([*BENCH, "--data", "traffic.jsonl"]) == 0
    assert "8 prompts, 1 in flight" in capfd.readouterr().out
    timed = json.loads(Path("timings.json").read_text())["candidate"]["timings"]["ttft"]
    assert sorted(timed) == [f"document-{i:03d}" for i in range(8)]
    assert cli([*BENCH, "--data", "traffic.jsonl", "--prompts", "9"]) == 2


def test_one_model_has_nothing_to_compare_with(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for option in (["--timings", "timings.json"], ["--data", "traffic.jsonl"], ["--prompts", "9"]):
        assert cli(["bench", "decode", "ours", *option]) == 2
        assert f"{option[0]}: belongs to a comparison of two models" in capfd.readouterr().err
