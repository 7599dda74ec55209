"""How a model computes: the ``--kernels`` and ``--kv-cache-dtype`` options of several commands."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Kernels(StrEnum):
    """How a model computes; see `quantkit.models.load.KERNELS`."""

    native = "native"
    native_float = "native-float"
    modules = "modules"
    reference = "reference"


KernelsOption = Annotated[
    Kernels,
    typer.Option(
        "--kernels",
        help="native: quantkit's decoder and kernels; native-float: without int8 activations for "
        "weight-only schemes; modules: native layers in transformers' modules; reference: plain "
        "torch.",
    ),
]


class KvDtype(StrEnum):
    """What keys and values are stored as; see `quantkit.models.kv_dtype`."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"
    fp8 = "fp8"


KvDtypeOption = Annotated[
    KvDtype,
    typer.Option("--kv-cache-dtype", help="Of keys and values; auto: the model's own."),
]
