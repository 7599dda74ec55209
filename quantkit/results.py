"""Evaluation results: per-item rows, fingerprints and verdicts. Plain data, no torch.

A results file is one JSON document (``schema`` 1)::

    {"schema": 1,
     "fingerprint": {"model": sha256, "tokenizer": sha256, "chat_template": sha256,
                     "kernels": "native/bf16", "dtype": "bfloat16", "seed": 0, ...},
     "perplexity": 23.4, "kl_mean": 0.03, "kl_p99": 0.4, "top1_agreement": 0.93,
     "text": {"hash": ..., "seq_len": 1024, "windows": [[tokens, nll, kl, top1], ...]},
     "tasks": {"support_intent": {"acc": 0.61, "n": 420, "metric": "acc", "value": 0.61,
                                  "hash": sha256 of the task file and its data,
                                  "rows": [{"id": ..., "score": 1.0, ...}, ...]}},
     "cost": {"size_bytes": ..., "bits_per_weight": ..., "reference_size_bytes": ...}}

Rows carry everything that a paired test or a flips table needs, so that a gate never has
to load a model. ``n`` is the manifest: a file with another number of rows is refused.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError, UsageError
from quantkit.noise import NoiseFloor
from quantkit.timings import Timings

SCHEMA = 1

#: Fingerprint keys that must be equal for two results to be compared. ``model`` and
#: ``kernels`` are what the comparison is about, so they are not among them.
COMPARABLE_KEYS = ("tokenizer", "chat_template", "lm_eval", "seed")


@dataclass(frozen=True)
class ItemRow:
    """One scored item of a task.

    Attributes:
        id: the item's own id, or its position when it has none. Unique in a task.
        score: the metric's value on this item (0 or 1 for accuracy and exact match).
        hash: sha256 of the item's content; rows of two runs are joined on (id, hash).
        prediction: what the model chose or wrote.
        target: what was right.
        prompt: the text shown to the model.
        slice: name of the item's slice, for "which slices regressed".
        cluster: items that share a passage or dialogue share a cluster.
        must_not_flip: a right answer of the baseline must stay right.
        details: per-choice log-probabilities and the like.
    """

    id: str
    score: float
    hash: str
    prediction: str = ""
    target: str = ""
    prompt: str = ""
    slice: str | None = None
    cluster: str | None = None
    must_not_flip: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskResult:
    """One task's rows and its metric. ``binary`` is true when every score is 0 or 1.

    ``early`` is the seed of the order in which items were scored by a run that could stop
    before its last item, else None: such a run is judged by `quantkit.gate.sequential` alone.
    ``provenance`` says where a task of lm-eval's own came from; empty for a file.
    """

    metric: str
    rows: tuple[ItemRow, ...]
    hash: str
    early: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def value(self) -> float:
        return sum(r.score for r in self.rows) / len(self.rows) if self.rows else float("nan")

    @property
    def binary(self) -> bool:
        return all(r.score in (0.0, 1.0) for r in self.rows)


@dataclass(frozen=True)
class TextWindow:
    """One window (a cluster) of held-out text.

    Attributes:
        tokens: number of predicted tokens.
        nll: sum of the model's negative log-likelihood, nats.
        kl: sum over tokens of KL(reference || model), nats; None without a reference.
        top1: number of tokens where both models' most likely token agree.
    """

    tokens: int
    nll: float
    kl: float | None = None
    top1: int | None = None


@dataclass(frozen=True)
class TextResult:
    """Perplexity and divergence on held-out text.

    ``kl_p99`` is taken over tokens; ``kl_by_position`` is the mean KL in equal slices of the
    window, for the report.
    """

    hash: str
    seq_len: int
    windows: tuple[TextWindow, ...]
    kl_p99: float | None = None
    kl_p999: float | None = None
    kl_by_position: tuple[float, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(w.tokens for w in self.windows)

    @property
    def mean_nll(self) -> float:
        return sum(w.nll for w in self.windows) / self.tokens

    @property
    def kl_mean(self) -> float | None:
        if any(w.kl is None for w in self.windows):
            return None
        return sum(w.kl for w in self.windows if w.kl is not None) / self.tokens

    @property
    def top1_agreement(self) -> float | None:
        if any(w.top1 is None for w in self.windows):
            return None
        return sum(w.top1 for w in self.windows if w.top1 is not None) / self.tokens


@dataclass(frozen=True)
class Results:
    """Everything one model scored, with the fingerprint of the system that scored it.

    ``noise`` and ``timings`` are there when they were measured.
    """

    fingerprint: Mapping[str, Any]
    tasks: Mapping[str, TaskResult] = field(default_factory=dict)
    text: TextResult | None = None
    cost: Mapping[str, Any] = field(default_factory=dict)
    noise: NoiseFloor | None = None
    timings: Timings | None = None

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """Groups of lm-eval's that weigh their tasks alike: name → metric, value, tasks."""
        members: dict[str, list[TaskResult]] = {}
        for task in self.tasks.values():
            for group in task.provenance.get("groups", ()):
                members.setdefault(group, []).append(task)
        return {
            name: {
                "metric": tasks[0].metric,
                "value": sum(t.value for t in tasks) / len(tasks),
                "tasks": len(tasks),
            }
            for name, tasks in members.items()
        }

    def to_json(self) -> dict[str, Any]:
        """The document of the module docstring."""
        doc: dict[str, Any] = {"schema": SCHEMA, "fingerprint": dict(self.fingerprint)}
        if self.text is not None:
            doc["perplexity"] = math.exp(min(self.text.mean_nll, 700.0))
            doc["kl_mean"] = self.text.kl_mean
            doc["kl_p99"] = self.text.kl_p99
            doc["kl_p999"] = self.text.kl_p999
            doc["top1_agreement"] = self.text.top1_agreement
            doc["text"] = {
                "hash": self.text.hash,
                "seq_len": self.text.seq_len,
                "tokens": self.text.tokens,
                "kl_by_position": list(self.text.kl_by_position),
                "windows": [[w.tokens, w.nll, w.kl, w.top1] for w in self.text.windows],
            }
        doc["tasks"] = {
            name: {
                t.metric: t.value,
                "n": t.n,
                "metric": t.metric,
                "value": t.value,
                "hash": t.hash,
                "rows": [asdict(r) for r in t.rows],
                **({} if t.early is None else {"early": t.early}),
                **({"provenance": dict(t.provenance)} if t.provenance else {}),
            }
            for name, t in self.tasks.items()
        }
        if groups := self.groups:
            doc["groups"] = groups
        doc["cost"] = dict(self.cost)
        if self.noise is not None:
            doc["noise"] = self.noise.to_json()
        if self.timings is not None:
            doc["timings"] = self.timings.to_json()
        return doc

    def summary(self) -> dict[str, Any]:
        """`to_json` without the rows: what ``--json`` prints."""
        doc = self.to_json()
        doc["tasks"] = {
            name: {k: v for k, v in task.items() if k != "rows"}
            for name, task in doc["tasks"].items()
        }
        if "text" in doc:
            doc["text"] = {k: v for k, v in doc["text"].items() if k != "windows"}
        return doc

    def save(self, path: str | Path) -> None:
        """Write the document: to a staging name first, then one rename."""
        write_json(path, self.to_json())

    @staticmethod
    def from_json(doc: Mapping[str, Any], *, source: str = "results") -> Results:
        """Read the document back.

        Raises:
            UsageError: not a results document, or another schema.
            QuantkitError: rows are missing that the document's own ``n`` promises, or a
                score is not a finite number.
        """
        if not isinstance(doc, Mapping):
            raise UsageError(f"{source}: not a results document")
        if doc.get("schema") != SCHEMA:
            raise UsageError(
                f"{source}: schema {doc.get('schema')!r} is not {SCHEMA}",
                remedy="write it again with `quantkit eval`",
            )
        try:
            tasks = {}
            for name, t in doc.get("tasks", {}).items():
                rows = tuple(ItemRow(**r) for r in t["rows"])
                if len(rows) != t["n"]:
                    raise QuantkitError(
                        f"{source}: task {name} has {len(rows)} rows where its manifest says "
                        f"{t['n']}",
                        remedy="rows must not be edited or dropped; run `quantkit eval` again",
                    )
                if not all(
                    isinstance(r.id, str) and isinstance(r.score, float | int) for r in rows
                ):
                    raise UsageError(f"{source}: task {name}: ids are text and scores are numbers")
                twice = [i for i, count in Counter(r.id for r in rows).items() if count > 1]
                if twice:
                    raise QuantkitError(f"{source}: task {name} has item {twice[0]!r} twice")
                bad = [r.id for r in rows if not math.isfinite(r.score)]
                if bad:
                    raise QuantkitError(
                        f"{source}: task {name} item {bad[0]!r} has no finite score"
                    )
                tasks[name] = TaskResult(
                    t["metric"], rows, t["hash"], t.get("early"), dict(t.get("provenance", {}))
                )
            text = None
            if "text" in doc:
                x = doc["text"]
                text = TextResult(
                    hash=x["hash"],
                    seq_len=x["seq_len"],
                    windows=tuple(TextWindow(*w) for w in x["windows"]),
                    kl_p99=doc.get("kl_p99"),
                    kl_p999=doc.get("kl_p999"),
                    kl_by_position=tuple(x.get("kl_by_position", ())),
                )
                if any(
                    not math.isfinite(w.nll) or not math.isfinite(w.kl or 0) for w in text.windows
                ):
                    raise QuantkitError(f"{source}: a text window has no finite likelihood")
                if text.tokens != x["tokens"]:
                    raise QuantkitError(
                        f"{source}: the text windows hold {text.tokens} tokens where the "
                        f"manifest says {x['tokens']}"
                    )
            return Results(
                fingerprint=dict(doc["fingerprint"]),
                tasks=tasks,
                text=text,
                cost=dict(doc.get("cost", {})),
                noise=NoiseFloor.from_json(doc["noise"]) if "noise" in doc else None,
                timings=Timings.from_json(doc["timings"]) if "timings" in doc else None,
            )
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise UsageError(f"{source}: not a results document ({e!r})") from e

    @staticmethod
    def load(path: str | Path) -> Results:
        """Read a results file. Raises UsageError when it is absent or not JSON."""
        return Results.from_json(read_json(path), source=str(path))


@dataclass(frozen=True)
class Flip:
    """An item that only one of the two models got right. ``direction``: loss or gain."""

    task: str
    id: str
    direction: str
    slice: str | None
    prompt: str
    target: str
    baseline_prediction: str
    candidate_prediction: str
    baseline_score: float
    candidate_score: float
    must_not_flip: bool


class Outcome(StrEnum):
    """What a gate says."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


@dataclass(frozen=True)
class GateCheck:
    """One gate's measurement against its limit.

    Attributes:
        name: the policy key, such as ``support_intent.acc`` or ``kl.mean``.
        outcome: PASS, FAIL or INCONCLUSIVE.
        value: the point estimate (a difference of means for task gates).
        lower, upper: its one-sided 95 % bounds, or None where it is deterministic.
        limit: the margin (as a lower limit, negative) or maximum it is held against.
        reason: one line a person can read.
        details: counts, statistics and warnings.
    """

    name: str
    outcome: Outcome
    value: float
    lower: float | None
    upper: float | None
    limit: float
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The gates' joint answer: FAIL if any fails, else INCONCLUSIVE if any is, else PASS."""

    outcome: Outcome
    checks: tuple[GateCheck, ...]
    warnings: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return {Outcome.PASS: 0, Outcome.FAIL: 1, Outcome.INCONCLUSIVE: 3}[self.outcome]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "outcome": str(self.outcome),
            "checks": [{**asdict(c), "outcome": str(c.outcome)} for c in self.checks],
            "warnings": list(self.warnings),
        }


def read_json(path: str | Path) -> Any:
    """Parse a JSON file. Raises UsageError when it is absent or malformed."""
    path = Path(path)
    if path.is_char_device():  # /dev/zero and its like never end
        raise UsageError(f"{path}: is a device", remedy="name a file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: cannot be read ({e})") from e
    except json.JSONDecodeError as e:
        raise UsageError(f"{path}:{e.lineno}: not JSON ({e.msg})") from e
    except (ValueError, RecursionError) as e:  # a number of 5,000 digits, nesting without end
        raise UsageError(f"{path}: not JSON that can be read ({e})") from e


def write_json(path: str | Path, doc: Any) -> None:
    """Write JSON to a staging name beside ``path``, then rename it into place.

    Raises:
        UsageError: the folder cannot be written.
    """
    write_text(path, json.dumps(doc, indent=1, sort_keys=True, allow_nan=False) + "\n")


def check_writable(path: str | Path) -> None:
    """Refuse a file that could not be written, before the work that it is to hold is done.

    Raises:
        UsageError: its folder is not there, is not a folder, or takes no files.
    """
    path = Path(path)
    if path.is_dir() or path.is_char_device():
        what = "folder" if path.is_dir() else "device"
        raise UsageError(f"{path}: is a {what}", remedy="name a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path.parent}: no folder to write {path.name} in", remedy="make it")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file to a staging name beside ``path``, then rename it into place.

    Raises:
        UsageError: the folder cannot be written.
        QuantkitError: the disk is full.
    """
    path = Path(path)
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, path)
    except UnicodeEncodeError as e:
        staging.unlink(missing_ok=True)
        raise QuantkitError(f"{path}: text that is not valid Unicode ({e.reason})") from e
    except OSError as e:
        staging.unlink(missing_ok=True)
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise QuantkitError(f"{path}: the disk is full", remedy="free some space") from e
        raise UsageError(f"{path}: cannot be written ({e.strerror or e})") from e
