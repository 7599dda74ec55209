"""Few-shot examples that do not depend on which items are scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class _Drawn:
    """In place of lm-eval's sampler: examples that were drawn before, item by item."""

    def __init__(self, examples: Sequence[Any]) -> None:
        self._next = iter(examples)

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> Any:
        """The examples of the item whose turn it is."""
        return next(self._next)


@contextmanager
def shots_of_whole_run(task: Any, samples: Sequence[int] | None) -> Iterator[None]:
    """Give each item of a subset the examples that it has when every item is scored.

    lm-eval draws examples from one random stream as it goes from item to item, so a subset, or a
    run that stops early, would show other prompts than the run that it is paired with.

    Args:
        task: lm-eval's, its sampler seeded.
        samples: sorted positions of the items to score; all when None, which changes nothing.
    """
    count = task.config.num_fewshot
    if samples is None or not count:
        yield
        return
    sampler, wanted = task.sampler, set(samples)
    held_out = task.fewshot_cfg.split == task.config.test_split  # as in `fewshot_context`
    drawn = [sampler.sample(n=count, eval_doc=doc if held_out else None) for doc in task.eval_docs]
    task.sampler = _Drawn([shots for i, shots in enumerate(drawn) if i in wanted])
    try:
        yield
    finally:
        task.sampler = sampler
