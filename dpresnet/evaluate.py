"""``python -m dpresnet.evaluate CHECKPOINT [DATA]``: how often a trained network is right on a data set, and where it errs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpresnet import environment
from dpresnet.bench.facts import check_folder
from dpresnet.errors import Refused, exit_code
from dpresnet.evaluation import FIRST, Evaluation

MOST_LISTED = 30  # classes that are listed with their accuracy


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = __doc__.split(": ", 1)[1]
    command = argparse.ArgumentParser(prog="python -m dpresnet.evaluate", description=text, allow_abbrev=False)
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run's folder: its best.h5")
    command.add_argument("data", nargs="?", metavar="DATA", help="digits, synthetic or FILE.h5 (what the run trained on)")
    command.add_argument("--split", choices=("train", "test"), default="test", help="(test)")
    command.add_argument("--no-ema", dest="ema", action="store_false", help="the parameters, not their moving averages")
    command.add_argument("--json", type=Path, metavar="FILE", help="all figures and the confusion matrix")
    add_device(command)
    return command


def add_device(command: argparse.ArgumentParser) -> None:
    """The flags of every command that classifies."""
    command.add_argument("--batch", type=int, default=0, metavar="N", help="images at a time (as in training)")
    command.add_argument("--device", default="auto", metavar="auto|INDEX|NAME", help="OpenCL device (auto)")
    command.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: all cores")


def evaluate(args: argparse.Namespace) -> tuple[Evaluation, Any]:
    """The evaluation and the classifier. Refused if the data are not of the kind that the network was trained on."""
    environment.prepare(args.threads, 0, 1)
    from tqdm import tqdm

    from dpresnet.classifier import Classifier
    from dpresnet.data import load

    classifier = Classifier(args.checkpoint, args.batch, args.device, args.ema)
    cfg, name = classifier.cfg, args.data or classifier.cfg.dataset
    dataset = load(name, cfg.seed, cfg.image, cfg.channels, cfg.num_classes)
    check(classifier.samples, dataset, name)
    batches = classifier.batches(getattr(dataset, args.split))
    return classifier.evaluate(tqdm(batches, unit="batch", leave=False, disable=None)), classifier


def check(trained: Any, dataset: Any, name: str) -> None:
    """Refuses images of another shape, and classes that do not mean the same."""
    if tuple(dataset.shape) != tuple(trained.shape):
        raise Refused(f"{name} has images of {list(dataset.shape)}, the network was trained on {list(trained.shape)}")
    if tuple(dataset.class_names) != tuple(trained.class_names):
        theirs, ours = (f"{len(names)} ({', '.join(names[:3])}, ...)" for names in (dataset.class_names, trained.class_names))
        raise Refused(f"{name} has the classes {theirs}, the network was trained on {ours} of {trained.name}")


def report(found: Evaluation, names: Sequence[str]) -> str:
    """What is printed."""
    lines = [f"accuracy {found.accuracy:.2%}, loss {found.mean_loss:.4f}, {found.count} images"]
    if found.classes > FIRST:
        lines[0] = lines[0].replace(", loss", f", top-{FIRST} {found.top5:.2%}, loss")
    if len(names) <= MOST_LISTED:
        taken = found.confusion.copy()
        np.fill_diagonal(taken, 0)
        width = max(map(len, names))
        for row, (name, accuracy) in enumerate(zip(names, found.per_class_accuracy, strict=True)):
            most = int(taken[row].argmax())
            wrong = f", taken for {names[most]} {taken[row, most]} times" if taken[row, most] else ""
            lines.append(f"  {name:{width}s} " + ("no images" if accuracy is None else f"{accuracy:7.2%}{wrong}"))
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Prints and writes."""
    check_folder(args.json, "--json")
    found, classifier = evaluate(args)
    print(report(found, classifier.class_names))
    if args.json:
        saved = classifier.saved
        facts = {"checkpoint": str(saved.path), "step": saved.meta["progress"]["step"], "split": args.split,
                 "ema": classifier.averaged, "images": found.count, "loss": found.mean_loss, "accuracy": found.accuracy,
                 "top5": found.top5, "classes": list(classifier.class_names), "per_class_accuracy": found.per_class_accuracy,
                 "matrix": found.confusion.tolist()}  # fmt: skip
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 78 for what was refused."""
    return exit_code(lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
