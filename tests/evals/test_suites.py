"""Suites: what is found, what is read, and what is refused at which line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eval_builders import CHOICE, GENERATE, choice_rows, write_suite

from quantkit.errors import UsageError
from quantkit.evals import suites as suites_module
from quantkit.evals.metrics import BY_OUTPUT_TYPE, METRICS
from quantkit.evals.suites import find_suites, installed_folder, load_suite, load_suites

Write = Callable[..., Path]


def test_a_suite_is_read(suite_path: Write) -> None:
    suite = load_suite(suite_path(CHOICE, choice_rows()))
    assert (suite.name, suite.metric, suite.n) == ("tiny_choice", "acc", 12)
    assert (suite.slice, suite.cluster, suite.must_not_flip) == (
        "slice",
        "cluster",
        "must_not_flip",
    )
    assert suite.item_id(3) == "c-03"
    assert set(suite.rows[0]) == set(choice_rows()[0])


def test_fields_and_traffic_are_named_in_metadata(suite_path: Write) -> None:
    rows = [{**r, "topic": r["slice"], "id": None} for r in choice_rows()]
    for row in rows:
        del row["id"], row["slice"]
    metadata = {"slice": "topic", "traffic": "traffic.jsonl", "version": 1.0}
    path = suite_path(CHOICE, rows, metadata=metadata)
    (path.parent / "traffic.jsonl").write_text('{"text": "hello"}\n')
    suite = load_suite(path)
    assert suite.slice == "topic"
    assert suite.traffic == path.parent / "traffic.jsonl"
    assert suite.item_id(3) == "3"


def test_the_hash_covers_yaml_and_data(suite_path: Write) -> None:
    first = load_suite(suite_path(CHOICE, choice_rows())).hash
    assert load_suite(suite_path(CHOICE, choice_rows())).hash == first
    assert load_suite(suite_path(CHOICE, choice_rows(11))).hash != first
    assert load_suite(suite_path(CHOICE, choice_rows(), target_delimiter="")).hash != first


def without(key: str) -> dict[str, Any]:
    return {key: None}


FILES = {"dataset_kwargs": {"data_files": {"test": "missing.jsonl"}}}

TAKE_FIRST = {"function": "take_first"}
SHOTS = {"fewshot_split": "test"}

BAD_YAML = [
    ({"grop": "x"}, r"suite.yaml:\d+ unknown key 'grop'"),
    ({"doc_to_txt": "x"}, r"unknown key 'doc_to_txt'; did you mean 'doc_to_text'\?"),
    ({"process_docs": "f"}, r"process_docs is not allowed; suites hold no code"),
    ({"include": "base.yaml"}, r"include is not allowed"),
    (without("task"), r"has no task"),
    (without("doc_to_choice"), r"multiple_choice needs doc_to_choice"),
    (without("doc_to_target"), r"needs doc_to_target"),
    ({"task": ["a", "b"]}, r"is not a plain name"),
    ({"dataset_path": "hub/name"}, r"dataset_path 'hub/name' is not 'json'"),
    (FILES, r"suite.yaml:3 .*missing.jsonl does not exist"),
    (
        {"dataset_kwargs": {"data_files": {"test": "https://x/y.jsonl"}}},
        r"is not a local file",
    ),
    ({"dataset_kwargs": {"data_files": "rows.jsonl"}}, r"name a file for each split"),
    ({"dataset_kwargs": {"cache_dir": "x"}}, r"dataset_kwargs: unknown key 'cache_dir'"),
    ({"test_split": "train"}, r"test_split 'train' is not in data_files; test"),
    ({"num_fewshot": 2}, r"fewshot_split None is not in data_files"),
    ({"output_type": "multiple_choise"}, r"did you mean 'multiple_choice'\?"),
    ({"metric_list": [{"metric": "rouge"}]}, r"would look for it on the network"),
    ({"metric_list": [{"metric": "perplexity"}]}, r"does not score multiple_choice; use acc"),
    ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, r"unknown key 'hf_evaluate'"),
    ({"metric_list": ["acc"]}, r"has no metric"),
    ({"metric_list": [{"metric": ["acc"]}]}, r"has no metric"),
    ({"metric_list": 3}, r"metric_list: 3 is not a list"),
    ({"filter_list": {"a": 1}}, r"filter_list: .* is not a list"),
    ({"output_type": ["multiple_choice"]}, r"output_type: \['multiple_choice'\] is not text"),
    ({"test_split": ["test"]}, r"test_split: \['test'\] is not text"),
    ({"metadata": {"slice": ["topic"]}}, r"metadata.slice: \['topic'\] is not text"),
    ({"metadata": {"traffic": 3}}, r"metadata.traffic: 3 is not text"),
    ({"repeats": 3}, r"repeats 3 is not 1"),
    ({"generation_kwargs": {"do_sample": True}}, r"sampling is not allowed"),
    ({"generation_kwargs": {"temperature": 0.7}}, r"sampling is not allowed"),
    ({"metadata": {"slise": "x"}}, r"metadata: unknown key 'slise'; did you mean 'slice'\?"),
    ({"metadata": {"slice": "topic"}}, r"slice: no row has a field 'topic'"),
    ({"metadata": {"traffic": "no.jsonl"}}, r"no.jsonl does not exist"),
    ({"metadata": "x"}, r"metadata: 'x' is not a mapping"),
    ({"filter_list": [{"name": "a", "filter": [{"function": "custom"}]}]}, r"unknown filter"),
    ({"filter_list": [{"name": "a", "filter": [{"function": ["regex"]}]}]}, r"unknown filter"),
    (
        {"filter_list": [{"name": "a", "filter": [TAKE_FIRST, TAKE_FIRST]}]},
        r"take_first is not the last filter",
    ),
    ({"filter_list": []}, r"filter_list is empty"),
    ({"doc_to_target": {"a": 1}}, r"doc_to_target: \{'a': 1\} is neither text nor a list of it"),
    ({"doc_to_target": []}, r"doc_to_target gives nothing"),
    ({"doc_to_target": ["refund"]}, r"label 'refund' is not the index of a choice"),
    (
        {"metric_list": [{"metric": "brier_score"}]},
        r"rows.jsonl:2 has 3 choices, and brier_score needs 4 as in .*rows.jsonl:1",
    ),
    (
        {"filter_list": [{"name": n, "filter": [TAKE_FIRST]} for n in "ab"]},
        r"2 filters; an item has one score",
    ),
    (
        {"filter_list": [{"filter": [TAKE_FIRST]}]},
        r"each entry needs a name and a list of filters",
    ),
    (
        {"filter_list": [{"name": "a", "filter": ["take_first"]}]},
        r"unknown filter 'take_first'; write {function: NAME}",
    ),
    (
        {"filter_list": [{"name": "a", "filter": [{"function": "lowercase"}, TAKE_FIRST]}]},
        r"filter 'lowercase' reads written answers; multiple_choice has none",
    ),
    ({"metric_list": ""}, r"metric_list: '' is not a list"),
    (
        {"metric_list": [{"metric": "acc", "aggregation": "median"}]},
        r"acc: aggregation 'median' is not 'mean'",
    ),
    (
        {"metric_list": [{"metric": "acc", "higher_is_better": False}]},
        r"acc: higher_is_better False is not True",
    ),
    ({"metric_list": [{"metric": "acc", "ignore_case": True}]}, r"unknown key 'ignore_case'"),
    ({"description": 3}, r"description: 3 is not text"),
    ({"gen_prefix": ["a"]}, r"gen_prefix: \['a'\] is not text"),
    ({"fewshot_delimiter": 3}, r"fewshot_delimiter: 3 is not text"),
    ({"description": "{{mesage}}"}, r"rows.jsonl:1 description: 'mesage' is undefined"),
    ({"num_fewshot": -1, **SHOTS}, r"num_fewshot: -1 is not a whole number"),
    ({"num_fewshot": "two", **SHOTS}, r"num_fewshot: 'two' is not a whole number"),
    ({"num_fewshot": 12, **SHOTS}, r"num_fewshot 12 is more than the 11 rows of 'test'"),
    ({"fewshot_split": "dev"}, r"fewshot_split 'dev' is not in data_files"),
    (
        {**SHOTS, "fewshot_config": {"split": "dev"}},
        r"suite.yaml:\d+ fewshot_split 'dev' is not in",
    ),
    ({"fewshot_config": {"split": None}}, r"split: None is not text"),
    ({"fewshot_config": {"sampler": "zz"}}, r"unknown sampler 'zz'; known: default, first_n"),
    ({"dataset_kwargs": {"data_files": {"test": []}}}, r"data_files.test: \[\] is not a file name"),
    (
        {"dataset_kwargs": {"data_files": {"test": "~nobody-of-that-name/x.jsonl"}}},
        r"x.jsonl does not exist",
    ),
    ({"dataset_kwargs": {"data_files": {"test": "x" * 5000}}}, r"x does not exist"),
    ({"metadata": {"traffic": "x" * 5000}}, r"x does not exist"),
    ({"doc_to_text": "{{message"}, r"doc_to_text is not a Jinja template"),
    ({"doc_to_target": "lable"}, r"doc_to_target: no row has a field 'lable'"),
    ({"doc_to_text": "{{mesage}}"}, r"rows.jsonl:1 doc_to_text: 'mesage' is undefined"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_YAML)
def test_a_bad_suite_is_refused(suite_path: Write, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_suite(suite_path(CHOICE, choice_rows(), **changes))


def filtered(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"filter_list": [{"name": "a", "filter": [*steps]}]}


BAD_GENERATION = [
    ({"generation_kwargs": {"until": 3}}, r"until: 3 is neither text nor a list of it"),
    ({"generation_kwargs": {"until": ["a", None]}}, r"until: \['a', None\] is neither text nor"),
    ({"generation_kwargs": {"max_gen_toks": "x"}}, r"max_gen_toks: 'x' is not a whole number"),
    ({"generation_kwargs": {"max_gen_toks": 0}}, r"max_gen_toks: 0 is not a whole number above 0"),
    ({"generation_kwargs": {"max_gen_toks": True}}, r"max_gen_toks: True is not a whole number"),
    ({"generation_kwargs": {"temperature": None}}, r"sampling is not allowed"),
    ({"metric_list": [{"metric": "exact_match", "ignore_case": "no"}]}, r"is not true or false"),
    (
        {"metric_list": [{"metric": "exact_match", "regexes_to_ignore": 3}]},
        r"regexes_to_ignore: 3 is not a list of regular expressions",
    ),
    (
        {"metric_list": [{"metric": "exact_match", "regexes_to_ignore": ["("]}]},
        r"regexes_to_ignore: '\(' is not a regular expression",
    ),
    (filtered({"function": "lowercase"}), r"the last filter is 'lowercase'; end with take_first"),
    (
        filtered({"function": "regex", "regex_pattern": "("}, TAKE_FIRST),
        r"regex_pattern: '\(' is not a regular expression",
    ),
    (filtered({"function": "regex", "patern": "a"}, TAKE_FIRST), r"unknown key 'patern'"),
    (
        filtered({"function": "regex", "group_select": 1}, TAKE_FIRST),
        r"group_select 1 is neither 0 nor -1; take the first match or the last",
    ),
    (filtered({"function": "regex", "fallback": 3}, TAKE_FIRST), r"fallback 3 is not text"),
    (
        filtered({"function": "map", "mapping_dict": {"a": "b"}}, TAKE_FIRST),
        r"map: needs mapping_dict and default_value, both of text",
    ),
    ({"num_fewshot": 1, **SHOTS, "doc_to_target": "n"}, r"an example's answer 3 is not text"),
    ({"doc_to_target": ["a", 3]}, r"doc_to_target gives \['a', 3\], not a list of text"),
    ({"doc_to_choice": "word"}, r"rows.jsonl:1 doc_to_choice gives 'a', not a list"),
    ({"doc_to_choice": ["a", "b"]}, r"rows.jsonl:1 label 'a' is not the index of a choice"),
    (
        {"doc_to_choice": ["a", "b"], "doc_to_target": [0]},
        r"label \[0\] is not the index of a choice",
    ),
    ({"doc_to_choice": ["a", "b"], "doc_to_target": "n"}, r"label 3 is out of range for 2"),
    (
        {"output_type": "loglikelihood", "metric_list": None, "doc_to_target": "n"},
        r"doc_to_target gives 3, not text",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_GENERATION)
def test_bad_written_answers_are_refused(
    suite_path: Write, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_suite(suite_path(GENERATE, [{"word": w, "n": 3} for w in ("a", "b", "c")], **changes))


def test_examples_may_name_their_answer_by_index(suite_path: Write) -> None:
    more = {"doc_to_choice": ["a", "b"], "doc_to_target": "n", "num_fewshot": 1, **SHOTS}
    assert load_suite(suite_path(GENERATE, [{"word": w, "n": 1} for w in "abc"], **more)).n == 3


BAD_ROWS = [
    ({"label": 4}, r"rows.jsonl:13 label 4 is out of range for 4 choices"),
    ({"label": -1}, r"rows.jsonl:13 label -1 is out of range"),
    ({"label": "nothing"}, r"label 'nothing' is not one of the choices"),
    ({"choices": []}, r"rows.jsonl:13 doc_to_choice gives \[\]"),
    ({"choices": ["a", ""], "label": 0}, r"choice '' is empty"),
    ({"choices": ["a", "a"], "label": 0}, r"a choice appears twice"),
    ({"choices": ["a", 3], "label": 0}, r"choice 3 is empty or not text"),
    ({"id": "c-03"}, r"rows.jsonl:13 id 'c-03' is also the id of .*rows.jsonl:4"),
    ({"message": None, "drop": "message"}, r"rows.jsonl:13 doc_to_text: 'message' is undefined"),
    ({"label": None}, r"rows.jsonl:13 doc_to_target: the row has no field 'label'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ROWS)
def test_a_bad_row_is_refused(suite_path: Write, changes: dict[str, Any], message: str) -> None:
    row = {**choice_rows(1)[0], "id": "last", **changes}
    row.pop(row.pop("drop", ""), None)
    with pytest.raises(UsageError, match=message):
        load_suite(suite_path(CHOICE, [*choice_rows(), row]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: x\nprocess_docs: !function utils.f\n", r"suite.yaml:2 !function is not allowed"),
        ("task: x\ndoc_to_text: [!function utils.f]\n", r"suite.yaml:2 !function is not allowed"),
        ("task: x\ntask: y\n", r"suite.yaml:2 key 'task' appears twice"),
        ("- a\n", r"suite.yaml:1 is not a mapping"),
        ("", r"suite.yaml:1 is not a mapping"),
        ("task: 'x\n", r"is not YAML"),
        ("task: \x01\n", r"is not YAML"),
        ("task: " + "[" * 5000, r"is not YAML"),
        ("? [a]\n: b\n", r"suite.yaml:1 a key is not a word"),
        ("task: !!bool x\n", r"suite.yaml:1 is not YAML"),
        ('task: !!int ""\n', r"suite.yaml:1 is not YAML"),
        ("task: &a [*a]\n", r"suite.yaml:\d+ has no dataset_path"),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_suite(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1}\n{"id": \n', r"rows.jsonl:2 is not JSON"),
        ("[1]\n", r"rows.jsonl:1 is not a JSON object"),
        ('{"a": ' + "[" * 100_000, r"rows.jsonl:1 is not JSON"),
        ("\n", r"holds no rows"),
    ],
)
def test_bad_data_is_refused(suite_path: Write, text: str, message: str) -> None:
    path = suite_path(CHOICE, choice_rows())
    (path.parent / "rows.jsonl").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_suite(path)


def test_iso_dates_are_refused(suite_path: Write) -> None:
    rows = [{"word": "2024-05-01"}, {"word": "2024-06-11T10:00:00Z"}]
    with pytest.raises(UsageError, match="every row's 'word' is an ISO date"):
        load_suite(suite_path(GENERATE, rows))
    assert load_suite(suite_path(GENERATE, [*rows, {"word": "1 May"}])).n == 3


def test_every_metric_has_a_request_and_every_request_a_metric() -> None:
    assert set(METRICS) == {m for metrics in BY_OUTPUT_TYPE.values() for m in metrics}


def test_suites_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_suite(tmp_path / "mine", CHOICE, choice_rows())
    assert find_suites(path) == [path]
    assert find_suites(path.parent) == [path]
    monkeypatch.setattr(suites_module, "installed_folder", lambda: path.parent)
    assert find_suites("suite") == [path]
    with pytest.raises(UsageError, match="did you mean 'suite'"):
        find_suites("suit")
    with pytest.raises(UsageError, match=r"holds no \.yaml file"):
        find_suites(tmp_path)
    assert [s.name for s in load_suites([path, "suite"])] == ["tiny_choice"]
    twin = write_suite(tmp_path / "twin", CHOICE, choice_rows())
    with pytest.raises(
        UsageError, match=r"is also the name of .*mine.suite.yaml; score one of them"
    ):
        load_suites([path, twin])


@pytest.mark.parametrize("spec", ["~nobody-of-that-name/x", "x" * 5000, "x/" * 2500, "a\0b/c"])
def test_a_name_that_no_file_can_have_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="no such suite, file or folder"):
        find_suites(spec)


def test_installed_suites_are_valid() -> None:
    folder = installed_folder()
    if folder is None:
        pytest.skip("no suites are installed")
    for suite in load_suites([folder]):
        assert suite.n > 0
        json.dumps(dict(suite.config))
