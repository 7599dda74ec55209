"""Quantization schemes: what is stored for a weight and what is done to an activation.

`SCHEMES` is the table every other part enumerates: recipes name its rows, tests walk it,
export and the kernels follow its specs. A recipe may also spell a spec out, with any number
of bits and any granularity (`parse_scheme`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from quantkit.errors import UsageError


class DType(StrEnum):
    """Number kinds: two's-complement integers, or the OCP float formats E4M3 and E2M1."""

    INT = "int"
    FLOAT = "float"


class Granularity(StrEnum):
    """What shares one scale.

    For a weight ``[N, K]`` the scale is

    - ``tensor``  ``[1]``
    - ``channel`` ``[N, 1]``
    - ``group``   ``[N, K / group_size]``
    - ``block``   ``[ceil(N / rows), ceil(K / columns)]``

    and for an activation ``[M, K]``

    - ``tensor``  ``[1]``
    - ``token``   ``[M, 1]``
    - ``group``   ``[M, K / group_size]``
    """

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    BLOCK = "block"
    TOKEN = "token"


class ScaleFormat(StrEnum):
    """How scales are stored: in the model's dtype, as E8M0 exponents (MX), or as E4M3
    under one fp32 global scale (NVFP4)."""

    MODEL = "model"
    E8M0 = "e8m0"
    E4M3 = "e4m3"


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    Attributes:
        bits: 2–8 for integers, 4 or 8 for floats.
        dtype: integer or float codes.
        granularity: what shares a scale.
        group_size: columns that share a scale, for ``group``.
        block: (rows, columns) that share a scale, for ``block``.
        symmetric: no zero point. Asymmetric zero points are integers.
        dynamic: activations only: scales are computed for each token at run time.
        scale: storage format of the scales.
        ocp_rounding: MXFP4 only: scale exponents by the OCP MX specification v1.0 §6.3,
            floor(log2(absmax)) − 2, instead of compressed-tensors' round-half-up variant,
            which raises the exponent where the largest element would saturate.
    """

    bits: int
    dtype: DType = DType.INT
    granularity: Granularity = Granularity.CHANNEL
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    dynamic: bool = False
    scale: ScaleFormat = ScaleFormat.MODEL
    ocp_rounding: bool = False

    def __post_init__(self) -> None:
        if self.dtype is DType.INT and not 2 <= self.bits <= 8:
            raise UsageError(f"int{self.bits}: integer codes have 2 to 8 bits")
        if self.dtype is DType.FLOAT and self.bits not in (4, 8):
            raise UsageError(f"float{self.bits}: float codes have 4 bits (E2M1) or 8 (E4M3)")
        if self.dtype is DType.FLOAT and not self.symmetric:
            raise UsageError(
                "asymmetric float codes are not a format", remedy="set symmetric: true"
            )
        if (self.granularity is Granularity.GROUP) != (self.group_size is not None):
            raise UsageError(
                f"granularity {self.granularity}, group_size {self.group_size}: "
                "group_size goes with granularity group, and only with it"
            )
        if self.group_size is not None and self.group_size < 1:
            raise UsageError(f"group_size {self.group_size}: must be at least 1")
        if (self.granularity is Granularity.BLOCK) != (self.block is not None):
            raise UsageError(
                f"granularity {self.granularity}, block {self.block}: "
                "block goes with granularity block, and only with it"
            )
        if self.granularity is Granularity.TOKEN and not self.dynamic:
            raise UsageError(
                "granularity token: scales per token are dynamic", remedy="dynamic: true"
            )
        if self.dtype is DType.FLOAT and self.bits == 4 and self.scale is ScaleFormat.MODEL:
            raise UsageError(
                "float4 needs a scale format", remedy="scale: e4m3 (group 16) or e8m0 (group 32)"
            )
        if not self.symmetric and self.granularity in (Granularity.TENSOR, Granularity.BLOCK):
            raise UsageError(
                f"asymmetric {self.granularity}: zero points are stored for channels and groups",
                remedy="use granularity channel or group, or symmetric: true",
            )
        if self.dynamic and self.granularity is Granularity.TENSOR:
            raise UsageError(
                "dynamic tensor: dynamic scales belong to a token or a group of it",
                remedy="granularity: token",
            )
        if self.scale is not ScaleFormat.MODEL:
            want = {ScaleFormat.E4M3: 16, ScaleFormat.E8M0: 32}[self.scale]
            if self.group_size != want or (self.dtype, self.bits) != (DType.FLOAT, 4):
                raise UsageError(
                    f"scale {self.scale} with {self.dtype}{self.bits} group {self.group_size}: "
                    f"{self.scale} scales belong to float4 codes in groups of {want}"
                )

    @property
    def qmin(self) -> float:
        if self.dtype is DType.INT:
            return float(-(2 ** (self.bits - 1)))
        return -6.0 if self.bits == 4 else -448.0

    @property
    def qmax(self) -> float:
        if self.dtype is DType.INT:
            return float(2 ** (self.bits - 1) - 1)
        return 6.0 if self.bits == 4 else 448.0

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the scales of a weight of this shape ``(N, K)``.

        Raises:
            UsageError: the group does not divide K; names groups that do.
        """
        n, k = shape
        if self.granularity is Granularity.TENSOR:
            return (1,)
        if self.granularity is Granularity.CHANNEL:
            return (n, 1)
        if self.granularity is Granularity.GROUP:
            assert self.group_size is not None
            if k % self.group_size:
                fits = [g for g in (16, 32, 64, 96, 128, 192, 256) if k % g == 0]
                hint = " or ".join(str(g) for g in fits) if fits else "granularity channel"
                raise UsageError(
                    f"in_features {k} is not divisible by group {self.group_size}",
                    remedy=f"try {hint}",
                )
            return (n, k // self.group_size)
        if self.granularity is Granularity.BLOCK:
            assert self.block is not None
            return (math.ceil(n / self.block[0]), math.ceil(k / self.block[1]))
        raise UsageError(f"granularity {self.granularity} does not apply to weights")

    def stored_bits(self, shape: tuple[int, int], model_dtype_bits: int = 16) -> int:
        """Bits that a weight of this shape takes on disk: codes, scales and zero points.

        Rows of sub-byte integer codes are padded to whole 32-bit words, as the
        pack-quantized format stores them.
        """
        n, k = shape
        scales = math.prod(self.scale_shape(shape))
        packed = self.dtype is DType.INT and self.bits < 8
        codes = n * math.ceil(k * self.bits / 32) * 32 if packed else n * k * self.bits
        if self.scale is ScaleFormat.MODEL:
            bits = codes + scales * model_dtype_bits
        else:
            bits = codes + scales * 8 + (32 if self.scale is ScaleFormat.E4M3 else 0)
        if not self.symmetric:
            columns = self.scale_shape(shape)[-1]
            bits += math.ceil(n * self.bits / 32) * 32 * columns
        return bits

    def label(self) -> str:
        """Short name such as ``int4 sym g64`` or ``fp8 token dynamic``."""
        kind = f"int{self.bits}" if self.dtype is DType.INT else f"fp{self.bits}"
        where = f"g{self.group_size}" if self.group_size else str(self.granularity)
        if self.block:
            where = f"block {self.block[0]}x{self.block[1]}"
        parts = [kind, where]
        if self.dtype is DType.INT:
            parts.insert(1, "sym" if self.symmetric else "asym")
        if self.dynamic:
            parts.append("dynamic")
        if self.scale is not ScaleFormat.MODEL:
            parts.append(str(self.scale))
        return " ".join(parts)


@dataclass(frozen=True)
class Scheme:
    """A weight spec with, where activations are quantized too, an input spec.

    ``kv`` is the spec of the KV cache, set by the recipe for the whole model.
    """

    name: str
    weight: QuantSpec
    input: QuantSpec | None = None
    kv: QuantSpec | None = None

    @property
    def needs_static_input(self) -> bool:
        return self.input is not None and not self.input.dynamic

    def describe(self) -> str:
        acts = self.input.label() if self.input else "16-bit activations"
        return f"{self.weight.label()} × {acts}"


_INT8_CHANNEL = QuantSpec(8)
_FP8 = QuantSpec(8, DType.FLOAT)


def _int(bits: int, group: int | None, symmetric: bool = True) -> QuantSpec:
    where = Granularity.CHANNEL if group is None else Granularity.GROUP
    return QuantSpec(bits, granularity=where, group_size=group, symmetric=symmetric)


def _weight_only(bits: int, group: int | None, symmetric: bool = True) -> Scheme:
    name = f"w{bits}a16{'' if symmetric else '-asym'}-{f'g{group}' if group else 'channel'}"
    return Scheme(name, _int(bits, group, symmetric))


_TOKEN_INT8 = QuantSpec(8, granularity=Granularity.TOKEN, dynamic=True)
_TOKEN_FP8 = QuantSpec(8, DType.FLOAT, Granularity.TOKEN, dynamic=True)
_ROWS: tuple[Scheme, ...] = (
    Scheme("w8a16", _INT8_CHANNEL),
    _weight_only(8, 32),
    _weight_only(8, 128),
    Scheme("w8a8", _INT8_CHANNEL, _TOKEN_INT8),
    Scheme("w8a8-static", _INT8_CHANNEL, QuantSpec(8, granularity=Granularity.TENSOR)),
    Scheme("fp8", _FP8, _TOKEN_FP8),
    Scheme(
        "fp8-static",
        replace(_FP8, granularity=Granularity.TENSOR),
        QuantSpec(8, DType.FLOAT, Granularity.TENSOR),
    ),
    Scheme(
        "fp8-block",
        replace(_FP8, granularity=Granularity.BLOCK, block=(128, 128)),
        QuantSpec(8, DType.FLOAT, Granularity.GROUP, group_size=128, dynamic=True),
    ),
    *(_weight_only(4, g, sym) for sym in (True, False) for g in (32, 64, 96, 128, None)),
    *(_weight_only(3, g, sym) for sym in (True, False) for g in (32, 64, 96, 128, None)),
    # No row for channels of two bits: beside their largest weights most would be zero.
    *(_weight_only(2, g, sym) for sym in (True, False) for g in (32, 64, 128)),
    Scheme(
        "nvfp4a16",
        QuantSpec(4, DType.FLOAT, Granularity.GROUP, group_size=16, scale=ScaleFormat.E4M3),
    ),
    Scheme(
        "mxfp4a16",
        QuantSpec(4, DType.FLOAT, Granularity.GROUP, group_size=32, scale=ScaleFormat.E8M0),
    ),
)

#: Every named scheme. To add one, add a row to ``_ROWS``.
SCHEMES: dict[str, Scheme] = {s.name: s for s in _ROWS}


def parse_scheme(value: str | Mapping[str, Any]) -> Scheme:
    """A scheme by name, or spelled out.

    The generic form is ``{weight: {bits: 5, group_size: 64, symmetric: false},
    input: {bits: 8, granularity: token, dynamic: true}}``.

    Raises:
        UsageError: unknown name (with the nearest one), unknown key, or values that do not
            go together.
    """
    import difflib

    if isinstance(value, str):
        if value in SCHEMES:
            return SCHEMES[value]
        near = difflib.get_close_matches(value, SCHEMES, n=1)
        raise UsageError(
            f"unknown scheme {value!r}",
            remedy=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SCHEMES)}",
        )
    unknown = set(value) - {"weight", "input"}
    if unknown or "weight" not in value:
        raise UsageError(
            f"scheme {dict(value)!r}: a spelled-out scheme has the keys weight and, optionally, "
            "input"
        )
    weight = _parse_spec(value["weight"], activation=False)
    inputs = _parse_spec(value["input"], activation=True) if "input" in value else None
    return Scheme(_generic_name(weight, inputs), weight, inputs)


def _parse_spec(raw: Any, *, activation: bool) -> QuantSpec:
    keys = (
        "bits", "dtype", "granularity", "group_size", "block", "symmetric", "dynamic", "scale",
        "ocp_rounding",
    )  # fmt: skip
    if not isinstance(raw, Mapping) or "bits" not in raw:
        raise UsageError(f"spec {raw!r}: a spec is a mapping with at least `bits`")
    for key in raw:
        if key not in keys:
            raise UsageError(f"unknown key {key!r} in a spec", remedy=f"known: {', '.join(keys)}")
    args = dict(raw)
    for key, kind in (("bits", int), ("group_size", int)):
        if key in args and (not isinstance(args[key], kind) or isinstance(args[key], bool)):
            raise UsageError(f"{key}: {args[key]!r} is not a whole number")
    for key in ("symmetric", "dynamic", "ocp_rounding"):
        if key in args and not isinstance(args[key], bool):
            raise UsageError(f"{key}: {args[key]!r} is not true or false")
    if "granularity" not in args:
        if args.get("group_size"):
            args["granularity"] = "group"
        elif args.get("block"):
            args["granularity"] = "block"
        else:
            args["granularity"] = "token" if activation else "channel"
    if activation and args["granularity"] == "token":
        args.setdefault("dynamic", True)
    try:
        args["granularity"] = Granularity(args["granularity"])
        if "dtype" in args:
            args["dtype"] = DType(args["dtype"])
        if "scale" in args:
            args["scale"] = ScaleFormat(args["scale"])
    except ValueError as e:
        raise UsageError(f"spec {dict(raw)!r}: {e}") from e
    if args.get("block"):
        block = args["block"]
        whole = isinstance(block, list | tuple) and all(type(v) is int and v > 0 for v in block)
        if not whole or len(block) != 2:
            raise UsageError(f"block: {block!r} is not [rows, columns], whole numbers above 0")
        args["block"] = (block[0], block[1])
    spec = QuantSpec(**args)
    if activation and spec.granularity in (Granularity.CHANNEL, Granularity.BLOCK):
        raise UsageError(
            f"granularity {spec.granularity} does not apply to activations",
            remedy="use token, tensor or group",
        )
    if activation and (spec.bits != 8 or not spec.symmetric):
        raise UsageError(
            f"{spec.label()} activations: activations are symmetric int8 or fp8",
            remedy="set bits: 8 and symmetric: true",
        )
    if not activation and spec.dynamic:
        raise UsageError("dynamic: weights have static scales", remedy="drop the key")
    return spec


def _generic_name(weight: QuantSpec, inputs: QuantSpec | None) -> str:
    acts = f" x {inputs.label()}" if inputs else ""
    return f"{weight.label()}{acts}".replace(" ", "-")
