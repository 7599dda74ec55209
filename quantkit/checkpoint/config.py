"""Our specs ↔ compressed-tensors' own config models."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.utils.match import match_name

from quantkit.checkpoint.fields import as_integer, as_object
from quantkit.errors import QuantkitError, UsageError
from quantkit.hadamard import base_order
from quantkit.recipe import KV_CACHES
from quantkit.schemes import SCHEMES, DType, Granularity, QuantSpec, ScaleFormat, Scheme

#: Storage formats that `quantkit.checkpoint.tensors` reads.
FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
)

#: How integers are stored: several a word, or one a byte.
_PACKED = "pack-quantized"
_BYTES = ("int-quantized", "naive-quantized")

#: In front of every format of a checkpoint in which inputs are rotated at inference: a label that
#: no other program knows, so that none runs the layers without.
ROTATED = "rotated-"

#: Beside it: which inputs, and by what. As a key of every group's weights it keeps out those who
#: never look at the format (vLLM at 4-bit floats): compressed-tensors takes no unknown one there.
ROTATED_INPUTS = "rotated_inputs"

#: H = S ⊗ B over √order, by `quantkit.hadamard`: the one kind there is.
_MATRIX = "sylvester-paley"

#: Labels that say nothing of a layer's tensors; the last is what compressed-tensors fills in where
#: a config names no format.
_UNSPECIFIC = ("mixed-precision", "fakequant")

#: Longest side of a block: weights are padded to whole ones.
_LONGEST = 4096

#: What scales are stored as; None for the model's own dtype.
SCALE_DTYPES = {
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
        scale_dtype=SCALE_DTYPES[spec.scale],
    )


def from_args(args: QuantizationArgs) -> QuantSpec:
    """The inverse of `to_args`.

    Raises:
        UsageError: a format that quantkit does not know (such as 6-bit floats).
    """
    if args.type == "float" and args.num_bits == 8 and args.scale_dtype == torch.uint8:
        raise UsageError(
            "MXFP8 (8-bit floats under E8M0 scales): not a format that quantkit runs",
            remedy="fp8 and fp8-block are",
        )
    block = args.block_structure
    if block is not None and (len(block) != 2 or not all(1 <= n <= _LONGEST for n in block)):
        raise UsageError(f"block_structure {block}: is not rows and columns of 1 to {_LONGEST}")
    scale = ScaleFormat.MODEL
    if args.type == "float" and args.num_bits == 4:
        scale = ScaleFormat.E8M0 if args.group_size == 32 else ScaleFormat.E4M3
    # What the library fills in itself is an enum, what a config says is a string.
    strategy, kind = (getattr(x, "value", x) for x in (args.strategy, args.type))
    if strategy == "tensor_group":
        strategy = "group"
    try:
        granularity = Granularity(strategy)
    except ValueError:
        raise UsageError(f"strategy {strategy!r}: not one that quantkit runs") from None
    return QuantSpec(
        bits=args.num_bits,
        dtype=DType(kind),
        granularity=granularity,
        group_size=args.group_size if granularity is Granularity.GROUP else None,
        block=None if block is None else (block[0], block[1]),
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
    layers: Mapping[str, Scheme],
    linears: Sequence[str],
    kv: QuantSpec | None = None,
    on_disk: Callable[[str], str] = str,
    hadamards: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """``quantization_config`` for config.json.

    Layers are named as in memory, which transformers looks for, and as on disk where that is
    another name, which vLLM looks for.

    Args:
        layers: every quantized layer's name and scheme.
        linears: the names of every linear layer of the model, routers included; those that are
            not quantized are listed in ``ignore``.
        kv: spec of the KV cache.
        on_disk: a module's name on disk by its name in memory.
        hadamards: order of the Hadamard matrix that multiplies a layer's input, by the names in
            memory of the layers that have one.
    """
    distinct: dict[tuple[QuantSpec, QuantSpec | None], list[str]] = {}
    # transformers gives fused experts the scheme of the first group that names layers.
    for name in sorted(layers, key=lambda name: ".experts." not in name):
        scheme = layers[name]
        distinct.setdefault((scheme.weight, scheme.input), []).append(name)

    def both(names: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(x for name in names for x in (name, on_disk(name))))

    groups = {}
    formats = set()
    for i, ((weight, inputs), names) in enumerate(distinct.items()):
        fmt = format_name(Scheme("", weight, inputs))
        formats.add(fmt)
        groups[f"group_{i}"] = QuantizationScheme(
            targets=["Linear"] if len(distinct) == 1 else both(names),
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
        ignore=both([name for name in linears if name not in layers]),
    )
    found: dict[str, Any] = config.to_dict()
    if hadamards:
        for labelled in (found, *found["config_groups"].values()):
            labelled["format"] = ROTATED + getattr(labelled["format"], "value", labelled["format"])
        for group in found["config_groups"].values():
            group["weights"][ROTATED_INPUTS] = True
        found[ROTATED_INPUTS] = {"matrix": _MATRIX, "orders": dict(hadamards)}
    return found


def read_config(
    raw: Mapping[str, Any], linears: Sequence[str], stored: Collection[str]
) -> dict[str, Scheme]:
    """Which linear layers a checkpoint holds quantized, and how.

    Args:
        raw: config.json's ``quantization_config``.
        linears: the names of the model's linear layers.
        stored: the names of the checkpoint's tensors.

    Raises:
        UsageError: a format that quantkit does not run, or a config that cannot be read.
        QuantkitError: a group is labelled with another format than its numbers are stored in.
    """
    config = _parse(raw)
    # Of two groups with the same target the last counts, as in compressed-tensors.
    by_target = {
        target: (label, scheme) for label, scheme, targets in _groups(config) for target in targets
    }
    ignored, wanted = _fitting(config.ignore or ()), _fitting(by_target)
    found: dict[str, tuple[str, Scheme]] = {}
    for name in linears:
        target = None if ignored(name) else wanted(name)
        if target is not None:
            found[name] = by_target[target]
    for name, (label, scheme) in found.items():
        _check_stored(label, scheme, name, stored)
    for name in read_hadamards(raw):
        if name not in found:
            raise QuantkitError(
                f"{ROTATED_INPUTS}: {name} is no quantized layer of the model",
                remedy="the config is of another checkpoint, or was edited; copy it again",
            )
    return {name: scheme for name, (_, scheme) in found.items()}


def read_hadamards(raw: Mapping[str, Any]) -> dict[str, int]:
    """The order of the Hadamard matrix that multiplies a layer's input, for those that have one.

    Args:
        raw: config.json's ``quantization_config``.

    Raises:
        UsageError: another matrix, an order that is not built, or labels that do not agree.
    """
    labels = _labels(raw)
    given = raw.get(ROTATED_INPUTS)
    marked = [label.startswith(ROTATED) for label in labels]
    if any(marked) if given is None else not (marked and all(marked)):
        raise UsageError(
            f"quantization_config: formats {sorted(set(labels))} "
            f"{'without' if given is None else 'with'} {ROTATED_INPUTS}",
            remedy=f"all begin with {ROTATED!r} where inputs are rotated, and none elsewhere",
        )
    if given is None:
        return {}
    found = as_object(given, ROTATED_INPUTS)
    if found.get("matrix") != _MATRIX or set(found) != {"matrix", "orders"}:
        raise UsageError(
            f"{ROTATED_INPUTS}: {found.get('matrix')!r} with {sorted(found)}: quantkit multiplies "
            f"by {_MATRIX!r}, with orders",
            remedy="a newer quantkit may read it",
        )
    listed = as_object(found["orders"], f"{ROTATED_INPUTS}: orders")
    orders = {name: as_integer(n, f"{ROTATED_INPUTS}: {name}") for name, n in listed.items()}
    for name, order in orders.items():
        if order < 2 or base_order(order) is None:
            raise UsageError(f"{ROTATED_INPUTS}: {name}: no Hadamard matrix of order {order}")
    if not orders:
        raise UsageError(f"{ROTATED_INPUTS}: names no layer")
    return orders


def _labels(raw: Mapping[str, Any]) -> list[str]:
    """Every format that a config names, of the whole and of its groups."""
    groups = as_object(raw.get("config_groups") or {}, "config_groups")
    named = [raw.get("format"), *(g.get("format") for g in groups.values() if isinstance(g, dict))]
    return [str(label) for label in named if label is not None]


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config as compressed-tensors knows it, with the formats in which codes are stored."""
    found = _unmarked(raw)
    if isinstance(found.get("config_groups"), dict):
        found["config_groups"] = {
            name: _plain_group(group) if isinstance(group, dict) else group
            for name, group in found["config_groups"].items()
        }
    return found


def _plain_group(group: Mapping[str, Any]) -> dict[str, Any]:
    found = _unmarked(group)
    if isinstance(found.get("weights"), dict):
        found["weights"] = _unmarked(found["weights"])
    return found


def _unmarked(part: Mapping[str, Any]) -> dict[str, Any]:
    """Without what says that inputs are rotated."""
    found = {key: value for key, value in part.items() if key != ROTATED_INPUTS}
    if isinstance(found.get("format"), str):
        found["format"] = found["format"].removeprefix(ROTATED)
    return found


def _fitting(targets: Iterable[str]) -> Callable[[str], str | None]:
    """Which target counts for a linear layer, by its name: the name before a pattern, a pattern
    before the class, and of several patterns the first in the order of their letters. Source:
    compressed-tensors, ``utils/match.py`` (match_targets)."""
    known = frozenset(targets)
    patterns = sorted(target for target in known if target.startswith("re:"))

    def fit(name: str) -> str | None:
        if name in known:
            return name
        found = next((pattern for pattern in patterns if _matches(name, pattern)), None)
        return "Linear" if found is None and "Linear" in known else found

    return fit


def _matches(name: str, pattern: str) -> bool:
    try:
        return bool(match_name(name, pattern))
    except re.error as e:
        raise UsageError(f"quantization_config: {pattern!r} is no regular expression ({e})") from e


def read_schemes(raw: Mapping[str, Any]) -> list[Scheme]:
    """The distinct schemes of a checkpoint, whichever layers have them.

    Args:
        raw: config.json's ``quantization_config``.

    Raises:
        UsageError: see `read_config`.
    """
    return list(dict.fromkeys(scheme for _, scheme, _ in _groups(_parse(raw))))


def _parse(raw: Mapping[str, Any]) -> QuantizationConfig:
    _check_readable(raw)
    try:
        return QuantizationConfig(**{k: v for k, v in _plain(raw).items() if v is not None})
    except Exception as e:  # pydantic's own error types vary with its version
        raise UsageError(f"quantization_config cannot be read: {e}") from e


def _groups(config: QuantizationConfig) -> Iterator[tuple[str, Scheme, list[str]]]:
    """(format label, scheme, targets) of each group that quantizes weights."""
    for group in config.config_groups.values():
        assert isinstance(group, QuantizationScheme)
        if group.weights is None:
            _check_empty(group)
            continue
        weight = from_args(group.weights)
        if group.output_activations is not None:
            raise UsageError("output_activations: quantkit quantizes the inputs of layers only")
        inputs = _input_spec(group.input_activations) if group.input_activations else None
        scheme = named_scheme(weight, inputs)
        found = group.format or config.format
        label = str(getattr(found, "value", found))
        _check_label(label, scheme)
        yield label, scheme, group.targets


def _check_empty(group: QuantizationScheme) -> None:
    """Raise UsageError where a group without weights rounds what enters or leaves its modules."""
    if group.input_activations is not None or group.output_activations is not None:
        raise UsageError(
            f"config_groups: activations of {', '.join(group.targets)} without weights: quantkit "
            "quantizes inputs of linear layers whose weights are quantized, and kv_cache_scheme",
            remedy="quantize the model without quantizing attention",
        )


def _check_label(label: str, scheme: Scheme) -> None:
    """An engine picks its reader by the label: under a wrong one it reads other weights.

    Integers of any width are stored packed or one a byte, whatever their activations are; which
    of both it is, only the tensors tell (`_check_stored`).
    """
    expected = format_name(scheme)
    labels = {expected, *_UNSPECIFIC}
    if scheme.weight.bits == 8:
        labels.add("naive-quantized")  # older exports of the same tensors
    if scheme.weight.dtype is DType.INT:
        labels |= {_PACKED, *_BYTES}
    if label not in labels:
        raise _mislabelled(label, scheme, expected)


def _check_stored(label: str, scheme: Scheme, name: str, stored: Collection[str]) -> None:
    """Raise QuantkitError where a layer of integers is packed and its label says bytes, or the
    other way round. A weight without a scale is not quantized at all, which reading it tells."""
    if scheme.weight.dtype is not DType.INT or f"{name}.weight_scale" not in stored:
        return
    if label in _BYTES and f"{name}.weight_packed" in stored:
        raise _mislabelled(label, scheme, _PACKED)
    if label == _PACKED and f"{name}.weight" in stored:
        raise _mislabelled(label, scheme, _BYTES[0])


def _mislabelled(label: str, scheme: Scheme, actual: str) -> QuantkitError:
    return QuantkitError(
        f"config.json: format {label!r} for {scheme.name}, which is stored as {actual}",
        remedy="the checkpoint is mislabelled: export it again",
    )


def read_cache_spec(raw: Mapping[str, Any]) -> QuantSpec | None:
    """How a checkpoint's keys and values are quantized, or None.

    Args:
        raw: config.json's ``quantization_config``.

    Raises:
        UsageError: a format that quantkit does not run, or a scheme that cannot be read.
    """
    if not raw.get("kv_cache_scheme"):
        return None
    given = as_object(raw["kv_cache_scheme"], "kv_cache_scheme")
    try:
        args = QuantizationArgs(**{k: v for k, v in given.items() if v is not None})
    except Exception as e:  # pydantic's own error types vary with its version
        raise UsageError(f"kv_cache_scheme cannot be read: {e}") from e
    spec = from_args(args)
    if spec not in KV_CACHES.values():
        raise UsageError(
            f"kv_cache_scheme {spec.label()!r}: not one that quantkit runs",
            remedy=f"known: {', '.join(x.label() for x in KV_CACHES.values())}",
        )
    return spec


def _check_readable(raw: Mapping[str, Any]) -> None:
    """Raise UsageError for what would change a layer's output and is not in its tensors."""
    read_hadamards(raw)
    for fmt in _labels(raw):
        if fmt.removeprefix(ROTATED) not in FORMATS:
            raise UsageError(
                f"format {fmt!r}: not one that quantkit reads",
                remedy=f"known: {', '.join(FORMATS)}",
            )
    if raw.get("transform_config"):
        raise UsageError(
            "transform_config: not a form of rotations at inference that quantkit runs",
            remedy="quantkit's own `rotate` folds them into the weights, or runs them (`mlp`)",
        )
    sparsity = as_object(raw.get("sparsity_config") or {}, "sparsity_config")
    if sparsity.get("format", "dense") != "dense":
        raise UsageError(
            f"sparsity_config {sparsity['format']!r}: quantkit reads dense weights",
            remedy="save the model without sparse compression",
        )


def _input_spec(args: QuantizationArgs) -> QuantSpec:
    """The spec of a layer's input. Raises UsageError for one that no kernel rounds."""
    if args.num_bits != 8 or not args.symmetric or args.dynamic == "local":
        kind = f"{'symmetric' if args.symmetric else 'asymmetric'} {args.num_bits}-bit"
        raise UsageError(
            f"input_activations: {kind} activations are not a format that quantkit runs",
            remedy="activations are symmetric int8 or fp8",
        )
    return from_args(args)


def named_scheme(weight: QuantSpec, inputs: QuantSpec | None) -> Scheme:
    """The row of the scheme table with these specs, or a scheme named after them."""
    for scheme in SCHEMES.values():
        if (scheme.weight, scheme.input) == (weight, inputs):
            return scheme
    label = weight.label() + (f" x {inputs.label()}" if inputs else "")
    return Scheme(label.replace(" ", "-"), weight, inputs)
