"""Token sequences packed so that a shared prefix is computed once.

The choices of an item share its prompt, the questions about a passage share the passage, and
every item of a suite shares the instructions. Sorted, such sequences are neighbours; laid out
as a tree in one row, every distinct prefix is one node::

    sequences   A B C D      A B C E F      A B G
    row         A B C D E F G
    positions   0 1 2 3 3 4 2
    parents     - 0 1 2 2 4 1

A node attends to its ancestors and to itself, at the position that it has in its own
sequence, so each path computes what it would compute alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: No row grows past this by packing: the mask is quadratic in the row.
MAX_PACKED = 4096

#: Nor past so many sequences: each may need a page of keys and values of its own.
MAX_PATHS = 256


@dataclass(frozen=True)
class Chain:
    """Nodes ``[start, end)`` of a row, behind all of chain ``parent`` (None: at a root)."""

    start: int
    end: int
    parent: int | None


@dataclass(frozen=True)
class TreeRow:
    """One row of packed sequences.

    Attributes:
        tokens: ids, one a node.
        positions: the node's depth, its place in its own sequence.
        parents: index of the node's parent, -1 at a root; parents come before children.
        paths: (index of the sequence, its nodes from root to leaf).
    """

    tokens: list[int]
    positions: list[int]
    parents: list[int]
    paths: list[tuple[int, list[int]]]

    @property
    def branches(self) -> bool:
        """False when the row is one plain sequence."""
        return self.parents != list(range(-1, len(self.tokens) - 1))

    def chains(self) -> list[Chain]:
        """The row cut where it branches: runs of nodes that each continue the one before."""
        children = [0] * len(self.tokens)
        for parent in self.parents:
            if parent >= 0:
                children[parent] += 1
        chains: list[Chain] = []
        chain_of: list[int] = []
        for node, parent in enumerate(self.parents):
            if node and parent == node - 1 and children[parent] == 1:
                chains[-1] = Chain(chains[-1].start, node + 1, chains[-1].parent)
            else:
                above = None if parent < 0 else chain_of[parent]
                chains.append(Chain(node, node + 1, above))
            chain_of.append(len(chains) - 1)
        return chains

    def mask(self) -> np.ndarray:
        """Boolean ``[nodes, nodes]``, True where row attends to column."""
        allowed = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                allowed[node] |= allowed[parent]
        return allowed


def pack(sequences: Sequence[Sequence[int]], budget: int) -> list[TreeRow]:
    """Pack sequences into rows of about ``budget`` nodes.

    In sorted order the longest prefix that a sequence shares with any earlier one is what it
    shares with its predecessor, so no search is needed. The order, and with it every row,
    depends on the sequences alone.

    A longer row pays attention over pairs that the mask discards; a new row computes the
    shared prefix again. The balance moves with the length of that prefix, hence a limit of
    ``budget + 2 * shared``: items part where they share little, choices stay together.
    `MAX_PACKED` and `MAX_PATHS` bound memory.
    """
    rows: list[TreeRow] = []
    previous: Sequence[int] = ()
    path: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda i: (list(sequences[i]), i)):
        sequence = sequences[index]
        shared = common_prefix(previous, sequence)
        fresh = len(sequence) - shared
        limit = min(budget + 2 * shared, MAX_PACKED)
        full = rows and (len(rows[-1].tokens) + fresh > limit or len(rows[-1].paths) >= MAX_PATHS)
        # A sequence that the row holds already costs nothing.
        if not rows or (fresh and full):
            rows.append(TreeRow([], [], [], []))
            shared = 0
        row = rows[-1]
        path = path[:shared]
        for position in range(shared, len(sequence)):
            row.parents.append(path[-1] if path else -1)
            path.append(len(row.tokens))
            row.tokens.append(sequence[position])
            row.positions.append(position)
        row.paths.append((index, list(path)))
        previous = sequence
    return rows


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
