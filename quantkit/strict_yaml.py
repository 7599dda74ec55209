"""Strict reading of YAML: every mistake is a ``UsageError`` with its file and line.

`compose` gives the root `Node`; a node reads itself as exactly one type and refuses
unknown, missing and repeated keys.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from quantkit.errors import UsageError

#: Numbers that YAML 1.1 reads as text for lack of a decimal point or a signed exponent.
_EXPONENT = r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"


def compose(text: str, file: str) -> Node:
    """Read the only document in a text.

    Aliases are refused: they hide where a value comes from and may be nested without end.

    Raises:
        UsageError: not YAML, empty, or more than one document.
    """
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise UsageError(
                    f"{file}:{_line(event.start_mark)} YAML aliases are not allowed",
                    remedy="write the value out",
                )
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as e:
        line = _line(e.problem_mark or e.context_mark)
        raise UsageError(f"{file}:{line} is not YAML: {e.problem or e.context}") from e
    except yaml.YAMLError as e:
        raise UsageError(f"{file}:1 is not YAML: {e}") from e
    except RecursionError as e:
        raise UsageError(f"{file}:1 is nested too deeply") from e
    if node is None:
        raise UsageError(f"{file}:1 is empty")
    return Node(node, file)


def nearest(word: str, known: Iterable[str]) -> str:
    """A remedy that names the known word nearest to a misspelt one, or all of them."""
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(words)}" if words else "it takes none"


@dataclass(frozen=True)
class Node:
    """A YAML node that reads itself as one strict type.

    Attributes:
        node: as PyYAML composed it.
        file: for messages.
        label: its key, for messages.
    """

    node: yaml.Node
    file: str
    label: str = "file"

    @property
    def line(self) -> int:
        return _line(self.node.start_mark)

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.node, yaml.MappingNode)

    @property
    def is_list(self) -> bool:
        return isinstance(self.node, yaml.SequenceNode)

    @property
    def is_null(self) -> bool:
        return self.node.tag == "tag:yaml.org,2002:null"

    def fail(self, message: str, remedy: str | None = None) -> NoReturn:
        raise UsageError(f"{self.file}:{self.line} {message}", remedy=remedy)

    def mapping(
        self, known: tuple[str, ...] | None = None, required: tuple[str, ...] = ()
    ) -> dict[str, Node]:
        """Values by key, each once; ``known`` lists the keys that may appear."""
        if not isinstance(self.node, yaml.MappingNode):
            self.fail(f"{self.label}: {self._shown()} is not a mapping")
        found: dict[str, Node] = {}
        for raw, value in self.node.value:
            at = Node(raw, self.file, "a key")
            key = at.text()
            if known is not None and key not in known:
                at.fail(f"unknown key {key!r}", nearest(key, known))
            if key in found:
                at.fail(f"key {key!r} appears twice", f"first on line {found[key].line}")
            found[key] = Node(value, self.file, key)
        for key in required:
            if key not in found:
                self.fail(f"{self.label}: no {key}", f"needs {' and '.join(required)}")
        return found

    def items(self) -> Iterator[Node]:
        if not isinstance(self.node, yaml.SequenceNode):
            self.fail(f"{self.label}: {self._shown()} is not a list", "write [a, b]")
        return (Node(item, self.file, self.label) for item in self.node.value)

    def text(self) -> str:
        value = self.plain()
        if not isinstance(value, str) or not value:
            self.fail(f"{self.label}: {self._shown()} is not text", "quote it if it is a name")
        return value

    def one_of(self, words: Iterable[str]) -> str:
        word = self.text()
        if word not in words:
            self.fail(f"{self.label}: {word!r} is not supported", f"known: {', '.join(words)}")
        return word

    def whole(self, least: int) -> int:
        value = self.plain()
        if not isinstance(value, int) or isinstance(value, bool):
            self.fail(f"{self.label}: {self._shown()} is not a whole number")
        if value < least:
            self.fail(f"{self.label}: {value} is below {least}")
        return value

    def positive(self) -> float:
        value = self.plain()
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.fail(f"{self.label}: {self._shown()} is not a number")
        if not 0 < value < math.inf:
            self.fail(f"{self.label}: {value} is not positive and finite")
        return float(value)

    def share(self) -> float:
        value = self.plain()
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.fail(f"{self.label}: {self._shown()} is not a number")
        if not 0 <= value <= 1:
            self.fail(f"{self.label}: {value} is not from 0 to 1")
        return float(value)

    def truth(self) -> bool:
        value = self.plain()
        if not isinstance(value, bool):
            self.fail(f"{self.label}: {self._shown()} is not true or false")
        return value

    def plain(self) -> Any:
        """As Python values. Numbers such as ``1e-2``, text to YAML 1.1, are numbers here."""
        if self.is_mapping:
            return {key: value.plain() for key, value in self.mapping().items()}
        if self.is_list:
            return [item.plain() for item in self.items()]
        if self.node.tag == "tag:yaml.org,2002:str":
            value = str(self.node.value)
            bare = isinstance(self.node, yaml.ScalarNode) and self.node.style is None
            return float(value) if bare and re.fullmatch(_EXPONENT, value) else value
        for kind in ("null", "bool", "int", "float"):
            if self.node.tag == f"tag:yaml.org,2002:{kind}":
                try:
                    return yaml.SafeLoader("").construct_object(self.node)
                except (ValueError, LookupError):  # `!!int ""` is an IndexError to PyYAML
                    self.fail(f"{self.label}: {self.node.value!r} is not of the YAML type {kind}")
        if self.node.tag == "tag:yaml.org,2002:timestamp":
            return str(self.node.value)
        return self.fail(f"{self.label}: the YAML tag {self.node.tag!r} is not allowed here")

    def _shown(self) -> str:
        if self.is_mapping or self.is_list:
            return "a mapping" if self.is_mapping else "a list"
        return "nothing" if self.is_null else repr(self.plain())


def _line(mark: Any) -> int:
    return mark.line + 1 if mark else 1
