"""One block's work: its layers observed, solved and replaced, trained, and its outputs handed on.

`quantkit.calibrate` says in which order blocks come and what is kept of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantkit import memory, numerics
from quantkit import model as models
from quantkit.algorithms import Stats
from quantkit.batches import Batch
from quantkit.collector import Collector
from quantkit.errors import QuantkitError
from quantkit.folding import norm_offset
from quantkit.kv_cache import BlockCache, CacheEntry, CacheRange, quantized_caches
from quantkit.parallel import World
from quantkit.paused import Spine, run_paused, run_repeated, trace_groups
from quantkit.plan import Plan, PlannedLayer
from quantkit.progress import Steps
from quantkit.quantize import QuantizedLayer, quantize_group, quantized_inputs
from quantkit.recipe import Step
from quantkit.reconstruct import Block, Windows, reconstruct
from quantkit.reference import original_weights, unquantized
from quantkit.rotation import residual_writer
from quantkit.routing import ExpertTokens
from quantkit.spill import HiddenFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantkit.importance import Importance


class Blocks:
    """What is done to a block, and what passes from one to the next.

    Hidden states are lists of ``[B, T, hidden]`` in the model's dtype, one a batch; a block's index
    counts through all lists of blocks.

    Args:
        model: whose weights are replaced.
        plan: what becomes of them.
        batches: this process's calibration inputs; none where nothing is calibrated.
        observer: turns static activations into a range.
        experts: counts the tokens that each expert sees.
        spine: the list of blocks at work.
        steps: told of every pass through a block.
        together: the processes that have the other batches.

    Attributes:
        linears: the model's linear layers by name.
        exact: hidden states of the unquantized model, where a solver compares with them.
        importance: what errors cost, where a solver does not take tokens or outputs to be alike.
        caches: ranges of keys and values found so far, by attention module.
        norms: weights of the norms of the block that is finished, if they were trained.
        originals: weights that the solvers were given, of layers whose codes move once all are
            solved.
        solve_seconds: time in solvers.
        training: steps that training one block takes, and the pass behind it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        batches: Sequence[Batch],
        observer: Step,
        experts: ExpertTokens,
        spine: Spine,
        steps: Steps,
        together: World,
    ) -> None:
        self.model = model
        self.plan = plan
        self.batches = batches
        self.observer = observer
        self.experts = experts
        self.spine = spine
        self.steps = steps
        self.together = together
        self.linears = models.linear_layers(model)
        self.attentions = {name: model.get_submodule(name) for name in plan.caches}
        self.exact: list[Tensor] = []
        self.importance: Importance | None = None
        self.caches: dict[str, CacheRange] = {}
        self.norms: dict[str, Tensor] = {}
        self.latent = plan.latent
        self.originals: dict[str, Tensor] = {}
        self.groups: list[list[str]] | None = None
        self.solve_seconds = 0.0
        self.training = training_steps(plan, batches)
        self.spilled = False
        self.keep: Callable[[str, Tensor], Tensor] = lambda _, x: x
        self.run_groups = run_paused

    def spill(self, folder: Path) -> None:
        """Hold hidden states in a folder from now on.

        Raises:
            UsageError, QuantkitError: the folder cannot be created.
        """
        self.spilled = True
        self.keep = HiddenFiles(folder).keep
        self.run_groups = run_repeated

    def run_exact(self, index: int) -> list[Tensor]:
        """What the unquantized model has behind a block, as long as its weights are the block's.

        Args:
            index: the block's, through all lists.

        Returns:
            a batch's hidden states ``[B, T, hidden]`` each, in the model's dtype.
        """
        runs = self.calls(index, self.exact)
        return [self.keep(f"exact.{i}", run()) for i, run in enumerate(runs)]

    def quantized_caches(self, index: int | None = None) -> AbstractContextManager[None]:
        """While active, keys and values are rounded by the ranges that were found: one block's, or
        all."""
        names = self.plan.caches if index is None else self.plan.caches_in(index)
        entries = {
            name: CacheEntry(self.caches[name].spec, self.caches[name].scales(self.model.dtype))
            for name in names
        }
        return quantized_caches(self.attentions, entries)

    def finish(
        self, index: int, layers: Mapping[str, PlannedLayer], hidden: list[Tensor]
    ) -> tuple[dict[str, QuantizedLayer], list[Tensor]]:
        """A block's layers, solved and, where the plan says so, trained; and its outputs."""
        done = self.steps.done + len(hidden) + self.training
        self.norms = {}
        originals = {n: self.linears[n].weight for n, x in layers.items() if x.reconstructed}
        reread = [self.linears[name].weight for name in layers] if self.plan.needs_reference else []
        if self.plan.needs_reference and not self.plan.needs_drift:
            self.exact = self.run_exact(index)
        solved, outputs = self._solve(index, layers, hidden)
        if originals:
            del outputs
            solved = self._train(index, layers, solved, originals, hidden)
            outputs = self.propagate(index, layers, solved, hidden, "trained")
        for weight in reread:  # by the unquantized pass and by training, behind `install`
            memory.forget_pages(weight)
        self.steps.done = done
        return solved, outputs

    def _train(
        self,
        index: int,
        layers: Mapping[str, PlannedLayer],
        solved: Mapping[str, QuantizedLayer],
        originals: Mapping[str, Tensor],
        hidden: list[Tensor],
    ) -> dict[str, QuantizedLayer]:
        step = self.plan.reconstruction
        assert step is not None
        memory.trim_heap()  # the passes' leave it to training
        local = index - self.spine.first
        prefix = f"{self.spine.prefix}.{local}."
        module = self.spine.blocks[local]
        block = Block(
            module,
            lambda x: self.calls(index, [x])[0](),
            {name: self.linears[name] for name in layers},
            layers,
            solved,
            originals,
            {prefix + name: norm for name, norm in models.norms(module).items()},
            norm_offset(self.model),
        )
        writer = f"{prefix}{residual_writer(self.model)}"
        trained = reconstruct(
            block,
            Windows.of(hidden, self.exact, writer, self.importance),
            step,
            seed=step.options["seed"] + index,
            advance=lambda what: self.steps.advance(
                f"block {index + 1}/{self.plan.blocks}: {what}"
            ),
        )
        self.norms = dict(trained.norms)
        return trained.layers

    def _solve(
        self, index: int, layers: Mapping[str, PlannedLayer], hidden: list[Tensor]
    ) -> tuple[dict[str, QuantizedLayer], list[Tensor]]:
        """One pass through the block, stopping in front of every group of layers.

        With feedback, each batch's unquantized pass runs in front of its quantized one.
        """
        runs = self.calls(index, hidden)
        outputs: list[Tensor | None] = [None] * len(runs)
        streams = 2 if self.plan.needs_drift else 1
        exact_inputs: dict[tuple[int, str], Tensor] = {}
        groups = self._groups(index, layers, runs[0]) if layers else []
        by_leader = {group[0]: group for group in groups}
        collectors: dict[str, Collector] = {}
        results: dict[str, QuantizedLayer] = {}
        cache = BlockCache(self.plan.caches_in(index), self.plan.kv, self.observer)

        def observe(index: int, leader: str, x: Tensor) -> None:
            if leader in cache.sides:
                if index % streams == streams - 1:
                    cache.observe(leader, x)
                return
            batch = index // streams
            if index % streams != streams - 1:
                exact_inputs[batch, leader] = x
                return
            if leader not in collectors:
                members = [layers[name] for name in by_leader[leader]]
                collectors[leader] = Collector(
                    members, self.observer, self.importance, self.together
                )
            exact = exact_inputs.pop((batch, leader), None)
            if streams == 2 and (exact is None or exact.shape != x.shape):
                raise QuantkitError(
                    f"{leader}: the quantized and the unquantized model send it other tokens",
                    remedy="set `feedback: 0` for layers that a router chooses",
                )
            collectors[leader].update(x, exact)

        def solve(leader: str) -> None:
            if leader in cache.sides:
                cache.solve(leader, self.model.dtype, self.together)
                return
            began = time.monotonic()
            collector = collectors.pop(leader)
            solved = collector.solve(self.linears)
            self.experts.add(leader, collector.tokens)
            self.solve_seconds += time.monotonic() - began
            self.install(solved)
            results.update(solved)
            # What solving took lies in the heap between the tensors of the paused passes.
            memory.trim_heap()

        def finished(run: int, out: Tensor) -> None:
            batch = run // streams
            if run % streams != streams - 1:
                self.exact[batch] = self.keep(f"exact.{batch}", out)
                return
            if not numerics.is_finite(out):
                raise QuantkitError(
                    f"block {index}: the output holds NaN or infinite values",
                    remedy="the model overflows in its dtype on this data; load it in another",
                )
            outputs[batch] = self.keep(f"hidden.{batch}", out)
            self.steps.advance(f"block {index + 1}/{self.plan.blocks}")

        if streams == 2:
            exact = [unquantized(run) for run in self.calls(index, self.exact)]
            runs = [run for pair in zip(exact, runs, strict=True) for run in pair]
        leaders = [*cache.sides.items(), *((g[0], self.linears[g[0]]) for g in groups)]
        planned = {name: self.linears[name] for name in (layers if streams == 2 else ())}
        block = self.spine.blocks[index - self.spine.first]
        with (
            memory.bounded_heap(),
            quantized_inputs(self.linears, layers, results),
            original_weights(planned),
            quantized_caches(self.attentions, cache.entries),
            models.expert_inputs(block, self.experts.mode),
        ):
            self.run_groups(runs, leaders, observe, solve, finished)
        if self.plan.needs_data:
            self.experts.check(layers)
        else:
            unseen = {name: layer for name, layer in layers.items() if name not in results}
            results |= self.solve_without_data(unseen) if unseen else {}
        self.caches |= cache.found()
        return results, [out for out in outputs if out is not None]

    def propagate(
        self,
        index: int,
        layers: Mapping[str, PlannedLayer],
        saved: Mapping[str, QuantizedLayer],
        hidden: list[Tensor],
        label: str,
    ) -> list[Tensor]:
        outputs = []
        with quantized_inputs(self.linears, layers, saved), self.quantized_caches(index):
            for i, run in enumerate(self.calls(index, hidden)):
                outputs.append(self.keep(f"hidden.{i}", run()))
                self.steps.advance(f"block {index + 1}/{self.plan.blocks} ({label})")
        return outputs

    def solve_without_data(self, layers: Mapping[str, PlannedLayer]) -> dict[str, QuantizedLayer]:
        results: dict[str, QuantizedLayer] = {}
        for layer in layers.values():
            weight = {layer.name: self.linears[layer.name].weight}
            results.update(quantize_group([layer], weight, Stats(), None, None))
        self.install(results)
        return results

    def solve_head(
        self, layers: Mapping[str, PlannedLayer], hidden: list[Tensor]
    ) -> dict[str, QuantizedLayer]:
        if not self.batches:
            self.steps.advance("head")
            return self.solve_without_data(layers)
        members = list(layers.values())
        collector = Collector(members, self.observer, self.importance, self.together)
        with memory.bounded_heap():
            for i, ids in enumerate(self.batches):
                [x] = self.spine.head_inputs([ids], [hidden[i]])
                exact = None
                if self.exact:
                    [exact] = self.spine.head_inputs([ids], [self.exact[i]])
                collector.update(x, exact)
                self.steps.advance("head")
            return collector.solve(self.linears)

    def _groups(
        self, index: int, layers: Mapping[str, PlannedLayer], run: Callable[[], Tensor]
    ) -> list[list[str]]:
        """Names of the block's layers by common input; the first block is traced, and its
        pattern holds for every block with the same layers."""
        local = index - self.spine.first
        prefix = f"{self.spine.prefix}.{local}."
        relative = {name[len(prefix) :] for name in layers}
        if self.groups is None or {n for g in self.groups for n in g} != relative:
            modules = {name: self.linears[name] for name in layers}
            with models.expert_inputs(self.spine.blocks[local], self.experts.traced_mode):
                traced = trace_groups(run, modules)
            self.groups = [[name[len(prefix) :] for name in group] for group in traced]
        return [[prefix + name for name in group] for group in self.groups]

    def calls(self, index: int, hidden: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
        """For each batch, a function that runs this block of the model on it."""
        runs = self.spine.calls(index - self.spine.first, hidden)
        if not self.spilled:
            return runs
        return [_forgetting(run, x) for run, x in zip(runs, hidden, strict=True)]

    def install(self, layers: Mapping[str, QuantizedLayer]) -> None:
        """Give layers their dequantized weights."""
        for name, layer in layers.items():
            module = self.linears[name]
            original = module.weight
            if name in self.latent:
                self.originals.setdefault(name, original.detach())
            weight = numerics.dequantize(layer.qtensor, original.dtype).to(original.device)
            module.weight = nn.Parameter(weight, requires_grad=False)
            memory.forget_pages(original)

    def install_norms(self, norms: Mapping[str, Tensor]) -> None:
        """Give norms the weights that training left them with."""
        for name, weight in norms.items():
            norm = self.model.get_submodule(name)
            norm.weight = nn.Parameter(weight.to(self.model.device), requires_grad=False)

    def release(self, layers: Mapping[str, PlannedLayer]) -> None:
        """Drop the weights of layers that have run for the last time."""
        for name in layers:
            module = self.linears[name]
            empty = torch.empty(0, dtype=module.weight.dtype)
            module.weight = nn.Parameter(empty, requires_grad=False)


def _forgetting(run: Callable[[], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """A pass behind which its input, which is mapped from a file, leaves memory again."""

    def once() -> Tensor:
        try:
            return run()
        finally:
            memory.forget_pages(x)

    return once


def training_steps(plan: Plan, batches: Sequence[Batch]) -> int:
    """Steps of one block's training and of the pass behind it; 0 where blocks are not trained."""
    step = plan.reconstruction
    return 0 if step is None else step.options["steps"] + len(batches)
