"""Answers of a model that knows nothing still follow their grammar."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from serve_helpers import always_guess, generate, request, running

from quantkit.models.runtime import Runtime
from quantkit.serve import structured
from quantkit.serve.engine import Engine
from quantkit.serve.request import RequestError, SamplingParams, StructuredOutputs
from quantkit.serve.speculation import SpeculativeConfig
from quantkit.serve.structured import GrammarCompiler

SCHEMA = {
    "type": "object",
    "properties": {
        "route": {"enum": ["billing", "returns"]},
        "urgent": {"type": "boolean"},
        "items": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["route", "urgent", "items"],
    "additionalProperties": False,
}
DIALOG = 'start: greeting " " name\ngreeting: "hello" | "bye"\nname: /[a-z]{3,5}/'


def asked(name: str, *, max_tokens: int = 120, **options: object):
    form = {k: v for k, v in options.items() if k in StructuredOutputs.__dataclass_fields__}
    rest = {k: v for k, v in options.items() if k not in form}
    return request(
        name,
        [5, 6, 7],
        max_tokens=max_tokens,
        structured_outputs=StructuredOutputs(**form),  # type: ignore[arg-type]
        **rest,
    )


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 1}])
def test_answers_follow_their_grammar(engine: Engine, sampling: dict[str, object]) -> None:
    """Side by side, each its own, and one that is free."""
    forms = (
        asked("json", json=json.dumps(SCHEMA), **sampling),
        asked("regex", regex=r"[0-9]{3}-[a-f]{2}", **sampling),
        asked("lark", grammar=DIALOG, **sampling),
        request("free", [5, 6, 7], **sampling),
    )
    alone = [generate(engine, item)[0] for item in forms]
    together = generate(engine, *forms)
    for one, many in zip(alone, together, strict=True):
        assert many.events == one.events
    answer, digits, dialog, _ = together
    assert all(outcome.finished.reason == "stop" for outcome in (answer, digits, dialog))
    jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", digits.text)
    assert re.fullmatch(r"(hello|bye) [a-z]{3,5}", dialog.text)


def test_any_object(engine: Engine) -> None:
    """Closing is made likely: a random model would write keys for ever."""
    tokenizer = engine.runtime.tokenizer
    close = {i: 30.0 for i in range(len(tokenizer)) if "}" in tokenizer.decode([i])}
    [outcome] = generate(engine, asked("a", json_object=True, logit_bias=close))
    assert isinstance(json.loads(outcome.text), dict)


def test_a_grammar_holds_under_speculation(native: Runtime, monkeypatch) -> None:
    always_guess(monkeypatch)
    forms = [
        asked("a", regex=r"(ab){20,30}c"),
        asked("b", regex=r"[01 ]{60}", temperature=1.0, seed=2),
    ]
    with running(native) as engine:
        plain = generate(engine, *forms)
    config = SpeculativeConfig(prompt_lookup_min=1)
    with running(native, speculative_config=config) as engine:
        guessed = generate(engine, *forms)
        assert engine.counters.accepted_tokens > 0
    for mine, theirs in zip(guessed, plain, strict=True):
        assert mine.events[:-1] == theirs.events[:-1]
    assert re.fullmatch(r"(ab){20,30}c", guessed[0].text)


def test_only_a_complete_answer_may_end(engine: Engine) -> None:
    """The end of the text is what the model wants most, and gets it when the form allows it."""
    eos = engine.runtime.tokenizer.eos_token_id
    [outcome] = generate(engine, asked("a", regex="[0-9]{4,9}", logit_bias={eos: 100}))
    assert re.fullmatch("[0-9]{4}", outcome.text)
    assert outcome.finished.reason == "stop"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "json_object": True}, "exactly one"),
        ({"json": "{"}, "json"),
        ({"json": "[]"}, "a schema is an object"),
        ({"json": "[" * 60000}, "json"),
        ({"json": '{"items": ' * 40 + "{}" + "}" * 40}, "nested deeper than 32"),
        ({"json": json.dumps({"description": "x" * 70000})}, "at most 65536"),
        ({"regex": "a" * 5000}, "at most 4096"),
        ({"regex": "a\ud800"}, "half a surrogate pair"),
    ],
)
def test_forms_that_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        StructuredOutputs(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("json", '{"type": "nonsense"}'),
        ("json", '{"$ref": "https://example.com/schema.json"}'),
        ("json", '{"type": "string", "pattern": "("}'),
        ("json", r'{"const": "\ud800"}'),
        ("regex", "("),
        ("regex", "(?=a)b"),
        ("grammar", "start: missing"),
        ("grammar", "not a grammar"),
    ],
)
def test_grammars_that_do_not_compile(engine: Engine, field: str, text: str) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        engine.check(asked("a", **{field: text}))
    assert caught.value.param == field


def test_a_form_ends_where_it_ends() -> None:
    form = StructuredOutputs(regex="a")
    for option in ({"min_tokens": 1}, {"ignore_eos": True}):
        with pytest.raises(RequestError, match="ends where the form does"):
            SamplingParams(structured_outputs=form, **option)  # type: ignore[arg-type]


def test_compiled_grammars_are_kept_and_bounded(runtime: Runtime, monkeypatch) -> None:
    monkeypatch.setattr(structured, "MAX_GRAMMARS", 2)
    compiler = GrammarCompiler(runtime.tokenizer, 384)
    compiled: list[str] = []
    compile_one = compiler._compile
    monkeypatch.setattr(
        compiler, "_compile", lambda source: (compiled.append(source.text), compile_one(source))[1]
    )
    for regex in ("a", "b", "a", "c", "a", "b"):
        compiler.check(StructuredOutputs(regex=regex))
    assert len(compiler) == 2
    assert len(compiled) == 4  # a, b, c, and b again: it was the least recently used
