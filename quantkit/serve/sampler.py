"""From one row of logits to one token.

Every function takes the logits of a single sequence and that sequence's own generator, so a
result never depends on which other sequences happen to run: batch invariance by construction.
Order of the filters: temperature, top-k, top-p, min-p. Reported log-probabilities are the
model's own, before any of them.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.models.pass_logits import PassLogits
from quantkit.ops.argmax import argmax
from quantkit.serve.events import TokenLogprob
from quantkit.serve.request import SamplingParams

if TYPE_CHECKING:
    from quantkit.serve.runner import Results

HOPELESS = -9999.0
#: How many of the likeliest tokens are looked at for top-p, before all are.
LIKELY = (256, 4096)


class NotFiniteError(QuantkitError):
    """NaN or infinite logits: a broken checkpoint or an overflow, never something to sample."""

    def __init__(self) -> None:
        super().__init__("the model produced logits that are not finite")


def make_generator(seed: int | None, device: torch.device | str = "cpu") -> torch.Generator:
    """A request's own random stream; ``None`` draws a seed that nobody can repeat."""
    generator = torch.Generator(device=device)
    generator.manual_seed(secrets.randbits(63) if seed is None else seed)
    return generator


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Choose a token.

    Args:
        logits: ``[vocab]``, any float type.
        params: the request's settings.
        generator: the request's random stream, on the device of ``logits``.
    """
    if params.greedy:
        [found] = _likeliest_rows(logits[None])
        return found.token()
    # One uniform number through the inverse of the cumulative distribution: torch.multinomial draws
    # one for each token of the vocabulary, twenty times as slow.
    cumulative = distribution(logits, params).cumsum(-1, dtype=torch.float64)
    total = float(cumulative[-1])
    if not math.isfinite(total):
        raise NotFiniteError
    uniform = torch.rand((), dtype=torch.float64, device=generator.device, generator=generator)
    # Below the total even when rounded, or it would name a token behind the last possible one.
    place = min(float(uniform) * total, math.nextafter(total, 0.0))
    return int(torch.searchsorted(cumulative, place, right=True))


class Likeliest(NamedTuple):
    """Where a row's first largest logit is, or its first NaN, and that value."""

    place: int
    logit: float

    def token(self) -> int:
        """What a greedy request takes.

        Raises:
            NotFiniteError: there is a NaN or an infinity in the row.
        """
        # A NaN anywhere is what was found: this checks the whole row for free.
        if not math.isfinite(self.logit):
            raise NotFiniteError
        return self.place


def likeliest(results: Results, counts: Sequence[int]) -> list[list[Likeliest]]:
    """Of the last ``counts[i]`` rows of each result; nothing of one that is an exception.

    One search for all of them, where they lie together: a step's end would take as long as some of
    its layers otherwise.
    """
    if isinstance(results, PassLogits):
        found = map(Likeliest, *argmax(results.block, results.last_rows(counts)))
        return [list(islice(found, count)) for count in counts]
    return [
        _likeliest_rows(result[-count:]) if count and isinstance(result, Tensor) else []
        for result, count in zip(results, counts, strict=True)
    ]


def _likeliest_rows(block: Tensor) -> list[Likeliest]:
    """Of ``[rows, vocab]``, any float type."""
    if block.is_cpu and block.dtype == torch.float32:
        return list(map(Likeliest, *argmax(block.contiguous())))
    rows = block.max(-1)
    return list(map(Likeliest, rows.indices.tolist(), rows.values.tolist()))


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """``[vocab]`` logits → ``[vocab]`` float32 probabilities after all filters."""
    scaled = logits.float()
    # Subtracting the maximum first keeps tiny temperatures from overflowing to inf - inf.
    scaled = (scaled - scaled.max()) / max(params.temperature, 1e-6)
    if 0 < params.top_k < scaled.numel():
        threshold = scaled.topk(params.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < threshold, -torch.inf)
    probabilities = scaled.softmax(-1)
    if params.top_p < 1:
        probabilities = probabilities.masked_fill(
            probabilities < _least_of_top(probabilities, params.top_p), 0.0
        )
    if params.min_p > 0:
        floor = params.min_p * probabilities.max()
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    return probabilities / probabilities.sum()


def _least_of_top(probabilities: Tensor, mass: float) -> Tensor:
    """The least likely token's probability in the smallest set that reaches ``mass``."""
    # Nearly always a few hundred reach it, and to sort the whole vocabulary is slow.
    for count in (*LIKELY, probabilities.numel()):
        ordered = probabilities.topk(min(count, probabilities.numel())).values
        # A token stays while the mass before it is below: the one that crosses the line is in,
        # so the set is never empty.
        inside = ordered.cumsum(-1) - ordered < mass
        if not inside[-1]:
            break
    return ordered[inside.sum().clamp_min(1) - 1]


def score(logits: Tensor, token_ids: list[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of given tokens.

    Args:
        logits: ``[n, vocab]``; row i predicts ``token_ids[i]``.
        token_ids: n tokens.
        top: how many alternatives to report per row.
    """
    rows = logits.float()
    total = rows.logsumexp(-1, keepdim=True)
    if not torch.isfinite(total).all():
        raise NotFiniteError
    # JSON has no infinity: a token that the model rules out gets a finite, hopeless number.
    logprobs = (rows - total).clamp_min(HOPELESS)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=rows.device)[:, None])[:, 0].tolist()
    values, indices = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
    alternatives = zip(indices.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, tuple(zip(ids, tops, strict=True)))
        for token, logprob, (ids, tops) in zip(token_ids, chosen, alternatives, strict=True)
    ]
