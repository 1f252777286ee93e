"""Measures:  python -m dpresnet.bench ops [--arch resnet18 --image 32 --batch 32 --precision fp32]

Every entry of a training plan by itself, round by round, and in each round the device's multiply-add peak; shares of the
peak are taken within a round and the median over the rounds is shown, because other work on the machine slows down both.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dpresnet import __version__, environment

CHAINS = 12  # of kernels/probe.cl
PEAK_ROUNDS = 200_000


@dataclass(frozen=True)
class Row:
    """One entry: its seconds, rate and share of the peak (medians), with the smallest and largest share."""

    name: str
    kernel: str
    seconds: float
    gflops: float
    share: float
    least: float
    most: float


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dpresnet.bench", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["ops"], help="ops: each entry of a training plan")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--stem", default="cifar", choices=["imagenet", "cifar", "deep"])
    parser.add_argument("--image", type=int, default=32, help="height and width in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--precision", default="fp32", choices=["fp16", "fp32"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def timed(work: Callable[[], object], finish: Callable[[], None]) -> float:
    """Seconds of something that is enqueued, with nothing else under way."""
    finish()
    begin = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - begin


def measure_ops(args: argparse.Namespace) -> tuple[list[Row], list[float], str]:
    """Rows in the order of the plan, the peak of each round in GFLOP/s, and the device."""
    from dpresnet.device import Device, choose_device
    from dpresnet.model import Model
    from dpresnet.plan import Launch
    from dpresnet.replicas import Replicas
    from dpresnet.resnet import Options

    device = Device(choose_device(args.device))
    options = Options(args.classes, args.stem)
    model = Model(device, args.arch, options, (3, args.image, args.image), args.batch, args.precision)
    replicas = Replicas(model, 0, 1)
    replicas.warm()
    peak = peak_meter(device)
    plan = model.train.plan
    launches = [(e, k) for e, k in zip(plan, replicas.all[0].kernels[plan], strict=True) if isinstance(e, Launch)]
    peaks, seconds = [], []
    for _ in range(args.rounds):
        peaks.append(peak())
        seconds.append([timed(lambda e=e, k=k: replicas.enqueue(e, k), device.finish) for e, k in launches])
    rows = [row(e, times, peaks) for (e, _), times in zip(launches, zip(*seconds, strict=True), strict=True)]
    return rows, peaks, device.name


def row(entry: object, times: tuple[float, ...], peaks: list[float]) -> Row:
    """Medians over the rounds of one entry."""
    rates = [entry.flops / t / 1e9 for t in times]
    shares = [rate / peak for rate, peak in zip(rates, peaks, strict=True)]
    kernel = f"{entry.stem}_{entry.verb}"
    median = statistics.median
    return Row(entry.name, kernel, median(times), median(rates), median(shares), min(shares), max(shares))


def peak_meter(device: object) -> Callable[[], float]:
    """A function that measures GFLOP/s of multiply-adds in registers on all compute units."""
    import numpy as np

    units = 8 * device.compute_units * (1 if device.vector > 1 else 256)
    out = device.arena(4 * 16 * (units + 1))
    kernel = device.program("probe", VEC=device.vector).probe_peak
    rounds = np.int32(PEAK_ROUNDS)
    local = (1,) if device.host_memory else None
    flops = 2 * CHAINS * device.vector * PEAK_ROUNDS * units

    def measure() -> float:
        arguments = (device.queue, (units,), local, out.buffer(0, out.nbytes), rounds)
        return flops / timed(lambda: kernel(*arguments), device.finish) / 1e9

    measure()
    return measure


def report(rows: list[Row], peaks: list[float], device: str, args: argparse.Namespace) -> None:
    """Prints the table, slowest first, and totals per kernel."""
    total = sum(r.seconds for r in rows)
    print(f"{device}\npeak {statistics.median(peaks):.0f} GFLOP/s ({min(peaks):.0f} to {max(peaks):.0f}), {args.arch} "
          f"{args.image}x{args.image}, batch {args.batch}, {args.precision}, median of {args.rounds} rounds")  # fmt: skip
    print(f"{'entry':34s} {'kernel':24s} {'ms':>8s} {'time':>6s} {'GFLOP/s':>8s} {'of peak':>8s}  {'least..most':>12s}")
    for r in sorted(rows, key=lambda r: -r.seconds):
        rate = f"{r.gflops:8.1f} {r.share:8.0%}  {r.least:5.0%} ..{r.most:4.0%}" if r.gflops else ""
        print(f"{r.name:34s} {r.kernel:24s} {1e3 * r.seconds:8.3f} {r.seconds / total:6.1%} {rate}")
    print("\nby kernel")
    for kernel in sorted({r.kernel for r in rows}):
        part = sum(r.seconds for r in rows if r.kernel == kernel)
        print(f"  {kernel:28s} {1e3 * part:9.2f} ms {part / total:6.1%}")


def main() -> None:
    """Runs what the command line asks for."""
    args = arguments()
    environment.prepare(args.threads, 0, 1)
    rows, peaks, device = measure_ops(args)
    report(rows, peaks, device, args)
    if args.json:
        facts = {"version": __version__, "device": device, "machine": platform.processor() or platform.machine(),
                 "date": time.strftime("%Y-%m-%d"), "arguments": {k: str(v) for k, v in vars(args).items()},
                 "peak_gflops": peaks, "rows": [vars(r) for r in rows]}  # fmt: skip
        args.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
