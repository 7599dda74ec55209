"""A verdict for people and for CI: table, Markdown, JUnit, annotations, JSON, flips.

Every function returns text or plain data; writing files and reading the environment is the
command line's business.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from quantkit.errors import UsageError
from quantkit.gate.policy import Policy
from quantkit.results import Flip, GateCheck, Outcome, Results, Verdict

#: GitHub aborts the upload of a step summary above 1 MiB.
MARKDOWN_BYTES = 1024 * 1024

#: GitHub shows no more annotations than this of one kind and step.
MOST_ANNOTATIONS = 10

_SHOWN_FLIPS = 50
_SHOWN_CHARACTERS = 160


def summary(verdict: Verdict) -> str:
    """One line: ``FAIL: 1 of 4 gates failed, 1 inconclusive``."""
    count = {o: sum(c.outcome is o for c in verdict.checks) for o in Outcome}
    total = len(verdict.checks)
    gates = f"{total} gate{'s' if total != 1 else ''}"
    if verdict.outcome is Outcome.PASS:
        return f"PASS: all {gates} passed" if total > 1 else "PASS: the gate passed"
    parts = []
    if count[Outcome.FAIL]:
        parts.append(f"{count[Outcome.FAIL]} of {gates} failed")
    if count[Outcome.INCONCLUSIVE]:
        of = "" if parts else f" of {gates}"
        parts.append(f"{count[Outcome.INCONCLUSIVE]}{of} inconclusive")
    return f"{verdict.outcome}: {', '.join(parts)}"


def table(verdict: Verdict) -> str:
    """Plain aligned text, one line a gate, then warnings and the summary."""
    rows = [("gate", "verdict", "measured")]
    rows += [(c.name, str(c.outcome), c.reason) for c in verdict.checks]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{_line(a):<{widths[0]}}  {b:<{widths[1]}}  {_line(c)}" for a, b, c in rows]
    lines += [f"warning: {_line(w)}" for w in verdict.warnings]
    return "\n".join([*lines, summary(verdict)]) + "\n"


def _line(text: str) -> str:
    """Text from outside on one line: no control characters that move a cursor, and no lone
    surrogates (JSON can hold them, UTF-8 cannot)."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+", " ", text)


# -- Markdown --------------------------------------------------------------------------------


def markdown(verdict: Verdict, flips: Sequence[Flip] = (), *, limit: int = MARKDOWN_BYTES) -> str:
    """A summary for a pull request, at most ``limit`` bytes of UTF-8.

    The table comes first, the flipped items (losses first) after it; what does not fit is
    dropped from the end and the text says so.
    """
    head = [f"## quantkit gate: {_cell(summary(verdict))}", "", "| gate | verdict | measured |"]
    head += ["|---|---|---|"]
    rows = [f"| `{_code(c.name)}` | {c.outcome} | {_cell(c.reason)} |" for c in verdict.checks]
    rows += ["", *(f"- warning: {_cell(w)}" for w in verdict.warnings)]
    if flips:
        lost = sum(f.direction == "loss" for f in flips)
        rows += ["", f"### Flipped items: {lost} lost, {len(flips) - lost} gained", ""]
        rows += ["| task | item | slice | direction | target | baseline | candidate | prompt |"]
        rows += ["|---|---|---|---|---|---|---|---|"]
        rows += [_flip_row(f) for f in flips[:_SHOWN_FLIPS]]
        if len(flips) > _SHOWN_FLIPS:
            rows += ["", f"{len(flips) - _SHOWN_FLIPS} more are in flips.jsonl."]
    return _fit([*head, *rows], limit)


def _flip_row(flip: Flip) -> str:
    cells = (
        flip.task,
        flip.id,
        flip.slice or "",
        flip.direction,
        flip.target,
        flip.baseline_prediction,
        flip.candidate_prediction,
        flip.prompt,
    )
    return "| " + " | ".join(_cell(_short(c)) for c in cells) + " |"


def _fit(lines: Iterable[str], limit: int) -> str:
    note = "\n*truncated: the rest does not fit into a step summary*\n"
    kept: list[str] = []
    size, room = 0, limit - len(note.encode())
    for line in lines:
        size += len(line.encode()) + 1
        if size > room:
            return "\n".join(kept) + "\n" + note if kept else ""
        kept.append(line)
    return "\n".join(kept) + "\n"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def _cell(text: str) -> str:
    """Text from outside as one table cell: neither markup nor mentions nor column breaks."""
    text = _line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#|!~@])", r"\\\1", text)


def _code(text: str) -> str:
    return _line(text).replace("`", "'").replace("|", "\\|")


# -- CI --------------------------------------------------------------------------------------


def github_annotations(verdict: Verdict) -> list[str]:
    """GitHub workflow commands, failed gates first, at most ten: one a gate, then warnings."""

    def level(check: GateCheck) -> str:
        return "error" if check.outcome is Outcome.FAIL else "warning"

    checks = [c for c in verdict.checks if c.outcome is not Outcome.PASS]
    checks.sort(key=lambda c: c.outcome is not Outcome.FAIL)
    lines = [_annotation(level(c), f"{c.outcome} {c.name}", c.reason) for c in checks]
    lines += [_annotation("warning", "quantkit gate", w) for w in verdict.warnings]
    return lines[:MOST_ANNOTATIONS]


def _annotation(level: str, title: str, message: str) -> str:
    message = _line(message).replace("%", "%25")
    title = _line(title).replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={title}::{message}"


def junit(verdict: Verdict, *, inconclusive_fails: bool = False) -> str:
    """JUnit XML, one test case a gate: FAIL is a failure, INCONCLUSIVE is skipped.

    Args:
        inconclusive_fails: for runs that end with 1 on an inconclusive verdict.
    """
    suite = ElementTree.Element("testsuite", name="quantkit gate")
    counts = {"tests": len(verdict.checks), "failures": 0, "errors": 0, "skipped": 0}
    for check in verdict.checks:
        case = ElementTree.SubElement(suite, "testcase", classname="gate", name=_xml(check.name))
        if check.outcome is Outcome.PASS:
            out = ElementTree.SubElement(case, "system-out")
            out.text = _xml(check.reason)
            continue
        failed = check.outcome is Outcome.FAIL or inconclusive_fails
        counts["failures" if failed else "skipped"] += 1
        mark = ElementTree.SubElement(case, "failure" if failed else "skipped")
        mark.set("message", _xml(check.reason))
        if failed:
            mark.set("type", str(check.outcome))
    if verdict.warnings:
        ElementTree.SubElement(suite, "system-err").text = _xml("\n".join(verdict.warnings))
    return _suite(suite, counts)


def junit_error(error: Exception) -> str:
    """JUnit XML for a gate that could not be held: one test case with an ``<error>``."""
    suite = ElementTree.Element("testsuite", name="quantkit gate")
    case = ElementTree.SubElement(suite, "testcase", classname="gate", name="gate")
    mark = ElementTree.SubElement(case, "error", type=type(error).__name__)
    mark.set("message", _xml(str(error)))
    return _suite(suite, {"tests": 1, "failures": 0, "errors": 1, "skipped": 0})


def _suite(suite: ElementTree.Element, counts: dict[str, int]) -> str:
    for key, value in counts.items():
        suite.set(key, str(value))
    root = ElementTree.Element("testsuites", {k: str(v) for k, v in counts.items()})
    root.append(suite)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _xml(text: str) -> str:
    """XML 1.0 has no way to write most control characters or lone surrogates."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


#: Colours of `badge`, as shields.io names them.
_COLOURS = {Outcome.PASS: "brightgreen", Outcome.FAIL: "red", Outcome.INCONCLUSIVE: "yellow"}


def badge(verdict: Verdict) -> dict[str, Any]:
    """The JSON that https://shields.io/badges/endpoint-badge draws a badge from."""
    return {
        "schemaVersion": 1,
        "label": "quantkit gate",
        "message": summary(verdict),
        "color": _COLOURS[verdict.outcome],
    }


# -- files -----------------------------------------------------------------------------------


def flips_jsonl(flips: Iterable[Flip]) -> str:
    """One JSON object a line: id, task, prompt, both predictions, target, slice, direction."""
    return "".join(json.dumps(asdict(f), ensure_ascii=True) + "\n" for f in flips)


def provenance(source: str | Path, results: Results) -> dict[str, Any]:
    """Where results came from: the file's sha256 when ``source`` is one, and the fingerprint.

    Raises:
        UsageError: the file cannot be read.
    """
    doc: dict[str, Any] = {"source": str(source), "fingerprint": dict(results.fingerprint)}
    path = Path(source)
    if path.is_file():
        try:
            doc["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as e:
            raise UsageError(f"{path}: cannot be read ({e})") from e
    return doc


def document(
    verdict: Verdict, policy: Policy, candidate: dict[str, Any], baseline: dict[str, Any]
) -> dict[str, Any]:
    """``gate.json``: the verdict with its policy and the `provenance` of both results."""
    return {
        **verdict.to_json(),
        "summary": summary(verdict),
        "policy": {"source": policy.source, "gates": policy.to_json()},
        "candidate": candidate,
        "baseline": baseline,
    }
