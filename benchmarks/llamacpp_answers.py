"""What llama.cpp makes of prompts, on our export of a checkpoint; llamacpp_answers.cpp asks it."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path

from benchmarks.llamacpp_build import compile_tool
from quantkit.errors import QuantkitError
from quantkit.models.tokenizer import load_tokenizer


def llamacpp_answers(
    checkpoint: Path, build: Path, prompts: Sequence[str], new: int
) -> tuple[list[float], list[str]]:
    """Log-probability of each prompt's tokens but the first, nats a token, and greedy texts.

    Args:
        checkpoint: ours; the export and the tool go beside it.
        build: folder of llama.cpp, its library built.
        prompts: two tokens each at least.
        new: tokens of a continuation at most.

    Raises:
        QuantkitError: the export refuses the checkpoint, or the library fails on it.
    """
    folder = checkpoint.parent
    gguf = folder / f"{checkpoint.name}.gguf"
    export = [
        sys.executable, "-m", "quantkit.cli.main", "export", str(checkpoint), "--format", "gguf",
        "-o", str(gguf),
    ]  # fmt: skip
    ask(export)
    tokenizer = load_tokenizer(str(checkpoint))[0]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    packed = folder / "prompts"
    packed.write_bytes(b"".join(array("i", [len(t), *t]).tobytes() for t in ids))
    tool = compile_tool("llamacpp_answers", build, folder)
    stop, threads = str(tokenizer.eos_token_id), str(os.cpu_count())
    said = ask([str(tool), str(gguf), str(packed), str(new), stop, threads])
    lines = [line.split() for line in said.splitlines()]
    texts = [tokenizer.decode([int(i) for i in written]) for _, *written in lines]
    return [float(line[0]) for line in lines], texts


def ask(command: Sequence[str]) -> str:
    """What a program prints. QuantkitError with what it says of its failure."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise QuantkitError(refusal(done.stderr))
    return done.stdout


def refusal(text: str) -> str:
    """What a program says of an error, in one line."""
    return " ".join(text.rpartition("error: ")[2].split()) or "no message"
