"""Processes that calibrate together: each runs its share of the windows, the first one solves.

Whatever is summed is summed by the first process in the order of ranks, so that a rerun gives the
same bytes. Windows are shared out in whole batches and in order. Where there are enough of them,
batches are those of one process, and statistics differ only in the order of sums; where windows are
few, batches are smaller, and a moving average over batches is another one, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from quantkit.errors import QuantkitError, UsageError
from quantkit.model import first_line

T = TypeVar("T")

#: A process may wait for the first one to solve a block, or to score a model.
_PATIENCE = timedelta(days=7)


class World:
    """This process alone.

    Attributes:
        rank: of this process; 0 is the first, which solves and writes.
        size: how many there are.
    """

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on the first process, on every process.

        It runs on the first process alone; an error of it is raised on all.
        """
        return make()

    def first_before_others(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on each process; the others wait until the first one has it.

        It may fill a cache on disk that they then read. An error of it is raised on all.
        """
        made: list[T] = []
        self.first(lambda: made.append(make()))
        return made[0] if self.leads else make()

    def gather(self, value: T) -> list[T]:
        """Everybody's values in the order of ranks on the first process; none on the others."""
        return [value]

    def agree(self, value: T) -> list[T]:
        """Everybody's values in the order of ranks, on every process."""
        found = self.gather(value)
        return self.first(lambda: found)

    def add(self, total: Tensor) -> None:
        """Add everybody's tensors into the first process's, in the order of ranks.

        Args:
            total: on a CPU or a GPU, one shape everywhere; left as it is but on the first process.
        """

    def share(self, batches: Sequence[T]) -> Sequence[T]:
        """This process's batches: a run of neighbours.

        Raises:
            UsageError: there are fewer batches than processes, or none at all.
        """
        return batches


ALONE = World()


class Processes(World):
    """The processes of ``torch.distributed``'s default group, which must be initialized.

    Where one of them is gone, every method that asks for it raises QuantkitError.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def first(self, make: Callable[[], T]) -> T:
        sent: list[Any] = [None, None]
        if self.leads:
            try:
                sent[0] = make()
            except Exception as e:
                # Without word of it the others would wait for ever; who is gone needs none.
                sent[1] = e if isinstance(e, QuantkitError) else QuantkitError(_words(e))
                with suppress(QuantkitError), _reaching_others():
                    dist.broadcast_object_list(sent, src=0)
                raise
        with _reaching_others():
            dist.broadcast_object_list(sent, src=0)
        if sent[1] is not None:
            raise sent[1]
        made: T = sent[0]
        return made

    def gather(self, value: T) -> list[T]:
        found: list[Any] | None = [None] * self.size if self.leads else None
        with _reaching_others():
            dist.gather_object(value, found, dst=0)
        return found or []

    def add(self, total: Tensor) -> None:
        if not self.leads:
            with _reaching_others():
                dist.send(total.cpu().contiguous(), dst=0)
            return
        other = torch.empty(total.shape, dtype=total.dtype)
        for rank in range(1, self.size):
            with _reaching_others():
                dist.recv(other, src=rank)
            total += other.to(total.device)

    def share(self, batches: Sequence[T]) -> Sequence[T]:
        if not batches:
            raise UsageError(
                f"no calibration data: nothing to share out among {self.size} processes",
                remedy="start one process, or give --data FILE",
            )
        if len(batches) < self.size:
            raise UsageError(
                f"{len(batches)} batches of calibration data for {self.size} processes",
                remedy="start fewer processes, or raise calibrate.samples",
            )
        edges = [round(i * len(batches) / self.size) for i in range(self.size + 1)]
        return batches[edges[self.rank] : edges[self.rank + 1]]


@contextmanager
def world() -> Iterator[World]:
    """The processes that ``torchrun`` started beside this one, or this one alone.

    Raises:
        QuantkitError: they do not find each other.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield ALONE
        return
    with _reaching_others():
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes()
    finally:
        dist.destroy_process_group()


def check_alike(together: World, what: str, value: object) -> None:
    """Refuse processes that disagree.

    Raises:
        QuantkitError: ``value`` is not the same everywhere; on all processes.
    """
    values = together.agree(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise QuantkitError(
                f"process {rank} has another {what} than the first: {other!r}, not {values[0]!r}",
                remedy="start all of them with the same files, recipe and options",
            )


@contextmanager
def _reaching_others() -> Iterator[None]:
    """What torch.distributed raises when a process is gone, as an error for people."""
    try:
        yield
    except (RuntimeError, ValueError) as e:
        # gloo names its source file in front, and advises in whole sentences behind.
        words = re.sub(r"^\[[^]]*\] ", "", first_line(e)).split(". ")[0]
        raise QuantkitError(
            f"another process ended or cannot be reached ({words})",
            remedy="see what that one said",
        ) from e


def _words(error: Exception) -> str:
    return f"the first process failed: {type(error).__name__}: {error}"
