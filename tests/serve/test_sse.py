"""Events as they go out."""

from __future__ import annotations

import pytest

from quantkit.serve.api.sse import Encoder, encode

HEAD = {"id": "cmpl-1", "created": 3, "model": 'm"é\ud800', "object": "text_completion"}


@pytest.mark.parametrize("tail", [{}, {"usage": None}])
@pytest.mark.parametrize("text", ["", 'a "b"\n', "é\ud83d", "]}"])
def test_an_encoder_writes_what_encode_does(tail: dict, text: str) -> None:
    choice = {"text": text, "logprobs": None, "index": 1}
    assert Encoder(HEAD, tail)(choice) == encode(HEAD | {"choices": [choice]} | tail)
