"""Which algorithms a family of models takes; refused before any work, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantkit import model as models
from quantkit.algorithms import RECONSTRUCTORS
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantkit.plan import PlannedLayer

#: What needs a causal model's next-token predictions.
_NO_LOGITS = {
    "fisher": "tokens are weighed by what they cost a next-token prediction",
    "distill": "scales are trained on next-token predictions",
    "feedback": "the unquantized pass runs beside the quantized one in causal models only",
    "signround": "the unquantized pass runs beside the quantized one in causal models only",
    "blockdistill": "the unquantized pass runs beside the quantized one in causal models only",
}

#: What an expert, which sees the tokens that a router chooses, cannot have.
_NO_ROUTER = {
    "fisher": "a router sends this layer some of the tokens only",
    "distill": "an expert that no token of a batch reaches has no gradient",
    "feedback": "the quantized and the unquantized model's routers send it other tokens",
    "signround": "an expert that no token of a step reaches has no gradient",
    "blockdistill": "an expert that no token of a step reaches has no gradient",
}


def check_measurable(model: PreTrainedModel) -> None:
    """Refuse a model whose sensitivities are not measured: no next tokens, or routed experts.

    Raises:
        UsageError: with the reason.
    """
    models.require_logits(model.config, "sensitivities are those of")
    experts = models.find_experts(model)
    if experts:
        raise UsageError(
            f"{next(iter(experts))}: sensitivities of experts are not measured: a router sends "
            "each some of the tokens only",
            remedy="choose the schemes of a mixture of experts by rules",
        )


def check_family(model: PreTrainedModel, layers: Sequence[PlannedLayer]) -> None:
    """Refuse what a model's family or its experts cannot be calibrated with.

    Raises:
        UsageError: names the layer, the option and the reason.
    """
    family = models.family_of(model.config)
    experts = tuple(f"{name}." for name in models.find_experts(model))
    for layer in layers:
        reasons = {} if family.logits else _NO_LOGITS
        if experts and layer.name.startswith(experts):
            reasons = _NO_ROUTER
        wanted = {
            "fisher": layer.needs_gradients,
            "distill": layer.distilled,
            "feedback": layer.needs_drift,
            **{name: layer.reconstructor == name for name in RECONSTRUCTORS},
        }
        for option, reason in reasons.items():
            if wanted[option]:
                raise UsageError(
                    f"{layer.name}: {option}: {reason}",
                    remedy=f"take {option} out of this layer's algorithms",
                )
