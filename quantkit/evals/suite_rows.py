"""A suite's rows: read, and checked by rendering each of them the way lm-eval will."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from quantkit.errors import UsageError
from quantkit.evals.suite_keys import examples_split, metric_names

Row = Mapping[str, Any]

#: Key of a row that holds where it was read, ``file:line``. Removed before lm-eval sees it.
LINE = "__line__"

_ISO_DATE = re.compile(r"\d{4}-\d{2}-\d{2}([ T]\d{2}:\d{2}(:\d{2}(\.\d+)?)?(Z|[+-]\d{2}:?\d{2})?)?")


def read_rows(file: Path, data: bytes) -> list[Row]:
    """The objects of a file of JSON lines, each with its `LINE`.

    Raises:
        UsageError: a line that is no JSON object, at its number.
    """
    rows: list[Row] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:  # nesting without end
            raise UsageError(f"{file}:{number} is not JSON ({e})") from None
        if not isinstance(row, dict):
            raise UsageError(f"{file}:{number} is not a JSON object")
        rows.append({**row, LINE: f"{file}:{number}"})
    return rows


def check_rows(
    config: Mapping[str, Any],
    splits: Mapping[str, Sequence[Row]],
    fail: Callable[[str, str], NoReturn],
) -> None:
    """Refuse rows that lm-eval would score wrongly, or not at all.

    Args:
        config: the suite's YAML, its keys already checked.
        splits: rows by split.
        fail: raises at the line of a key of the YAML.

    Raises:
        UsageError: at the row's file and line, or by ``fail``.
    """
    for rows in splits.values():
        _check_dates(rows)
    rows = splits[config["test_split"]]
    seen: dict[str, str] = {}
    for index, row in enumerate(rows):
        name = str(row.get("id", index))
        if name in seen:
            _bad(row, f"id {name!r} is also the id of {seen[name]}")
        seen[name] = row[LINE]
    # lm-eval asks the columns of the whole split whether a word is a field or a template.
    renderer = _Renderer(config, columns={k for row in rows for k in row if k != LINE}, fail=fail)
    for row in rows:
        _check_row(config, row, renderer)
    if "brier_score" in metric_names(config):
        _check_counts(rows, renderer)
    shots = config.get("num_fewshot") or 0
    if shots:
        _, split = examples_split(config)
        examples = splits[str(split)]
        others = len(examples) - (split == config["test_split"])  # an item is no example of itself
        if shots > others:
            fail("num_fewshot", f"num_fewshot {shots} is more than the {others} rows of {split!r}")
        for row in examples:
            _check_example(config, row, renderer)


def _check_counts(rows: Sequence[Row], renderer: _Renderer) -> None:
    """Refuse rows of different numbers of choices, which lm-eval's Brier score takes for one."""
    first = len(_choices(rows[0], renderer))
    for row in rows:
        count = len(_choices(row, renderer))
        if count != first:
            _bad(row, f"has {count} choices, and brier_score needs {first} as in {rows[0][LINE]}")


def _check_example(config: Mapping[str, Any], row: Row, renderer: _Renderer) -> None:
    """Refuse a row that lm-eval cannot show with its answer."""
    _check_row(config, row, renderer)
    target = renderer.value("doc_to_target", row)
    # An index stands for its choice, but lm-eval shows the first of several labels as it is.
    indexed = isinstance(target, int) and config.get("doc_to_choice") is not None
    answer = target[0] if isinstance(target, list) else target
    if not indexed and not isinstance(answer, str):
        _bad(row, f"an example's answer {answer!r} is not text")


def _check_row(config: Mapping[str, Any], row: Row, renderer: _Renderer) -> None:
    kind = config["output_type"]
    for key in ("description", "gen_prefix"):
        if config.get(key):
            text = renderer.value(key, row)
            if not isinstance(text, str):
                _bad(row, f"{key} gives {text!r}, not text")
    if kind != "loglikelihood_rolling":
        text = renderer.value("doc_to_text", row)
        if not isinstance(text, str):
            _bad(row, f"doc_to_text gives {text!r}, not text")
        if not text.strip() and not config.get("description"):
            _bad(row, "doc_to_text gives an empty prompt")
    choices = None
    if kind == "multiple_choice" or config.get("doc_to_choice") is not None:
        choices = _choices(row, renderer)
    target = renderer.value("doc_to_target", row)
    if target is None or target == "" or target == []:
        _bad(row, "doc_to_target gives nothing")
    if kind == "multiple_choice":
        assert choices is not None  # `check_keys` asks for doc_to_choice
        for label in target if isinstance(target, list) else [target]:
            _check_label(row, label, choices, by_text=not isinstance(target, list))
    elif kind == "generate_until" and choices is not None:
        _check_label(row, target, choices, by_text=False)
    elif kind == "generate_until":
        if isinstance(target, list) and not all(isinstance(text, str) for text in target):
            _bad(row, f"doc_to_target gives {target!r}, not a list of text")
    elif not isinstance(target, str):
        _bad(row, f"doc_to_target gives {target!r}, not text")


def _choices(row: Row, renderer: _Renderer) -> list[str]:
    choices = renderer.value("doc_to_choice", row)
    if isinstance(choices, dict):
        choices = list(choices.values())
    if not isinstance(choices, list) or len(choices) < 2:
        _bad(row, f"doc_to_choice gives {choices!r}, not a list of two or more")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            _bad(row, f"choice {choice!r} is empty or not text")
    if len(set(choices)) < len(choices):
        _bad(row, "a choice appears twice", "two equal choices have one score; drop one")
    return choices


def _check_label(row: Row, label: Any, choices: Sequence[str], *, by_text: bool) -> None:
    """``by_text``: the choice itself will do. lm-eval takes several labels by index alone."""
    if isinstance(label, int) and not isinstance(label, bool):
        if not 0 <= label < len(choices):
            _bad(row, f"label {label} is out of range for {len(choices)} choices")
    elif not by_text:
        _bad(row, f"label {label!r} is not the index of a choice")
    elif label not in choices:
        _bad(row, f"label {label!r} is not one of the choices")


class _Renderer:
    """lm-eval's reading of ``doc_to_*``: a field's name, a Jinja template, or a value."""

    def __init__(
        self,
        config: Mapping[str, Any],
        columns: set[str],
        fail: Callable[[str, str], NoReturn],
    ) -> None:
        self.config = config
        self.columns = columns
        environment = SandboxedEnvironment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True
        )
        environment.filters["regex_replace"] = lambda text, pattern, repl, count=0: re.sub(
            pattern, repl, text, count=count
        )
        self.templates: dict[str, jinja2.Template] = {}
        for key in ("doc_to_text", "doc_to_choice", "doc_to_target", "description", "gen_prefix"):
            text = config.get(key)
            if not isinstance(text, str) or text in columns:
                continue
            try:
                self.templates[key] = environment.from_string(text)
            except jinja2.TemplateError as e:
                fail(key, f"{key} is not a Jinja template: {e}")
            if key in ("doc_to_choice", "doc_to_target") and re.fullmatch(r"[A-Za-z_]\w*", text):
                fail(key, f"{key}: no row has a field {text!r}")

    def value(self, key: str, row: Row) -> Any:
        """What lm-eval reads from a row; raises at the row when it cannot."""
        wanted = self.config[key]
        if key not in self.templates:
            if isinstance(wanted, str):
                if row.get(wanted) is None:
                    _bad(row, f"{key}: the row has no field {wanted!r}")
                return row[wanted]
            return wanted
        try:
            text = self.templates[key].render({k: v for k, v in row.items() if k != LINE})
        except jinja2.TemplateError as e:
            _bad(row, f"{key}: {e.message}")
        except (TypeError, ValueError, KeyError) as e:
            _bad(row, f"{key}: {e}")
        if key == "doc_to_choice":
            try:
                return ast.literal_eval(text)
            except (ValueError, SyntaxError):
                _bad(row, f"doc_to_choice gives {text!r}, not a list")
        if key == "doc_to_target" and "doc_to_choice" in self.config and text.isdigit():
            return int(text)
        return text


def _check_dates(rows: Sequence[Row]) -> None:
    """Refuse a column of ISO dates: ``lm_eval`` would read it as timestamps.

    The arrow reader behind its JSON loader infers the type, and "2024-05-01" would stand in
    the prompt as "2024-05-01 00:00:00".
    """
    for key in {k for row in rows for k in row if k != LINE}:
        values = [row[key] for row in rows if row.get(key) is not None]
        if values and all(isinstance(v, str) and _ISO_DATE.fullmatch(v) for v in values):
            _bad(
                rows[0],
                f"every row's {key!r} is an ISO date, which lm_eval would read as a timestamp",
                "write the date in another form",
            )


def _bad(row: Row, message: str, remedy: str | None = None) -> NoReturn:
    raise UsageError(f"{row[LINE]} {message}", remedy=remedy)
