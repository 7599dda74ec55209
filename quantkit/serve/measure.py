"""Speed of a runtime through the server's own path: runner, KV cache and sampler, no HTTP."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch

from quantkit.errors import UsageError
from quantkit.models.paged import pages_for
from quantkit.models.pass_logits import PassLogits
from quantkit.ops.page_store import PAGE_TOKENS
from quantkit.serve import sampler
from quantkit.serve.engine import EngineConfig
from quantkit.serve.runner import Runner, Work, make_runner

if TYPE_CHECKING:
    from quantkit.models.runtime import Runtime


#: Decode steps that `DecodeSpeed.native_share` is measured on.
SHARE_STEPS = 64


@dataclass(frozen=True)
class DecodeSpeed:
    """Tokens a second over all sequences: medians over the repeats.

    ``native_share``: of a decode step's time, spent in the native decoder; None without one.
    """

    prefill_tok_s: float
    decode_tok_s: float
    native_share: float | None = None


def measure_decode(
    runtime: Runtime, *, prompt_tokens: int, new_tokens: int, batch: int, repeats: int
) -> DecodeSpeed:
    """Read ``batch`` prompts, then decode them side by side, greedily.

    The first token of an answer comes out of its prefill, so ``new_tokens`` of decoding are as
    many forward passes of one token each. One short round warms up and is not counted.
    """
    config = runtime.model.config.get_text_config()
    if prompt_tokens + new_tokens > config.max_position_embeddings:
        raise UsageError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones are more than the model's "
            f"context of {config.max_position_embeddings}"
        )
    prompts = random_prompts(config.vocab_size, batch, prompt_tokens)
    runner = make_runner(runtime, batch * _whole_pages(prompt_tokens + new_tokens))
    _round(runner, [prompt[:8] for prompt in prompts], 2)
    rounds = [_round(runner, prompts, new_tokens) for _ in range(repeats)]
    return DecodeSpeed(
        prefill_tok_s=batch * prompt_tokens / median(prefill for prefill, _ in rounds),
        decode_tok_s=batch * new_tokens / median(decode for _, decode in rounds),
        native_share=_native_share(runtime, runner, prompts),
    )


def random_prompts(vocab: int, batch: int, tokens: int) -> list[list[int]]:
    """The same each time: speed does not depend on the words, and no file is needed."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (batch, tokens), generator=generator).tolist()


def _native_share(runtime: Runtime, runner: Runner, prompts: list[list[int]]) -> float | None:
    """Time inside the native decoder over the time of whole decode steps, sampling included."""
    if runtime.decoder is None:
        return None
    caches = [runner.new_cache() for _ in prompts]
    tokens = [prompt[-1] for prompt in prompts]
    inside = runtime.decoder.native.times()["lifetime"]
    start = time.perf_counter()
    for _ in range(SHARE_STEPS):
        works = [Work(cache, [token]) for cache, token in zip(caches, tokens, strict=True)]
        tokens = _run(runner, works)
    elapsed = time.perf_counter() - start
    inside = runtime.decoder.native.times()["lifetime"] - inside
    for cache in caches:
        runner.release(cache)
    return inside / elapsed


def _whole_pages(tokens: int) -> int:
    return pages_for(tokens) * PAGE_TOKENS


def _round(runner: Runner, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """Seconds of prefill and of decode."""
    chunk = EngineConfig.prefill_chunk
    caches = [runner.new_cache() for _ in prompts]
    tokens = []
    start = time.perf_counter()
    for prompt, cache in zip(prompts, caches, strict=True):
        for begin in range(0, len(prompt), chunk):
            token = _run(runner, [Work(cache, prompt[begin : begin + chunk])])
        tokens += token
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        works = [Work(cache, [token]) for cache, token in zip(caches, tokens, strict=True)]
        tokens = _run(runner, works)
    decoded = time.perf_counter()
    for cache in caches:
        runner.release(cache)
    return prefilled - start, decoded - prefilled


def _run(runner: Runner, works: list[Work]) -> list[int]:
    """The likeliest token behind each work."""
    results = runner.run(works)
    if not isinstance(results, PassLogits):
        for result in results:
            if isinstance(result, Exception):
                raise result
    return [found.token() for [found] in sampler.likeliest(results, [1] * len(works))]
