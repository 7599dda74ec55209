"""The calibration loop: for each block, rotate → rescale → observe → solve → replace → propagate.

A block whose rounding is trained on its output (`quantkit.reconstruct`) is so between the last two.

Statistics live for one block. What persists, and what a resumed run starts from, are the
finished blocks in the work folder (`quantkit.work`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from quantkit import memory, numerics
from quantkit import model as models
from quantkit.algorithms import Stats
from quantkit.batches import (
    Batch,
    CalibrationData,
    Probe,
    cut_batches,
    random_batch,
    rows,
)
from quantkit.collector import Collector
from quantkit.distill import Distilled, Teacher, distill
from quantkit.errors import QuantkitError, UsageError
from quantkit.folding import apply_scales
from quantkit.footprint import spills
from quantkit.importance import Importance
from quantkit.integrity import check_block
from quantkit.kv_cache import BlockCache, CacheEntry, CacheRange, quantized_caches
from quantkit.machine import environment
from quantkit.parallel import ALONE, World, check_alike
from quantkit.paused import find_spines, head_input, run_paused, run_repeated, trace_groups
from quantkit.plan import Plan, PlannedLayer
from quantkit.progress import Progress, silent
from quantkit.quantize import QuantizedLayer, quantize_group, quantized_inputs
from quantkit.recipe import Step
from quantkit.reconstruct import Block, Windows, check_windows, reconstruct
from quantkit.reference import original_weights, unquantized
from quantkit.rescale import choose_scales
from quantkit.rotation import residual_writer, rotate_block, rotate_ends
from quantkit.routing import ExpertTokens
from quantkit.spill import HiddenFiles
from quantkit.work import HEAD, WorkFolder

P = ParamSpec("P")
T = TypeVar("T")

#: Windows that a data-free recipe runs, only to measure output errors.
PROBE_WINDOWS = 8


def calibrate(
    source: models.SourceModel,
    plan: Plan,
    data: CalibrationData | None,
    work: Path,
    *,
    observer: Step | None = None,
    min_expert_tokens: int = 1,
    all_experts: bool = False,
    resume: bool = False,
    release: bool = False,
    activation_memory: int | None = None,
    progress: Progress = silent,
    together: World = ALONE,
) -> Calibrated:
    """Quantize every planned layer; the model's weights are replaced as it goes.

    Several processes run their shares of the windows. The first one solves and writes, and what it
    returns is whole; the others return no layers.

    Args:
        source: the model; afterwards it computes with the dequantized weights.
        plan: from `quantkit.plan.make_plan`.
        data: calibration tokens; None only when the plan needs none.
        work: folder for finished blocks.
        observer: turns static activations into a range; min-max by default.
        min_expert_tokens: that every expert must see; with fewer the run fails.
        all_experts: observe every expert on every token, not on those routed to it.
        resume: continue from the finished blocks in ``work``.
        release: drop each block's weights when nothing needs them any more; the model
            cannot be run afterwards.
        activation_memory: bytes of hidden states to hold; where the plan's need more, they lie
            on disk between blocks and passes are repeated instead of paused. The result is the
            same to the bit. None holds all.
        progress: called as (done, total, label), one step a batch and group.
        together: the processes that calibrate this model.

    Raises:
        UsageError: no data where the plan needs some, ``work`` belongs to another run, or one
            batch of hidden states is more than ``activation_memory``.
        QuantkitError: NaN, a Hessian that cannot be factored, a layer no token reached, an expert
            that too few did.
    """
    if plan.needs_data and data is None:
        raise UsageError("this recipe calibrates, and there is no data", remedy="give --data FILE")
    observer = observer or Step("minmax")
    state: dict[str, Any] = {
        "weights": source.weight_hash,
        "plan": plan.digest,
        "data": data.hash if data else None,
        "observer": [observer.name, {k: str(v) for k, v in sorted(observer.options.items())}],
        # Blocks made by another arithmetic would give a checkpoint that nothing can rebuild.
        **environment(source.model.device),
    }
    if all_experts:
        state["all_experts"] = True
    spilled = spills(plan, activation_memory)
    if together.size > 1 and (spilled or plan.signround):
        what = "--activation-memory" if spilled else "signround"
        raise UsageError(
            f"{what}: goes through all windows of a block, and they are in {together.size} "
            "processes",
            remedy="start one process, or leave it out",
        )
    inputs = {key: value for key, value in state.items() if key in ("weights", "plan", "data")}
    check_alike(together, "model, recipe or data", inputs)
    # The others have no folder: nothing is asked of a file system that all of them would share.
    folder = WorkFolder(work, state, resume=resume) if together.leads else None
    if plan.unties_head:
        models.untie(source.model)
    ids = None if data is None else data.ids if plan.needs_data else data.ids[:PROBE_WINDOWS]
    with torch.no_grad():
        experts = ExpertTokens(source.model, min_expert_tokens, all_tokens=all_experts)
        batches = _batches(data, ids, together)
        loop = _Loop(
            source, plan, batches, ids, observer, experts, folder, release, progress, together
        )
        if spilled:
            loop.spill()
        layers, probe, distilled = loop.run()
    return Calibrated(layers, probe, loop.solve_seconds, distilled, loop.caches)


def _batches(data: CalibrationData | None, ids: Tensor | None, together: World) -> Sequence[Batch]:
    if data is None or ids is None:
        return []
    return together.share(data.batches or cut_batches(ids, together.size))


@dataclass(frozen=True)
class Calibrated:
    """What the loop made.

    Attributes:
        layers: every planned layer's result, in the plan's order; the tensors are mapped
            from the work folder, which must live as long as they do.
        probe: for checking a reload.
        solve_seconds: time in solvers; the rest of the loop's time is forward passes and
            statistics.
        distilled: what training the whole model came to, where the recipe asks for it.
        caches: ranges of keys and values by attention module, where they are quantized.
    """

    layers: dict[str, QuantizedLayer]
    probe: Probe
    solve_seconds: float
    distilled: Distilled | None = None
    caches: Mapping[str, CacheRange] = field(default_factory=dict)


class _Loop:
    def __init__(
        self,
        source: models.SourceModel,
        plan: Plan,
        batches: Sequence[Batch],
        ids: Tensor | None,
        observer: Step,
        experts: ExpertTokens,
        work: WorkFolder | None,
        release: bool,
        progress: Progress,
        together: World,
    ) -> None:
        self.model = source.model
        self.plan = plan
        self.spines = find_spines(source.model)
        self.spine = self.spines[0]  # whose blocks are at work
        self.together = together
        self.batches = batches  # of this process
        self.ids = ids  # of all
        #: Tokens that every layer sees; None where an encoder's and its decoder's differ.
        self.tokens: int | None = None
        if len(self.spines) == 1 and all(isinstance(batch, Tensor) for batch in batches):
            own = sum(batch.numel() for batch in batches if isinstance(batch, Tensor))
            self.tokens = sum(together.agree(own))
        self.observer = observer
        self.experts = experts
        self.work = work
        self.release = release
        self.linears = models.linear_layers(source.model)
        head = plan.in_block(None)
        rescaled = len({fold.block for fold in plan.folds})
        self.total = (plan.blocks + rescaled + (1 if head else 0)) * max(1, len(batches))
        windows = sum(rows(batch) for batch in batches)
        self.total += windows if plan.needs_fisher else 0
        #: Steps of a block's training, and the pass behind it.
        self.training = 0
        if plan.signround:
            check_windows(batches)
            self.training = plan.signround.options["steps"] + len(batches)
            self.total += plan.blocks * self.training
        self.total += windows + plan.distill.options["steps"] if plan.distill else 0
        self.done = 0
        self.progress = progress
        self.groups: list[list[str]] | None = None
        self.solve_seconds = 0.0
        # Hidden states of the unquantized model, where a solver compares with them.
        self.exact: list[Tensor] = []
        # What errors cost, where a solver does not take tokens or outputs to be alike.
        self.importance: Importance | None = None
        self.attentions = {name: source.model.get_submodule(name) for name in plan.caches}
        self.caches: dict[str, CacheRange] = {}
        self._keep: Callable[[str, Tensor], Tensor] = lambda _, x: x
        self._run_groups = run_paused

    def spill(self) -> None:
        """Hold hidden states on disk from now on. UsageError for a model on another device."""
        if self.model.device.type != "cpu":
            raise UsageError(
                f"--activation-memory: hidden states are on {self.model.device.type}",
                remedy="leave it out, or calibrate on the CPU",
            )
        assert self.work is not None
        self._keep = HiddenFiles(self.work.path / "hidden").keep
        self._run_groups = run_repeated

    def run(self) -> tuple[dict[str, QuantizedLayer], Probe, Distilled | None]:
        results: dict[str, QuantizedLayer] = {}
        models.bring_in(self.model, skip=[spine.blocks for spine in self.spines])
        starts = {spine.first: spine for spine in self.spines}
        if self.plan.needs_fisher:
            self.importance = Importance(
                self.model,
                self.plan,
                self._windows(),
                self.work,
                lambda: self._advance("token weights"),
                self.together,
            )
        teacher = self._teacher() if self.plan.distill and self.together.leads else None
        if self.plan.rotation is not None:
            rotate_ends(self.model, self.plan.rotation)
        hidden: list[Tensor] = []
        for index in range(self.plan.blocks):
            if index in starts:
                self.spine = starts[index]
                hidden = self._embed(hidden)
                self.exact = list(hidden) if self.plan.needs_reference else []
                if self.plan.signround is not None:  # learns to call blocks on so many windows
                    self.spine.embed([self._windows()[: self.plan.signround.options["windows"]]])
            layers = self.plan.in_block(index)
            models.bring_in(self.spine.blocks[index - self.spine.first])
            if self.plan.rotation is not None:
                rotate_block(self.model, index, self.plan.rotation)
            self._rescale(index, layers, hidden)
            saved = self._on_disk(WorkFolder.load, index, layers)
            if saved is not None:
                self.exact = self._run_exact(index)
                self._install(saved)
                if self.plan.kv is not None:
                    self.caches |= self._on_disk(WorkFolder.load_caches, index, self.plan.kv)
                hidden = self._propagate(index, layers, saved, hidden, "resumed")
                self.done += self.training
            elif hidden:
                block, hidden = self._finish_block(index, layers, hidden)
                if self.plan.kv is not None:
                    found = {name: self.caches[name] for name in self.plan.caches_in(index)}
                    self._on_disk(WorkFolder.save_caches, index, found)
                saved = self._on_disk(WorkFolder.save, index, block, layers)
            else:
                block = self._solve_without_data(layers)
                saved = self._on_disk(WorkFolder.save, index, block, layers)
            check_block(layers, saved, self.tokens)
            if self.together.leads:  # mapped from files there, in memory elsewhere
                results.update(saved)
            if self.release and hidden and self.plan.distill is None:
                self._release(layers)
            memory.trim_heap()
        head = self.plan.in_block(None)
        if head:
            saved = self._on_disk(WorkFolder.load, HEAD, head)
            if saved is None:
                solved = self._solve_head(head, hidden)
                saved = self._on_disk(WorkFolder.save, HEAD, solved, head)
            check_block(head, saved, self.tokens)
            self._install(saved)
            if self.together.leads:
                results.update(saved)
        if not self.together.leads:
            return {}, Probe(self.batches[0], hidden[0]), None
        ordered = {layer.name: results[layer.name] for layer in self.plan.layers}
        if teacher is None:
            return ordered, self._probe(ordered, hidden), None
        trained = self._distill(ordered, teacher)
        return trained.layers, self._probe(trained.layers, []), trained

    def _embed(self, encoded: list[Tensor]) -> list[Tensor]:
        """Hidden states in front of the spine's first block; a batch at a time where it is the
        only one, else behind an encoder's."""
        alone = len(self.spines) == 1
        parts = [[batch] for batch in self.batches] if alone else [self.batches]
        found = (x for part in parts for x in self.spine.embed(part, encoded))
        return [self._keep(f"hidden.{i}", x) for i, x in enumerate(found)]

    def _run_exact(self, index: int) -> list[Tensor]:
        """What the unquantized model has behind a block, as long as its weights are the block's."""
        runs = self._calls(index, self.exact)
        return [self._keep(f"exact.{i}", run()) for i, run in enumerate(runs)]

    def _probe(self, results: Mapping[str, QuantizedLayer], hidden: list[Tensor]) -> Probe:
        ids: Batch
        if hidden:
            ids = self.batches[0]
            return Probe(ids, next(self.spine.head_inputs([ids], hidden[:1])))
        if self.batches:
            ids = self.batches[0]
        else:
            ids = random_batch(self.model)
        planned = {layer.name: layer for layer in self.plan.layers}
        with quantized_inputs(self.linears, planned, results), self._quantized_caches():
            return Probe(ids, head_input(self.model, ids))

    def _windows(self) -> Tensor:
        """This process's windows of token ids int64 ``[samples, seq_len]``."""
        return torch.cat([batch for batch in self.batches if isinstance(batch, Tensor)])

    def _teacher(self) -> Teacher:
        assert self.ids is not None
        assert self.work is not None
        return Teacher(
            self.model, self.ids, self.work, lambda: self._advance("the original's targets")
        )

    def _distill(self, results: Mapping[str, QuantizedLayer], teacher: Teacher) -> Distilled:
        assert self.ids is not None
        assert self.work is not None
        with self._quantized_caches():
            return distill(
                self.model, self.plan, results, self.ids, teacher, self.work, self._advance
            )

    def _quantized_caches(self, index: int | None = None) -> AbstractContextManager[None]:
        """While active, keys and values are rounded by the ranges that were found: one block's, or
        all."""
        names = self.plan.caches if index is None else self.plan.caches_in(index)
        entries = {
            name: CacheEntry(self.caches[name].spec, self.caches[name].scales(self.model.dtype))
            for name in names
        }
        return quantized_caches(self.attentions, entries)

    def _rescale(
        self, index: int, layers: Mapping[str, PlannedLayer], hidden: list[Tensor]
    ) -> None:
        """Fold the block's scalings into its weights, before anything of it is solved.

        A resumed run folds what was chosen before: the same bytes, without a pass.
        """
        folds = self.plan.folds_in(index)
        if not folds:
            return
        label = f"block {index + 1}/{self.plan.blocks}: scaling"
        scales = self._on_disk(WorkFolder.load_scales, index)
        if scales is None:
            runs = self._calls(index, hidden)
            scales = choose_scales(
                folds, layers, self.linears, runs, lambda: self._advance(label), self.together
            )
            self._on_disk(WorkFolder.save_scales, index, scales)
        else:
            self.done += len(hidden)
        apply_scales(self.model, folds, scales)

    def _finish_block(
        self, index: int, layers: Mapping[str, PlannedLayer], hidden: list[Tensor]
    ) -> tuple[dict[str, QuantizedLayer], list[Tensor]]:
        """A block's layers, solved and, where the plan says so, trained; and its outputs."""
        done = self.done + len(hidden) + self.training
        originals = {n: self.linears[n].weight for n, x in layers.items() if x.reconstructed}
        if self.plan.needs_reference and not self.plan.needs_drift:
            self.exact = self._run_exact(index)
        solved, outputs = self._solve_block(index, layers, hidden)
        if originals:
            del outputs
            solved = self._train_block(index, layers, solved, originals, hidden)
            outputs = self._propagate(index, layers, solved, hidden, "trained")
        self.done = done
        return solved, outputs

    def _train_block(
        self,
        index: int,
        layers: Mapping[str, PlannedLayer],
        solved: Mapping[str, QuantizedLayer],
        originals: Mapping[str, Tensor],
        hidden: list[Tensor],
    ) -> dict[str, QuantizedLayer]:
        assert self.plan.signround is not None
        options = self.plan.signround.options
        local = index - self.spine.first
        writer = f"{self.spine.prefix}.{local}.{residual_writer(self.model)}"
        block = Block(
            self.spine.blocks[local],
            lambda x: self._calls(index, [x])[0](),
            {name: self.linears[name] for name in layers},
            layers,
            solved,
            originals,
        )
        return reconstruct(
            block,
            Windows.of(hidden, self.exact, writer, self.importance),
            options,
            seed=options["seed"] + index,
            advance=lambda what: self._advance(f"block {index + 1}/{self.plan.blocks}: {what}"),
        )

    def _solve_block(
        self, index: int, layers: Mapping[str, PlannedLayer], hidden: list[Tensor]
    ) -> tuple[dict[str, QuantizedLayer], list[Tensor]]:
        """One pass through the block, stopping in front of every group of layers.

        With feedback, each batch's unquantized pass runs in front of its quantized one.
        """
        runs = self._calls(index, hidden)
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
            self._install(solved)
            results.update(solved)

        def finished(run: int, out: Tensor) -> None:
            batch = run // streams
            if run % streams != streams - 1:
                self.exact[batch] = self._keep(f"exact.{batch}", out)
                return
            if not numerics.is_finite(out):
                raise QuantkitError(
                    f"block {index}: the output holds NaN or infinite values",
                    remedy="the model overflows in its dtype on this data; load it in another",
                )
            outputs[batch] = self._keep(f"hidden.{batch}", out)
            self._advance(f"block {index + 1}/{self.plan.blocks}")

        if streams == 2:
            exact = [unquantized(run) for run in self._calls(index, self.exact)]
            runs = [run for pair in zip(exact, runs, strict=True) for run in pair]
        leaders = [*cache.sides.items(), *((g[0], self.linears[g[0]]) for g in groups)]
        planned = {name: self.linears[name] for name in (layers if streams == 2 else ())}
        block = self.spine.blocks[index - self.spine.first]
        with (
            quantized_inputs(self.linears, layers, results),
            original_weights(planned),
            quantized_caches(self.attentions, cache.entries),
            models.expert_inputs(block, self.experts.mode),
        ):
            self._run_groups(runs, leaders, observe, solve, finished)
        if self.plan.needs_data:
            self.experts.check(layers)
        else:
            unseen = {name: layer for name, layer in layers.items() if name not in results}
            results |= self._solve_without_data(unseen) if unseen else {}
        self.caches |= cache.found()
        return results, [out for out in outputs if out is not None]

    def _propagate(
        self,
        index: int,
        layers: Mapping[str, PlannedLayer],
        saved: Mapping[str, QuantizedLayer],
        hidden: list[Tensor],
        label: str,
    ) -> list[Tensor]:
        outputs = []
        with quantized_inputs(self.linears, layers, saved), self._quantized_caches(index):
            for i, run in enumerate(self._calls(index, hidden)):
                outputs.append(self._keep(f"hidden.{i}", run()))
                self._advance(f"block {index + 1}/{self.plan.blocks} ({label})")
        return outputs

    def _solve_without_data(self, layers: Mapping[str, PlannedLayer]) -> dict[str, QuantizedLayer]:
        results: dict[str, QuantizedLayer] = {}
        for layer in layers.values():
            weight = {layer.name: self.linears[layer.name].weight}
            results.update(quantize_group([layer], weight, Stats(), None, None))
        self._install(results)
        self._advance("quantizing")
        return results

    def _solve_head(
        self, layers: Mapping[str, PlannedLayer], hidden: list[Tensor]
    ) -> dict[str, QuantizedLayer]:
        if not hidden:
            return self._solve_without_data(layers)
        members = list(layers.values())
        collector = Collector(members, self.observer, self.importance, self.together)
        for i, ids in enumerate(self.batches):
            [x] = self.spine.head_inputs([ids], [hidden[i]])
            exact = list(self.spine.head_inputs([ids], [self.exact[i]])) if self.exact else [None]
            collector.update(x, exact[0])
            self._advance("head")
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

    def _calls(self, index: int, hidden: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
        """For each batch, a function that runs this block of the model on it."""
        return self.spine.calls(index - self.spine.first, hidden)

    def _on_disk(
        self, do: Callable[Concatenate[WorkFolder, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What the first process gets from its work folder, on all of them."""

        def there() -> T:
            assert self.work is not None
            return do(self.work, *args, **kwargs)

        return self.together.first(there)

    def _install(self, layers: Mapping[str, QuantizedLayer]) -> None:
        """Give layers their dequantized weights."""
        for name, layer in layers.items():
            module = self.linears[name]
            original = module.weight
            weight = numerics.dequantize(layer.qtensor, original.dtype).to(original.device)
            module.weight = nn.Parameter(weight, requires_grad=False)
            memory.forget_pages(original)

    def _release(self, layers: Mapping[str, PlannedLayer]) -> None:
        """Drop the weights of layers that have run for the last time."""
        for name in layers:
            module = self.linears[name]
            empty = torch.empty(0, dtype=module.weight.dtype)
            module.weight = nn.Parameter(empty, requires_grad=False)

    def _advance(self, label: str) -> None:
        self.done += 1
        self.progress(min(self.done, self.total), self.total, label)
