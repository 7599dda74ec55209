"""Servers that `vs_servers` measures, started: llama-server and vLLM."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.vllm_configs import Config
from quantkit.engines.artifact import Artifact
from quantkit.engines.process import EngineProcess, free_port, start
from quantkit.engines.vllm import VllmOptions, find_vllm
from quantkit.engines.vllm import running as running_vllm

READY_SECONDS = 900.0


def schemes_of(artifact: Artifact) -> str:
    """Names of its schemes, or the dtype of an original."""
    return ", ".join(scheme.name for scheme in artifact.schemes) or artifact.dtype or ""


def llama_version(server: Path) -> str:
    """What ``llama-server --version`` says: its number, commit and compiler."""
    command = [str(server), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return " ".join((done.stdout + done.stderr).split())


@contextlib.contextmanager
def start_llama(
    args: argparse.Namespace, cached: bool, slots: int, context: int
) -> Iterator[EngineProcess]:
    port = free_port()
    command = [
        str(args.llama_server), "-m", str(args.gguf), "--port", str(port), "--host", "127.0.0.1",
        "-t", str(args.threads), "-tb", str(args.threads), "-np", str(slots),
        # Its slots share the context out; a page more for what it keeps to itself.
        "-c", str(slots * (context + 64)), "--no-webui",
        "--cache-prompt" if cached else "--no-cache-prompt",
    ]  # fmt: skip
    with start(command, f"http://127.0.0.1:{port}") as process:
        process.wait_ready(READY_SECONDS)
        yield process


@contextlib.contextmanager
def start_vllm(
    args: argparse.Namespace, artifact: Artifact, cached: bool, slots: int, way: Config
) -> Iterator[EngineProcess]:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(args.vllm_cache_gb),
        "OMP_NUM_THREADS": str(args.threads),
        **way.environment,
    }
    flag = "--enable-prefix-caching" if cached else "--no-enable-prefix-caching"
    options = VllmOptions(max_sequences=slots, arguments=(flag, *args.vllm_arg, *way.arguments))
    with running_vllm(
        find_vllm(args.vllm_python),
        artifact,
        options,
        environment=environment,
        timeout=READY_SECONDS,
        refuse=False,
    ) as process:
        yield process
