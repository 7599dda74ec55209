"""A module's name in memory ↔ its name in checkpoint files.

transformers renames weights as it loads them (``block_sparse_moe`` → ``mlp`` for Mixtral,
``embed_out`` → ``lm_head`` for GPT-NeoX) and back as it saves them. An export goes by the names
of the files it came from: they are what other runtimes look for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from quantkit.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def disk_name(model: PreTrainedModel, name: str) -> str:
    """The name that the files this model was loaded from have for a tensor."""
    for renaming in reversed(_renamings(getattr(model, "_weight_conversions", None) or ())):
        name, _ = renaming.reverse_transform().rename_source_key(name)
    return name


def disk_module(model: PreTrainedModel, name: str) -> str:
    """The same for a module, which is renamed as its weight is."""
    return disk_name(model, f"{name}.weight").removesuffix(".weight")


def memory_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """For each tensor of a checkpoint its name in the model, as transformers would rename it.

    A tensor of a quantized layer (``weight_packed``) is renamed as its layer is. What no renaming
    brings to a module of the model keeps its name.

    Args:
        model: an empty model of the checkpoint's architecture.
        keys: the names in the files.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    renamings = _renamings(get_model_conversion_mapping(model))
    modules = {name for name, _ in model.named_modules()}
    found = {}
    for key in keys:
        name = key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        # Older renamings would also match some names that are right already.
        known = name.rpartition(".")[0] in modules or key.rpartition(".")[0] not in modules
        found[key] = name if known else key
    return found


def check_layout(model: PreTrainedModel) -> None:
    """Refuse a model whose files hold other tensors than its modules compute with.

    Experts are no such case: `quantkit.model.experts` takes them apart again.

    Raises:
        UsageError: loading cut, joined or transposed some tensors.
    """
    from transformers.core_model_loading import WeightConverter

    for entry in getattr(model, "_weight_conversions", None) or ():
        if not isinstance(entry, WeightConverter):
            continue
        target = entry.target_patterns[0]
        if not target.endswith(("experts.gate_up_proj", "experts.down_proj")):
            raise UsageError(
                f"architecture {model.config.model_type!r}: {target} is stored in another layout "
                "than transformers computes in, and an export would have to convert it back",
                remedy="quantkit does not write such checkpoints; see docs/architectures.md",
            )


def _renamings(conversions: Iterable[Any]) -> list[Any]:
    from transformers.core_model_loading import WeightRenaming

    return [entry for entry in conversions if isinstance(entry, WeightRenaming)]
