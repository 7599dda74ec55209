"""One row of evidence from what lm-eval logs of an item."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.evals.scorers import Scorer
from quantkit.evals.suite import Suite
from quantkit.results import ItemRow

Sample = Mapping[str, Any]


def item_row(
    suite: Suite, sample: Sample, scorer: Scorer | None, others: Sequence[Sample] = ()
) -> ItemRow:
    """One row from one of lm-eval's logged samples.

    Args:
        suite: what the item is of.
        sample: as logged for the pipeline of answers that is scored.
        scorer: scores the answer in place of the suite's metric.
        others: the item's samples of other pipelines, whose metrics become details.

    Raises:
        QuantkitError: the score is no finite number.
    """
    index = sample["doc_id"]
    row = suite.rows[index]
    name = suite.item_id(index)
    prediction, target, details = _answer(suite, sample)
    for other in others:
        for metric in other["metrics"]:
            if isinstance(other[metric], int | float):
                details[f"{metric},{other['filter']}"] = float(other[metric])
    score = _score(suite, name, sample) if scorer is None else scorer(prediction, target, row)
    if not math.isfinite(score):
        raise QuantkitError(f"{suite.name}: item {name!r} has the score {score}")
    return ItemRow(
        id=name,
        score=score,
        hash=sample["doc_hash"],
        prediction=prediction,
        target=target,
        prompt=str(sample["arguments"][0][0]),
        slice=_field(row, suite.slice),
        cluster=_field(row, suite.cluster),
        must_not_flip=bool(suite.must_not_flip and row.get(suite.must_not_flip)),
        details=details,
    )


def _score(suite: Suite, name: str, sample: Sample) -> float:
    if suite.metric not in sample:
        raise QuantkitError(
            f"{suite.name}: lm-eval gave item {name!r} no {suite.metric}, but "
            f"{', '.join(sample['metrics']) or 'nothing'}"
        )
    try:
        return suite.score(sample[suite.metric])
    except (TypeError, ValueError) as e:
        raise QuantkitError(
            f"{suite.name}: item {name!r}: {suite.metric} is {sample[suite.metric]!r}, which is "
            "not the number of one item"
        ) from e


def _answer(suite: Suite, sample: Sample) -> tuple[str, str, dict[str, Any]]:
    """(what the model said, what was right, details) of a sample."""
    responses, target = sample["filtered_resps"], sample["target"]
    details: dict[str, Any] = {}
    for metric in sample["metrics"]:
        value = sample[metric]
        if metric != suite.metric and isinstance(value, int | float):
            details[metric] = float(value)
    if suite.output_type == "multiple_choice":
        choices, golds = _choices(suite, sample)
        values = [float(value) for value, _ in responses]
        if "acc_mutual_info" in sample["metrics"]:
            # One more request a choice, without the context.
            values, alone = values[: len(choices)], values[len(choices) :]
        if suite.metric == "acc_mutual_info":
            ranked = [v - u for v, u in zip(values, alone, strict=True)]
        elif suite.metric == "acc_norm":
            ranked = [v / max(1, len(c)) for v, c in zip(values, choices, strict=True)]
        elif suite.metric == "acc_bytes":
            ranked = [v / max(1, len(c.encode())) for v, c in zip(values, choices, strict=True)]
        else:
            ranked = values
        details["loglikelihoods"] = values
        right = " | ".join(_name(choices, gold) for gold in golds)
        return choices[max(range(len(ranked)), key=ranked.__getitem__)], right, details
    if suite.output_type == "generate_until":
        return str(responses[0]), str(target), details
    if suite.output_type == "loglikelihood":
        value, greedy = responses[0]
        details |= {"loglikelihood": float(value), "greedy": bool(greedy)}
        return str(target) if greedy else "", str(target), details
    return "", "", details | {"loglikelihood": float(responses[0])}


def _choices(suite: Suite, sample: Sample) -> tuple[list[str], list[Any]]:
    """(the choices, the right ones by index or text)."""
    target = sample["target"]
    if suite.origin is not None:
        task = suite.origin.task
        choices = [str(choice) for choice in task.doc_to_choice(sample["doc"])]
        if task.multiple_input:  # choices stand in the context, the target behind them
            target = task.doc_to_text(sample["doc"])
    else:
        delimiter = suite.config.get("target_delimiter", " ")
        choices = [args[1].removeprefix(delimiter) for args in sample["arguments"]]
        if "acc_mutual_info" in sample["metrics"]:
            choices = choices[: len(choices) // 2]
    return choices, target if isinstance(target, list) else [target]


def _name(choices: Sequence[str], gold: Any) -> str:
    if isinstance(gold, int) and 0 <= gold < len(choices):
        return choices[gold]
    return str(gold)


def _field(row: Mapping[str, Any], name: str | None) -> str | None:
    value = row.get(name) if name else None
    return None if value is None else str(value)
