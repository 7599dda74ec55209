"""Which schemes an engine runs, as far as its source says: the one table of refusals.

Read from vLLM 0.32 (``model_executor/layers/quantization/compressed_tensors`` and
``model_executor/kernels/linear``), and checked by ``benchmarks/interop.py``. A scheme that no row
names is left to the engine, whose log then tells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantkit.engines.artifact import Artifact
from quantkit.errors import UsageError
from quantkit.schemes import DType, Granularity, QuantSpec, ScaleFormat, Scheme

#: Instruction sets that vLLM's block FP8 kernel for CPUs needs, as /proc/cpuinfo names them.
AMX = "amx_tile"


@dataclass(frozen=True)
class Host:
    """What an engine computes on: ``cpu`` or ``cuda``, and a CPU's features."""

    device: str
    features: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Refusal:
    """Schemes that an engine does not run, and why."""

    applies: Callable[[Scheme, Host], bool]
    reason: str


def _packed(scheme: Scheme) -> bool:
    """Integers in the pack-quantized format, activations left as they are."""
    return scheme.weight.dtype is DType.INT and scheme.input is None


VLLM_REFUSES: tuple[Refusal, ...] = (
    Refusal(
        lambda s, host: _packed(s) and host.device == "cpu" and s.weight.bits != 4,
        "on a CPU its weight-only kernel takes 4-bit integers",
    ),
    Refusal(
        lambda s, host: s.weight.scale is not ScaleFormat.MODEL and host.device == "cpu",
        "its NVFP4 and MXFP4 kernels are for GPUs",
    ),
    Refusal(
        lambda s, host: (
            s.weight.granularity is Granularity.BLOCK
            and host.device == "cpu"
            and AMX not in host.features
        ),
        "on a CPU its block FP8 kernel needs AMX (Sapphire Rapids or newer)",
    ),
    Refusal(
        lambda s, host: (
            s.input is not None
            and s.input.dtype is DType.FLOAT
            and not s.input.dynamic
            and host.device == "cpu"
        ),
        "on a CPU it cannot round activations to FP8 by a calibrated scale",
    ),
    Refusal(
        lambda s, host: s.input is not None and s.weight.dtype is not s.input.dtype,
        "it has no kernel for this pair of weight and activation types",
    ),
    Refusal(
        lambda s, host: s.input is not None and not s.weight.symmetric,
        "its kernels for quantized activations take symmetric weights",
    ),
)


def why_not(scheme: Scheme, host: Host) -> str | None:
    """Why vLLM does not run a scheme on a machine, or None."""
    return next((row.reason for row in VLLM_REFUSES if row.applies(scheme, host)), None)


def why_not_cache(kv: QuantSpec | None) -> str | None:
    """Why vLLM does not run a calibrated cache, or None."""
    if kv is not None and kv.dtype is not DType.FLOAT:
        return "it reads calibrated scales of 8-bit float caches only"
    return None


def check(artifact: Artifact, host: Host) -> None:
    """Refuse what vLLM is known not to run.

    Raises:
        UsageError: names the scheme, or the rotation, and the reason.
    """
    if artifact.rotated:
        raise UsageError(
            f"{artifact.folder}: vLLM does not run rotated inputs (rotate's `mlp`): it knows no "
            "such format",
            remedy="serve it with quantkit, or calibrate with `mlp: false`",
        )
    found = [(scheme.name, why_not(scheme, host)) for scheme in artifact.schemes]
    if artifact.kv is not None:
        found.append((f"kv_cache {artifact.kv.label()}", why_not_cache(artifact.kv)))
    for name, reason in found:
        if reason is not None:
            raise UsageError(
                f"{artifact.folder}: vLLM does not run {name} on {host.device}: {reason}",
                remedy="serve it with quantkit, or see docs/interop.md for schemes that it runs",
            )
