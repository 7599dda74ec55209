"""Choosing the range of a static activation scale by what it does to the layers' outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit import numerics
from quantkit.parallel import ALONE, World
from quantkit.schemes import QuantSpec

#: Most tokens that errors are measured on: of the largest ones, and of the others, spread evenly.
LARGEST, SPREAD = 32, 256

#: A token is one of the largest if its largest magnitude is at least this share of all tokens'.
NEAR_LARGEST = 0.25


@dataclass(frozen=True)
class InputRange:
    """The range behind a static activation scale, and what it was chosen over.

    Attributes:
        observer: label of the observer that found it, such as ``percentile(p=99.9)``.
        low, high: the range, in units of the input.
        errors: label → output error of every candidate, as `output_errors` has it.
    """

    observer: str
    low: float
    high: float
    errors: Mapping[str, float] = field(default_factory=dict)

    def scale(self, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
        """The scale ``[1]`` in the model's dtype."""
        low, high = (torch.tensor(v, dtype=torch.float32).to(dtype) for v in (self.low, self.high))
        return numerics.compute_scales(low, high, spec)[0].reshape(1)


@dataclass(frozen=True)
class TokenSample:
    """Tokens of one input, in the model's dtype: the ``largest`` ones ``[A, K]``, A ≥ 1, and
    ``others`` ``[B, K]``."""

    largest: Tensor
    others: Tensor


def sample_tokens(
    inputs: Sequence[Tensor],
    largest: int = LARGEST,
    spread: int = SPREAD,
    together: World = ALONE,
) -> TokenSample:
    """The tokens of an input that a range must serve: some with the largest values, and others.

    Args:
        inputs: the batches, ``[tokens, K]`` each.
        largest: how many of the largest ones are taken, at most.
        spread: how many of the others, at most.
        together: whose batches are looked at; only the first process's answer is complete.
    """
    magnitudes = torch.cat([x.abs().amax(-1).float() for x in inputs])
    shares = together.gather(magnitudes)

    def choose() -> tuple[Tensor, Tensor, list[int]]:
        every = torch.cat([share.to(magnitudes.device) for share in shares])
        order = torch.argsort(every, descending=True, stable=True)
        near = int((every >= NEAR_LARGEST * every.max()).sum())
        rest = order[near:].sort().values
        if len(rest) > spread:
            rest = rest[torch.arange(spread, device=rest.device) * len(rest) // spread]
        return order[: min(near, largest)], rest, [len(share) for share in shares]

    near, rest, lengths = together.first(choose)
    start = sum(lengths[: together.rank])
    return TokenSample(
        _assemble(together.gather(_gather(inputs, near - start)), near, lengths),
        _assemble(together.gather(_gather(inputs, rest - start)), rest, lengths),
    )


def output_errors(
    scales: Sequence[Tensor],
    sample: TokenSample,
    weights: Sequence[Tensor],
    spec: QuantSpec,
) -> list[float]:
    """What quantizing an input at each of these scales costs the layers that read it.

    For inputs x with outputs y = x Wᵀ and what quantized inputs make of them, ŷ, a token's error
    is ‖ŷ − y‖² / ‖y‖², at most 1: relative, because a norm follows in the residual stream. The
    result is the larger of two means, over the largest tokens and over the others. Tokens with
    huge values are few, a text's first among them, but they are the attention sinks that all
    others read (Sun et al., "Massive Activations in Large Language Models", arXiv 2402.17762):
    a mean over all tokens would give them up first.

    Args:
        scales: ``[1]`` each, the model's dtype.
        sample: of the input.
        weights: ``[N, K]`` of every layer that reads it.
        spec: of the quantized input.
    """
    energy = _output_energy(weights)
    found = [0.0] * len(scales)
    for x in (sample.largest, sample.others):
        exact = energy(x.float())
        for i, scale in enumerate(scales):
            rounded = numerics.fake_quantize_input(x, spec, scale)
            error = energy(rounded.float() - x.float())
            relative = torch.where(error > 0, error / exact, 0.0).clamp(max=1.0)
            if len(x):
                found[i] = max(found[i], float(relative.double().mean()))
    return found


def choose_range(
    ranges: Mapping[str, tuple[Tensor, Tensor]],
    sample: TokenSample,
    weights: Sequence[Tensor],
    spec: QuantSpec,
) -> InputRange:
    """The candidate with the least of `output_errors`; the first of equals.

    Args:
        ranges: label → fp32 scalars (minimum, maximum).
        sample, weights, spec: see `output_errors`.
    """
    found = {
        label: InputRange(label, float(low), float(high)) for label, (low, high) in ranges.items()
    }
    scales = [
        each.scale(spec, weights[0].dtype).to(sample.largest.device) for each in found.values()
    ]
    measured = output_errors(scales, sample, weights, spec)
    errors = dict(zip(found, measured, strict=True))
    best = found[min(errors, key=errors.__getitem__)]
    return InputRange(best.observer, best.low, best.high, errors)


def _output_energy(weights: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """x ``[T, K]`` → ‖x Wᵀ‖² ``[T]``, fp32, for the W of all layers stacked."""
    stacked = torch.cat([w.float() for w in weights])
    if len(stacked) <= stacked.shape[1]:
        return lambda x: (x @ stacked.t()).square().sum(1)
    gram = stacked.t() @ stacked  # fewer products, and 0 for none
    return lambda x: ((x @ gram) * x).sum(1).clamp(min=0)


def _assemble(parts: Sequence[Tensor], rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each row from the process that has it, with the tokens that each has."""
    if len(parts) < 2:
        return parts[0] if parts else torch.empty(0, dtype=torch.float32)
    out = parts[0].clone()
    start = 0
    for part, length in zip(parts, lengths, strict=True):
        here = (rows >= start) & (rows < start + length)
        out[here] = part.to(out.device)[here]
        start += length
    return out


def _gather(inputs: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Rows of the concatenation of the batches, without making it; zeros for those outside."""
    rows = rows.to(inputs[0].device)
    out = torch.zeros(len(rows), inputs[0].shape[1], dtype=inputs[0].dtype, device=rows.device)
    start = 0
    for x in inputs:
        here = ((rows >= start) & (rows < start + len(x))).nonzero().squeeze(1)
        out[here] = x[rows[here] - start]
        start += len(x)
    return out
