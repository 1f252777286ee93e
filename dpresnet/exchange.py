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
    """Combines one row of float64 per replica over all ``replicas``, of which each rank owns an equal, contiguous range."""

    def __init__(self, comm: Comm, replicas: int):
        local = replicas // comm.size
        self._comm, self._replicas = comm, replicas
        self.own = range(comm.rank * local, (comm.rank + 1) * local)
        self._nodes = [tree.maximal_nodes(replicas, r * local, (r + 1) * local) for r in range(comm.size)]
        self._most = max(map(len, self._nodes))

    def combine(self, rows: list[np.ndarray], combine: Combine) -> np.ndarray:
        """The root of the tree over the rows [n] of all replicas; ``rows`` are those of this rank."""
        leaf = self.own.start
        mine = [
            tree.fold(*node, lambda lo, hi: rows[lo - leaf] if hi - lo == 1 else None, combine)
            for node in self._nodes[self._comm.rank]
        ]
        message = np.zeros((self._most, rows[0].size))
        message[: len(mine)] = mine
        gathered = self._comm.allgather(message)
        known = {node: gathered[r, i] for r, nodes in enumerate(self._nodes) for i, node in enumerate(nodes)}
        return tree.fold(0, self._replicas, lambda lo, hi: known.get((lo, hi)), combine)
