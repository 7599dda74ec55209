"""Models that call tools: chat templates in the formats' own words, and a tokenizer for each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

_SHOW_TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
_MESSAGES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_JSON_CALL = '{"name": "{{ call.function.name }}", "ARGS": {{ call.function.arguments | tojson }}}'


def _template(call: str) -> str:
    return _SHOW_TOOLS + _MESSAGES.replace("CALL", call)


HERMES = _template("\n<tool_call>\n" + _JSON_CALL.replace("ARGS", "arguments") + "\n</tool_call>")
#: Format → a chat template that writes in it.
TEMPLATES = {
    "hermes": HERMES,
    "qwen3_coder": _template(
        "\n<tool_call>\n<function={{ call.function.name }}>\n"
        "{% for key, value in call.function.arguments | items %}"
        "<parameter={{ key }}>\n{{ value }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
    ),
    "mistral_args": _template(
        "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}"
    ),
    "mistral": _template("[TOOL_CALLS] [" + _JSON_CALL.replace("ARGS", "arguments") + "]"),
    "llama3_json": (
        '{# Respond with {name, "parameters": dictionary of argument name and value} #}'
        "{% set help = '\"parameters\": dictionary of argument name' %}"
        + _template(_JSON_CALL.replace("ARGS", "parameters"))
    ),
}
TAGS = {
    "hermes": ("<tool_call>", "</tool_call>", "<think>", "</think>"),
    "qwen3_coder": ("<tool_call>", "</tool_call>", "<think>", "</think>"),
    "mistral_args": ("[TOOL_CALLS]", "[ARGS]"),
    "mistral": ("[TOOL_CALLS]",),
    "llama3_json": (),
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Oslo", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
HELLO = [{"role": "user", "content": "how are you?"}]
MODEL = {"model": "tiny"}
OSLO = '{"city": "Oslo", "days": 3}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {OSLO}}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
FLAT = [{"type": "function", "strict": None} | tool["function"] for tool in (WEATHER, CLOCK)]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def tool_tokenizer(
    plain: PreTrainedTokenizerFast,
    name: str = "hermes",
    *,
    tokens: bool = True,
    special: bool = False,
) -> PreTrainedTokenizerFast:
    """A tokenizer whose chat template writes calls in a format; ``tokens`` gives each tag one of
    its own, and ``special`` makes those special."""
    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = TEMPLATES[name]
    if tokens:
        tokenizer.add_tokens([AddedToken(tag, special=special) for tag in TAGS[name]])
    return tokenizer


def scripted(tokenizer: PreTrainedTokenizerFast, *texts: str) -> Callable[..., int]:
    """In place of `sampler.sample`: says each of these texts, one answer after the other."""

    def tokens() -> Iterator[int]:
        for text in texts:
            yield from tokenizer.encode(text, add_special_tokens=False)
            yield tokenizer.eos_token_id

    said = tokens()
    return lambda logits, params, generator: next(said)
