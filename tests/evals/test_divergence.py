"""Perplexity and divergence against naive loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from eval_builders import tiny_runtime

from quantkit.errors import NotComparableError, QuantkitError, UsageError
from quantkit.evals import divergence, forward
from quantkit.evals.divergence import cut_windows, measure_text
from quantkit.models.runtime import Runtime

TEXT = "The order is late and the invoice never came. Rome is not Paris! " * 12
SEQ = 32


def naive(model: Runtime, base: Runtime, windows: torch.Tensor) -> tuple[list[float], torch.Tensor]:
    """(sums of -log q, KL ``[windows, seq - 1]``), one window and one token at a time."""
    nll, kls = [], []
    with torch.no_grad():
        for window in windows:
            log_q = model.model(window[None]).logits[0].double().log_softmax(-1)
            log_p = base.model(window[None]).logits[0].double().log_softmax(-1)
            nll.append(-sum(float(log_q[t, window[t + 1]]) for t in range(len(window) - 1)))
            kl = F.kl_div(log_q[:-1], log_p[:-1], log_target=True, reduction="none").sum(-1)
            kls.append(kl)
    return nll, torch.stack(kls)


def test_it_equals_a_naive_loop(
    runtime: Runtime, other: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "CHUNK_ELEMENTS", 16 * 300)  # several chunks a window
    result = measure_text(other, runtime, TEXT, seq_len=SEQ)
    windows = cut_windows(other.tokenizer, TEXT, SEQ)
    nll, kl = naive(other, runtime, windows)
    assert len(result.windows) == len(windows) == 15
    assert [w.nll for w in result.windows] == pytest.approx(nll, rel=1e-5)
    assert [w.kl for w in result.windows] == pytest.approx(kl.sum(-1).tolist(), rel=1e-4)
    assert all(w.tokens == SEQ - 1 for w in result.windows)
    assert result.kl_p99 == pytest.approx(float(kl.flatten().quantile(0.99)), rel=1e-3)
    assert result.kl_p999 is not None
    assert result.kl_p999 >= result.kl_p99
    assert len(result.kl_by_position) == 16
    assert sum(result.kl_by_position) / 16 == pytest.approx(result.kl_mean, rel=0.1)
    assert math.exp(result.mean_nll) == pytest.approx(math.exp(sum(nll) / kl.numel()), rel=1e-5)


def test_a_model_does_not_diverge_from_itself(runtime: Runtime) -> None:
    result = measure_text(runtime, runtime, TEXT, seq_len=SEQ)
    assert result.kl_mean == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1.0


@pytest.mark.parametrize("noise", [1e-6, 1e-4, 1e-2, 1.0])
def test_kl_is_not_negative(runtime: Runtime, noise: float) -> None:
    near = tiny_runtime()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in near.model.parameters():
            p.add_(torch.randn_like(p) * noise * p.abs().mean())
    window = cut_windows(runtime.tokenizer, TEXT, 200)[0]
    _, kl, _ = divergence._window(
        forward.ModuleForward(near.model), forward.ModuleForward(runtime.model), window
    )
    assert kl is not None
    assert float(kl.min()) >= -1e-6


def test_top1_counts_agreements(runtime: Runtime, other: Runtime) -> None:
    result = measure_text(other, runtime, TEXT, seq_len=SEQ, max_tokens=2 * SEQ + 5)
    assert len(result.windows) == 2
    windows = cut_windows(other.tokenizer, TEXT, SEQ, 2 * SEQ)
    with torch.no_grad():
        a, b = (r.model(windows).logits[:, :-1].argmax(-1) for r in (runtime, other))
    assert [w.top1 for w in result.windows] == (a == b).sum(-1).tolist()


def test_without_a_reference_there_is_perplexity_alone(runtime: Runtime) -> None:
    result = measure_text(runtime, None, TEXT, seq_len=SEQ)
    assert result.kl_mean is None
    assert result.top1_agreement is None
    assert result.kl_by_position == ()
    assert result.mean_nll > 0


def test_the_hash_is_that_of_the_measured_tokens(runtime: Runtime) -> None:
    hashes = [
        measure_text(runtime, None, text, seq_len=SEQ, max_tokens=limit).hash
        for text, limit in ((TEXT, 64), (TEXT + "more", 64), ("x" + TEXT, 64), (TEXT, 96))
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_progress_counts_windows(runtime: Runtime) -> None:
    seen: list[tuple[int, int, str]] = []
    measure_text(
        runtime, None, TEXT, seq_len=SEQ, max_tokens=96, progress=lambda *a: seen.append(a)
    )
    assert seen == [(1, 3, "text"), (2, 3, "text"), (3, 3, "text")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("who", ["model", "reference"])
def test_a_broken_model_is_named_with_its_window(runtime: Runtime, value: float, who: str) -> None:
    broken = tiny_runtime()
    with torch.no_grad():
        broken.model.lm_head.weight[7, 3] = value
    pair = (broken, runtime) if who == "model" else (runtime, broken)
    with pytest.raises(QuantkitError, match=f"text window 1 of 15: the logits of the {who}"):
        measure_text(*pair, TEXT, seq_len=SEQ)


def test_short_text_is_a_usage_error(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="less than one window of 1024"):
        measure_text(runtime, None, "too short")
    with pytest.raises(UsageError, match="max_tokens 16 is less than one window"):
        measure_text(runtime, None, TEXT, seq_len=SEQ, max_tokens=16)
    with pytest.raises(UsageError, match="seq_len 1 is below 2"):
        measure_text(runtime, None, TEXT, seq_len=1)


def test_models_that_cannot_be_compared_are_refused(runtime: Runtime) -> None:
    wide = tiny_runtime(vocab=400)
    with pytest.raises(NotComparableError, match="400 tokens in its vocabulary"):
        measure_text(wide, runtime, TEXT, seq_len=SEQ)
    foreign = Runtime(runtime.model, runtime.tokenizer, "foreign", {"tokenizer": "other"}, 0, 16.0)
    with pytest.raises(NotComparableError, match="different tokenizers"):
        measure_text(foreign, runtime, TEXT, seq_len=SEQ)
