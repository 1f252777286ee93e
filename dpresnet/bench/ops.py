"""Every launch of a step against the peaks of the device.

A round is one ordinary step and one whose launches are timed by the device, with multiply-add probes between them and
streams through memory and cache before and after. Shares of a peak are taken within a round, against the better of the
two probes around a launch; the median over the rounds is shown, because other work on the machine slows down both.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from typing import Any

from dpresnet.bench.facts import spread, table, tuned_text
from dpresnet.bench.step import overhead, overhead_text
from dpresnet.bench.workload import Facts, Workload

PROBES = 24  # of multiply-adds, per round
LARGE, SMALL = 6.0, 0.5  # bytes of a stream's arrays in last-level caches: through memory, within the cache
CONVOLUTIONS = ("conv", "winograd")  # stems, but not their packing of weights
UPDATED_IN_PLACE = ("optimizer_sgd", "optimizer_lars", "optimizer_adamw", "optimizer_average")  # these read what they write


@dataclass
class Round:
    """Samples of one round: seconds of every launch, FMA/s as (launches before it, rate), bytes/s of the streams."""

    seconds: list[float]
    fma: list[tuple[int, float]]
    memory: float
    cache: float

    def peak(self, launch: int, limit: str) -> float:
        """What a launch is compared with: operations/s of the better neighbouring probe, or bytes/s."""
        if limit != "fma":
            return self.memory if limit == "memory" else self.cache
        after = bisect_right([before for before, _ in self.fma], launch)
        return max(rate for _, rate in self.fma[max(0, after - 1) : after + 1])


@dataclass
class Row:
    """One launch: what it does, and per round its seconds and the share of its peak that it reaches.

    ``limit``: "fma" for launches with operations; "memory" or "cache" for the others, by whether all that they touch fits
    the last-level cache. ``bytes`` counts every array once, and twice where it is updated in place. ``lost_s`` is the part of
    the median time that would not be needed at the peak.
    """

    name: str
    kernel: str
    plan: str
    flops: int
    bytes: int
    limit: str
    seconds: list[float]
    shares: list[float]
    median_s: float = field(init=False)
    share: float = field(init=False)
    rate: float = field(init=False)
    lost_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.median_s, self.share = statistics.median(self.seconds), statistics.median(self.shares)
        self.rate = (self.flops if self.limit == "fma" else self.bytes) / self.median_s
        self.lost_s = self.median_s * max(0.0, 1 - self.share)

    @property
    def convolves(self) -> bool:
        """Whether its kernel is one of the convolutions."""
        stem, verb = self.kernel.split("_", 1)
        return stem in CONVOLUTIONS and not verb.startswith("pack")


def measure(work: Workload, rounds: int) -> Facts:
    """Rows by lost time, totals by kernel, the peaks of every round, and the step as a whole. Loads OpenCL."""
    from dpresnet.bench.ours import Ours
    from dpresnet.bench.peaks import Probes

    side = Ours(work)
    tuned = side.warm()["tuned"]
    probes = Probes(side.device)
    profiles, taken, launches = [], [], []
    for _ in range(rounds):
        profiles.append(side.overhead(1))
        sample, launches = one_round(side, probes, profiles[0]["launches"])
        taken.append(sample)
    plans = {id(entry): name for name, plan in plans_of(side.model).items() for entry in plan}
    rows = [row(i, launch, plans[id(launch)], taken, probes.cache_bytes) for i, launch in enumerate(launches)]
    step = overhead(merged(profiles))
    return {"device": side.name, "tuned": tuned, "cache_bytes": probes.cache_bytes, **summary(rows, taken, step)}


def merged(profiles: list[Facts]) -> Facts:
    """The samples of several profiles as one."""
    lists = {key: value for key, value in profiles[0].items() if isinstance(value, list)}
    return profiles[0] | {key: [value for profile in profiles for value in profile[key]] for key in lists}


def plans_of(model: Any) -> dict[str, Any]:
    """Everything that a step or an evaluation replays."""
    names = {"train": model.train.plan, "evaluate": model.evaluate.plan, "prepare": model.evaluate.prepare}
    return names | {"check": model.update.check, "update": model.update.apply}


def one_round(side: Any, probes: Any, launches: int) -> tuple[Round, list]:
    """One step on a profiling queue, with probes at PROBES places in between; the samples and the launches."""
    fma: list[tuple[int, Any]] = []
    every = max(1, launches // PROBES)

    def between(events: list) -> None:
        if len(events) % every == 0:
            fma.append((len(events), probes.fma()))

    with side.profiling(between) as events:
        streams = {name: probes.stream(size) for name, size in (("memory", LARGE), ("cache", SMALL))}
        fma.append((0, probes.fma()))
        side.step()
        fma.append((len(events), probes.fma()))
        for name, size in (("memory", LARGE), ("cache", SMALL)):
            streams[name] += probes.stream(size)
    rates = {name: max(nbytes / seconds(event) for nbytes, event in samples) for name, samples in streams.items()}
    peaks = [(before, probes.fma_rate(seconds(event))) for before, event in fma]
    return Round([seconds(event) for _, event in events], peaks, **rates), [launch for launch, _ in events]


def seconds(event: Any) -> float:
    """How long a finished command ran on the device."""
    return 1e-9 * max(1, event.profile.end - event.profile.start)


def row(index: int, launch: Any, plan: str, taken: list[Round], cache_bytes: int) -> Row:
    """The launch at one place of the step, over all rounds."""
    kernel, nbytes = f"{launch.stem}_{launch.verb}", touched(launch)
    limit = "fma" if launch.flops else "memory" if nbytes > cache_bytes else "cache"
    work = launch.flops or nbytes
    times = [sample.seconds[index] for sample in taken]
    shares = [work / time / sample.peak(index, limit) for time, sample in zip(times, taken, strict=True)]
    return Row(launch.name, kernel, plan, launch.flops, nbytes, limit, times, shares)


def touched(launch: Any) -> int:
    """Bytes that have to move at least: every array once, and once more if it is read and then written."""
    from dpresnet.plan import Constant

    tensors = {id(tensor): tensor.nbytes for tensor in launch.tensors}
    tables = {id(arg): arg.data.nbytes for arg in launch.args if isinstance(arg, Constant)}
    again = sum(t.nbytes for t in launch.writes) if f"{launch.stem}_{launch.verb}" in UPDATED_IN_PLACE else 0
    return sum(tensors.values()) + sum(tables.values()) + again


def summary(rows: list[Row], taken: list[Round], step: Facts) -> Facts:
    """Sorts by lost time and adds up."""
    total = sum(r.median_s for r in rows)
    kernels = [kernel_total([r for r in rows if r.kernel == kernel], total) for kernel in {r.kernel for r in rows}]
    convolutions = sum(r.median_s for r in rows if r.convolves)
    wall = statistics.median(step["wall_s"])
    fma = [[rate for _, rate in sample.fma] for sample in taken]
    return {
        "rows": [asdict(r) for r in sorted(rows, key=lambda r: -r.lost_s)],
        "kernels": sorted(kernels, key=lambda k: -k["lost_s"]),
        "sum_s": total,
        "lost_s": sum(r.lost_s for r in rows),
        "outside_convolutions": {"of_sum": 1 - convolutions / total, "of_step": 1 - convolutions / wall},
        "step": step,
        "peaks": {
            "fma": {"samples": fma, **spread([rate for rates in fma for rate in rates])},
            "memory": {"samples": [s.memory for s in taken], **spread([s.memory for s in taken])},
            "cache": {"samples": [s.cache for s in taken], **spread([s.cache for s in taken])},
        },
    }


def kernel_total(rows: list[Row], total: float) -> Facts:
    """Launches, time and share of all time of one kernel; operations and lost time."""
    part = sum(r.median_s for r in rows)
    return {"kernel": rows[0].kernel, "launches": len(rows), "seconds": part, "of_sum": part / total,
            "flops": sum(r.flops for r in rows), "bytes": sum(r.bytes for r in rows),
            "lost_s": sum(r.lost_s for r in rows), "convolves": rows[0].convolves}  # fmt: skip


def report(results: Facts, work: Workload) -> str:
    """The tables on the terminal."""
    rows, total = results["rows"], results["sum_s"]
    titles = ("launch", "kernel", "plan", "ms", "time", "rate", "share", "least..most", "of", "lost ms")
    lines = [f"{work.pass_name}: {work}", results["device"], tuned_text(results["tuned"]), *peaks_lines(results), ""]
    lines += [table(titles, [cells(r, total) for r in rows]), "", table(("kernel", "launches", "ms", "time", "lost ms"), [
        (k["kernel"], str(k["launches"]), f"{1e3 * k['seconds']:.2f}", f"{k['of_sum']:.1%}", f"{1e3 * k['lost_s']:.2f}")
        for k in results["kernels"]])]  # fmt: skip
    step, outside = results["step"], results["outside_convolutions"]
    lines += ["", f"sum of all launches {1e3 * total:.2f} ms, of which lost against the peaks {1e3 * results['lost_s']:.2f} ms",
              f"a whole step {1e3 * statistics.median(step['wall_s']):.2f} ms: {overhead_text(step)}"]  # fmt: skip
    lines.append(f"outside convolution kernels: {outside['of_sum']:.1%} of the sum, {outside['of_step']:.1%} of a step")
    return "\n".join(lines)


def peaks_lines(results: Facts) -> list[str]:
    """What shares are shares of."""
    peaks, mib = results["peaks"], results["cache_bytes"] / 2**20
    texts = {"fma": ("GFLOP/s", "multiply-adds in registers"),
             "memory": ("GB/s", f"a stream through {LARGE * mib:.0f} MiB, for launches that touch more than {mib:.0f} MiB"),
             "cache": ("GB/s", f"a stream within {SMALL * mib:.0f} MiB, for all others")}  # fmt: skip
    lines = []
    for name, (unit, text) in texts.items():
        median, least, most = (peaks[name][key] / 1e9 for key in ("median", "least", "most"))
        lines.append(f"{name:6s} {median:6.1f} {unit} ({least:.1f} to {most:.1f}): {text}")
    return lines


def cells(found: Facts, total: float) -> tuple[str, ...]:
    """A row of the table."""
    unit = "GFLOP/s" if found["limit"] == "fma" else "GB/s"
    shares = found["shares"]
    return (found["name"], found["kernel"], found["plan"], f"{1e3 * found['median_s']:.3f}", f"{found['median_s'] / total:.1%}",
            f"{found['rate'] / 1e9:.1f} {unit}", f"{found['share']:.0%}", f"{min(shares):.0%}..{max(shares):.0%}",
            found["limit"], f"{1e3 * found['lost_s']:.3f}")  # fmt: skip
