"""The bucketed sum in real jobs: for every number of ranks the bits of one process, whatever order and size."""

import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dpresnet.buckets import TreeAllreduce, allreduce, plan_buckets, segments
from dpresnet.comm import Solo
from dpresnet.events import read
from dpresnet.explain import explain
from tests.launching import mpirun, python
from tests.sweeps import in_sweeps

WORKER = str(Path(__file__).with_name("worker_buckets.py"))
MIB = 2**20
each_wire = pytest.mark.parametrize("wire", ["fp32", "fp16", *in_sweeps("bf16")])


@pytest.mark.parametrize(
    ("wire", "replicas", "ranks"),
    [
        ("fp32", 4, (1, 2, 4)), ("fp32", 6, (1, 2, 3)), ("fp32", 12, (2, 3, 4)), ("fp32", 5, (1, 5)),
        ("fp16", 4, (2, 4)), ("bf16", 4, (2, 4)), ("fp16", 6, (2, 3)),
    ],
)  # fmt: skip
def test_same_bits_for_every_number_of_ranks(wire, replicas, ranks):
    """Each worker compares itself with the fold over all replicas; here the digests of all jobs are compared."""
    digest = digest_of_one_process(wire, replicas)
    for n in ranks:
        found = summed(n, wire, replicas)
        assert (found["ranks"], found["digest"], found["levels"]) == (n, digest, int(n > 1))


@cache
def digest_of_one_process(wire, replicas):
    alone = python([WORKER, replicas, 7, "tree", wire])
    assert alone.returncode == 0, alone.stderr
    return json.loads(alone.stdout)["digest"]


def summed(ranks, wire, replicas, reduce="tree", **env):
    job = mpirun(ranks, [WORKER, replicas, 7, reduce, wire], env=env)
    assert job.returncode == 0, job.stderr
    return json.loads(job.stdout)


# MPICH can pretend that the ranks of one machine sit on several nodes; another MPI ignores these variables.
NEIGHBOURS = {"MPIR_CVAR_CLIQUES_BY_BLOCK": "1"}  # 0 0 1 1
IN_TURN: dict[str, str] = {}  # 0 1 0 1
TEXTS = [
    "allgather-1: the sum of bucket 3 within the node", "allgather-2: the sum of bucket 3 between nodes",
    "alltoall-1: the parts of bucket 3 within the node", "alltoall-2: the parts of bucket 3 between nodes",
]  # fmt: skip
VALUES = {"fp32": 171_039, "fp16": 176_128, "bf16": 171_039}  # in all buckets of the worker


@each_wire
@pytest.mark.parametrize(
    ("replicas", "ranks", "nodes", "placed", "sums", "single"),
    [
        # what each node hands over, for each value: sums of several replicas, and contributions of single ones
        (4, 4, 2, NEIGHBOURS, 1, 0), (8, 4, 2, NEIGHBOURS, 1, 0), (12, 4, 2, NEIGHBOURS, 1, 0), (6, 6, 2, NEIGHBOURS, 1, 0),
        (4, 4, 2, IN_TURN, 0, 2), (8, 4, 2, IN_TURN, 2, 0), (12, 4, 2, IN_TURN, 2, 0), (6, 6, 2, IN_TURN, 0, 3),
        (12, 6, 3, IN_TURN, None, None),  # in which nodes differ in how much their ranks hand over within them
    ],
)  # fmt: skip
def test_same_bits_in_two_levels(wire, replicas, ranks, nodes, placed, sums, single):
    """And between nodes goes what has to: every sum once to each other node, and the total once."""
    found = summed(ranks, wire, replicas, MPIR_CVAR_NUM_CLIQUES=str(nodes), **placed)
    assert found["digest"] == digest_of_one_process(wire, replicas)
    if "MPICH" not in found["mpi"]:
        assert (found["levels"], found["bytes_across"]) == (1, 0)
        return
    assert found["levels"] == 2 and found["bucket_3"] == TEXTS
    if sums is not None:
        in_wire = {"fp32": 4, "fp16": 2 * 129 / 128, "bf16": 2}[wire]
        assert found["bytes_across"] == (4 * sums + in_wire * (single + 1)) * (nodes - 1) * VALUES[wire]


@pytest.mark.parametrize(("ranks", "nodes"), [(4, 3), (3, 2), (2, 2)])
def test_unequal_nodes_sum_at_once(ranks, nodes):
    """As do nodes of one rank: each rank sends every other one a part of its sum, and its part of the total."""
    found = summed(ranks, "fp32", 12, MPIR_CVAR_NUM_CLIQUES=str(nodes))
    assert (found["digest"], found["levels"]) == (digest_of_one_process("fp32", 12), 1)
    if "MPICH" in found["mpi"]:
        assert found["bytes_across"] > 0


@each_wire
@pytest.mark.parametrize(
    ("replicas", "ranks", "nodes", "placed"),
    [(2, 2, 1, {}), (4, 4, 1, {}), (5, 5, 1, {}), (6, 3, 1, {}), (12, 4, 1, {}),
     (8, 4, 2, NEIGHBOURS), (12, 4, 2, NEIGHBOURS), (6, 6, 2, IN_TURN), (12, 4, 2, IN_TURN)],
)  # fmt: skip
def test_same_bits_in_common_memory(wire, replicas, ranks, nodes, placed):
    """Between nodes the same bytes go as between ranks that exchange messages."""
    env = {"MPIR_CVAR_NUM_CLIQUES": str(nodes), **placed} if nodes > 1 else {}
    found = summed(ranks, wire, replicas, "common", **env)
    assert found["common"] and found["digest"] == digest_of_one_process(wire, replicas)
    if nodes > 1 and wire == "fp32":
        assert found["bytes_across"] == summed(ranks, wire, replicas, **env)["bytes_across"]


@pytest.mark.parametrize(("ranks", "nodes"), [(4, 3), (2, 2)])
def test_no_common_memory_where_nodes_do_not_sum_first(ranks, nodes):
    found = summed(ranks, "fp32", 12, "common", MPIR_CVAR_NUM_CLIQUES=str(nodes))
    assert found["common"] == ("MPICH" not in found["mpi"])
    assert found["digest"] == digest_of_one_process("fp32", 12)


ASLEEP = """
import sys, time, pathlib, numpy as np
from dpresnet.buckets import allreduce
from dpresnet.comm import connect
from dpresnet.errors import Late
comm = connect()
comm.keep_events(pathlib.Path(sys.argv[1]))
comm.barrier()
comm.timeout = 2
time.sleep({2: 0.5, 3: 1e6}.get(comm.rank, 0))
sums, gradients = allreduce(comm, comm.size, [slice(0, 64)]), np.ones(64, np.float32)
sums.start(0, [gradients], gradients)
try:
    sums.wait()
except Late as late:
    print(f"{comm.mpi_library} {late}", flush=True)  # one piece, which does not mix with those of other ranks
    time.sleep(2)  # the others too
    comm.abort(1)
"""


def test_the_rank_that_a_whole_node_waits_for_is_named(tmp_path):
    """Ranks 0 and 1, which wait for the other node, do not accuse rank 2, which waits for rank 3."""
    job = mpirun(4, ["-c", ASLEEP, tmp_path], env={"MPIR_CVAR_NUM_CLIQUES": "2", **NEIGHBOURS})
    words = re.findall(r"waited \d s for the parts of bucket 0([^;]*); not there: rank 3 on [^;]*; the limit", job.stdout)
    assert len(words) == 3, job.stdout
    assert sum("between nodes" in where for where in words) == (2 if "MPICH" in job.stdout else 0)
    assert re.match("rank 3 on .* never came to the parts of bucket 0", explain(read(tmp_path)).splitlines()[-1])


@pytest.mark.parametrize(("replicas", "ranks"), [(4, 4), (6, 2)])
def test_sums_of_the_mpi_library(replicas, ranks):
    """Within rounding of the tree, and the same bits on all ranks."""
    job = mpirun(ranks, [WORKER, replicas, 7, "mpi", "fp32"])
    assert job.returncode == 0, job.stderr


def test_every_strategy_is_measured(tmp_path):
    """Half the bytes on a 16-bit wire; each round has every strategy once."""
    job = mpirun(2, ["-m", "dpresnet.bench", "reduce", "--mb", "1", "--bucket-mb", "0.3", "--rounds", "2",
                     "--json", tmp_path / "out.json"])  # fmt: skip
    assert job.returncode == 0, job.stderr
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (found["ranks"], found["hosts"], found["levels"], found["buckets"], found["bytes"]) == (2, 1, 1, 4, 999_936)
    kinds = {(kind["reduce"], kind["wire"]): kind for kind in found["kinds"]}
    assert all(len(kind["seconds"]) == 2 and min(kind["seconds"]) > 0 for kind in kinds.values())
    assert kinds["tree", "fp32"]["sent_bytes"] == kinds["mpi", "fp32"]["sent_bytes"] == found["bytes"]
    assert kinds["tree", "bf16"]["sent_bytes"] == found["bytes"] / 2
    assert kinds["tree", "fp16"]["sent_bytes"] == found["bytes"] / 2 * 129 / 128
    assert kinds["tree in common memory", "fp32"]["sent_bytes"] == found["bytes"]
    assert sum(line.startswith("tree ") for line in job.stdout.splitlines()) == 4
    assert "tree sums in one level" in job.stdout


def test_two_levels_are_reported():
    job = mpirun(4, ["-m", "dpresnet.bench", "reduce", "--mb", "0.1", "--rounds", "1"], env={"MPIR_CVAR_NUM_CLIQUES": "2"})
    assert job.returncode == 0, job.stderr
    expected = "two levels, within nodes and between them" if "MPICH" in job.stdout else "one level"
    assert f"tree sums in {expected}\n" in job.stdout


def test_one_process_cannot_measure_exchanges():
    alone = python(["-m", "dpresnet.bench", "reduce"])
    assert alone.returncode == 78 and "mpirun -n 2 python -m dpresnet.bench reduce" in alone.stderr


def test_buckets_that_a_wire_cannot_carry_are_named():
    with pytest.raises(ValueError, match="a bucket of 130 values cannot travel as fp16: use multiples of 128"):
        allreduce(Solo(), 1, [slice(0, 256), slice(256, 386)], "tree", "fp16")


def solo(sizes, replicas=1):
    bounds = np.cumsum([0, *sizes]).tolist()
    slices = [slice(a, b) for a, b in pairwise(bounds)]
    return TreeAllreduce(Solo(), replicas, slices)


def ones(n):
    return np.ones(n, np.float32)


def test_a_bucket_never_started_is_named():
    reduce = solo([2, 2, 2])
    reduce.start(2, [ones(2)], ones(2))
    reduce.start(0, [ones(2)], ones(2))
    with pytest.raises(RuntimeError, match="bucket 2 was started, but bucket 1, which goes before it, never was"):
        reduce.wait()


def test_a_bucket_started_twice_is_named():
    reduce = solo([2, 2])
    reduce.start(0, [ones(2)], ones(2))
    with pytest.raises(RuntimeError, match="bucket 0 was started twice"):
        reduce.start(0, [ones(2)], ones(2))
    reduce.start(1, [ones(2)], ones(2))
    reduce.wait()
    reduce.start(0, [ones(2)], ones(2))  # the next step


@pytest.mark.parametrize("wrong", [np.ones(3, np.float32), np.ones(2), np.ones(4, np.float32)[::2]])
def test_arrays_that_do_not_fit_are_named(wrong):
    with pytest.raises(ValueError, match=r"bucket 0 takes contiguous float32 of shape \(2,\)"):
        solo([2]).start(0, [wrong], ones(2))
    with pytest.raises(ValueError, match=r"bucket 0 takes"):
        solo([2]).start(0, [ones(2)], wrong)


def test_wrong_number_of_leaves_is_named():
    with pytest.raises(ValueError, match="bucket 0 got 2 leaves for the 3 replicas"):
        solo([2], replicas=3).start(0, [ones(2), ones(2)], ones(2))


def test_indivisible_replicas_are_named():
    class Three(Solo):
        size = 3

    with pytest.raises(ValueError, match="4 replicas cannot be divided among 3 ranks"):
        TreeAllreduce(Three(), 4, [slice(0, 1)])


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize(("n", "unit"), [(0, 1), (1, 1), (2, 1), (7, 1), (8, 1), (1000, 1), (128, 128), (1280, 128)])
def test_segments_cover_the_bucket_evenly(n, unit, ranks):
    lengths = segments(n, ranks, unit)
    assert len(lengths) == ranks and sum(lengths) == n
    assert max(lengths) - min(lengths) <= unit
    assert all(length % unit == 0 for length in lengths)


@pytest.mark.parametrize(
    ("sizes", "first", "cap", "plan"),
    [
        # the first bucket closes with the gradient that reaches 1 MiB, the others at 4 MiB; the last holds the rest
        ([MIB // 2, MIB // 2, 3 * MIB, 2 * MIB, MIB], 1, 4, [(0, 2), (2, 4), (4, 5)]),
        ([10 * MIB, 10 * MIB], 1, 4, [(0, 1), (1, 2)]),
        ([MIB] * 4, 100, 4, [(0, 4)]),
        ([1, 1, 1], 0, 0, [(0, 1), (1, 2), (2, 3)]),
        ([], 1, 25, []),
    ],
)
def test_plan(sizes, first, cap, plan):
    assert plan_buckets(sizes, first, cap) == [range(a, b) for a, b in plan]


def test_plan_has_pytorch_rule_on_random_sizes():
    """Consecutive, complete, and closed neither before nor after the limit was reached."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 3 * MIB, rng.integers(1, 40)).tolist()
        plan = plan_buckets(sizes, 1, 4)
        assert [i for part in plan for i in part] == list(range(len(sizes)))
        for k, part in enumerate(plan):
            limit = (4 if k else 1) * MIB
            total = sum(sizes[i] for i in part)
            assert total - sizes[part[-1]] < limit
            assert total >= limit or k == len(plan) - 1
