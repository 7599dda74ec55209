"""Training a quantized model until it predicts what the original predicts.

See `quantkit.algorithms.distill` for what is trained and why. Some windows are held back; if the
divergence there does not fall, what the solvers made stays, and the run says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit import memory, numerics
from quantkit import model as models
from quantkit.algorithms.distill import BETAS, ScaledLinear, divergence, learning_rate
from quantkit.algorithms.latent import EPSILON, Weight
from quantkit.batches import Batch, held_back, token_ids
from quantkit.errors import QuantkitError, UsageError
from quantkit.folding import norm_offset
from quantkit.paused import head_input
from quantkit.plan import Plan
from quantkit.quantize import QuantizedLayer
from quantkit.work import WorkFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Steps between two states on disk, and where codes move: twelve bytes a weight each time.
SAVE_STEPS = 10
SAVE_STEPS_OF_CODES = 50


@dataclass(frozen=True)
class Distilled:
    """What training made.

    Attributes:
        layers: every layer of the plan, in its order: with new scales, and with new codes where
            these move, if training was kept.
        before, after: nats of KL per token on the held windows, weighted as in training.
        held: how many windows these are.
        answers: share of the weight of all tokens that those of answers have; None where all weigh
            the same.
    """

    layers: dict[str, QuantizedLayer]
    before: float
    after: float
    held: int
    answers: float | None = None

    @property
    def kept(self) -> bool:
        """Whether training lowered the divergence; if not, nothing was changed."""
        return self.after < self.before

    @property
    def warning(self) -> str | None:
        """What to tell people of training that was not kept."""
        if self.kept:
            return None
        return (
            f"distillation moved KL on {self.held} held windows from {self.before:.4f} to "
            f"{self.after:.4f} and was undone: lower `scale_lr`, `norm_lr` and `weight_lr`, or "
            "calibrate on more samples"
        )

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "kept": self.kept,
            "held_windows": self.held,
            "kl_before": round(self.before, 6),
            "kl_after": round(self.after, 6),
        }
        return found if self.answers is None else found | {"weight_of_answers": self.answers}


class Teacher:
    """The original's predictions, from what its head saw: taken before anything is quantized.

    Args:
        model: the original, all of it in memory.
        windows: what it reads, ``[1, T]`` each: as calibration reads them.
        work: where an earlier run may have left what the head saw.
        advance: called after each window.

    Raises:
        UsageError: part of the model is on disk, or its predictions are more than its head's
            product, soft-capped or not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Sequence[Batch],
        work: WorkFolder,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        if any(p.is_meta for p in model.parameters()):
            raise UsageError(
                "distillation goes back through the whole model, and part of it is on disk",
                remedy="take `distill` out of the algorithm list, or give it more memory",
            )
        head = model.get_output_embeddings()
        self._weight, self._bias = head.weight, getattr(head, "bias", None)
        self._cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        with torch.no_grad():
            self._check(model, token_ids(windows[0])[:, :16])
        saved = work.load_tensors("targets")
        if saved is None:
            parts = []
            for window in windows:
                parts.append(head_input(model, window).cpu())
                advance()
            saved = {"hidden": torch.cat(parts)}
            work.save_tensors("targets", saved)
        else:
            for _ in windows:
                advance()
        self.hidden = saved["hidden"]

    def predict(self, hidden: Tensor) -> Tensor:
        """Logits from what the original's head sees."""
        return self._finish(F.linear(hidden, self._weight, self._bias))

    def student(self, head: nn.Module) -> Callable[[Tensor], Tensor]:
        """Logits from what another head sees."""
        return lambda hidden: self._finish(head(hidden))

    def _finish(self, logits: Tensor) -> Tensor:
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def _check(self, model: PreTrainedModel, ids: Tensor) -> None:
        whole = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
        parts = self.predict(head_input(model, ids)).float()
        if float((whole - parts).norm()) > 0.01 * float(whole.norm()):
            raise UsageError(
                f"{type(model).__name__}: its predictions are not its head's product, as "
                "distillation takes them to be",
                remedy="take `distill` out of the algorithm list",
            )


def distill(
    model: PreTrainedModel,
    plan: Plan,
    layers: Mapping[str, QuantizedLayer],
    windows: Sequence[Batch],
    teacher: Teacher,
    work: WorkFolder,
    advance: Callable[[str], None] = lambda _: None,
    originals: Mapping[str, Tensor] | None = None,
    weights: Tensor | None = None,
) -> Distilled:
    """Train the plan's distilled layers' scales, and codes where these move, and every norm.

    Args:
        model: quantized: its planned layers hold dequantized weights. Its weights and norms
            are replaced.
        plan: its ``distill`` step and the layers that name it.
        layers: every planned layer's result.
        windows: calibration text, ``[1, T]`` each.
        teacher: of the same windows.
        work: holds the state of training, which a resumed run goes on from.
        advance: called with a label after each step.
        originals: weights ``[N, K]`` that the solvers were given, the model's dtype, by layer;
            where codes move, for the layers that are trained.
        weights: of each prediction, fp32 ``[samples, T]``, of
            `quantkit.documents.prediction_weights`; None where all have 1.

    Raises:
        QuantkitError: the divergence on the held windows is NaN.
    """
    assert plan.distill is not None
    options = plan.distill.options
    held, trained = held_back(len(windows), options["seed"])
    training = _Training(model, plan, layers, options, originals or {})
    student = teacher.student(model.get_output_embeddings())

    def worth(i: int) -> Tensor | None:
        return None if weights is None else weights[i]

    def sum_of(i: int) -> float:
        return token_ids(windows[i]).numel() if weights is None else float(weights[i].sum())

    def on_held() -> float:
        total = 0.0
        for i in held.tolist():
            seen = head_input(model, windows[i])
            total += divergence(
                seen,
                teacher.hidden[i : i + 1].to(seen.device),
                student,
                teacher.predict,
                weights=worth(i),
            )
        if not math.isfinite(total):
            raise QuantkitError(
                "distillation: the divergence on held windows is NaN or infinite",
                remedy="lower `scale_lr`, `norm_lr` and `weight_lr`",
            )
        return total / sum(sum_of(i) for i in held.tolist())

    with training.active():
        saved = work.load_tensors("distill")
        before = on_held() if saved is None else float(saved["before"])
        first = 0 if saved is None else training.restore(saved)
        together = int(options["windows"])
        for step in range(options["steps"]):
            if step < first:
                advance("distill (resumed)")
                continue
            total = 0.0
            for k in range(step * together, (step + 1) * together):
                i = int(trained[k % len(trained)])
                with torch.enable_grad():
                    seen = head_input(model, windows[i], graph=True)
                    target = teacher.hidden[i : i + 1].to(seen.device)
                    weight = 1.0 / (together * sum_of(i))
                    total += weight * divergence(
                        seen, target, student, teacher.predict, weight, worth(i)
                    )
            training.step(learning_rate(step, int(options["steps"])))
            advance(f"distill, KL {total:.4f}")
            if (step + 1) % training.save_steps == 0 or step + 1 == options["steps"]:
                work.save_tensors("distill", training.state(step + 1, before))
        after = on_held()
        if not after < before:
            training.undo()
    answers = None
    if weights is not None:
        answers = round(float(weights[weights > 1].sum() / weights.sum()), 4)
    return Distilled(training.result(), before, after, len(held), answers)


class _Training:
    """The trained numbers, each relative to its start, and where they go in the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        layers: Mapping[str, QuantizedLayer],
        options: Mapping[str, Any],
        originals: Mapping[str, Tensor],
    ) -> None:
        self.plan, self.layers = plan, layers
        self.linears = models.linear_layers(model)
        self.moving = float(options["weight_lr"]) > 0
        self.save_steps = SAVE_STEPS_OF_CODES if self.moving else SAVE_STEPS
        self.weights: dict[str, Weight] = {}
        for name in (layer.name for layer in plan.layers if layer.distilled):
            weight = originals[name] if self.moving else self.linears[name].weight
            self.weights[name] = Weight(weight, layers[name].qtensor, codes=self.moving)
            if self.moving:
                memory.forget_pages(weight)
        offset = norm_offset(model)
        self.norms = models.norms(model)
        self.first_norms = {name: _weight(m).float().clone() for name, m in self.norms.items()}
        #: A norm's change is measured in the root mean square of what it multiplies by.
        self.sizes = {
            name: (w + offset).square().mean().sqrt() for name, w in self.first_norms.items()
        }
        self.deltas: dict[str, Tensor] = {}
        groups = []
        for kind, rate in _RATES.items():
            found = {
                f"{kind}:{name}": weight.numbers[kind]
                for name, weight in self.weights.items()
                if kind in weight.numbers
            }
            self.deltas |= found
            groups.append({"params": list(found.values()), "lr": float(options[rate])})
        moved = {f"norm:{name}": torch.zeros_like(w) for name, w in self.first_norms.items()}
        self.deltas |= moved
        groups.append({"params": list(moved.values()), "lr": float(options["norm_lr"])})
        groups = [group for group in groups if group["params"]]
        eps = EPSILON if self.moving else 1e-8
        self.adam = torch.optim.Adam(groups, betas=BETAS, eps=eps, fused=True)
        self.rates = [group["lr"] for group in self.adam.param_groups]
        #: fp32 leaves whose gradients `ScaledLinear` adds to; where codes move, a weight's own
        #: gradient is that of all its numbers.
        self.scales = {
            name: layers[name].qtensor.scale.float().requires_grad_()
            for name in ({} if self.moving else self.weights)
        }
        self.asked = {n: _weight(m).requires_grad for n, m in self.norms.items()}

    @contextmanager
    def active(self) -> Iterator[None]:
        """While active, the model computes with the trained scales, and its graph reaches them."""
        planned = [layer for layer in self.plan.layers if layer.block is not None]
        asked = {p: p.requires_grad for p in _parameters(self.linears)}
        trained = {self.linears[name].weight for name in self.weights if self.moving}
        for parameter in asked:
            parameter.requires_grad_(parameter in trained)
        for module in self.norms.values():
            _weight(module).requires_grad_(True)
        for layer in planned:
            module = self.linears[layer.name]
            module.__dict__["forward"] = self._forward(layer.name, module)
        try:
            with torch.no_grad():
                yield
        finally:
            for layer in planned:
                del self.linears[layer.name].__dict__["forward"]
            for name, module in self.norms.items():
                _weight(module).requires_grad_(self.asked[name])
                _weight(module).grad = None
            for parameter, before in asked.items():
                parameter.requires_grad_(before)
                parameter.grad = None

    def _forward(self, name: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        [planned] = [layer for layer in self.plan.layers if layer.name == name]
        spec, layer = planned.scheme.input, self.layers[name]

        def forward(x: Tensor) -> Tensor:
            if spec is not None:
                x = numerics.fake_quantize_through(x, spec, layer.input_scale)
            if name not in self.scales:
                return F.linear(x, module.weight, module.bias)
            out: Tensor = ScaledLinear.apply(
                x, self.scales[name], module.weight, layer.qtensor, module.bias
            )
            return out

        return forward

    def step(self, rate: float) -> None:
        """One step of Adam from the gradients that have gathered."""
        for name, scale in self.scales.items():
            assert scale.grad is not None
            self.deltas[f"scale:{name}"].grad = scale.grad * self.layers[name].qtensor.scale.float()
            scale.grad = None
        for name in self.weights if self.moving else ():
            parameter = self.linears[name].weight
            assert parameter.grad is not None
            self.weights[name].differentiate(parameter.grad)
            parameter.grad = None
        for name, module in self.norms.items():
            gradient = _weight(module).grad
            if gradient is not None:
                self.deltas[f"norm:{name}"].grad = gradient.float() * self.sizes[name]
                _weight(module).grad = None
        for group, full in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = full * rate
        self.adam.step()
        self.adam.zero_grad()
        for weight in self.weights.values():
            weight.confine()
        self._apply()

    def state(self, steps: int, before: float) -> dict[str, Tensor]:
        """Everything that training goes on from."""
        tensors = {
            "steps": torch.tensor(steps),
            "before": torch.tensor(before, dtype=torch.float64),
        }
        for key, delta in self.deltas.items():
            tensors[key] = delta
            for moment, value in self.adam.state.get(delta, {}).items():
                tensors[f"{moment}:{key}"] = value
        return tensors

    def restore(self, saved: Mapping[str, Tensor]) -> int:
        """Go on from `state`; returns how many steps are done."""
        for key, delta in self.deltas.items():
            delta.copy_(saved[key])
            names = ("step", "exp_avg", "exp_avg_sq")
            if f"step:{key}" in saved:
                self.adam.state[delta] = {n: saved[f"{n}:{key}"].clone() for n in names}
        self._apply()
        return int(saved["steps"])

    def undo(self) -> None:
        """Back to where training began."""
        for weight in self.weights.values():
            weight.reset()
        for name in self.norms:
            self.deltas[f"norm:{name}"].zero_()
        self._apply()

    def result(self) -> dict[str, QuantizedLayer]:
        """Every planned layer, trained or not, in the plan's order."""
        return {
            layer.name: replace(
                self.layers[layer.name], qtensor=self.weights[layer.name].quantized()
            )
            if layer.name in self.weights
            else self.layers[layer.name]
            for layer in self.plan.layers
        }

    def _apply(self) -> None:
        """Give the model's layers and norms what the trained numbers stand for."""
        for name, trained in self.weights.items():
            module = self.linears[name]
            module.weight.data = numerics.dequantize(trained.quantized(), module.weight.dtype)
        for name, norm in self.norms.items():
            weight = _weight(norm)
            moved = self.first_norms[name] + self.sizes[name] * self.deltas[f"norm:{name}"]
            weight.data = moved.to(weight.dtype)


#: A weight's numbers → the option that is their learning rate.
_RATES = {"scale": "scale_lr", "codes": "weight_lr"}


def _weight(module: nn.Module) -> nn.Parameter:
    parameter = module.weight
    assert isinstance(parameter, nn.Parameter)
    return parameter


def _parameters(linears: Mapping[str, nn.Linear]) -> Iterator[nn.Parameter]:
    for module in linears.values():
        yield from module.parameters(recurse=False)
