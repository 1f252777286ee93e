"""What replicas agree on: one order of combination for every number of ranks and every size of a group."""

import threading

import numpy as np
import pytest

from dpresnet.exchange import TreeExchange, merge_moments

CASES = [(v, p, k) for v in range(1, 13) for p in range(1, v + 1) for k in range(1, v + 1) if v % p == v % k == 0]


class Ranks:
    """Ranks that are threads: each gets a communicator whose allgather waits for all."""

    def __init__(self, size):
        self.size, self.messages, self.barrier, self.calls = size, [None] * size, threading.Barrier(size, timeout=20), 0

    def run(self, body):
        results = [None] * self.size

        def rank_body(rank):
            results[rank] = body(Rank(self, rank))

        threads = [threading.Thread(target=rank_body, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class Rank:
    def __init__(self, ranks, rank):
        self.ranks, self.rank, self.size = ranks, rank, ranks.size

    def allgather(self, array):
        self.ranks.messages[self.rank] = array.copy()
        self.ranks.barrier.wait()
        gathered = np.array(self.ranks.messages)
        self.ranks.calls += self.rank == 0
        self.ranks.barrier.wait()
        return gathered


def mix(left, right):
    """Neither commutative nor associative, and exact: the result tells the whole order."""
    return (31 * left + 7 * right + 1) % 1000003


def by_hand(rows):
    """The tree written out: halves, the left one taking the odd replica."""
    if len(rows) == 1:
        return rows[0]
    half = (len(rows) + 1) // 2
    return mix(by_hand(rows[:half]), by_hand(rows[half:]))


@pytest.mark.parametrize(("replicas", "size", "group"), CASES)
def test_groups_are_combined_in_their_tree(replicas, size, group):
    rows = [np.array([v + 2.0, 100.0 * v]) for v in range(replicas)]
    expected = [by_hand(rows[v - v % group : v - v % group + group]) for v in range(replicas)]
    ranks = Ranks(size)

    def body(comm):
        exchange = TreeExchange(comm, replicas, group)
        roots = exchange.combine_groups(np.array([rows[v] for v in exchange.own]), mix)
        found = [None] * len(exchange.own)
        for root, members in zip(roots, exchange.members, strict=True):
            found[members] = [root] * len(found[members])
        return found

    got = [root for roots in ranks.run(body) for root in roots]
    np.testing.assert_array_equal(got, expected)
    assert ranks.calls == (replicas // size % group > 0)  # groups that lie on one rank need no message


def test_merged_moments_are_those_of_all_values():
    values = np.random.default_rng(0).standard_normal((60, 3)) + 5

    def row(part):
        return np.concatenate([[len(part)], part.mean(0), ((part - part.mean(0)) ** 2).sum(0)])

    merged = merge_moments(row(values[:17]), row(values[17:]))
    np.testing.assert_allclose(merged, row(values), rtol=1e-12)
    empty = np.zeros(7)
    np.testing.assert_array_equal(merge_moments(empty, row(values)), row(values))
    np.testing.assert_array_equal(merge_moments(row(values), empty), row(values))
