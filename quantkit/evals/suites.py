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
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.errors import UsageError
from quantkit.evals.metrics import BY_OUTPUT_TYPE, FILTERS, METRICS
from quantkit.evals.scorers import Scoring, read_scoring
from quantkit.evals.suite_lines import SuiteLines
from quantkit.evals.suite_rows import LINE, check_rows

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

#: Python that lm-eval would run; named so that the refusal can say why.
CODE_KEYS = ("process_docs", "process_results", "custom_dataset", "class", "unsafe_code")

#: Fields with these names mean what they say unless ``metadata`` names others.
DEFAULT_FIELDS = ("slice", "cluster", "must_not_flip")


@dataclass(frozen=True)
class Suite:
    """A validated suite.

    Attributes:
        name: the YAML's ``task``.
        path: the YAML file.
        config: the YAML as written.
        metric: the first of its metrics, the one that items are scored by.
        hash: sha256 over the YAML's and the data files' bytes.
        slice, cluster, must_not_flip: fields of the rows, or None.
        traffic: calibration data that looks like this suite, or None.
        splits: rows by split, as read.
        scoring: what scores an item in place of the metric, or None.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    metric: str
    hash: str
    slice: str | None
    cluster: str | None
    must_not_flip: str | None
    traffic: Path | None
    splits: Mapping[str, tuple[Mapping[str, Any], ...]] = field(repr=False)
    scoring: Scoring | None = None

    @property
    def score_name(self) -> str:
        """What the results call the score, and the gate's key holds after the dot."""
        return METRICS[self.metric][0] if self.scoring is None else self.scoring.name

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """The rows that are scored."""
        return self.splits[self.config["test_split"]]

    @property
    def n(self) -> int:
        """Number of items."""
        return len(self.rows)

    @property
    def output_type(self) -> str:
        return str(self.config["output_type"])

    def item_id(self, index: int) -> str:
        """Name of the item at a position."""
        return str(self.rows[index].get("id", index))


# --- finding ---------------------------------------------------------------------------------


def installed_folder() -> Path | None:
    """Where the suites that come with quantkit live: package data, or the source tree."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_data" / "evals", package.parent / "evals"):
        if any(folder.glob("*.yaml")):
            return folder
    return None


def find_suites(spec: str | Path) -> list[Path]:
    """The YAML files that a name, a file or a folder stands for.

    Raises:
        UsageError: there is no such suite; the nearest installed name is suggested.
    """
    text = str(spec)
    folder = installed_folder()
    names = {p.stem: p for p in sorted(folder.glob("*.yaml"))} if folder else {}
    if text in names:
        return [names[text]]
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(path.glob("*.yaml"))
        if not found:
            raise UsageError(f"{path}: holds no .yaml file")
        return found
    near = difflib.get_close_matches(text, names, n=1)
    known = f"installed: {', '.join(names)}" if names else "give a YAML file or a folder"
    raise UsageError(
        f"suite {text!r}: no such suite, file or folder",
        remedy=f"did you mean {near[0]!r}?" if near else known,
    )


def load_suites(specs: Iterable[str | Path]) -> list[Suite]:
    """Find and validate suites; each name once.

    Raises:
        UsageError: see `find_suites` and `load_suite`, or two suites share a name.
    """
    suites: dict[str, Suite] = {}
    for spec in specs:
        for path in find_suites(spec):
            suite = load_suite(path)
            other = suites.setdefault(suite.name, suite)
            if other.path.resolve() != path.resolve():
                raise UsageError(f"{path}: task {suite.name!r} is also the name of {other.path}")
    return list(suites.values())


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
    _check_scoring(lines)
    digest = hashlib.sha256(raw)
    splits = {}
    for split, files in _data_files(lines).items():
        rows: list[Mapping[str, Any]] = []
        for file in files:
            data = file.read_bytes()
            digest.update(len(data).to_bytes(8, "little") + data)
            rows += _read_rows(file, data)
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
        if not isinstance(entry, dict) or "metric" not in entry:
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


def _read_rows(file: Path, data: bytes) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise UsageError(f"{file}:{number} is not JSON ({e})") from None
        if not isinstance(row, dict):
            raise UsageError(f"{file}:{number} is not a JSON object")
        rows.append({**row, LINE: f"{file}:{number}"})
    return rows


def _nearest(word: str, known: Iterable[str]) -> str:
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(words)}"
