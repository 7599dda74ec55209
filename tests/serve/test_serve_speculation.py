"""`benchmarks/serve_speculation.py`: what it asks for, and that forced answers are what is said."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

from benchmarks import serve_speculation as bench
from quantkit.models.llama_family import build_decoder
from quantkit.models.runtime import Runtime
from quantkit.serve.request import Request, SamplingParams


def test_extracts_are_clauses_of_their_text() -> None:
    assert len(bench.extracts()) == len(bench.PARAGRAPHS)
    for wanted, paragraph in zip(bench.EXTRACTS, bench.PARAGRAPHS, strict=True):
        assert all(value in paragraph for value in wanted.values())


def test_an_edit_quotes_most_of_its_text() -> None:
    for name, (_, text, answer) in bench.edits().items():
        same = set(text.split()) & set(answer.split())
        assert len(same) > 0.8 * len(set(text.split()))
        assert (answer == text) == name.startswith("copy")


def test_forced_answers_are_said_with_and_without_guesses(tool_runtime: Runtime) -> None:
    text = "a boat pays a deposit of nine crowns"
    # A copy: the native decoder takes the weights away.
    decoder = build_decoder(copy.deepcopy(tool_runtime.model))
    setting = bench.Setting(
        replace(tool_runtime, decoder=decoder), None, 1, time.perf_counter, 1, 8
    )
    prompt = bench.chat(tool_runtime, f"Repeat.\n\n{text}")
    answer = tool_runtime.tokenizer.encode(text)
    sampling = SamplingParams(temperature=0.0, max_tokens=len(answer), ignore_eos=True)
    for guesses in (False, True):
        engine = bench.open_engine(setting, guesses=guesses)
        bench.force(engine, {"copy": answer})
        assert bench.run(engine, [Request("copy/0", prompt, sampling)], 1).tokens == [answer]
    found = bench.measure_quotes(setting, {"copy": ("Repeat.", text, text)}, 1)
    assert 0 < found["lowest"] <= found["speedup"] <= found["highest"]
