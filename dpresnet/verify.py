"""``python -m dpresnet.verify RUN``: repeats a recorded run in one process, whatever ranks it had, and compares bit for bit.

What a run has left is compared as far as it goes: the lines of metrics.jsonl, checkpoints, the digest in result.json, and the
trail of a run with ``--record-every``, which tells entry by entry what its replicas computed. The first difference is named
with its step; with a trail also with plan entry, tensor, replica, and the rank and host that had it. Exit codes: 0 all the
same, 70 something differs, 78 there is nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpresnet import environment, trail
from dpresnet.checkpoint import Checkpoint, load
from dpresnet.config import Config, from_json
from dpresnet.errors import DifferentBits, Refused, exit_code
from dpresnet.evaluation import figures
from dpresnet.reporter import plain

OF_STEPS = ("epoch", "samples", "loss", "lr", "loss_scale", "skipped")  # what a line of metrics says of a step
OF_EPOCHS = ("train_loss", "train_accuracy")  # and of the epoch, besides the figures of its evaluation


@dataclass(frozen=True)
class Run:
    """What a run has left: its configuration, and what there is to compare, by step."""

    folder: Path
    cfg: Config
    steps: dict[int, dict[str, Any]]
    epochs: dict[int, dict[str, Any]]
    checkpoints: dict[int, Path]
    trails: dict[int, list[trail.Recorded]]
    result: dict[str, Any]

    @property
    def last(self) -> int:
        """The last step that left something."""
        return max([*self.steps, *self.checkpoints, *self.trails], default=0)


def read_run(folder: Path) -> Run:
    """Refused if the folder is not one that training has written."""
    try:
        cfg = from_json(json.loads((folder / "config.json").read_text()))
        whole = (folder / "metrics.jsonl").read_text().rpartition("\n")[0]  # a run that was killed may have torn the last line
        lines = [json.loads(line) for line in whole.splitlines()]
        result = json.loads((folder / "result.json").read_text()) if (folder / "result.json").exists() else {}
    except OSError as error:
        raise Refused(f"{folder} is not the folder of a run: {error.filename} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise Refused(f"{folder} is not the folder of a run: {error}") from None
    return Run(
        folder, cfg,
        steps={line["step"]: line for line in lines if "loss" in line},
        epochs={line["step"]: line for line in lines if "train_loss" in line},
        checkpoints={int(path.stem.removeprefix("step-")): path for path in (folder / "checkpoints").glob("step-*.h5")},
        trails=trail.read(folder / "trail"),
        result=result,
    )  # fmt: skip


@dataclass
class Comparison:
    """What has been compared so far, and found to be the same."""

    run: Run
    same: Counter = field(default_factory=Counter)

    def step(self, course: Any, line: dict[str, Any], marks: trail.Trail) -> None:
        """After a step; raises DifferentBits at the first thing that differs, the most telling first."""
        step = course.progress.step
        trails = self.run.trails.get(step, ())
        differing = [(mark, recorded) for recorded in trails if (mark := recorded.first_difference(marks))]
        if differing:  # on one rank it has begun; statistics and gradients have carried it to the others
            mark, recorded = min(differing, key=lambda pair: pair[0])
            raise DifferentBits(f"step {step}: {mark}, was another on rank {recorded.rank} on {recorded.host}")
        if trails:
            self.same["recorded steps of a rank"] += len(trails)
        if step in self.run.steps:
            self._compare(step, line, self.run.steps[step])
            self.same["steps"] += 1
        if step in self.run.checkpoints:
            self._compare_arrays(step, course.trainer.arrays(), load(self.run.checkpoints[step]))
            self.same["checkpoints"] += 1

    def epoch(self, step: int, line: dict[str, Any]) -> None:
        """After an epoch and its evaluation."""
        self._compare(step, line, self.run.epochs[step])
        self.same["epochs"] += 1

    def end(self, step: int, digest: str) -> None:
        """After the last step of the run."""
        self._compare(step, {"params_sha256": digest}, self.run.result)
        self.same["result"] += 1

    def _compare(self, step: int, repeated: dict[str, Any], recorded: dict[str, Any]) -> None:
        for key, value in plain(repeated).items():
            if recorded.get(key) != value:
                near = "" if self.run.trails.get(step) else (
                    "; train again with --record-every to see which entry and rank it comes from")
                raise DifferentBits(f"step {step}: {key} was {recorded.get(key)!r}, is {value!r}{near}")

    def _compare_arrays(self, step: int, repeated: dict[str, np.ndarray], saved: Checkpoint) -> None:
        for name, array in repeated.items():
            if not np.array_equal(array.view(np.uint32), saved.arrays[name].view(np.uint32)):
                count = np.count_nonzero(array.view(np.uint32) != saved.arrays[name].view(np.uint32))
                raise DifferentBits(f"step {step}: {name} of {saved.path} differs in {count} of {array.size} values")


def build(run: Run, saved: Checkpoint | None) -> Any:
    """The run's course in this process, with all its replicas, at its begin or at a checkpoint."""
    from dpresnet.comm import Solo
    from dpresnet.course import Course
    from dpresnet.data import load as load_data
    from dpresnet.device import Device, choose_device
    from dpresnet.setup import build_model, build_trainer, check_dataset

    cfg = run.cfg
    dataset = load_data(cfg.dataset, cfg.seed, cfg.image, cfg.channels, cfg.num_classes, cfg.data_mb * 2**20)
    check_dataset(saved, dataset, cfg.dataset)
    trainer = build_trainer(cfg, build_model(Device(choose_device(cfg.device)), cfg, dataset), Solo())
    course = Course(cfg, dataset, trainer)
    course.begin(saved)
    return course


def repeat(run: Run, course: Any, until: int) -> Comparison:
    """Repeats the steps up to ``until``; raises DifferentBits at the first difference."""
    comparison = Comparison(run)
    for step, line, marks in steps(course, run, until):
        comparison.step(course, line, marks)
        if course.at_end_of_epoch and step in run.epochs:
            comparison.epoch(step, epoch_line(course))
        if step == run.result.get("steps"):
            comparison.end(step, course.trainer.digest())
    return comparison


def steps(course: Any, run: Run, until: int) -> Iterator[tuple[int, dict[str, Any], trail.Trail]]:
    """Each step with its line of metrics and its trail, which is empty where none was recorded."""
    from tqdm import tqdm

    progress = course.progress
    with tqdm(total=until, initial=progress.step, unit="step", leave=False, disable=None) as bar:
        while progress.step < until:
            for epoch, micro_batches in course.rest_of_epoch():
                marks = trail.Trail()
                lr, scale = course.lr, course.trainer.scaler.scale
                outcome = course.step(micro_batches, trail=marks if progress.step + 1 in run.trails else None)
                values = (epoch, progress.samples, outcome.loss / outcome.count, lr, scale, course.trainer.scaler.skipped)
                bar.update()
                norm = {"grad_norm": outcome.grad_norm} if run.cfg.clip_norm else {}
                yield progress.step, dict(zip(OF_STEPS, values, strict=True)) | norm, marks
                if progress.step == until:
                    return


def epoch_line(course: Any) -> dict[str, Any]:
    """What an epoch leaves in the metrics; clears its sums, as training does."""
    test = figures(course.evaluate())
    return dict(zip(OF_EPOCHS, course.progress.close_epoch(), strict=True)) | test


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="python -m dpresnet.verify", description=__doc__.split("\n\n")[0].split(": ", 1)[1])
    command.add_argument("run", type=Path, metavar="RUN", help="folder of the run (its --out)")
    command.add_argument("--from", dest="start", type=int, default=0, metavar="STEP",
                         help="begin at the checkpoint of this step (0: at the begin of the run)")  # fmt: skip
    command.add_argument("--steps", type=int, default=0, metavar="N", help="repeat so many (0: up to the last recorded one)")
    command.add_argument("--device", help="OpenCL device: its index, or part of its name (as the run chose it)")
    command.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    return command


def run_program(args: argparse.Namespace) -> str:
    """Repeats and compares; says what was the same."""
    run = read_run(args.run)
    if run.cfg.reduce == "mpi":
        raise Refused(f"{args.run}: --reduce mpi added in an order of the MPI library's, only --reduce tree can be repeated")
    device = run.cfg.device if args.device is None else args.device
    run = replace(run, cfg=replace(run.cfg, device=device, threads=args.threads, debug=False))
    if args.start and args.start not in run.checkpoints:
        raise Refused(f"--from {args.start}: there are checkpoints of the steps {sorted(run.checkpoints)}")
    until = min(run.last, args.start + args.steps) if args.steps else run.last
    if until <= args.start:
        raise Refused(f"{args.run} has recorded nothing after step {args.start}: nothing can be compared")
    environment.prepare(args.threads, 0, 1)
    saved = load(run.checkpoints[args.start]) if args.start else None
    course = build(run, saved)
    try:
        same = repeat(run, course, until).same
    except DifferentBits as error:
        raise DifferentBits(f"{error}{other_device(run, saved, course.trainer.model.device.name)}") from None
    compared = ", ".join(f"{count} {name}" for name, count in same.items())
    return f"{args.run}: steps {args.start + 1} to {until} repeated, every bit the same ({compared})"


def other_device(run: Run, saved: Checkpoint | None, name: str) -> str:
    """What to think of first, if the run was another device's."""
    recorded = run.result.get("device") or (saved.meta["versions"]["device"] if saved else name)
    return "" if recorded == name else f" (the run was on {recorded}, this is {name}: other devices round differently)"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of what differs or was refused, with one line on stderr."""
    return exit_code(lambda: print(run_program(parser().parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
