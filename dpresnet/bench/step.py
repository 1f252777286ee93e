"""The interleaved comparison of whole steps: theirs, ours, theirs, ours ...

Both sides wait in processes of their own and take turns of some steps. A machine that slows down or speeds up does so for
both halves of a pair, so the ratio within each pair is the result, and their median over the pairs its summary.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack

from dpresnet.bench.child import Child
from dpresnet.bench.facts import spread, table, tuned_text
from dpresnet.bench.workload import Facts, Workload

PROFILED_STEPS = 5
SPINNING = 0.02  # CPU seconds per second of waiting that call for a warning


def measure(work: Workload, variants: list[str], pairs: int, turn_s: float) -> Facts:
    """Samples of both sides (of ours alone without ``variants``) and what follows from them."""
    with ExitStack() as stack:
        sides = [("theirs", stack.enter_context(Child("theirs", work, variants=variants)))] if variants else []
        sides.append(("ours", stack.enter_context(Child("ours", work))))
        found = {name: {"name": child.hello()[0]["name"], **child.ask("warm")[0], "turns": []} for name, child in sides}
        for _ in range(pairs):
            for name, child in sides:
                steps = max(1, round(turn_s / found[name]["step_s"]))
                found[name]["turns"] += child.ask("run", steps=steps)
        if not work.infer:
            found["ours"]["overhead"] = overhead(*dict(sides)["ours"].ask("overhead", steps=PROFILED_STEPS))
    return summary(found, work)


def summary(found: Facts, work: Workload) -> Facts:
    """Adds images/s of every turn and its spread, the ratio of every pair and its spread, and warnings."""
    for side in found.values():
        side["images_per_s"] = [work.batch * len(turn["seconds"]) / sum(turn["seconds"]) for turn in side["turns"]]
        side["spread"] = spread(side["images_per_s"])
    ours = found["ours"]
    results = {"device": ours["name"], "tuned": ours.get("tuned"), "sides": found, "warnings": warnings(found)}
    if "theirs" in found:
        rates = [found[name]["images_per_s"] for name in ("ours", "theirs")]
        results["ratios"] = [ours / theirs for ours, theirs in zip(*rates, strict=True)]
        results["ratio"] = spread(results["ratios"])
    return results


def overhead(profile: Facts) -> Facts:
    """Adds shares of the wall time, per step: in which no kernel ran, of that at exchanges, and of the host thread."""
    walls = profile["wall_s"]
    profile["shares"] = [1 - kernels / wall for kernels, wall in zip(profile["kernels_s"], walls, strict=True)]
    profile["share"] = statistics.median(profile["shares"])
    parts = {"exchanges": "exchange_share", "thread": "thread_share"}
    return profile | {
        name: statistics.median(part / wall for part, wall in zip(profile[f"{key}_s"], walls, strict=True))
        for key, name in parts.items()
    }


def warnings(found: Facts) -> list[str]:
    """What makes figures doubtful: steps without an update, a side that computes while the other is measured."""
    lines = []
    for side in found.values():
        if skipped := sum(turn.get("skipped", 0) for turn in side["turns"]):
            lines.append(f"{side['name']}: the loss scaler dropped {skipped} of the timed steps, which so lack the update")
        if len(found) > 1:
            lines += spinning(side["name"], side["turns"][1:])
    return lines


def spinning(name: str, turns: list[Facts]) -> list[str]:
    """A warning if the threads of a side computed while they waited for these turns."""
    waited, spent = (sum(turn[key] for turn in turns) for key in ("waited_s", "waited_cpu_s"))
    share = spent / waited if waited else 0.0
    return [f"{name}: {share:.0%} of a core was busy while it should have slept"] if share > SPINNING else []


def report(results: Facts, work: Workload) -> str:
    """The table on the terminal."""
    sides, lines = results["sides"], [f"{work.pass_name}: {work}"]
    if "theirs" in sides:
        theirs = sides["theirs"]
        tried = ", ".join(f"{name} {work.batch / seconds:.1f}" for name, seconds in theirs["variants"].items())
        lines.append(f"{theirs['name']}, {theirs['variant']} (images/s in the warm-up: {tried})")
    lines += [sides["ours"]["name"], tuned_text(results["tuned"]), "", pairs_table(results)]
    if "ratio" in results:
        ratio = results["ratio"]
        lines.append(f"\n{ratio['median']:.2f} x PyTorch ({ratio['least']:.2f} to {ratio['most']:.2f} x), "
                     f"median of {len(results['ratios'])} pairs")  # fmt: skip
    if profile := sides["ours"].get("overhead"):
        wall = statistics.median(profile["wall_s"])
        lines.append(f"a profiled step {1e3 * wall:.1f} ms: {overhead_text(profile)}")
    return "\n".join([*lines, *(f"WARNING: {line}" for line in results["warnings"])])


def overhead_text(profile: Facts) -> str:
    """One line."""
    waits = f"; {profile['exchange_share']:.2%} at exchanges" if profile["exchange_share"] else ""
    return (f"{profile['share']:.2%} of it in no kernel ({profile['launches']} launches{waits}); the host thread computes for "
            f"{profile['thread_share']:.2%}")  # fmt: skip


def pairs_table(results: Facts) -> str:
    """Images/s of every turn, with the ratio of every pair."""
    sides = {"theirs": "PyTorch", "ours": "dpresnet"}
    names = [name for name in sides if name in results["sides"]]
    titles = ["images/s", *(sides[name] for name in names), *(["ratio"] if "ratio" in results else [])]
    columns = [results["sides"][name]["images_per_s"] for name in names]
    rows = [[f"pair {i}" if len(names) > 1 else f"turn {i}", *(f"{rate:.1f}" for rate in rates)]
            for i, rates in enumerate(zip(*columns, strict=True), 1)]  # fmt: skip
    for label in ("median", "least", "most"):
        rows.append([label, *(f"{results['sides'][name]['spread'][label]:.1f}" for name in names)])
    if "ratio" in results:
        ratios = [*results["ratios"], *(results["ratio"][label] for label in ("median", "least", "most"))]
        rows = [[*row, f"{ratio:.2f} x"] for row, ratio in zip(rows, ratios, strict=True)]
    return table(titles, rows)
