"""What a model must hold to be promoted: a mapping of gates to limits, parsed strictly.

The same mapping is a recipe's ``gate:`` section or a YAML file of its own::

    kl.mean:              {max: 0.05}       # nats per token, KL(reference || candidate)
    kl.p99:               {max: 0.8}        # nats, over tokens; a point value, no bound
    top1:                 {min: 0.93}       # share of tokens with the same most likely token
    perplexity.ratio:     {max: 1.05}       # candidate / baseline; ΔNLL is held to its ln
    size.ratio:           {max: 0.45}       # bytes / bytes of the original
    size.bits_per_weight: {max: 5.0}
    latency.ttft:         {max: 1.05}       # seconds to the first token / those of the baseline
    latency.tpot:         {max: 0.90}       # seconds per output token after it, the same
    support_intent.acc:   {margin: 0.05, floor: 0.5}   # any other <task>.<metric>

A margin is a share (0.05 is five points) and is the loss still allowed; a floor is a mean
score that baseline and candidate must both hold, or a useless model would pass.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantkit.errors import UsageError
from quantkit.results import Results

#: Line numbers of keys in the file they came from: ``"kl.mean"``, and where they are known
#: those of its own keys, ``"kl.mean max"``.
Lines = Mapping[str, int]


@dataclass(frozen=True)
class TaskGate:
    """Paired non-inferiority on one task: the loss stays inside ``margin`` (a share)."""

    task: str
    metric: str
    margin: float
    floor: float | None = None

    @property
    def name(self) -> str:
        return f"{self.task}.{self.metric}"


@dataclass(frozen=True)
class LimitGate:
    """A limit on one number: at most ``limit``, or at least for ``top1``."""

    name: str
    limit: float

    @property
    def needs_text(self) -> bool:
        """True unless it limits the size or the speed alone."""
        return not self.name.startswith(("size.", "latency."))


@dataclass(frozen=True)
class LimitRule:
    """How the limit of a `LimitGate` is written: its key, its range and an example."""

    key: str
    low: float
    high: float
    rule: str
    example: str

    def allows(self, value: float) -> bool:
        return self.low < value < self.high


_POSITIVE = (0.0, math.inf, "a finite number above 0")

LIMITS: dict[str, LimitRule] = {
    "kl.mean": LimitRule("max", *_POSITIVE, "write nats per token such as 0.05"),
    "kl.p99": LimitRule("max", *_POSITIVE, "write nats such as 0.8"),
    "top1": LimitRule("min", 0.0, 1.0, "between 0 and 1", "write a share such as 0.93"),
    "perplexity.ratio": LimitRule(
        "max", 1.0, math.inf, "a finite number above 1", "1.05 allows five percent more"
    ),
    "size.ratio": LimitRule("max", *_POSITIVE, "write a share of the original such as 0.45"),
    "size.bits_per_weight": LimitRule("max", *_POSITIVE, "write bits such as 5.0"),
    "latency.ttft": LimitRule("max", *_POSITIVE, "1.05 allows five percent more time"),
    "latency.tpot": LimitRule("max", *_POSITIVE, "1.05 allows five percent more time"),
}

#: Prefixes that no task may have, so that a misspelt limit is not taken for a task.
_RESERVED = {name.split(".")[0] for name in LIMITS}

_MARGIN = LimitRule("margin", 0.0, 1.0, "between 0 and 1", "0.05 allows a loss of five points")
_FLOOR = LimitRule("floor", 0.0, 1.0, "between 0 and 1", "write a mean score such as 0.5")

#: What PyYAML raises besides its own errors where a tag and its text do not fit: ``!!int ""`` is
#: an IndexError, ``!!bool x`` a KeyError, ``!!timestamp x`` an AttributeError.
_BAD_SCALAR = (ValueError, LookupError, AttributeError)

#: Without a policy a task may lose five points and perplexity may grow by a tenth. Both are
#: what the better 4-bit schemes hold on small models. KL has no default: its scale is the
#: model's own, and is set from the noise floor and known-good schemes.
DEFAULT_MARGIN = 0.05
DEFAULT_PERPLEXITY_RATIO = 1.10


@dataclass(frozen=True)
class Policy:
    """The gates to hold, in the order they were written, and where they come from."""

    gates: tuple[TaskGate | LimitGate, ...]
    source: str = "policy"

    @property
    def tasks(self) -> tuple[TaskGate, ...]:
        return tuple(g for g in self.gates if isinstance(g, TaskGate))

    def to_json(self) -> dict[str, dict[str, float]]:
        """The mapping that `parse_policy` reads."""
        doc = {}
        for gate in self.gates:
            if isinstance(gate, TaskGate):
                doc[gate.name] = {"margin": gate.margin}
                if gate.floor is not None:
                    doc[gate.name]["floor"] = gate.floor
            else:
                doc[gate.name] = {LIMITS[gate.name].key: gate.limit}
        return doc


def parse_policy(mapping: Any, *, source: str = "gate", lines: Lines | None = None) -> Policy:
    """Read a policy from a mapping.

    Args:
        mapping: as in the module docstring.
        source: the file's name, for errors.
        lines: line numbers of the keys where they are known; errors then say ``file:line``.

    Raises:
        UsageError: an unknown key, or a limit that is not a number of its range. NaN and
            infinite limits are refused: every comparison with NaN would read as a pass or
            as a failure, depending only on how it is written.
    """

    def where(*path: str) -> str:
        known = lines or {}
        line = known.get(" ".join(path), known.get(path[0]))
        return f"{source}:{line}" if line is not None else f"{source}:"

    if not isinstance(mapping, Mapping):
        raise UsageError(
            f"{source}: the gate policy is {type(mapping).__name__}, not a mapping",
            remedy="write lines such as `kl.mean: {max: 0.05}`",
        )
    if not mapping:
        raise UsageError(
            f"{source}: the gate policy names no gate",
            remedy="add one such as `kl.mean: {max: 0.05}`, or leave the policy out",
        )
    gates: list[TaskGate | LimitGate] = []
    for name, limits in mapping.items():
        if not isinstance(name, str):
            raise UsageError(f"{where(str(name))} key {name!r} is not a name")
        if not isinstance(limits, Mapping):
            # A nested `kl: {mean: ...}` is a mapping and is caught as an unknown key below.
            raise UsageError(
                f"{where(name)} {name}: {_shown(limits)} is not a mapping",
                remedy=f"write {{{_keys_of(name)[0]}: …}}",
            )
        gates.append(_parse_gate(name, limits, where))
    return Policy(tuple(gates), source)


def _keys_of(name: str) -> tuple[str, ...]:
    return (LIMITS[name].key,) if name in LIMITS else ("margin", "floor")


def _parse_gate(name: str, limits: Mapping[Any, Any], where: Any) -> TaskGate | LimitGate:
    task, _, metric = name.rpartition(".")
    close = difflib.get_close_matches(name, LIMITS, n=1, cutoff=0.75)
    looks_like_a_limit = close and ("max" in limits or "min" in limits)
    unknown = not task or not metric or task.split(".")[0] in _RESERVED or looks_like_a_limit
    if name not in LIMITS and unknown:
        near = close or difflib.get_close_matches(name, LIMITS, n=1, cutoff=0.3)
        raise UsageError(
            f"{where(name)} unknown key {name!r}",
            remedy=f"did you mean {near[0]!r}?" if near else "tasks are named <task>.<metric>",
        )
    allowed = _keys_of(name)
    for key in limits:
        if key not in allowed:
            raise UsageError(
                f"{where(name, str(key))} unknown key {str(key)!r} in {name}",
                remedy=f"did you mean {_nearest(str(key), allowed)!r}?",
            )
    if allowed[0] not in limits:
        raise UsageError(f"{where(name)} {name}: {allowed[0]!r} is missing")

    def number(rule: LimitRule) -> float:
        return _number(limits[rule.key], rule, f"{where(name, rule.key)} {name}: {rule.key}")

    if name in LIMITS:
        return LimitGate(name, number(LIMITS[name]))
    floor = number(_FLOOR) if "floor" in limits else None
    return TaskGate(task, metric, number(_MARGIN), floor)


def _nearest(key: str, allowed: tuple[str, ...]) -> str:
    return (difflib.get_close_matches(key, allowed, n=1, cutoff=0.0) or allowed)[0]


def _shown(value: Any) -> str:
    """A wrong value in a message: YAML aliases can make a list whose repr has no end."""
    scalar = value is None or isinstance(value, str | int | float)
    return repr(value)[:40] if scalar else f"a {type(value).__name__}"


def _number(value: Any, rule: LimitRule, label: str) -> float:
    # YAML's `true` is an int to Python, and YAML 1.1 reads `1e-2` as a string.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{label} {_shown(value)} is not a number", remedy=rule.example)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and rule.allows(number)):
        raise UsageError(f"{label} {number:g} is not {rule.rule}", remedy=rule.example)
    return number


def load_policy(path: str | Path) -> Policy:
    """Read a policy from a YAML file; errors carry ``file:line``.

    Raises:
        UsageError: absent, not YAML, a key given twice, or what `parse_policy` refuses.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: cannot be read ({e})") from e
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 1
        raise UsageError(f"{path}:{line} not YAML ({e.problem})") from e
    except (yaml.YAMLError, RecursionError) as e:
        raise UsageError(f"{path}: not YAML ({e})") from e
    lines: dict[str, int] = {}
    mapping = _construct(root, (), lines, path) if root is not None else {}
    return parse_policy(mapping, source=str(path), lines=lines)


def _construct(node: yaml.Node, at: tuple[str, ...], lines: dict[str, int], path: Path) -> Any:
    """A YAML node as plain data, noting the line of every key. Two levels are a policy."""
    if not isinstance(node, yaml.MappingNode) or len(at) >= 2:
        loader = yaml.SafeLoader("")
        try:
            return loader.construct_object(node, deep=True)
        except (yaml.YAMLError, RecursionError, *_BAD_SCALAR) as e:
            raise UsageError(f"{path}:{node.start_mark.line + 1} not a value ({e})") from e
    mapping = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise UsageError(f"{path}:{line} a key is not a name")
        key = str(key_node.value)
        if key in mapping:
            raise UsageError(f"{path}:{line} key {key!r} is given twice")
        lines[" ".join((*at, key))] = line
        mapping[key] = _construct(value_node, (*at, key), lines, path)
    return mapping


def default_policy(candidate: Results, baseline: Results) -> Policy:
    """The gates of a run without a policy: every task within five points, and perplexity
    within a tenth when both scored text.

    Raises:
        UsageError: there is nothing to hold.
    """
    tasks = {**baseline.tasks, **candidate.tasks}
    gates: list[TaskGate | LimitGate] = [
        TaskGate(name, tasks[name].metric, DEFAULT_MARGIN) for name in sorted(tasks)
    ]
    if candidate.text is not None and baseline.text is not None:
        gates.append(LimitGate("perplexity.ratio", DEFAULT_PERPLEXITY_RATIO))
    if not gates:
        raise UsageError(
            "the results hold neither a task nor text, so there is nothing to gate",
            remedy="give `quantkit eval` a --suite or a --text",
        )
    return Policy(tuple(gates), "default")
