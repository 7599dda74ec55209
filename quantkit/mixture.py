"""A scheme for each layer within a budget of bits, and the recipe that says so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantkit.allocate import Option, allocate, frontier
from quantkit.errors import UsageError
from quantkit.schemes import SCHEMES, Scheme, parse_scheme
from quantkit.sensitivity import Layer, Sensitivity

#: What schemes are chosen from by default: steps of about one bit, and half-steps where a finer
#: group or a zero point buys more than a bit would.
CANDIDATES = (
    "w3a16-g64",
    "w3a16-asym-g64",
    "w3a16-g32",
    "w4a16-g64",
    "w4a16-asym-g64",
    "w4a16-g32",
    "w4a16-asym-g32",
    "w5a16-g64",
    "w5a16-asym-g64",
    "w6a16-g64",
    "w8a16-g64",
)

_LABEL = re.compile(r"w([2-8])a16(-asym)?-(?:g(\d+)|channel)")


@dataclass(frozen=True)
class Mixture:
    """One choice for every layer.

    Attributes:
        chosen: layer → scheme.
        bits: stored bits of all layers.
        kl: predicted nats a token, the sum over layers.
    """

    chosen: Mapping[str, str]
    bits: int
    kl: float


def candidate(label: str) -> tuple[Scheme, Any]:
    """A scheme by its name, and how a recipe writes it.

    Args:
        label: a row of `schemes.SCHEMES`, or any weight-only integers named in the same way, such
            as ``w5a16-g64``, ``w3a16-asym-g32`` or ``w6a16-channel``.

    Raises:
        UsageError: neither.
    """
    found = _LABEL.fullmatch(label)
    if label in SCHEMES or found is None:
        return parse_scheme(label), label
    weight: dict[str, Any] = {"bits": int(found[1])}
    if found[3]:
        weight["group_size"] = int(found[3])
    if found[2]:
        weight["symmetric"] = False
    return replace(parse_scheme({"weight": weight}), name=label), {"weight": weight}


def choose_mixture(sensitivity: Sensitivity, bits: float) -> Mixture:
    """The least predicted KL within ``bits`` stored bits a weight, over the measured layers.

    Layers that read one input get one scheme.

    Raises:
        UsageError: fewer bits than the smallest schemes take.
    """
    groups = _groups(sensitivity)
    options = [_options(sensitivity, names) for names in groups]
    least = sum(min(o.bits for o in row) for row in options) / sensitivity.weights
    if bits < least:
        raise UsageError(
            f"--bits {bits:g}: the smallest schemes measured take {least:.3f} bits a weight",
            remedy="raise it, or measure smaller schemes",
        )
    picked = allocate(options, int(bits * sensitivity.weights))
    taken = [row[i] for row, i in zip(options, picked, strict=True)]
    return Mixture(
        {name: o.name for names, o in zip(groups, taken, strict=True) for name in names},
        sum(o.bits for o in taken),
        sum(o.cost for o in taken),
    )


def uniform_mixtures(sensitivity: Sensitivity) -> dict[str, Mixture]:
    """For each scheme that fits every layer, the mixture that gives it to all."""
    found = {}
    for scheme in sensitivity.schemes:
        costs = [layer.costs.get(scheme) for layer in sensitivity.layers.values()]
        known = [cost for cost in costs if cost is not None]
        if len(known) == len(costs):
            chosen = dict.fromkeys(sensitivity.layers, scheme)
            found[scheme] = Mixture(chosen, sum(c.bits for c in known), sum(c.kl for c in known))
    return found


def best_mixtures(sensitivity: Sensitivity) -> list[tuple[float, float]]:
    """(bits a weight, predicted KL) along the lower hull of all mixtures."""
    options = [_options(sensitivity, names) for names in _groups(sensitivity)]
    return [(bits / sensitivity.weights, kl) for bits, kl in frontier(options)]


def write_recipe(sensitivity: Sensitivity, mixture: Mixture) -> str:
    """A recipe's YAML text; `quantkit calibrate -r` runs it as it is.

    The scheme of most weights is the recipe's, every other one a rule for each kind of layer.
    """
    weights: dict[str, int] = {}
    for name, scheme in mixture.chosen.items():
        weights[scheme] = weights.get(scheme, 0) + sensitivity.layers[name].weights
    default = max(weights, key=lambda scheme: (weights[scheme], scheme))
    bits = mixture.bits / sensitivity.weights
    lines = [
        f"# Mixed precision: {bits:.3f} bits a weight over {len(mixture.chosen)} layers.",
        f"# Predicted KL: {mixture.kl:.4f} nats a token, the sum over layers of a second-order",
        "# estimate. Layers that share an input share a scheme.",
        f"# Measured on {sensitivity.samples} windows of {sensitivity.seq_len} tokens, sha256 "
        f"{sensitivity.origin['data'][:12]}…,",
        f"# of the weights with sha256 {sensitivity.origin['weights'][:12]}….",
        f"scheme: {_flow(sensitivity.schemes[default])}  "
        f"# {_kl(sensitivity, mixture, _given(mixture, default))}",
        f"algorithm: {sensitivity.origin['solver']}",
    ]
    if sensitivity.head is not None:
        lines.append(f"keep: [{sensitivity.head}]")
    rules = _rules(sensitivity, mixture, default)
    if rules:
        lines += ["rules:", *rules]
    lines += [
        "calibrate:",
        f"  data: [{', '.join(map(_quoted, sensitivity.data))}]",
        "  samples: 128",
        "  seq_len: 512",
        "# What the checkpoint must still do; without a gate nothing is scored.",
        "# gate:",
        f"#   kl.mean: {{max: {1.5 * mixture.kl:.2g}}}",
    ]
    return "\n".join(lines) + "\n"


def _rules(sensitivity: Sensitivity, mixture: Mixture, default: str) -> list[str]:
    """A comment and a rule for each kind of group and scheme, in the model's order."""
    blocks: dict[tuple[str, tuple[str, ...]], dict[str, list[int]]] = {}
    for names in _groups(sensitivity):
        places = [_place(name) for name in names]
        kind = (places[0][0], tuple(leaf for _, _, leaf in places))
        scheme = mixture.chosen[names[0]]
        blocks.setdefault(kind, {}).setdefault(scheme, []).append(places[0][1])
    lines = []
    for (prefix, leaves), by_scheme in blocks.items():
        for scheme, indices in sorted(by_scheme.items()):
            if scheme == default:
                continue
            names = [f"{prefix}.{i}.{leaf}" for i in indices for leaf in leaves]
            every = "|".join(map(str, sorted(indices)))
            every = f"({every})" if len(indices) > 1 else every
            pattern = f"re:{re.escape(prefix)}\\.{every}\\.{_either(leaves)}"
            lines.append(f"  # {_kl(sensitivity, mixture, names)}")
            written = _flow(sensitivity.schemes[scheme])
            lines.append(f"  - {{match: '{pattern}', scheme: {written}}}")
    return lines


def _kl(sensitivity: Sensitivity, mixture: Mixture, names: Iterable[str]) -> str:
    """What these layers take and cost under a mixture, for a comment."""
    layers = [(sensitivity.layers[name], mixture.chosen[name]) for name in names]
    weights = sum(layer.weights for layer, _ in layers)
    bits = sum(layer.costs[scheme].bits for layer, scheme in layers)
    kl = sum(layer.costs[scheme].kl for layer, scheme in layers)
    return (
        f"{len(layers)} layer{'s' if len(layers) > 1 else ''}, {weights / 1e6:.1f} M weights at "
        f"{bits / weights:.3f} bits, predicted KL {kl:.4f}"
    )


def _given(mixture: Mixture, scheme: str) -> list[str]:
    return [name for name, chosen in mixture.chosen.items() if chosen == scheme]


def _groups(sensitivity: Sensitivity) -> list[list[str]]:
    """Names of layers that share a scheme, in the model's order."""
    groups: dict[str, list[str]] = {}
    for name, layer in sensitivity.layers.items():
        groups.setdefault(layer.inputs, []).append(name)
    return list(groups.values())


def _options(sensitivity: Sensitivity, names: Sequence[str]) -> list[Option]:
    layers: list[Layer] = [sensitivity.layers[name] for name in names]
    return [
        Option(
            scheme,
            sum(layer.costs[scheme].bits for layer in layers),
            sum(layer.costs[scheme].kl for layer in layers),
        )
        for scheme in sensitivity.schemes
        if all(scheme in layer.costs for layer in layers)
    ]


def _place(name: str) -> tuple[str, int, str]:
    """``model.layers.3.mlp.up_proj`` → (``model.layers``, 3, ``mlp.up_proj``)."""
    found = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", name)
    assert found is not None, name  # every measured layer lies in a list of blocks
    return found[1], int(found[2]), found[3]


def _either(leaves: Sequence[str]) -> str:
    """A regular expression for any of these names."""
    if len(leaves) == 1:
        return re.escape(leaves[0])
    parents = {leaf.rpartition(".")[0] for leaf in leaves}
    if len(parents) > 1 or "" in parents:
        return f"({'|'.join(map(re.escape, leaves))})"
    last = "|".join(re.escape(leaf.rpartition(".")[2]) for leaf in leaves)
    return f"{re.escape(parents.pop())}\\.({last})"


def _flow(value: Any) -> str:
    """A scheme as YAML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(v)}" for key, v in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
