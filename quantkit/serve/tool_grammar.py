"""The grammar of answers that call tools, in llguidance's variant of Lark.

Arguments follow the function's schema. A tag that is a token of its own is written as that token,
which free text cannot hold; others are text, at which a lazy lexeme ends the free text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from quantkit.serve.chat_formats import Writing

#: Separators as models write them, which are json.dumps's; more whitespace is where small ones go
#: on for ever.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

#: Of one answer: small models repeat themselves.
MAX_CALLS = 32

Special = Callable[[str], int | None]


@dataclass(frozen=True)
class CallableFunction:
    """A function that an answer may call.

    Attributes:
        name: letters, digits, underscores and hyphens.
        schema: of its arguments, as JSON text; an object.
        strict: keywords that a grammar cannot follow are errors; otherwise they are left out.
    """

    name: str
    schema: str
    strict: bool = False


@dataclass(frozen=True)
class CallForm:
    """What an answer with calls must look like.

    Attributes:
        writing: how the model writes calls.
        functions: one at least.
        required: the answer is a call; otherwise it may be text, or text and then a call.
        many: there may be several, up to `MAX_CALLS`.
        tags: special tokens that free text may hold, if they are ones.
    """

    writing: Writing
    functions: tuple[CallableFunction, ...]
    required: bool
    many: bool
    tags: tuple[str, ...] = ()

    def lark(self, special: Special) -> str:
        """The grammar.

        Args:
            special: the id of a text that is a special token; None for any other.
        """
        way = self.writing
        head = way.begin + way.before
        rules = []
        for i, function in enumerate(self.functions):
            rules.append(f"args_{i}: %json {_schema(function)}")
            tail = f"args_{i} {_pieces(way.after, special)}"
            named = head.removeprefix(way.trigger).replace("{name}", function.name)
            rules.append(f"first_{i}: {_pieces(named, special)} {tail}")
            if self.many and way.between is not None:
                named = (way.between + way.before).replace("{name}", function.name)
                rules.append(f"next_{i}: {_pieces(named, special)} {tail}")
        each = range(len(self.functions))
        calls = "(" + " | ".join(f"first_{i}" for i in each) + ")"
        if self.many and way.between is not None:
            calls += " (" + " | ".join(f"next_{i}" for i in each) + f"){{0,{MAX_CALLS - 1}}}"
        calls += f" {_pieces(way.end, special)}"
        return "\n".join([f"calls: {calls}", *rules, *self._start(special)])

    @staticmethod
    def arguments(function: CallableFunction) -> str:
        """The grammar of one function's arguments alone."""
        return f"start: %json {_schema(function)}"

    def _start(self, special: Special) -> list[str]:
        trigger = self.writing.trigger
        if self.required:
            return [f"start: {_pieces(trigger, special)} calls"]
        if not trigger:  # the first character decides
            return ["start: TEXT | calls", r"TEXT: /(\s*[^{\s](.|\n)*)?/"]
        ids = [str(found) for tag in self.tags if (found := special(tag)) is not None]
        text = f"TEXT (<[{','.join(ids)}]> TEXT)*" if ids else "TEXT"
        rules = [f"text: {text}", r"TEXT: /(.|\n)*/"]
        if special(trigger) is not None:
            return [f"start: text ({_pieces(trigger, special)} calls)?", *rules]
        lazy = f"call_head[lazy]: TEXT {json.dumps(trigger)}"
        before = f"(TEXT <[{','.join(ids)}]>)* " if ids else ""
        return [f"start: text | {before}call_head calls", lazy, *rules]


def reasoning_then(closing: str, special: Special) -> str:
    """A grammar: the rest of some reasoning, its closing tag, then the grammar named ``answer``."""
    blank = r"/[ \n]{0,4}/"
    if special(closing) is not None:
        return f"start: TEXT {_pieces(closing, special)} {blank} @answer\nTEXT: /(.|\\n)*/"
    return (
        f"start: reasoning {blank} @answer\n"
        f"reasoning[lazy]: TEXT {json.dumps(closing)}\nTEXT: /(.|\\n)*/"
    )


def _schema(function: CallableFunction) -> str:
    """Its schema with the compiler's options, over any that the client put there."""
    schema = {"type": "object"} | json.loads(function.schema)
    return json.dumps(schema | {"x-guidance": _JSON_STYLE | {"lenient": not function.strict}})


def _pieces(text: str, special: Special) -> str:
    """A fixed text as Lark: strings, and the special tokens between them."""
    pieces = []
    for piece in re.split(r"(<[^<>\s]+>|\[/?[A-Z_]+\])", text):
        token = special(piece)
        if token is not None:
            pieces.append(f"<[{token}]>")
        elif piece:
            pieces.append(json.dumps(piece))
    return " ".join(pieces)
