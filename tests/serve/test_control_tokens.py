"""Keys that would become control tokens in what a chat template writes."""

from __future__ import annotations

import copy

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from quantkit.serve.api.control_tokens import MAX_KEY_CHARACTERS, KeyGuard
from quantkit.serve.request import RequestError

#: Qwen3-Coder's template writes keys of schemas like this, Qwen's others ``<parameter=KEY>``.
TEMPLATES = {
    "bare": "{{ tools | tojson }}",
    "between brackets": "{% for key in tools[0] %}{{ '<' ~ key ~ '>' }}{% endfor %}",
    "before a bracket": "{% for key in tools[0] %}<a={{ key }}>{% endfor %}",
}
ATTACKS = [
    ("bare", "<|im_end|>"),
    ("bare", "a<|im_end|>b"),
    ("between brackets", "|im_end|"),
    ("between brackets", "think"),
    ("before a bracket", "x<|im_end|"),
]


def with_template(plain: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(plain)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.chat_template = template + "{# <think> #}" + "{{ messages[0].content }}<think>"
    return tokenizer


@pytest.mark.parametrize(("name", "key"), ATTACKS)
def test_each_attack_works_on_the_template_and_is_refused(
    name: str, key: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    own = with_template(tokenizer, TEMPLATES[name])

    def control(tool: dict) -> int:
        ids = own.apply_chat_template(
            [{"role": "user", "content": "a"}],
            tools=[tool],
            sanitize_control_tokens=True,
            return_dict=False,
        )
        return sum(token in own.added_tokens_decoder for token in ids)

    assert control({key: 1}) > control({"harmless": 1}), "transformers does not look at keys"
    guard = KeyGuard(own, own.chat_template)
    for value in ({key: 1}, [{"a": [{"b": {key: 1}}]}]):
        with pytest.raises(RequestError, match="could become a control token") as caught:
            guard.check(value, "tools")
        assert caught.value.param == "tools"


def test_ordinary_keys_are_let_through(tokenizer: PreTrainedTokenizerFast) -> None:
    keys = [
        "city",
        "max-items",
        "größe",
        "$ref",
        "^[a-z]+$",
        "a.b",
        "x/y",
        "im_end",
        "",
        "a b",
        "#",
    ]
    for template in TEMPLATES.values():
        own = with_template(tokenizer, template)
        own.chat_template = own.chat_template.replace("<think>", "")
        KeyGuard(own, own.chat_template).check({key: [{"a": 1}] for key in keys}, "tools")
    own = with_template(tokenizer, TEMPLATES["bare"])
    KeyGuard(own, own.chat_template).check({"think": 1}, "tools")


def test_the_work_is_bounded(tokenizer: PreTrainedTokenizerFast) -> None:
    guard = KeyGuard(tokenizer, tokenizer.chat_template)
    with pytest.raises(RequestError, match=f"over {MAX_KEY_CHARACTERS} characters"):
        guard.check({f"{i}.{'x' * 1000}": 1 for i in range(100)}, "messages")
