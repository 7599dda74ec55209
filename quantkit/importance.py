"""What a layer's errors cost the model: measured before anything is quantized, kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.batches import Batch, token_ids
from quantkit.errors import QuantkitError
from quantkit.fisher import measure_gradients, output_parts, token_weights
from quantkit.parallel import ALONE, World
from quantkit.plan import Plan
from quantkit.steps import weighs_costs
from quantkit.work import WorkFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Importance:
    """What tokens weigh, what errors cost, which outputs' errors belong together: for who asks.

    One pass through the unquantized model and back, or what an earlier run's left in the work
    folder. Matrices of outputs are all in memory during the pass (`pass_bytes`) and on disk behind
    it: then one layer's at a time is read back, by the first process.

    Args:
        model: unquantized.
        plan: says which layers ask for what.
        windows: ``[1, T]`` each, of this process.
        work: where it is kept; the first process's alone.
        advance: called once a window.
        together: the processes that have the other windows.

    Raises:
        UsageError, QuantkitError: see `quantkit.fisher.measure_gradients`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        windows: Sequence[Batch],
        work: WorkFolder | None,
        advance: Callable[[], None],
        together: World = ALONE,
    ) -> None:
        self._work = work
        self._coupled = {layer.name: layer.fisher for layer in plan.layers if layer.coupled}
        asking = [layer for layer in plan.layers if layer.needs_gradients]
        squares = together.first(lambda: _kept(work))
        if squares is None:
            found = measure_gradients(
                model,
                [layer.name for layer in asking],
                windows,
                coupled=self._coupled,
                advance=advance,
                together=together,
            )
            shares = {name: together.gather(share) for name, share in found.squares.items()}

            def keep() -> dict[str, Tensor]:
                assert work is not None
                for name, blocks in found.outputs.items():
                    parts = {str(i): block for i, block in enumerate(blocks)}
                    work.save_tensors(f"outputs/{name}", parts)
                whole = {name: torch.cat(parts) for name, parts in shares.items()}
                work.save_tensors("tokens", whole)  # last: all of the pass is on disk with it
                return whole

            squares = together.first(keep)
        else:
            for _ in windows:
                advance()
        tokens = sum(token_ids(window).numel() for window in windows)
        start = sum(together.agree(tokens)[: together.rank])
        own = slice(start, start + tokens)
        #: What each token of this process counts in the Hessian of a layer, fp32 ``[tokens]`` by
        #: name.
        self.weights: Mapping[str, Tensor] = {
            layer.name: token_weights(squares[layer.name], layer.fisher)[own]
            for layer in asking
            if layer.fisher
        }
        #: What a squared error of a layer's output costs at each of these tokens, fp32
        #: ``[tokens]`` by name, for the layers whose rescalers ask: ‖g‖² / N, twice the nats.
        self.costs: Mapping[str, Tensor] = {
            layer.name: squares[layer.name][own] / layer.shape[0]
            for layer in asking
            if weighs_costs(layer.rescalers)
        }

    def outputs(self, name: str) -> list[Tensor]:
        """Diagonal blocks of the Fisher matrix of a layer's outputs; none if they are independent.

        Raises:
            QuantkitError: they are gone from the work folder.
        """
        if name not in self._coupled:
            return []
        assert self._work is not None
        blocks = self._work.load_tensors(f"outputs/{name}")
        if not blocks:
            raise QuantkitError(
                f"{name}: what its outputs have to do with each other is not in the work folder",
                remedy="run again without --resume to start over",
            )
        return [blocks[str(i)] for i in range(len(blocks))]


def pass_bytes(plan: Plan) -> int:
    """What the pass back holds of all layers at once, beside the model and one window's
    activations: a float for every token, and fp32 sums of the outputs that are coupled."""
    asking = [layer for layer in plan.layers if layer.needs_gradients]
    parts = (part for x in asking if x.coupled for part in output_parts(x.shape[0]))
    tokens = len(asking) * plan.samples * plan.seq_len
    return 4 * (tokens + sum(len(part) ** 2 for part in parts))


def _kept(work: WorkFolder | None) -> dict[str, Tensor] | None:
    return None if work is None else work.load_tensors("tokens")
