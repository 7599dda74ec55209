"""Tokens that are bytes, against the tokenizers library's own decoder."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quantkit.serve.byte_level import ByteLevelText, ByteLevelVocabulary, spelled
from quantkit.serve.detokenizer import REPLACEMENT, WindowedText, growing_text

#: Every byte, tokens of several and of parts of characters, and added ones, which need not spell.
WORDS = ["Ġhello", "Ċ", "ðŁ", "ĻĤ", "Ã©", "é", "Äł"]
ADDED = ["<|end|>", "two words", "京", "\x00"]


@dataclass(frozen=True)
class Case:
    tokenizer: PreTrainedTokenizerFast
    count: int


def made() -> Case:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: place for place, word in enumerate([*alphabet, *WORDS])}
    backend = Tokenizer(models.BPE(words, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=place == 0) for place, text in enumerate(ADDED)])
    return Case(PreTrainedTokenizerFast(tokenizer_object=backend), len(words) + len(ADDED))


CASE = made()
TOKENS = st.lists(st.integers(0, CASE.count + 3), max_size=40)  # some that it does not have


@given(ids=TOKENS, skip=st.booleans())
def test_text_is_what_the_library_decodes(ids: list[int], skip: bool) -> None:
    vocabulary = ByteLevelVocabulary.of(CASE.tokenizer, skip_special_tokens=skip)
    assert vocabulary is not None
    subject = ByteLevelText(vocabulary, (), frozenset())
    text = "".join(map(subject.push, ids)) + subject.finish()
    assert text == CASE.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=skip)


@given(ids=TOKENS, context=TOKENS, hidden=st.frozensets(st.integers(250, CASE.count)))
def test_hidden_tokens_are_as_if_they_were_not(
    ids: list[int], context: list[int], hidden: frozenset[int]
) -> None:
    def text(ids: list[int], context: list[int], hidden: frozenset[int]) -> list[str]:
        subject = growing_text(CASE.tokenizer, context, hidden)
        assert isinstance(subject, ByteLevelText)
        return [*map(subject.push, ids), subject.finish()]

    shown = [token for token in ids if token not in hidden]
    seen = [token for token in context if token not in hidden]
    pieces = text(ids, context, hidden)
    assert [piece for token, piece in zip(ids, pieces, strict=False) if token in hidden] == [
        "" for token in ids if token in hidden
    ]
    assert "".join(pieces) == "".join(text(shown, seen, frozenset()))


def test_a_character_that_the_prompt_begins_is_shown_whole() -> None:
    first, second = (CASE.tokenizer.convert_tokens_to_ids(word) for word in ("ðŁ", "ĻĤ"))
    subject = growing_text(CASE.tokenizer, (first,), None)
    assert subject.push(second) + subject.finish() == "🙂"
    subject = growing_text(CASE.tokenizer, (), None)
    assert [subject.push(first), subject.finish(), subject.finish()] == ["", REPLACEMENT, ""]


def test_every_token_of_a_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    backend = tokenizer.backend_tokenizer
    for skip in (False, True):
        vocabulary = ByteLevelVocabulary.of(tokenizer, skip_special_tokens=skip)
        assert vocabulary is not None
        for token in range(len(tokenizer) + 1):
            told = vocabulary[token].decode("utf-8", "replace")
            assert told == backend.decode([token], skip_special_tokens=skip)
            assert vocabulary[token] == vocabulary[token]


def test_a_vocabulary_is_made_once_and_not_kept() -> None:
    case = made()
    kept = weakref.ref(case.tokenizer)
    first = ByteLevelVocabulary.of(case.tokenizer, skip_special_tokens=True)
    assert ByteLevelVocabulary.of(case.tokenizer, skip_special_tokens=True) is first
    other = ByteLevelVocabulary.of(case.tokenizer, skip_special_tokens=False)
    assert other is not first
    del case
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
        decoders.Metaspace(),
        None,
    ],
)
def test_other_decoders_are_asked_themselves(decoder: decoders.Decoder | None) -> None:
    backend = Tokenizer(models.BPE({"Ġa": 0, "b": 1}, []))
    if decoder is not None:
        backend.decoder = decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert isinstance(growing_text(tokenizer, (), None), WindowedText)


def test_a_tokenizer_with_a_say_of_its_own_is_asked() -> None:
    class Loud(PreTrainedTokenizerFast):
        def _decode(self, *arguments, **options) -> str:
            return super()._decode(*arguments, **options).upper()

    loud = Loud(tokenizer_object=CASE.tokenizer.backend_tokenizer)
    subject = growing_text(loud, (), None)
    assert subject.push(CASE.tokenizer.convert_tokens_to_ids("Ġhello")) == " HELLO"


@pytest.mark.parametrize(
    ("token", "bytes_"), [("Ġhello", b" hello"), ("two words", b"two words"), ("é", b"\xe9")]
)
def test_spelling(token: str, bytes_: bytes) -> None:
    assert spelled(token) == bytes_
