"""Suites and held-out text scored through a server, as a results file like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantkit.errors import NotComparableError, UsageError
from quantkit.evals.canary import check_canaries
from quantkit.evals.divergence import cut_windows, hash_windows
from quantkit.evals.endpoint import Endpoint
from quantkit.evals.endpoint_model import EndpointLM
from quantkit.evals.evaluate import harness
from quantkit.evals.run_suite import ask_suites
from quantkit.evals.scorers import NONE_ALLOWED, Factory
from quantkit.evals.suite import Suite
from quantkit.model import template_hash, tokenizer_hash
from quantkit.progress import Progress, silent
from quantkit.results import Results, TextResult, TextWindow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quantkit.evals.early import EarlyStop

#: What a server may say of its model that belongs into a results file.
TOLD = ("model", "original", "kernels", "dtype", "device")


def evaluate_endpoint(
    endpoint: Endpoint,
    tokenizer: PreTrainedTokenizerBase,
    *,
    suites: Sequence[Suite] = (),
    text: str | None = None,
    seq_len: int = 1024,
    max_tokens: int | None = None,
    max_items: int | None = None,
    seed: int = 0,
    canary: bool = True,
    max_length: int | None = None,
    known: Mapping[str, Any] | None = None,
    early: Mapping[str, EarlyStop] | None = None,
    scorers: Mapping[str, Factory] = NONE_ALLOWED,
    cost: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Results:
    """Score a served model.

    Args:
        endpoint: see `quantkit.evals.endpoint.connect`.
        tokenizer: the served model's; the server sees token ids only.
        suites, text, seq_len, max_tokens, max_items, seed: see `quantkit.evals.evaluate`.
        canary: first check that the server's log-probabilities are those of a language model.
        max_length: see `EndpointLM`.
        early, scorers: see `quantkit.evals.run_suite.run_suites`.
        known: what the caller knows of the server's model because it started the server.
        cost: size and bits per weight, if known.
        progress: told of answered requests.

    Raises:
        UsageError: nothing to score, or windows longer than the server takes.
        NotComparableError: the server says that its tokenizer is another one.
        QuantkitError: the server fails, does not echo, or a canary fails.
    """
    if not suites and text is None:
        raise UsageError("nothing to score", remedy="give a suite or a text")
    ours, theirs = tokenizer_hash(tokenizer), endpoint.fingerprint.get("tokenizer")
    if theirs is not None and theirs != ours:
        raise NotComparableError(
            f"{endpoint.model} at {endpoint.config.base} has another tokenizer ({theirs!s:.12}) "
            f"than CKPT ({ours:.12})",
            remedy="give the checkpoint that is served there",
        )
    lm = EndpointLM(endpoint, tokenizer, max_length=max_length, progress=progress)
    if canary:
        check_canaries(lm)
    measured = None
    if text is not None:
        measured = _measure_text(lm, text, seq_len=seq_len, max_tokens=max_tokens)
    tasks = ask_suites(lm, suites, max_items=max_items, seed=seed, early=early, scorers=scorers)
    told = {key: endpoint.fingerprint[key] for key in TOLD if key in endpoint.fingerprint}
    return Results(
        fingerprint={
            "kernels": f"endpoint/{endpoint.server}",
            **told,
            "tokenizer": ours,
            "chat_template": template_hash(tokenizer),
            "engine": "endpoint",
            **(known or {}),
            "served_model": endpoint.model,
            "server": endpoint.server,
            **harness(seed),
        },
        tasks=tasks,
        text=measured,
        cost=cost or {},
    )


def _measure_text(lm: EndpointLM, text: str, *, seq_len: int, max_tokens: int | None) -> TextResult:
    """Negative log-likelihood of the same windows that a model which runs here is given."""
    if seq_len > lm.max_length + 1:
        raise UsageError(
            f"seq_len {seq_len}: {lm.endpoint.model} takes {lm.max_length + 1} tokens of text",
            remedy=f"lower --seq-len to {lm.max_length + 1}",
        )
    windows = cut_windows(lm.tokenizer, text, seq_len, max_tokens)
    lm.label = "text"
    scored = lm.score([(ids[:1], ids[1:]) for ids in windows.tolist()])
    rows = tuple(TextWindow(tokens=seq_len - 1, nll=-value) for value, _ in scored)
    return TextResult(hash=hash_windows(windows), seq_len=seq_len, windows=rows)
