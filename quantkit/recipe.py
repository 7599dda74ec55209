"""Recipes: a YAML file that says how a model is made cheaper and what it must still do.

A recipe is read strictly. Every mistake is a ``UsageError`` with the file, the line and,
for a misspelt word, the nearest right one::

    recipes/x.yaml:7 unknown key 'sampels'; did you mean 'samples'?

The format, with every key (only ``scheme`` is required)::

    model: HuggingFaceTB/SmolLM2-135M-Instruct   # the command line wins over it
    scheme: w4a16-g64                            # a name, or {weight: {bits: 5, group_size: 64}}
    algorithm: {gptq: {damp: 0.01}}              # a name, {name: options}, or a list in order
    keep: [lm_head]                              # stays in the model's dtype; wins over rules
    rules:                                       # last match wins; `scheme: keep` keeps a layer
      - {match: "*.down_proj", scheme: w8a16, algorithm: rtn}
    kv_cache: fp8
    calibrate:
      data: [evals:support_intent, {path: chats.jsonl, weight: 3, field: messages, split: train}]
      samples: 128
      seq_len: 512
      seed: 0
      chat_template: true
      apart: 0                                   # 1: documents of a window do not see each other
      observer: {percentile: {p: 99.99}}
      min_expert_tokens: 1                       # of a mixture of experts; fewer is an error
      all_experts: false                         # true: experts are calibrated on every token
    suites: [support_intent]
    gate: {kl.mean: {max: 0.05}}                 # checked by the gate, which owns its words

Patterns (``keep``, ``match``) are shell patterns on whole module names, such as
``*.layers.0.*``, or regular expressions behind ``re:``, which must match the whole name too.

Which algorithms and observers there are, and their options, is known only to modules above
this one; `load_recipe` takes those tables as arguments.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from quantkit.errors import UsageError
from quantkit.schemes import SCHEMES, DType, Granularity, QuantSpec, Scheme, parse_scheme
from quantkit.strict_yaml import Node, compose, nearest

#: Values of ``kv_cache``: one static scale per layer for keys and one for values.
KV_CACHES: dict[str, QuantSpec] = {
    "fp8": QuantSpec(8, DType.FLOAT, Granularity.TENSOR),
    "int8": QuantSpec(8, granularity=Granularity.TENSOR),
}

_RECIPE_KEYS = (
    "model", "scheme", "algorithm", "keep", "rules", "kv_cache", "calibrate", "suites", "gate",
)  # fmt: skip
_CALIBRATE_KEYS = (
    "data", "samples", "seq_len", "seed", "chat_template", "apart", "observer", "min_expert_tokens",
    "all_experts",
)  # fmt: skip
_SOURCE_KEYS = ("path", "weight", "field", "split")
_RULE_KEYS = ("match", "scheme", "algorithm")
_SPEC_KEYS = tuple(f.name for f in fields(QuantSpec))

#: Name → the options it takes, for algorithms or observers.
Options = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class SourceSpec:
    """One place calibration text comes from.

    Attributes:
        path: as written in the recipe: a file, a data set name, or ``evals:NAME`` for the
            traffic that belongs to an installed suite. `Recipe.locate` resolves files.
        weight: share of the samples, relative to the other sources.
        field: the column or JSON key that holds the text; found by itself if None.
        split: of a data set.
    """

    path: str
    weight: float = 1.0
    field: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Step:
    """An algorithm or an observer: its name and the options that the recipe gives it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """What the layers that match get instead of the recipe's scheme.

    Attributes:
        match: pattern on module names.
        scheme: None keeps the layers in the model's dtype.
        algorithm: None means the recipe's.
    """

    match: str
    scheme: Scheme | None
    algorithm: tuple[Step, ...] | None = None


@dataclass(frozen=True)
class Calibration:
    """What is run through the model, and what is measured.

    Attributes:
        data: empty means that the command line must give some.
        samples: number of sequences.
        seq_len: tokens in each.
        seed: of the sampling.
        chat_template: render conversations with the model's template.
        apart: share of the windows whose documents do not see each other (`quantkit.documents`).
        observer: turns what static activations look like into a range.
        min_expert_tokens: tokens that a router must send to every expert that is quantized.
        all_experts: every expert is observed on every token, whatever the router says.
    """

    data: tuple[SourceSpec, ...] = ()
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    chat_template: bool = True
    apart: float = 0.0
    observer: Step = Step("minmax")
    min_expert_tokens: int = 1
    all_experts: bool = False


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. See the module's docstring for the format.

    Attributes:
        scheme: of every linear layer that no rule and no ``keep`` pattern names.
        kv_cache: None leaves the KV cache alone. Every scheme's ``kv`` repeats it.
        gate: policy by metric, as plain values; the gate validates it.
        gate_lines: line of each key of ``gate``, for the gate's own messages.
        file: where it was read from; None for text that was given.
        sha256: of the text.
        text: as it was read, whatever becomes of the file.
    """

    scheme: Scheme
    algorithm: tuple[Step, ...] = (Step("rtn"),)
    model: str | None = None
    keep: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    kv_cache: QuantSpec | None = None
    calibrate: Calibration = Calibration()
    gate: Mapping[str, Any] = field(default_factory=dict)
    gate_lines: Mapping[str, int] = field(default_factory=dict, compare=False)
    suites: tuple[str, ...] = ()
    file: Path | None = field(default=None, compare=False)
    sha256: str = ""
    text: str = field(default="", compare=False, repr=False)

    def is_kept(self, name: str) -> bool:
        """Whether the layer with this module name stays in the model's dtype."""
        return self.scheme_for(name) is None

    def scheme_for(self, name: str) -> Scheme | None:
        """Scheme of the layer with this module name; None means that it is kept."""
        if any(matches(pattern, name) for pattern in self.keep):
            return None
        rule = self._rule(name)
        return self.scheme if rule is None else rule.scheme

    def algorithm_for(self, name: str) -> tuple[Step, ...]:
        """Algorithms that solve the layer with this module name, in order."""
        rule = self._rule(name)
        return self.algorithm if rule is None or rule.algorithm is None else rule.algorithm

    def unmatched(self, names: Iterable[str]) -> tuple[str, ...]:
        """Patterns that match none of these module names: most likely mistakes."""
        known = tuple(names)
        patterns = (*self.keep, *(rule.match for rule in self.rules))
        return tuple(p for p in patterns if not any(matches(p, n) for n in known))

    def locate(self, source: SourceSpec) -> str:
        """Path of a source's file: beside the recipe, else in the working directory.

        Returned as written if it is in neither: then it is a data set's name, or missing,
        which its reader finds out.
        """
        beside = (self.file.parent if self.file else Path()) / source.path
        return str(beside) if beside.exists() else source.path

    def _rule(self, name: str) -> Rule | None:
        return next((r for r in reversed(self.rules) if matches(r.match, name)), None)


def matches(pattern: str, name: str) -> bool:
    """Whether a shell pattern, or a regular expression behind ``re:``, matches a whole name."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def installed_recipes() -> dict[str, Path]:
    """Recipes that can be named: those of the package, or of the source tree it runs from."""
    package = Path(__file__).parent
    folder = package / "_data" / "recipes"
    if not folder.is_dir() and (package.parent / "pyproject.toml").is_file():
        folder = package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda p: p.stem)}


def load_recipe(
    name_or_file: str | Path,
    *,
    known_algorithms: Options | None = None,
    known_observers: Options | None = None,
) -> Recipe:
    """Read a recipe by file path or by installed name.

    Args:
        name_or_file: a path if it ends in .yaml or .yml or holds a separator, else a name.
        known_algorithms: name → its options; None accepts any.
        known_observers: the same for observers.

    Raises:
        UsageError: no such recipe (with the nearest names), or a mistake in it.
    """
    installed = installed_recipes()
    written = str(name_or_file)
    path = Path(written)
    if len(path.parts) == 1 and path.suffix not in (".yaml", ".yml"):
        if written not in installed:
            near = difflib.get_close_matches(written, installed, n=3, cutoff=0.5)
            raise UsageError(
                f"unknown recipe {written!r}",
                remedy=f"did you mean {' or '.join(repr(n) for n in near)}?"
                if near
                else f"known: {', '.join(installed)}; or give the path of a .yaml file",
            )
        path = installed[written]
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as e:
        named = path.stem in installed
        raise UsageError(
            f"recipe file {path} does not exist",
            remedy=f"the installed recipe is named {path.stem!r}" if named else None,
        ) from e
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"recipe file {path} cannot be read: {e}") from e
    return parse_recipe(
        text, path, known_algorithms=known_algorithms, known_observers=known_observers
    )


def parse_recipe(
    text: str,
    file: Path | None = None,
    *,
    known_algorithms: Options | None = None,
    known_observers: Options | None = None,
) -> Recipe:
    """Validate a recipe's text; see `load_recipe`."""
    root = compose(text, str(file) if file else "recipe")
    top = root.mapping(_RECIPE_KEYS)
    if "scheme" not in top:
        root.fail("no scheme", f"add a line such as `scheme: {next(iter(SCHEMES))}`")
    kv = KV_CACHES[top["kv_cache"].one_of(KV_CACHES)] if "kv_cache" in top else None
    scheme = _scheme(top["scheme"], kv)
    if scheme is None:
        top["scheme"].fail("scheme: keep would quantize nothing", "name a scheme")
    gate = top["gate"].mapping() if "gate" in top else {}
    recipe = Recipe(
        scheme=scheme,
        model=top["model"].text() if "model" in top else None,
        keep=tuple(_pattern(n) for n in top["keep"].items()) if "keep" in top else (),
        rules=tuple(_rule(n, kv, known_algorithms) for n in top["rules"].items())
        if "rules" in top
        else (),
        kv_cache=kv,
        suites=tuple(n.text() for n in top["suites"].items()) if "suites" in top else (),
        gate={key: node.plain() for key, node in gate.items()},
        gate_lines={key: node.line for key, node in gate.items()},
        file=file,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        text=text,
    )
    if "algorithm" in top:
        recipe = replace(recipe, algorithm=_steps(top["algorithm"], "algorithm", known_algorithms))
    if "calibrate" in top:
        recipe = replace(recipe, calibrate=_calibrate(top["calibrate"], known_observers))
    return recipe


def _scheme(node: Node, kv: QuantSpec | None) -> Scheme | None:
    if node.is_mapping:
        # Visited for the line of a misspelt key; parse_scheme checks the values.
        for spec in node.mapping(("weight", "input")).values():
            if spec.is_mapping:
                spec.mapping(_SPEC_KEYS)
        value: Any = node.plain()
    else:
        value = node.text()
    if value == "keep":
        return None
    try:
        return replace(parse_scheme(value), kv=kv)
    except UsageError as e:
        node.fail(e.message, e.remedy)


def _rule(node: Node, kv: QuantSpec | None, known: Options | None) -> Rule:
    keys = node.mapping(_RULE_KEYS, required=("match", "scheme"))
    scheme = _scheme(keys["scheme"], kv)
    algorithm = _steps(keys["algorithm"], "algorithm", known) if "algorithm" in keys else None
    if scheme is None and algorithm is not None:
        keys["algorithm"].fail("scheme: keep takes no algorithm", "drop the key")
    return Rule(_pattern(keys["match"]), scheme, algorithm)


def _pattern(node: Node) -> str:
    pattern = node.text()
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as e:
            node.fail(f"{pattern!r} is not a regular expression: {e}")
    return pattern


def _steps(node: Node, what: str, known: Options | None) -> tuple[Step, ...]:
    """``name``, ``{name: {option: value}}`` or a list of those, in order."""
    if node.is_list:
        return tuple(step for item in node.items() for step in _steps(item, what, known))
    if not node.is_mapping:
        name, body = node.text(), None
    else:
        entries = node.mapping()
        if len(entries) != 1:
            node.fail(
                f"{node.label}: {len(entries)} names in one mapping have no order",
                "write a list with one name an item",
            )
        name, body = next(iter(entries.items()))
    if known is not None and name not in known:
        (body or node).fail(f"unknown {what} {name!r}", nearest(name, known))
    options: dict[str, Node] = {}
    if body is not None and not body.is_null:
        options = body.mapping(tuple(sorted(known[name])) if known is not None else None)
    return (Step(name, {key: value.plain() for key, value in options.items()}),)


def _calibrate(node: Node, known_observers: Options | None) -> Calibration:
    keys = node.mapping(_CALIBRATE_KEYS)
    given: dict[str, Any] = {}
    if "data" in keys:
        given["data"] = tuple(_source(n) for n in keys["data"].items())
    wholes = (("samples", 1), ("seq_len", 2), ("seed", 0), ("min_expert_tokens", 1))
    for key, least in wholes:
        if key in keys:
            given[key] = keys[key].whole(least)
    if "apart" in keys:
        given["apart"] = keys["apart"].share()
    for key in ("chat_template", "all_experts"):
        if key in keys:
            given[key] = keys[key].truth()
    if "observer" in keys:
        steps = _steps(keys["observer"], "observer", known_observers)
        if len(steps) != 1:
            keys["observer"].fail(f"observer: {len(steps)} given, one is needed")
        given["observer"] = steps[0]
    return Calibration(**given)


def _source(node: Node) -> SourceSpec:
    if not node.is_mapping:
        return SourceSpec(node.text())
    keys = node.mapping(_SOURCE_KEYS, required=("path",))
    return SourceSpec(
        keys["path"].text(),
        keys["weight"].positive() if "weight" in keys else 1.0,
        keys["field"].text() if "field" in keys else None,
        keys["split"].text() if "split" in keys else None,
    )
