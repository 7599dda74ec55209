"""A served model scored through its own API is the model that was scored in this process."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from serve_helpers import Live, serving

from quantkit.cli.main import run
from quantkit.errors import NotComparableError, QuantkitError
from quantkit.evals.endpoint import EndpointConfig, connect
from quantkit.evals.evaluate import evaluate
from quantkit.evals.evaluate_endpoint import evaluate_endpoint
from quantkit.evals.suite import Suite
from quantkit.evals.suites import load_suite
from quantkit.model import template_hash, tokenizer_hash
from quantkit.models.llama_family import build_decoder
from quantkit.models.runtime import Runtime
from quantkit.results import Results
from quantkit.serve.config import open_config
from tests.evals.eval_builders import CHOICE, GENERATE, choice_rows, write_suite

TEXT = "The quick brown fox sleeps, and the lazy dog jumps over it. " * 12
WORDS = [{"word": w, "id": w} for w in ("quick", "lazy", "Größe")]
ROLLING = {
    **{k: v for k, v in GENERATE.items() if k != "generation_kwargs"},
    "task": "tiny_rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{word}} and more words",
    "metric_list": [{"metric": "byte_perplexity"}],
}


@pytest.fixture(scope="module")
def native(runtime: Runtime) -> Runtime:
    """The tiny model in the native decoder, with the fingerprint that a loaded one has."""
    facts = {
        "model": "sha-tiny",
        "kernels": "decoder/f32",
        "tokenizer": tokenizer_hash(runtime.tokenizer),
        "chat_template": template_hash(runtime.tokenizer),
    }
    decoder = build_decoder(copy.deepcopy(runtime.model))
    return replace(runtime, fingerprint=facts, decoder=decoder)


@pytest.fixture(scope="module")
def served(native: Runtime) -> Iterator[Live]:
    with serving(native) as live:
        yield live


@pytest.fixture
def suites(tmp_path: Path) -> list[Suite]:
    cases = ((CHOICE, choice_rows()), (GENERATE, WORDS), (ROLLING, WORDS))
    return [
        load_suite(write_suite(tmp_path / str(i), config, rows))
        for i, (config, rows) in enumerate(cases)
    ]


def through(live: Live, runtime: Runtime, **options: object) -> Results:
    endpoint = connect(EndpointConfig(live.url, concurrency=3))
    return evaluate_endpoint(endpoint, runtime.tokenizer, canary=False, **options)  # type: ignore[arg-type]


def test_every_item_scores_what_it_scores_here(
    native: Runtime, served: Live, suites: list[Suite]
) -> None:
    local = evaluate(native, suites=suites, text=TEXT, seq_len=32, max_items=8)
    remote = through(served, native, suites=suites, text=TEXT, seq_len=32, max_items=8)
    assert [t.n for t in remote.tasks.values()] == [8, 3, 3]
    for name, task in local.tasks.items():
        for ours, theirs in zip(task.rows, remote.tasks[name].rows, strict=True):
            assert theirs.score == pytest.approx(ours.score, abs=1e-5)
            assert (theirs.prediction, theirs.prompt, theirs.hash) == (
                ours.prediction,
                ours.prompt,
                ours.hash,
            )
            for key, value in ours.details.items():
                assert theirs.details[key] == pytest.approx(value, abs=1e-4)
    assert local.text is not None
    assert remote.text is not None
    assert remote.text.hash == local.text.hash
    assert [w.nll for w in remote.text.windows] == pytest.approx(
        [w.nll for w in local.text.windows], abs=1e-4
    )
    assert remote.text.kl_mean is None


def test_the_fingerprint_names_the_engine_and_no_address(native: Runtime, served: Live) -> None:
    results = through(served, native, text=TEXT, seq_len=32)
    told = results.fingerprint
    assert (told["engine"], told["served_model"]) == ("endpoint", "tiny")
    assert told["server"].startswith("quantkit ")
    assert (told["model"], told["kernels"]) == ("sha-tiny", "decoder/f32")
    assert told["tokenizer"] == native.fingerprint["tokenizer"]
    assert served.url.rpartition(":")[2] not in json.dumps(results.to_json()["fingerprint"])
    assert dict(results.cost) == {}


def test_another_tokenizer_is_refused(native: Runtime, served: Live) -> None:
    other = copy.deepcopy(native.tokenizer)
    other.add_tokens(["<new>"])
    with pytest.raises(NotComparableError, match="has another tokenizer"):
        through(served, replace(native, tokenizer=other), text=TEXT, seq_len=32)


def test_canaries_refuse_random_weights(native: Runtime, served: Live) -> None:
    endpoint = connect(EndpointConfig(served.url))
    with pytest.raises(QuantkitError, match="canary"):
        evaluate_endpoint(endpoint, native.tokenizer, text=TEXT, seq_len=32)


def test_a_key_is_asked_for_and_sent(native: Runtime, tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    native.model.config.save_pretrained(folder)
    native.tokenizer.save_pretrained(folder)
    text, key = tmp_path / "text.txt", tmp_path / "key"
    text.write_text(TEXT)
    key.write_text("# the server's\nsecret\n")
    options = ["--text", str(text), "--seq-len", "32", "--no-canary"]
    with serving(native, access=open_config(["secret"])) as live:
        command = ["eval", str(folder), "--endpoint", f"{live.url}/v1", *options]
        assert run(command) == 4
        assert run([*command, "--endpoint-key-file", str(key)]) == 0
