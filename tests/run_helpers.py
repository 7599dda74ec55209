"""`quantkit calibrate` on a tiny model: its arguments, and what a run may leave behind."""

from __future__ import annotations

from pathlib import Path

RECIPE = """\
scheme: w4a16-g64
algorithm: gptq
keep: [lm_head]
calibrate: {samples: 4, seq_len: 64}
"""


def arguments(
    model: Path | str,
    recipe: Path | str,
    data: Path | str,
    out: Path,
    *more: str,
    gate: bool = False,
) -> list[str]:
    """The command line of one run."""
    return [
        "calibrate", str(model), "--recipe", str(recipe), "--data", str(data),
        *([] if gate else ["--no-gate"]), "-o", str(out), *more,
    ]  # fmt: skip


def leftovers(out: Path) -> list[str]:
    """What lies beside OUT that a failed run must not leave, ``.partial`` work aside."""
    names = [p.name for p in out.parent.glob(f"{out.name}*")]
    names += [p.name for p in out.parent.glob(f".{out.name}*")]
    return [name for name in names if not name.endswith(".partial")]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, for comparing bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
