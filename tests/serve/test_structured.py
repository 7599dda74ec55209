"""Answers of a model that knows nothing still follow their grammar."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections.abc import Iterator

import jsonschema
import pytest
from serve_helpers import always_guess, generate, request, running, wait_until

from quantkit.models.runtime import Runtime
from quantkit.serve import structured
from quantkit.serve.engine import Engine
from quantkit.serve.request import RequestError, SamplingParams, StructuredOutputs
from quantkit.serve.speculation import SpeculativeConfig
from quantkit.serve.structured import CompilerBusyError, Grammar, GrammarCompiler

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
LOOP = {"a": {"$ref": "#"}}
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
        engine.submit(asked("a", **{field: text}), lambda event: None)
    assert caught.value.param == field


def test_a_form_ends_where_it_ends() -> None:
    form = StructuredOutputs(regex="a")
    for option in ({"min_tokens": 1}, {"ignore_eos": True}):
        with pytest.raises(RequestError, match="ends where the form does"):
            SamplingParams(structured_outputs=form, **option)  # type: ignore[arg-type]


def test_schemas_that_end_nowhere_are_refused_at_once(engine: Engine) -> None:
    """They compile, and leave nothing to say."""
    for schema in ({"$ref": "#"}, {"type": "object", "required": ["a"], "properties": LOOP}):
        with pytest.raises(RequestError, match="json: "):
            engine.submit(asked("a", json=json.dumps(schema)), lambda event: None)


# --- the compiler ---------------------------------------------------------------------------------


def counted(compiler: GrammarCompiler, monkeypatch) -> list[str]:
    """What it compiles from now on."""
    compiled: list[str] = []
    compile_one = compiler._compile

    def count(form: StructuredOutputs) -> Grammar:
        compiled.append(str(form.regex))
        return compile_one(form)

    monkeypatch.setattr(compiler, "_compile", count)
    return compiled


def test_compiled_grammars_are_kept_and_bounded(runtime: Runtime, monkeypatch) -> None:
    monkeypatch.setattr(structured, "MAX_GRAMMARS", 2)
    compiler = GrammarCompiler(runtime.tokenizer, 384)
    compiled = counted(compiler, monkeypatch)
    for regex in ("a", "b", "a", "c", "a", "b"):
        compiler.compile(StructuredOutputs(regex=regex))
    assert len(compiler) == 2
    assert len(compiled) == 4  # a, b, c, and b again: it was the least recently used


def test_the_engine_never_compiles(runtime: Runtime, monkeypatch) -> None:
    """A request holds on to its grammar, however many others come before it runs."""
    monkeypatch.setattr(structured, "MAX_GRAMMARS", 1)
    with running(runtime) as engine:
        first = engine.grammars.attach(asked("a", regex="[0-9]{3}"))
        engine.grammars.compile(StructuredOutputs(regex="b"))
        compiled = counted(engine.grammars, monkeypatch)
        [outcome] = generate(engine, first)
        assert re.fullmatch("[0-9]{3}", outcome.text)
        assert compiled == []
        assert engine.grammars.attach(first) is first
        free = request("free", [5])
        assert engine.grammars.attach(free) is free


@pytest.fixture
def stuck(runtime: Runtime, monkeypatch) -> Iterator[GrammarCompiler]:
    """A compiler that works at the regular expression "a" for as long as the test runs."""
    compiler = GrammarCompiler(runtime.tokenizer, 384)
    compile_one, begun, go_on = compiler._compile, threading.Event(), threading.Event()

    def slow(form: StructuredOutputs) -> Grammar:
        begun.set()
        assert go_on.wait(20)
        return compile_one(form)

    monkeypatch.setattr(compiler, "_compile", slow)
    monkeypatch.setattr(structured, "COMPILE_SECONDS", 0.05)
    compiler._begin(StructuredOutputs(regex="a"))
    assert begun.wait(20)
    yield compiler
    go_on.set()
    wait_until(lambda: compiler._waiting == 0)


def test_a_grammar_that_takes_too_long_is_refused(stuck: GrammarCompiler) -> None:
    """Who waits behind it did nothing wrong."""
    for wait in (stuck.compile, lambda form: asyncio.run(stuck.compile_soon(form))):
        with pytest.raises(RequestError, match="regex: takes too long"):
            wait(StructuredOutputs(regex="a"))
        with pytest.raises(CompilerBusyError, match="is busy"):
            wait(StructuredOutputs(regex="b"))


def test_a_grammar_that_has_just_begun_may_be_sent_again(stuck: GrammarCompiler) -> None:
    stuck._began = math.inf
    for wait in (stuck.compile, lambda form: asyncio.run(stuck.compile_soon(form))):
        with pytest.raises(CompilerBusyError, match="is busy"):
            wait(StructuredOutputs(regex="a"))


def test_the_queue_of_grammars_is_bounded(stuck: GrammarCompiler, monkeypatch) -> None:
    monkeypatch.setattr(structured, "MAX_WAITING", 3)
    for regex in ("b", "c"):
        with pytest.raises(CompilerBusyError, match="is busy"):
            stuck.compile(StructuredOutputs(regex=regex))
    with pytest.raises(CompilerBusyError, match="3 grammars wait"):
        stuck.compile(StructuredOutputs(regex="d"))
    with pytest.raises(CompilerBusyError, match="is busy"):
        stuck.compile(StructuredOutputs(regex="b"))  # it waits already, and takes no other place


def test_an_event_loop_goes_on_while_a_grammar_compiles(stuck: GrammarCompiler) -> None:
    order = []

    async def slow() -> None:
        with pytest.raises(RequestError):
            await stuck.compile_soon(StructuredOutputs(regex="a"))
        order.append("slow")

    async def quick() -> None:
        order.append("quick")

    async def both() -> None:
        await asyncio.gather(slow(), quick())

    asyncio.run(both())
    assert order == ["quick", "slow"]


def test_an_error_is_not_kept(runtime: Runtime) -> None:
    compiler = GrammarCompiler(runtime.tokenizer, 384)
    for _ in range(3):
        with pytest.raises(RequestError, match="regex"):
            compiler.compile(StructuredOutputs(regex="("))
    assert len(compiler) == 0
