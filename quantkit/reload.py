"""Does the checkpoint on disk compute what calibration made?"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from quantkit.calibrate import Probe
from quantkit.errors import QuantkitError
from quantkit.layers import QuantLinear
from quantkit.models.load import load_runtime
from quantkit.models.paged import PagedRunner, PagedSequence, Work, pages_for
from quantkit.models.runtime import Runtime
from quantkit.paused import head_input
from quantkit.plan import Plan
from quantkit.schemes import Scheme

#: ‖reloaded − in memory‖ / ‖in memory‖ of the last hidden states in the reference kernels,
#: which compute what the calibration loop computed: anything but zero is a defect, and this
#: leaves room for a library that sums in another order.
RELOAD_TOLERANCE = 1e-3

#: ‖native − reference‖ / ‖reference‖ of one layer's output. The reference rounds weights and
#: outputs to bf16, which costs 0.2–0.4 %; a wrong scale or code costs 5 % and up.
KERNEL_TOLERANCE = 0.01

#: ‖native decoder − in memory‖ / ‖in memory‖ of the last hidden states. int8 activations and
#: another order of rounding in every layer cost a few percent; a layer wired wrongly costs 100 %.
DECODER_TOLERANCE = 0.25

#: Above `DECODER_TOLERANCE` the decoder may differ by this many times what moving every embedded
#: value by its last bf16 digit does to the reference, and never by as much as a wrongly wired layer
#: makes. Static int8 activations beside an outlier answer to that digit by a third of the state.
UNSTEADY_TIMES, UNSTEADY_MOST = 2.0, 0.7

_DECODER_DEFECT = "this is a defect in the decoder; run with --kernels reference and report it"
_NOTHING_LEFT = (
    "a model that one rounding moves that far has lost what it knew, and no kernels can be held "
    "against it: give its layers more bits, or a solver of smaller errors (gptq)"
)


def _probe_input(layer: QuantLinear) -> torch.Tensor:
    """Random inputs fp32 ``[4, K]`` that spread over the range of a static scale: a range set by
    a few outliers would round plain normal values to zeros, which tell nothing."""
    x = torch.randn(
        4, layer.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    spec = layer.scheme.input
    if spec is not None and layer.input_scale is not None:
        x *= float(layer.input_scale) * spec.qmax / 4
    return x


def check_layers(runtime: Runtime, plan: Plan) -> None:
    """The reloaded model computes every planned layer quantized, as planned, and no other.

    Raises:
        QuantkitError: it does not.
    """
    planned = {layer.name: _stored_as(layer.scheme, layer.hadamard) for layer in plan.layers}
    loaded = {
        name: _stored_as(module.scheme, module.hadamard)
        for name, module in runtime.model.named_modules()
        if isinstance(module, QuantLinear)
    }
    for name in sorted(planned.keys() | loaded.keys()):
        was, now = planned.get(name, "unquantized"), loaded.get(name, "unquantized")
        if was != now:
            raise QuantkitError(
                f"{name}: planned {was}, reloaded {now}",
                remedy="this is a defect in export or reload; please report it",
            )


def _stored_as(scheme: Scheme, hadamard: int) -> str:
    """What a file says of a layer: not how its scales were chosen."""
    inputs = f" × {scheme.input.label()}" if scheme.input else ""
    rotated = f" behind a Hadamard matrix of order {hadamard}" if hadamard else ""
    return scheme.weight.label() + inputs + rotated


def check_reload(folder: Path, runtime: Runtime, probe: Probe, device: str) -> None:
    """The files hold what calibration made, and the kernels compute what the files say.

    Args:
        folder: the exported checkpoint.
        runtime: the same, loaded in the kernels that will be judged.
        probe: what the model in memory computed.
        device: that ``runtime`` is on.

    Raises:
        QuantkitError: they do not.
    """
    reference = load_runtime(folder, kernels="reference", device=device, streamed=True)
    expected = probe.head_input.float().cpu()
    with torch.no_grad():
        got = head_input(reference.model, probe.ids).float().cpu()
        error = float((got - expected).norm() / expected.norm())
        if not error <= RELOAD_TOLERANCE:
            raise QuantkitError(
                f"the reloaded checkpoint's hidden states differ by {error:.2%} from the model "
                "in memory",
                remedy="this is a defect in export or reload; please report it",
            )
        for name, layer in runtime.model.named_modules():
            if not isinstance(layer, QuantLinear) or layer.kernels == "reference":
                continue
            x = _probe_input(layer).to(runtime.model.dtype)
            ours = layer(x.to(device)).float()
            theirs = reference.model.get_submodule(name)(x.to(device)).float()
            error = float((ours - theirs).norm() / theirs.norm())
            if not error <= KERNEL_TOLERANCE:
                raise QuantkitError(
                    f"{name}: the native kernel's output differs by {error:.2%} from the reference",
                    remedy="this is a defect in a kernel; run with --kernels reference and "
                    "report it",
                )
    if runtime.decoder is not None:
        assert isinstance(probe.ids, torch.Tensor)  # the decoder reads tokens alone
        ids = probe.ids[0].tolist()
        runner = PagedRunner(runtime.decoder, pages_for(len(ids)))
        [states] = runner.states([Work(PagedSequence(), ids)])
        error = float((states - expected[0]).norm() / expected[0].norm())
        if decoder_agrees(error, moved=0.0):
            return
        moved = unsteadiness(reference.model, probe.ids, expected)
        if not decoder_agrees(error, moved):
            raise QuantkitError(
                f"the native decoder's hidden states differ by {error:.2%} from the model in "
                "memory, which moving every embedded value by its last bf16 digit moves by "
                f"{moved:.2%}",
                remedy=_DECODER_DEFECT if tells_apart(moved) else _NOTHING_LEFT,
            )


def tells_apart(moved: float) -> bool:
    """Whether a decoder that does not agree with a model of this `unsteadiness` is at fault: where
    a rounding moves the model by half of what a wrongly wired layer does, the model may be."""
    return not UNSTEADY_TIMES * moved > UNSTEADY_MOST


def decoder_agrees(error: float, moved: float) -> bool:
    """Whether the native decoder computes what the model in memory does, as far as can be told.

    Args:
        error: ‖native decoder − in memory‖ / ‖in memory‖ of the last hidden states.
        moved: `unsteadiness` of the reference. Never true of an ``error`` of NaN, nor above
            `DECODER_TOLERANCE` with a ``moved`` of NaN.
    """
    unsteady = error <= UNSTEADY_TIMES * moved and error <= UNSTEADY_MOST
    return error <= DECODER_TOLERANCE or unsteady


def unsteadiness(model: PreTrainedModel, ids: torch.Tensor, expected: torch.Tensor) -> float:
    """How far the last hidden states move if every embedded value moves by its last bf16 digit.

    Args:
        model: in kernels that compute what ``expected`` holds.
        ids: int64 ``[B, T]``.
        expected: the hidden states fp32 ``[B, T, H]``.

    Returns:
        ‖moved − expected‖ / ‖expected‖. Values are changed by 2⁻⁸ of themselves, up or down by
        chance: more than half a unit in the last place, so nearly every one becomes its neighbour.
    """
    generator = torch.Generator().manual_seed(0)

    def move(_: nn.Module, __: tuple[object, ...], out: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, out.shape, generator=generator).to(out.device) * 2 - 1
        return (out.float() * (1 + signs * 2.0**-8)).to(out.dtype)

    hook = model.get_input_embeddings().register_forward_hook(move)
    try:
        with torch.no_grad():
            got = head_input(model, ids).float().cpu()
    finally:
        hook.remove()
    return float((got - expected).norm() / expected.norm())
