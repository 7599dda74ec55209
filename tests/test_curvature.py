"""The second-order estimate and the ablations against KL that is computed outright."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantkit import model as models
from quantkit.ablation import measure_ablations
from quantkit.curvature import Curvature, measure_curvature
from quantkit.errors import UsageError
from quantkit.mixture import candidate
from quantkit.schemes import SCHEMES

LABELS = ("w3a16-g64", "w4a16-g32", "w5a16-g64", "w8a16-g64")
LENGTH = 24


def schemes(*labels: str) -> dict:
    return {label: candidate(label)[0] for label in labels}


@pytest.fixture(scope="module")
def source(tiny_untied: Path) -> models.SourceModel:
    return models.load_source(str(tiny_untied), dtype=torch.float32)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (96, LENGTH), generator=generator)


@pytest.fixture(scope="module")
def measured(source: models.SourceModel, ids: Tensor) -> Curvature:
    names = [n for n in models.linear_layers(source.model) if n != "lm_head"]
    keep = [(name, label) for name in names for label in LABELS]
    return measure_curvature(source, ids, schemes(*LABELS), "rtn", keep=keep)


@torch.no_grad()
def predictions(source: models.SourceModel, ids: Tensor) -> Tensor:
    """Log-probabilities in fp64 of a whole forward pass."""
    return source.model(ids).logits.double().log_softmax(-1)  # type: ignore[no-any-return]


def divergence(
    source: models.SourceModel, ids: Tensor, before: Tensor, name: str, delta: Tensor
) -> float:
    """KL a token of what one layer's change makes of the predictions."""
    module = models.linear_layers(source.model)[name]
    weight = module.weight
    module.weight = nn.Parameter(weight + delta, requires_grad=False)
    after = predictions(source, ids)
    module.weight = weight
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.fixture(scope="module")
def exact(
    source: models.SourceModel, ids: Tensor, measured: Curvature
) -> dict[tuple[str, str], float]:
    """KL of a small step along ΔW, scaled back: ½⟨ΔW, F ΔW⟩ by finite differences."""
    half, step = ids[len(ids) // 2 :], 0.1
    before = predictions(source, half)
    return {
        (name, label): divergence(source, half, before, name, step * delta) / step**2
        for (name, label), delta in measured.kept.items()
    }


def test_it_equals_finite_differences(
    exact: dict[tuple[str, str], float], measured: Curvature
) -> None:
    """Each within its own error and what pooling assumes."""
    for (name, label), kl in exact.items():
        found = measured.estimates[name][label]
        assert abs(found.kl - kl) < 4 * found.error + 0.1 * kl, (name, label, found, kl)
        assert found.error < 0.3 * found.kl


def test_the_mean_is_unbiased(exact: dict[tuple[str, str], float], measured: Curvature) -> None:
    """Over all layers and schemes the noise of the labels cancels down to a few percent."""
    pairs = [(measured.estimates[name][label], kl) for (name, label), kl in exact.items()]
    for ratios in ([e.kl / kl for e, kl in pairs], [e.direct / kl for e, kl in pairs]):
        assert abs(sum(ratios) / len(ratios) - 1) < 0.1


def test_pooling_lowers_the_noise(exact: dict[tuple[str, str], float], measured: Curvature) -> None:
    pairs = [(measured.estimates[name][label], kl) for (name, label), kl in exact.items()]
    pooled = sum((e.kl / kl - 1) ** 2 for e, kl in pairs)
    direct = sum((e.direct / kl - 1) ** 2 for e, kl in pairs)
    assert pooled < 0.6 * direct


def test_fewer_bits_cost_more(measured: Curvature) -> None:
    for name, by_scheme in measured.estimates.items():
        costs = [by_scheme[label].kl for label in LABELS]
        assert costs == sorted(costs, reverse=True), name


def test_layers_of_one_input_are_a_group(measured: Curvature) -> None:
    leaves = [tuple(name.rpartition(".")[2] for name in group) for group in measured.groups]
    block = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert leaves == 2 * block


def test_ablations_equal_whole_forward_passes(
    source: models.SourceModel, ids: Tensor, measured: Curvature
) -> None:
    names = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    deltas = {(name, "w3a16-g64"): measured.kept[name, "w3a16-g64"] for name in names}
    before = {n: m.weight for n, m in models.linear_layers(source.model).items()}
    alone, together = measure_ablations(source, ids[:3], deltas)
    for (name, label), kl in alone.items():
        exact = divergence(source, ids[:3], predictions(source, ids[:3]), name, deltas[name, label])
        assert kl == pytest.approx(exact, rel=1e-3, abs=1e-7)
    assert 0.3 * sum(alone.values()) < together < 3 * sum(alone.values())
    assert all(m.weight is before[n] for n, m in models.linear_layers(source.model).items())


def test_the_solver_does_not_see_what_it_is_judged_on(
    source: models.SourceModel, ids: Tensor
) -> None:
    """GPTQ's rounding depends on the first half of the windows alone."""
    name = "model.layers.0.mlp.down_proj"
    other = torch.cat([ids[:8], ids[40:48]])
    keep = [(name, "w4a16-g32")]
    first = measure_curvature(source, ids[:16], schemes("w4a16-g32"), "gptq", keep=keep)
    again = measure_curvature(source, other, schemes("w4a16-g32"), "gptq", keep=keep)
    assert torch.equal(first.kept[keep[0]], again.kept[keep[0]])
    assert first.estimates[name] != again.estimates[name]


def test_it_is_deterministic_and_leaves_the_model_alone(
    source: models.SourceModel, ids: Tensor
) -> None:
    before = {n: m.weight.clone() for n, m in models.linear_layers(source.model).items()}
    runs = [measure_curvature(source, ids[:4], schemes("w4a16-g64"), "gptq") for _ in range(2)]
    assert runs[0].estimates == runs[1].estimates
    for name, module in models.linear_layers(source.model).items():
        assert torch.equal(module.weight, before[name])
        assert module.weight.grad is None


@pytest.mark.parametrize(
    ("label", "rows", "solver", "message"),
    [
        ("w4a16-g64", 1, "rtn", "one half is solved on"),
        ("w4a16-g64", 4, "awq", "unknown solver 'awq'"),
        ("w8a8", 4, "rtn", "quantizes activations"),
        ("w4a16-g256", 4, "rtn", "none of the schemes fits its 384 columns"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    source: models.SourceModel, ids: Tensor, label: str, rows: int, solver: str, message: str
) -> None:
    scheme = SCHEMES.get(label) or candidate(label)[0]
    with pytest.raises(UsageError, match=message):
        measure_curvature(source, ids[:rows], {label: scheme}, solver)
