"""Scores of written answers that lm-eval has no per-item metric for.

A suite of ``generate_until`` may name one under ``metadata``, where lm-eval does not look; its
``metric_list`` stays what `lm_eval` itself would report::

    metadata:
      score: {f1: {}}                                 # shared words, SQuAD's token F1
      score: {regex: {pattern: "^[A-Z]{2}-\\d{4}$"}}  # the whole answer matches
      score: {json: {schema: {type: object, required: [id]}}}   # valid JSON of this schema
      score: {code: {timeout: 5, memory_mb: 512}}     # runs: see `quantkit.evals.sandbox`
      score: {judge: {rubric: "...", scale: 5}}       # a model's grade: `quantkit.evals.judge`

Every scorer takes the filtered answer, the target and the item's row, and gives 0..1.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from quantkit.errors import UsageError

Row = Mapping[str, Any]

#: (answer, target, row) → score within 0..1.
Scorer = Callable[[str, str, Row], float]

#: Options of a suite's ``score`` → its scorer.
Factory = Callable[[Mapping[str, Any]], Scorer]

NONE_ALLOWED: Mapping[str, Factory] = MappingProxyType({})

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Scoring:
    """A suite's ``metadata.score``: the scorer's name and its options, both checked."""

    name: str
    options: Mapping[str, Any]


def f1(answer: str, target: str) -> float:
    """Token F1 of SQuAD (Rajpurkar et al. 2016, section 6.1): lower case, no punctuation, no
    articles, words as a multiset. Two empty texts agree."""
    ours, theirs = (_words(text) for text in (answer, target))
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _make_f1(options: Mapping[str, Any]) -> Scorer:
    return lambda answer, target, row: f1(answer, target)


def _make_regex(options: Mapping[str, Any]) -> Scorer:
    pattern = re.compile(options["pattern"], re.DOTALL)
    return lambda answer, target, row: float(pattern.fullmatch(answer) is not None)


def _make_json(options: Mapping[str, Any]) -> Scorer:
    validator = Draft202012Validator(options.get("schema", True))

    def score(answer: str, target: str, row: Row) -> float:
        try:
            # NaN and Infinity are Python's, not JSON's; a deep nest exhausts the parser.
            value = json.loads(answer, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return 0.0
        return float(validator.is_valid(value))

    return score


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


#: Scorers that need nothing but the answer. ``code`` and ``judge`` are given by the command
#: line, which alone may run programs and call endpoints.
SCORERS: dict[str, Factory] = {
    "f1": _make_f1,
    "regex": _make_regex,
    "json": _make_json,
}

#: Options of each scorer: name → (type, required).
OPTIONS: dict[str, dict[str, tuple[type | tuple[type, ...], bool]]] = {
    "f1": {},
    "regex": {"pattern": (str, True)},
    "json": {"schema": (dict, False)},
    "code": {"timeout": ((int, float), False), "memory_mb": (int, False)},
    "judge": {"rubric": (str, True), "scale": (int, False)},
}


def read_scoring(value: Any) -> Scoring:
    """Check ``metadata.score``.

    Raises:
        UsageError: an unknown scorer or option, a wrong type, or a pattern or schema that is
            none. Without file and line: the suite's reader adds them.
    """
    if not isinstance(value, Mapping) or len(value) != 1:
        raise UsageError("score: names one scorer", remedy=f"one of {', '.join(OPTIONS)}")
    name, written = next(iter(value.items()))
    options = {} if written is None else written
    if name not in OPTIONS:
        raise UsageError(f"score: unknown scorer {name!r}", remedy=f"one of {', '.join(OPTIONS)}")
    if not isinstance(options, Mapping):
        raise UsageError(f"score: {name}: {options!r} is not a mapping")
    known = OPTIONS[name]
    for key, given in options.items():
        if key not in known:
            options_known = ", ".join(known) or "none"
            raise UsageError(
                f"score: {name}: unknown option {key!r}", remedy=f"known: {options_known}"
            )
        if not isinstance(given, known[key][0]) or isinstance(given, bool):
            raise UsageError(f"score: {name}.{key}: {given!r} is of the wrong type")
    for key, (_, required) in known.items():
        if required and key not in options:
            raise UsageError(f"score: {name} needs {key!r}")
    _check_numbers(name, options)
    try:
        if name == "regex":
            re.compile(options["pattern"])
        elif name == "json":
            Draft202012Validator.check_schema(options.get("schema", True))
    except re.error as e:
        raise UsageError(f"score: regex.pattern: not a pattern ({e})") from None
    except SchemaError as e:
        raise UsageError(f"score: json.schema: not a JSON schema ({e.message})") from None
    return Scoring(name, dict(options))


def _check_numbers(name: str, options: Mapping[str, Any]) -> None:
    for key, low in (("timeout", 0), ("memory_mb", 63), ("scale", 1)):
        if key in options and not low < options[key] < 100_000:
            raise UsageError(f"score: {name}.{key}: {options[key]} is not above {low}")


def make_scorer(scoring: Scoring, extra: Mapping[str, Factory] = NONE_ALLOWED) -> Scorer:
    """The function behind a suite's ``metadata.score``.

    Args:
        scoring: as read.
        extra: ``code`` and ``judge``, where the command line allows them.

    Raises:
        UsageError: the scorer runs code or calls a model, and neither was allowed.
    """
    factory = SCORERS.get(scoring.name) or extra.get(scoring.name)
    if factory is None:
        flag = {"code": "--allow-code", "judge": "--judge URL"}[scoring.name]
        raise UsageError(
            f"scorer {scoring.name!r} is not allowed by default", remedy=f"give {flag}"
        )
    return factory(scoring.options)
