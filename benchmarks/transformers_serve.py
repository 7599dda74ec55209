"""`transformers serve` as a peer: started so that an answer's length can be asked for."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from quantkit.engines.process import EngineProcess, free_port, start
from quantkit.loadtest.ask import Ask

#: Of its two ways to run requests: one after the other, and together.
ARGUMENTS = {"one by one": (), "continuous batching": ("--continuous-batching",)}

_VERSION = "from importlib.metadata import version; print('transformers', version('transformers'))"


class Tokenizer(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...
    def encode(self, text: str) -> list[int]: ...


def survives(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether a prompt that is sent as text is read as the same tokens."""
    return list(tokenizer.encode(tokenizer.decode(ids))) == list(ids)


def body_of(tokenizer: Tokenizer) -> Callable[[Ask, str], dict[str, Any]]:
    """What asks it for a completion: it takes prompts as text, and refuses fields it does not
    know. Lengths are as asked because its model has no end of text; see `endless`."""

    def body(ask: Ask, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": tokenizer.decode(ask.prompt_ids),
            "max_tokens": ask.output_tokens,
            "temperature": 0,
            "stream": True,
        }

    return body


@contextlib.contextmanager
def endless(model: Path) -> Iterator[Path]:
    """The same model without an end of text: links to its files, two configs without the token."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / model.name
        folder.mkdir()
        for file in model.resolve().iterdir():
            (folder / file.name).symlink_to(file)
        for name in ("config.json", "generation_config.json"):
            if (folder / name).exists():
                document = json.loads((folder / name).read_text())
                (folder / name).unlink()
                (folder / name).write_text(json.dumps(document | {"eos_token_id": None}))
        yield folder


@contextlib.contextmanager
def start_transformers(
    python: str, model: Path, arguments: Sequence[str], threads: int, seconds: float
) -> Iterator[tuple[EngineProcess, str]]:
    """The server, ready, on the CPU, and the name that it knows the model by.

    Args:
        python: of an environment with ``transformers[serving]``.
        model: folder of the original.
        arguments: more of its options.
        threads: of torch.
        seconds: until it must be ready.
    """
    port = free_port()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    with endless(model) as folder:
        command = [
            python, "-m", "transformers.cli.transformers", "serve", str(folder),
            "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", *arguments,
        ]  # fmt: skip
        with start(command, f"http://127.0.0.1:{port}", environment=environment) as process:
            process.wait_ready(seconds)
            yield process, str(folder)


def version(python: str) -> str:
    """What that environment has."""
    done = subprocess.run([python, "-c", _VERSION], capture_output=True, text=True, check=True)
    return done.stdout.strip()
