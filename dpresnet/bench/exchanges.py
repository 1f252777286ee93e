"""What the exchanges of a step cost a job: steps as trained, with sums of gradients after backward, without shared statistics,
on narrower wires, and while a trace is recorded, in turn.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from dpresnet.bench.facts import spread, table
from dpresnet.bench.ours import Ours
from dpresnet.bench.workload import Facts, Workload
from dpresnet.comm import Comm
from dpresnet.config import Config
from dpresnet.errors import Refused
from dpresnet.tracing import Tracer
from dpresnet.wire import WIRES


class Kind(NamedTuple):
    """One way to train."""

    name: str
    bn: str
    wire: str = "fp32"
    overlap: bool = True
    traced: bool = False


def kinds(bn: str) -> list[Kind]:
    """The first is what the others are compared with, and those next to it differ least from it."""
    found = [Kind("as trained", bn)] + ([Kind("local BN", "local")] if bn != "local" else [])
    found += [Kind("traced", bn, traced=True), Kind("no overlap", bn, overlap=False)]
    for wire in WIRES:
        if wire != "fp32":
            found += [Kind(wire, bn, wire), Kind(f"{wire}, no overlap", bn, wire, overlap=False)]
    return found


def measure(comm: Comm, work: Workload, bn: str, rounds: int, turn_s: float, **buckets: float) -> Facts:
    """Seconds of a step of the slowest rank in every round, and what metrics.jsonl would tell of rank 0's exchanges."""
    if comm.size == 1:
        raise Refused("one process has nobody to exchange with: mpirun -n 2 python -m dpresnet.bench exchanges")
    chosen, jobs = kinds(bn), {}
    for kind in chosen:
        if (kind.bn, kind.wire) not in jobs:
            jobs[kind.bn, kind.wire] = Ours(work, comm, kind.bn, wire=kind.wire, **buckets)
    warm_s = [job.warm()["step_s"] for job in jobs.values()]
    steps = max(1, round(turn_s / comm.bcast(warm_s[0])))
    turns: dict[Kind, list[Facts]] = {kind: [] for kind in chosen}
    for _ in range(rounds):
        for kind in chosen:
            turns[kind].append(turn(comm, jobs[kind.bn, kind.wire], kind, steps))
    usual = turns[chosen[0]]
    return {
        "device": jobs[bn, "fp32"].name,
        "tuned": jobs[bn, "fp32"].device.tuned.facts,
        "ranks": comm.size, "hosts": len(set(comm.gather(comm.host))), "mpi": comm.mpi_library, "steps": steps, "bn": bn,
        "buckets": len(jobs[bn, "fp32"].trainer.buckets),
        "kinds": [summary(kind, found, usual) for kind, found in turns.items()],
    }  # fmt: skip


def turn(comm: Comm, job: Ours, kind: Kind, steps: int) -> Facts:
    """Some steps in a row of one kind: seconds of one, of the slowest rank; this rank's traffic in one."""
    job.trainer.overlap = kind.overlap
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json") if kind.traced else ""
        tracer = Tracer(Config(trace=str(path), trace_steps=0), comm, job.trainer.replicas, lambda text: None)
        tracer.start()
        job.step()
        job.device.finish()
        comm.barrier()
        before, began = comm.traffic, time.perf_counter()
        for _ in range(steps):
            job.step()
            tracer.step_done()
        job.device.finish()
        seconds, traffic = (time.perf_counter() - began) / steps, comm.traffic - before
        tracer.finish()
    slowest = float(comm.allgather(np.array(seconds)).max())
    return {"seconds": slowest, **{name: value / steps for name, value in traffic.metrics.items()}}


def summary(kind: Kind, turns: list[Facts], usual: list[Facts]) -> Facts:
    """All samples of a kind, their spreads, and the ratio to the usual step of the same round."""
    samples = {name: [found[name] for found in turns] for name in turns[0]}
    ratios = [mine["seconds"] / theirs["seconds"] for mine, theirs in zip(turns, usual, strict=True)]
    spreads = {name: spread(values) for name, values in samples.items()}
    return kind._asdict() | {"samples": samples, "spread": spreads, "ratio": spread(ratios)}


def report(results: Facts, work: Workload) -> str:
    """The table on the terminal."""
    rows = [row(kind) for kind in results["kinds"]]
    titles = ["", "ms", "", "x as trained", "", "MB sent", "ms under way", "exposed", "of it"]
    head = (f"training step: {work}, per rank; {results['ranks']} ranks on {results['hosts']} hosts, {results['mpi']}, "
            f"{results['bn']} BN, {results['buckets']} buckets, turns of {results['steps']} steps")  # fmt: skip
    lines = [head, results["device"], "", table(titles, rows)]
    ratios = {kind["name"]: kind["ratio"] for kind in results["kinds"]}
    if "local BN" in ratios:
        lines.append(f"\nthe exchanges of {results['bn']} BN take {share(ratios['local BN'])} of the step")
    lines.append(f"recording a trace takes {ratios['traced']['median'] - 1:.1%} more")
    return "\n".join(lines)


def row(kind: Facts) -> list[str]:
    """One kind in the table."""
    found: dict[str, Any] = kind["spread"]
    seconds, ratio = found["seconds"], kind["ratio"]
    under_way, exposed = found["comm_ms"]["median"], found["exposed_ms"]["median"]
    return [
        kind["name"], f"{1e3 * seconds['median']:.1f}", f"{1e3 * seconds['least']:.1f}..{1e3 * seconds['most']:.1f}",
        f"{ratio['median']:.3f}", f"{ratio['least']:.3f}..{ratio['most']:.3f}", f"{found['sent_mb']['median']:.1f}",
        f"{under_way:.1f}", f"{exposed:.1f}", f"{exposed / under_way:.0%}" if under_way else "-",
    ]  # fmt: skip


def share(without: dict[str, float]) -> str:
    """What is left when a step without something takes ``without`` times as long, with its range."""
    return f"{1 - without['median']:.1%} ({1 - without['most']:.1%} to {1 - without['least']:.1%})"
