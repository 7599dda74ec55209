"""Another type for the keys and values that a model keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quantkit.errors import UsageError
from quantkit.ops.page_store import KV_DTYPES

if TYPE_CHECKING:
    from quantkit.models.runtime import Runtime


def with_kv_dtype(runtime: Runtime, dtype: str) -> Runtime:
    """The same model, whose caches hold that type; its fingerprint says so.

    Args:
        runtime: the model.
        dtype: a key of `quantkit.ops.page_store.KV_DTYPES`, or ``auto`` for what the model has: its
            own type, or the one that its cache was calibrated for.

    Raises:
        UsageError: there is no such type, or it is fp32 and the products are of bf16 words, or
            transformers' modules run the model: they store what they compute.
    """
    if dtype == "auto":
        return runtime
    if dtype not in KV_DTYPES:
        raise UsageError(f"kv_cache_dtype {dtype!r} is not auto, {', '.join(KV_DTYPES)}")
    if runtime.decoder is None:
        raise UsageError(
            f"kv_cache_dtype {dtype} needs the native decoder, which does not run this model: "
            f"{runtime.fallback or 'it was not asked for'}",
            remedy="use auto",
        )
    if dtype == "fp32" and runtime.decoder.native.precision != "fp32":
        raise UsageError(
            f"kv_cache_dtype fp32 is for a model that computes in fp32: {runtime.name} does not",
            remedy="use auto, bf16, int8 or fp8",
        )
    kernels = f"{runtime.fingerprint['kernels']}+kv-{dtype}"
    return replace(
        runtime,
        decoder=runtime.decoder.with_kv_dtype(dtype),
        fingerprint={**runtime.fingerprint, "kernels": kernels},
    )
