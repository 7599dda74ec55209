"""What a layer's errors cost the model: measured before anything is quantized, kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.fisher import measure_gradients, token_weights
from quantkit.plan import Plan
from quantkit.work import WorkFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Importance:
    """Weights of tokens, and which outputs' errors belong together, for the layers that ask.

    One pass through the unquantized model and back, or what an earlier run's left in the work
    folder. Matrices of outputs stay there: one layer's at a time is in memory.

    Args:
        model: unquantized.
        plan: says which layers ask for what.
        ids: token ids int64 ``[samples, seq_len]``.
        work: where it is kept.
        advance: called once a window.

    Raises:
        UsageError, QuantkitError: see `quantkit.fisher.measure_gradients`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        ids: Tensor,
        work: WorkFolder,
        advance: Callable[[], None],
    ) -> None:
        self._work = work
        self._coupled = {layer.name: layer.fisher for layer in plan.layers if layer.coupled}
        asking = {layer.name: layer.fisher for layer in plan.layers if layer.fisher}
        squares = work.load_tensors("tokens")
        if squares is None:
            found = measure_gradients(
                model, list(asking), ids, coupled=self._coupled, advance=advance
            )
            for name, blocks in found.outputs.items():
                parts = {str(i): block for i, block in enumerate(blocks)}
                work.save_tensors(f"outputs/{name}", parts)
            squares = dict(found.squares)
            work.save_tensors("tokens", squares)  # last: all of the pass is on disk with it
        else:
            for _ in ids:
                advance()
        #: What each token counts in the Hessian of a layer, fp32 ``[tokens]`` by name.
        self.weights: Mapping[str, Tensor] = {
            name: token_weights(squares[name], exponent) for name, exponent in asking.items()
        }

    def outputs(self, name: str) -> list[Tensor]:
        """Diagonal blocks of the Fisher matrix of a layer's outputs; none if they are independent.

        Raises:
            QuantkitError: they are gone from the work folder.
        """
        if name not in self._coupled:
            return []
        blocks = self._work.load_tensors(f"outputs/{name}")
        if not blocks:
            raise QuantkitError(
                f"{name}: what its outputs have to do with each other is not in the work folder",
                remedy="run again without --resume to start over",
            )
        return [blocks[str(i)] for i in range(len(blocks))]
