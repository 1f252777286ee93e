"""Whole runs by other recipes than plain SGD: the same bits on any ranks and after any interruption, and what an evaluation
leaves.
"""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from dpresnet import trail
from dpresnet.checkpoint import load
from tests.launching import python
from tests.system.test_train import curve, metrics, sha, succeed, train

BASE = ("--replicas", "4", "--batch", "32", "--epochs", "2", "--steps", "15", "--warmup-epochs", "0.5", "--save-every-epochs",
        "0", "--save-every-steps", "5", "--keep", "9", "--record-every", "7", "--clip-norm", "1", "--ema", "0.9")  # fmt: skip
RECIPES = {
    "lars": ("--optimizer", "lars", "--trust", "0.02", "--decay", "weights", "--schedule", "step", "--milestones", "1"),
    "adamw": ("--optimizer", "adamw", "--beta2", "0.99", "--schedule", "onecycle"),
}
RANKS = {"lars": (2, 1), "adamw": (2, 4)}  # before and after the interruption


def flags(name: str) -> tuple[str, ...]:
    return BASE + RECIPES[name]


def arrays(out: Path, step: int) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in load(out / "checkpoints" / f"step-{step:08d}.h5").arrays.items()}


@pytest.fixture(scope="module", params=RECIPES)
def alone(request, tmp_path_factory) -> Path:
    """15 steps, one epoch and a quarter, in one process without MPI."""
    out = tmp_path_factory.mktemp("runs") / request.param
    succeed(0, out, base=flags(request.param))
    return out


def test_ranks_change_no_bit_and_a_run_goes_on_with_others(alone, tmp_path):
    """Interrupted after the fifth step, in mid-epoch. All of the optimizer's state is compared."""
    base, (first, second) = flags(alone.name), RANKS[alone.name]
    succeed(first, tmp_path, "--steps", "5", base=base)
    assert succeed(second, tmp_path, "--resume", "auto", base=base)["params_sha256"] == sha(alone)
    assert curve(tmp_path) == curve(alone)
    for step in (5, 10, 15):
        assert arrays(tmp_path, step) == arrays(alone, step)
    groups = {name.split("/")[0] for name in arrays(alone, 15)}
    more = {"second_moment"} if alone.name == "adamw" else set()
    assert groups == {"param", "momentum", "buffer", "ema_param", "ema_buffer"} | more
    ours, theirs = (json.loads((out / "result.json").read_text()) for out in (tmp_path, alone))
    speed = {"ranks", "images_per_s", "wall_s", "peak_rss_mb", "versions"}  # of which one is that of MPI
    assert {k: v for k, v in ours.items() if k not in speed} == {k: v for k, v in theirs.items() if k not in speed}
    assert (tmp_path / "confusion.json").read_text() == (alone / "confusion.json").read_text()


def test_a_run_is_verified(alone):
    done = python(["-m", "dpresnet.verify", str(alone)], timeout=200)
    assert done.returncode == 0, done.stderr
    for counted in ("15 steps", "2 recorded steps of a rank", "4 checkpoints", "1 epochs", "1 result"):
        assert counted in done.stdout
    updated = {mark.tensor for mark in trail.read(alone / "trail")[7][0].marks if mark.entry == "updated"}
    assert len(updated) == len(arrays(alone, 15)) and {"fc.bias.ema", "bn1.running_var.ema"} <= updated


def test_what_recipes_add_to_the_metrics_is_compared(alone, tmp_path):
    key = {"lars": "grad_norm", "adamw": "ema_test_top5"}[alone.name]
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    lines = metrics(tmp_path)
    changed = [line for line in lines if key in line][-1]
    changed[key] += 2**-40
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = python(["-m", "dpresnet.verify", str(tmp_path), "--from", "10"], timeout=200)
    assert found.returncode == 70 and f"DIFFERENT: step {changed['step']}: {key} was " in found.stderr, found.stderr


def test_result_and_metrics_tell_of_averages_classes_and_norms(alone):
    result = json.loads((alone / "result.json").read_text())
    confusion = json.loads((alone / "confusion.json").read_text())
    for before in ("", "ema_"):
        matrix = np.array(confusion[f"{before}matrix"])
        assert matrix.shape == (10, 10) and matrix.sum() == 359  # the test split, each image once
        assert result[f"{before}test_accuracy"] == np.trace(matrix) / 359 <= result[f"{before}test_top5"] <= 1
        assert result[f"{before}per_class_accuracy"] == (np.diag(matrix) / matrix.sum(axis=1)).tolist()
    assert confusion["matrix"] != confusion["ema_matrix"]
    [epoch] = [line for line in metrics(alone) if "train_loss" in line]
    assert {"test_top5", "ema_test_loss", "ema_test_accuracy", "ema_test_top5"} <= epoch.keys()
    norms = [line["grad_norm"] for line in metrics(alone) if "loss" in line]
    assert len(norms) == 15 and max(norms) > 1 and min(norms) > 0
    saved = load(alone / "checkpoints" / "best.h5")
    assert saved.meta["progress"]["best_accuracy"] == epoch["ema_test_accuracy"]


def test_plain_sgd_leaves_the_files_that_it_always_left_and_no_other_optimizer_goes_on_with_them(tmp_path):
    base = ("--replicas", "2", "--batch", "8", "--steps", "1")
    result = succeed(0, tmp_path, base=base)
    with h5py.File(tmp_path / "checkpoints" / "step-00000001.h5") as file:
        assert sorted(file) == ["buffer", "meta", "momentum", "param"]
    assert not any(key.startswith("ema_") for key in result)
    assert "grad_norm" not in metrics(tmp_path)[0]
    refused = train(0, tmp_path, "--optimizer", "adamw", "--resume", "auto", base=base)
    assert refused.returncode == 78 and "--optimizer was 'sgd', now 'adamw'" in refused.stderr
    assert (tmp_path / "result.json").exists()
