"""The ``--kernels`` option that several commands share."""

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
