"""Paused forward passes: every layer once, after its quantization, in the model's own order."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantkit import model as models
from quantkit.errors import QuantkitError
from quantkit.paused import Spine, run_paused, run_repeated, trace_groups
from tests.conftest import tiny_llama


@pytest.fixture
def spine() -> Spine:
    return Spine(tiny_llama(dtype=torch.float32))


def batches(*sizes: int) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (size, 16), generator=gen) for size in sizes]


def test_block_by_block_equals_the_whole_model(spine: Spine) -> None:
    ids = batches(2, 2, 1)
    with torch.no_grad():
        hidden = spine.embed(ids)
        for i in range(len(spine.blocks)):
            hidden = [run() for run in spine.calls(i, hidden)]
        for x, rows, head_input in zip(ids, hidden, spine.head_inputs(ids, hidden), strict=True):
            out = spine.model(x, output_hidden_states=True)
            torch.testing.assert_close(head_input, out.hidden_states[-1])
            torch.testing.assert_close(spine.model.lm_head(head_input), out.logits)
            assert rows.shape == (*x.shape, 384)


def test_groups_are_found_by_common_input(spine: Spine) -> None:
    hidden = spine.embed(batches(1))
    block = spine.blocks[0]
    layers = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    groups = trace_groups(spine.calls(0, hidden)[0], layers)
    assert groups == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def test_a_layer_that_never_runs_is_an_error(spine: Spine) -> None:
    hidden = spine.embed(batches(1))
    with pytest.raises(QuantkitError, match="idle: no calibration token reached"):
        trace_groups(spine.calls(0, hidden)[0], {"idle": torch.nn.Linear(4, 4)})


@pytest.mark.parametrize("run_groups", [run_paused, run_repeated])
def test_replacing_a_layer_changes_what_follows_and_nothing_before(
    run_groups: Callable[..., None], spine: Spine
) -> None:
    """The paused pass must equal an ordinary pass through the replaced layers."""
    ids = batches(2, 1)
    block = spine.blocks[0]
    linears = dict(models.linear_layers(block))
    leaders = [(n, linears[n]) for n in ("self_attn.q_proj", "mlp.down_proj")]
    hidden = spine.embed(ids)
    events: list[str] = []
    outputs: dict[int, torch.Tensor] = {}

    def solve(name: str) -> None:
        events.append(f"solve {name}")
        linears[name].weight.data *= 0.5

    run_groups(
        spine.calls(0, hidden),
        leaders,
        lambda _, name, x: events.append(f"see {name} {tuple(x.shape)}"),
        solve,
        lambda i, out: outputs.__setitem__(i, out),
    )
    assert events == [
        "see self_attn.q_proj (2, 16, 384)",
        "see self_attn.q_proj (1, 16, 384)",
        "solve self_attn.q_proj",
        "see mlp.down_proj (2, 16, 768)",
        "see mlp.down_proj (1, 16, 768)",
        "solve mlp.down_proj",
    ]
    with torch.no_grad():
        for i, run in enumerate(spine.calls(0, hidden)):
            torch.testing.assert_close(outputs[i], run())


def test_repeated_passes_hold_one_batch_at_a_time(spine: Spine) -> None:
    hidden = spine.embed(batches(1, 1, 1))
    linears = dict(models.linear_layers(spine.blocks[0]))
    leaders = [(n, linears[n]) for n in ("self_attn.o_proj", "mlp.down_proj")]
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def observe(_: int, __: str, x: torch.Tensor) -> None:
        seen.append(weakref.ref(x))
        alive.append(sum(ref() is not None for ref in seen))

    for run_groups, most in ((run_paused, 3), (run_repeated, 1)):
        seen.clear()
        alive.clear()
        calls = spine.calls(0, hidden)
        run_groups(calls, leaders, observe, lambda _: gc.collect(), lambda *_: None)
        assert max(alive) == most
        assert len(alive) == 6


@pytest.mark.parametrize("run_groups", [run_paused, run_repeated])
def test_an_error_while_solving_leaves_no_hook_behind(
    run_groups: Callable[..., None], spine: Spine
) -> None:
    hidden = spine.embed(batches(1, 1))
    linear = spine.blocks[0].self_attn.q_proj

    def fail(name: str) -> None:
        raise QuantkitError("no")

    with pytest.raises(QuantkitError, match="no"):
        run_groups(spine.calls(0, hidden), [("q", linear)], lambda *_: None, fail, lambda *_: None)
    assert not linear._forward_pre_hooks


def test_the_model_is_as_before_after_embedding(tiny: Path) -> None:
    loaded = models.load_source(str(tiny))
    ids = batches(1)[0]
    with torch.no_grad():
        before = loaded.model(ids).logits
        Spine(loaded.model).embed([ids])
        assert torch.equal(loaded.model(ids).logits, before)
