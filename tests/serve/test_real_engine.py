"""The engine on SmolLM2-135M-Instruct: what it shares, stops and guesses shows in no answer."""

from __future__ import annotations

import json

import jsonschema
import pytest
from serve_helpers import always_guess, generate, request, running

from quantkit.models.load import load_runtime
from quantkit.models.runtime import Runtime
from quantkit.serve.request import Request, StructuredOutputs
from quantkit.serve.speculation import SpeculativeConfig

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

LETTER = (
    "Dear customer, your order 48213 of three blue lamps was sent on Monday and will reach you on "
    "Thursday. If a lamp is broken, keep the parcel and write to lamps@example.com within 14 days. "
)
SCHEMA = {
    "type": "object",
    "properties": {"order": {"type": "integer"}, "broken": {"type": "boolean"}},
    "required": ["order", "broken"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(smollm2: str) -> Runtime:
    return load_runtime(smollm2)


def chat(model: Runtime, name: str, task: str, **sampling: object) -> Request:
    ids = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{task}\n\n{LETTER}"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    return request(name, ids, **{"max_tokens": 100, "ignore_eos": True, **sampling})


def requests(model: Runtime) -> list[Request]:
    return [
        chat(model, "copy", "Repeat this letter word for word."),
        chat(model, "sampled", "Repeat this letter word for word.", temperature=0.7, seed=1),
        chat(model, "summary", "Summarize this letter.", temperature=1.0, seed=2, top_p=0.9),
        chat(model, "penalty", "Summarize this letter.", frequency_penalty=0.6),
    ]


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_answers_are_the_same_bits_however_they_were_made(
    model: Runtime, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_guess(monkeypatch)  # whatever a pass costs on this machine
    with running(model, enable_prefix_caching=False, kv_cache_dtype=kv) as engine:
        alone = [generate(engine, item)[0].events[:-1] for item in requests(model)]
    speculation = SpeculativeConfig()
    config = {"kv_cache_dtype": kv, "prefill_chunk": 96, "speculative_config": speculation}
    with running(model, **config) as engine:
        for _ in range(2):  # the second time, prompts are in the cache
            together = generate(engine, *requests(model))
            assert [outcome.events[:-1] for outcome in together] == alone
        assert engine.counters.prefix_hits > 0
        assert 0 < engine.counters.accepted_tokens <= engine.counters.draft_tokens
    # Two answers need six pages.
    with running(model, max_context=256, kv_cache_tokens=320, **config) as engine:
        together = generate(engine, *requests(model))
        assert [outcome.events[:-1] for outcome in together] == alone
        assert engine.counters.preemptions > 0


def test_extraction_follows_its_schema(model: Runtime) -> None:
    form = StructuredOutputs(json=json.dumps(SCHEMA))
    task = "Which order is it, and is a lamp broken? Answer in JSON."
    with running(model) as engine:
        item = chat(model, "a", task, structured_outputs=form, ignore_eos=False)
        [outcome] = generate(engine, item)
    jsonschema.validate(json.loads(outcome.text), SCHEMA)
