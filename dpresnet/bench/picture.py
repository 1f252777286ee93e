"""Pictures of what was measured, drawn from the same facts that go into the JSON file. Needs matplotlib."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from dpresnet.bench.memory import part_names
from dpresnet.bench.workload import DIRECTIONS, Facts, Layer, Workload
from dpresnet.errors import require

OURS, THEIRS, GREY = "#0072b2", "#d55e00", "#8a8a8a"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, told apart by everybody
MARKERS = "osD^vP"
MIB = 2**20
SMALLEST_PART = 0.002  # of the highest peak, that is drawn
MOST_BARS = 18  # kernels that are drawn by themselves


def check() -> None:
    """Refuses when there is no matplotlib."""
    require("matplotlib", "matplotlib", "--png", "bench", " (in a checkout: make .venv/installed-bench), or leave --png out")


def draw(command: str, found: Facts, work: Workload, path: Path) -> None:
    """Draws the results of a subcommand into a file; its suffix chooses the format."""
    style()
    drawn = {"step": step, "layers": layers, "ops": ops, "memory": memory, "project": project, "scaling": scaling}
    figure = drawn[command](found["results"], work)
    box, commit = found["machine"], found["commit"] or f"dpresnet {found['versions']['dpresnet']}"
    figure.text(0.995, 0.008, f"{found['date'][:10]}, {commit}, {box['cpu']}", ha="right", fontsize=7, color=GREY)
    figure.savefig(path, dpi=150)


def style() -> None:
    """What all pictures look like; they need no screen."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}


def figure_of(width: float, height: float, title: str, **grid: Any) -> tuple[Any, Any]:
    """A figure with a title and its axes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained", **grid)
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    figure.suptitle(title, fontsize=11)
    return figure, axes


# ---- step


def step(results: Facts, work: Workload) -> Any:
    """Images/s of every turn, and the ratio of every pair with their median."""
    ratios = results.get("ratios", [])
    figure, axes = figure_of(9 if ratios else 5.5, 3.8, f"{work.pass_name}: {work}", ncols=2 if ratios else 1, squeeze=False)
    rates = axes[0][0]
    for side, label, colour in (("theirs", "PyTorch", THEIRS), ("ours", "dpresnet", OURS)):
        if side in results["sides"]:
            speed = results["sides"][side]["images_per_s"]
            variant = results["sides"][side].get("variant")
            rates.plot(range(1, len(speed) + 1), speed, "o-", color=colour, label=f"{label} ({variant})" if variant else label)
    top = max(max(side["images_per_s"]) for side in results["sides"].values())
    rates.set(xlabel="turn", ylabel="images/s", ylim=(0, 1.25 * top), title="throughput")
    rates.legend(loc="upper left", ncols=2, frameon=False)
    if ratios:
        median, chart = results["ratio"]["median"], axes[0][1]
        chart.bar(range(1, len(ratios) + 1), ratios, color=OURS, width=0.6)
        chart.axhline(median, color="black", linewidth=1, label=f"median {median:.2f} x")
        chart.axhline(1, color=THEIRS, linewidth=1, linestyle="--", label="PyTorch")
        chart.set(xlabel="pair", ylabel="ratio", ylim=(0, 1.25 * max(*ratios, 1)), title="dpresnet / PyTorch, pair by pair")
        chart.legend(loc="upper left", ncols=2, frameon=False)
    for chart in axes[0]:
        chart.xaxis.get_major_locator().set_params(integer=True)
    return figure


# ---- layers


def layers(results: Facts, work: Workload) -> Any:
    """How many times as fast as PyTorch each layer is (alone: its milliseconds), forward and backward."""
    rows, compared = results["rows"], bool(results["peer"])
    figure, axes = figure_of(9, 1.8 + 0.42 * len(rows), f"convolutions alone: {work}", squeeze=False)
    chart, height = axes[0][0], 0.38
    for place, (direction, colour) in enumerate(zip(DIRECTIONS, (OURS, SERIES[2]), strict=True)):
        parts = [row[direction] for row in rows]
        values = [part["ratio"]["median"] if compared else 1e3 * part["median_s"]["ours"] for part in parts]
        chart.barh([i + (place - 0.5) * height for i in range(len(rows))], values, height, color=colour, label=direction)
    if compared:
        chart.axvline(1, color=THEIRS, linewidth=1, linestyle="--", label="PyTorch")
    chart.set_yticks(range(len(rows)), [str(Layer(**row["layer"])) for row in rows])
    chart.set(xlabel="PyTorch's time / dpresnet's" if compared else "ms")
    chart.invert_yaxis()
    chart.legend(loc="lower right", frameon=False)
    return figure


# ---- ops


def ops(results: Facts, work: Workload) -> Any:
    """Roofline of launches with operations, bandwidth of the others, and time by kernel."""
    figure, axes = figure_of(13, 8.4, f"launches of a {work.pass_name}: {work}", nrows=2, ncols=2,
                             width_ratios=(1, 1.05))  # fmt: skip
    grid = axes[0][1].get_gridspec()
    for chart in axes[:, 1]:
        chart.remove()
    peaks = {name: results["peaks"][name]["median"] / 1e9 for name in ("fma", "memory", "cache")}
    roofline(axes[0][0], results["rows"], peaks)
    bandwidth(axes[1][0], results["rows"], peaks, results["cache_bytes"])
    bars(figure.add_subplot(grid[:, 1]), results)
    return figure


def roofline(chart: Any, rows: list[Facts], peaks: dict[str, float]) -> None:
    """GFLOP/s against operations per byte, on logarithmic axes; areas are times."""
    found = [row for row in rows if row["flops"]]
    xs = [row["flops"] / row["bytes"] for row in found]
    left, right = min(*xs, peaks["fma"] / peaks["cache"] / 2) / 2, max(xs) * 2
    bottom = min(row["rate"] for row in found) / 2e9
    groups(chart, found, xs, [row["rate"] / 1e9 for row in found])
    for name, style in (("memory", "-"), ("cache", "--")):
        ridge = peaks["fma"] / peaks[name]
        start = max(left, bottom / peaks[name])
        if start < ridge:
            chart.plot((start, ridge), (start * peaks[name], peaks["fma"]), style, color="black", linewidth=1,
                       label=f"{name}: {peaks[name]:.0f} GB/s")  # fmt: skip
    chart.plot((min(left, peaks["fma"] / peaks["cache"]), right), (peaks["fma"],) * 2, "-", color="black", linewidth=1.8,
               label=f"multiply-adds: {peaks['fma']:.0f} GFLOP/s")  # fmt: skip
    chart.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, 1.6 * peaks["fma"]), xlabel="FLOP per byte",
              ylabel="GFLOP/s", title="launches with operations (area: time)")  # fmt: skip
    legend(chart)


def bandwidth(chart: Any, rows: list[Facts], peaks: dict[str, float], cache_bytes: int) -> None:
    """GB/s against the bytes touched, with the peak that applies to each size."""
    found = [row for row in rows if not row["flops"]]
    xs = [row["bytes"] / MIB for row in found]
    left, right, cache = min(xs) / 2, max(max(xs), cache_bytes / MIB) * 2, cache_bytes / MIB
    groups(chart, found, xs, [row["rate"] / 1e9 for row in found])
    for name, ends, style in (("cache", (left, cache), "--"), ("memory", (cache, right), "-")):
        label = f"{name}: {peaks[name]:.0f} GB/s"
        chart.plot(ends, (peaks[name],) * 2, style, color="black", linewidth=1, label=label)
    bottom = min(row["rate"] for row in found) / 2e9
    chart.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, 2 * max(peaks["cache"], peaks["memory"])),
              xlabel="MiB touched", ylabel="GB/s", title="launches without operations (area: time)")  # fmt: skip
    legend(chart)


def groups(chart: Any, rows: list[Facts], xs: list[float], ys: list[float]) -> None:
    """A point per launch; the kernels that take most time have colours and markers of their own."""
    times: dict[str, float] = {}
    for row in rows:
        times[row["kernel"]] = times.get(row["kernel"], 0.0) + row["median_s"]
    first = sorted(times, key=lambda kernel: -times[kernel])[: len(SERIES)]
    longest = max(row["median_s"] for row in rows)
    for kernel in [None, *reversed(first)]:
        chosen = [i for i, row in enumerate(rows) if (row["kernel"] if row["kernel"] in first else None) == kernel]
        if chosen:
            place = first.index(kernel) if kernel else 0
            look = {"color": SERIES[place], "marker": MARKERS[place]} if kernel else {"color": GREY, "marker": "o"}
            areas = [12 + 120 * rows[i]["median_s"] / longest for i in chosen]
            chart.scatter([xs[i] for i in chosen], [ys[i] for i in chosen], s=areas, label=kernel or "others", alpha=0.6,
                          linewidths=0.4, edgecolors="white", zorder=3, **look)  # fmt: skip


def legend(chart: Any) -> None:
    """Beside the chart, so that it covers no point; markers of one size."""
    shown = chart.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7.5)
    for handle in shown.legend_handles:
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([36])


def bars(chart: Any, results: Facts) -> None:
    """Time by kernel: what the peaks would leave of it, and what is lost against them."""
    kernels = sorted(results["kernels"], key=lambda k: -k["seconds"])
    shown, others = kernels[:MOST_BARS], kernels[MOST_BARS:]
    if others:
        sums = {key: sum(k[key] for k in others) for key in ("seconds", "lost_s", "of_sum")}
        shown = [*shown, {"kernel": f"{len(others)} others", **sums}]
    names = [k["kernel"] for k in shown]
    lost = [1e3 * k["lost_s"] for k in shown]
    needed = [1e3 * k["seconds"] - part for k, part in zip(shown, lost, strict=True)]
    chart.barh(names, needed, color=OURS, label="needed at the peak")
    chart.barh(names, lost, left=needed, color="#9fc8e0", label="lost against the peak")
    longest = 1e3 * shown[0]["seconds"]
    for i, k in enumerate(shown):
        milliseconds = 1e3 * k["seconds"]
        chart.text(milliseconds + 0.01 * longest, i, f"{milliseconds:.2f} ms, {k['of_sum']:.1%}", va="center", fontsize=8)
    chart.invert_yaxis()
    step = results["step"]
    wall, outside = 1e3 * statistics.median(step["wall_s"]), results["outside_convolutions"]
    title = (f"time by kernel: {1e3 * results['sum_s']:.1f} ms in all, a step {wall:.1f} ms;\n"
             f"{outside['of_step']:.0%} of the step outside convolutions, {step['share']:.1%} in no kernel")  # fmt: skip
    chart.set(xlim=(0, 1.4 * longest), xlabel="ms per step", title=title)
    chart.legend(loc="lower right", frameon=False)


# ---- memory


def memory(results: Facts, work: Workload) -> Any:
    """What each process holds at its peak, by part."""
    sides = results["sides"]
    title = f"peak memory of a process that trains\n{work}"
    if "ratio" in results:
        title += f"; {results['ratio']:.2f} x {results['compared_with']}"
    figure, axes = figure_of(3.2 + 1.6 * len(sides), 5.2, title, squeeze=False)
    chart, names = axes[0][0], list(sides)
    most = max(side["spread"]["most"] for side in sides.values()) / MIB
    largest = {part: max(side["parts"].get(part, 0) for side in sides.values()) / MIB for part in part_names(results)}
    parts = [part for part, size in largest.items() if size > SMALLEST_PART * most]
    import matplotlib

    colours = matplotlib.colormaps["tab20"].colors
    bottoms = [0.0] * len(names)
    for number, part in enumerate(parts):
        heights = [max(0, side["parts"].get(part, 0)) / MIB for side in sides.values()]
        colour = "#dddddd" if part == "rest" else colours[number % len(colours)]
        chart.bar(names, heights, bottom=bottoms, width=0.6, color=colour, label=part)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for i, side in enumerate(sides.values()):
        chart.text(i, bottoms[i] + 0.01 * most, f"{side['spread']['median'] / MIB:.0f} MiB", ha="center", va="bottom")
    chart.set(ylabel="MiB", ylim=(0, 1.1 * max(*bottoms, most)))
    chart.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names])
    handles, labels = chart.get_legend_handles_labels()
    chart.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


# ---- scaling


def scaling(results: Facts, work: Workload) -> Any:
    """The ratios of every round with their medians, and what is left of the speed of one rank."""
    ratios, spreads = results["ratios"], results["spreads"]
    figure, axes = figure_of(10, 4.2, f"{work.pass_name} on {results['ranks']} ranks: {work} for each", ncols=2,
                             width_ratios=(1.4, 1))  # fmt: skip
    lines = [("weak", "job: one / job", OURS), ("ceiling", "its ceiling: one / apart", GREY),
             ("of_ceiling", "apart / job", SERIES[2]), ("ddp_weak", "DDP: ddp one / ddp", THEIRS)]  # fmt: skip
    rounds, most = axes[0], 1.0
    for name, label, colour in lines:
        if name in ratios:
            median, most = spreads[name]["median"], max(most, *ratios[name])
            rounds.plot(range(1, len(ratios[name]) + 1), ratios[name], "o-", color=colour, label=f"{label}: {median:.2f}")
            rounds.axhline(median, color=colour, linewidth=1, linestyle="--")
    rounds.set(xlabel="round", ylabel="ratio", ylim=(0, 1.35 * most), title="round by round, with medians")
    rounds.xaxis.get_major_locator().set_params(integer=True)
    rounds.legend(loc="upper left", ncols=2, frameon=False)
    bars, kept = axes[1], [("one", None, OURS), ("apart", "ceiling", GREY), ("job", "weak", OURS), ("ddp", "ddp_weak", THEIRS)]
    for place, (name, key, colour) in enumerate(entry for entry in kept if entry[1] is None or entry[1] in spreads):
        found = spreads[key] if key else {"median": 1.0, "least": 1.0, "most": 1.0}
        median = found["median"]
        bars.bar(name, median, yerr=[[median - found["least"]], [found["most"] - median]], color=colour, width=0.6, capsize=3)
        bars.text(place, found["most"] + 0.02, f"{median:.2f}", ha="center", va="bottom")
    bars.set(ylabel="efficiency", ylim=(0, 1.2 * most), title="speed of a process, by that of one alone (PyTorch: its own)")
    return figure


# ---- project


def project(results: Facts, work: Workload) -> Any:
    """The step on more and more nodes, by what it consists of, and the efficiency."""
    rows, layout = results["rows"], results["layout"]
    machine = results["machine"]
    title = (f"projected training step: {work}, per rank\n{layout['ranks_per_node']} per node, "
             f"{machine['beta'] * 8e-9:.3g} Gbit/s, {1e6 * machine['alpha_s']:.3g} us")  # fmt: skip
    figure, axes = figure_of(9, 4, title, ncols=2, squeeze=False)
    chart, efficiency = axes[0]
    places = range(len(rows))
    bottoms = [0.0] * len(rows)
    exchanges, exposed = ([1e3 * row[key] for row in rows] for key in ("held_s", "exposed_s"))
    kernels = [1e3 * row["step_s"] - a - b for row, a, b in zip(rows, exchanges, exposed, strict=True)]
    parts = {"kernels and host": kernels, "exchanges of statistics": exchanges, "gradients not hidden": exposed}
    for (label, heights), colour in zip(parts.items(), (OURS, SERIES[3], SERIES[4]), strict=True):
        chart.bar(places, heights, bottom=bottoms, color=colour, label=label)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    chart.set(xlabel="nodes", ylabel="ms per step", ylim=(0, 1.25 * max(bottoms)))
    chart.legend(loc="upper left", frameon=False)
    efficiency.plot(places, [row["efficiency"] for row in rows], "o-", color=OURS)
    efficiency.set(xlabel="nodes", ylabel="efficiency", ylim=(0, 1.05))
    for axis in (chart, efficiency):
        axis.set_xticks(places, [str(row["nodes"]) for row in rows])
    return figure
