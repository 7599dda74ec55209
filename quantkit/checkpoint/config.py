"""Our specs ↔ compressed-tensors' own config models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.utils.match import match_name

from quantkit.errors import QuantkitError, UsageError
from quantkit.recipe import KV_CACHES
from quantkit.schemes import SCHEMES, DType, Granularity, QuantSpec, ScaleFormat, Scheme

_SCALE_DTYPES = {
    ScaleFormat.MODEL: None,
    ScaleFormat.E8M0: torch.uint8,
    ScaleFormat.E4M3: torch.float8_e4m3fn,
}


def to_args(spec: QuantSpec) -> QuantizationArgs:
    """A spec as compressed-tensors spells it."""
    strategy = str(spec.granularity)
    if spec.scale is ScaleFormat.E4M3:
        strategy = "tensor_group"
    return QuantizationArgs(
        num_bits=spec.bits,
        type=str(spec.dtype),
        symmetric=spec.symmetric,
        strategy=strategy,
        group_size=spec.group_size,
        block_structure=list(spec.block) if spec.block else None,
        dynamic=spec.dynamic,
        scale_dtype=_SCALE_DTYPES[spec.scale],
    )


def from_args(args: QuantizationArgs) -> QuantSpec:
    """The inverse of `to_args`.

    Raises:
        UsageError: a format that quantkit does not know (such as 6-bit floats).
    """
    scale = ScaleFormat.MODEL
    if args.type == "float" and args.num_bits == 4:
        scale = ScaleFormat.E8M0 if args.group_size == 32 else ScaleFormat.E4M3
    strategy = "group" if args.strategy == "tensor_group" else str(args.strategy)
    try:
        granularity = Granularity(strategy)
    except ValueError:
        raise UsageError(f"strategy {strategy!r}: not one that quantkit runs") from None
    return QuantSpec(
        bits=args.num_bits,
        dtype=DType(str(args.type)),
        granularity=granularity,
        group_size=args.group_size if granularity is Granularity.GROUP else None,
        block=tuple(args.block_structure) if args.block_structure else None,
        symmetric=args.symmetric,
        dynamic=bool(args.dynamic),
        scale=scale,
    )


def format_name(scheme: Scheme) -> str:
    """The storage format of a scheme's linear layers."""
    weight = scheme.weight
    if weight.scale is ScaleFormat.E8M0:
        return "mxfp4-pack-quantized"
    if weight.scale is ScaleFormat.E4M3:
        return "nvfp4-pack-quantized"
    if weight.dtype is DType.FLOAT:
        return "float-quantized"
    if scheme.input is not None and weight.bits == 8:
        return "int-quantized"
    return "pack-quantized"


def build_config(
    layers: Mapping[str, Scheme], linears: Sequence[str], kv: QuantSpec | None = None
) -> dict[str, Any]:
    """``quantization_config`` for config.json.

    Args:
        layers: every quantized layer's name and scheme.
        linears: the names of every linear layer of the model; those that are not quantized
            are listed in ``ignore``.
        kv: spec of the KV cache.
    """
    distinct: dict[tuple[QuantSpec, QuantSpec | None], list[str]] = {}
    for name, scheme in layers.items():
        distinct.setdefault((scheme.weight, scheme.input), []).append(name)
    groups = {}
    formats = set()
    for i, ((weight, inputs), names) in enumerate(distinct.items()):
        fmt = format_name(Scheme("", weight, inputs))
        formats.add(fmt)
        groups[f"group_{i}"] = QuantizationScheme(
            targets=["Linear"] if len(distinct) == 1 else names,
            weights=to_args(weight),
            input_activations=to_args(inputs) if inputs else None,
            format=fmt,
        )
    config = QuantizationConfig(
        config_groups=groups,
        quant_method="compressed-tensors",
        kv_cache_scheme=to_args(kv) if kv else None,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[name for name in linears if name not in layers],
    )
    return config.to_dict()


def read_config(raw: Mapping[str, Any], linears: Sequence[str]) -> dict[str, Scheme]:
    """Which linear layers a checkpoint holds quantized, and how.

    Args:
        raw: config.json's ``quantization_config``.
        linears: the names of the model's linear layers.

    Raises:
        UsageError: another quantization method, or a format that quantkit does not run.
        QuantkitError: a group is labelled with another format than its numbers are stored in.
    """
    if raw.get("quant_method") != "compressed-tensors":
        raise UsageError(
            f"quant_method {raw.get('quant_method')!r}: quantkit reads compressed-tensors "
            "checkpoints"
        )
    try:
        config = QuantizationConfig(**{k: v for k, v in raw.items() if v is not None})
    except Exception as e:  # pydantic's own error types vary with its version
        raise UsageError(f"quantization_config cannot be read: {e}") from e
    ignored = config.ignore or []
    schemes: dict[str, Scheme] = {}
    for group in config.config_groups.values():
        assert isinstance(group, QuantizationScheme)
        if group.weights is None:
            continue
        weight = from_args(group.weights)
        inputs = from_args(group.input_activations) if group.input_activations else None
        scheme = _named(weight, inputs)
        label = group.format or raw.get("format")
        _check_label(str(getattr(label, "value", label)), scheme)
        for name in linears:
            if any(match_name(name, pattern) for pattern in ignored):
                continue
            if any(t == "Linear" or match_name(name, t) for t in group.targets):
                schemes.setdefault(name, scheme)
    return schemes


def _check_label(label: str, scheme: Scheme) -> None:
    """An engine picks its reader by the label: under a wrong one it reads other weights."""
    expected = format_name(scheme)
    labels = {expected, "mixed-precision"}
    if scheme.weight.bits == 8:
        labels.add("naive-quantized")  # older exports of the same tensors
    if label not in labels:
        raise QuantkitError(
            f"config.json: format {label!r} for {scheme.name}, which is stored as {expected}",
            remedy="the checkpoint is mislabelled: export it again",
        )


def read_cache_spec(raw: Mapping[str, Any]) -> QuantSpec | None:
    """How a checkpoint's keys and values are quantized, or None.

    Args:
        raw: config.json's ``quantization_config``.

    Raises:
        UsageError: a format that quantkit does not run.
    """
    if not raw.get("kv_cache_scheme"):
        return None
    given = {k: v for k, v in raw["kv_cache_scheme"].items() if v is not None}
    spec = from_args(QuantizationArgs(**given))
    if spec not in KV_CACHES.values():
        raise UsageError(
            f"kv_cache_scheme {spec.label()!r}: not one that quantkit runs",
            remedy=f"known: {', '.join(x.label() for x in KV_CACHES.values())}",
        )
    return spec


def _named(weight: QuantSpec, inputs: QuantSpec | None) -> Scheme:
    for scheme in SCHEMES.values():
        if (scheme.weight, scheme.input) == (weight, inputs):
            return scheme
    label = weight.label() + (f" x {inputs.label()}" if inputs else "")
    return Scheme(label.replace(" ", "-"), weight, inputs)
