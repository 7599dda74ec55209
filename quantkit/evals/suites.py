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
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.errors import UsageError
from quantkit.evals.scorers import read_scoring
from quantkit.evals.suite import Suite
from quantkit.evals.suite_keys import DEFAULT_FIELDS, check_keys, examples_split, metric_names
from quantkit.evals.suite_lines import SuiteLines
from quantkit.evals.suite_rows import LINE, check_rows, read_rows

#: In front of a name that lm-eval's own task is meant by, where an installed suite has it, too.
LM_EVAL = "lm-eval:"

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
    # Of `os.path`: a user that is not there, or a name too long for a file, is no error.
    path = Path(os.path.expanduser(spec))
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
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
    check_keys(lines)
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
        if not os.path.isfile(traffic):
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
        metric=metric_names(config)[0],
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


def _data_files(lines: SuiteLines) -> dict[str, list[Path]]:
    config = lines.config
    files = config["dataset_kwargs"].get("data_files")
    if not isinstance(files, dict) or not files:
        lines.fail("dataset_kwargs", "data_files: name a file for each split", "{test: x.jsonl}")
    found = {}
    for split, names in files.items():
        listed = [names] if isinstance(names, str) else names
        if (
            not isinstance(listed, list)
            or not listed
            or not all(isinstance(n, str) for n in listed)
        ):
            lines.fail("dataset_kwargs", f"data_files.{split}: {names!r} is not a file name")
        for name in listed:
            if "://" in name:
                lines.fail("dataset_kwargs", f"data_files.{split}: {name} is not a local file")
            if not os.path.isfile(_beside(lines.path, name)):
                lines.fail("dataset_kwargs", f"{_beside(lines.path, name)} does not exist")
        found[str(split)] = [_beside(lines.path, name) for name in listed]
    wanted = [("test_split", "test_split", config["test_split"])]
    key, split = examples_split(config)
    if config.get("num_fewshot") or split is not None:
        wanted.append((key, "fewshot_split", split))
    for key, name, split in wanted:
        if split not in found:
            lines.fail(key, f"{name} {split!r} is not in data_files", ", ".join(found))
    return found


def _beside(path: Path, name: str) -> Path:
    return path.parent / os.path.expanduser(name)
