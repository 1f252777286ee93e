"""``python -m dpresnet.timeline TRACE``: what each rank did in the steps of a trace, in numbers, and one step as a picture.

A trace is what ``python -m dpresnet.train --trace FILE`` leaves, see `dpresnet.trace`. Everything is counted within a step of
the rank: time in which a kernel ran, in which gradients were under way, in which the rank waited for others.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from dpresnet import trace
from dpresnet.bench.facts import check_folder, table
from dpresnet.bench.picture import GREY, SERIES, check, figure_of
from dpresnet.errors import Refused, exit_code
from dpresnet.trace import DEVICE, HOST

COLOURS = {
    "forward": SERIES[0],
    "backward": SERIES[1],
    "update": GREY,
    "statistics, losses": SERIES[3],
    "waiting for gradients or images": SERIES[4],
    "gradients under way": SERIES[2],
}
FORWARD, BACKWARD, UPDATE, EXCHANGE, WAITING, GRADIENTS = COLOURS
WAITS = ("wait for gradients", "wait for images")


class Span(NamedTuple):
    """From ``begin`` to ``end``, in ms."""

    begin: float
    end: float
    name: str
    facts: dict[str, Any]


Spans = dict[tuple[int, str], list[Span]]  # by rank and track


def load(path: Path) -> Spans:
    """The spans of a trace in the order of their begins; asynchronous ones are left out. Refused if it is none."""
    try:
        events = trace.read(path)["traceEvents"]
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror or error}): name a file that --trace has left") from None
    except ValueError as error:
        raise Refused(f"{path} is no trace ({error}): name a file that --trace has left") from None
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: Spans = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            begin, end, key = event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3, (event["pid"], event["tid"])
            found[key[0], tracks[key]].append(Span(begin, end, event["name"], event["args"]))
    return {key: sorted(spans, key=lambda span: (span.begin, -span.end)) for key, spans in found.items()}


def steps_of(spans: Spans) -> dict[int, dict[int, Span]]:
    """The span of each rank in each step, by the number of the step."""
    found: dict[int, dict[int, Span]] = defaultdict(dict)
    for (rank, track), rows in spans.items():
        for row in rows if track == HOST else ():
            if row.name.startswith("step "):
                found[int(row.name.removeprefix("step "))][rank] = row
    if not found:
        raise Refused("no step in this trace is whole: trace more of them, see --trace-steps")
    return dict(sorted(found.items()))


def is_exchange(span: Span) -> bool:
    """Whether the rank did nothing but take part in an exchange."""
    return "channel" in span.facts


def account(spans: Spans, rank: int, step: Span) -> dict[str, float]:
    """Milliseconds of a step of a rank, by what they were spent on; these overlap."""
    host = [row for row in spans[rank, HOST] if step.begin <= row.begin and row.end <= step.end]
    buckets = [row for (owner, track), rows in spans.items() if owner == rank and track.startswith("bucket ") for row in rows]
    gradients = [row for row in host if row.name == "wait for gradients"]

    def covered(rows: Iterable[Span]) -> float:
        return trace.covered(rows, step.begin, step.end)

    return {
        "step": step.end - step.begin,
        "kernels": covered(spans.get((rank, DEVICE), [])),
        "exchanges": covered(filter(is_exchange, host)),
        "gradients": covered(buckets),
        "exposed": covered(gradients),
    }


def report(spans: Spans) -> str:
    """A row for each step and rank."""
    steps = steps_of(spans)
    titles = ["step", "rank", "ms", "kernels", "exchanges", "gradients", "waiting for gradients"]
    rows = [
        [str(number), str(rank), *(f"{value:.1f}" for value in account(spans, rank, step).values())]
        for number, ranks in steps.items()
        for rank, step in sorted(ranks.items())
    ]
    return "\n".join([table(titles, rows), "", *legend()])


def legend() -> list[str]:
    """What the columns mean."""
    return [
        "Milliseconds of the step: in which a kernel ran; in which the rank waited for statistics and other small exchanges;",
        "in which gradients were under way; and of these in which there was nothing else left to do.",
    ]


def typical(steps: dict[int, dict[int, Span]]) -> int:
    """The step whose duration on the first rank is the median, without the very first one."""
    numbers = list(steps)[1:] or list(steps)
    lasting = {number: min(steps[number].items())[1] for number in numbers}
    durations = {number: span.end - span.begin for number, span in lasting.items()}
    middle = median(durations.values())
    return min(durations, key=lambda number: abs(durations[number] - middle))


# The picture


def kinds(device: list[Span]) -> list[tuple[str, Span]]:
    """Kernels as parts of forward, backward and update: the loss is where backward begins."""
    found, kind = [], FORWARD
    for row in device:
        kernel = row.facts.get("kernel", "")
        if row.name == "input":
            kind = FORWARD
        found.append((UPDATE if kernel.startswith("optimizer_") else kind, row))
        if kernel.startswith("loss_"):
            kind = BACKWARD
    return found


def lanes(spans: Spans, rank: int) -> list[tuple[str, list[tuple[str, Span]]]]:
    """What is drawn of a rank: (title, (kind, span) ...) from top to bottom."""
    host = spans[rank, HOST]
    waits = [(EXCHANGE, row) for row in host if is_exchange(row)] + [(WAITING, row) for row in host if row.name in WAITS]
    buckets = sorted((int(track.split()[1]), rows) for (owner, track), rows in spans.items()
                     if owner == rank and track.startswith("bucket "))  # fmt: skip
    return [
        ("device", kinds(spans.get((rank, DEVICE), []))),
        ("host waits", waits),
        *((f"bucket {k}", [(GRADIENTS, row) for row in rows]) for k, rows in buckets),
    ]


def draw(spans: Spans, number: int, path: Path) -> None:
    """One step of all ranks, from the first begin to the last end."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    steps = steps_of(spans)
    if number not in steps:
        raise Refused(f"--step {number} is not in this trace: choose one of {min(steps)} to {max(steps)}")
    begin, end = (choose(getattr(span, at) for span in steps[number].values())
                  for choose, at in ((min, "begin"), (max, "end")))  # fmt: skip
    rows = [(f"rank {rank}: {title}", bars) for rank in sorted(steps[number]) for title, bars in lanes(spans, rank)]
    figure, axes = figure_of(11, 1.3 + 0.28 * len(rows), f"step {number}, {len(steps[number])} ranks", squeeze=False)
    chart = axes[0][0]
    for place, (_, bars) in enumerate(rows):
        for kind, row in bars:
            if begin <= row.end and row.begin <= end:
                chart.barh(place, row.end - row.begin, 0.7, row.begin - begin, color=COLOURS[kind], linewidth=0)
    chart.set(xlabel="ms", xlim=(0, end - begin), yticks=range(len(rows)), yticklabels=[title for title, _ in rows])
    chart.invert_yaxis()
    patches = [matplotlib.patches.Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.savefig(path, dpi=130)


# The program


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = __doc__.split("\n\n")[0].split(": ", 1)[1]
    command = argparse.ArgumentParser(prog="python -m dpresnet.timeline", description=text)
    command.add_argument("trace", type=Path, metavar="TRACE", help="what --trace has left")
    command.add_argument("--png", type=Path, metavar="FILE", help="draw a step; the suffix chooses the format")
    command.add_argument("--step", type=int, metavar="N", help="which one (one of median duration)")
    return command


def run(args: argparse.Namespace) -> None:
    """Prints and draws."""
    check_folder(args.png, "--png")
    if args.png:
        check()
    spans = load(args.trace)
    print(report(spans))
    if args.png:
        draw(spans, typical(steps_of(spans)) if args.step is None else args.step, args.png)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of what was refused."""
    return exit_code(lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
