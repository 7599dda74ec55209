"""The ranges of static activation scales, and what each was chosen over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from quantkit.report.run_folder import InputRange, Layer
from quantkit.report.words import percent


def input_ranges(
    found: Sequence[Layer], caches: Sequence[tuple[str, InputRange]] = ()
) -> dict[str, Any] | None:
    """The template's ``input_ranges``: a row an input, or None without static scales."""
    # Layers of a block that read one input have one range.
    shared: list[tuple[list[str], InputRange]] = []
    at: dict[tuple[int | None, float, float], int] = {}
    for layer in found:
        chosen = layer.input_range
        if chosen is None:
            continue
        key = (layer.block, chosen.low, chosen.high)
        if key in at:
            shared[at[key]][0].append(layer.kind)
        else:
            at[key] = len(shared)
            shared.append(([layer.name], chosen))
    shared += [([name], chosen) for name, chosen in caches]
    if not shared:
        return None
    counts = Counter(chosen.observer for _, chosen in shared)
    return {
        "counts": ", ".join(f"{label} {n}×" for label, n in counts.most_common()),
        "rows": [_row(names, chosen) for names, chosen in shared],
    }


def _row(names: Sequence[str], chosen: InputRange) -> dict[str, str]:
    others = sorted(
        (error, label) for label, error in chosen.errors.items() if label != chosen.observer
    )
    error = chosen.errors.get(chosen.observer)
    return {
        "layers": ", ".join(names),
        "observer": chosen.observer,
        "low": f"{chosen.low:.4g}",
        "high": f"{chosen.high:.4g}",
        "error": "–" if error is None else percent(error, 3),
        "others": ", ".join(f"{label} {percent(error, 3)}" for error, label in others),
    }
