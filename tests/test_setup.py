"""What ranks tell each other before and between steps."""

import pytest

from dpresnet.setup import odd_ranks, straggler

A, B, C = b"a", b"b", b"c"


@pytest.mark.parametrize(("fingerprints", "said"), [
    ([A], ""),
    ([A, A, A], ""),
    ([A, B, A], "rank 1 on node1 holds other parameters than the other 2 ranks"),
    ([B, A, A, C, A], "rank 0 on node0, rank 3 on node3 hold other parameters than the other 3 ranks"),
    ([A, B], "rank 0 on node0, rank 1 on node1 hold different parameters, and no majority tells which are right"),
    ([A, B, B, A, C], "rank 0 on node0, rank 1 on node1, rank 2 on node2, rank 3 on node3, rank 4 on node4 hold different "
                      "parameters, and no majority tells which are right"),
])  # fmt: skip
def test_the_minority_is_named_with_its_host(fingerprints, said):
    assert odd_ranks([(fingerprint, f"node{rank}") for rank, fingerprint in enumerate(fingerprints)]) == said


@pytest.mark.parametrize(
    ("busy_s", "expected"),
    [([1.0, 1.0, 3.0], (2, 3.0)), ([2.0, 1.0], (0, 2.0)), ([0.0, 0.0, 5.0], (2, 1.0)), ([4.0], (0, 1.0))],
)
def test_straggler_is_the_busiest_against_the_median(busy_s, expected):
    assert straggler(busy_s) == pytest.approx(expected)
