"""Text that is written where events are read."""

from __future__ import annotations

import asyncio

import pytest
from serve_helpers import Outcome, assert_empty, finish, generate, request, running, stepped, submit

from quantkit.models.runtime import Runtime
from quantkit.serve.detokenizer import Detokenizer
from quantkit.serve.events import Event, Failed, Finished, PromptScored, TokenEvent
from quantkit.serve.transcript import Transcript


@pytest.mark.parametrize(
    "sampling", [{}, {"stop": ("\x00never",)}, {"hidden_ids": frozenset({5})}, {"max_tokens": 1}]
)
def test_the_text_is_that_of_the_tokens(native: Runtime, sampling: dict[str, object]) -> None:
    """Read on an event loop, by a function on the engine's thread, or made by the engine."""
    item = request("a", [5, 6, 7], **{"max_tokens": 40, "ignore_eos": True, **sampling})
    with running(native) as engine:
        [streamed] = generate(engine, item)
    engine = stepped(native)
    told = submit(engine, item)
    finish(engine)
    assert told.events == streamed.events
    detokenizer = Detokenizer(native.tokenizer, item.prompt_ids, hidden=item.sampling.hidden_ids)
    text = "".join(map(detokenizer.push, told.tokens)) + detokenizer.finish()
    assert told.text == text
    assert text


def test_text_that_cannot_be_written_ends_its_request_alone(
    native: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, made = Detokenizer.push, Detokenizer.__init__

    def noted(self: Detokenizer, tokenizer, prompt_ids, **options) -> None:
        made(self, tokenizer, prompt_ids, **options)
        self.broken = prompt_ids[0] == 9

    def broken(self: Detokenizer, token_id: int) -> str:
        if self.broken:
            raise RuntimeError("no text")
        return push(self, token_id)

    monkeypatch.setattr(Detokenizer, "__init__", noted)
    monkeypatch.setattr(Detokenizer, "push", broken)

    async def serve() -> list[Outcome]:
        outcomes = [Outcome([]), Outcome([])]
        items = [
            request(name, [i, 6], max_tokens=30, ignore_eos=True)
            for name, i in (("a", 9), ("b", 5))
        ]
        async for index, event in engine.stream(*items):
            outcomes[index].events.append(event)
        return outcomes

    with running(native) as engine:
        bad, good = asyncio.run(asyncio.wait_for(serve(), 60))
        assert_empty(engine)
    assert [type(event) for event in bad.events] == [Failed]
    assert "internal error" in bad.terminal.message  # type: ignore[union-attr]
    assert good.finished.reason == "length"
    assert len(good.tokens) == 30


def test_nothing_follows_a_failure(native: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = []
    transcript = Transcript(native.tokenizer, request("a", [5]), lambda: cancelled.append("a"))
    assert isinstance(transcript(PromptScored(())), PromptScored)
    assert isinstance(transcript(TokenEvent(6, "")), TokenEvent)
    with monkeypatch.context() as patched:
        patched.setattr(Detokenizer, "push", lambda self, token_id: 1 / 0)
        assert isinstance(transcript(TokenEvent(6, "")), Failed)
    assert cancelled == ["a"]
    for event in (TokenEvent(6, ""), Finished("cancelled", "", 1, 2), Failed("a step failed")):
        assert transcript(event) is None
    assert cancelled == ["a"]


@pytest.mark.parametrize("stop", [(), ("x",)])
@pytest.mark.parametrize("last", [Finished("length", "", 1, 2), Failed("a step failed")])
def test_a_request_ends_once(native: Runtime, stop: tuple[str, ...], last: Event) -> None:
    cancelled: list[str] = []
    transcript = Transcript(
        native.tokenizer, request("a", [5], stop=stop), lambda: cancelled.append("a")
    )
    assert transcript(TokenEvent(6, ""))
    assert transcript(last) == last
    for event in (TokenEvent(6, ""), Finished("cancelled", "", 1, 2), Failed("again")):
        assert transcript(event) is None
    assert not cancelled
