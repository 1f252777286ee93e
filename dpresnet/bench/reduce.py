"""The sum of gradients over the ranks of a job, by each strategy and wire format in turn; nothing is computed meanwhile."""

from __future__ import annotations

import time

import numpy as np

from dpresnet.bench.facts import spread, table
from dpresnet.bench.workload import Facts
from dpresnet.buckets import Allreduce, allreduce
from dpresnet.comm import Comm
from dpresnet.errors import Refused
from dpresnet.shared import Commons, paged
from dpresnet.wire import BLOCK

KINDS = [("mpi", "fp32"), ("tree", "fp32"), ("tree", "fp16"), ("tree", "bf16")]  # the first is what others are compared with
COMMON = ("tree in common memory", "fp32")  # as in training on a CPU, between ranks of one node
MB = 1e6


def measure(comm: Comm, mb: float, bucket_mb: float, rounds: int) -> Facts:
    """Seconds of every round, of the slowest rank, for one replica per rank with ``mb`` (10^6 bytes) of fp32 gradients."""
    if comm.size == 1:
        raise Refused("one process has nobody to exchange gradients with: mpirun -n 2 python -m dpresnet.bench reduce")
    buckets = cut(int(mb * MB / 4), int(bucket_mb * MB / 4))
    gradients = np.random.default_rng(comm.rank).standard_normal(buckets[-1].stop).astype(np.float32)
    sums, arenas = {kind: allreduce(comm, comm.size, buckets, *kind) for kind in KINDS}, {}
    if shared := comm.share(paged(gradients.nbytes)):
        commons = Commons(shared, 1, paged(gradients.nbytes))
        sums[COMMON] = allreduce(comm, comm.size, buckets, commons=commons)
        arenas[COMMON] = commons.own[0][: gradients.nbytes].view(np.float32)
    samples: dict[tuple[str, str], list[float]] = {kind: [] for kind in sums}
    sent = {}
    for number in range(1 + rounds):  # the first one is to warm up
        for kind in sums:
            arena = arenas.setdefault(kind, np.empty_like(gradients))
            arena[:] = gradients
            seconds, sent[kind] = once(comm, sums[kind], arena, buckets)
            if number:
                samples[kind].append(seconds)
    base = samples[KINDS[0]]
    kinds = [
        {"reduce": kind[0], "wire": kind[1], "seconds": found, "sent_bytes": sent[kind], "spread": spread(found),
         "ratio": spread([mine / theirs for mine, theirs in zip(found, base, strict=True)])}
        for kind, found in samples.items()
    ]  # fmt: skip
    hosts = sorted(set(comm.gather(comm.host)))
    return {"kinds": kinds, "ranks": comm.size, "hosts": len(hosts), "levels": len(comm.groups), "mpi": comm.mpi_library,
            "bytes": 4 * buckets[-1].stop, "buckets": len(buckets)}  # fmt: skip


def cut(values: int, bucket: int) -> list[slice]:
    """Buckets of whole blocks."""
    step = max(1, bucket // BLOCK) * BLOCK
    end = max(1, values // BLOCK) * BLOCK
    return [slice(begin, min(begin + step, end)) for begin in range(0, end, step)]


def once(comm: Comm, sums: Allreduce, arena: np.ndarray, buckets: list[slice]) -> tuple[float, int]:
    """Seconds until the slowest rank has all sums, and the bytes that this one has sent."""
    comm.barrier()
    before, began = comm.traffic, time.perf_counter()
    for k, bucket in enumerate(buckets):
        sums.start(k, [arena[bucket]], arena[bucket])
    sums.wait()
    seconds = time.perf_counter() - began
    sent = (comm.traffic - before).sent_bytes
    return float(comm.allgather(np.array(seconds)).max()), sent


def report(results: Facts) -> str:
    """The table on the terminal."""
    rows = []
    for kind in results["kinds"]:
        seconds, ratio = kind["spread"], kind["ratio"]
        rows.append([kind["reduce"], kind["wire"], f"{1e3 * seconds['median']:.1f}",
                     f"{1e3 * seconds['least']:.1f}..{1e3 * seconds['most']:.1f}", f"{kind['sent_bytes'] / MB:.1f}",
                     f"{ratio['median']:.2f}", f"{ratio['least']:.2f}..{ratio['most']:.2f}"])  # fmt: skip
    rounds = len(results["kinds"][0]["seconds"])
    levels = "two levels, within nodes and between them" if results["levels"] == 2 else "one level"
    head = (f"{results['bytes'] / MB:.1f} MB of gradients in {results['buckets']} buckets, {results['ranks']} ranks on "
            f"{results['hosts']} hosts, {results['mpi']}, {rounds} rounds in which all take turns; "
            f"tree sums in {levels}")  # fmt: skip
    return "\n".join([head, "", table(["reduce", "wire", "ms", "", "MB sent", "x mpi", ""], rows)])
