"""The measurements that a projection needs, and its check: a job's own step against what the model says of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import pyopencl as cl

from dpresnet.bench.facts import spread
from dpresnet.bench.ours import Ours, span
from dpresnet.bench.projection import MB, Layout, Machine, Profile, project, rows, text
from dpresnet.bench.workload import Facts, Workload
from dpresnet.comm import BULK_SPIN_S, Comm, Request, Solo
from dpresnet.exchange import merge_moments
from dpresnet.plan import Exchange, Launch, Ready
from dpresnet.trainer import NAP_S
from dpresnet.wire import BLOCK, WIRES

REPEATS = 7
PROFILED_STEPS = 10
PIECE = 32 * 2**20  # bytes of what is added and copied, more than caches hold
SMALL, LARGE = 8, 16 * 2**20  # bytes of the messages that tell latency and rate
MESSAGES = 50


def measure(comm: Comm, work: Workload, layout: Layout, link: tuple[float, float], nodes: list[int], rounds: int, turn_s: float,
            wire: str, **buckets: float) -> Facts:  # fmt: skip
    """One process: the projection for ``nodes``, over a link of (alpha in s, beta in bytes/s). A job of several ranks: the
    projection for itself, over the link as measured, and its own step, in turns with steps in which no rank needs another.
    """
    alone = Ours(work, Solo(), **buckets)
    steps = max(1, round(turn_s / comm.bcast(alone.warm()["step_s"])))
    if comm.size == 1:
        machine = machine_of(alone, wire, link)
        profile = profile_of(comm, alone, statistics.median(alone.run(rounds * steps)["seconds"]))
        found = {"rows": rows(profile, nodes, layout, machine)}
    else:
        machine = machine_of(alone, wire, *link_of(comm, alone))
        found, profile = checked(comm, work, alone, layout, machine, rounds, steps, wire, **buckets)
    return found | {"device": alone.name, "machine": vars(machine), "layout": vars(layout), "batch": work.batch,
                    "step_s": profile.seconds, "mpi": comm.mpi_library, "ranks": comm.size}  # fmt: skip


def checked(comm: Comm, work: Workload, alone: Ours, layout: Layout, machine: Machine, rounds: int, steps: int, wire: str,
            **buckets: float) -> tuple[Facts, Profile]:  # fmt: skip
    """The step of this job by the model and by the clock, in every round."""
    job = Ours(work, comm, "sync" if layout.sync_bn else "local", wire=wire, **buckets)
    job.warm()
    ratios, measured, predicted = [], [], []
    for _ in range(rounds):
        comm.barrier()
        apart = slowest(comm, statistics.mean(alone.run(steps)["seconds"]))
        mine = slowest(comm, statistics.mean(job.run(steps)["seconds"]))
        comm.barrier()
        profile = profile_of(comm, alone, apart)
        predicted.append(project(profile, layout, machine))
        measured.append(mine)
        ratios.append(predicted[-1]["step_s"] / mine)
    return {"measured_s": measured, "predicted": predicted, "ratios": ratios, "ratio": spread(ratios)}, profile


def slowest(comm: Comm, seconds: float) -> float:
    """Of all ranks."""
    return float(comm.allgather(np.array(seconds)).max())


def profile_of(comm: Comm, side: Ours, step_s: float) -> Profile:
    """The plan of a step of ``step_s``, and how it is shared among the launches in some profiled steps of all ranks."""
    samples = np.concatenate(comm.gather(np.array([profiled_step(side) for _ in range(PROFILED_STEPS)])))
    samples *= step_s / samples[:, -1].mean()  # recording takes time
    buckets, launches, written, entries = side.trainer.buckets, 0, {}, []
    for entry in side.model.train.plan:
        match entry:
            case Launch():
                entries.append({"kind": "launch"})
                written |= dict.fromkeys(entry.statistics, launches)
                launches += 1
            case Exchange():
                after = max(written[source] for source in entry.sources)
                entries.append({"kind": "exchange", "after": after, "bytes": 8 * (1 + entry.size)})
            case Ready():
                entries.append({"kind": "ready", "bytes": 4 * (buckets[entry.bucket].stop - buckets[entry.bucket].start)})
    return Profile(entries, step_s - float(samples[:, :launches].mean(axis=0).sum()), samples[:, :launches])


def profiled_step(side: Ours) -> list[float]:
    """Seconds of every launch, and of the whole step."""
    with side.profiling() as events:
        began = time.perf_counter()
        side.step()
        side.device.finish()
        whole = time.perf_counter() - began
    return [*(end - begin for begin, end in (span(event) for _, event in events)), whole]


def machine_of(side: Ours, wire: str, link: tuple[float, float], link_cpu_s: float = 0.0, queue_s: float = 0.0) -> Machine:
    """What this machine's memory and its host thread can do, and the link."""
    left, right, out = (np.ones(PIECE // 4, np.float32) for _ in range(3))
    row = np.ones(513)
    add = PIECE / least(lambda: np.add(left, right, out=out))
    copy = PIECE / least(lambda: np.copyto(out, left))
    merge_s = least(lambda: merge_moments(row, row)) / 2  # of forward and backward, which only adds
    round_s = least(lambda: WIRES[wire].round(left)) / PIECE if wire != "fp32" else 0.0
    return Machine(*link, add, copy, host_s(side), merge_s, round_s, link_cpu_s, queue_s, side.device.host_memory)


def host_s(side: Ours) -> float:
    """Seconds by which an exchange of statistics lengthens a step when no message is sent."""
    exchanges = sum(isinstance(entry, Exchange) for entry in side.model.train.plan)
    if not side.trainer.sync_bn.alone:  # then it is part of the step that was measured
        return 0.0
    longer = []
    for _ in range(REPEATS):
        seconds = {}
        for side.trainer.sync_bn.alone in (True, False):
            seconds[side.trainer.sync_bn.alone] = min(side.run(2)["seconds"])
        longer.append(seconds[False] - seconds[True])
    side.trainer.sync_bn.alone = True
    return max(0.0, statistics.median(longer)) / exchanges


def least(call: Callable[[], object]) -> float:
    """The shortest of some calls, in seconds."""
    samples = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        samples.append(time.perf_counter() - began)
    return min(samples)


def link_of(comm: Comm, side: Ours) -> tuple[tuple[float, float], float, float]:
    """Latency in seconds and bytes per second of the last level of groups (that between nodes), when nothing else is done; by
    how many seconds a byte on the way delays the kernels; and how long a small message takes in the midst of a large one.
    """
    group = comm.groups[-1]
    small, large, received = (np.ones(group.size * nbytes, np.uint8) for nbytes in (SMALL, LARGE, LARGE))

    def start(data: np.ndarray) -> Request:
        part = data.size // group.size
        return group.start_alltoall(data, [part] * group.size, received[: data.size], [part] * group.size, "a measurement")

    def seconds(data: np.ndarray, times: int) -> float:
        comm.barrier()
        began = time.perf_counter()
        for _ in range(times):
            comm.wait_until(start(data).test, BULK_SPIN_S)
        return slowest(comm, (time.perf_counter() - began) / times)

    seconds(small, MESSAGES)
    alpha_s = seconds(small, MESSAGES) / (group.size - 1)
    took = min(seconds(large, 2) for _ in range(3))
    sent = LARGE * (group.size - 1)
    messages = comm.bcast(max(1, int(computing(comm, side, start, large, 0) / took / 3)))
    longer = [computing(comm, side, start, large, messages) - computing(comm, side, start, large, 0) for _ in range(REPEATS)]
    link_cpu_s = max(0.0, statistics.median(longer)) / (messages * sent)
    return (alpha_s, sent / took), link_cpu_s, statistics.median(queued(comm, start(large), took) for _ in range(5))


def computing(comm: Comm, side: Ours, start: Callable[[np.ndarray], Request], large: np.ndarray, messages: int) -> float:
    """Seconds of forward and backward while so many messages travel, one after the other, as buckets do."""
    comm.barrier()
    began, ends, under_way = time.perf_counter(), [], None
    side.trainer.replicas.run(side.model.train, lambda entry, event: None, lambda bucket, event: ends.append(event))
    side.device.queue.flush()
    seconds = 0.0
    while messages or under_way or not seconds:
        if not seconds and ends[-1].command_execution_status == cl.command_execution_status.COMPLETE:
            seconds = time.perf_counter() - began
        if under_way is None or under_way.test():
            under_way, messages = (start(large), messages - 1) if messages else (None, 0)
        time.sleep(NAP_S if under_way else 10 * NAP_S)
    return slowest(comm, seconds)


def queued(comm: Comm, large: Request, took: float) -> float:
    """Seconds until a small message has arrived everywhere that is sent in the midst of a large one."""
    middle = time.perf_counter() + took / 3
    comm.wait_until(lambda: large.test() or time.perf_counter() > middle, BULK_SPIN_S)
    began = time.perf_counter()
    comm.allgather(np.zeros(SMALL))
    seconds = slowest(comm, time.perf_counter() - began)
    comm.wait_until(large.test, BULK_SPIN_S)
    return seconds


def layout_of(comm: Comm, ranks_per_node: int, bn: str, wire: str) -> Layout:
    """Of this job; of one process with so many ranks on every node."""
    ratio = WIRES[wire].nbytes(BLOCK) / (4 * BLOCK)
    if comm.size > 1:
        ranks_per_node = comm.local_size if comm.groups[0].size == comm.local_size else 1
    return Layout(max(1, comm.size // ranks_per_node), ranks_per_node, bn == "sync", ratio)


def report(results: Facts, work: Workload) -> str:
    """What is printed."""
    machine, layout = results["machine"], results["layout"]
    lines = [
        f"{work.pass_name}: {work}, per rank; {1e3 * results['step_s']:.1f} ms alone",
        results["device"],
        f"link {machine['beta'] / MB:.0f} MB/s, {1e6 * machine['alpha_s']:.1f} us; memory adds {machine['add'] / MB:.0f} MB/s, "
        f"copies {machine['copy'] / MB:.0f} MB/s; an exchange takes {1e6 * machine['host_s']:.0f} us without its messages, "
        f"{1e3 * machine['queue_s']:.1f} ms more behind gradients",
        f"{layout['ranks_per_node']} ranks per node, {'sync' if layout['sync_bn'] else 'local'} BN",
        "",
    ]
    if "rows" in results:
        return "\n".join([*lines, text(results["rows"], results["batch"])])
    measured, ratio = statistics.median(results["measured_s"]), results["ratio"]
    predicted = statistics.median(row["step_s"] for row in results["predicted"])
    return "\n".join([
        *lines,
        f"{results['ranks']} ranks, {results['mpi']}: predicted {1e3 * predicted:.1f} ms, measured {1e3 * measured:.1f} ms, "
        f"ratio {ratio['median']:.3f} ({ratio['least']:.3f}..{ratio['most']:.3f}), {len(results['ratios'])} rounds",
    ])  # fmt: skip
