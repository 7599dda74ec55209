"""A `Run` as what the template shows: one function a section, text and plots only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.report import plots
from quantkit.report.intervals import Interval, score_interval
from quantkit.report.run_folder import Run
from quantkit.report.words import (
    NBSP,
    duration,
    explain,
    fixed,
    headline,
    limit_word,
    measure_of,
    percent,
    points,
    score,
    size,
    whole,
)
from quantkit.results import Flip, GateCheck, Outcome, Results, TaskResult, TextResult, Verdict

#: Flipped items on the page.
MOST_FLIPS = 200

#: Slices that are shown before "all slices" is opened.
MOST_SLICES = 6

#: The change that at least fills a slice's bar, so that noise does not look like ruin.
SMALL_CHANGE = 0.1

#: Characters of a prompt that is shown without opening it.
SHORT_PROMPT = 480

#: Characters of a prompt or answer; a page must stay a page where a prompt is a book.
MOST_TEXT = 4000

#: A slice counts as regressed below this Holm-adjusted p, as in the gate.
SIGNIFICANT = 0.05

_SIGNS = {Outcome.PASS: "✓", Outcome.FAIL: "✗", Outcome.INCONCLUSIVE: "?"}
_WORST_FIRST = (Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.PASS)
_PHASES = ("load", "calibrate", "quantize", "export", "eval")


def date(run: Run) -> str:
    """When the run ended, as a person would write it."""
    return run.date.replace("T", " ").replace("+00:00", " UTC")


def verdict(run: Run) -> dict[str, str]:
    """The headline: the word, the sentence, and what became of the checkpoint."""
    if run.verdict is None:
        word, role, sign = "NOT GATED", "none", ""
    else:
        word, role = str(run.verdict.outcome), run.verdict.outcome.lower()
        sign = _SIGNS[run.verdict.outcome]
    promoted = run.verdict is None or run.verdict.outcome is Outcome.PASS
    name = run.output.rstrip("/").rpartition("/")[2]
    fate = f"It was promoted to {name}." if promoted else f"It was not promoted; it is in {name}."
    if run.verdict is None:
        fate = f"It is in {name}."
    return {
        "word": word,
        "role": role,
        "sign": sign,
        "sentence": headline(run.verdict),
        "fate": fate,
    }


def key_numbers(run: Run) -> list[dict[str, str]]:
    """What a reader wants before anything else; each with what it is held against."""
    quantized, original = _sizes(run)
    ratio = quantized / original if original else 0.0
    tiles = [
        _tile("Size", size(quantized), f"original {size(original)}"),
        _tile(
            "Of the original", percent(ratio), f"{fixed(1 / ratio, 2)}× smaller" if ratio else ""
        ),
        _tile("Bits per weight", fixed(run.bits_per_weight, 2), "of the quantized layers"),
    ]
    text = run.candidate.text if run.candidate else None
    if text is not None and text.tokens:
        if text.kl_mean is not None:
            p99 = "" if text.kl_p99 is None else f"; 99 % of tokens below {fixed(text.kl_p99, 2)}"
            tiles.append(
                _tile("KL to the original", fixed(text.kl_mean, 4), f"nats per token{p99}")
            )
        if text.top1_agreement is not None:
            agreement = percent(text.top1_agreement)
            tiles.append(
                _tile("Top-1 agreement", agreement, "of tokens keep their most likely token")
            )
        tiles.append(_perplexity(text, run.baseline.text if run.baseline else None))
    for name, ours, theirs in _pairs(run):
        share = _is_share(ours, theirs)
        note = ""
        if theirs is not None:
            change = ours.value - theirs.value
            said = points(change) if share else fixed(change, 3, signed=True)
            note = f"original {score(theirs.value, share=share)} ({said})"
        tiles.append(_tile(f"{name} · {ours.metric}", score(ours.value, share=share), note))
    return tiles


def _sizes(run: Run) -> tuple[float, float]:
    """Bytes of the checkpoint and the original: as the gate saw them if it did, so that one
    page does not hold two ratios."""
    cost = run.candidate.cost if run.candidate else {}
    ours, theirs = cost.get("size_bytes"), cost.get("reference_size_bytes")
    if isinstance(ours, int | float) and isinstance(theirs, int | float) and theirs > 0:
        return ours, theirs
    return run.size_bytes, run.source_bytes


def _tile(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _perplexity(ours: TextResult, theirs: TextResult | None) -> dict[str, str]:
    value = fixed(_exp(ours.mean_nll), 2)
    if theirs is None or not theirs.tokens:
        return _tile("Perplexity", value, "")
    change = fixed(100 * (_exp(ours.mean_nll - theirs.mean_nll) - 1), 1, signed=True)
    original = fixed(_exp(theirs.mean_nll), 2)
    return _tile("Perplexity", value, f"original {original} ({change}{NBSP}%)")


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # a ruined model's perplexity stays a finite number


# -- gates -----------------------------------------------------------------------------------


def gates(held: Verdict | None) -> list[dict[str, Any]]:
    """One row a gate, what needs attention first."""
    if held is None:
        return []
    ranked = sorted(held.checks, key=lambda c: _WORST_FIRST.index(c.outcome))
    return [_gate(check) for check in ranked]


def _gate(check: GateCheck) -> dict[str, Any]:
    return {
        "name": check.name,
        "word": str(check.outcome),
        "role": check.outcome.lower(),
        "sign": _SIGNS[check.outcome],
        "plot": plots.gate_strip(check, measure_of(check), limit_word(check)),
        "sentence": _capital(explain(check)) + ".",
        "reason": "" if measure_of(check).digits == 0 else check.reason,
        "method": check.details.get("method") or "",
    }


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# -- text ------------------------------------------------------------------------------------


def text(results: Results | None) -> dict[str, Any] | None:
    """Divergence on held-out text; None when there is nothing to plot."""
    found = results.text if results else None
    if found is None or not found.tokens or not found.kl_by_position:
        return None
    return {
        "plot": plots.position_facet(found.kl_by_position, found.kl_mean, found.seq_len),
        "tokens": whole(found.tokens),
        "windows": whole(len(found.windows)),
        "seq_len": whole(found.seq_len),
        "p99": None if found.kl_p99 is None else fixed(found.kl_p99, 3),
        "p999": None if found.kl_p999 is None else fixed(found.kl_p999, 3),
    }


# -- tasks -----------------------------------------------------------------------------------


def tasks(run: Run) -> list[dict[str, Any]]:
    """Scores with their intervals, and the slices that changed most."""
    checks = {c.name: c for c in run.verdict.checks} if run.verdict else {}
    shown = []
    for name, ours, theirs in _pairs(run):
        share = _is_share(ours, theirs)
        sides = [("a", "quantized", ours)]
        if theirs is not None:
            sides.insert(0, ("base", "original", theirs))
        rows, strip, methods = [], [], []
        for role, side, task in sides:
            found = score_interval(task.rows)
            rows.append(
                {
                    "role": role,
                    "side": side,
                    "score": score(task.value, share=share),
                    "interval": _between(found),
                }
            )
            methods.append(found.method if found else "")
            bounds = (found.lower, found.upper) if found else (None, None)
            strip.append((role, side, task.value, *bounds))
        details = (
            checks[f"{name}.{ours.metric}"].details if f"{name}.{ours.metric}" in checks else {}
        )
        slices = _slices(ours, theirs, details.get("slices")) if theirs is not None else []
        shown.append(
            {
                "name": name,
                "metric": ours.metric,
                "n": whole(ours.n),
                "rows": rows,
                "method": methods[-1],
                "plot": plots.score_strip(strip) if share else None,
                "change": points(ours.value - theirs.value) if share and theirs else "",
                **_turned(ours, theirs),
                "slices": slices[:MOST_SLICES],
                "more_slices": slices[MOST_SLICES:],
                "gated": bool(details),
            }
        )
    return shown


def _pairs(run: Run) -> list[tuple[str, TaskResult, TaskResult | None]]:
    """The candidate's tasks with the original's, the largest loss first."""
    ours = run.candidate.tasks if run.candidate else {}
    theirs = run.baseline.tasks if run.baseline else {}
    pairs = [(name, ours[name], theirs.get(name)) for name in sorted(ours) if ours[name].rows]
    return sorted(pairs, key=lambda p: 0.0 if p[2] is None else p[1].value - p[2].value)


def _is_share(*tasks: TaskResult | None) -> bool:
    return all(0 <= row.score <= 1 for task in tasks if task is not None for row in task.rows)


def _between(found: Interval | None) -> str:
    return f"{percent(found.lower)} to {percent(found.upper)}" if found else "–"


def _turned(ours: TaskResult, theirs: TaskResult | None) -> dict[str, int | None]:
    """How many items changed sides: what two accuracies alone do not tell."""
    if theirs is None:
        return {"losses": None, "gains": None}
    before = {row.id: row.score for row in theirs.rows}
    pairs = [(before[row.id], row.score) for row in ours.rows if row.id in before]
    return {
        "losses": sum(b >= 0.5 > c for b, c in pairs),
        "gains": sum(c >= 0.5 > b for b, c in pairs),
    }


def _slices(ours: TaskResult, theirs: TaskResult, tested: Any) -> list[dict[str, Any]]:
    """Slices by how much they changed, losses before gains of the same size."""
    before = {row.id: row.score for row in theirs.rows}
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in ours.rows:
        if row.slice is not None and row.id in before:
            groups.setdefault(row.slice, []).append((before[row.id], row.score))
    table = []
    for name, scores in groups.items():
        base, quant = (sum(side) / len(scores) for side in zip(*scores, strict=True))
        table.append((quant - base, name, len(scores), base, quant))
    table.sort(key=lambda row: (-abs(row[0]), row[0], row[1]))
    largest = max([SMALL_CHANGE, *(abs(row[0]) for row in table)])
    return [
        {
            "name": name,
            "n": n,
            "original": percent(base),
            "quantized": percent(quant),
            "change": fixed(100 * change, 1, signed=True),
            "bar": plots.change_bar(change, largest),
            "regressed": _regressed(tested, name),
        }
        for change, name, n, base, quant in table
    ]


def _regressed(tested: Any, name: str) -> bool:
    found = tested.get(name) if isinstance(tested, Mapping) else None
    p = found.get("p_holm") if isinstance(found, Mapping) else None
    return isinstance(p, float | int) and p < SIGNIFICANT


# -- flips -----------------------------------------------------------------------------------


def flips(found: Sequence[Flip]) -> list[dict[str, Any]]:
    """Newly wrong items, then newly right ones; those that must not flip lead."""
    room, groups = MOST_FLIPS, []
    for direction, title in (("loss", "Newly wrong"), ("gain", "Newly right")):
        chosen = [f for f in found if f.direction == direction]
        chosen.sort(key=lambda f: (not f.must_not_flip, f.task, f.id))
        groups.append(
            {
                "title": title,
                "role": "fail" if direction == "loss" else "pass",
                "count": len(chosen),
                "items": [_flip(f) for f in chosen[:room]],
                "rest": max(0, len(chosen) - room),
            }
        )
        room -= min(room, len(chosen))
    return groups


def _flip(f: Flip) -> dict[str, Any]:
    return {
        "task": f.task,
        "id": f.id,
        "slice": f.slice,
        "must_not_flip": f.must_not_flip,
        "prompt": f.prompt if len(f.prompt) <= SHORT_PROMPT else _tail(f.prompt),
        "whole": None if len(f.prompt) <= SHORT_PROMPT else _cut(f.prompt),
        "answers": [
            ("Right answer", "right", _cut(f.target)),
            (
                "Original",
                "wrong" if f.direction == "gain" else "right",
                _cut(f.baseline_prediction),
            ),
            (
                "Quantized",
                "wrong" if f.direction == "loss" else "right",
                _cut(f.candidate_prediction),
            ),
        ],
    }


def _tail(text: str) -> str:
    """The end of a long prompt, which is where the question stands."""
    end = text[-SHORT_PROMPT // 2 :]
    return "… " + (end.partition(" ")[2] or end).strip()


def _cut(text: str) -> str:
    if len(text) <= MOST_TEXT:
        return text
    # Questions stand at the end of a prompt, so both ends are kept.
    half = MOST_TEXT // 2
    return f"{text[:half]}\n… {whole(len(text) - 2 * half)} characters …\n{text[-half:]}"


# -- calibration and provenance --------------------------------------------------------------


def calibration(run: Run) -> dict[str, Any] | None:
    """What the layers were fitted to; None for a recipe without data."""
    used = run.calibration
    if used is None:
        return None
    total = sum(s.tokens for s in used.sources)
    named = [(s.name or f"source {i}", s) for i, s in enumerate(used.sources, start=1)]
    return {
        "samples": whole(used.samples),
        "seq_len": whole(used.seq_len),
        "tokens": whole(used.samples * used.seq_len),
        "seed": used.seed,
        "bar": plots.shares([(name, s.tokens) for name, s in named]) if len(named) > 1 else None,
        "sources": [
            {
                "role": f"q{i % 6}",
                "name": name,
                "short": len(name) < 24,
                "documents": whole(s.documents),
                "tokens": whole(s.tokens),
                "share": percent(s.tokens / total) if total else "–",
                "sha256": s.sha256,
            }
            for i, (name, s) in enumerate(named)
        ],
    }


def provenance(run: Run) -> dict[str, Any]:
    """Where it came from, on what, and how long it took."""
    known = [p for p in _PHASES if p in run.seconds]
    phases = known + sorted(p for p in run.seconds if p not in _PHASES)
    seconds = [(phase, run.seconds[phase]) for phase in phases]
    total = sum(value for _, value in seconds)
    return {
        "hashes": list(run.hashes.items()),
        "files": sorted(run.files.items()),
        "versions": list(run.versions.items()),
        "machine": list(run.machine.items()),
        "peak": None if run.peak_rss_bytes is None else size(run.peak_rss_bytes),
        "bar": plots.shares(seconds) if total > 0 else None,
        "seconds": [
            {
                "role": f"q{i % 6}",
                "phase": phase,
                "time": duration(value),
                "share": percent(value / total) if total > 0 else "–",
            }
            for i, (phase, value) in enumerate(seconds)
        ],
        "total": duration(total),
        "recipe_name": run.recipe_name,
        "recipe": run.recipe_text,
    }
