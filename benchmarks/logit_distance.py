"""Logits of one text from the original, quantkit and llama.cpp, and how far they differ."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distance:
    """From the original, over all positions: nats a token, and the share of equal argmaxes.

    ``kl_error`` is the standard error of ``kl`` over windows.
    """

    kl: float
    kl_error: float | None
    kl_p99: float
    top1: float


def cut_windows(model: Path, text: Path, windows: int, length: int) -> Tensor:
    """Token ids ``[windows, length]`` of the start of a text, by the original's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), verbose=False)
    if len(ids) < windows * length:
        raise SystemExit(f"{text}: {len(ids)} tokens are fewer than {windows} x {length}")
    return torch.tensor(ids[: windows * length]).view(windows, length)


@torch.inference_mode()
def original_logits(model: Path, ids: Tensor) -> Iterator[Tensor]:
    """fp32 logits ``[length, vocabulary]`` of each window, in fp32 arithmetic."""
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for window in ids:
        yield original(window[None], use_cache=False).logits[0]


@torch.inference_mode()
def quantkit_logits(checkpoint: Path, ids: Tensor) -> Iterator[Tensor]:
    """fp32 logits ``[length, vocabulary]`` of each window, in the kernels that serve."""
    from quantkit.models.load import load_runtime

    runtime = load_runtime(checkpoint)
    for window in ids:
        yield runtime.logits(window.tolist())


def llamacpp_logits(tool: Path, gguf: Path, ids: Tensor, threads: int) -> Iterator[Tensor]:
    """fp32 logits ``[length, vocabulary]`` of each window, from llama.cpp's library."""
    length = ids.shape[1]
    with tempfile.NamedTemporaryFile(suffix=".ids") as file, tempfile.TemporaryFile() as errors:
        file.write(ids.numpy().astype("<i4").tobytes())
        file.flush()
        command = [str(tool), str(gguf), file.name, str(length), str(threads)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
            assert process.stdout is not None
            try:
                vocabulary = int.from_bytes(process.stdout.read(4), "little")
                for _ in ids:
                    data = process.stdout.read(4 * length * vocabulary)
                    if not data or len(data) != 4 * length * vocabulary:
                        errors.seek(0)
                        raise SystemExit(f"{gguf}: {errors.read().decode(errors='replace')}")
                    yield torch.frombuffer(bytearray(data), dtype=torch.float32).view(length, -1)
            finally:
                process.kill()


def compare(reference: Iterable[Tensor], logits: Iterable[Tensor]) -> Distance:
    """Distance of some logits from others, both ``[length, vocabulary]`` window by window."""
    by_window, agree, positions = [], 0, 0
    for p, q in zip(reference, logits, strict=True):
        if p.shape != q.shape:
            raise SystemExit(f"logits {list(q.shape)} beside the original's {list(p.shape)}")
        if not torch.isfinite(q).all():
            raise SystemExit("the logits hold NaN or infinity")
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        by_window.append((log_p.exp() * (log_p - log_q)).sum(-1).double())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        positions += len(p)
    kl = torch.stack(by_window)
    means = kl.mean(1)
    error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else None
    return Distance(float(kl.mean()), error, float(kl.flatten().quantile(0.99)), agree / positions)
