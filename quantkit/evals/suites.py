"""Evaluation suites: finding them, and refusing every mistake before a model is loaded.

A suite is a file of lm-eval's task YAML with rows in JSON lines beside it, in a strict
subset: known keys only, no ``!function`` and no Python, local data only, metrics that
lm-eval computes without a network. ``lm_eval --include_path evals/`` runs the same files
when it is started in their folder. What lm-eval does not know lives under ``metadata``::

    metadata:
      slice: topic            # field of the rows: report regressions by it
      cluster: passage_id     # field: items that are not independent
      must_not_flip: critical # field: a right answer must stay right
      traffic: data/x.jsonl   # calibration data that looks like this suite
      score: {f1: {}}         # in place of the metric: see `quantkit.evals.scorers`
      product: one sentence
      version: 1.0

Rows may have an ``id``; without one an item is known by its position.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.errors import UsageError
from quantkit.evals.metrics import BY_OUTPUT_TYPE, FILTERS, METRICS
from quantkit.evals.scorers import read_scoring
from quantkit.evals.suite import Suite
from quantkit.evals.suite_lines import SuiteLines
from quantkit.evals.suite_rows import LINE, check_rows, read_rows

#: Keys of lm-eval's task YAML that a suite may use.
KEYS = (
    "task",
    "task_alias",
    "tag",
    "description",
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "test_split",
    "fewshot_split",
    "num_fewshot",
    "fewshot_delimiter",
    "fewshot_config",
    "output_type",
    "doc_to_text",
    "doc_to_choice",
    "doc_to_target",
    "target_delimiter",
    "gen_prefix",
    "generation_kwargs",
    "metric_list",
    "filter_list",
    "repeats",
    "metadata",
)
REQUIRED = ("task", "dataset_path", "dataset_kwargs", "test_split", "output_type", "doc_to_text")
METADATA_KEYS = ("version", "product", "slice", "cluster", "must_not_flip", "traffic", "score")
GENERATION_KEYS = ("until", "max_gen_toks", "do_sample", "temperature")
FEWSHOT_KEYS = ("sampler", "split")
METRIC_OPTIONS = (
    *("metric", "aggregation", "higher_is_better"),
    *("ignore_case", "ignore_punctuation", "ignore_numbers", "regexes_to_ignore"),
)

TEXT_KEYS = ("output_type", "test_split", "fewshot_split", "target_delimiter")

#: Python that lm-eval would run; named so that the refusal can say why.
CODE_KEYS = ("process_docs", "process_results", "custom_dataset", "class", "unsafe_code")

#: In front of a name that lm-eval's own task is meant by, where an installed suite has it, too.
LM_EVAL = "lm-eval:"

#: Fields with these names mean what they say unless ``metadata`` names others.
DEFAULT_FIELDS = ("slice", "cluster", "must_not_flip")


# --- finding ---------------------------------------------------------------------------------


def installed_folder() -> Path | None:
    """Where the suites that come with quantkit live: package data, or the source tree."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_data" / "evals", package.parent / "evals"):
        if any(folder.glob("*.yaml")):
            return folder
    return None


def installed_suites() -> dict[str, Path]:
    """The suites that come with quantkit: name → YAML file."""
    folder = installed_folder()
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))} if folder else {}


def find_suites(spec: str | Path) -> list[Path]:
    """The YAML files that a name, a file or a folder stands for.

    Raises:
        UsageError: there is no such suite; the nearest installed name is suggested.
    """
    found = _look_up(spec)
    if found is None:
        raise unknown_suite(str(spec), "suite, file or folder", installed_suites())
    return found


def _look_up(spec: str | Path) -> list[Path] | None:
    names = installed_suites()
    if str(spec) in names:
        return [names[str(spec)]]
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        return None
    found = sorted(path.glob("*.yaml"))
    if not found:
        raise UsageError(f"{path}: holds no .yaml file")
    return found


def unknown_suite(text: str, kinds: str, names: Iterable[str]) -> UsageError:
    """The error of a name that is none of ``names``, which are of these ``kinds``."""
    near = difflib.get_close_matches(text, names, n=1)
    installed = installed_suites()
    known = f"installed: {', '.join(installed)}" if installed else "give a YAML file or a folder"
    return UsageError(
        f"suite {text!r}: no such {kinds}",
        remedy=f"did you mean {near[0]!r}?" if near else known,
    )


def load_suites(specs: Iterable[str | Path]) -> list[Suite]:
    """Find and validate suites; each name once.

    A spec is the name of an installed suite, a YAML file, a folder of them, or else the name of a
    task, group or tag of lm-eval's own; ``lm-eval:NAME`` is always the latter.

    Raises:
        UsageError: see `find_suites`, `load_suite` and `quantkit.evals.lm_eval_task.load_tasks`,
            or two suites share a name.
        QuantkitError: the dataset of a task of lm-eval's cannot be had.
    """
    suites: dict[str, Suite] = {}
    for spec in specs:
        for suite in _load(spec):
            other = suites.get(suite.name)
            suites[suite.name] = suite if other is None else _once(other, suite)
    return list(suites.values())


def _once(first: Suite, again: Suite) -> Suite:
    """A suite that two specs lead to, a member of every group that either of them named.

    Raises:
        UsageError: they only share the name, or their settings differ.
    """
    same = first.path.resolve() == again.path.resolve()
    if not same or first.hash != again.hash:
        why = "given twice, with different settings" if same else f"also the name of {first.path}"
        raise UsageError(
            f"{again.path}: task {again.name!r} is {why}", remedy="score one of them at a time"
        )
    groups = [name for suite in (first, again) for name in suite.provenance.get("groups", ())]
    if not groups:
        return first
    return replace(first, provenance={**first.provenance, "groups": list(dict.fromkeys(groups))})


def _load(spec: str | Path) -> list[Suite]:
    text = str(spec)
    if not text.startswith(LM_EVAL):
        found = _look_up(spec)
        if found is not None:
            return [load_suite(path) for path in found]
        if isinstance(spec, Path) or "/" in text or text.endswith((".yaml", ".yml")):
            return [load_suite(path) for path in find_suites(spec)]  # says what is missing
    # lm-eval takes seconds to import, and files do not need it.
    from quantkit.evals.lm_eval_task import load_tasks

    return load_tasks(text.removeprefix(LM_EVAL))


# --- reading ---------------------------------------------------------------------------------


def load_suite(path: str | Path) -> Suite:
    """Read and validate one suite with its rows.

    Raises:
        UsageError: with file, line and a suggestion.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: cannot be read ({e})") from e
    lines = SuiteLines(path, text)
    config = lines.config
    _check_keys(lines)
    _check_types(lines)
    _check_scoring(lines)
    digest = hashlib.sha256(raw)
    splits = {}
    for split, files in _data_files(lines).items():
        rows: list[Mapping[str, Any]] = []
        for file in files:
            try:
                data = file.read_bytes()
            except OSError as e:
                raise UsageError(f"{file}: cannot be read ({e})") from e
            digest.update(len(data).to_bytes(8, "little") + data)
            rows += read_rows(file, data)
        if not rows:
            raise UsageError(f"{files[0]}: holds no rows")
        splits[split] = tuple(rows)
    metadata = config.get("metadata") or {}
    fields = {k: metadata.get(k) for k in DEFAULT_FIELDS}
    test = splits[config["test_split"]]
    for name in DEFAULT_FIELDS:
        if fields[name] is None and any(name in row for row in test):
            fields[name] = name
        elif fields[name] is not None and not any(fields[name] in row for row in test):
            lines.fail("metadata", f"{name}: no row has a field {fields[name]!r}")
    traffic = None
    if metadata.get("traffic"):
        traffic = _beside(path, metadata["traffic"])
        if not traffic.is_file():
            lines.fail("metadata", f"traffic: {traffic} does not exist")
    check_rows(config, splits, lines.fail)
    scoring = None
    if "score" in metadata:
        if config["output_type"] != "generate_until":
            lines.fail("metadata", f"score: {config['output_type']} has no written answer")
        try:
            scoring = read_scoring(metadata["score"])
        except UsageError as e:
            lines.fail("metadata", e.message, e.remedy)
    return Suite(
        name=config["task"],
        path=path,
        config=config,
        metric=_metrics(config)[0],
        hash=digest.hexdigest(),
        slice=fields["slice"],
        cluster=fields["cluster"],
        must_not_flip=fields["must_not_flip"],
        traffic=traffic,
        splits={
            split: tuple({k: v for k, v in row.items() if k != LINE} for row in rows)
            for split, rows in splits.items()
        },
        scoring=scoring,
    )


def _check_keys(lines: SuiteLines) -> None:
    config = lines.config
    for key in config:
        if key in CODE_KEYS:
            lines.fail(str(key), f"{key} is not allowed", "suites hold no code")
        if key == "include":
            lines.fail("include", "include is not allowed", "a suite is one file; copy the keys")
        if key not in KEYS:
            lines.fail(str(key), f"unknown key {key!r}", _nearest(str(key), KEYS))
    for key in REQUIRED:
        if config.get(key) in (None, "") and not (
            key == "doc_to_text" and config.get("output_type") == "loglikelihood_rolling"
        ):
            lines.fail(key, f"has no {key}", f"it needs {', '.join(REQUIRED)}")
    for key, known in (
        ("metadata", METADATA_KEYS),
        ("generation_kwargs", GENERATION_KEYS),
        ("fewshot_config", FEWSHOT_KEYS),
        ("dataset_kwargs", ("data_files",)),
    ):
        _check_mapping(lines, key, config.get(key), known)
    if not isinstance(config["task"], str) or "/" in config["task"]:
        lines.fail("task", f"task {config['task']!r} is not a plain name")
    if config["dataset_path"] != "json":
        lines.fail(
            "dataset_path",
            f"dataset_path {config['dataset_path']!r} is not 'json'",
            "rows come from local JSON lines, named in dataset_kwargs.data_files",
        )
    if config.get("repeats", 1) != 1:
        lines.fail("repeats", f"repeats {config['repeats']!r} is not 1", "scoring is greedy")
    generation = config.get("generation_kwargs") or {}
    if generation.get("do_sample") or generation.get("temperature"):
        lines.fail("generation_kwargs", "sampling is not allowed", "suites are scored greedily")


def _check_types(lines: SuiteLines) -> None:
    metadata = lines.config.get("metadata") or {}
    named = [(key, key, lines.config.get(key)) for key in TEXT_KEYS]
    named += [("metadata", f"metadata.{k}", metadata.get(k)) for k in (*DEFAULT_FIELDS, "traffic")]
    for key, name, value in named:
        if value is not None and not isinstance(value, str):
            lines.fail(key, f"{name}: {value!r} is not text")
    for key in ("metric_list", "filter_list"):
        if not isinstance(lines.config.get(key) or [], list):
            lines.fail(key, f"{key}: {lines.config[key]!r} is not a list")


def _check_mapping(lines: SuiteLines, key: str, value: Any, known: Sequence[str]) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        lines.fail(key, f"{key}: {value!r} is not a mapping")
    for name in value:
        if name not in known:
            lines.fail(key, f"{key}: unknown key {name!r}", _nearest(str(name), known))


def _check_scoring(lines: SuiteLines) -> None:
    config = lines.config
    kind = config["output_type"]
    if kind not in BY_OUTPUT_TYPE:
        lines.fail("output_type", f"unknown output_type {kind!r}", _nearest(kind, BY_OUTPUT_TYPE))
    if kind == "multiple_choice" and "doc_to_choice" not in config:
        lines.fail("output_type", "multiple_choice needs doc_to_choice")
    if "doc_to_target" not in config:
        lines.fail("output_type", f"{kind} needs doc_to_target")
    for entry in config.get("metric_list") or ():
        if not isinstance(entry, dict) or not isinstance(entry.get("metric"), str):
            lines.fail("metric_list", f"metric_list: {entry!r} has no metric")
        _check_mapping(lines, "metric_list", entry, METRIC_OPTIONS)
    for metric in _metrics(config):
        if metric not in METRICS:
            lines.fail(
                "metric_list",
                f"metric {metric!r} is not one that is computed here; lm-eval would look for it "
                "on the network",
                _nearest(str(metric), METRICS),
            )
        if metric not in BY_OUTPUT_TYPE[kind]:
            lines.fail(
                "metric_list",
                f"metric {metric!r} does not score {kind}",
                f"use {' or '.join(BY_OUTPUT_TYPE[kind])}",
            )
    filters = config.get("filter_list") or ()
    if len(filters) > 1:
        lines.fail("filter_list", f"{len(filters)} filters", "an item has one score; keep one")
    for pipeline in filters:
        if not isinstance(pipeline, dict) or not isinstance(pipeline.get("filter"), list):
            lines.fail("filter_list", "filter_list: each entry needs a name and a list of filters")
        name = None
        for step in pipeline["filter"]:
            name = step.get("function") if isinstance(step, dict) else step
            if name not in FILTERS:
                lines.fail("filter_list", f"unknown filter {name!r}", _nearest(str(name), FILTERS))
        if name != "take_first":
            lines.fail(
                "filter_list", f"the last filter is {name!r}", "end with take_first, one answer"
            )


def _metrics(config: Mapping[str, Any]) -> list[str]:
    listed = [entry["metric"] for entry in config.get("metric_list") or ()]
    return listed or [BY_OUTPUT_TYPE[config["output_type"]][0]]


def _data_files(lines: SuiteLines) -> dict[str, list[Path]]:
    config = lines.config
    files = config["dataset_kwargs"].get("data_files")
    if not isinstance(files, dict) or not files:
        lines.fail("dataset_kwargs", "data_files: name a file for each split", "{test: x.jsonl}")
    found = {}
    for split, names in files.items():
        listed = [names] if isinstance(names, str) else names
        if not isinstance(listed, list) or not all(isinstance(n, str) for n in listed):
            lines.fail("dataset_kwargs", f"data_files.{split}: {names!r} is not a file name")
        for name in listed:
            if "://" in name:
                lines.fail("dataset_kwargs", f"data_files.{split}: {name} is not a local file")
            if not _beside(lines.path, name).is_file():
                lines.fail("dataset_kwargs", f"{_beside(lines.path, name)} does not exist")
        found[str(split)] = [_beside(lines.path, name) for name in listed]
    wanted = ["test_split"]
    if config.get("num_fewshot"):
        wanted.append("fewshot_split")
    for key in wanted:
        if config.get(key) not in found:
            lines.fail(key, f"{key} {config.get(key)!r} is not in data_files", ", ".join(found))
    return found


def _beside(path: Path, name: str) -> Path:
    return path.parent / Path(name).expanduser()


def _nearest(word: str, known: Iterable[str]) -> str:
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(words)}"
