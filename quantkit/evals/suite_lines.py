"""A suite's YAML with the line of each of its keys, for errors that name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import yaml

from quantkit.errors import UsageError

#: What PyYAML raises besides its own errors where a tag and its text do not fit: ``!!int ""`` is
#: an IndexError, ``!!bool x`` a KeyError, ``!!timestamp x`` an AttributeError.
BAD_SCALAR = (ValueError, LookupError, AttributeError)


class SuiteLines:
    """A YAML mapping that remembers the line of each of its top-level keys."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.at: dict[str, int] = {}
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as e:
            mark = e.problem_mark or e.context_mark
            self._raise(mark.line + 1 if mark else 1, f"is not YAML: {e.problem or e.context}")
        except (yaml.YAMLError, RecursionError) as e:  # a control character, nesting without end
            self._raise(1, f"is not YAML: {e}")
        if not isinstance(root, yaml.MappingNode):
            self._raise(1, "is not a mapping of keys to values")
        self._refuse_tags(root, set())
        for key, _ in root.value:
            if not isinstance(key, yaml.ScalarNode):
                self._raise(key.start_mark.line + 1, "a key is not a word")
            if key.value in self.at:
                self._raise(key.start_mark.line + 1, f"key {key.value!r} appears twice")
            self.at[str(key.value)] = key.start_mark.line + 1
        try:
            self.config: dict[str, Any] = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, *BAD_SCALAR) as e:
            self._raise(1, f"is not YAML: {e}")

    def fail(self, key: str, message: str, remedy: str | None = None) -> NoReturn:
        """Raise a `UsageError` at the line of a top-level key."""
        self._raise(self.at.get(key, 1), message, remedy)

    def _raise(self, line: int, message: str, remedy: str | None = None) -> NoReturn:
        raise UsageError(f"{self.path}:{line} {message}", remedy=remedy)

    def _refuse_tags(self, node: yaml.Node, seen: set[int]) -> None:
        if id(node) in seen:  # an alias, which may stand inside of what it names
            return
        seen.add(id(node))
        line = node.start_mark.line + 1
        if node.tag.startswith("!"):
            self._raise(
                line, f"{node.tag} is not allowed", "suites hold no code; use a Jinja template"
            )
        if not isinstance(node, yaml.ScalarNode):
            for child in node.value:
                for part in child if isinstance(child, tuple) else (child,):
                    self._refuse_tags(part, seen)
