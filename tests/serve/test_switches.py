"""Switches of a chat template that a request may set, and all that it may not."""

from __future__ import annotations

import asyncio
import copy
import inspect

import pytest
from transformers import PreTrainedTokenizerFast

from quantkit.serve.api.messages import Message
from quantkit.serve.api.prompts import PromptEncoder
from quantkit.serve.api.switches import switches
from quantkit.serve.request import RequestError

#: As Qwen3 writes it, with a name for everything that a template is given.
THINKING = (
    "{{ bos_token }}{{ strftime_now('%Y') }}{% set ns = namespace(last=0) %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if documents %}{{ documents }}{% endif %}"
    "{% for m in messages %}{% generation %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endgeneration %}{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


@pytest.fixture
def thinking(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    own = copy.deepcopy(tokenizer)
    own.chat_template = THINKING
    return own


def read(encoder: PromptEncoder, **switched: bool) -> str:
    """What the model reads of a question."""

    async def ask() -> str:
        said = [Message(role="user", content="hi")]
        return await encoder.decode(await encoder.chat(said, switched=switched))

    return asyncio.run(ask())


def test_a_switch_changes_the_prompt(thinking: PreTrainedTokenizerFast) -> None:
    encoder = PromptEncoder(thinking)
    plain = read(encoder)
    assert plain == read(encoder, enable_thinking=True)
    assert read(encoder, enable_thinking=False) == plain + "<think>\n\n</think>\n\n"


def test_only_what_the_template_reads_and_nobody_sets(
    thinking: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert switches(thinking) == {"enable_thinking"}
    assert switches(tokenizer) == set()
    thinking.chat_template = {"default": THINKING, "tool_use": "{{ messages }}{{ xml_tools }}"}
    assert switches(thinking) == {"enable_thinking", "xml_tools"}
    thinking.chat_template = None
    assert switches(thinking) == set()
    thinking.chat_template = "{% if enable_thinking %}"  # renders nothing
    assert switches(thinking) == set()


def test_no_other_name_gets_through(thinking: PreTrainedTokenizerFast) -> None:
    ours = {"messages", "conversations", "namespace", "range", "raise_exception", "strftime_now"}
    ours |= {*thinking.special_tokens_map, "bos_token", "m", "ns", "role", "enable_thinkng"}
    ours |= {*inspect.signature(thinking.apply_chat_template).parameters}
    encoder = PromptEncoder(thinking)
    for name in ours:
        with pytest.raises(RequestError, match=f"no switch '{name}'; it reads enable_thinking"):
            read(encoder, **{name: False})
