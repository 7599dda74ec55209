"""Keys of a suite's YAML: which there are, and what each of them may hold.

What lm-eval would run as code, look for on the network, ignore, or fail on once a model is loaded
is refused at the key's line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quantkit.evals.metrics import AGGREGATIONS, BY_OUTPUT_TYPE, FILTERS, METRICS
from quantkit.evals.suite_lines import SuiteLines

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

#: How lm-eval draws examples: at random, or the first of their split.
SAMPLERS = ("default", "first_n")

METRIC_KEYS = ("metric", "aggregation", "higher_is_better")

#: What a metric of written answers takes besides: flags, and patterns that are cut out.
FLAGS = ("ignore_case", "ignore_punctuation", "ignore_numbers")
PATTERNS = "regexes_to_ignore"

TEXT_KEYS = (
    *("output_type", "test_split", "fewshot_split", "target_delimiter"),
    *("description", "fewshot_delimiter", "gen_prefix"),
)

#: Text that lm-eval puts between others: a null would stand there as "None".
DELIMITERS = ("target_delimiter", "fewshot_delimiter")

#: Python that lm-eval would run; named so that the refusal can say why.
CODE_KEYS = ("process_docs", "process_results", "custom_dataset", "class", "unsafe_code")

#: Fields with these names mean what they say unless ``metadata`` names others.
DEFAULT_FIELDS = ("slice", "cluster", "must_not_flip")


def check_keys(lines: SuiteLines) -> None:
    """Refuse a YAML that lm-eval could not score, or not as it is written.

    Raises:
        UsageError: at the line of the first bad key.
    """
    _check_known(lines)
    _check_text(lines)
    _check_requests(lines)
    _check_generation(lines)
    _check_examples(lines)
    _check_metrics(lines)
    _check_filters(lines)


def metric_names(config: Mapping[str, Any]) -> list[str]:
    """The metrics of a YAML; those of its kind of request where it lists none."""
    listed = [entry["metric"] for entry in config.get("metric_list") or ()]
    return listed or [BY_OUTPUT_TYPE[config["output_type"]][0]]


def examples_split(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """(the key that says it, the split that few-shot examples are drawn from).

    lm-eval lets ``fewshot_config`` have the last word.
    """
    own = config.get("fewshot_config") or {}
    if "split" in own:
        return "fewshot_config", own["split"]
    return "fewshot_split", config.get("fewshot_split")


def _check_known(lines: SuiteLines) -> None:
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


def _check_text(lines: SuiteLines) -> None:
    config = lines.config
    metadata = config.get("metadata") or {}
    named = [(key, key, config.get(key)) for key in TEXT_KEYS]
    named += [("metadata", f"metadata.{k}", metadata.get(k)) for k in (*DEFAULT_FIELDS, "traffic")]
    for key, name, value in named:
        if value is not None and not isinstance(value, str):
            lines.fail(key, f"{name}: {value!r} is not text")
    for key in DELIMITERS:
        if key in config and config[key] is None:
            lines.fail(key, f"{key} has no value", 'write "" for none')
    for key in ("metric_list", "filter_list"):
        if config.get(key) is not None and not isinstance(config[key], list):
            lines.fail(key, f"{key}: {config[key]!r} is not a list")
    if config.get("filter_list") == []:
        lines.fail("filter_list", "filter_list is empty, and so would be every answer", "drop it")
    target = config.get("doc_to_target")
    if target is not None and not isinstance(target, str | int | list):
        lines.fail("doc_to_target", f"doc_to_target: {target!r} is neither text nor a list of it")


def _check_requests(lines: SuiteLines) -> None:
    kind = lines.config["output_type"]
    if kind not in BY_OUTPUT_TYPE:
        lines.fail("output_type", f"unknown output_type {kind!r}", _nearest(kind, BY_OUTPUT_TYPE))
    if kind == "multiple_choice" and "doc_to_choice" not in lines.config:
        lines.fail("output_type", "multiple_choice needs doc_to_choice")
    if "doc_to_target" not in lines.config:
        lines.fail("output_type", f"{kind} needs doc_to_target")


def _check_generation(lines: SuiteLines) -> None:
    generation = lines.config.get("generation_kwargs") or {}
    if generation.get("do_sample") or generation.get("temperature", 0) != 0:
        lines.fail("generation_kwargs", "sampling is not allowed", "suites are scored greedily")
    until = generation.get("until", [])
    if not all(isinstance(stop, str) for stop in (until if isinstance(until, list) else [until])):
        lines.fail("generation_kwargs", f"until: {until!r} is neither text nor a list of it")
    limit = generation.get("max_gen_toks", 1)
    if not _is_whole(limit, least=1):
        lines.fail("generation_kwargs", f"max_gen_toks: {limit!r} is not a whole number above 0")


def _check_examples(lines: SuiteLines) -> None:
    count = lines.config.get("num_fewshot", 0)
    if count is not None and not _is_whole(count, least=0):
        lines.fail("num_fewshot", f"num_fewshot: {count!r} is not a whole number from 0 on")
    own = lines.config.get("fewshot_config") or {}
    sampler = own.get("sampler", SAMPLERS[0])
    if sampler not in SAMPLERS:
        lines.fail(
            "fewshot_config", f"unknown sampler {sampler!r}", _nearest(str(sampler), SAMPLERS)
        )
    if not isinstance(own.get("split", ""), str):
        lines.fail("fewshot_config", f"split: {own['split']!r} is not text")


def _check_metrics(lines: SuiteLines) -> None:
    kind = lines.config["output_type"]
    known = (*METRIC_KEYS, *((*FLAGS, PATTERNS) if kind == "generate_until" else ()))
    for entry in lines.config.get("metric_list") or ():
        if not isinstance(entry, dict) or not isinstance(entry.get("metric"), str):
            lines.fail("metric_list", f"metric_list: {entry!r} has no metric")
        _check_mapping(lines, "metric_list", entry, known)
    for metric in metric_names(lines.config):
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
    for entry in lines.config.get("metric_list") or ():
        _check_metric_options(lines, entry)


def _check_metric_options(lines: SuiteLines, entry: Mapping[str, Any]) -> None:
    metric = entry["metric"]
    # Both are what the metric is: another value would go unheeded.
    only = {
        "aggregation": AGGREGATIONS.get(metric, "mean"),
        "higher_is_better": metric not in AGGREGATIONS,
    }
    for key, value in only.items():
        if entry.get(key, value) != value:
            lines.fail("metric_list", f"{metric}: {key} {entry[key]!r} is not {value!r}", "drop it")
    for key in FLAGS:
        if not isinstance(entry.get(key, False), bool):
            lines.fail("metric_list", f"{metric}: {key} {entry[key]!r} is not true or false")
    _check_patterns(lines, "metric_list", PATTERNS, entry.get(PATTERNS))


def _check_filters(lines: SuiteLines) -> None:
    filters = lines.config.get("filter_list") or ()
    if len(filters) > 1:
        lines.fail("filter_list", f"{len(filters)} filters", "an item has one score; keep one")
    for pipeline in filters:
        steps = pipeline.get("filter") if isinstance(pipeline, dict) else None
        if not isinstance(steps, list) or not isinstance(pipeline.get("name"), str):
            lines.fail("filter_list", "filter_list: each entry needs a name and a list of filters")
        _check_mapping(lines, "filter_list", pipeline, ("name", "filter"))
        name = None
        for step in steps:
            if name == "take_first":
                lines.fail("filter_list", "take_first is not the last filter", "move it there")
            name = step.get("function") if isinstance(step, dict) else None
            if not isinstance(name, str) or name not in FILTERS:
                lines.fail(
                    "filter_list",
                    f"unknown filter {step if name is None else name!r}",
                    _nearest(str(name), FILTERS) if name else "write {function: NAME}",
                )
            _check_step(lines, step)
        if name != "take_first":
            lines.fail(
                "filter_list", f"the last filter is {name!r}", "end with take_first, one answer"
            )


def _check_step(lines: SuiteLines, step: Mapping[str, Any]) -> None:
    name, kind = step["function"], lines.config["output_type"]
    _check_mapping(lines, "filter_list", step, ("function", *FILTERS[name]))
    if name != "take_first" and kind != "generate_until":
        lines.fail("filter_list", f"filter {name!r} reads written answers; {kind} has none")
    if "regex_pattern" in step:
        _check_patterns(lines, "filter_list", "regex_pattern", [step["regex_pattern"]])
    _check_patterns(lines, "filter_list", PATTERNS, step.get(PATTERNS))
    if step.get("group_select", 0) not in (0, -1):
        lines.fail(
            "filter_list",
            f"{name}: group_select {step['group_select']!r} is neither 0 nor -1",
            "take the first match or the last; an answer may have no other",
        )
    if name == "map":
        mapped, rest = step.get("mapping_dict"), step.get("default_value")
        if not isinstance(mapped, dict) or not all(
            isinstance(text, str) for text in (*mapped.values(), rest)
        ):
            lines.fail("filter_list", "map: needs mapping_dict and default_value, both of text")
    elif not isinstance(step.get("fallback", ""), str):
        lines.fail("filter_list", f"{name}: fallback {step['fallback']!r} is not text")


def _check_patterns(lines: SuiteLines, key: str, name: str, patterns: Any) -> None:
    if patterns is None:
        return
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        lines.fail(key, f"{name}: {patterns!r} is not a list of regular expressions")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as e:
            lines.fail(key, f"{name}: {pattern!r} is not a regular expression ({e})")


def _check_mapping(lines: SuiteLines, key: str, value: Any, known: Sequence[str]) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        lines.fail(key, f"{key}: {value!r} is not a mapping")
    for name in value:
        if name not in known:
            lines.fail(key, f"{key}: unknown key {name!r}", _nearest(str(name), known))


def _is_whole(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _nearest(word: str, known: Iterable[str]) -> str:
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(words)}"
