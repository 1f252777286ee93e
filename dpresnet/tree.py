"""The one binary tree in which everything that V replicas share is summed.

The tree over [0, V) halves its range again and again, the left half taking the odd one. Its shape depends on V alone,
so whoever adds ``left + right`` at a node gets the same bits, however the replicas are spread over ranks::

    V = 4: ((0+1)+(2+3))        V = 5: (((0+1)+2)+(3+4))
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def middle(lo: int, hi: int) -> int:
    """Where the node [lo, hi), of two replicas or more, splits into its children [lo, middle) and [middle, hi)."""
    return (lo + hi + 1) // 2


def maximal_nodes(replicas: int, owned: Sequence[int]) -> list[tuple[int, int]]:
    """The largest nodes of the tree over [0, replicas) of which every replica is ``owned`` (ascending), from left to right.

    They partition the owned replicas, and their sums are all that the owner has to hand over: one sum for a range where
    replicas and ranks are powers of two, a few otherwise, and more where the replicas are not neighbours.
    """

    def inside(lo: int, hi: int) -> list[tuple[int, int]]:
        count = bisect_left(owned, hi) - bisect_left(owned, lo)
        if count in (0, hi - lo):
            return [(lo, hi)] if count else []
        mid = middle(lo, hi)
        return inside(lo, mid) + inside(mid, hi)

    return inside(0, replicas)


def fold(lo: int, hi: int, value: Callable[[int, int], T | None], combine: Callable[[T, T], T]) -> T:
    """The value of the node [lo, hi): ``value(lo, hi)`` where that is known, else its two children combined.

    ``combine(left, right)`` may work in place, for every value is used once. A replica without a value is a ValueError.
    """
    known = value(lo, hi)
    if known is not None:
        return known
    if hi - lo < 2:
        raise ValueError(f"no value for the tree node [{lo}, {hi}), and it has no children to combine")
    mid = middle(lo, hi)
    return combine(fold(lo, mid, value, combine), fold(mid, hi, value, combine))
