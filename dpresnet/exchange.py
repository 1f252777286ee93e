"""What replicas agree on in the middle of a step: batch-norm statistics and a few numbers about the step.

Every value is combined in the tree of `dpresnet.tree`, in float64 on the host; a rank hands over its maximal nodes, so
the result has the same bits for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

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
    end, share = 1 + left.size // 2, right[0] / count
    delta = right[1:end] - left[1:end]
    merged = left + right
    merged[1:end] = left[1:end] + delta * share
    merged[end:] += delta**2 * (left[0] * share)
    return merged


class Schedule:
    """In which order the values of nodes are combined into those of ``roots``: found once, followed in every step.

    ``known`` tells of each node with a value where that stands among ``count`` values.
    """

    def __init__(self, known: dict[Node, int], count: int, roots: Sequence[Node]):
        self._steps: list[tuple[int, int]] = []

        def combine(left: int, right: int) -> int:
            self._steps.append((left, right))
            return count + len(self._steps) - 1

        self._roots = [tree.fold(*root, lambda lo, hi: known.get((lo, hi)), combine) for root in roots]

    def follow(self, values: Iterable[np.ndarray], combine: Combine) -> list[np.ndarray]:
        """The value of each root."""
        values = list(values)
        for left, right in self._steps:
            values.append(combine(values[left], values[right]))
        return [values[root] for root in self._roots]


class TreeExchange:
    """Combines one row of float64 per replica over groups of ``group`` neighbouring replicas, by default over all ``replicas``,
    of which each rank owns an equal, contiguous range. A group may lie on several ranks, and a rank hold several groups.

    ``own``: the replicas of this rank; ``members``: which of these, counted from 0, belong to each of their groups.
    """

    def __init__(self, comm: Comm, replicas: int, group: int = 0):
        local, group = replicas // comm.size, group or replicas
        self._comm = comm
        self.own = range(comm.rank * local, (comm.rank + 1) * local)
        starts = sorted({v - v % group for v in self.own})
        self.members = [slice(max(0, start - self.own.start), start + group - self.own.start) for start in starts]
        nodes = [group_nodes(group, r * local, (r + 1) * local) for r in range(comm.size)]
        self._most = max(map(len, nodes))
        known = {(v, v + 1): i for i, v in enumerate(self.own)}
        self._before = None  # what this rank combines before it hands over; None: all its groups lie on it alone
        self._whole = len(nodes[comm.rank]) == self._most == local  # nothing then, it hands over all rows
        if local % group:
            self._before = Schedule(known, local, nodes[comm.rank])
            known = {node: r * self._most + i for r, found in enumerate(nodes) for i, node in enumerate(found)}
            local = comm.size * self._most
        self._after = Schedule(known, local, [(start, start + group) for start in starts])

    def combine(self, rows: np.ndarray, combine: Combine) -> np.ndarray:
        """The root of the tree over the ``rows`` [n] of all replicas, the only group; given are those of this rank."""
        return self.combine_groups(rows, combine)[0]

    def combine_groups(self, rows: np.ndarray, combine: Combine) -> list[np.ndarray]:
        """The root of the tree over each of the groups of ``members``; from ``rows`` [replicas of this rank, n], which may be
        what is returned where a replica is a group.
        """
        if self._before:
            message = rows if self._whole else self._message(self._before.follow(rows, combine))
            rows = self._comm.allgather(message).reshape(-1, rows.shape[1])
        return self._after.follow(rows, combine)

    def _message(self, values: list[np.ndarray]) -> np.ndarray:
        """What this rank hands over, as long as the messages of the others."""
        message = np.zeros((self._most, values[0].size))
        message[: len(values)] = values
        return message


def group_nodes(group: int, lo: int, hi: int) -> list[Node]:
    """The maximal nodes inside [lo, hi) of the trees over neighbouring groups of replicas."""
    return [
        (start + a, start + b)
        for start in range(lo - lo % group, hi, group)
        for a, b in tree.maximal_nodes(group, range(lo - start, hi - start))
    ]
