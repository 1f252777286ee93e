"""What replicas agree on in the middle of a step: batch-norm statistics and a few numbers about the step.

Every value is combined in the tree of `dpresnet.tree`, in float64 on the host; a rank hands over its maximal nodes, so
the result has the same bits for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dpresnet import tree
from dpresnet.comm import Comm

Combine = Callable[[np.ndarray, np.ndarray], np.ndarray]
Node = tuple[int, int]


def add(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The sum of two nodes."""
    return left + right


def merge_moments(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Merges two rows [count, mean of C channels, M2 of C channels] (Chan, Golub and LeVeque 1983, equation 2.1)."""
    count = left[0] + right[0]
    if count == 0:
        return left
    (mean_a, m2_a), (mean_b, m2_b) = (np.split(row[1:], 2) for row in (left, right))
    delta, share = mean_b - mean_a, right[0] / count
    return np.concatenate([[count], mean_a + delta * share, m2_a + m2_b + delta**2 * (left[0] * share)])


class TreeExchange:
    """Combines one row of float64 per replica over groups of ``group`` neighbouring replicas, by default over all ``replicas``,
    of which each rank owns an equal, contiguous range. A group may lie on several ranks, and a rank hold several groups.
    """

    def __init__(self, comm: Comm, replicas: int, group: int = 0):
        local, group = replicas // comm.size, group or replicas
        self._comm, self._group = comm, group
        self.own = range(comm.rank * local, (comm.rank + 1) * local)
        self._nodes = [group_nodes(group, r * local, (r + 1) * local) for r in range(comm.size)]
        self._shared = local % group > 0  # some group lies on several ranks
        self._most = max(map(len, self._nodes))

    def combine(self, rows: list[np.ndarray], combine: Combine) -> np.ndarray:
        """The root of the tree over the rows [n] of all replicas, the only group; ``rows`` are those of this rank."""
        return self.combine_groups(rows, combine)[0]

    def combine_groups(self, rows: list[np.ndarray], combine: Combine) -> list[np.ndarray]:
        """For each replica of this rank the root of the tree over its group."""
        known = {(v, v + 1): row for v, row in zip(self.own, rows, strict=True)}
        if self._shared:
            mine = self._nodes[self._comm.rank]
            known = self._gathered([self._fold(node, known, combine) for node in mine])
        first = [v - v % self._group for v in self.own]
        roots = {start: self._fold((start, start + self._group), known, combine) for start in set(first)}
        return [roots[start] for start in first]

    def _fold(self, node: Node, known: dict[Node, np.ndarray], combine: Combine) -> np.ndarray:
        return tree.fold(*node, lambda lo, hi: known.get((lo, hi)), combine)

    def _gathered(self, values: list[np.ndarray]) -> dict[Node, np.ndarray]:
        """The nodes that all ranks hand over, in one message each."""
        message = np.zeros((self._most, values[0].size))
        message[: len(values)] = values
        gathered = self._comm.allgather(message)
        return {node: gathered[r, i] for r, nodes in enumerate(self._nodes) for i, node in enumerate(nodes)}


def group_nodes(group: int, lo: int, hi: int) -> list[Node]:
    """The maximal nodes inside [lo, hi) of the trees over neighbouring groups of replicas."""
    return [
        (start + a, start + b)
        for start in range(lo - lo % group, hi, group)
        for a, b in tree.maximal_nodes(group, range(lo - start, hi - start))
    ]
