"""From text and messages to token ids, without letting users forge control tokens.

Chat: the template is rendered by transformers with ``sanitize_control_tokens=True``. Control
tokens (all special tokens, and added tokens that the template itself writes) are encoded as
plain text wherever they come from a message; only those the template writes become control
tokens. What that cannot see, a template gluing a token together from pieces of the input
(``'<|' + role + '|>'``), is closed by `messages.Message` and `tools.Function`, where roles are a
fixed set and functions' names letters, and by `control_tokens.KeyGuard`, for keys. Other added
tokens, such as ``<think>`` where the template never writes it, are encoded as their token.

Completions: the prompt is raw by definition. The caller may send token ids, so parsing control
tokens in its text grants nothing new, and clients that apply a template themselves need it.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from jinja2 import TemplateError

from quantkit.errors import QuantkitError
from quantkit.serve.api.chat_format import template_text
from quantkit.serve.api.control_tokens import KeyGuard
from quantkit.serve.api.switches import check_switches, switches
from quantkit.serve.daemon_executor import DaemonExecutor
from quantkit.serve.request import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quantkit.serve.api.messages import Message

T = TypeVar("T")
#: Tokens at the end of a prompt that may hold what the template wrote of the answer.
TAIL_TOKENS = 64


class PromptEncoder:
    """Tokenizes on one thread of its own.

    Long prompts take seconds, which the event loop must not spend; one that hangs must not keep the
    process alive. Encoding also changes settings inside a fast tokenizer, so this is a copy: the
    engine decodes with the original meanwhile.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # An older transformers would hand the flag to the template and sanitize nothing.
        if (
            "sanitize_control_tokens"
            not in inspect.signature(tokenizer.apply_chat_template).parameters
        ):
            raise QuantkitError(
                "this transformers cannot keep control tokens out of user messages",
                remedy="install a version whose apply_chat_template has sanitize_control_tokens",
            )
        self._tokenizer = copy.deepcopy(tokenizer)
        self._keys = KeyGuard(tokenizer, template_text(tokenizer))
        self._switches = switches(tokenizer)
        self._thread = DaemonExecutor("quantkit-tokenizer")

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return len(self._tokenizer)

    async def text(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Ids of a raw prompt; ``special`` puts the tokens around it that the tokenizer has."""
        return await self._run(
            lambda: tuple(self._tokenizer.encode(text, add_special_tokens=special))
        )

    async def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        switched: Mapping[str, bool] | None = None,
    ) -> tuple[int, ...]:
        """Ids of a conversation, ending where the assistant begins to speak.

        Args:
            messages: what was said.
            tools: definitions of functions, as templates take them.
            switched: switches of the template, by name.

        Raises:
            RequestError: there is no template, it refuses the conversation or has no such switch,
                or a key could become a control token.
        """
        conversation = [message.for_template() for message in messages]
        check_switches(switched or {}, self._switches)
        return await self._run(
            lambda: self._apply_template(conversation, list(tools), switched or {})
        )

    async def tail(self, token_ids: Sequence[int]) -> str:
        """The text at the end of a prompt, control tokens included."""
        return await self.decode(token_ids[-TAIL_TOKENS:])

    async def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Each token's own text; half a character shows as U+FFFD."""
        return await self._run(lambda: [self.token_string(i) for i in token_ids])

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a prompt that came as ids."""
        return await self._run(
            lambda: str(self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))
        )

    def token_string(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    def _apply_template(
        self, conversation: list[dict[str, Any]], tools: list[Any], switched: Mapping[str, Any]
    ) -> tuple[int, ...]:
        if self._tokenizer.chat_template is None:
            raise RequestError(
                "messages: this model has no chat template",
                param="messages",
                remedy="use /v1/completions",
            )
        self._keys.check([tool["function"]["parameters"] for tool in tools], "tools")
        calls = [call for message in conversation for call in message.get("tool_calls", ())]
        self._keys.check([call["function"]["arguments"] for call in calls], "messages")
        try:
            ids = self._tokenizer.apply_chat_template(
                conversation,
                tools=tools or None,
                add_generation_prompt=True,
                tokenize=True,
                sanitize_control_tokens=True,
                return_dict=False,
                **switched,
            )
        except (TemplateError, ValueError, TypeError) as error:
            # Templates refuse what they were not written for, such as two user turns in a row.
            raise RequestError(
                f"messages: the chat template refuses them: {error}", param="messages"
            ) from error
        return tuple(ids)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._thread.submit(work))
