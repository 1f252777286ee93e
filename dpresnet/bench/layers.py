"""The interleaved comparison of single convolutions: each that differs in a network, forward and both gradients.

As in `bench.step` both sides wait in processes of their own and take turns, for each layer and direction, and the ratio
within a pair counts. On both sides a layer that is repeated finds all its arrays in the caches, as far as they fit; in a step
only what the layer before has left.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack

from tqdm import tqdm

from dpresnet.bench.child import Child
from dpresnet.bench.facts import spread, table, tuned_text
from dpresnet.bench.step import spinning
from dpresnet.bench.workload import DIRECTIONS, Facts, Layer, Workload

VARIANTS = ["contiguous", "channels_last"]  # memory formats of PyTorch: the faster one counts


def measure(work: Workload, against: bool, pairs: int, turn_s: float) -> Facts:
    """Samples of every layer of both sides, or of ours alone, and what follows from them."""
    with ExitStack() as stack:
        children = {"theirs": stack.enter_context(Child("their layers", work, variants=VARIANTS))} if against else {}
        children["ours"] = stack.enter_context(Child("our layers", work))
        names = {side: child.hello()[0]["name"] for side, child in children.items()}
        [listed] = children["ours"].ask("layers")
        rows, turns = [], {side: [] for side in children}
        for found in tqdm(listed["layers"], unit="layer", leave=False, disable=None):
            ready = {side: child.ask("prepare", layer=found["layer"])[0] for side, child in children.items()}
            rows.append(found | {name: one_direction(children, ready, name, pairs, turn_s, turns) for name in DIRECTIONS})
    warnings = [line for side in turns for line in spinning(names[side], turns[side])] if against else []
    facts = {"device": names["ours"], "peer": names.get("theirs"), "tuned": listed["tuned"], "pairs": pairs}
    return facts | summary(rows) | {"warnings": warnings}


def one_direction(children: dict[str, Child], ready: dict[str, Facts], direction: str, pairs: int, turn_s: float,
                  turns: dict[str, list[Facts]]) -> Facts:  # fmt: skip
    """Seconds of a call of each side in each of its turns; ``turns`` gets all that the sides say about them."""
    calls = {side: max(1, round(turn_s / found["seconds"][direction])) for side, found in ready.items()}
    samples: dict[str, list[float]] = {side: [] for side in children}
    for _ in range(pairs):
        for side, child in children.items():
            [answer] = child.ask("run", direction=direction, calls=calls[side])
            samples[side].append(answer["seconds"])
            turns[side].append(answer)
    return {"seconds": samples, "variant": ready.get("theirs", {}).get("variant", {}).get(direction)}


def summary(rows: list[Facts]) -> Facts:
    """Adds medians and ratios of every layer and direction, and what all layers of the network come to."""
    for row in rows:
        for part in (row[name] for name in DIRECTIONS):
            part["median_s"] = {side: statistics.median(samples) for side, samples in part["seconds"].items()}
            if "theirs" in part["seconds"]:
                pairs = zip(part["seconds"]["theirs"], part["seconds"]["ours"], strict=True)
                part["ratios"] = [theirs / ours for theirs, ours in pairs]
                part["ratio"] = spread(part["ratios"])
    totals = {
        name: {side: sum(row["count"] * row[name]["median_s"][side] for row in rows) for side in rows[0][name]["median_s"]}
        for name in DIRECTIONS
    }
    return {"rows": rows, "totals": totals}


def report(results: Facts, work: Workload) -> str:
    """The table on the terminal: layers in the order of the network."""
    peer, rows = results["peer"], results["rows"]
    titles = ["layer", "times"]
    for name in DIRECTIONS:
        titles += [f"{name}: PyTorch ms", "dpresnet ms", "ratio", "least..most"] if peer else [f"{name} ms"]
    lines = [f"convolutions alone: {work}", *([f"{peer} in fp32, {' or '.join(VARIANTS)}"] if peer else []), results["device"],
             tuned_text(results["tuned"]), ""]  # fmt: skip
    cells = [[str(Layer(**row["layer"])), str(row["count"]), *(c for name in DIRECTIONS for c in part_cells(row[name]))]
             for row in rows]  # fmt: skip
    lines.append(table(titles, [*cells, total_cells(results)]))
    if peer:
        slower = [f"{Layer(**row['layer'])} {name}" for row in rows for name in DIRECTIONS if row[name]["ratio"]["median"] < 1]
        lines.append(f"\nratios of layers are medians of {results['pairs']} pairs, that of all is one of sums of medians\n"
                     f"slower than PyTorch: {', '.join(slower) or 'none'}")  # fmt: skip
    return "\n".join([*lines, *(f"WARNING: {line}" for line in results["warnings"])])


def part_cells(part: Facts) -> list[str]:
    """The cells of one direction of a layer."""
    milliseconds = [f"{1e3 * seconds:.3f}" for seconds in part["median_s"].values()]
    if "ratio" not in part:
        return milliseconds
    ratio = part["ratio"]
    return [*milliseconds, f"{ratio['median']:.2f} x", f"{ratio['least']:.2f}..{ratio['most']:.2f}"]


def total_cells(results: Facts) -> list[str]:
    """The last row: all layers, as often as the network has them."""
    cells = ["all of the network", str(sum(row["count"] for row in results["rows"]))]
    for total in results["totals"].values():
        cells += [f"{1e3 * seconds:.1f}" for seconds in total.values()]
        if "theirs" in total:
            cells += [f"{total['theirs'] / total['ours']:.2f} x", ""]
    return cells
