"""Perplexity of held-out text, and how far a model's distribution is from a reference's.

Over non-overlapping windows of ``seq_len`` tokens, each predicting its last ``seq_len - 1``::

    nll   -log q(x)                      the model's surprise at the text
    kl    sum_v p(v) (log p(v) - log q(v))     KL(reference || model), nats a token
    top1  argmax p = argmax q

in fp32 from live logits, a slice of positions at a time: 1,024 positions of a 49k vocabulary
are 200 MB in fp32 for each of the arrays involved. Windows are kept apart, because they are
the clusters of a confidence interval.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.errors import NotComparableError, QuantkitError, UsageError
from quantkit.evals.forward import Forward, chunk_rows, make_forward
from quantkit.models.runtime import Runtime
from quantkit.progress import Progress, silent
from quantkit.results import TextResult, TextWindow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Windows that are measured when ``max_tokens`` does not say.
DEFAULT_WINDOWS = 24

#: Slices of a window in ``kl_by_position``.
POSITION_SLICES = 16


def measure_text(
    runtime: Runtime,
    reference: Runtime | None,
    text: str,
    *,
    seq_len: int = 1024,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> TextResult:
    """Measure a model on held-out text.

    Args:
        runtime: the model q.
        reference: the model p that it is held against; None measures perplexity alone.
        text: split into tokens as one document, special tokens as the tokenizer adds them.
        seq_len: tokens of a window.
        max_tokens: read at most so many tokens, whole windows; 24 windows when None.
        progress: told of finished windows.

    Raises:
        UsageError: less text, or fewer tokens asked for, than one window.
        NotComparableError: the two models do not share a tokenizer or a vocabulary.
        QuantkitError: NaN or infinite logits, naming the window.
    """
    _check_comparable(runtime, reference)
    windows = cut_windows(runtime.tokenizer, text, seq_len, max_tokens)

    model = make_forward(runtime)
    base = None if reference is None else make_forward(reference)
    rows, kls = [], []
    for index, window in enumerate(windows):
        try:
            nll, kl, top1 = _window(model, base, window)
        except _NotFiniteError as e:
            raise QuantkitError(
                f"text window {index + 1} of {len(windows)}: the logits of the {e} hold NaN or "
                "infinity",
                remedy="try --kernels reference to see whether the weights or the kernels do it",
            ) from None
        rows.append(TextWindow(tokens=seq_len - 1, nll=nll, kl=_sum(kl), top1=top1))
        if kl is not None:
            kls.append(kl)
        progress(index + 1, len(windows), "text")

    digest = hash_windows(windows)
    if not kls:
        return TextResult(hash=digest, seq_len=seq_len, windows=tuple(rows))
    by_token = torch.stack(kls)
    p99, p999 = torch.quantile(
        by_token.flatten(), torch.tensor([0.99, 0.999], dtype=torch.float64)
    ).tolist()
    slices = torch.tensor_split(by_token.mean(0), min(POSITION_SLICES, seq_len - 1))
    return TextResult(
        hash=digest,
        seq_len=seq_len,
        windows=tuple(rows),
        kl_p99=p99,
        kl_p999=p999,
        kl_by_position=tuple(float(s.mean()) for s in slices),
    )


def cut_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, seq_len: int, max_tokens: int | None = None
) -> Tensor:
    """Token ids int64 ``[windows, seq_len]`` of a text's first windows; a rest is dropped.

    Args:
        tokenizer: adds special tokens as it does to any text.
        text: one document.
        seq_len, max_tokens: see `measure_text`.

    Raises:
        UsageError: less text, or fewer tokens asked for, than one window.
    """
    if seq_len < 2:
        raise UsageError(f"seq_len {seq_len} is below 2: a window predicts all but its first token")
    limit = DEFAULT_WINDOWS * seq_len if max_tokens is None else max_tokens
    if limit < seq_len:
        raise UsageError(
            f"max_tokens {limit} is less than one window of {seq_len}",
            remedy="raise --max-tokens or lower --seq-len",
        )
    ids: Any = tokenizer.encode(text, verbose=False)
    count = min(len(ids), limit) // seq_len
    if count == 0:
        raise UsageError(
            f"the text has {len(ids)} tokens, less than one window of {seq_len}",
            remedy=f"give more text, or lower --seq-len (calibrate: --eval-seq-len) to "
            f"{max(2, len(ids))}",
        )
    return torch.tensor(ids[: count * seq_len]).view(count, seq_len)


def hash_windows(windows: Tensor) -> str:
    """sha256 of the little-endian int64 ids of ``[windows, seq_len]``: the text's fingerprint."""
    return hashlib.sha256(windows.numpy().astype("<i8").tobytes()).hexdigest()


class _NotFiniteError(Exception):
    """NaN or infinite logits; the message names the model."""


@torch.inference_mode()
def _window(
    model: Forward, base: Forward | None, tokens: Tensor
) -> tuple[float, Tensor | None, int | None]:
    """Measure one window.

    Args:
        model: q.
        base: p.
        tokens: ids ``[seq_len]``.

    Returns:
        (sum of -log q, KL of each predicted token ``[seq_len - 1]`` in fp64, agreements).
    """
    targets = tokens[1:].to(model.device)
    states = model.states(tokens[None].to(model.device))[0, :-1]
    base_states = None
    if base is not None:
        base_states = base.states(tokens[None].to(base.device))[0, :-1]
    nll, agree, parts = 0.0, 0, []
    step = chunk_rows(model.vocab_size)
    for first in range(0, len(states), step):
        log_q = _log_softmax(model, states[first : first + step], "model")
        wanted = targets[first : first + step, None]
        nll -= float(log_q.gather(1, wanted).double().sum())
        if base is None or base_states is None:
            continue
        log_p = _log_softmax(base, base_states[first : first + step], "reference")
        log_p = log_p.to(log_q.device)
        agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        # p (log p - log q), in place: at most four fp32 arrays of this size are alive.
        log_q = torch.sub(log_p, log_q, out=log_q)
        parts.append(log_p.exp_().mul_(log_q).sum(-1).double().cpu())
    return (nll, torch.cat(parts), agree) if parts else (nll, None, None)


def _log_softmax(model: Forward, states: Tensor, who: str) -> Tensor:
    """fp32 log-probabilities ``[n, vocab]`` of states ``[n, width]``."""
    logits = model.logits(states)
    if not torch.isfinite(logits.sum(-1)).all() and not torch.isfinite(logits).all():
        raise _NotFiniteError(who)
    return logits.log_softmax(-1)


def _check_comparable(runtime: Runtime, reference: Runtime | None) -> None:
    if reference is None:
        return
    ours, theirs = (r.fingerprint.get("tokenizer") for r in (runtime, reference))
    if ours != theirs:
        raise NotComparableError(
            f"{runtime.name} and {reference.name} have different tokenizers: token by token, "
            "their distributions are not about the same thing"
        )
    sizes = [make_forward(r).vocab_size for r in (runtime, reference)]
    if sizes[0] != sizes[1]:
        raise NotComparableError(
            f"{runtime.name} has {sizes[0]} tokens in its vocabulary, {reference.name} {sizes[1]}"
        )


def _sum(kl: Tensor | None) -> float | None:
    return None if kl is None else float(kl.sum())
