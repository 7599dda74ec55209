"""Ways to start vLLM on a CPU: what its documentation names as settings that decide its speed.

A configuration is written as in a shell, variables of the child process first, flags behind them:
``VLLM_CPU_OMP_THREADS_BIND=0-1 --enforce-eager``. ``{cores}`` stands for the CPUs to compute on.
Source: docs.vllm.ai, "CPU", environment variables and performance tips, and ``vllm/envs.py``. KV
cache, slots and threads are the benchmark's; by itself vLLM compiles, and binds its threads by NUMA
node.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)

#: Name → settings.
CONFIGS: Mapping[str, str] = MappingProxyType(
    {
        "defaults": "",
        "bound": "VLLM_CPU_OMP_THREADS_BIND={cores}",
        "unbound": "VLLM_CPU_OMP_THREADS_BIND=nobind",
        "eager": "VLLM_CPU_OMP_THREADS_BIND={cores} --enforce-eager",
        "unbound-eager": "VLLM_CPU_OMP_THREADS_BIND=nobind --enforce-eager",
        "small-steps": "VLLM_CPU_OMP_THREADS_BIND={cores} --max-num-batched-tokens 512",
        "large-steps": "VLLM_CPU_OMP_THREADS_BIND={cores} --max-num-batched-tokens 4096",
        "small-pages": "VLLM_CPU_OMP_THREADS_BIND={cores} --block-size 32",
        "float-activations": "VLLM_CPU_OMP_THREADS_BIND={cores} VLLM_CPU_INT4_W4A8=0",
        "fp32": "VLLM_CPU_OMP_THREADS_BIND={cores} --dtype float32",
    }
)


@dataclass(frozen=True)
class Config:
    """Settings of one start, beside those that every start has."""

    name: str = "plain"
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


@dataclass
class Trial:
    """What a configuration reached.

    Attributes:
        config: which one.
        speeds: concurrency → output tokens a second.
        failure: why it has none.
    """

    config: Config
    speeds: dict[int, float] = field(default_factory=dict)
    failure: str | None = None

    @property
    def score(self) -> float:
        """Geometric mean of the speeds: each concurrency counts alike."""
        return math.exp(sum(map(math.log, self.speeds.values())) / len(self.speeds))


def read_config(name: str, text: str, threads: int) -> Config:
    """A configuration as written.

    Args:
        threads: for how many there must be CPUs in ``{cores}``.

    Raises:
        ValueError: what is neither a variable in front of the flags nor behind a flag.
    """
    environment: dict[str, str] = {}
    words = shlex.split(text.replace("{cores}", cores(threads)))
    while words and not words[0].startswith("-"):
        found = _VARIABLE.fullmatch(words.pop(0))
        if found is None:
            raise ValueError(f"{text!r}: variables are NAME=VALUE, flags begin with --")
        environment[found[1]] = found[2]
    return Config(name, environment, tuple(words))


def cores(threads: int) -> str:
    """The first CPUs that this process may run on: ``0-3``, or ``0,2,4``."""
    mine = sorted(os.sched_getaffinity(0))[:threads]
    if len(mine) > 1 and mine[-1] - mine[0] == len(mine) - 1:
        return f"{mine[0]}-{mine[-1]}"
    return ",".join(map(str, mine))


def best(trials: Sequence[Trial]) -> Config:
    """The fastest of those that ran.

    Raises:
        SystemExit: none did.
    """
    ran = [trial for trial in trials if trial.failure is None]
    if not ran:
        told = "\n".join(f"{trial.config.name}: {trial.failure}" for trial in trials)
        raise SystemExit(f"no configuration of vLLM ran:\n{told}")
    return max(ran, key=lambda trial: trial.score).config
