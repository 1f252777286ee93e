"""``python -m dpresnet.report RUN...``: what runs have come to, as one HTML file that needs nothing else: curves, results,
settings, environment and confusion matrices. Several runs are drawn into the same pictures; ``-o FILE.png`` has only these.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpresnet import __version__
from dpresnet.bench.facts import check_folder
from dpresnet.bench.picture import SERIES, figure_of, style
from dpresnet.errors import Refused, exit_code, require

TEMPLATE = Path(__file__).with_name("templates") / "report.html"
CURVES = (  # title, key of the steps' lines, that of the epochs' lines in training and in the test
    ("loss", "loss", "train_loss", "test_loss"),
    ("accuracy", "", "train_accuracy", "test_accuracy"),
    ("learning rate", "lr", "", ""),
    ("loss scale", "loss_scale", "", ""),
    ("images/s", "images_per_s", "", ""),
)
SUMMARY = ("arch", "dataset", "precision", "replicas", "ranks", "steps", "epochs", "test_accuracy", "test_top5",
           "ema_test_accuracy", "test_loss", "images_per_s", "wall_s", "peak_rss_mb", "params_sha256")  # fmt: skip
CONFUSIONS = {"matrix": "", "ema_matrix": ", moving average of the parameters"}  # of confusion.json
SMOOTHED = 100  # points that are left of the steps' lines, each the mean of what lies between
MOST_NAMED = 40  # classes that still have names beside a confusion matrix
MOST_COUNTED = 20  # classes whose counts are written into it
PICTURES = (".png", ".svg", ".pdf")  # suffixes of --out that mean the curves alone


@dataclass(frozen=True)
class Run:
    """The files of a run: ``result`` is and ``confusion`` are empty before its end."""

    name: str
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    result: dict[str, Any]
    confusion: dict[str, Any]


def load(folder: Path) -> Run:
    """Refused where there is no run, or what it left is damaged."""
    try:
        config = json.loads((folder / "config.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        result, confusion = (_optional(folder / name) for name in ("result.json", "confusion.json"))
    except OSError as error:
        raise Refused(f"{folder} is not the folder of a run: {Path(error.filename).name}: {error.strerror}") from None
    except ValueError as error:
        raise Refused(f"{folder} holds a damaged file: {error}") from None
    steps, epochs = ([line for line in lines if key in line] for key in ("lr", "train_loss"))
    return Run(folder.resolve().name, config, steps, epochs, result, confusion)


def _optional(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


# Pictures


def thinned(steps: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a curve, at most `SMOOTHED` means; what was not finite is left out."""
    points = np.array([(line["step"], line[key]) for line in steps if line.get(key) is not None], float).reshape(-1, 2)
    parts = np.array_split(points, min(SMOOTHED, len(points))) if len(points) else []
    means = np.array([part.mean(axis=0) for part in parts]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


def draw_curves(runs: list[Run]) -> Any:
    """All curves, a colour for each run; training dashed where the test is drawn too."""
    figure, axes = figure_of(11, 7, "", nrows=2, ncols=3)
    for chart, (title, by_step, train, test) in zip(axes.flat, CURVES, strict=False):
        for number, run in enumerate(runs):
            colour = SERIES[number % len(SERIES)]
            if by_step:
                chart.plot(*thinned(run.steps, by_step), color=colour, alpha=0.35 if test else 1, linewidth=1)
            for key, dashes in ((train, "--"), (test, "-")):
                if key:
                    chart.plot(*thinned(run.epochs, key), dashes, color=colour, marker=".", markersize=3)
        chart.set(title=title, xlabel="step")
        if by_step in ("loss", "loss_scale"):
            chart.set_yscale("log", base=2 if by_step == "loss_scale" else 10)
    legend = axes.flat[len(CURVES)]
    legend.axis("off")
    for number, run in enumerate(runs):
        legend.plot([], [], color=SERIES[number % len(SERIES)], label=run.name)
    legend.plot([], [], "k-", marker=".", label="test, each epoch")
    legend.plot([], [], "k--", marker=".", label="training, each epoch")
    legend.legend(loc="center", frameon=False)
    return figure


def draw_confusion(names: list[str], matrix: list[list[int]]) -> Any:
    """Rows are what the samples are, columns what they were taken for; colours are shares of a row."""
    counts = np.array(matrix)
    side = min(10.0, 3.0 + 0.3 * len(names))
    figure, axes = figure_of(side, side, "", squeeze=False)
    chart = axes[0][0]
    chart.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    if len(names) <= MOST_NAMED:
        places = range(len(names))
        chart.set(yticks=places, yticklabels=names)
        chart.set_xticks(places, names, rotation=90)
    if len(names) <= MOST_COUNTED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                chart.text(column, row, str(count), ha="center", va="center", fontsize=8,
                           color="white" if 2 * count > counts[row].sum() else "black")  # fmt: skip
    chart.set(ylabel="is", xlabel="was taken for")
    return figure


def encoded(figure: Any) -> str:
    """The picture as text."""
    from matplotlib import pyplot

    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    pyplot.close(figure)
    return base64.b64encode(file.getvalue()).decode()


# The page


def rows(runs: list[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each key that any run has, with a cell for each run."""
    found = []
    for key in keys:
        values = [run.get(key) for run in runs]
        if any(value is not None for value in values):
            found.append({"name": key, "cells": [shown(value) for value in values], "differs": len(set(map(str, values))) > 1})
    return found


def shown(value: Any) -> str:
    """Short enough for a cell."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return "" if value is None else str(value)


def page(runs: list[Run]) -> str:
    """The HTML file."""
    import jinja2

    settings = rows([run.config for run in runs], list(dict.fromkeys(key for run in runs for key in run.config)))
    facts = [run.result.get("versions", {}) for run in runs]
    summary = rows([run.config | run.result for run in runs], SUMMARY)
    for row in summary:
        row["differs"] = False
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    return template.render(
        title=f"dpresnet: {', '.join(run.name for run in runs)}",
        names=[run.name for run in runs],
        summary=summary,
        curves=encoded(draw_curves(runs)),
        confusions=[(f"{run.name}{words}", encoded(draw_confusion(run.confusion["classes"], run.confusion[key])))
                    for run in runs for key, words in CONFUSIONS.items() if key in run.confusion],
        settings=settings,
        differing=any(row["differs"] for row in settings),
        environment=rows(facts, list(dict.fromkeys(key for fact in facts for key in fact))),
        version=__version__,
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = __doc__.split(": ", 1)[1]
    command = argparse.ArgumentParser(prog="python -m dpresnet.report", description=text)
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run (its --out)")
    command.add_argument("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE",
                         help="the page, or as .png, .svg or .pdf its curves alone (report.html)")  # fmt: skip
    return command


def run(args: argparse.Namespace) -> None:
    """Writes the page or the picture."""
    for module, library in (("jinja2", "Jinja2"), ("matplotlib", "matplotlib")):
        require(module, library, "a report", "report")
    check_folder(args.out, "--out")
    runs = [load(folder) for folder in args.runs]
    style()
    try:
        if args.out.suffix in PICTURES:
            draw_curves(runs).savefig(args.out, dpi=110)
        else:
            args.out.write_text(page(runs), encoding="utf-8")
    except OSError as error:
        raise Refused(f"--out {args.out}: cannot be written: {error.strerror}") from None
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 78 for what is no run."""
    return exit_code(lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
