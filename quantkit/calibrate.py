"""The calibration loop: for each block, rotate → rescale → observe → solve → replace → propagate.

A block that is trained on its output (`quantkit.reconstruct`) is so between the last two.

Statistics live for one block. What persists, and what a resumed run starts from, are the
finished blocks in the work folder (`quantkit.work`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from quantkit import memory
from quantkit import model as models
from quantkit.batches import (
    Batch,
    CalibrationData,
    Probe,
    calibration_batches,
    random_batch,
    rows,
    single_windows,
    token_ids,
)
from quantkit.blocks import Blocks, training_steps
from quantkit.distill import Distilled, Teacher, distill
from quantkit.documents import check_apart, digest, prediction_weights
from quantkit.errors import UsageError
from quantkit.folding import apply_scales
from quantkit.footprint import spills
from quantkit.importance import Importance
from quantkit.integrity import check_block
from quantkit.kv_cache import CacheRange
from quantkit.limits import check_limits
from quantkit.machine import environment
from quantkit.parallel import ALONE, World, check_alike
from quantkit.paused import Spine, find_spines, head_input
from quantkit.plan import Plan, PlannedLayer
from quantkit.progress import Progress, Steps, silent
from quantkit.quantize import QuantizedLayer, quantized_inputs
from quantkit.recipe import Step
from quantkit.reconstruct import rows_at_once
from quantkit.rescale import choose_scales
from quantkit.rotation import rotate_block, rotate_ends
from quantkit.routing import ExpertTokens
from quantkit.work import HEAD, WorkFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

P = ParamSpec("P")
T = TypeVar("T")


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
        UsageError: no data where the plan needs some, ``work`` belongs to another run, or what
            `quantkit.limits.check_limits` refuses.
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
    if data is not None and data.positions is not None:
        state["documents"] = digest(data.positions)
    if data is not None and plan.distill is not None:
        factor = plan.distill.options["answers"]
        if prediction_weights(data.answers, factor) is not None:
            state["answers"] = digest(data.answers)
    every = calibration_batches(data, needed=plan.needs_data, processes=together.size)
    check_limits(
        plan,
        source.model,
        every,
        activation_memory=activation_memory,
        all_experts=all_experts,
        together=together,
    )
    inputs = {key: value for key, value in state.items() if key in ("weights", "plan", "data")}
    check_alike(together, "model, recipe or data", inputs)
    # The others have no folder: nothing is asked of a file system that all of them would share.
    folder = WorkFolder(work, state, resume=resume) if together.leads else None
    if plan.unties_head:
        models.untie(source.model)
    with torch.no_grad():
        experts = ExpertTokens(source.model, min_expert_tokens, all_tokens=all_experts)
        batches = together.share(every)
        loop = _Loop(
            source.model,
            plan,
            batches,
            data,
            observer,
            experts,
            folder,
            release,
            progress,
            together,
        )
        if spills(plan, activation_memory):
            loop.blocks.spill(work / "hidden")
        layers, probe, distilled = loop.run()
    memory.trim_heap()  # hidden states and training leave it to the export
    return Calibrated(layers, probe, loop.blocks.solve_seconds, distilled, loop.blocks.caches)


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
    """The order of blocks, and what of them lies on disk."""

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        batches: Sequence[Batch],
        data: CalibrationData | None,
        observer: Step,
        experts: ExpertTokens,
        work: WorkFolder | None,
        release: bool,
        progress: Progress,
        together: World,
    ) -> None:
        self.model = model
        self.plan = plan
        self.spines = find_spines(model, alike=data is None or data.positions is None)
        self.together = together
        #: Of this process; without data, what a reload is checked on.
        self.batches = batches or [random_batch(model)]
        self.data = data  # of all
        #: Tokens that every layer sees; None where an encoder's and its decoder's differ.
        self.tokens: int | None = None
        if len(self.spines) == 1:
            own = sum(token_ids(batch).numel() for batch in batches)
            self.tokens = sum(together.agree(own))
        self.work = work
        self.release = release
        self.steps = Steps(_count_steps(plan, batches), progress)
        self.blocks = Blocks(
            model, plan, batches, observer, experts, self.spines[0], self.steps, together
        )

    def run(self) -> tuple[dict[str, QuantizedLayer], Probe, Distilled | None]:
        """Every planned layer, in the plan's order; what checks a reload; what training came to."""
        models.bring_in(self.model, skip=[spine.blocks for spine in self.spines])
        if self.data is not None and self.data.positions is not None:
            check_apart(self.model, single_windows(self.batches))
        if self.plan.needs_fisher:
            self.blocks.importance = self._importance()
        teacher = self._teacher() if self.plan.distill and self.together.leads else None
        if self.plan.rotation is not None:
            rotate_ends(self.model, self.plan.rotation)
        starts = {spine.first: spine for spine in self.spines}
        results: dict[str, QuantizedLayer] = {}
        hidden: list[Tensor] = []
        for index in range(self.plan.blocks):
            if index in starts:
                hidden = self._enter(starts[index], hidden)
            saved, hidden = self._block(index, hidden)
            if self.together.leads:  # mapped from files there, in memory elsewhere
                results.update(saved)
            memory.trim_heap()
        results.update(self._head(hidden))
        memory.trim_heap()
        if not self.together.leads:
            return {}, Probe(self.batches[0], hidden[0]), None
        ordered = {layer.name: results[layer.name] for layer in self.plan.layers}
        if teacher is None:
            return ordered, self._probe(ordered, hidden), None
        trained = self._distill(ordered, teacher)
        return trained.layers, self._probe(trained.layers, []), trained

    def _enter(self, spine: Spine, encoded: list[Tensor]) -> list[Tensor]:
        """Hidden states in front of a list of blocks, which is at work from now on."""
        self.blocks.spine = spine
        hidden = self._embed(spine, encoded)
        self.blocks.exact = list(hidden) if self.plan.needs_reference else []
        if self.plan.reconstruction is not None:  # learns to call blocks on so many windows
            windows = torch.cat([batch for batch in self.batches if isinstance(batch, Tensor)])
            for count in rows_at_once(self.plan.reconstruction, len(windows)):
                spine.embed([windows[:count]])
        return hidden

    def _embed(self, spine: Spine, encoded: list[Tensor]) -> list[Tensor]:
        """A batch at a time where there is one list of blocks, else behind an encoder's."""
        if len(self.spines) == 1:
            embedded = (spine.embed([x], begin=i)[0] for i, x in enumerate(self.batches))
        else:
            embedded = (x for x in spine.embed(self.batches, encoded))
        return [self.blocks.keep(f"hidden.{i}", x) for i, x in enumerate(embedded)]

    def _block(
        self, index: int, hidden: list[Tensor]
    ) -> tuple[Mapping[str, QuantizedLayer], list[Tensor]]:
        """A block's finished layers, and the hidden states behind it.

        What an earlier run finished is run again, and nothing more.
        """
        blocks = self.blocks
        layers = self.plan.in_block(index)
        models.bring_in(blocks.spine.blocks[index - blocks.spine.first])
        if self.plan.rotation is not None:
            rotate_block(self.model, index, self.plan.rotation)
        self._rescale(index, layers, hidden)
        saved = self._on_disk(WorkFolder.load, index, layers)
        if saved is not None:
            blocks.exact = blocks.run_exact(index)
            blocks.install(saved)
            blocks.install_norms(self._on_disk(WorkFolder.load_norms, index))
            if self.plan.kv is not None:
                blocks.caches |= self._on_disk(WorkFolder.load_caches, index, self.plan.kv)
            hidden = blocks.propagate(index, layers, saved, hidden, "resumed")
            self.steps.done += blocks.training
        elif blocks.batches:
            solved, hidden = blocks.finish(index, layers, hidden)
            if self.plan.kv is not None:
                found = {name: blocks.caches[name] for name in self.plan.caches_in(index)}
                self._on_disk(WorkFolder.save_caches, index, found)
            if blocks.norms:
                self._on_disk(WorkFolder.save_norms, index, blocks.norms)
            saved = self._on_disk(WorkFolder.save, index, solved, layers)
        else:
            solved = blocks.solve_without_data(layers)
            saved = self._on_disk(WorkFolder.save, index, solved, layers)
            hidden = blocks.propagate(index, layers, saved, hidden, "rounded")
        check_block(layers, saved, self.tokens)
        if self.release and self.plan.distill is None:
            blocks.release(layers)
        return saved, hidden

    def _head(self, hidden: list[Tensor]) -> Mapping[str, QuantizedLayer]:
        """The head's finished layer, where the plan has it."""
        head = self.plan.in_block(None)
        if not head:
            return {}
        saved = self._on_disk(WorkFolder.load, HEAD, head)
        if saved is None:
            solved = self.blocks.solve_head(head, hidden)
            saved = self._on_disk(WorkFolder.save, HEAD, solved, head)
        check_block(head, saved, self.tokens)
        self.blocks.install(saved)
        return saved

    def _probe(self, results: Mapping[str, QuantizedLayer], hidden: list[Tensor]) -> Probe:
        ids = self.batches[0]
        if hidden:
            return Probe(ids, next(self.blocks.spine.head_inputs([ids], hidden[:1])))
        planned = {layer.name: layer for layer in self.plan.layers}
        with (
            quantized_inputs(self.blocks.linears, planned, results),
            self.blocks.quantized_caches(),
        ):
            return Probe(ids, head_input(self.model, ids))

    def _importance(self) -> Importance:
        return Importance(
            self.model,
            self.plan,
            single_windows(self.batches),
            self.work,
            lambda: self.steps.advance("token weights"),
            self.together,
        )

    def _teacher(self) -> Teacher:
        assert self.work is not None
        return Teacher(
            self.model,
            self._distilled_on(),
            self.work,
            lambda: self.steps.advance("the original's targets"),
        )

    def _distilled_on(self) -> list[Batch]:
        """Windows of all processes."""
        return single_windows(calibration_batches(self.data, needed=True))

    def _distill(self, results: Mapping[str, QuantizedLayer], teacher: Teacher) -> Distilled:
        assert self.work is not None
        assert self.data is not None
        assert self.plan.distill is not None
        with self.blocks.quantized_caches():
            return distill(
                self.model,
                self.plan,
                results,
                self._distilled_on(),
                teacher,
                self.work,
                self.steps.advance,
                self.blocks.originals,
                prediction_weights(self.data.answers, self.plan.distill.options["answers"]),
            )

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
            runs = self.blocks.calls(index, hidden)
            scales = choose_scales(
                folds,
                layers,
                self.blocks.linears,
                runs,
                lambda: self.steps.advance(label),
                self.together,
                self.blocks.importance,
            )
            self._on_disk(WorkFolder.save_scales, index, scales)
        else:
            self.steps.done += len(hidden)
        apply_scales(self.model, folds, scales)

    def _on_disk(
        self, do: Callable[Concatenate[WorkFolder, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What the first process gets from its work folder, on all of them."""

        def there() -> T:
            assert self.work is not None
            return do(self.work, *args, **kwargs)

        return self.together.first(there)


def _count_steps(plan: Plan, batches: Sequence[Batch]) -> int:
    """A step is a batch's pass through a block, a window read, or a step of training."""
    passes = plan.blocks + len({fold.block for fold in plan.folds}) + bool(plan.in_block(None))
    windows = sum(rows(batch) for batch in batches)
    total = passes * max(1, len(batches)) + plan.blocks * training_steps(plan, batches)
    total += windows if plan.needs_fisher else 0
    return total + (windows + plan.distill.options["steps"] if plan.distill else 0)
