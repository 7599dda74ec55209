"""Keys and values on their way into the cache: where a calibrated scale rounds them.

Every attention module of transformers hands its keys, rotated, and its values to the ``update``
of whatever it is given as a cache. Here a `CacheEntry` stands in front of that cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantkit import model as models
from quantkit import numerics
from quantkit.errors import UsageError
from quantkit.input_range import InputRange, choose_range, sample_tokens
from quantkit.observers import Candidates
from quantkit.parallel import ALONE, World
from quantkit.recipe import Step
from quantkit.reference import in_unquantized_pass
from quantkit.schemes import QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What the two scales of an attention module are called on disk.
SIDES = ("k_scale", "v_scale")


@dataclass(frozen=True)
class CacheRange:
    """What one attention module's cache is quantized by.

    Attributes:
        spec: of keys and of values, static, one scale each.
        keys, values: the observed ranges.
    """

    spec: QuantSpec
    keys: InputRange
    values: InputRange

    def scales(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors on disk: ``k_scale`` and ``v_scale`` ``[1]`` in the model's dtype."""
        found = (self.keys, self.values)
        return {side: x.scale(self.spec, dtype) for side, x in zip(SIDES, found, strict=True)}


class CacheSide(nn.Module):
    """Keys or values ``[B, heads, T, head_dim]`` → the same as the cache will give them back.

    They pass unchanged while there is no scale.
    """

    def __init__(self, spec: QuantSpec, scale: Tensor | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None or in_unquantized_pass():
            return x
        rounded = numerics.fake_quantize_input(x.detach(), self.spec, self.scale.to(x.device))
        # Gradients pass straight through the rounding.
        return x + (rounded - x).detach() if x.requires_grad else rounded


class CacheEntry:
    """In front of the cache of one attention module.

    Attributes:
        keys, values: what rounds them.
    """

    def __init__(self, spec: QuantSpec, scales: Mapping[str, Tensor] | None = None) -> None:
        scales = scales or {}
        self.keys, self.values = (CacheSide(spec, scales.get(side)) for side in SIDES)

    def before(self, cache: Any) -> Any:
        """What an attention module gets in place of this cache, which may be None."""
        return _Cache(self, cache)


class _Cache:
    """A cache whose entries are rounded first; everything else is the cache's own."""

    def __init__(self, entry: CacheEntry, cache: Any) -> None:
        self._entry, self._cache = entry, cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = self._entry.keys(keys), self._entry.values(values)
        if self._cache is None:
            return keys, values
        return self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class _SideCollector:
    """Chooses the range of one layer's keys or values.

    Of several candidates it takes the one with the least relative squared error of a head's
    vector, mean over tokens and heads: `quantkit.input_range.output_errors` with nothing behind.

    Args:
        spec: of the cache.
        observer: a recipe's.
    """

    def __init__(self, spec: QuantSpec, observer: Step) -> None:
        self.spec = spec
        self.candidates = Candidates.of(observer.name, observer.options)
        self.held: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Take in one batch ``[B, heads, T, head_dim]``."""
        x = x.reshape(-1, x.shape[-1])
        self.candidates.update(x)
        self.held.append(x)

    def range(self, together: World) -> InputRange:
        """The range over all that was taken in, here and by the other processes."""
        sample = sample_tokens(self.held, together=together)
        observed = together.gather(self.candidates)

        def choose() -> InputRange:
            like = sample.largest
            nothing_behind = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
            ranges = reduce(Candidates.merge, observed).ranges(self.spec)
            return choose_range(ranges, sample, [nothing_behind], self.spec)

        return together.first(choose)


class BlockCache:
    """The keys and values of one block, on their way to calibrated scales.

    Attributes:
        entries: in front of the cache of each attention module.
        sides: what keys and values pass through, by name: a forward pass waits in front of each
            until its scale is known, as it does in front of a layer.

    Args:
        names: of its attention modules; none where caches are left alone.
        spec: of the cache, where there are names.
        observer: a recipe's.
    """

    def __init__(self, names: Sequence[str], spec: QuantSpec | None, observer: Step) -> None:
        self.entries: dict[str, CacheEntry] = {}
        self.sides: dict[str, CacheSide] = {}
        self.ranges: dict[str, InputRange] = {}
        self._collectors: dict[str, _SideCollector] = {}
        for name in names:
            assert spec is not None
            entry = self.entries[name] = CacheEntry(spec)
            for side, module in zip(SIDES, (entry.keys, entry.values), strict=True):
                self.sides[f"{name}.{side}"] = module
                self._collectors[f"{name}.{side}"] = _SideCollector(spec, observer)

    def observe(self, side: str, x: Tensor) -> None:
        """Take in one batch ``[B, heads, T, head_dim]`` of a side."""
        self._collectors[side].update(x)

    def solve(self, side: str, dtype: torch.dtype, together: World = ALONE) -> None:
        """Give a side the scale of all that was observed, in the model's dtype."""
        found = self.ranges[side] = self._collectors.pop(side).range(together)
        self.sides[side].scale = found.scale(self.sides[side].spec, dtype)

    def found(self) -> dict[str, CacheRange]:
        """The ranges by attention module, once every side is solved."""
        return {
            name: CacheRange(entry.keys.spec, *(self.ranges[f"{name}.{s}"] for s in SIDES))
            for name, entry in self.entries.items()
        }


@contextmanager
def quantized_caches(
    attentions: Mapping[str, nn.Module], entries: Mapping[str, CacheEntry]
) -> Iterator[None]:
    """While active, keys and values pass through the entry of their attention module.

    Args:
        attentions: attention modules by name.
        entries: by the same names; modules without one are left alone.
    """
    handles = [install_entry(attentions[name], entry) for name, entry in entries.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def install_entry(attention: nn.Module, entry: CacheEntry) -> Any:
    """Put an entry in front of an attention module's cache; returns the hook's handle.

    Raises:
        UsageError: the module takes no cache.
    """
    if not takes_cache(attention):
        raise UsageError(
            f"{type(attention).__name__} takes no key-value cache",
            remedy="drop kv_cache from the recipe",
        )

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = entry.before(kwargs.get("past_key_values"))
        return args, {**kwargs, "past_key_values": cache}

    return attention.register_forward_pre_hook(hook, with_kwargs=True)


def takes_cache(module: nn.Module) -> bool:
    """Whether a module's forward pass takes transformers' ``past_key_values``."""
    return "past_key_values" in inspect.signature(module.forward).parameters


def find_attentions(model: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """The attention modules of the decoder's blocks by name, in order: of the modules that take a
    cache those that have linear layers of their own.

    Args:
        prefix: dotted name of the list of blocks.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(f"{prefix}.")
        and takes_cache(module)
        and any(isinstance(child, nn.Linear) for child in module.children())
    }


def decoder_attentions(model: PreTrainedModel) -> tuple[str, ...]:
    """The attention modules of the decoder.

    Raises:
        UsageError: there is not exactly one in each block.
    """
    stacks = models.find_stacks(model)
    prefix, blocks = stacks[-1]
    found = tuple(find_attentions(model, prefix))
    inside = [models.block_of(name, {prefix: 0}) for name in found]
    if len(stacks) > 1 or inside != list(range(len(blocks))):
        raise UsageError(
            f"kv_cache: {len(found)} modules with a key-value cache were found in {len(blocks)} "
            "blocks, and each block needs one",
            remedy="drop the key",
        )
    return found


def cache_width(model: PreTrainedModel) -> int:
    """Numbers that one token's keys, or its values, have in one block."""
    config = model.config.get_text_config()
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width: int | None = getattr(config, "head_dim", None)
    return heads * (width or config.hidden_size // config.num_attention_heads)
