"""Switches of a chat template, such as ``enable_thinking``, that requests may set.

True or false, under the names that the template itself reads. Nothing else that ``**kwargs`` of
`apply_chat_template` would take: it sets the messages, the tokens' names and how to tokenize, too,
and text could complete a control token.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from quantkit.serve.request import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What transformers gives every template, beside Jinja's own globals and the tokens' names.
_GIVEN = {"messages", "conversations", "raise_exception", "strftime_now"}


class _Generation(Extension):
    """``{% generation %}``, which transformers adds around what an assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def switches(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The names that a tokenizer's chat templates read and nobody else sets."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
    template = tokenizer.chat_template or ""
    read: set[str] = set()
    for text in [template] if isinstance(template, str) else template.values():
        try:
            read |= meta.find_undeclared_variables(environment.parse(text))
        except TemplateError:
            continue  # it renders nothing, either
    ours = {*_GIVEN, *environment.globals, *tokenizer.special_tokens_map}
    ours |= {*tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    ours |= {*inspect.signature(tokenizer.apply_chat_template).parameters}
    return frozenset(read - ours)


def check_switches(asked: Collection[str], known: Collection[str]) -> None:
    """Raise `RequestError` if a template has no such switch."""
    for name in asked:
        if name not in known:
            named = ", ".join(sorted(known)) or "none"
            raise RequestError(
                f"chat_template_kwargs: this model's chat template has no switch {name!r}",
                param="chat_template_kwargs",
                remedy=f"it reads {named}",
            )
