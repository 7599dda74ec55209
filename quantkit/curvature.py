"""How many nats of KL each layer would cost under each scheme, to second order.

With p the model's own distribution of the next token, moving one layer's weight by ΔW costs

    KL(p ‖ p_ΔW) ≈ ½ ⟨ΔW, F ΔW⟩,   F = E[∇ℓ ∇ℓᵀ],  ∇ℓ = ∂(−log p(y | context)) / ∂W,  y ~ p

per token: the first-order term of a divergence vanishes at its minimum, and its Hessian there is
the Fisher matrix (Amari: "Natural Gradient Works Efficiently in Learning", 1998; Martens: "New
Insights and Perspectives on the Natural Gradient Method", JMLR 2020, §5). HAWQ-V2 (Dong et al.,
arXiv 1911.03852) ranks layers by mean Hessian trace × ‖ΔW‖², FIT (Zandonati et al., arXiv
2210.08502) by the trace of the Fisher matrix times the same; both take the curvature to be equal
in every direction of a layer. Here ΔW is the rounding error that the solver really makes, and its
quadratic form is taken as it is:

    ½ E[(Σ_t g_tᵀ ΔW x_t)²] / T

over windows of T tokens, x_t the layer's input and g_t the gradient at its output. Labels drawn
independently for each position make the gradients of different positions' losses uncorrelated,
so the square of their sum over a window has the sum of their squares as its mean: one backward pass
a window serves all layers and schemes, and what earlier positions do to later ones is counted.

One product a window is a noisy square. The rounding errors of a layer's schemes point in unrelated
directions, along most of which the curvature is the same share of the output error
e = tr(ΔW H ΔWᵀ), with H the second moments of the inputs. So log(estimate / e) of each scheme is
drawn towards its mean over the layer's schemes, as far as the spread between schemes is what
the spread between windows explains (empirical Bayes; the variance between schemes as DerSimonian
and Laird, "Meta-analysis in clinical trials", 1986, estimate it). Where schemes really differ
they stay apart: one input column of massive activations (Sun et al., arXiv 2402.17762) can make up
nearly all of a layer's output error and hardly reach the logits. `Estimate.direct` is not drawn.

A solver fits its errors to the tokens that it saw, so the first half of the windows is what it
solves on, and the second half is what is differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit import model as models
from quantkit import numerics
from quantkit.algorithms import SOLVERS, Stats
from quantkit.errors import QuantkitError, UsageError
from quantkit.gradients import gradient_of_draws, observed, recorded, weight_gradients
from quantkit.observers import HessianAccumulator
from quantkit.paused import Spine, trace_groups
from quantkit.plan import PlannedLayer
from quantkit.progress import Progress, silent
from quantkit.quantize import quantize_group
from quantkit.schemes import Scheme
from quantkit.steps import check_codes

#: Windows whose weight gradients are held until they meet the rounding errors: each reading of
#: all errors of a block serves so many windows.
HELD = 8


@dataclass(frozen=True)
class Estimate:
    """What one layer under one scheme costs.

    Attributes:
        kl: nats a token.
        error: its standard error over windows.
        direct: the same from this scheme's products alone; noisier.
    """

    kl: float
    error: float
    direct: float


@dataclass(frozen=True)
class Curvature:
    """What `measure_curvature` found.

    Attributes:
        groups: names of the layers that read one input, in the order in which they run.
        estimates: layer → scheme's name → estimate; only schemes that fit the layer.
        kept: rounding errors fp32 ``[N, K]`` by (layer, scheme), those that were asked for.
    """

    groups: tuple[tuple[str, ...], ...]
    estimates: Mapping[str, Mapping[str, Estimate]]
    kept: Mapping[tuple[str, str], Tensor]


def measure_curvature(
    source: models.SourceModel,
    ids: Tensor,
    schemes: Mapping[str, Scheme],
    solver: str,
    *,
    seed: int = 0,
    keep: Sequence[tuple[str, str]] = (),
    progress: Progress = silent,
) -> Curvature:
    """Estimate the KL of every linear layer inside the decoder's blocks under every scheme.

    Works from the last block to the first. Beside the model there are in memory the hidden
    states in front of every block (`state_bytes`), and for one block at a time its Hessians, its
    rounding errors under every scheme (twice, fp32) and `HELD` weight gradients.

    Args:
        source: the original model; unchanged.
        ids: token ids int64 ``[windows, T]``, at least 2 windows.
        schemes: by name; weights only, each layer is given those that fit it.
        solver: the algorithm whose rounding errors are judged, with its default options.
        seed: of the labels that are drawn.
        keep: (layer, scheme) whose rounding errors are returned.
        progress: one step a block and window.

    Raises:
        UsageError: fewer than 2 windows, a scheme that quantizes activations, or a layer that no
            scheme fits.
        QuantkitError: a model that does not fit into memory, NaN, or a layer no token reached.
    """
    _check(source, ids, schemes, solver)
    spine = Spine(source.model)
    with torch.no_grad():
        return _Measurement(source, spine, ids, schemes, solver, seed, keep, progress).run()


def state_bytes(source: models.SourceModel, windows: int, seq_len: int) -> int:
    """Bytes of the hidden states that `measure_curvature` holds."""
    width = models.embedding_shape(source.model)[1]
    blocks = len(models.find_blocks(source.model)[1])
    element = torch.finfo(source.model.dtype).bits // 8
    return windows * seq_len * width * element * (blocks + 1)


class _Measurement:
    def __init__(
        self,
        source: models.SourceModel,
        spine: Spine,
        ids: Tensor,
        schemes: Mapping[str, Scheme],
        solver: str,
        seed: int,
        keep: Sequence[tuple[str, str]],
        progress: Progress,
    ) -> None:
        self.model = source.model
        self.spine = spine
        self.windows = list(ids.split(1))
        self.solving = len(self.windows) // 2  # windows that the solver sees
        self.schemes = schemes
        self.solver = solver
        self.generator = torch.Generator().manual_seed(seed)
        self.keep = set(keep)
        self.linears = models.linear_layers(source.model)
        self.progress = progress
        self.done = 0
        self.total = 2 * len(spine.blocks) * len(self.windows) + len(self.windows) - self.solving

    def run(self) -> Curvature:
        states = [self.spine.embed(self.windows)]
        blocks = len(self.spine.blocks)
        for index in range(blocks):
            states.append(self._forward(index, states[-1]))
        last = states.pop()[self.solving :]
        # Gradients behind the block at hand, one [1, T, hidden] a window.
        upstream = [
            self._head(ids, x) for ids, x in zip(self.windows[self.solving :], last, strict=True)
        ]
        groups: list[tuple[str, ...]] = []
        estimates: dict[str, dict[str, Estimate]] = {}
        kept: dict[tuple[str, str], Tensor] = {}
        for index in reversed(range(blocks)):
            hidden = states.pop()
            members = self._groups(index, hidden)
            deltas, errors = self._round(index, members, hidden[: self.solving])
            products, upstream = self._differentiate(
                index, deltas, hidden[self.solving :], upstream
            )
            found = {name: _estimates(products[name], errors[name], name) for name in deltas}
            groups[:0] = [tuple(group) for group in members]
            estimates = {**found, **estimates}
            kept |= {
                (name, scheme): delta.clone()
                for name, by_scheme in deltas.items()
                for scheme, delta in by_scheme.items()
                if (name, scheme) in self.keep
            }
        return Curvature(tuple(groups), estimates, kept)

    def _forward(self, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        outputs = []
        for call in self.spine.calls(index, hidden):
            outputs.append(call())
            self._advance("forward")
        return outputs

    def _head(self, ids: Tensor, x: Tensor) -> Tensor:
        """Gradient ``[1, T, hidden]`` of −log p(y), summed over positions, labels drawn from p."""
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.spine.logits(ids, leaf)
        if not numerics.is_finite(logits.detach()):
            raise QuantkitError(
                "the model's logits hold NaN or infinite values",
                remedy="the model overflows in its dtype on this data; load it in another",
            )
        drawn = gradient_of_draws(logits.detach(), self.generator)
        [grad] = torch.autograd.grad(logits, leaf, drawn)
        self._advance("head")
        return grad

    def _groups(self, index: int, hidden: Sequence[Tensor]) -> list[list[str]]:
        prefix = f"{self.spine.prefix}.{index}."
        inside = {name: m for name, m in self.linears.items() if name.startswith(prefix)}
        return trace_groups(self.spine.calls(index, hidden[:1])[0], inside)

    def _round(
        self, index: int, groups: Sequence[Sequence[str]], hidden: Sequence[Tensor]
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, float]]]:
        """A block's rounding errors fp32 ``[N, K]`` and output errors: layer → scheme → ΔW,
        tr(ΔW H ΔWᵀ)."""
        hessians = {
            group[0]: HessianAccumulator(self.linears[group[0]].in_features) for group in groups
        }
        with observed({name: self.linears[name] for name in hessians}, hessians):
            for call in self.spine.calls(index, hidden):
                call()
                self._advance(self._label(index))
        deltas: dict[str, dict[str, Tensor]] = {}
        errors: dict[str, dict[str, float]] = {}
        for group in groups:
            stats = Stats(hessians[group[0]].value(), hessians[group[0]].count)
            for name, by_scheme in self._solve(index, group, stats).items():
                deltas[name] = by_scheme
                errors[name] = {s: _output_error(d, stats) for s, d in by_scheme.items()}
        return deltas, errors

    def _solve(
        self, index: int, group: Sequence[str], stats: Stats
    ) -> dict[str, dict[str, Tensor]]:
        options = SOLVERS[self.solver].options
        weights = {name: self.linears[name].weight for name in group}
        deltas: dict[str, dict[str, Tensor]] = {name: {} for name in group}
        for label, scheme in self.schemes.items():
            layers = [
                PlannedLayer(name, index, shape, scheme, self.solver, options)
                for name, shape in ((name, _shape(self.linears[name])) for name in group)
                if fits(scheme, shape)
            ]
            for name, solved in quantize_group(layers, weights, stats, None, None).items():
                rounded = numerics.dequantize(solved.qtensor, weights[name].dtype)
                deltas[name][label] = rounded.float() - weights[name].float()
        return deltas

    def _differentiate(
        self,
        index: int,
        deltas: Mapping[str, Mapping[str, Tensor]],
        hidden: Sequence[Tensor],
        upstream: Sequence[Tensor],
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Per layer (Σ_t g_tᵀ ΔW x_t)² / 2T in fp64 ``[windows, schemes]``, and the gradients
        in front of the block."""
        stacked = {
            name: torch.stack([delta.flatten() for delta in by_scheme.values()])
            for name, by_scheme in deltas.items()
        }
        products: dict[str, list[Tensor]] = {name: [] for name in deltas}
        held: dict[str, list[Tensor]] = {name: [] for name in deltas}
        modules = {name: self.linears[name] for name in deltas}
        downstream = []
        tokens = hidden[0].shape[1]
        for i, x in enumerate(hidden):
            leaf = x.detach().requires_grad_()
            [call] = self.spine.calls(index, [leaf])
            with recorded(modules) as seen, torch.enable_grad():
                out = call()
            outputs = [y for _, _, y in seen]
            front, *grads = torch.autograd.grad(out, [leaf, *outputs], upstream[i])
            downstream.append(front)
            for name, gradient in weight_gradients(seen, grads).items():
                held[name].append(gradient)
            if (i + 1) % HELD == 0 or i + 1 == len(hidden):
                for name, gradients in held.items():
                    products[name].append(torch.stack(gradients) @ stacked[name].T)
                    gradients.clear()
            self._advance(self._label(index))
        return {
            name: torch.cat(found).double().square() / (2 * tokens)
            for name, found in products.items()
        }, downstream

    def _label(self, index: int) -> str:
        return f"block {index + 1}/{len(self.spine.blocks)}"

    def _advance(self, label: str) -> None:
        self.done += 1
        self.progress(self.done, self.total, label)


def fits(scheme: Scheme, shape: tuple[int, int]) -> bool:
    """Whether a weight ``(N, K)`` can be stored so: its groups divide K."""
    try:
        scheme.weight.scale_shape(shape)
    except UsageError:
        return False
    return True


def _shape(module: nn.Linear) -> tuple[int, int]:
    return module.out_features, module.in_features


def _output_error(delta: Tensor, stats: Stats) -> float:
    """tr(ΔW H ΔWᵀ): the mean squared error of the layer's output."""
    assert stats.hessian is not None
    return float(((delta @ stats.hessian) * delta).sum(dtype=torch.float64))


def _estimates(squares: Tensor, errors: Mapping[str, float], name: str) -> dict[str, Estimate]:
    """One layer's estimates.

    Args:
        squares: fp64 ``[windows, schemes]``, of mean KL.
        errors: the output error of each scheme.
        name: of the layer, for an error.
    """
    if not numerics.is_finite(squares):
        raise QuantkitError(
            f"{name}: the gradient holds NaN or infinite values",
            remedy="load the model in bfloat16 or float32, and check the checkpoint",
        )
    output = torch.tensor(list(errors.values()), dtype=torch.float64)
    direct = squares.mean(0)
    known = (output > 0) & (direct > 0)  # else the scheme holds the weights to the bit
    kl, error = torch.zeros_like(direct), torch.zeros_like(direct)
    if bool(known.any()):
        kl[known], error[known] = _shrunk(squares[:, known], output[known])
    return {
        scheme: Estimate(float(kl[i]), float(error[i]), float(direct[i]))
        for i, scheme in enumerate(errors)
    }


def _shrunk(squares: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates drawn towards one ratio to the output error, and their standard errors.

    Args:
        squares: fp64 ``[windows, schemes]``, of positive mean.
        output: output errors fp64 ``[schemes]``, positive.
    """
    direct = squares.mean(0)
    relative = squares / direct  # [windows, schemes], of mean 1
    windows, schemes = squares.shape
    if windows == 1 or schemes == 1:  # nothing to tell noise from difference by
        spread = relative.std(0) / math.sqrt(windows) if windows > 1 else torch.ones_like(direct)
        return direct, direct * spread
    within = relative.var(0) / windows  # of log(direct), by the delta method
    ratios = (direct / output).log()
    between = (ratios.var() - within.mean()).clamp(min=0.0)
    pull = within / (within + between)
    kl = output * (pull * ratios.mean() + (1 - pull) * ratios).exp()
    pooled = relative.mean(1).var() / windows
    return kl, kl * (pull.square() * pooled + (1 - pull).square() * within).sqrt()


def _check(
    source: models.SourceModel, ids: Tensor, schemes: Mapping[str, Scheme], solver: str
) -> None:
    if len(ids) < 2:
        raise UsageError(
            f"{len(ids)} windows: one half is solved on and the other differentiated",
            remedy="give more data, or lower --seq-len",
        )
    if solver not in SOLVERS:
        raise UsageError(f"unknown solver {solver!r}", remedy=f"known: {', '.join(SOLVERS)}")
    for scheme in schemes.values():
        check_codes(scheme.name, solver, scheme)
        if scheme.input is not None:
            raise UsageError(
                f"{scheme.name}: quantizes activations, and sensitivity is measured of weights",
                remedy="name weight-only schemes, such as w4a16-g64",
            )
    if any(p.is_meta for p in source.model.parameters()):
        raise QuantkitError(
            f"{source.source}: parts of it are on disk, and gradients need the whole model",
            remedy="run where its weights fit into memory",
        )
    prefix, _ = models.find_blocks(source.model)
    for name, module in models.linear_layers(source.model).items():
        if name.startswith(f"{prefix}.") and not any(
            fits(s, _shape(module)) for s in schemes.values()
        ):
            raise UsageError(
                f"{name}: none of the schemes fits its {module.in_features} columns",
                remedy="add one with a group that divides them, such as 32",
            )
