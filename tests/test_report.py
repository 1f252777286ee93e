"""The page about runs: what it reads, what it leaves out, what it refuses."""

import json

import numpy as np
import pytest

from dpresnet import report
from tests.launching import python


def step(number, **values):
    return {"step": number, "samples": 64 * number, "lr": 0.5, "loss": 1.0} | values


def folder(path, lines, config=None, **files):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config or {"arch": "resnet20", "lr": 0.5}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_lines_of_steps_and_of_epochs_are_told_apart(tmp_path):
    lines = [step(1), step(2), {"step": 2, "epoch": 0, "train_loss": 1.5, "test_accuracy": 0.25}, step(3)]
    run = report.load(folder(tmp_path / "run", lines, result={"steps": 3}))
    assert (run.name, [line["step"] for line in run.steps], [line["step"] for line in run.epochs]) == ("run", [1, 2, 3], [2])
    assert (run.result, run.confusion) == ({"steps": 3}, {})


def test_long_curves_become_means_and_short_ones_stay():
    steps = [step(n, loss=float(n % 7)) for n in range(1, 12_346)]
    x, y = report.thinned(steps, "loss")
    assert len(x) == report.SMOOTHED and x[0] == np.arange(1, 125).mean()
    sizes = [len(part) for part in np.array_split(np.arange(12_345), report.SMOOTHED)]
    assert np.average(y, weights=sizes) == pytest.approx(np.mean([line["loss"] for line in steps]))
    x, y = report.thinned(steps[:3], "loss")
    assert (x.tolist(), y.tolist()) == ([1, 2, 3], [1, 2, 3])


def test_values_that_were_not_finite_leave_a_gap():
    x, y = report.thinned([step(1), step(2, loss=None), step(3, loss=3.0)], "loss")
    assert (x.tolist(), y.tolist()) == ([1, 3], [1, 3])
    assert [part.size for part in report.thinned([step(1, loss=None)], "loss")] == [0, 0]


def test_settings_that_differ_are_marked():
    found = report.rows([{"lr": 0.5, "arch": "a", "trace": None}, {"lr": 0.25, "arch": "a"}], ["lr", "arch", "trace", "other"])
    assert [(row["name"], row["cells"], row["differs"]) for row in found] == [
        ("lr", ["0.5", "0.25"], True), ("arch", ["a", "a"], False)]  # fmt: skip


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_what_is_no_run_is_refused(tmp_path, name):
    run = folder(tmp_path / "run", [step(1)])
    (run / name).write_text('{"step": 1')
    with pytest.raises(report.Refused, match="holds a damaged file"):
        report.load(run)
    (run / name).unlink()
    with pytest.raises(report.Refused, match=f"is not the folder of a run: {name}: No such file"):
        report.load(run)


def test_the_command_refuses_before_it_draws(tmp_path):
    done = python(["-m", "dpresnet.report", tmp_path])
    assert done.returncode == 78 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
