"""Peak memory of processes that train a few steps, and what it consists of.

Each figure is that of a process of its own: what one allocated cannot be told apart later. Where the kernel cache is cold
the first process compiles, which takes memory as well; the median over the runs is that of a warm one.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack

from dpresnet.bench.child import Child
from dpresnet.bench.facts import spread, table
from dpresnet.bench.workload import Facts, Workload

MIB = 2**20


def measure(work: Workload, variants: list[str], steps: int, runs: int) -> Facts:
    """Peaks of ours, and of every variant of theirs; the ratio to the smallest of those."""
    jobs = [("dpresnet", "ours", {}), *((f"PyTorch {name}", "theirs", {"variants": [name]}) for name in variants)]
    samples = {title: [] for title, *_ in jobs}
    for _ in range(runs):
        for title, side, arguments in jobs:
            samples[title].append(one_process(side, work, arguments, steps))
    sides = {title: split(found) for title, found in samples.items()}
    results = {"sides": sides, "device": sides["dpresnet"]["name"]}
    if variants:
        best = min((title for title in sides if title != "dpresnet"), key=lambda title: sides[title]["spread"]["median"])
        ratio = sides["dpresnet"]["spread"]["median"] / sides[best]["spread"]["median"]
        results |= {"ratio": ratio, "compared_with": best}
    return results


def one_process(side: str, work: Workload, arguments: Facts, steps: int) -> Facts:
    """Trains in a fresh process; its name, bytes after importing, after building and at the peak, and the known parts."""
    with ExitStack() as stack:
        child = stack.enter_context(Child(side, work, **arguments))
        [found] = child.hello()
        child.ask("run", steps=steps)
        return found | child.ask("memory")[0]


def split(samples: list[Facts]) -> Facts:
    """The peaks and their spread; the median peak as libraries, known arrays, and the rest."""
    peaks = [sample["peak"] for sample in samples]
    middle = min(samples, key=lambda sample: abs(sample["peak"] - statistics.median(peaks)))
    parts = {"libraries": middle["imported"], **middle["parts"]}
    parts["rest"] = middle["peak"] - sum(parts.values())
    return {"name": middle["name"], "peaks": peaks, "spread": spread(peaks), "parts": parts, "samples": samples}


def report(results: Facts, work: Workload) -> str:
    """The table on the terminal."""
    sides = results["sides"]
    lines = [f"peak memory of a process that trains: {work}", *dict.fromkeys(side["name"] for side in sides.values()), ""]
    names = part_names(results)
    rows = [[name, *(mebibytes(side["parts"].get(name)) for side in sides.values())] for name in names]
    rows += [[label, *(mebibytes(side["spread"][key]) for side in sides.values())]
             for label, key in (("peak", "median"), ("least", "least"), ("most", "most"))]  # fmt: skip
    lines.append(table(["MiB", *sides], rows))
    lines += ["", "libraries: after importing; the named parts are what arrays of that kind take; rest: everything else",
              "(driver, compiler, PyTorch's activations, Python's objects), below 0 where arrays were not touched"]  # fmt: skip
    if "ratio" in results:
        lines.append(f"{results['ratio']:.2f} x {results['compared_with']}")
    return "\n".join(lines)


def part_names(results: Facts) -> list[str]:
    """Parts of any side, the rest last."""
    names = dict.fromkeys(name for side in results["sides"].values() for name in side["parts"])
    return [*(name for name in names if name != "rest"), "rest"]


def mebibytes(nbytes: int | None) -> str:
    """A cell; empty for what a side does not have."""
    return "" if nbytes is None else f"{nbytes / MIB:.1f}"
