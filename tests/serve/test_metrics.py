"""Prometheus metrics: the list in the documentation and the one that is served are the same."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from serve_helpers import serving

from quantkit.models.runtime import Runtime
from quantkit.serve.capture import Capture, CaptureConfig
from quantkit.serve.config import ServeConfig
from quantkit.serve.engine import EngineConfig
from quantkit.serve.policy.tiers import Tenant, Tier

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
#: In the section, and no metric: what all names begin with, and the label of many tenants.
OTHERS = {"quantkit_", "other"}


def documented() -> dict[str, set[str]]:
    """Metric → labels, but for that of the tier, which its name tells."""
    section = DOCUMENT.read_text().partition("## Metrics")[2].partition("\n## ")[0]
    named = re.findall(r"`([a-z_]+)(?:\{([a-z, ]+)\})?`", section)
    found = {n.removesuffix("_total"): set(labels.split(", ")) - {""} for n, labels in named}
    return {name: labels for name, labels in found.items() if name not in OTHERS}


@pytest.fixture(scope="module")
def served(native: Runtime) -> tuple[dict[str, set[str]], str]:
    """The same of a server that has answered, and all that it serves."""
    access = ServeConfig((Tier("only", ttft=60.0),), (Tenant("t", "only"),), (), frozenset({"t"}))
    with serving(native, EngineConfig(max_sequences=2), access=access) as server:
        body = {"prompt": "a b a b a b a b", "max_tokens": 8, "temperature": 0}
        url = f"{server.url}/v1/completions"
        assert httpx.post(url, json=body, timeout=60).status_code == 200
        text = httpx.get(f"{server.url}/metrics").text
        families = list(server.engine.metrics.registry.collect())
    found = {}
    for family in families:
        labels = {label for sample in family.samples for label in sample.labels}
        found[family.name.removeprefix("quantkit_")] = labels - {"le", "tier", "tenant"}
    return found, text


def test_every_metric_is_documented_and_every_documented_one_served(
    served: tuple[dict[str, set[str]], str],
) -> None:
    assert served[0] == documented()


def test_names_are_ours_and_text_is_what_scrapers_read(
    served: tuple[dict[str, set[str]], str],
) -> None:
    lines = [line for line in served[1].splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"quantkit_\w+(\{.*\})? [-+0-9.eEInf]+", line) for line in lines)
    assert 'quantkit_tenant_tokens_total{kind="generated",tenant="t"} 8.0' in lines
    assert 'quantkit_tier_inter_token_latency_seconds_count{tier="only"} 7.0' in lines
    assert "quantkit_kv_reserved_tokens 0.0" in lines


def test_tiers_and_tenants_are_labels_of_all_that_is_theirs(
    served: tuple[dict[str, set[str]], str],
) -> None:
    for line in served[1].splitlines():
        if line.startswith("quantkit_tier_"):
            assert 'tier="only"' in line
        if line.startswith("quantkit_tenant_"):
            assert 'tenant="t"' in line


def test_captured_rows_are_counted_where_rows_are_captured(native: Runtime, tmp_path: Path) -> None:
    capture = Capture(CaptureConfig(tmp_path / "rows.jsonl", rate=1.0))
    try:
        with serving(native, EngineConfig(max_sequences=2), capture=capture) as server:
            text = httpx.get(f"{server.url}/metrics").text
    finally:
        capture.close()
    for outcome in ("written", "dropped", "failed"):
        assert f'quantkit_capture_rows{{outcome="{outcome}"}} 0.0' in text
    assert "`quantkit_capture_rows{outcome}`" in DOCUMENT.read_text()
