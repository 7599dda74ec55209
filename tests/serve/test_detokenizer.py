"""Streamed text equals decoded text, whatever the tokens split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tool_helpers import tool_tokenizer
from transformers import PreTrainedTokenizerFast

from quantkit.serve.detokenizer import (
    REPLACEMENT,
    Detokenizer,
    StopStrings,
    WindowedText,
    reader,
)


def stream(tokenizer, ids: list[int], prompt: tuple[int, ...] = ()) -> list[str]:
    subject = Detokenizer(tokenizer, prompt)
    return [*(subject.push(token) for token in ids), subject.finish()]


def windowed(tokenizer, ids: list[int]) -> list[str]:
    """The same, had the tokenizer no bytes."""
    subject = WindowedText(reader(tokenizer, skip_special_tokens=True), (), frozenset())
    return [*(subject.push(token) for token in ids), subject.finish()]


@given(text=st.text(alphabet=st.sampled_from("aé京🙂 \n'�dog"), max_size=30))
def test_pieces_add_up(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    for pieces in (stream(tokenizer, ids), windowed(tokenizer, ids)):
        assert "".join(pieces) == text
        if REPLACEMENT not in text:
            assert not any(REPLACEMENT in piece for piece in pieces), "half a character got out"


@pytest.mark.parametrize("skip", [False, True])
def test_a_tokenizer_is_read_as_it_decodes(tokenizer, skip: bool) -> None:
    """Past its wrapper, unless that has something to say."""

    class Loud(PreTrainedTokenizerFast):
        def _decode(self, *arguments, **options) -> str:
            return super()._decode(*arguments, **options).upper()

    class Louder(PreTrainedTokenizerFast):
        def decode(self, *arguments, **options) -> str:
            return super().decode(*arguments, **options).upper()

    ids = [*tokenizer.encode("The quick"), *tokenizer.all_special_ids]
    expected = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert reader(tokenizer, skip_special_tokens=skip)(ids) == expected
    assert reader(tokenizer, skip_special_tokens=skip).func == tokenizer.backend_tokenizer.decode
    for kind in (Loud, Louder):
        loud = kind(tokenizer_object=tokenizer.backend_tokenizer)
        assert reader(loud, skip_special_tokens=skip)(ids) == expected.upper()


@given(ids=st.lists(st.integers(2, 260), max_size=120))
def test_random_bytes_equal_one_decode(tokenizer, ids: list[int]) -> None:
    """Mostly invalid UTF-8. Very long runs of it may be cut anywhere, so compare the rest."""
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(stream(tokenizer, ids)) == expected
    got = "".join(windowed(tokenizer, ids))
    assert got.replace(REPLACEMENT, "") == expected.replace(REPLACEMENT, "")


def test_endless_garbage_is_shown_in_the_end(tokenizer) -> None:
    continuation = tokenizer.encode("é")[-1:]
    half = [i for i in range(2, 260) if tokenizer.decode([i]) == REPLACEMENT][:1]
    for pieces in (f(tokenizer, (half or continuation) * 300) for f in (stream, windowed)):
        assert sum(map(len, pieces[:-1])) > 100


def test_special_tokens_are_not_text(tokenizer) -> None:
    ids = tokenizer.encode("dog<|im_end|>") + tokenizer.encode("dog")
    assert "".join(stream(tokenizer, ids)) == "dogdog"


@pytest.fixture(scope="module")
def sentencepiece_style() -> PreTrainedTokenizerFast:
    """Metaspace with byte fallback, as the original Llama: decode strips a leading space."""
    words = ["<unk>", "▁hello", "▁world", "ly", "<0xE2>", "<0x82>", "<0xAC>"]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_space_before_the_first_word_stays(sentencepiece_style) -> None:
    assert stream(sentencepiece_style, [2, 3, 1], prompt=(1,)) == [" world", "ly", " hello", ""]
    assert stream(sentencepiece_style, [2, 1]) == ["world", " hello", ""]


def test_byte_fallback_waits_for_the_whole_character(sentencepiece_style) -> None:
    assert stream(sentencepiece_style, [1, 4, 5, 6, 2]) == ["hello", "", "", "€", " world", ""]


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The slow oracle: one character at a time."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_do_not_depend_on_the_split(pieces: list[str], stop: list[str]) -> None:
    subject = StopStrings(tuple(stop))
    shown = ""
    for piece in pieces:
        shown += subject.push(piece)
        assert cut("".join(pieces), tuple(stop)).startswith(shown), "showed what it had to hold"
    shown += subject.finish()
    assert shown == cut("".join(pieces), tuple(stop))
    assert subject.found == any(s in "".join(pieces) for s in stop)


def test_text_is_held_no_longer_than_needed() -> None:
    subject = StopStrings(("END",))
    assert [subject.push(piece) for piece in ("abcE", "N", "x", "E")] == ["abc", "", "ENx", ""]
    assert subject.finish() == "E"


def test_special_tokens_that_are_not_hidden_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    special = tool_tokenizer(tokenizer, "mistral", special=True)
    ids = [*special.encode("🙂[TOOL_CALLS] b"), special.eos_token_id]
    for hidden, text in (
        (None, "🙂 b"),
        (frozenset({special.eos_token_id}), "🙂[TOOL_CALLS] b"),
    ):
        subject = Detokenizer(special, (), hidden=hidden)
        assert "".join(map(subject.push, ids)) + subject.finish() == text
