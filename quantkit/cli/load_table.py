"""A load test as a table: one line a row, and one for each of its tiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantkit.loadtest.row import Figures, Quantiles, Row

COLUMNS = (
    ("load", 18), ("sent", 5), ("shed", 5), ("fail", 5), ("SLO", 7),
    ("TTFT p50/p90/p99 ms", 21), ("TPOT p50/p90/p99 ms", 21), ("ITL p99", 8),
    ("E2E p50/p99 s", 15), ("req/s", 7), ("good/s", 7), ("out tok/s", 10), ("per Mtok", 9),
)  # fmt: skip


def heading() -> str:
    """Names of the columns."""
    return "".join(
        name.ljust(width) if i == 0 else name.rjust(width)
        for i, (name, width) in enumerate(COLUMNS)
    ).rstrip()


def lines(row: Row) -> list[str]:
    """A row; below it its tiers, if there are several."""
    load = f"{row.load:g} clients" if row.kind == "closed" else f"{row.kind} {row.load:.3g}/s"
    cost = row.cost_per_million_tokens
    found = [_line(load, row.total, "-" if cost is None else f"{cost:.3g}")]
    if len(row.tiers) > 1:
        found += [_line(f"  {name}", figures, "") for name, figures in row.tiers.items()]
    return found


def _line(name: str, f: Figures, cost: str) -> str:
    cells = [
        name, str(f.requests), str(f.shed), str(f.failed), f"{f.attainment:.1%}",
        _milliseconds(f.ttft), _milliseconds(f.tpot),
        f"{1e3 * f.itl.p99:.1f}" if f.itl else "-",
        f"{f.e2e.p50:.2f}/{f.e2e.p99:.2f}" if f.e2e else "-",
        f"{f.requests_per_second:.2f}", f"{f.goodput:.2f}", f"{f.output_tokens_per_second:.1f}",
        cost,
    ]  # fmt: skip
    widths = [width for _, width in COLUMNS]
    return "".join(
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()


def _milliseconds(times: Quantiles | None) -> str:
    if times is None:
        return "-"
    return "/".join(f"{1e3 * t:.4g}" for t in (times.p50, times.p90, times.p99))
