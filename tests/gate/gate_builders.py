"""Results made of counts, for tests of the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.results import ItemRow, Results, TaskResult, TextResult, TextWindow

FINGERPRINT = {"tokenizer": "tok", "chat_template": "chat", "lm_eval": "0.4.13", "seed": 0}


def rows(scores: Sequence[float], **changes: Any) -> tuple[ItemRow, ...]:
    """Rows ``item-0000`` …; ``changes`` hold one sequence per field."""
    return tuple(
        ItemRow(
            id=f"item-{i:04d}",
            score=float(score),
            hash=f"hash-{i}",
            prompt=f"prompt {i}",
            target="yes",
            prediction="yes" if score >= 0.5 else "no",
            **{key: values[i] for key, values in changes.items()},
        )
        for i, score in enumerate(scores)
    )


def paired(
    both: int, gains: int, losses: int, neither: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scores (baseline, candidate) with these numbers of right and wrong answers."""
    base = [1.0] * both + [0.0] * gains + [1.0] * losses + [0.0] * neither
    quant = [1.0] * both + [1.0] * gains + [0.0] * losses + [0.0] * neither
    return tuple(base), tuple(quant)


def task(scores: Sequence[float], **changes: Any) -> TaskResult:
    return TaskResult("acc", rows(scores, **changes), "task-hash")


def results(
    tasks: Mapping[str, TaskResult] | None = None,
    text: TextResult | None = None,
    cost: Mapping[str, Any] | None = None,
    **fingerprint: Any,
) -> Results:
    return Results({**FINGERPRINT, **fingerprint}, tasks or {}, text, cost or {})


def pair_of_results(
    both: int, gains: int, losses: int, neither: int, **changes: Any
) -> tuple[Results, Results]:
    """(candidate, baseline) with one task named ``intent``."""
    base, quant = paired(both, gains, losses, neither)
    return (
        results({"intent": task(quant, **changes)}),
        results({"intent": task(base, **changes)}),
    )


def text(
    nll: Sequence[float],
    kl: Sequence[float] | None = None,
    top1: Sequence[int] | None = None,
    *,
    tokens: int = 1000,
    hash: str = "text-hash",
    seq_len: int = 1024,
    p99: float | None = None,
) -> TextResult:
    """Windows of ``tokens`` tokens with these mean NLL and KL (nats per token)."""
    windows = tuple(
        TextWindow(
            tokens,
            n * tokens,
            None if kl is None else kl[i] * tokens,
            None if top1 is None else top1[i],
        )
        for i, n in enumerate(nll)
    )
    return TextResult(hash, seq_len, windows, kl_p99=p99)
