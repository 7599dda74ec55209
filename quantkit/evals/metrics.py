"""What lm-eval computes without a network, and what one item of it is worth.

A gate pairs items, so every metric here is a number for one item, larger when better.
lm-eval's corpus metrics (f1, mcc, bleu, chrf, ter) have no value for one item and are
refused; perplexities become the log-likelihoods that they are made of, and say so in their
name. A metric that lm-eval does not register is looked up on the network: refused too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

#: A sample's value of a metric, as lm-eval logs it → the item's score.
Score = Callable[[Any], float]


def _per_unit(value: Any) -> float:
    """(log-likelihood, words or bytes) → nats a unit."""
    loglikelihood, units = value
    return float(loglikelihood) / max(1, int(units))


def _gold_probability(value: Any) -> float:
    """(gold index, normalized probabilities) → minus the Brier score of one item."""
    gold, probabilities = value
    return -sum((p - (i == gold)) ** 2 for i, p in enumerate(probabilities))


#: lm-eval's name → (name in the results, score of one item).
METRICS: Mapping[str, tuple[str, Score]] = {
    "acc": ("acc", float),
    "acc_norm": ("acc_norm", float),
    "acc_bytes": ("acc_bytes", float),
    "acc_mutual_info": ("acc_mutual_info", float),
    "exact_match": ("exact_match", float),
    "brier_score": ("minus_brier_score", _gold_probability),
    "perplexity": ("loglikelihood", float),
    "word_perplexity": ("loglikelihood_per_word", _per_unit),
    "byte_perplexity": ("loglikelihood_per_byte", _per_unit),
    "bits_per_byte": ("minus_bits_per_byte", lambda v: _per_unit(v) / math.log(2)),
}

#: Kind of request → the metrics that score it; the first is the default.
BY_OUTPUT_TYPE: Mapping[str, tuple[str, ...]] = {
    "multiple_choice": (
        "acc",
        "acc_norm",
        "acc_bytes",
        "acc_mutual_info",
        "exact_match",
        "brier_score",
    ),
    "generate_until": ("exact_match",),
    "loglikelihood": ("acc", "perplexity"),
    "loglikelihood_rolling": ("byte_perplexity", "word_perplexity", "bits_per_byte"),
}

#: How lm-eval sums up the metrics that are smaller when better; it takes the mean of others.
AGGREGATIONS: Mapping[str, str] = {
    "perplexity": "perplexity",
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
    "brier_score": "brier_score",
}

_PATTERN = ("regex_pattern", "group_select", "fallback")

#: lm-eval's output filters that take no code and keep one answer an item → their options.
FILTERS: Mapping[str, tuple[str, ...]] = {
    "take_first": (),
    "regex": _PATTERN,
    "regex_pos": _PATTERN,
    "remove_whitespace": (),
    "lowercase": (),
    "uppercase": (),
    "map": ("mapping_dict", "default_value"),
    "multi_choice_regex": (
        *_PATTERN,
        *("ignore_case", "ignore_punctuation", "regexes_to_ignore"),
    ),
}
