"""What a job of several ranks is worth: compared with one rank, with as many processes that have nothing to do with each
other, and with one rank that has the images of all.

As in `bench.step` every side waits in processes of its own, and in each round all take a turn, one after the other. So a
machine that slows down does so for all sides of a round, and ratios within the rounds are the result.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import replace

from dpresnet.bench.child import Child
from dpresnet.bench.facts import spread, table, tuned_text
from dpresnet.bench.step import warnings
from dpresnet.bench.workload import Facts, Workload

SIDES = {
    "one": "one rank",
    "apart": "processes by themselves, at the same time",
    "job": "an MPI job",
    "whole": "one rank with the images of all",
    "ddp one": "one process of PyTorch",
    "ddp": "PyTorch's DistributedDataParallel",
}
RATIOS = {  # of seconds per step
    "weak": ("one", "job"),
    "ceiling": ("one", "apart"),
    "of_ceiling": ("apart", "job"),
    "strong": ("whole", "job"),
    "ddp_weak": ("ddp one", "ddp"),
    "against_ddp": ("ddp", "job"),
}
TITLES = {
    "weak": "weak efficiency: one / job",
    "ceiling": "its ceiling here: one / apart",
    "of_ceiling": "of the ceiling: apart / job",
    "strong": "strong speed-up: whole / job",
    "strong_efficiency": "strong efficiency: that by ranks",
    "ddp_weak": "weak efficiency of DDP: ddp one / ddp",
    "against_ddp": "images/s of job by those of ddp",
}


def measure(work: Workload, ranks: int, options: Facts, variants: list[str], pairs: int, turn_s: float) -> Facts:
    """Samples of all sides (without ``variants``: of ours alone), and what follows; ``options`` are those of the job's ranks.

    A side is built and warm before the next one begins to be: it finds kernels in the cache, and is not disturbed.
    """
    found, children = {}, {}
    with ExitStack() as stack:

        def build(name: str, child: Child, images: int) -> None:
            children[name] = stack.enter_context(child)
            hello, warm = child.hello(), child.ask("warm")
            step_s = max(answer["step_s"] for answer in warm)
            found[name] = {"name": hello[0]["name"], "mpi": hello[0]["mpi"], "images": images, "warm": warm,
                           "steps": max(1, round(turn_s / step_s)), "turns": []}  # fmt: skip

        everything = ranks * work.batch
        build("one", Child("ours", work), work.batch)
        build("apart", Child("ours", work, ranks), everything)
        build("job", Child("ours", work, ranks, mpi=True, **options), everything)
        build("whole", Child("ours", replace(work, batch=everything)), everything)
        if variants:
            build("ddp one", Child("theirs", work, variants=variants), work.batch)
            build("ddp", Child("ddp", work, ranks, variant=found["ddp one"]["warm"][0]["variant"]), everything)
        for _ in range(pairs):
            for name, child in children.items():
                found[name]["turns"].append(child.ask("run", steps=found[name]["steps"]))
    return summary(found, ranks) | {"options": options}


def summary(found: Facts, ranks: int) -> Facts:
    """Adds seconds per step of every turn, those of the slowest process, and images/s; then ratios within the rounds."""
    for side in found.values():
        side["seconds"] = [max(statistics.mean(answer["seconds"]) for answer in turn) for turn in side["turns"]]
        side["images_per_s"] = [side["images"] / seconds for seconds in side["seconds"]]
        side["spread"] = spread(side["seconds"])
    ratios = {
        name: [a / b for a, b in zip(found[above]["seconds"], found[below]["seconds"], strict=True)]
        for name, (above, below) in RATIOS.items()
        if {above, below} <= found.keys()
    }
    ratios["strong_efficiency"] = [ratio / ranks for ratio in ratios["strong"]]
    job = found["job"]
    traffic = [{key: statistics.mean(answer["traffic"][key] for answer in turn) for key in turn[0]["traffic"]}
               for turn in job["turns"]]  # fmt: skip
    workers = {(name, rank): {"name": f"{name}, process {rank}", "turns": list(turns)}
               for name, side in found.items() for rank, turns in enumerate(zip(*side["turns"], strict=True))}  # fmt: skip
    return {
        "device": found["one"]["name"],
        "tuned": found["one"]["warm"][0]["tuned"],
        "mpi": job["mpi"],
        "ranks": ranks,
        "sides": found,
        "ratios": ratios,
        "spreads": {name: spread(values) for name, values in ratios.items()},
        "traffic": {key: spread([turn[key] for turn in traffic]) for key in traffic[0]},
        "warnings": warnings(workers),
    }


def report(results: Facts, work: Workload) -> str:
    """The tables on the terminal."""
    sides, ranks, options = results["sides"], results["ranks"], results["options"]
    lines = [f"{work.pass_name} on {ranks} ranks: {work} for each", results["device"], tuned_text(results["tuned"]),
             f"{results['mpi']}, {', '.join(f'{name} {value}' for name, value in options.items())}"]  # fmt: skip
    if "ddp" in sides:
        lines.append(f"{sides['ddp']['name']}, DistributedDataParallel with gloo, {sides['ddp']['warm'][0]['variant']}, fp32: "
                     "each process normalises by itself, because SyncBatchNorm is for GPUs only")  # fmt: skip
    lines += ["", *(f"{name:8}{SIDES[name]}, {side['images']} images per step" for name, side in sides.items())]
    lines += ["", rounds_table(sides), "", ratios_table(results["spreads"])]
    sent, comm, exposed = (results["traffic"][key]["median"] for key in ("sent_mb", "comm_ms", "exposed_ms"))
    lines.append(f"\na step of the job: {sent:.1f} MB sent by a rank, exchanges under way for {comm:.1f} ms, of which it only "
                 f"waited for {exposed:.1f} ms")  # fmt: skip
    return "\n".join([*lines, *(f"WARNING: {line}" for line in results["warnings"])])


def rounds_table(sides: Facts) -> str:
    """Milliseconds per step of every round."""
    columns = [side["seconds"] for side in sides.values()]
    rows = [[f"round {i}", *(f"{1e3 * s:.2f}" for s in row)] for i, row in enumerate(zip(*columns, strict=True), 1)]
    rows += [[label, *(f"{1e3 * side['spread'][label]:.2f}" for side in sides.values())]
             for label in ("median", "least", "most")]  # fmt: skip
    rates = [f"{statistics.median(side['images_per_s']):.1f}" for side in sides.values()]
    return table(["ms per step", *sides], [*rows, ["images/s", *rates]])


def ratios_table(spreads: Facts) -> str:
    """Every ratio over the rounds."""
    rows = [[title, f"{found['median']:.3f}", f"{found['least']:.3f}..{found['most']:.3f}"]
            for name, title in TITLES.items() if (found := spreads.get(name))]  # fmt: skip
    return table(["", "median", "least..most"], rows)
