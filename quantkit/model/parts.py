"""The parts of a model that quantization works on: its blocks, linear layers, head, embedding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from quantkit.errors import UsageError
from quantkit.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's repeated blocks and their name, such as ``model.layers``.

    Chosen as the ModuleList with the most linear parameters whose children are all of one
    class; inside of the language model, where vision towers stand beside it.

    Raises:
        UsageError: there is none.
    """
    scope, root = model, ""
    config = getattr(model, "config", None)
    if config is not None and config.get_text_config() is not config:
        scope = model.get_decoder()  # type: ignore[operator]
        root = next(f"{name}." for name, m in model.named_modules() if m is scope)
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in scope.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if len({type(child) for child in module}) != 1:
            continue
        # Quantized layers are no nn.Linear, but have its two sizes.
        size = sum(
            int(getattr(m, "in_features", 0)) * int(getattr(m, "out_features", 0))
            for m in module.modules()
        )
        if size and (best is None or size > best[0]):
            best = (size, name, module)
    if best is None:
        raise UsageError(
            f"{type(model).__name__}: no list of decoder blocks was found",
            remedy="quantkit quantizes nn.Linear layers in blocks; GPT-2's Conv1D are none",
        )
    return root + best[1], best[2]


def find_stacks(model: PreTrainedModel) -> list[tuple[str, nn.ModuleList]]:
    """The lists of blocks that calibration goes through, in the order in which they run.

    An encoder–decoder has two; of a vision–language model only the language model's is meant.

    Raises:
        UsageError: there is none.
    """
    if family_of(model.config).stacks == 1:
        return [find_blocks(model)]
    names = {module: name for name, module in model.named_modules()}
    stacks = []
    for half in (model.get_encoder(), model.get_decoder()):
        name, blocks = find_blocks(half)
        stacks.append((f"{names[half]}.{name}", blocks))
    return stacks


def block_numbers(model: PreTrainedModel) -> dict[str, int]:
    """The lists of blocks by name, each with the number of its first block."""
    numbers, first = {}, 0
    for prefix, stack in find_stacks(model):
        numbers[prefix] = first
        first += len(stack)
    return numbers


def block_of(name: str, numbers: Mapping[str, int]) -> int | None:
    """The number of the block that a module is in; None outside of them."""
    for prefix, first in numbers.items():
        if name.startswith(f"{prefix}."):
            return first + int(name[len(prefix) + 1 :].split(".", 1)[0])
    return None


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by name, in the model's order; the head included."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def norms(module: nn.Module) -> dict[str, nn.Module]:
    """Every norm that has a weight, by name."""
    return {
        name: m
        for name, m in module.named_modules()
        if type(m).__name__.endswith("Norm") and getattr(m, "weight", None) is not None
    }


def head_name(model: PreTrainedModel) -> str | None:
    """The name of the output head, or None."""
    head = model.get_output_embeddings()
    return next((name for name, m in model.named_modules() if m is head), None)


def embedding_shape(model: PreTrainedModel) -> tuple[int, int]:
    """(vocabulary size, hidden size) of the input embedding."""
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0]), int(weight.shape[1])


def is_tied(model: PreTrainedModel) -> bool:
    """True when the head and the input embedding are one tensor."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0)


def untie(model: PreTrainedModel) -> None:
    """Give the head a weight of its own, so that it can be quantized alone."""
    if is_tied(model):
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, as a checkpoint holds them: tied ones once."""
    tied = f"{head_name(model)}.weight" if is_tied(model) else None
    found: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        # What lies on disk, or was released, has no address to know it by.
        place = (tensor.data_ptr(), tensor.shape) if not tensor.is_meta and tensor.numel() else name
        if name != tied and place not in seen:
            found[name] = tensor
            seen.add(place)
    return found


def bring_in(module: nn.Module, *, skip: Iterable[nn.Module] = ()) -> None:
    """Load what accelerate left on disk into memory, for good, and take its hooks off.

    Args:
        module: with its submodules.
        skip: parts that stay where they are.
    """
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import set_module_tensor_to_device

    stays = {inside for part in skip for inside in part.modules()}
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        if hook is None or part in stays:
            continue
        # Several hooks in a row are kept as one that holds the others.
        maps = [h.weights_map for h in getattr(hook, "hooks", [hook]) if _holds_weights(h)]
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                set_module_tensor_to_device(part, name, "cpu", value=maps[0][name])
        remove_hook_from_module(part)


def _holds_weights(hook: Any) -> bool:
    return getattr(hook, "weights_map", None) is not None


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of this dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
