"""The reduction tree: a partition for every division into ranks, one combination order, the same bits for every P."""

import itertools

import numpy as np
import pytest

from dpresnet import tree

SIZES = range(1, 25)
DIVISIONS = [(v, p) for v in SIZES for p in range(1, v + 1) if v % p == 0]


def ranges(v, p):
    return [(r * v // p, (r + 1) * v // p) for r in range(p)]


def all_nodes(lo, hi):
    """Every node below [lo, hi), written out from the definition rather than with the module's own functions."""
    if hi - lo == 1:
        return {(lo, hi)}
    mid = lo + (hi - lo + 1) // 2
    return {(lo, hi)} | all_nodes(lo, mid) | all_nodes(mid, hi)


def written(v, lo=0, hi=None):
    return tree.fold(lo, v if hi is None else hi, lambda a, b: str(a) if b - a == 1 else None, "({}+{})".format)


@pytest.mark.parametrize(
    ("v", "text"),
    [(1, "0"), (2, "(0+1)"), (3, "((0+1)+2)"), (4, "((0+1)+(2+3))"), (5, "(((0+1)+2)+(3+4))"),
     (6, "(((0+1)+2)+((3+4)+5))"), (7, "(((0+1)+(2+3))+((4+5)+6))")],
)  # fmt: skip
def test_combination_order(v, text):
    assert written(v) == text


@pytest.mark.parametrize(("v", "p"), DIVISIONS)
def test_maximal_nodes_partition_each_rank(v, p):
    for lo, hi in ranges(v, p):
        nodes = tree.maximal_nodes(v, range(lo, hi))
        assert [i for a, b in nodes for i in range(a, b)] == list(range(lo, hi))
        assert set(nodes) <= all_nodes(0, v)


@pytest.mark.parametrize(("v", "p"), DIVISIONS)
def test_nodes_are_maximal(v, p):
    """No larger node of the tree fits: each node found is not a proper part of another that also lies inside."""
    for lo, hi in ranges(v, p):
        fitting = [(a, b) for a, b in all_nodes(0, v) if lo <= a and b <= hi]
        largest = [(a, b) for a, b in fitting if not any((c, d) != (a, b) and c <= a and b <= d for c, d in fitting)]
        assert tree.maximal_nodes(v, range(lo, hi)) == sorted(largest)


def test_powers_of_two_send_one_node():
    for i, j in itertools.combinations_with_replacement(range(6), 2):
        v, p = 2**j, 2**i
        assert all(len(tree.maximal_nodes(v, range(lo, hi))) == 1 for lo, hi in ranges(v, p))


@pytest.mark.parametrize("v", range(1, 33))
def test_maximal_nodes_of_any_replicas(v):
    """Against the definition: they lie inside, cover all, are disjoint, and no parent of theirs lies inside."""
    draw = np.random.default_rng(v)
    subsets = [[], list(range(v)), list(range(0, v, 2)), list(range(1, v, 2))]
    subsets += [sorted(draw.permutation(v)[:n].tolist()) for n in draw.integers(0, v + 1, 40)]
    for owned in subsets:
        nodes = tree.maximal_nodes(v, owned)
        assert [i for lo, hi in nodes for i in range(lo, hi)] == owned
        assert set(nodes) <= all_nodes(0, v)
        larger = [(a, b) for lo, hi in nodes for a, b in all_nodes(0, v) if a <= lo and hi <= b and (a, b) != (lo, hi)]
        assert not any(set(range(a, b)) <= set(owned) for a, b in larger)


def wild(v, n=97, seed=0):
    """float32 [v, n] over 40 binary orders of magnitude: any other order of summation changes bits."""
    rng = np.random.default_rng([seed, v])
    return np.ldexp(rng.standard_normal((v, n)), rng.integers(-20, 20, (v, n))).astype(np.float32)


def direct(x, lo, hi):
    if hi - lo == 1:
        return x[lo]
    mid = lo + (hi - lo + 1) // 2
    return direct(x, lo, mid) + direct(x, mid, hi)


@pytest.mark.parametrize(("v", "p"), DIVISIONS)
def test_sum_over_ranks_has_the_bits_of_the_direct_recursion(v, p):
    x = wild(v)
    partial = {}
    for lo, hi in ranges(v, p):
        for node in tree.maximal_nodes(v, range(lo, hi)):
            partial[node] = tree.fold(*node, lambda a, b: x[a] if b - a == 1 else None, np.add)
    total = tree.fold(0, v, lambda a, b: partial.get((a, b)), np.add)
    assert total.tobytes() == direct(x, 0, v).tobytes()


def test_the_order_matters_for_this_data():
    """Otherwise the test above would show nothing: a running sum over the same data has other bits."""
    for v in range(4, 25):
        x = wild(v)
        assert np.add.accumulate(x)[-1].tobytes() != direct(x, 0, v).tobytes()


def test_missing_value_is_named():
    with pytest.raises(ValueError, match=r"\[2, 3\)"):
        tree.fold(0, 4, lambda a, b: "x" if (a, b) != (2, 3) and b - a == 1 else None, "({}{})".format)
