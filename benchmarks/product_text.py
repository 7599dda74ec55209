"""One product's traffic, cut in two: what calibrates, and what the result is measured on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.data.contamination import words

#: Lines of fewer words, "thank you" and the like, are alike by chance.
LEAST_WORDS = 8


@dataclass(frozen=True)
class Halves:
    """Two files of a product's conversations, and how many each holds."""

    calibration: Path
    held_out: Path
    calibrated: int
    held: int


def split_traffic(traffic: Path, share: float, seed: int, folder: Path) -> Halves:
    """Hold conversations back, by families: what is measured on must not have been calibrated on.

    Args:
        traffic: JSON lines with ``messages``.
        share: of the conversations that are held out, at least; in (0, 1).
        seed: of the order in which families are drawn.
        folder: that the files are written to.

    Raises:
        SystemExit: a share outside (0, 1), or nothing is left to calibrate on.
    """
    if not 0 < share < 1:
        raise SystemExit(f"--held-out {share:g}: is not between 0 and 1")
    rows = [line for line in traffic.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = ["\n".join(m["content"] for m in json.loads(row)["messages"]) for row in rows]
    order = families(texts)
    random.Random(seed).shuffle(order)
    held: set[int] = set()
    for family in order:
        if len(held) >= share * len(rows):
            break
        held.update(family)
    if len(held) == len(rows):
        raise SystemExit(
            f"{traffic}: --held-out {share:g} leaves nothing to calibrate on: its conversations "
            f"share lines and make {len(order)} families of up to {max(map(len, order))}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{traffic.stem}.{name}.jsonl" for name in ("calibration", "held_out")]
    for path, side in zip(paths, (False, True), strict=True):
        chosen = [row for i, row in enumerate(rows) if (i in held) is side]
        path.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return Halves(*paths, calibrated=len(rows) - len(held), held=len(held))


def families(texts: Sequence[str]) -> list[list[int]]:
    """Positions of texts, those together that have a line in common, or are joined by others.

    A line is a system prompt as a rule. Lines count from `LEAST_WORDS` words on and are compared
    word by word, as the library's check of held-out text compares them.
    """
    found: dict[int, list[int]] = {}  # by its first member
    of: list[int] = []
    first: dict[tuple[str, ...], int] = {}
    for i, text in enumerate(texts):
        of.append(i)
        found[i] = [i]
        for line in map(words, text.splitlines()):
            if len(line) < LEAST_WORDS:
                continue
            a, b = sorted((of[first.setdefault(tuple(line), i)], of[i]))
            if a != b:
                for member in found[b]:
                    of[member] = a
                found[a] += found.pop(b)
    return list(found.values())
