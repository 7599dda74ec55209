"""The regression gate: is a quantized model still good enough, and how sure is that?

    candidate, baseline = Results.load("int4.json"), Results.load("bf16.json")
    verdict = judge(candidate, baseline, load_policy("gate.yaml"))
    print(table(verdict))
    raise SystemExit(verdict.exit_code)

Imports only `quantkit.errors`, `quantkit.results` and what results are made of, and never
torch: a CI job without a model can hold a gate.
"""

from quantkit.gate.compare import check_comparable, flips
from quantkit.gate.latency import log_ratios, ratio_bounds, with_timings
from quantkit.gate.policy import Policy, default_policy, load_policy, parse_policy
from quantkit.gate.render import (
    MARKDOWN_BYTES,
    badge,
    document,
    flips_jsonl,
    github_annotations,
    junit,
    junit_error,
    markdown,
    provenance,
    summary,
    table,
)
from quantkit.gate.sample_size import Preflight, fewest_items, items_needed, power, preflight
from quantkit.gate.verdict import exit_code, judge
from quantkit.results import Flip

__all__ = [
    "MARKDOWN_BYTES",
    "Flip",
    "Policy",
    "Preflight",
    "badge",
    "check_comparable",
    "default_policy",
    "document",
    "exit_code",
    "fewest_items",
    "flips",
    "flips_jsonl",
    "github_annotations",
    "items_needed",
    "judge",
    "junit",
    "junit_error",
    "load_policy",
    "log_ratios",
    "markdown",
    "parse_policy",
    "power",
    "preflight",
    "provenance",
    "ratio_bounds",
    "summary",
    "table",
    "with_timings",
]
