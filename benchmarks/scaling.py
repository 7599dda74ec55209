"""How the native decoder's time grows: a step with its context, a prompt with its length.

::

    pip install matplotlib
    python benchmarks/scaling.py NAME=CKPT [NAME=CKPT …] -o benchmarks/results/scaling

Lengths and checkpoints are interleaved, round by round, and a point is the median of its rounds.
Beside each curve stands its floor, from limits measured in the same run (`quantkit bench kernels`
measures them, too):

- a step reads every weight once and the keys and values of its context:
  ``(weights + context · token bytes) / read bandwidth``;
- a prompt of L tokens multiplies ``2 · weights · L`` at the rate of integer products, or of bf16
  ones where activations are floats, and attends with ``2 · L² · heads · head_dim`` operations a
  layer (half of the square is masked) at the bf16 rate.

The slopes are fitted by least squares and printed beside the floors' slopes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
import torch

from quantkit.models.decoder import Batch, Decoder
from quantkit.models.load import load_runtime
from quantkit.ops import measure
from quantkit.ops.page_store import PAGE_TOKENS

LENGTHS = (128, 256, 512, 1024, 2048, 3072, 4096)


@dataclass(frozen=True)
class Model:
    """What the floors are made of.

    Attributes:
        weight_bytes: packed weights with their scales, head included.
        block_weights: weights of the linear layers; a prompt runs the head on one token only.
        integer: activations are int8.
        token_bytes: keys and values of one token, all layers.
        attention: heads x head_dim x layers.
    """

    name: str
    weight_bytes: int
    block_weights: int
    integer: bool
    token_bytes: int
    attention: int


@dataclass(frozen=True)
class Curve:
    """Median seconds at each length, the floor's seconds, and both slopes.

    For a step, ``slope`` is seconds a token of context; for a prompt it is the coefficient of L²,
    and ``linear`` that of L.
    """

    model: str
    kind: str
    lengths: list[int]
    seconds: list[float]
    floor: list[float]
    slope: float
    floor_slope: float
    linear: float
    floor_linear: float


def describe(name: str, decoder: Decoder) -> Model:
    shape = decoder.shape
    return Model(
        name,
        decoder.native.weight_nbytes,
        decoder.native.block_weights,
        "int8" in decoder.numerics,
        decoder.token_nbytes(),
        shape.heads * shape.head_dim * decoder.native.layers,
    )


def runs(decoder: Decoder, lengths: Sequence[int]) -> dict[tuple[str, int], Callable[[], object]]:
    """(kind, length) → one step behind so much context, or one prompt of that length."""
    pages = list(range(-(-(max(lengths) + PAGE_TOKENS) // PAGE_TOKENS)))
    cache = decoder.new_cache(len(pages))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, decoder.shape.vocab, (max(lengths),), generator=generator).tolist()
    # Every page holds something, so that no step reads memory that was never written.
    decoder.logits(Batch.of([ids], [0], [pages], rows=[len(ids) - 1]), cache)
    steps: dict[tuple[str, int], Callable[[], object]] = {}
    for length in lengths:
        step = Batch.of([[5]], [length - 1], [pages], rows=[0])
        prompt = Batch.of([ids[:length]], [0], [pages], rows=[length - 1])
        steps["decode", length] = lambda b=step: decoder.logits(b, cache)
        steps["prefill", length] = lambda b=prompt: decoder.logits(b, cache)
    return steps


def fit(model: Model, kind: str, lengths: Sequence[int], seconds: Sequence[float],
        limits: measure.Limits) -> Curve:  # fmt: skip
    x = np.array(lengths, dtype=float)
    if kind == "decode":
        floor_slope = model.token_bytes / limits.read_bytes
        floor_linear = 0.0
        floor = model.weight_bytes / limits.read_bytes + floor_slope * x
        slope, linear = float(np.polyfit(x, seconds, 1)[0]), 0.0
    else:
        rate = limits.int8_operations if model.integer else limits.bf16_operations
        floor_linear = 2 * model.block_weights / rate
        floor_slope = 2 * model.attention / limits.bf16_operations
        floor = floor_linear * x + floor_slope * x**2
        # Relative errors, so that short prompts count as much as long ones.
        columns = np.stack([x, x**2], axis=1) / np.array(seconds)[:, None]
        linear, slope = map(float, np.linalg.lstsq(columns, np.ones(len(x)), rcond=None)[0])
    return Curve(model.name, kind, list(lengths), list(seconds), floor.tolist(),
                 slope, floor_slope, linear, floor_linear)  # fmt: skip


def plot(curves: Sequence[Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "quantkit"  # the same data give the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, kind in zip(axes, ("decode", "prefill"), strict=True):
        for index, curve in enumerate(c for c in curves if c.kind == kind):
            color = f"C{index}"
            scale = 1e3
            axis.plot(curve.lengths, np.array(curve.seconds) * scale, "o-", color=color,
                      label=curve.model)  # fmt: skip
            axis.plot(curve.lengths, np.array(curve.floor) * scale, "--", color=color, alpha=0.6)
        axis.set_ylabel("milliseconds")
        axis.grid(alpha=0.3)
    axes[0].set(title="One step (dashed: floor)", xlabel="tokens of context", ylim=(0, None))
    axes[1].set(title="One prompt (dashed: floor)", xlabel="tokens", xscale="log", yscale="log")
    lengths = curves[0].lengths
    axes[1].set_xticks(lengths, [str(n) for n in lengths], fontsize=8)
    axes[1].minorticks_off()
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=CKPT")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8, help="decode steps a round")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path, help="stem of a .json and an .svg")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    before = measure.limits()
    models: dict[str, Model] = {}
    work: dict[tuple[str, str, int], Callable[[], object]] = {}
    for argument in options.checkpoints:
        name, _, source = argument.partition("=")
        if not source:
            parser.error(f"{argument!r}: a checkpoint is NAME=PATH")
        runtime = load_runtime(source)
        if runtime.decoder is None:
            parser.error(f"{source}: not in the native decoder: {runtime.fallback}")
        models[name] = describe(name, runtime.decoder)
        for (kind, length), run in runs(runtime.decoder, options.lengths).items():
            work[name, kind, length] = run
    times: dict[tuple[str, str, int], list[float]] = {key: [] for key in work}
    for _ in range(options.rounds):
        for key, run in work.items():
            for _ in range(options.steps if key[1] == "decode" else 1):
                start = time.perf_counter()
                run()
                times[key].append(time.perf_counter() - start)
    after = measure.limits()
    # The better of before and after: a floor made in a slow moment would be none.
    limits = measure.Limits(*map(max, zip(astuple(before), astuple(after), strict=True)))

    print(f"{measure.cpu_name()}, {torch.get_num_threads()} threads; reads "
          f"{limits.read_bytes / 1e9:.1f} GB/s, torch int8 {limits.int8_operations / 1e12:.2f} and "
          f"bf16 {limits.bf16_operations / 1e12:.2f} TOPS; {options.rounds} rounds")  # fmt: skip
    curves = []
    for name, model in models.items():
        for kind in ("decode", "prefill"):
            seconds = [statistics.median(times[name, kind, n]) for n in options.lengths]
            curves.append(fit(model, kind, options.lengths, seconds, limits))
    for curve in curves:
        print(f"\n{curve.kind}: {curve.model}")
        for n, s, f in zip(curve.lengths, curve.seconds, curve.floor, strict=True):
            print(f"  {n:>5}  {s * 1e3:9.2f} ms   floor {f * 1e3:8.2f} ms   {f / s:4.0%}")
        if curve.kind == "decode":
            print(f"  slope {curve.slope * 1e9:.0f} ns a token of context, floor "
                  f"{curve.floor_slope * 1e9:.0f} ns")  # fmt: skip
        else:
            print(f"  {curve.linear * 1e6:.0f} us a token, floor {curve.floor_linear * 1e6:.0f}; "
                  f"{curve.slope * 1e9:.1f} ns a token pair, floor "
                  f"{curve.floor_slope * 1e9:.1f}")  # fmt: skip
    if options.output:
        document = {
            "cpu": measure.cpu_name(),
            "threads": torch.get_num_threads(),
            "limits": asdict(limits),
            "rounds": options.rounds,
            "curves": [asdict(c) for c in curves],
        }
        options.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        plot(curves, options.output.with_suffix(".svg"))
        print(f"\n{options.output.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
